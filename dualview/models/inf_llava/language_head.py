"""From hidden states to logits, as the language model's own class does it.

A linear layer and the configuration alone do not say it: Granite divides logits by `logits_scaling`, HyperCLOVA X
multiplies them by it, and whether the layer has a bias stands in the class only. So the layer is built as that class
builds it, and the scaling is known by model type.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

Rule = tuple[str, Callable[[Tensor, float], Tensor]]

DIVIDE: Rule = ("logits_scaling", lambda logits, scale: logits / scale)
MULTIPLY: Rule = ("logit_scale", lambda logits, scale: logits * scale)
SOFTCAP: Rule = ("final_logit_softcapping", lambda logits, cap: torch.tanh(logits / cap) * cap)

RULES = {
    "granite": DIVIDE,
    "granitemoe": DIVIDE,
    "cohere": MULTIPLY,
    "cohere2": MULTIPLY,
    "gemma2": SOFTCAP,
    "gemma3_text": SOFTCAP,
}
"""What follows the linear layer, by model type: families give one name (`logits_scaling`) different meanings."""

SCALING_FIELDS = (DIVIDE[0], MULTIPLY[0], SOFTCAP[0], "lm_head_multiplier", "output_multiplier")
"""Fields by which some family scales its logits."""


def build_head(text_config: Any) -> nn.Linear:
    """The linear layer of the head, as the language model's own class has it.

    Raises:
        ValueError: That class has a head of another build, or scales logits in a way that is not known here.
    """
    model_type = text_config.model_type
    scaling = {field: getattr(text_config, field, None) for field in SCALING_FIELDS}
    changed = {field: value for field, value in scaling.items() if value not in (None, 1)}
    if changed and model_type not in RULES:
        raise ValueError(
            f"text_config of model_type={model_type!r} has {changed}, and what that does to logits is known for "
            f"{tuple(RULES)} only: use one of these, or a language model without it."
        )
    with torch.device("meta"):
        own = AutoModelForCausalLM.from_config(copy.deepcopy(text_config))
    head = own.get_output_embeddings()
    if not isinstance(head, nn.Linear) or all(child is not head for child in own.children()):
        raise ValueError(
            f"text_config of model_type={model_type!r}: the head of {type(own).__name__} is more than a linear layer. "
            "Use a causal language model whose logits are a linear layer of its hidden states."
        )
    return nn.Linear(head.in_features, head.out_features, bias=head.bias is not None)


def finish_logits(logits: Tensor, text_config: Any) -> Tensor:
    """What the language model's own class does to the output of that layer."""
    if text_config.model_type not in RULES:
        return logits
    field, rule = RULES[text_config.model_type]
    value = getattr(text_config, field)
    return logits if value is None else rule(logits, value)
