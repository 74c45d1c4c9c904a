"""The Dual-perspective Cropping Module (DCM): images to local and stride tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias, get_args, overload

import torch
from torch import Tensor, nn

from dualview.geometry import Perspective, Size, SizeLike, TileGrid, check_size
from dualview.interpolation import bicubic
from dualview.ops.low_pass import low_pass
from dualview.ops.tile_batch import TileBatch
from dualview.ops.tiling import crop, recombine
from dualview.views import check_list, check_map

Remainder: TypeAlias = Literal["error", "pad", "crop", "resize"]


class DualPerspectiveTiles(NamedTuple):
    """What [`DualPerspectiveCrop`][dualview.DualPerspectiveCrop] makes of images of one size.

    Attributes:
        local: Contiguous blocks, (..., rows*cols, C, h, w).
        stride: Interleaved strides, (..., rows*cols, C, h, w).
        grid: The grid of both.
        valid: (rows*h, cols*w) booleans on the tiled canvas, False where pixels were padded.
    """

    local: Tensor
    stride: Tensor
    grid: TileGrid
    valid: Tensor


class DualPerspectiveTileBatch(NamedTuple):
    """What [`DualPerspectiveCrop`][dualview.DualPerspectiveCrop] makes of a list of images: the same, a grid per image.

    Attributes:
        local: Contiguous blocks, packed.
        stride: Interleaved strides, packed.
        grid: One grid per image.
        valid: One (rows*h, cols*w) mask per image.
    """

    local: TileBatch
    stride: TileBatch
    grid: tuple[TileGrid, ...]
    valid: tuple[Tensor, ...]


class DualPerspectiveCrop(nn.Module):
    """Cut high-resolution images into tiles from both perspectives (Eq. 2, 9-17 of arXiv 2407.16198).

    The paper's Eq. 16 lets stride tiles of an image that is no multiple of the tile be floor(W / cols) wide, 366
    instead of 336 for 1100 pixels, which no fixed-size encoder takes. Here every tile has the encoder's size, and
    ``remainder`` says what becomes of the rest.

    Args:
        tile: Size (h, w) of a tile in pixels, or one number for a square: the encoder's input size.
        remainder: "error" refuses images that are no multiple of the tile; "pad" fills up at the bottom and the right;
            "crop" drops rows at the bottom and columns at the right; "resize" interpolates (bicubic, antialiased) to
            the nearest whole number of tiles per axis, at least one.
        pad_value: What "pad" fills with: one number, or one per channel.
        low_pass: Smooth the image before the stride crop, so that it does not alias. The stride tiles are then no
            longer a permutation of the pixels; floating-point images only.

    Shape:
        (..., C, H, W), or a list of (C, H, W) images of any sizes -> see
        [`DualPerspectiveTiles`][dualview.DualPerspectiveTiles] and
        [`DualPerspectiveTileBatch`][dualview.DualPerspectiveTileBatch]

    Raises:
        ValueError: ``remainder`` is unknown; an image is no multiple of the tile ("error") or smaller than one
            ("error", "crop"); the list is empty or its images differ in channels; ``pad_value`` has another number of
            channels; the channels of a single image seem to come last.
        TypeError: An image is no tensor.

    Example:
        >>> tiles = DualPerspectiveCrop(tile=(4, 4), remainder="pad")(torch.ones(3, 7, 9))
        >>> tiles.grid, tiles.local.shape, tiles.valid.sum().item()
        (TileGrid(rows=2, cols=3), torch.Size([6, 3, 4, 4]), 63)
    """

    def __init__(
        self,
        tile: SizeLike = (336, 336),
        *,
        remainder: Remainder = "error",
        pad_value: float | Sequence[float] = 0.0,
        low_pass: bool = False,
    ) -> None:
        super().__init__()
        if remainder not in get_args(Remainder):
            raise ValueError(f"remainder={remainder!r}: must be one of {get_args(Remainder)}.")
        self.tile, self.remainder, self.low_pass = check_size(tile, "tile"), remainder, low_pass
        self.pad_value = pad_value

    @overload
    def forward(self, images: Tensor) -> DualPerspectiveTiles: ...
    @overload
    def forward(self, images: Sequence[Tensor]) -> DualPerspectiveTileBatch: ...
    def forward(self, images: Tensor | Sequence[Tensor]) -> DualPerspectiveTiles | DualPerspectiveTileBatch:
        """Cut images of one size, or a list of images of any sizes."""
        if isinstance(images, Tensor):
            return self._cut(images)
        check_list(images, "images")
        if not images or any(image.dim() != 3 for image in images):
            raise ValueError(
                f"a list of images must hold at least one, each (C, H, W); got {[tuple(i.shape) for i in images]}."
            )
        cut = [self._cut(image) for image in images]
        grids = tuple(tiles.grid for tiles in cut)
        return DualPerspectiveTileBatch(
            TileBatch.collate([tiles.local for tiles in cut], grids, "local"),
            TileBatch.collate([tiles.stride for tiles in cut], grids, None if self.low_pass else "global"),
            grids,
            tuple(tiles.valid for tiles in cut),
        )

    def _cut(self, images: Tensor) -> DualPerspectiveTiles:
        check_map(images, "raster", "channels_first")
        canvas, real = self._fit(images)
        grid = TileGrid.for_image((canvas.shape[-2], canvas.shape[-1]), self.tile)
        smooth = low_pass(canvas, grid) if self.low_pass else canvas
        valid = torch.zeros(canvas.shape[-2:], dtype=torch.bool, device=canvas.device)
        valid[: real[0], : real[1]] = True
        return DualPerspectiveTiles(crop(canvas, grid, "local"), crop(smooth, grid, "global"), grid, valid)

    def _fit(self, images: Tensor) -> tuple[Tensor, Size]:
        """The images on a canvas of whole tiles, and the (height, width) of it that is real."""
        (height, width), (h, w) = check_size(tuple(images.shape[-2:]), "image size"), self.tile
        if self.remainder == "error":
            TileGrid.whole((height, width), self.tile)
        if height % h == 0 and width % w == 0:
            return images, (height, width)
        if self.remainder == "crop":
            rows, cols = TileGrid.for_image((height, width), self.tile)
            return images[..., : rows * h, : cols * w], (rows * h, cols * w)
        if self.remainder == "resize":
            rows, cols = (max(1, (2 * side + unit) // (2 * unit)) for side, unit in ((height, h), (width, w)))
            return _resize(images, (rows * h, cols * w)), (rows * h, cols * w)
        rows, cols = -(-height // h), -(-width // w)
        value = torch.as_tensor(self.pad_value, device=images.device).to(images.dtype)
        if value.dim() and value.shape != images.shape[-3:-2]:
            raise ValueError(
                f"pad_value={self.pad_value} for images of shape {tuple(images.shape)}: give one number, or one for "
                f"each of the {images.shape[-3]} channels."
            )
        fill = value.reshape(-1, 1, 1) if value.dim() else value
        canvas = images.new_empty((*images.shape[:-2], rows * h, cols * w))
        canvas[:] = fill
        canvas[..., :height, :width] = images
        return canvas, (height, width)

    @overload
    def inverse(self, tiles: DualPerspectiveTiles, perspective: Perspective = ...) -> Tensor: ...
    @overload
    def inverse(self, tiles: DualPerspectiveTileBatch, perspective: Perspective = ...) -> list[Tensor]: ...
    def inverse(
        self, tiles: DualPerspectiveTiles | DualPerspectiveTileBatch, perspective: Perspective = "local"
    ) -> Tensor | list[Tensor]:
        """The images that the tiles were cut from, padding removed. (..., rows*cols, C, h, w) -> (..., C, H, W)

        Of a list of images, a list. What "crop" dropped is gone, and "resize" gives the resized image.

        Raises:
            ValueError: The stride tiles were low-pass filtered: they do not hold the original pixels.
        """
        if perspective == "global" and self.low_pass:
            raise ValueError('low-pass filtered stride tiles do not hold the original pixels: use perspective="local".')
        if isinstance(tiles, DualPerspectiveTileBatch):
            images = zip(tiles.local.split(), tiles.stride.split(), tiles.grid, tiles.valid, strict=True)
            return [self.inverse(DualPerspectiveTiles(*image), perspective) for image in images]
        source = tiles.local if perspective == "local" else tiles.stride
        canvas = recombine(source, tiles.grid, perspective, size=tiles.grid.map_size(self.tile))
        height, width = int(tiles.valid[:, 0].sum()), int(tiles.valid[0].sum())
        return canvas[..., :height, :width].contiguous()

    def extra_repr(self) -> str:
        return f"tile={self.tile}, remainder={self.remainder!r}, pad_value={self.pad_value}, low_pass={self.low_pass}"


def _resize(images: Tensor, size: Size) -> Tensor:
    """Bicubic, antialiased, in at least float32; integer images are rounded and kept in their range."""
    precise = images.to(torch.promote_types(images.dtype, torch.float32))
    small = bicubic(precise.reshape(-1, 1, *images.shape[-2:]), size).reshape(*images.shape[:-2], *size)
    if not images.is_floating_point():
        limits = torch.iinfo(images.dtype)
        small = small.round().clamp(limits.min, limits.max)
    return small.to(images.dtype)
