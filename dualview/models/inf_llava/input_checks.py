"""What an INF-LLaVA refuses before transformers or torch stumble over it: fields of a configuration, and inputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar, cast

import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.image_utils import SizeDict
from transformers.modeling_outputs import BaseModelOutputWithPast

from dualview.arguments import check_choice, check_count, check_flags, check_number, check_size, integer_of, shown
from dualview.tensors import check_floats, check_tensors

Config = TypeVar("Config", bound=type[PreTrainedConfig])

INTEGERS = (torch.int64, torch.int32)
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"
"""The name of a language model's keys and values, as argument and in outputs: transformers 5.24 gave it another."""
PASSED_ON = ("attention_mask", "position_ids", CACHE, "inputs_embeds")
"""What a language model must take."""
SIZES, SIDES = ("size", "crop_size", "tile_size"), {"height", "width", "shortest_edge", "longest_edge"}
MOST_SIDE = 65_536
"""Longest side of a canvas or a tile in pixels."""


def named_errors(cls: Config) -> Config:
    """A strict configuration whose errors are ValueErrors of one line."""
    validated: Any = cls.__setattr__

    def set_field(self: Any, name: str, value: Any) -> None:
        try:
            validated(self, name, value)
        except (StrictDataclassFieldValidationError, RuntimeError) as error:
            rule = " ".join(str(error.__cause__ or error).split())
            raise ValueError(f"{name}={shown(value)}: {rule}.") from None

    cls.__setattr__ = set_field  # type: ignore[assignment]
    return cls


def check_fields(config: Any) -> None:
    """Raise a ValueError where a model of this configuration could not be built, or not take pictures."""
    tower = config.vision_config
    side, patch = (
        check_count(getattr(tower, name), f"vision_config.{name}", why="Tiles and patches are squares.")
        for name in ("image_size", "patch_size")
    )
    if side < patch:
        raise ValueError(f"vision_config.image_size={side}: must be at least vision_config.patch_size={patch}.")
    if getattr(tower, "num_channels", 3) != 3:
        raise ValueError(f"vision_config.num_channels={shown(tower.num_channels)}: must be 3, for pictures are RGB.")
    check_choice(config.projector_hidden_act, "projector_hidden_act", tuple(ACT2FN))


def check_language_model(model: nn.Module) -> None:
    """Raise a ValueError unless a language model takes what images and caches need."""
    taken = inspect.signature(model.forward).parameters
    if missing := [name for name in PASSED_ON if name not in taken]:
        raise ValueError(
            f"text_config: {type(model).__name__} takes no {', '.join(missing)}. Use a causal language model of "
            "transformers with attention, as Llama."
        )


def check_pictures(pixel_values: Tensor, image_grids: Tensor | None, image_sizes: Tensor | None) -> None:
    """Raise an error unless these are pictures or their tiles, with the grids and sizes that belong to them."""
    check_floats(pixel_values=pixel_values)
    if pixel_values.dim() != 4 or pixel_values.shape[1] != 3 or 0 in pixel_values.shape:
        raise ValueError(f"pixel_values={shown(pixel_values)}: must be (images or tiles, 3, height, width).")
    for name, pairs in (("image_grids", image_grids), ("image_sizes", image_sizes)):
        if pairs is not None:
            _check_integers(pairs, name, (None, 2))
            if pairs.is_meta:
                raise ValueError(f"{name}={shown(pairs)} on meta: must hold numbers.")
    if image_sizes is not None and (image_grids is None or len(image_grids) != len(image_sizes)):
        raise ValueError(
            f"image_grids={shown(image_grids)}, image_sizes={shown(image_sizes)}: give both for every image; of images "
            "without grids there is no size, omit it."
        )


