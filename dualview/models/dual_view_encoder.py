"""Pixels to tokens: cut from both perspectives, encode, enhance, read out, mix with the low-resolution view."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from dualview.geometry import GridLike, Perspective, Size, TileGrid, check_size
from dualview.models.view_plan import ViewPlan, cut_views, plan_encoder
from dualview.ops.direct_readout import DirectReadout
from dualview.ops.enhance import DualPerspectiveEnhance
from dualview.ops.gather import select
from dualview.ops.tile_batch import TileBatch
from dualview.ops.tiling import crop, recombine

Encoder: TypeAlias = Callable[[Tensor], Tensor]
LowRes: TypeAlias = Literal["mean", "add"] | None


class DualViewEncoder(nn.Module):
    """Any vision encoder, given images of rows x cols times its input size at its own token count.

    1. The image is cut into local blocks and global strides, and reduced to one low-resolution view.
    2. All sub-images of the batch go through the encoder together, in passes of ``max_tiles_per_pass``.
    3. ``dem`` recombines both sets of features, lets them enhance each other, and reads out h' x w' tokens.
    4. The result is mixed with the features of the low-resolution view.

    The encoder's token count and width are kept, so what follows it in a pretrained model still fits.

    Args:
        encoder: Any callable (T, 3, h, w) -> (T, h', w', D): `HfEncoder`, `TimmEncoder`, `OpenClipEncoder`, or one of
            your own.
        dem: A `DualPerspectiveEnhance` or `DirectReadout` (or a module called as they are), or None for the encoder's
            features of the low-resolution view alone.
        tile: The encoder's input size (h, w) in pixels.
        grid: Rows and columns of tiles. None: each image's size must be a whole number of tiles and gives its grid.
        low_res: How the low-resolution view is mixed in: "mean" (the released model), "add" (the paper), None (not at
            all: the single-resolution rows of Table 3). A ``dem`` with a gate moves from the features of that view
            alone (gate 0, the encoder as it was) to the mixed ones (gate 1).
        resize: Accept images of any size and interpolate them (bicubic, no antialiasing, in at least float32) to the
            grid's canvas and to the low-resolution view, each from the image as given. The released model does this.
            Needs ``grid``.
        low_pass: Smooth the image before the stride crop.
        max_tiles_per_pass: Most sub-images in one call of the encoder. None: 1 on a CPU, where single tiles were
            measured to be faster, and 128 elsewhere, which bounds the memory. Under `torch.compile` with varying batch
            sizes, give a number that holds a whole batch: passes are unrolled.

    Shape:
        - pixels: (B, 3, rows*h, cols*w), or a list of (3, H, W) images, each with a grid of its own, or the local tiles
          of such images as a [`TileBatch`][dualview.TileBatch]
        - valid: (B, rows*h, cols*w) booleans, or a list of (H, W): False where pixels are padding. The dem then attends
          to no token of padding alone. Images must already have the size of the grid's canvas.
        - result: (B, h', w', D); with readout "none" of a uniform batch, (B, rows*h', cols*w', D)

    Raises:
        ValueError: Sizes, grid and options do not fit each other, or the encoder returns something that is no token
            map.

    Example:
        >>> from dualview import DualPerspectiveEnhance
        >>> encoder = nn.Sequential(nn.Conv2d(3, 32, 14, stride=14), nn.Flatten(2), nn.Unflatten(2, (4, 5)))
        >>> model = DualViewEncoder(lambda x: encoder(x).movedim(1, -1), DualPerspectiveEnhance.paper(32),
        ...                         tile=(56, 70), grid=(2, 3))
        >>> model(torch.randn(1, 3, 112, 210)).shape
        torch.Size([1, 4, 5, 32])
    """

    def __init__(
        self,
        encoder: Encoder,
        dem: nn.Module | None,
        *,
        tile: Size = (336, 336),
        grid: GridLike | None = None,
        low_res: LowRes = "mean",
        resize: bool = False,
        low_pass: bool = False,
        max_tiles_per_pass: int | None = None,
    ) -> None:
        super().__init__()
        if not callable(encoder) or not (dem is None or callable(dem)):
            raise TypeError(
                f"encoder={encoder!r}, dem={dem!r}: the encoder must be callable, and the dem a module such as "
                "DualPerspectiveEnhance.released(dim), or None."
            )
        if low_res not in ("mean", "add", None):
            raise ValueError(f'low_res={low_res!r}: must be "mean", "add" or None.')
        if resize and grid is None:
            raise ValueError("resize=True needs a grid: it says to which size images are brought.")
        if getattr(dem, "readout", None) == "none" and low_res is not None:
            raise ValueError(
                f"low_res={low_res!r} cannot be mixed with a full map: use low_res=None, or a dem with a readout other "
                'than "none".'
            )
        if max_tiles_per_pass is not None and max_tiles_per_pass < 1:
            raise ValueError(f"max_tiles_per_pass={max_tiles_per_pass}: must be at least 1, or None.")
        self.encoder, self.dem = encoder, dem
        self.tile, self.grid = check_size(tile, "tile"), None if grid is None else TileGrid.of(grid)
        self.low_res, self.resize, self.low_pass = low_res, resize, low_pass
        self.max_tiles_per_pass = max_tiles_per_pass

    def forward(
        self, pixels: Tensor | Sequence[Tensor] | TileBatch, valid: Tensor | Sequence[Tensor] | None = None
    ) -> Tensor:
        return encode_dual_view(
            pixels,
            self.encoder,
            self.dem,
            tile=self.tile,
            grid=self.grid,
            low_res=self.low_res,
            resize=self.resize,
            low_pass=self.low_pass,
            max_tiles_per_pass=self.max_tiles_per_pass,
            valid=valid,
        )

    def plan(self, size: Size, grid: GridLike | None = None, tokens: Size | None = None) -> ViewPlan:
        """What is computed for an image of ``size`` = (H, W) pixels.

        Args:
            size: Image size in pixels.
            grid: Rows and columns of tiles, where neither the encoder nor the size says them.
            tokens: Token map (h', w') of one tile, for the plan of the dem, where the encoder does not say it. The
                sub-images do not depend on it.

        Example:
            >>> model = DualViewEncoder(lambda x: x, DualPerspectiveEnhance.released(16), grid=(3, 3))
            >>> len(model.plan((1008, 1008)).views)
            10
        """
        chosen = TileGrid.of(grid) if grid is not None else self.grid or TileGrid.for_image(size, self.tile)
        low = uses_low_view(self.dem, self.low_res)
        return plan_encoder(
            self.encoder, self.dem, chosen, self.tile, size, low=low, low_pass=self.low_pass, tokens=tokens
        )

    def extra_repr(self) -> str:
        return (
            f"tile={self.tile}, grid={self.grid and tuple(self.grid)}, low_res={self.low_res!r}, resize={self.resize}, "
            f"low_pass={self.low_pass}, max_tiles_per_pass={self.max_tiles_per_pass}"
        )


def encode_dual_view(
    pixels: Tensor | Sequence[Tensor] | TileBatch,
    encoder: Encoder,
    dem: nn.Module | None,
    *,
    tile: Size,
    grid: TileGrid | None = None,
    low_res: LowRes = "mean",
    resize: bool = False,
    low_pass: bool = False,
    max_tiles_per_pass: int | None = None,
    valid: Tensor | Sequence[Tensor] | None = None,
) -> Tensor:
    """What [`DualViewEncoder`][dualview.DualViewEncoder] computes; its arguments, shapes and errors."""
    if isinstance(pixels, TileBatch):
        pixels = recombine(pixels, perspective="local")
    batches = [pixels] if isinstance(pixels, Tensor) else [image[None] for image in pixels]
    if not batches:
        raise ValueError("a list of images must hold at least one.")
    masks = _masks(valid, batches, isinstance(pixels, Tensor))
    grids = [_grid_of(batch, tile, grid, resize) for batch in batches]
    plans = [
        plan_encoder(
            encoder,
            dem,
            g,
            tile,
            check_size(batch.shape[2:], "image size"),
            low=uses_low_view(dem, low_res),
            low_pass=low_pass,
        )
        for batch, g in zip(batches, grids, strict=True)
    ]
    views = [cut_views(*group, tile, low_pass) for group in zip(batches, grids, plans, strict=True)]
    encoded = _encode(encoder, torch.cat([v.flatten(0, 1) for v in views]), max_tiles_per_pass)
    parts = encoded.split([v.shape[0] * v.shape[1] for v in views])
    features = [part.unflatten(0, v.shape[:2]) for part, v in zip(parts, views, strict=True)]

    outputs: dict[int, Tensor] = {}
    sizes = [(g.rows, g.cols, *batch.shape[2:]) for g, batch in zip(grids, batches, strict=True)]
    for size in dict.fromkeys(sizes):  # images of one grid and size share one plan and one call of the DEM
        members = [i for i, other in enumerate(sizes) if other == size]
        g, plan = grids[members[0]], plans[members[0]]
        mask = None if masks is None else torch.cat([masks[i] for i in members])
        fused = _fuse(torch.cat([features[i] for i in members]), g, plan, tile, dem, low_res, mask)
        outputs.update(zip(members, fused.split([batches[i].shape[0] for i in members]), strict=True))
    if len({out.shape[1:] for out in outputs.values()}) > 1:
        raise ValueError(
            f"full maps of different grids ({', '.join(str(g) for g in dict.fromkeys(grids))}) have different sizes "
            'and cannot be one batch: use a readout other than "none", or one grid per call.'
        )
    return torch.cat([outputs[i] for i in range(len(batches))])


def uses_low_view(dem: nn.Module | None, low_res: LowRes) -> bool:
    """Whether the features of the low-resolution view take part."""
    return low_res is not None or dem is None or getattr(dem, "gate", None) is not None


def _masks(valid: Tensor | Sequence[Tensor] | None, batches: list[Tensor], uniform: bool) -> list[Tensor] | None:
    if valid is None:
        return None
    masks = [valid] if uniform and isinstance(valid, Tensor) else [mask[None] for mask in valid]
    expected = [(batch.shape[0], *batch.shape[-2:]) for batch in batches]
    if [tuple(mask.shape) for mask in masks] != expected:
        raise ValueError(
            f"valid has shapes {[tuple(mask.shape) for mask in masks]}: it must mark every pixel of every image, "
            f"{expected}."
        )
    return masks


def _grid_of(images: Tensor, tile: Size, grid: TileGrid | None, resize: bool) -> TileGrid:
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(
            f"pixels of shape {tuple(images.shape)} and type {images.dtype}: expected floating-point (B, 3, H, W), or "
            "a list of (3, H, W)."
        )
    if resize and grid is not None:
        return grid
    (height, width), (h, w) = images.shape[-2:], tile
    found = (height // h, width // w)
    if height % h or width % w or 0 in found or (grid is not None and found != (grid.rows, grid.cols)):
        wanted = "a whole number of tiles" if grid is None else f"{grid.map_size(tile)}, a grid of {grid}"
        raise ValueError(
            f"images of {height} x {width} (height x width) with tiles of {h} x {w}: must be {wanted}. "
            "DualPerspectiveCrop pads or crops images to whole tiles; resize=True interpolates inside."
        )
    return TileGrid(*found)


def _encode(encoder: Encoder, tiles: Tensor, max_tiles_per_pass: int | None) -> Tensor:
    chunk = max_tiles_per_pass or (1 if tiles.device.type == "cpu" else 128)
    features = [encoder(part) for part in tiles.split(chunk)]
    for part, out in zip(tiles.split(chunk), features, strict=True):
        if not isinstance(out, Tensor) or out.dim() != 4 or out.shape[0] != part.shape[0]:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"the encoder returned {got} for {part.shape[0]} sub-images: it must return token maps "
                f"({part.shape[0]}, h', w', D). Drop prefix tokens and .unflatten(1, (h', w')) in a small wrapper."
            )
    return torch.cat(features)


def _fuse(
    features: Tensor,
    grid: TileGrid,
    plan: ViewPlan,
    tile: Size,
    dem: nn.Module | None,
    low_res: LowRes,
    valid: Tensor | None,
) -> Tensor:
    """Features (B, V, h', w', D) of the views of one grid -> (B, h', w', D)."""
    low = None if plan.low is None else features[:, plan.low]
    if dem is None:
        assert low is not None, "without a dem the low-resolution view is all there is"
        return low
    options: dict[str, Any] = {}
    if isinstance(dem, (DualPerspectiveEnhance, DirectReadout)):
        options["live"] = plan.live
    if valid is not None:
        options["key_mask"] = _token_masks(valid, grid, tile, (features.shape[2], features.shape[3]))
    enhanced: Tensor = dem(select(features, 1, plan.local), select(features, 1, plan.stride), grid, **options)
    gate: Tensor | None = getattr(dem, "gate", None)
    if low is None:
        return enhanced
    if (
        gate is not None and low_res != "add"
    ):  # low + gate * (mixed - low): at gate 0 the encoder's features as they are
        return low + (enhanced - gate * low) * (0.5 if low_res == "mean" else 1.0)
    total = low + enhanced
    return total / 2 if low_res == "mean" else total


def _token_masks(valid: Tensor, grid: TileGrid, tile: Size, tokens: Size) -> tuple[Tensor, Tensor]:
    """Which cells of the local and of the global token map see at least one real pixel, (B, rows*h', cols*w') each."""
    if tuple(valid.shape[-2:]) != grid.map_size(tile):
        raise ValueError(
            f"valid marks images of {tuple(valid.shape[-2:])}, which are interpolated to {grid.map_size(tile)}: that "
            "blends padding into real pixels. Pad images to the canvas of the grid instead."
        )
    patch_height, patch_width = tile[0] // tokens[0], tile[1] // tokens[1]  # pixels beyond whole patches are not seen
    if (tile[0] // patch_height, tile[1] // patch_width) != tokens:
        raise ValueError(
            f"a tile of {tile} pixels does not split into {tokens} patches, so a pixel mask has no exact token mask: "
            "give the DEM its key_mask directly."
        )

    def pooled(perspective: Perspective) -> Tensor:
        tiles = crop(valid[:, None], grid, perspective)[:, :, 0]
        whole = tiles[:, :, : tokens[0] * patch_height, : tokens[1] * patch_width]
        patches = whole.unflatten(3, (tokens[1], -1)).unflatten(2, (tokens[0], -1))
        seen = patches.any(5).any(3)
        return recombine(seen[..., None], grid, perspective, data_format="channels_last")[..., 0]

    return pooled("local"), pooled("global")
