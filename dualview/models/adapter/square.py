"""Towers that take images of one fixed size: tokens of a tile as a map, and what was around the map put back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isqrt
from typing import Any, cast

import torch
from torch import Tensor, nn

from dualview.geometry import Size, TileGrid
from dualview.interpolation import resized
from dualview.models.adapter.hosts import Place
from dualview.models.adapter.outputs import LARGE, features_at, put_features
from dualview.models.encode_views import encode_dual_view
from dualview.models.parts import DualView, ViewOptions

MASKS = ("patch_attention_mask",)
"""Of images padded by the processor. Views are encoded without: their padding counts as part of the picture."""


def reduced(args: tuple[Any, ...], kwargs: dict[str, Any], grid: TileGrid, tower: nn.Module) -> Any:
    """Arguments of a tower for images of grid times its size: the image reduced, which carries the large one."""
    pixels = _pixels(args, kwargs)
    height, width = pixels.shape[-2:]
    size = _pair(getattr(getattr(tower, "config", None), "image_size", None))
    tile = (height // grid.rows, width // grid.cols)
    if height % grid.rows or width % grid.cols or (size is not None and tile != size):
        wanted = f"a multiple of {tuple(grid)}" if size is None else str(grid.map_size(size))
        raise ValueError(
            f'the tower got images of {height} x {width} (height x width), and with source="hires" and grid={grid} '
            f"it must be {wanted}: make the inputs with the processor that adapt_processor(processor, {tuple(grid)}) "
            'returns, or attach with source="upsample".'
        )
    small = resized(pixels, tile)
    setattr(small, LARGE, pixels)
    return ((small, *args[1:]), kwargs) if args else (args, {**kwargs, "pixel_values": small})


def enhance_square(
    tower: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
    places: Sequence[Place],
    bind: Callable[[Tensor], Any],
    options: ViewOptions,
) -> None:
    """Replace the features at ``places`` of a tower's output by what the DEM makes of the views of its images."""
    small = _pixels(args, kwargs)
    rest = {name: value for name, value in kwargs.items() if name not in ("pixel_values", *MASKS)}
    tile = cast(Size, tuple(small.shape[-2:]))

    def maps(of: Any) -> Tensor:
        return torch.cat([_to_map(features_at(of, place), tile, tower) for place in places], -1)

    def encode(tiles: Tensor) -> Tensor:
        return maps(tower.forward(tiles, *args[1:], **rest))

    large = getattr(small, LARGE, small)
    of_tile = ViewOptions(tile, *options[1:])  # what `_replace` makes is empty to torch 2.11 after a break of the graph
    enhanced = encode_dual_view(DualView(encode, bind(maps(output)), of_tile), large)
    width = enhanced.shape[-1] // len(places)
    for k, place in enumerate(places):
        new = enhanced.narrow(-1, k * width, width)  # a host may change what it reads in place: no view of many
        put_features(output, place, _from_map(features_at(output, place), new))


def _pixels(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    pixels = args[0] if args else kwargs.get("pixel_values")
    if not isinstance(pixels, Tensor) or pixels.dim() != 4:
        got = tuple(pixels.shape) if isinstance(pixels, Tensor) else type(pixels).__name__
        raise ValueError(f"the tower was called with {got}, where pixels (N, 3, H, W) are expected: detach this host.")
    return pixels


def _to_map(features: Tensor, tile: Size, tower: nn.Module) -> Tensor:
    """(N, prefix + h*w, D) or (N, D, h, w) -> (N, h, w, D)"""
    if features.dim() == 4:
        return features.movedim(1, -1)
    h, w = _map_size(features.shape[1], tile, tower)
    return cast(Tensor, features[:, features.shape[1] - h * w :].unflatten(1, (h, w)))


def _from_map(features: Tensor, new: Tensor) -> Tensor:
    """The features with another map in the place of theirs, laid out in memory as they were: products round by that."""
    if features.dim() == 4:
        moved = new.movedim(-1, 1)
        return moved.contiguous() if features.is_contiguous() else moved
    flat = new.flatten(1, 2).contiguous()
    return flat if flat.shape[1] == features.shape[1] else torch.cat([features[:, : -flat.shape[1]], flat], 1)


def _map_size(count: int, tile: Size, tower: nn.Module) -> Size:
    """Rows and columns of the tokens of a tile: its patches; or a square, where the tower merges patches itself."""
    patch = _pair(getattr(getattr(tower, "config", None), "patch_size", None))
    if patch is not None and (tile[0] // patch[0]) * (tile[1] // patch[1]) <= count:
        return tile[0] // patch[0], tile[1] // patch[1]
    if tile[0] != tile[1]:
        raise ValueError(
            f"{count} tokens of a tile of {tile[0]} x {tile[1]} pixels (height x width) say nothing of rows and "
            "columns: this tower takes square tiles."
        )
    return isqrt(count), isqrt(count)


def _pair(size: Any) -> Size | None:
    if isinstance(size, int):
        return size, size
    return (size[0], size[1]) if isinstance(size, (list, tuple)) and len(size) == 2 else None
