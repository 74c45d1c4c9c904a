"""Towers that take images of their own size, packed: a second call of the tower with the views of all images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from dualview.geometry import Size, TileGrid
from dualview.models.adapter.hosts import Place
from dualview.models.adapter.module import Bound
from dualview.models.adapter.outputs import LARGE, features_at, put_features
from dualview.models.adapter.packings import Flat, Packing, given
from dualview.models.encode_views import views_per_pass
from dualview.models.parts import ViewOptions
from dualview.models.view_plan import ViewPlan, cut_views, plan_encoder
from dualview.ops.planned.run import select
from dualview.switches import planning


def enhance_packed(
    packing: Packing,
    tower: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
    places: Sequence[Place],
    child: nn.Module,
    options: ViewOptions,
) -> None:
    """Replace the features at ``places`` of a tower's output by what the DEM makes of the views of its images.

    Views have the size of their image (``options.resize``), or are tiles of it.
    """
    asked = {name: value for name, value in kwargs.items() if name == "output_hidden_states"}

    def maps(of: Any, sizes: Sequence[Size]) -> list[Tensor]:
        found = [packing.maps(features_at(of, place), sizes) for place in places]
        return [torch.cat(one, -1) for one in zip(*found, strict=True)]

    def encode(views: Sequence[Tensor]) -> list[Tensor]:
        return maps(tower.forward(**packing.arguments(views), **asked), _sizes(views))

    images = packing.images(args, kwargs)
    bases = maps(output, _sizes(images))
    large = packing.images(*_large(args, kwargs))
    groups = _by_size(images, large, bases, child, options, packing.token)
    views = [view for group in groups for image in group.views for view in image]
    chunk = views_per_pass(views[0], options.max_tiles_per_pass)
    features = iter(one for start in range(0, len(views), chunk) for one in encode(views[start : start + chunk]))
    tiles = [_stacked(features, len(group.members), len(group.plan.views)) for group in groups]
    enhanced = child(
        [group.base for group in groups],
        [select(of, 1, group.plan.local) for of, group in zip(tiles, groups, strict=True)],
        [select(of, 1, group.plan.stride) for of, group in zip(tiles, groups, strict=True)],
        options.grid,
        groups[0].plan.live,
    )
    for group, new in zip(groups, enhanced, strict=True):
        for i, one in zip(group.members, new, strict=True):
            bases[i] = one
    for place, new in zip(places, zip(*(base.chunk(len(places), -1) for base in bases), strict=True), strict=True):
        put_features(output, place, packing.put(features_at(output, place), new))


def without_large(packing: Flat, args: tuple[Any, ...], kwargs: dict[str, Any], grid: TileGrid) -> Any:
    """Arguments of a tower without the large images, which the patches that stay carry to `enhance_packed`.

    After the patches of each image come those of the image of ``grid`` times its size; ``grid_thw`` is of the former.
    """
    patches, thw = given(args, kwargs, "hidden_states", "grid_thw")
    counts = [steps * rows * cols for steps, rows, cols in thw.tolist()]
    if len(patches) != sum(counts) * (1 + grid.num_tiles):
        raise ValueError(
            f'the tower got {len(patches)} patches for images of {counts} patches, and with source="hires" and '
            f"grid={grid} it needs {1 + grid.num_tiles} times as many, those of the large images behind each: make the "
            f"inputs with the processor that adapt_processor(processor, {tuple(grid)}) returns. Videos are not "
            'enlarged: attach with source="upsample" for them.'
        )
    pieces = patches.split([size for count in counts for size in (count, count * grid.num_tiles)])
    small = torch.cat(pieces[::2])
    setattr(small, LARGE, (torch.cat(pieces[1::2]), thw * thw.new_tensor([1, *grid])))
    return ((small, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": small})


def _large(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments for the images that views are cut from: `without_large` has kept them, or they are the same."""
    patches = args[0] if args else kwargs.get("hidden_states")
    kept = getattr(patches, LARGE, None)
    return (args, kwargs) if kept is None else (kept, {})


class Group(NamedTuple):
    """Images of one size.

    Attributes:
        members: Which of the images they are.
        base: Their features, (B, h, w, layers*D).
        plan: What is computed for each.
        views: The sub-images, (B, V, C, h, w).
    """

    members: list[int]
    base: Tensor
    plan: ViewPlan
    views: Tensor


def _by_size(
    images: Sequence[Tensor],
    large: Sequence[Tensor],
    bases: Sequence[Tensor],
    child: nn.Module,
    options: ViewOptions,
    token: int,
) -> list[Group]:
    groups, grid = [], cast(TileGrid, options.grid)
    sizes = _sizes(images)
    for size in dict.fromkeys(sizes):
        members = [i for i, other in enumerate(sizes) if other == size]
        of_size = options._replace(tile=size if options.resize else _tile(size, grid, token))
        base = torch.stack([bases[i] for i in members])
        bound = cast(Any, Bound(child, base))
        plan = plan_encoder(None, bound, of_size, grid, size, full=not planning())
        views = cut_views(torch.stack([large[i] for i in members]), grid, plan, of_size)
        groups.append(Group(members, base, plan, views))
    return groups


def _tile(size: Size, grid: TileGrid, token: int) -> Size:
    """Height and width of the tiles of an image, which are whole tokens."""
    wanted = grid.map_size((token, token))
    if size[0] % wanted[0] or size[1] % wanted[1]:
        raise ValueError(
            f'the tower got an image of {size[0]} x {size[1]} pixels (height x width), and with source="native" and '
            f"grid={grid} it must be a multiple of {wanted[0]} x {wanted[1]}: resize pictures to such sizes (for "
            f'Qwen-VL and GLM-4V adapt_processor(processor, {tuple(grid)}, "native") does), or attach with '
            'source="upsample".'
        )
    return grid.tile_size(size)


def _stacked(features: Iterator[Tensor], batch: int, views: int) -> Tensor:
    """The next batch x views maps of the features, (B, V, h, w, D)."""
    maps = torch.stack([next(features) for _ in range(batch * views)])
    return cast(Tensor, maps.unflatten(0, (batch, views)))


def _sizes(images: Sequence[Tensor]) -> list[Size]:
    return [(image.shape[1], image.shape[2]) for image in images]
