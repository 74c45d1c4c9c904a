"""The Dual-perspective Cropping Module (DCM): images to local and stride tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args, overload

from torch import Tensor, nn

from dualview.arguments import MOST_WIDTH, check_choice, check_flags, check_instance, check_size, shown
from dualview.dual_tiles import DualPerspectiveTileBatch, DualPerspectiveTiles
from dualview.geometry import (
    DataFormat,
    Perspective,
    Placement,
    Size,
    SizeLike,
    TileGrid,
    check_perspective,
    check_perspectives,
)
from dualview.interpolation import resized
from dualview.ops.low_pass import low_pass
from dualview.ops.tile_batch import TileBatch
from dualview.ops.tiling import crop, recombine
from dualview.padding import check_pad_value, pad_to
from dualview.tensors import check_alike, check_floats, check_list
from dualview.views import check_map

Remainder: TypeAlias = Literal["error", "pad", "crop", "resize"]


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
        pad_value: What "pad" fills with: one number, or one per channel; numbers that the type of the images can hold.
        low_pass: Smooth the image before the stride crop, so that it does not alias. The stride tiles are then no
            longer a permutation of the pixels; floating-point images only.
        perspectives: Which tiles to cut: ("local",) where the stride tiles are not needed.

    Shape:
        (..., C, H, W), or a list of (C, H, W) images of any sizes -> see
        [`DualPerspectiveTiles`][dualview.DualPerspectiveTiles] and
        [`DualPerspectiveTileBatch`][dualview.DualPerspectiveTileBatch]

    Raises:
        ValueError: ``remainder`` or a perspective is unknown; an image is no multiple of the tile ("error") or smaller
            than one ("error", "crop"); the list is empty or its images differ in channels; ``pad_value`` has another
            number of channels or does not fit the type of the images; the channels of a single image seem to come last.
        TypeError: An image is no tensor, or of a type that cannot be smoothed (``low_pass``) or interpolated.

    Example:
        >>> import torch
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
        perspectives: Sequence[Perspective] = ("local", "global"),
    ) -> None:
        super().__init__()
        check_flags(low_pass=low_pass)
        self.remainder = check_choice(remainder, "remainder", get_args(Remainder))
        self.tile, self.low_pass = check_size(tile, "tile", high=MOST_WIDTH), low_pass
        self.pad_value, self.perspectives = check_pad_value(pad_value), check_perspectives(perspectives)

    @overload
    def forward(self, images: Tensor) -> DualPerspectiveTiles: ...
    @overload
    def forward(self, images: Sequence[Tensor]) -> DualPerspectiveTileBatch: ...
    def forward(self, images: Tensor | Sequence[Tensor]) -> DualPerspectiveTiles | DualPerspectiveTileBatch:
        """Cut images of one size, or a list of images of any sizes."""
        if isinstance(images, Tensor):
            return self._cut(images)
        images = check_list(images, "images")
        if not images or any(image.dim() != 3 for image in images):
            raise ValueError(f"images={shown(images)}: a list of images must hold at least one, each (C, H, W).")
        check_alike(images, "images")
        return DualPerspectiveTileBatch.collate([self._cut(image) for image in images])

    def _cut(self, images: Tensor) -> DualPerspectiveTiles:
        check_map(images, "raster", "channels_first", "images")
        canvas, real = self._fit(images)
        if self.low_pass:
            check_floats(images=images)
        grid = TileGrid.whole(tuple(canvas.shape[-2:]), self.tile)
        smooth = low_pass(canvas, grid) if self.low_pass and "global" in self.perspectives else canvas
        local, stride = (
            crop(x, grid, perspective) if perspective in self.perspectives else None
            for x, perspective in ((canvas, "local"), (smooth, "global"))
        )
        placement = Placement(grid, self.tile, (images.shape[-2], images.shape[-1]), real)
        return DualPerspectiveTiles(local, stride, placement, self.low_pass)

    def _fit(self, images: Tensor) -> tuple[Tensor, Size]:
        """The images on a canvas of whole tiles, and the (height, width) of the canvas that they fill."""
        (height, width), (h, w) = check_size(tuple(images.shape[-2:]), "images of size"), self.tile
        if self.remainder == "error" or (height % h == 0 and width % w == 0):
            return images, (height, width)
        if self.remainder == "crop":
            rows, cols = TileGrid.for_image((height, width), self.tile)
            return images[..., : rows * h, : cols * w], (rows * h, cols * w)
        if self.remainder == "resize":
            rows, cols = (max(1, (2 * side + unit) // (2 * unit)) for side, unit in ((height, h), (width, w)))
            return resized(images, (rows * h, cols * w)), (rows * h, cols * w)
        rows, cols = -(-height // h), -(-width // w)
        return pad_to(images, (rows * h, cols * w), self.pad_value), (height, width)

    @overload
    @staticmethod
    def inverse(
        tiles: DualPerspectiveTiles, perspective: Perspective = ..., *, data_format: DataFormat = ...
    ) -> Tensor: ...
    @overload
    @staticmethod
    def inverse(
        tiles: TileBatch | DualPerspectiveTileBatch, perspective: Perspective = ..., *, data_format: DataFormat = ...
    ) -> list[Tensor]: ...
    @staticmethod
    def inverse(
        tiles: DualPerspectiveTiles | TileBatch | DualPerspectiveTileBatch,
        perspective: Perspective = "local",
        *,
        data_format: DataFormat = "channels_first",
    ) -> Tensor | list[Tensor]:
        """The images that the tiles were cut from, or maps of features of the tiles; padding is removed.

        What "crop" dropped is gone, and "resize" gives the resized image. Tiles may have another resolution than those
        that were cut, such as predictions at a quarter of it, and give a map of that resolution. A prediction for a
        part of the image counts: an image of H x W has ceil(H / 4) x ceil(W / 4) of them.

        Args:
            tiles: What the crop made, or the same ``with_data``.
            perspective: Of which tiles.
            data_format: Whether the channels come before or after height and width.

        Shape:
            (..., rows*cols, C, h, w) -> (..., C, H, W), or (..., rows*cols, h, w, D) -> (..., H, W, D)

        Returns:
            A new contiguous tensor; of a list of images, a list.

        Raises:
            ValueError: The stride tiles were low-pass filtered: they do not hold the original pixels. The tiles of this
                perspective are not held, or their images are not known.

        Example:
            >>> import torch
            >>> dcm = DualPerspectiveCrop(tile=(8, 8), remainder="pad")
            >>> tiles = dcm(torch.rand(3, 13, 21))
            >>> quarter = tiles.with_data(local=torch.rand(6, 5, 2, 2))
            >>> dcm.inverse(tiles).shape, dcm.inverse(quarter).shape
            (torch.Size([3, 13, 21]), torch.Size([5, 4, 6]))
        """
        records = (DualPerspectiveTiles, DualPerspectiveTileBatch, TileBatch)
        check_instance(tiles, "tiles", records, "what this module's call gave, or the same with_data")
        if check_perspective(perspective) == "global" and not isinstance(tiles, TileBatch) and tiles.low_pass:
            raise ValueError('low-pass filtered stride tiles do not hold the original pixels: use perspective="local".')
        if isinstance(tiles, DualPerspectiveTiles):
            return _without_padding(recombine(tiles, perspective, data_format=data_format), tiles.image, data_format)
        if tiles.images is None:
            raise ValueError("this TileBatch does not know its images, as those do that DualPerspectiveCrop makes.")
        maps = recombine(tiles, perspective, data_format=data_format)
        return [_without_padding(x, image, data_format) for x, image in zip(maps, tiles.images, strict=True)]

    def extra_repr(self) -> str:
        return (
            f"tile={self.tile}, remainder={self.remainder!r}, pad_value={self.pad_value}, low_pass={self.low_pass}, "
            f"perspectives={self.perspectives}"
        )


def _without_padding(x: Tensor, image: Placement, data_format: DataFormat) -> Tensor:
    """The part of a map that the image fills, whatever the resolution of the map."""
    axis = x.dim() - (2 if data_format == "channels_first" else 3)
    tile = image.grid.tile_size((x.shape[axis], x.shape[axis + 1]))
    height, width = image.real_at(tile)
    return x.narrow(axis, 0, height).narrow(axis + 1, 0, width).contiguous()
