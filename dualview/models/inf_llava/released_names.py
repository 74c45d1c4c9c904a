"""What a released checkpoint is: its names of tensors, its configuration, and how to tell it from other LLaVAs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig

from dualview.models.inf_llava.configuration_inf_llava import CLIP_VIT_L_14_336, InfLlavaConfig
from dualview.models.inf_llava.shards import CheckpointError
from dualview.ops.released_weights import RELEASED_NAMES

TOWER = "model.vision_tower.vision_tower.vision_model."
LAYERS = (
    (TOWER, "model.vision_tower."),
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    *((f"model.spatial_embed.{old}.", f"model.dem.{new}.") for old, new in RELEASED_NAMES.items()),
    ("model.embed_tokens.", "model.language_model.embed_tokens."),
    ("model.layers.", "model.language_model.layers."),
    ("model.norm.", "model.language_model.norm."),
    ("lm_head.", "lm_head."),
)
"""Beginnings of names in a released checkpoint, and here."""
COMPUTED = re.compile(r"embeddings\.position_ids$|rotary_emb\.inv_freq$")
"""Tensors that older versions of transformers saved and that are computed."""
EXPECTED = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_feature": "patch",
    "mm_patch_merge_type": "flat",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
}
"""What the configuration of a released checkpoint says where it says something."""
LLAMA_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "max_position_embeddings", "hidden_act", "rms_norm_eps", "rope_theta", "rope_scaling"),
    *("attention_bias", "mlp_bias", "attention_dropout", "initializer_range", "bos_token_id", "eos_token_id"),
)


def renamed(name: str, *, back: bool = False) -> str | None:
    """A released name in this package, or the other way round; None for one that has no place there."""
    for pair in LAYERS:
        old, new = reversed(pair) if back else pair
        if name.startswith(old):
            return new + name.removeprefix(old)
    return None


def check_released(config: dict[str, Any], names: Iterable[str], where: object) -> None:
    """Raise unless a configuration and names of tensors are those of a released INF-LLaVA.

    Raises:
        CheckpointError: They are another model's; the message says which difference tells.
    """
    names, kind = list(names), config.get("model_type")
    reason = ""
    if kind != "llava_llama":
        reason = f"its model_type is {kind!r}, not 'llava_llama'"
        if kind in ("llava", "llava_next", "llava_onevision"):
            reason += "; transformers itself loads it"
    elif "quantization_config" in config:
        reason = "its weights are quantised; take those that they were made from"
    elif any(name.startswith("model.image_newline") for name in names):
        reason = "it has model.image_newline, as LLaVA-1.6 (LLaVA-NeXT) has"
    elif not any(name.startswith("model.spatial_embed.") for name in names):
        reason = "it has no model.spatial_embed, so it has no enhancement module: it is a LLaVA of another kind"
    elif unlike := {k: config[k] for k, v in EXPECTED.items() if config.get(k, v) != v}:
        reason = f"its configuration says {unlike}, and that of INF-LLaVA { ({k: EXPECTED[k] for k in unlike}) }"
    if reason:
        raise CheckpointError(f"{where} is no released INF-LLaVA: {reason}.")


def config_of(
    released: dict[str, Any], tower: dict[str, tuple[int, ...]], tower_config: Any, **vocabulary: int
) -> InfLlavaConfig:
    """The configuration of a converted model.

    Args:
        released: The configuration that the checkpoint came with.
        tower: Shapes of the tower's tensors by their names here.
        tower_config: Configuration of the tower where it is known; else it is read off the shapes.
        **vocabulary: ``vocab_size``, ``pad_token_id`` and ``image_token_id``.
    """
    image_token_id = vocabulary.pop("image_token_id")
    text = {name: released[name] for name in (*LLAMA_FIELDS, "rope_parameters") if released.get(name) is not None}
    return InfLlavaConfig(
        text_config=LlamaConfig(**(text | vocabulary)),
        vision_config=tower_config or _tower_config(tower),
        image_token_id=image_token_id,
        vision_feature_layer=released.get("mm_vision_select_layer", -2),
        tie_word_embeddings=False,
        dtype=released.get("dtype", released.get("torch_dtype")),
        architectures=["InfLlavaForConditionalGeneration"],
    )


def released_config(config: InfLlavaConfig) -> dict[str, Any]:
    """The configuration of a released checkpoint of a model."""
    text = config.text_config
    fields: dict[str, Any] = {name: getattr(text, name, None) for name in LLAMA_FIELDS}
    rope = text.rope_parameters
    fields |= {"rope_theta": rope["rope_theta"], "rope_scaling": None if rope["rope_type"] == "default" else rope}
    return fields | {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "vocab_size": config.image_token_id,
        "pad_token_id": text.pad_token_id,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_vision_select_layer": config.vision_feature_layer,
        "image_aspect_ratio": "pad",
        "use_mm_proj": True,
        "tie_word_embeddings": False,
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": 2048,
        "torch_dtype": str(config.dtype).removeprefix("torch.") if config.dtype else None,
        **EXPECTED,
    }


def _tower_config(shapes: dict[str, tuple[int, ...]]) -> CLIPVisionConfig:
    """CLIP's own proportions, 64 channels a head; the activation is that of OpenAI's weights."""
    shape = {name.removeprefix("model.vision_tower."): value for name, value in shapes.items()}
    try:
        width, _, patch, _ = shape["embeddings.patch_embedding.weight"]
        side = round((shape["embeddings.position_embedding.weight"][0] - 1) ** 0.5)
        inner = shape["encoder.layers.0.mlp.fc1.weight"][0]
    except (KeyError, ValueError):
        raise CheckpointError(
            "the vision tower of the checkpoint is not whole: give one by vision_tower (--vision-tower), a directory "
            "of openai/clip-vit-large-patch14-336."
        ) from None
    layers = {name.split(".")[2] for name in shape if name.startswith("encoder.layers.")}
    fields = CLIP_VIT_L_14_336 | {
        "hidden_size": width,
        "patch_size": patch,
        "image_size": side * patch,
        "intermediate_size": inner,
        "num_hidden_layers": len(layers),
        "num_attention_heads": max(1, width // 64),
    }
    del fields["model_type"]
    return CLIPVisionConfig(**fields)
