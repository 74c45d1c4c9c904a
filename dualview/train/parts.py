"""The parts of an INF-LLaVA that a stage trains: as they are, or by low-rank matrices."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from dualview.arguments import check_choice, check_instance, shown
from dualview.train.config import PARTS, LoraConfig

MODULES = {"dem": "dem", "projector": "multi_modal_projector", "language_model": "language_model"}
"""Names of the parts in an `InfLlavaModel`."""


def freeze(model: nn.Module, train: tuple[str, ...] | list[str]) -> nn.Module:
    """Train some parts of an INF-LLaVA and no others; the vision tower never.

    Args:
        model: An `InfLlavaForConditionalGeneration`.
        train: Some of "dem", "projector" and "language_model", to which its head belongs.

    Returns:
        The model.

    Raises:
        TypeError: The model is another.
        ValueError: There is no such part.

    Example:
        >>> from dualview.models import InfLlavaConfig, InfLlavaForConditionalGeneration
        >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        >>> config = InfLlavaConfig(vision_config={**sizes, "image_size": 28, "patch_size": 14},
        ...                         text_config={**sizes, "vocab_size": 64}, grid=(2, 3), image_token_id=63)
        >>> model = freeze(InfLlavaForConditionalGeneration(config), ["dem", "projector"])
        >>> sorted({name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad})
        ['dem', 'multi_modal_projector']
    """
    from dualview.models.inf_llava import InfLlavaForConditionalGeneration

    check_instance(model, "model", InfLlavaForConditionalGeneration, "an InfLlavaForConditionalGeneration")
    if not isinstance(train, (tuple, list)):
        raise ValueError(f"train={shown(train)}: must be a list of some of {', '.join(PARTS)}.")
    for part in train:
        check_choice(part, "train", PARTS)
    inner: Any = model.base_model
    model.requires_grad_(False)
    for part in train:
        getattr(inner, MODULES[part]).requires_grad_(True)
    if "language_model" in train:
        head: Any = getattr(model, "lm_head")  # noqa: B009 - nn.Module knows no names
        head.requires_grad_(True)
    return model


def with_lora(model: nn.Module, lora: LoraConfig, train: tuple[str, ...] | list[str]) -> nn.Module:
    """Peft's model: low-rank matrices in the language model, and the other parts trained as they are.

    Args:
        model: An `InfLlavaForConditionalGeneration`.
        lora: Rank, scale and layers.
        train: As for [`freeze`][dualview.train.freeze].

    Raises:
        ValueError: ``lora.target_modules`` names no layer, one that is not of the language model, or one that cannot
            have such matrices.
    """
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    said = f"lora.target_modules={shown(lora.target_modules)}: "
    names = [name for name, _ in model.named_modules() if re.fullmatch(lora.target_modules, name)]
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and _is_language(name)]
    if not names or not all(map(_is_language, names)):
        wrong = next((name for name in names if not _is_language(name)), None)
        raise ValueError(
            f"{said}{'is the whole name of no layer' if wrong is None else f'also names {wrong}'}; it must name layers "
            f"of the language model, and only these, such as {layers[0]}: by default it is "
            f"{shown(LoraConfig.target_modules)}."
        )
    whole = [MODULES[part] for part in train if part != "language_model"]
    config = PeftConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        modules_to_save=whole or None,
    )
    try:
        made: nn.Module = get_peft_model(model, config)
    except ValueError as error:
        wrong = next((name for name in names if f" {model.get_submodule(name)} " in str(error)), names[0])
        raise ValueError(
            f"{said}names what cannot have such matrices, as {wrong}: name layers such as {layers[0]}."
        ) from error
    return made


def _is_language(name: str) -> bool:
    return "language_model" in name.split(".") or name == "lm_head"
