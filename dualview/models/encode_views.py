"""Pixels to tokens: cut from both perspectives, encode, enhance, read out, mix with the low-resolution view."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dualview.arguments import shown
from dualview.dual_tiles import DualPerspectiveTileBatch, DualPerspectiveTiles
from dualview.geometry import LiveTiles, Perspective, Size, TileGrid
from dualview.models.parts import DualView, Encoder, LowRes, Pixels, ViewOptions
from dualview.models.view_plan import ViewPlan, cut_views, gate_of, method_of, plan_encoder
from dualview.ops.planned.run import select
from dualview.ops.tile_batch import TileBatch
from dualview.ops.tiling import crop, recombine
from dualview.switches import planning
from dualview.tensors import check_alike, check_floats, check_list, check_mask
from dualview.views import in_order


def encode_dual_view(
    parts: DualView,
    pixels: Pixels,
    valid: Tensor | Sequence[Tensor] | None = None,
    encoded: Tensor | None = None,
) -> Tensor:
    """What [`DualViewEncoder`][dualview.DualViewEncoder] computes; shapes and errors as for its call.

    ``encoded`` is what `encode_views` has made of the same pixels before; of them the sizes alone are then read.
    """
    options, cut = parts.options, None
    if isinstance(pixels, DualPerspectiveTiles | DualPerspectiveTileBatch | TileBatch):
        pixels, cut, valid = _put_back(pixels, valid)
    batches = [pixels] if isinstance(pixels, Tensor) else [image[None] for image in check_list(pixels, "pixels")]
    if not batches:
        raise ValueError(f"pixels={shown(pixels)}: must hold at least one image.")
    grids = [_grid_of(batch, options) for batch in batches]
    if cut not in (None, tuple(grids)) and not options.resize:
        raise ValueError(
            f"tiles of grids {[str(g) for g in cut or ()]} were given, and with the encoder's tiles of "
            f"{options.tile[0]} x {options.tile[1]} these images have grids {[str(g) for g in grids]}: give "
            f"DualPerspectiveCrop the tile of the encoder."
        )
    check_alike(batches, "pixels")
    masks = _masks(valid, batches, isinstance(pixels, Tensor))
    plans = _plans(parts, batches, grids)
    shapes = [(batch.shape[0], len(plan.views)) for batch, plan in zip(batches, plans, strict=True)]
    counts = [images * views for images, views in shapes]
    if encoded is None:
        encoded = _encoded(parts, batches, grids, plans)
    elif encoded.dim() != 4 or encoded.shape[0] != sum(counts):
        raise ValueError(
            f"features of shape {tuple(encoded.shape)} for {sum(counts)} sub-images: expected ({sum(counts)}, h', w', "
            "D), as encode_views makes them of the same pictures with the same model."
        )
    features = [part.unflatten(0, shape) for part, shape in zip(encoded.split(counts), shapes, strict=True)]

    groups, of_groups, outputs = [], [], []
    sizes = [(g.rows, g.cols, *map(int, batch.shape[2:])) for g, batch in zip(grids, batches, strict=True)]
    for size in dict.fromkeys(sizes):  # images of one grid and size share one plan and one call of the DEM
        members = [i for i, other in enumerate(sizes) if other == size]
        g, plan = grids[members[0]], plans[members[0]]
        mask = None if masks is None else torch.cat([masks[i] for i in members])
        outputs.append(_fuse(torch.cat([features[i] for i in members]), g, plan, parts, mask))
        groups.append(members)
        of_groups.append(g)
    return in_order(groups, of_groups, outputs)


def encode_views(parts: DualView, images: Tensor | Sequence[Tensor]) -> Tensor:
    """Features of all sub-images that are needed of images, one image after the other, (views, h', w', D)."""
    batches = [images] if isinstance(images, Tensor) else [image[None] for image in check_list(images, "pixels")]
    grids = [_grid_of(batch, parts.options) for batch in batches]
    return _encoded(parts, batches, grids, _plans(parts, batches, grids))


def _plans(parts: DualView, batches: list[Tensor], grids: list[TileGrid]) -> list[ViewPlan]:
    full = not planning()
    return [
        plan_encoder(*parts, grid, (int(batch.shape[2]), int(batch.shape[3])), full=full)
        for batch, grid in zip(batches, grids, strict=True)
    ]


def _encoded(parts: DualView, batches: list[Tensor], grids: list[TileGrid], plans: list[ViewPlan]) -> Tensor:
    views = [cut_views(*group, parts.options) for group in zip(batches, grids, plans, strict=True)]
    return _encode(parts.encoder, torch.cat([v.flatten(0, 1) for v in views]), parts.options.max_tiles_per_pass)


def _put_back(
    tiles: TileBatch | DualPerspectiveTiles | DualPerspectiveTileBatch, valid: Tensor | Sequence[Tensor] | None
) -> tuple[Tensor | list[Tensor], tuple[TileGrid, ...], Tensor | Sequence[Tensor] | None]:
    """The images whose local tiles these are, the grids, and what is padding if it is known and not given."""
    if isinstance(tiles, DualPerspectiveTiles):
        canvas = recombine(tiles, perspective="local")
        canvas = canvas[None] if canvas.dim() == 3 else canvas
        masks = tiles.valid.expand(canvas.shape[0], -1, -1)
        return canvas, (tiles.grid,), masks if valid is None and tiles.image.padded else valid
    held: TileBatch = tiles if isinstance(tiles, TileBatch) else tiles.of("local")
    padded = any(image.padded for image in held.images or ())
    return recombine(held, perspective="local"), held.grids, held.valid if valid is None and padded else valid


def _masks(valid: Tensor | Sequence[Tensor] | None, batches: list[Tensor], uniform: bool) -> list[Tensor] | None:
    if valid is None:
        return None
    masks: list[Any] = [valid] if uniform else [mask[None] for mask in check_list(valid, "valid", len(batches))]
    return [
        check_mask(mask, "valid", [(batch.shape[0], *batch.shape[-2:])], batch, "real pixels, of every image")
        for mask, batch in zip(masks, batches, strict=True)
    ]


def _grid_of(images: Tensor, options: ViewOptions) -> TileGrid:
    (h, w), grid = options.tile, options.grid
    check_floats(pixels=images)
    if images.dim() != 4:
        raise ValueError(
            f"pixels of shape {tuple(images.shape)} and type {images.dtype}: expected floating-point (B, 3, H, W), or "
            "a list of (3, H, W)."
        )
    if options.resize and grid is not None:
        return grid
    height, width = images.shape[-2:]
    found = (height // h, width // w)
    if height % h or width % w or 0 in found or (grid is not None and found != (grid.rows, grid.cols)):
        wanted = "a whole number of tiles" if grid is None else f"{grid.map_size((h, w))}, a grid of {grid}"
        raise ValueError(
            f"pixels: images of {height} x {width} (height x width) with tiles of {h} x {w}: must be {wanted}. "
            "DualPerspectiveCrop pads or crops images to whole tiles; resize=True interpolates inside."
        )
    return TileGrid(*found)


def _encode(encoder: Encoder, tiles: Tensor, max_tiles_per_pass: int | None) -> Tensor:
    chunk = views_per_pass(tiles, max_tiles_per_pass)
    if isinstance(encoder, nn.Module) and any(mixes_tiles(module) for module in encoder.modules()):
        chunk = max(len(tiles), 1)
        if max_tiles_per_pass is not None and max_tiles_per_pass < chunk:
            raise ValueError(
                f"max_tiles_per_pass={max_tiles_per_pass} would split {chunk} sub-images, and the encoder has batch "
                "norms that take their statistics from the sub-images of a pass: put them into eval mode, or use "
                "max_tiles_per_pass=None, which gives all of them in one pass."
            )
    passes = [tiles] if torch.compiler.is_exporting() else tiles.split(chunk)  # their number would fix that of images
    features = [encoder(part) for part in passes]
    for part, out in zip(passes, features, strict=True):
        if not isinstance(out, Tensor) or out.dim() != 4 or out.shape[0] != part.shape[0]:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"the encoder returned {got} for {part.shape[0]} sub-images: it must return token maps "
                f"({part.shape[0]}, h', w', D). Drop prefix tokens and .unflatten(1, (h', w')) in a small wrapper."
            )
    return torch.cat(features)


def views_per_pass(views: Tensor, most: int | None) -> int:
    """How many sub-images go through an encoder at once: as many as is said, or what suits the device."""
    return most or (1 if views.device.type == "cpu" else 128)


def mixes_tiles(module: nn.Module) -> bool:
    """Whether what a module makes of one sub-image depends on the others of the pass."""
    return isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)


def _fuse(features: Tensor, grid: TileGrid, plan: ViewPlan, parts: DualView, valid: Tensor | None) -> Tensor:
    """Features (B, V, h', w', D) of the views of one grid -> (B, h', w', D)."""
    dem, low_res = parts.dem, parts.options.low_res
    low = None if plan.low is None else features[:, plan.low]
    if dem is None:
        assert low is not None, "without a dem the low-resolution view is all there is"
        return low
    options: dict[str, Any] = {}
    if method_of(dem, "plan") is not None:
        options["live"] = plan.live
    if valid is not None:
        options["key_mask"] = _token_masks(valid, grid, parts.options.tile, (features.shape[2], features.shape[3]))
    return mixed(dem, low, low_res, select(features, 1, plan.local), select(features, 1, plan.stride), grid, **options)


def mixed(
    dem: nn.Module,
    low: Tensor | None,
    low_res: LowRes,
    local_tiles: Tensor,
    stride_tiles: Tensor,
    grid: TileGrid,
    *,
    key_mask: tuple[Tensor, Tensor] | None = None,
    **live: LiveTiles,
) -> Tensor:
    """The result of a dem, mixed with the features of the low-resolution view as ``low_res`` says, (B, h', w', D).

    A gate is used within the call of its dem alone: elsewhere it may be sharded or offloaded.
    """
    options: dict[str, Any] = dict(live) if key_mask is None else {**live, "key_mask": key_mask}
    if low is not None and low_res != "add" and gate_of(dem) is not None:
        # low + gate * (mix - low): at gate 0 the encoder's features. By position, for checkpointing sees no others.
        moved: Tensor = dem(local_tiles, stride_tiles, grid, key_mask, low, **live)
        return low + (moved * 0.5 if low_res == "mean" else moved)
    enhanced: Tensor = dem(local_tiles, stride_tiles, grid, **options)
    if low is None:
        return enhanced
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