def check_tokens(
    embeddings: nn.Module,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    labels: Tensor | None = None,
) -> None:
    """Raise an error unless token ids or embeddings, and what is given beside them, fit each other and the model."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError(
            f"You must specify exactly one of input_ids or inputs_embeds: input_ids={shown(input_ids)}, "
            f"inputs_embeds={shown(inputs_embeds)}."
        )
    weight, width = getattr(embeddings, "weight", None), getattr(embeddings, "embedding_dim", None)
    if inputs_embeds is not None:
        check_floats(inputs_embeds=inputs_embeds)
        if inputs_embeds.dim() != 3 or width not in (None, inputs_embeds.shape[-1]) or 0 in inputs_embeds.shape:
            raise ValueError(f"inputs_embeds={shown(inputs_embeds)}: must be (batch, sequence, {width}).")
        like, name = inputs_embeds, "inputs_embeds"
    else:
        _check_integers(input_ids, "input_ids", (None, None))
        like, name = cast(Tensor, input_ids), "input_ids"
    batch, length = like.shape[0], like.shape[1]
    given: dict[str, Tensor] = {name: like}
    if labels is not None:
        _check_integers(labels, "labels", (batch, length))
        given["labels"] = labels
    if position_ids is not None:
        check_tensors(position_ids=position_ids)
        if position_ids.dtype not in INTEGERS or position_ids.dim() < 2 or position_ids.shape[-1] != length:
            raise ValueError(f"position_ids={shown(position_ids)}: must be integers of shape (batch or 1, {length}).")
        if position_ids.shape[-2] not in (1, batch):
            raise ValueError(f"position_ids={shown(position_ids)}: must be for {batch} rows, or 1 for all.")
        given["position_ids"] = position_ids
    by_kind = (
        isinstance(attention_mask, dict)
        and attention_mask
        and all(str(k).endswith("_attention") for k in attention_mask)
    )
    for mask in attention_mask.values() if by_kind else (attention_mask,):
        if mask is None or type(mask).__name__ == "BlockMask":
            continue
        check_tensors(attention_mask=mask)
        if mask.dim() == 2:
            fits = mask.shape[0] == batch and mask.shape[1] >= length
        else:
            fits = mask.dim() == 4 and mask.shape[0] in (1, batch) and mask.shape[2] in (1, length)
            fits = fits and mask.shape[3] >= length
        if not fits or mask.is_complex():
            raise ValueError(f"attention_mask={shown(mask)}: must be ({batch}, {length} or more), or of 4 dimensions.")
        given["attention_mask"] = mask
    for name, x in given.items():
        if x.is_meta and isinstance(weight, Tensor) and not weight.is_meta:
            raise ValueError(f"{name}={shown(x)} is on meta: it must hold numbers.")


def check_features(tokens: Tensor, image_features: Tensor, config: Any) -> None:
    """Raise a ValueError unless there are as many image tokens as image features; not while a compiler traces."""
    images, features = image_features.shape[0], image_features.shape[0] * image_features.shape[1]
    if not torch.compiler.is_compiling() and not tokens.is_meta and tokens.item() != features:
        raise ValueError(
            f"Image features and image tokens do not match, tokens: {tokens.item()}, features: {features} of {images} "
            f"images. input_ids must have {config.image_seq_length} tokens with id {config.image_token_id} for each "
            "image of pixel_values; InfLlavaProcessor writes them."
        )


def check_encoded(outputs: Mapping[str, Any] | None) -> Any:
    """The image features among outputs that were computed before, None where there are none.

    Raises:
        ValueError: They are of something else than images, or no features.
    """
    if not outputs:
        return None
    images = outputs.get("image")
    if set(outputs) != {"image"} or getattr(images, "pooler_output", None) is None:
        raise ValueError(
            f"mm_encoder_outputs has {sorted(outputs)}, {type(images).__name__} by the name 'image': must be "
            '{"image": model.get_image_features(...)}.'
        )
    return images


def check_alone(pixel_values: Tensor | None, vision_feature_layer: object) -> None:
    """Raise a ValueError for what view_features leave no choice of."""
    if pixel_values is not None or vision_feature_layer is not None:
        raise ValueError(
            f"view_features with {'vision_feature_layer' if pixel_values is None else 'pixel_values'}: they were made "
            "of pictures and a layer before: omit it, or give pixel_values in place of view_features."
        )


def check_places(input_ids: Tensor | None, config: Any) -> None:
    """Raise a ValueError if a model is to be trained on places for images without one; not while a compiler traces."""
    if torch.compiler.is_compiling() or input_ids is None or input_ids.is_meta:
        return
    if places := int((input_ids == config.image_token_id).sum()):
        raise ValueError(
            f"Image features and image tokens do not match: input_ids have {places} tokens with id "
            f"{config.image_token_id}, and there is no image. Give pixel_values, as the processor makes them."
        )


def check_options(options: Mapping[str, Any]) -> None:
    """Raise a ValueError for the first option of an image processor that cannot be what it says."""
    for name, value in options.items():
        if value is None:
            continue
        if name in SIZES:
            sides = dict(value) if isinstance(value, Mapping | SizeDict) else None
            if sides is None:
                check_size(value, name, high=MOST_SIDE)
            elif not sides or any(side is not None and not _is_side(side) for side in sides.values()):
                raise ValueError(f"{name}={shown(value)}: its sides must be integers from 1 to {MOST_SIDE:,}.")
            elif not set(sides) <= SIDES:
                raise ValueError(f"{name}={shown(value)}: must have some of the sides {', '.join(sorted(SIDES))}.")
        elif name.startswith("do_"):
            check_flags(**{name: value})
        elif name == "rescale_factor":
            check_number(value, name)


def plain_size(value: Any, name: str) -> Any:
    """A size as transformers takes it, which knows neither integers nor pairs of NumPy and torch."""
    if value is None or isinstance(value, Mapping | SizeDict):
        return value
    count = integer_of(value)
    return check_size(value, name, high=MOST_SIDE) if count is None else count


def _is_side(side: object) -> bool:
    count = integer_of(side)
    return count is not None and 1 <= count <= MOST_SIDE


def _check_integers(x: Any, name: str, shape: tuple[int | None, ...]) -> None:
    check_tensors(**{name: x})
    fits = x.dim() == len(shape) and all(want in (None, side) for side, want in zip(x.shape, shape, strict=True))
    if x.dtype not in INTEGERS or not fits or 0 in x.shape:
        sides = ", ".join("n" if side is None else str(side) for side in shape)
        raise ValueError(f"{name}={shown(x)}: must be integers of shape ({sides}), at least one.")
