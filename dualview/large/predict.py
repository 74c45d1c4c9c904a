"""A model on a map that is too large for one pass: tile by tile, margins left out, overlaps blended."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise, product
from math import ceil, floor

import torch
from torch import Tensor

from dualview.arguments import check_callable, check_choice, check_count, check_flags
from dualview.blending import WINDOWS, Blender, Window, planes, tiles_at
from dualview.geometry import Border, DataFormat, Size, SizeLike
from dualview.large.progress import counted
from dualview.tensors import check_factory
from dualview.tile_positions import Kept, TilePositions, check_lengths
from dualview.views import check_map


def predict_tiled(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    tile: SizeLike,
    margin: SizeLike = 0,
    overlap: SizeLike | None = None,
    batch_size: int = 1,
    window: Window = "constant",
    border: Border = "shift",
    device: torch.device | str | None = None,
    data_format: DataFormat = "channels_first",
    progress: bool = False,
) -> Tensor:
    """Run a model over overlapping tiles of a map, and blend its results into one map.

    Near the edges of a tile a model has not seen what lies beyond them. There ``margin`` positions of its result are
    left out, except at the border of the map itself, where a tile is as good as the whole. A model of which no result
    depends on pixels farther away than ``margin`` gives the same as on the whole map, to rounding, also at the border:
    under "shift" tiles end where the map ends, so what the model does at a border (zero padding, reflection) it does
    there alone.

    Results may be coarser or finer than the map: a model that makes h x w pixels into h/k x w/k or h*k x w*k cells
    gives a map of H/k x W/k or H*k x W*k cells. Tiles then have to start at multiples of k. (Of a model that halves the
    map inside, say four times, and doubles it again, no result tells: take a tile, an overlap and a map of multiples of
    16.)

    No gradients are recorded. Put the model into evaluation mode first. To train through overlapping tiles there are
    [`local_crop`][dualview.local_crop] and [`blend_tiles`][dualview.blend_tiles].

    Args:
        model: Takes tiles (T, C, h, w), returns floating-point numbers (T, C', h', w'); channels last where
            ``data_format`` says so.
        x: Images or token maps; it stays on its device, and so does the result.
        tile: The size (h, w) of a tile, or one number for a square.
        margin: How many positions to leave out at an edge: the radius of the model's receptive field, (height, width)
            or one number for both.
        overlap: How much neighbouring tiles share: at least twice the margin, which is the default. More blends
            results.
        batch_size: Most tiles that the model gets at once.
        window: The weights of the blending, as for [`blend_tiles`][dualview.blend_tiles].
        border: Where the last tiles would reach beyond the map: "shift" moves them inside, "pad" fills them up with
            zeros, which gives what the model makes of the map padded at the bottom and the right.
        device: Where the tiles are computed; None for the device of ``x``.
        data_format: Whether the channels come before or after height and width.
        progress: Show a bar on standard error.

    Shape:
        - channels_first: (..., C, H, W) -> (..., C', H', W')
        - channels_last: (..., H, W, D) -> (..., H', W', D')

    Raises:
        ValueError: The overlap is less than twice the margin, or does not fit the tile; the sizes do not fit the
            model's stride; the model's results are integers, or of changing shapes; or an argument is not one of the
            choices.
        TypeError: ``x`` or what the model returns is no tensor, or the model cannot be called.
        ImportError: ``progress`` is asked for, and tqdm is not installed.

    Example:
        >>> import torch
        >>> import dualview as dv
        >>> model = torch.nn.Conv2d(3, 8, kernel_size=5, padding=2)
        >>> x = torch.rand(3, 500, 700)
        >>> out = dv.predict_tiled(model, x, tile=(128, 256), margin=2, batch_size=4)
        >>> torch.allclose(out, model(x), atol=1e-5)
        True
    """
    check_callable(model, "model", "a function or module that takes tiles")
    check_choice(window, "window", WINDOWS)
    check_flags(progress=progress)
    check_factory(device, None)
    batch_size = check_count(batch_size, "batch_size", why="It is the most tiles that the model gets at once.")
    check_map(x, "raster", data_format)
    of_margin = check_lengths(margin, "margin")
    doubled = 2 * of_margin[0], 2 * of_margin[1]
    h, w = x.shape[-2:] if data_format == "channels_first" else x.shape[-3:-1]
    positions = TilePositions.of((h, w), tile, doubled if overlap is None else overlap, border)
    positions.kept(of_margin)  # or an error
    images = list(product(*map(range, x.shape[:-3])))
    if not images:
        raise ValueError(f"x of shape {tuple(x.shape)} holds no image: there is nothing to predict.")
    out = kind = None
    with torch.no_grad(), counted(len(images) * len(positions), "predicting", "tile", shown=progress) as done:
        for image in images:
            for first in range(0, len(positions), batch_size):
                numbers = range(len(positions))[first : first + batch_size]
                tiles = tiles_at(x[image], positions, numbers, data_format)
                results = _checked(model(tiles.to(device or x.device)), len(numbers), kind)
                made = planes(results, data_format)
                if out is None:
                    kind = results.shape[1:], results.dtype
                    rows, cols = scaled(positions, of_margin, (made.shape[-2], made.shape[-1]))
                    plane = rows[-1].stop, cols[-1].stop
                    one = (*made.shape[1:2], *plane) if data_format == "channels_first" else (*plane, *made.shape[1:2])
                    out = torch.empty((*x.shape[:-3], *one), dtype=results.dtype, device=x.device)
                if first == 0:
                    target = planes(out[image], data_format)
                    blender = Blender(rows, cols, window, lambda a, b, target=target: target[..., a:b, :])  # type: ignore[misc]
                for result in made.to(x.device):
                    blender.add(result)
                done(len(numbers))
    assert out is not None, "there are tiles"
    return out


def _checked(results: object, count: int, kind: tuple[torch.Size, torch.dtype] | None) -> Tensor:
    """What the model has returned, if it is what it has to be."""
    if not isinstance(results, Tensor):
        raise TypeError(
            f"the model returned {type(results).__module__}.{type(results).__qualname__}, not a tensor: pass a "
            "function that takes it from there, such as lambda tiles: model(tiles).logits."
        )
    if results.dim() != 4 or results.shape[0] != count or 0 in results.shape:
        raise ValueError(
            f"the model made {tuple(results.shape)} of {count} tiles: it must return one map of each, (T, C', h', w'), "
            "or (T, h', w', D') for channels_last."
        )
    if not (results.is_floating_point() or results.is_complex()):
        raise ValueError(
            f"the model returned {results.dtype}: the results of overlapping tiles are averaged, which numbers of "
            "classes cannot be. Return scores, and take the argmax of the whole."
        )
    if kind not in (None, (results.shape[1:], results.dtype)):
        raise ValueError(
            f"the model made {tuple(results.shape)} of {results.dtype} of {count} tiles, and of earlier ones {kind}: "
            "all tiles are of one size, so all results must be."
        )
    return results


def scaled(positions: TilePositions, margin: Size, result: Size) -> tuple[list[Kept], list[Kept]]:
    """What rows and columns of tiles contribute, in cells of the model's result.

    Args:
        positions: The tiles.
        margin: What is left out, in positions of the map.
        result: Height and width of the result of one tile.

    Raises:
        ValueError: The result is no whole multiple or part of the tile, tiles start between two cells, or a margin in
            whole cells leaves cells without a tile.
    """
    axes = zip(positions.kept(margin), positions.size, positions.tile, result, ("height", "width"), strict=True)
    rows, cols = (_scaled(*axis) for axis in axes)
    return rows, cols


def _scaled(kept: list[Kept], length: int, tile: int, result: int, name: str) -> list[Kept]:
    scale = Fraction(result, tile)
    if 1 not in (scale.numerator, scale.denominator):
        raise ValueError(
            f"the model made a {name} of {result} out of tiles of {tile}: it must be a whole multiple or a whole part "
            "of it. Let the model pad what it reads beyond a tile."
        )
    if any(start * scale % 1 for start, *_ in kept):
        raise ValueError(
            f"the model makes one cell of {scale.denominator} positions, and tiles start at "
            f"{[k.start for k in kept]} along the {name}: choose tile, overlap and the {name} of x as multiples of "
            f"{scale.denominator}, or border='pad'."
        )
    cells = []
    for start, first, stop, end in kept:
        ended = ceil if stop == length else floor
        cells.append(Kept(int(start * scale), ceil(first * scale), ended(stop * scale), ended(end * scale)))
    if any(after.first > before.stop for before, after in pairwise(cells)):
        raise ValueError(
            f"a margin in whole cells of {scale.denominator} positions leaves cells along the {name} without a tile: "
            f"the overlap must be at least twice the margin rounded up to a multiple of {scale.denominator}."
        )
    return cells
