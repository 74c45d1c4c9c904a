"""Batches without an image: one that counts for nothing, so that every process calls the same modules.

Processes that train together wait for each other in every module that is sharded (FSDP), and for the gradient of every
parameter (DDP). One whose batch holds text alone would leave out the tower, and the others would wait for good.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from dualview.geometry import Size, TileGrid
from dualview.models.adapter.hosts import Host, Source
from dualview.models.adapter.packings import Flat, packing_of

IMAGES = ("pixel_values", "pixel_values_videos", "mm_encoder_outputs")
"""Arguments of a model that hold images, or what was made of them."""
ZERO = "_dualview_zero"
"""The attribute in which a zero that depends on all parameters waits for the language model."""
READ = ("pooler_output", "deepstack_features")
"""What models read of the features of images; Llama 4, which has neither, reads ``last_hidden_state``.

Only this may take part: a layer of the tower that no image's gradient passes must be passed by none here, either.
"""
FIELDS = ("loss", "logits", "last_hidden_state")
"""What a model returns that gradients come from."""


def owner_of(model: nn.Module) -> nn.Module:
    """The module that makes features of images and gives them to the language model."""
    inner = cast(nn.Module, getattr(model, "base_model", model))
    return inner if hasattr(inner, "get_image_features") else model


def before(
    host: Host, tower: nn.Module, grid: TileGrid, source: Source, owner: nn.Module, args: Any, kwargs: dict[str, Any]
) -> None:
    """Forward pre-hook of the owner: in training, an image where there is none."""
    images = len(args) > 1 or any(kwargs.get(name) is not None for name in IMAGES)
    if images or not owner.training or not torch.is_grad_enabled():
        return
    made = cast(Any, owner).get_image_features(**example(host, tower, grid, source, cast(Any, owner).config))
    read = [tensor for field in READ for tensor in _tensors(getattr(made, field, None))]
    used = [tensor for tensor in read or _tensors(made.last_hidden_state) if tensor.requires_grad]
    sums = [tensor.float().sum() for tensor in used]
    setattr(owner, ZERO, cast(Tensor, sum(sums)) * 0.0 if sums else None)


def between(owner: nn.Module, decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of the language model: the zero goes the way that features of images go, through all layers."""
    embeds = kwargs.get("inputs_embeds")
    if not isinstance(embeds, Tensor):
        return None
    zero = vars(owner).pop(ZERO, None)
    return None if zero is None else (args, {**kwargs, "inputs_embeds": embeds + zero.to(embeds.dtype)})


def after(owner: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook of the owner: the zero joins the output, where the language model got no embeddings."""
    zero = vars(owner).pop(ZERO, None)
    if zero is not None:
        for field in FIELDS:
            if isinstance(value := getattr(output, field, None), Tensor):
                setattr(output, field, value + zero.to(value.dtype))
    return output


def example(host: Host, tower: nn.Module, grid: TileGrid, source: Source, config: Any) -> dict[str, Any]:
    """Arguments of ``get_image_features`` for the smallest image that suits the grid and the source."""
    like = next(p for p in tower.parameters() if p.is_floating_point())
    options: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
    if host.layout == "square":
        height, width = (grid if source == "hires" else TileGrid(1, 1)).map_size(_side(tower))
        pixels = torch.full((1, 3, height, width), 0.5, **options)  # zeros would be taken for padding
        if host.images == "choices":  # one image, of which the model takes as many tiles as its resolution has
            side = config.vision_config.image_size
            most = max(high // side * (wide // side) for high, wide in config.image_grid_pinpoints)
            sizes = torch.tensor([[side, side]], device=like.device)
            return {"pixel_values": pixels[None].expand(-1, 1 + most, -1, -1, -1), "image_sizes": sizes}
        return {"pixel_values": pixels[None] if host.images == "sets" else pixels}
    packing = packing_of(host.layout, tower)
    merged = getattr(config, "spatial_merge_size", getattr(config, "downsample_factor", 1))  # by a projector behind it
    side = 2 * merged * packing.token  # Mistral 3 takes no image of one token
    size = grid.map_size((side, side)) if source == "native" else (side, side)
    channels = 3 * config.vision_config.temporal_patch_size if isinstance(packing, Flat) else 3
    image = torch.full((channels, *size), 0.5, **options)
    arguments = packing.arguments([image])
    if source == "hires":
        large = packing.arguments([image.new_full((channels, *grid.map_size(size)), 0.5)])
        arguments["hidden_states"] = torch.cat([arguments["hidden_states"], large["hidden_states"]])
    names = {"hidden_states": "pixel_values", "grid_thw": "image_grid_thw", "pixel_position_ids": "image_position_ids"}
    return {names.get(name, name): value for name, value in arguments.items()}


def _side(tower: nn.Module) -> Size:
    """Height and width of the images that a tower was made for."""
    vision = cast(Any, tower).config
    side = getattr(vision, "image_size", None) or (getattr(vision, "model_args", None) or {}).get("img_size")
    if side is None and hasattr(tower, "timm_model"):
        side = cast(Any, tower).timm_model.default_cfg["input_size"][1:]
    if side is None:
        side = 224  # of towers that take any size
    return (side, side) if isinstance(side, int) else (side[0], side[1])


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for one in values for tensor in _tensors(one)]
