"""Multimodal models that an enhancement module can be attached to: where the vision tower is and what is read of it.

A family is one record. What differs between families stands in the records; code asks for nothing else of a host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, cast

Layout: TypeAlias = Literal["square", "flat", "pixtral", "naflex", "gemma4"]
Source: TypeAlias = Literal["upsample", "native", "hires"]
SOURCES: dict[Layout, dict[Source, str]] = {
    "square": {"native": "its tower takes images of one size, and tiles of an image are smaller"},
    "flat": {},
    "pixtral": {"hires": "its processor pads all images of a batch to one size, which the large ones would decide"},
    "naflex": {"hires": "its processor fills a fixed number of patches for each image, with no room for larger ones"},
    "gemma4": {"hires": "its processor fills a fixed number of patches for each image, with no room for larger ones"},
}
"""Where the pixels of views cannot come from, with the reason."""


class Place(NamedTuple):
    """Where features that a host reads stand in the output of its tower.

    Attributes:
        field: Name of the field of the output.
        position: Index in the field, where it is a sequence; None where the field is the tensor.
    """

    field: str
    position: int | None = None


@dataclass(frozen=True)
class Host:
    """One family of models.

    Attributes:
        layout: How pixels enter the tower, and how its tokens are laid out.
        places: From a configuration, what the model reads, by the layer that it comes from; -1 is the tower's output.
        width: From a configuration, the width of what is read.
        inner: The module of the tower whose output is read, where that is not the tower.
        images: How the model takes square images: one by one, as "sets" of a prompt (N, images, 3, H, W), or as tiles
            of a resolution that is chosen, "choices" (N, tiles, 3, H, W).
    """

    layout: Layout
    places: Callable[[Any], dict[int, Place]]
    width: Callable[[Any], int] = lambda config: cast(int, config.vision_config.hidden_size)
    inner: str = ""
    images: Literal["single", "sets", "choices"] = "single"


def _output(config: Any) -> dict[int, Place]:
    return {-1: Place("last_hidden_state")}


def _merged(config: Any) -> dict[int, Place]:
    return {-1: Place("pooler_output")}


def _merged_and_deepstack(config: Any) -> dict[int, Place]:
    levels = enumerate(config.vision_config.deepstack_visual_indexes)
    return {layer: Place("deepstack_features", i) for i, layer in levels} | _merged(config)


def _hidden(config: Any) -> dict[int, Place]:
    layers = config.vision_feature_layer
    return _states([layers] if isinstance(layers, int) else layers)


def _states(layers: Iterable[int]) -> dict[int, Place]:
    return {layer: Place("hidden_states", layer) for layer in layers}


def _hidden_or_output(config: Any) -> dict[int, Place]:
    """InternVL takes the output, which is normalised, for the last layer."""
    return _output(config) if config.vision_feature_layer == -1 else _hidden(config)


def _hidden_of_granite(config: Any) -> dict[int, Place]:
    return _states([*(layer for layer, _ in config.deepstack_layer_map or ()), config.spatial_vision_layer])


def _text_width(config: Any) -> int:
    return cast(int, config.get_text_config().hidden_size)


def _timm_width(config: Any) -> int:
    return cast(int, config.vision_config.model_args["embed_dim"])


_OUTPUT, _HIDDEN, _MERGED = Host("square", _output), Host("square", _hidden), Host("flat", _merged, _text_width)
_SETS, _CHOICES = Host("square", _output, images="sets"), Host("square", _hidden, images="choices")

HOSTS: dict[str, Host] = {
    "aria": _HIDDEN,
    "aya_vision": _HIDDEN,
    "cohere2_vision": _OUTPUT,
    "deepseek_vl": _OUTPUT,
    "fast_vlm": _OUTPUT,
    "florence2": Host("square", _output, lambda config: config.vision_config.embed_dim[-1]),
    "gemma3": _OUTPUT,
    "gemma3n": _OUTPUT,
    "gemma4": Host("gemma4", _output),
    "glm4v": _MERGED,
    "got_ocr2": Host("square", _output, lambda config: config.vision_config.output_channels),
    "granite4_vision": Host("square", _hidden_of_granite, images="choices"),
    "idefics2": _SETS,
    "idefics3": _SETS,
    "internvl": Host("square", _hidden_or_output),
    "janus": _OUTPUT,
    "lfm2_vl": Host("naflex", _output),
    "llama4": Host("square", _output, lambda config: config.vision_config.vision_output_dim),
    "llava": _HIDDEN,
    "llava_next": _CHOICES,
    "llava_onevision": _CHOICES,
    "mistral3": Host("pixtral", _hidden),
    "ovis2": Host("square", _output, inner="transformer"),
    "paligemma": _OUTPUT,
    "perception_lm": Host("square", _output, _timm_width, images="sets"),
    "qianfan_ocr": Host("square", _hidden_or_output),
    "qwen2_5_vl": _MERGED,
    "qwen2_vl": _MERGED,
    "qwen3_vl": Host("flat", _merged_and_deepstack, _text_width),
    "smolvlm": _SETS,
    "vipllava": Host("square", lambda config: _states(config.vision_feature_layers)),
}
"""Families by ``config.model_type``. The support matrix of the documentation has a row for each."""

REFUSED: dict[str, str] = {
    "ernie4_5_vl_moe": "its tower's output holds no features at the place where other families have them",
    "hunyuan_vl": "its tower's tokens are not in the order of the picture's rows",
}
"""Families that were tried and do not work, with the reason."""
