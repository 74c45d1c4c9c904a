"""All that is measured on a GPU, in one unattended call of less than eight minutes: `python -m benchmarks.gpu`.

The kernels' tests come first; unless they pass, torch alone is measured. Then every way to do the same work, eager and
as a CUDA graph: what is aimed at first, for what finds no time is missing with this reason. Values and gradients are
compared with float64 before a time counts. One result file has the GPU's name; it is whole after every row, whatever
ends the measurement. At the end every aim is printed, and once more what fell short. `--device cpu --tiny` tries the
script where there is no GPU.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dualview as dv
from benchmarks import gpu_bars, measure, peers, rates, results, runner, work
from benchmarks.cases import CLIP_MEAN, CLIP_STD, CLONE, KERNELS, LOOP, OURS, SEED, _learnt, _tower
from benchmarks.children import described
from benchmarks.gpu_bars import BATCHED, BY_VIEW, COMPILED, ONE_BATCH, PLAIN
from benchmarks.gpu_process import ResultFile, keep_running
from benchmarks.gpu_rows import Rows
from benchmarks.measure import Place, Run
from dualview.geometry import LiveTiles
from dualview.kernels.retile import retile
from dualview.ops.planned.products import Products

TEST_SECONDS = 150
SECONDS = 440
"""From the start to the last row that is begun."""
MORE_SECONDS = 25
"""For what is under way then."""
FORWARD, BACKWARD = "forward", "forward and backward, frozen features"
ALL_GRADIENTS = "forward and backward, gradients of features too"
N = 3
GRID = (N, N)


class Sizes:
    """Of everything that is measured; tiny ones show that the script runs."""

    def __init__(self, tiny: bool) -> None:
        self.tokens, self.width, self.side = (3, 32, 6) if tiny else (24, 1024, 336)
        self.batches, self.steps = ((1,), (1,)) if tiny else ((1, 8, 16, 32), (8, 1, 16, 32))
        self.grids = (2,) if tiny else (5,)  # beside N: at 5 x 5 tiles few tokens of many are read
        self.many, self.photos = (1, (1,)) if tiny else (32, (1, 8, 32))
        self.tower = (32, 2, 4, 28, 7, 48) if tiny else (1024, 24, 16, 336, 14, 4096)
        self.compiler = "aot_eager" if tiny else "inductor"
        self.rounds = 1 if tiny else 5


def main() -> None:
    """Test and measure."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="small sizes: no figures, only whether it runs")
    parser.add_argument("--output", type=Path, default=results.FOLDER / "gpu", help="folder of the result file")
    options = parser.parse_args()
    workers = str(len(os.sched_getaffinity(0)))
    gate = "skipped: tiny"
    if not options.tiny:
        gate = runner.run_tests("--numprocesses", workers, "tests/kernels", seconds=TEST_SECONDS)
    print(f"tests {gate} ({time.monotonic() - start:.0f} s)", flush=True)
    place, deadline = Place(options.device, torch.bfloat16), start + SECONDS
    header = results.header(place.device, place.dtype, "tiny" if options.tiny else "gpu", gate, SEED)
    header["rates_of"] = rates.name_of(place.device)
    name = re.sub(r"\W+", "-", header["machine"]["name"]).strip("-").lower()
    path = options.output / f"{name}{'-tiny' if options.tiny else ''}.json"
    if not keep_running(partial(measured, place, options.tiny, header, deadline), path, deadline + MORE_SECONDS):
        raise SystemExit("Nothing was measured: what ended the process stands above.")
    document = ResultFile.begun(path).document
    print(gpu_bars.table(document["bars"]))
    print(gpu_bars.summary(document))
    print(f"{path}: {len(document['rows'])} rows, {time.monotonic() - start:.0f} s in all")


def measured(place: Place, tiny: bool, header: dict[str, Any], deadline: float, path: Path, again: bool) -> None:
    """Measure everything that the file has not yet; it is written after every row.

    Args:
        place: Where, and in which type.
        tiny: Whether with small sizes.
        header: All of the document but the figures.
        deadline: `time.monotonic` after which no row is begun.
        path: The file.
        again: Whether to go on with what an earlier process has written.
    """
    torch.manual_seed(SEED)
    new = header | {"sections": dict.fromkeys(section.__name__ for section in SECTIONS), "rows": []}
    file = ResultFile.begun(path) if again else ResultFile(path, new)
    document, sizes = file.document, Sizes(tiny)
    if not again:
        document["limits"] = asdict(measure.Limits(1e12, 1e12) if tiny else measure.limits(place))
    limits = document["limits"]

    def keep() -> None:
        document["bars"] = gpu_bars.bars(document["rows"], limits)
        file.write()

    rows = Rows(place, deadline, sizes.rounds, document["rows"], keep)
    keep()
    with dv.use_backend("torch" if document["gate"].startswith("failed") else "auto"):
        for section in SECTIONS:
            file.section(section.__name__, partial(section, rows, sizes, limits), described)
            rows.go_on_only_if_the_device_answers()


# --- The enhancement module -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One call of the enhancement module, or one step of its training."""

    preset: str
    batch: int
    mode: str = FORWARD
    n: int = N
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        """Of the case."""
        grid = "" if self.n == N else f", {self.n} x {self.n}"
        kind = "" if self.dtype == torch.bfloat16 else f", {str(self.dtype).removeprefix('torch.')}"
        return f"{self.preset}{grid}{kind}, batch {self.batch}: {self.mode}"

    def params(self, sizes: Sizes) -> dict[str, Any]:
        """What the name stands for."""
        of_sizes = {"d": sizes.width, "tokens": sizes.tokens}
        return asdict(self) | of_sizes | {"dtype": str(self.dtype).removeprefix("torch.")}


def enhancement(rows: Rows, sizes: Sizes, limits: dict[str, float]) -> None:
    """Forward, all batches; then forward and backward at the batch that is aimed at."""
    for preset, batch in product(("released", "paper"), sizes.batches):
        _enhance(rows, sizes, limits, Step(preset, batch), peers_too=True)
    for preset in ("released", "paper"):
        _enhance(rows, sizes, limits, Step(preset, sizes.steps[0], BACKWARD), peers_too=True)


def compiled_as_aimed(rows: Rows, sizes: Sizes, limits: dict[str, float]) -> None:
    """Compiled batched SDPA where an aim names it: what is compiled takes its time, for every size again."""
    for batch in sizes.batches[:1:-1] or sizes.batches:
        _enhance(rows, sizes, limits, Step("paper", batch), compiled=(COMPILED,))


def gradient_steps(rows: Rows, sizes: Sizes, limits: dict[str, float]) -> None:
    """Forward and backward at the other batches, and once with gradients of the features."""
    for preset in ("released", "paper"):
        _enhance(rows, sizes, limits, Step(preset, sizes.steps[0], ALL_GRADIENTS))
    for preset, batch in product(("released", "paper"), sizes.steps[1:]):
        _enhance(rows, sizes, limits, Step(preset, batch, BACKWARD), peers_too=True)


def arrangements(rows: Rows, sizes: Sizes, limits: dict[str, float]) -> None:
    """Every arrangement by hand at other grids and in the other half type."""
    kinds = [*product((torch.bfloat16,), sizes.grids), *product((torch.float16,), (N, *sizes.grids))]
    for batch, (dtype, n), preset, mode in product(sizes.steps, kinds, ("released", "paper"), (FORWARD, BACKWARD)):
        _enhance(rows, sizes, limits, Step(preset, batch, mode, n, dtype))


def compiled_peers(rows: Rows, sizes: Sizes, limits: dict[str, float]) -> None:
    """All else that is compiled."""
    every = COMPILED, "FlexAttention", "FlexAttention, FLASH"
    for preset, batch in product(("released", "paper"), sizes.steps):
        _enhance(rows, sizes, limits, Step(preset, batch), compiled=every)
    for preset in ("released", "paper"):
        _enhance(rows, sizes, limits, Step(preset, sizes.steps[0], BACKWARD), compiled=every)
    small_ops(rows, sizes, limits, compiled=True)


def _enhance(
    rows: Rows,
    sizes: Sizes,
    limits: dict[str, float],
    step: Step,
    *,
    peers_too: bool = False,
    compiled: tuple[str, ...] = (),
) -> None:
    """One case: ours in every arrangement and the loop; or the compiled sides of a case that has these rows."""
    place, d, grid = replace(rows.place, dtype=step.dtype), sizes.width, (step.n, step.n)
    dem = getattr(dv.DualPerspectiveEnhance, step.preset)(d).to(place.device, place.dtype)
    local, stride = (place.randn(step.batch, step.n**2, sizes.tokens, sizes.tokens, d) for _ in range(2))
    weight = place.randn(step.batch, sizes.tokens, sizes.tokens, d)

    def call(forward: Callable[..., Tensor], module: nn.Module = dem, *given: Tensor) -> Run:
        """With these tiles and weights of the output, or with those of the case."""
        *tiles, of_out = given or (local, stride, weight)
        if step.mode == FORWARD:
            return torch.no_grad()(lambda: (forward(module, *tiles, grid),))
        features = [x.detach().requires_grad_(step.mode == ALL_GRADIENTS) for x in tiles]

        def both() -> tuple[Tensor, ...]:
            out = forward(module, *features, grid)
            learnt = [*_learnt(module), *(x for x in features if x.requires_grad)]
            gradients = torch.autograd.grad((out * of_out.to(out.dtype)).sum(), learnt, allow_unused=True)
            pairs = zip(gradients, learnt, strict=True)
            return out.detach(), *(torch.zeros_like(x) if g is None else g for g, x in pairs)

        return both

    def exact() -> list[Tensor]:
        """In float64, for a few images at a time: the loop holds every intermediate result."""
        wide = copy.deepcopy(dem).double()
        given = zip(*(x.double().split(4) for x in (local, stride, weight)), strict=True)
        of_images = zip(*(call(peers.dem_per_tile, wide, *images)() for images in given), strict=True)
        weights = len(_learnt(dem)) if step.mode != FORWARD else 0
        return [sum(of) if 0 < i <= weights else torch.cat(of) for i, of in enumerate(of_images)]

    def ours(way: Products) -> Run:
        def arranged(module: Any, *given: Any) -> Tensor:
            with rates.arranged(way):
                return module(*given)

        return call(arranged)

    batched = partial(peers.dem_batched, attend=peers.tiles_as_batch)
    flex = partial(peers.flex, compiler=sizes.compiler)
    sides = {LOOP: call(peers.dem_per_tile)}
    if compiled:
        slow = {
            COMPILED: call(peers.compiled(batched, sizes.compiler)),
            "FlexAttention": call(partial(peers.dem_batched, attend=flex)),
            "FlexAttention, FLASH": call(partial(peers.dem_batched, attend=partial(flex, backend="FLASH"))),
        }
        sides |= {name: slow[name] for name in compiled}
    else:
        sides |= {BATCHED: call(batched)} if peers_too else {}  # before ours: its plans must not harm ours
        sides[OURS] = call(lambda module, *given: module(*given))
        with torch.set_grad_enabled(step.mode != FORWARD):
            by_hand = rates.ways(dem, grid, sizes.tokens, local)
        sides |= {f"{OURS}, {name}": ours(way) for name, way in by_hand.items()}
    if peers_too:
        sides["varlen attention"] = call(partial(peers.dem_batched, attend=peers.varlen))
        sides["NATTEN"] = call(partial(peers.dem_batched, attend=peers.natten))
    rows.measure("dem", step.name, step.params(sizes), sides, exact, LOOP)
    with rates.arranged(Products.as_written(2)):
        given = (dem, grid, (sizes.tokens, sizes.tokens), step.batch, local.element_size())
        backward: work.Backward = {FORWARD: "none", BACKWARD: "weights"}.get(step.mode, "all")  # type: ignore[assignment]
        least = work.dem(*given, backward)
    _limit(rows, "dem", step.name, step.params(sizes), "limit of projected operations", least, limits)


def _limit(
    rows: Rows, suite: str, case: str, params: dict[str, Any], side: str, least: work.Work, limits: dict[str, float]
) -> None:
    """A row with the time that this GPU needs at least: computed from what it reaches, not measured."""
    if any((row["suite"], row["case"], row["side"]) == (suite, case, side) for row in rows.found):
        return
    seconds = measure.Limits(**limits).seconds(least.operations, least.moved)
    row = {"suite": suite, "case": case, "params": params, "side": side, "eager_ms": 1000 * seconds}
    rows.found.append(row | dict.fromkeys(("graph_ms", "peak_bytes", "error", "missing", "no_graph")))
    rows.keep()


# --- Small operations -------------------------------------------------------------------------------------------------


def small_ops(rows: Rows, sizes: Sizes, limits: dict[str, float], *, compiled: bool = False) -> None:
    """Crops, recombination and re-tiling beside a copy of the same bytes."""
    b, pixels, tokens = sizes.many, N * sizes.side, N * sizes.tokens
    maps = {"images": (b, 3, pixels, pixels), "tokens": (b, tokens, tokens, sizes.width)}
    moves = (
        ("local_crop", "raster", "local"),
        ("global_stride_crop", "raster", "global"),
        ("recombine, local", "local", "raster"),
        ("recombine, global", "global", "raster"),
        ("re-tile", "local", "global"),
    )
    for kind, (name, source, target) in product(maps, moves):
        layout: Any = "channels_first" if kind == "images" else "channels_last"
        x = rows.place.randn(*maps[kind])
        x = x if source == "raster" else retile(x, "raster", source, GRID, data_format=layout, backend="torch")
        move = partial(retile, x, source, target, GRID, data_format=layout)

        def by_view(x: Tensor = x, kind: str = kind, source: str = source, target: str = target) -> Tensor:
            whole = x if source == "raster" else peers.by_view(x, GRID, kind, source, inverse=True)
            return whole if target == "raster" else peers.by_view(whole, GRID, kind, target)

        sides: dict[str, Run] = {
            BY_VIEW: by_view,
            OURS: move,
            KERNELS: partial(move, backend="triton"),
            CLONE: x.clone,
        }
        if compiled:
            sides = {BY_VIEW: by_view, f"{BY_VIEW}, torch.compile": peers.compiled(by_view, sizes.compiler)}
        exact: Run = lambda by_view=by_view: by_view().double()  # noqa: E731
        params = {"batch": b, "moved_bytes": 2 * x.nbytes}
        rows.measure("ops", f"{name}, {kind}, batch {b}", params, sides, exact, BY_VIEW, other=CLONE)


def host_time(rows: Rows, sizes: Sizes, limits: dict[str, float]) -> None:
    """Calls for a small map, which a GPU has done before the host launches the next one: the time is the host's."""
    x = rows.place.randn(1, N * sizes.tokens, N * sizes.tokens, 16)
    local, stride = (peers.by_view(x, GRID, "tokens", cut) for cut in ("local", "global"))
    last = {"data_format": "channels_last"}
    calls: dict[str, tuple[Run, Callable[..., Any]]] = {
        "local_crop": (partial(peers.by_view, x, GRID, "tokens", "local"), partial(dv.local_crop, x, GRID, **last)),
        "global_stride_crop": (
            partial(peers.by_view, x, GRID, "tokens", "global"),
            partial(dv.global_stride_crop, x, GRID, **last),
        ),
        "recombine": (
            partial(peers.by_view, stride, GRID, "tokens", "global", inverse=True),
            partial(dv.recombine, stride, GRID, "global", **last),
        ),
        "re-tile": (
            partial(peers.retile_by_view, local, GRID, "local", "global"),
            partial(retile, local, "local", "global", GRID, **last),
        ),
    }
    for name, (by_view, ours) in calls.items():
        sides: dict[str, Run] = {BY_VIEW: by_view, OURS: ours, KERNELS: partial(ours, backend="triton")}
        exact: Run = lambda by_view=by_view: by_view().double()  # noqa: E731
        rows.measure("host", f"{name}, one small map", {"batch": 1}, sides, exact, BY_VIEW, graphs=False)


def photographs(rows: Rows, sizes: Sizes, limits: dict[str, float]) -> None:
    """Bytes to normalised tiles, those that are live."""
    place, side = rows.place, sizes.side
    stride = dv.DualPerspectiveEnhance.released(16).plan(GRID, (N, N)).live.stride
    live = LiveTiles(tuple(range(N * N)), stride)
    mean, std = (torch.tensor(values, device=place.device) for values in (CLIP_MEAN, CLIP_STD))
    alive = torch.tensor(stride, device=place.device)
    for count in sizes.photos:
        photos = torch.randint(256, (count, N * side, N * side, 3), dtype=torch.uint8, device=place.device)

        def plain(dtype: torch.dtype = torch.float32, photos: Tensor = photos) -> list[Tensor]:
            pixels = ((photos.to(dtype) / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()
            local, strides = (peers.by_view(pixels, GRID, "images", cut) for cut in ("local", "global"))
            found = local, strides.index_select(1, alive)
            return [x.to(place.dtype) if dtype is torch.float32 else x for x in found]

        call = partial(
            dv.normalized_crop, photos, GRID, mean=CLIP_MEAN, std=CLIP_STD, live=live,
            data_format="channels_last", dtype=place.dtype,
        )  # fmt: skip
        sides = {
            PLAIN: plain, OURS: call,
            "dualview, torch": partial(call, backend="torch"), KERNELS: partial(call, backend="triton"),
        }  # fmt: skip
        case = f"{count} photographs, live tiles"
        rows.measure("photo", case, {"batch": count}, sides, partial(plain, torch.float64), PLAIN)


# --- The vision prefix ------------------------------------------------------------------------------------------------


def prefix(rows: Rows, sizes: Sizes, limits: dict[str, float]) -> None:
    """Pixels to projected tokens, with the tower as it is and with its layers compiled."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    place, (width, layers, heads, side, patch, text) = rows.place, sizes.tower
    batch = sizes.steps[0]
    tower = CLIPVisionModel(CLIPVisionConfig(**_tower(width, layers, heads, side, patch))).eval()
    projector = nn.Sequential(nn.Linear(width, text), nn.GELU(), nn.Linear(text, text))
    dem = dv.DualPerspectiveEnhance.released(width)
    for module in (tower, dem, projector):
        module.to(place.device, place.dtype)
    fast = copy.deepcopy(tower)
    for module in fast.modules():
        if type(module).__name__.endswith("EncoderLayer"):
            module.compile(dynamic=False, backend=sizes.compiler)
    pixels = place.randn(batch, 3, N * side, N * side)

    def ours(tower: nn.Module) -> Run:
        model = dv.DualViewEncoder(dv.HfEncoder(tower), dem, tile=(side, side), grid=GRID)
        return torch.no_grad()(lambda: projector(model(pixels).flatten(1, 2)))

    parts = tower, dem, projector

    def schedule(tower: nn.Module, one_batch: bool = True) -> Run:
        return torch.no_grad()(partial(peers.prefix, tower, dem, projector, pixels, GRID, one_batch=one_batch))

    @torch.no_grad()
    def exact() -> Tensor:
        """In float32: float64 would take longer than all else."""
        wide = (copy.deepcopy(part).float() for part in parts)
        return peers.prefix(*wide, pixels.float(), GRID, one_batch=True).double()

    sides = {
        ONE_BATCH: schedule(tower),
        OURS: ours(tower),
        f"{ONE_BATCH}, compiled tower": schedule(fast),
        f"{OURS}, compiled tower": ours(fast),
        "19 views, tile by tile": schedule(tower, one_batch=False),
    }
    case, params = f"ViT-L/14-336, 1008 pixels, batch {batch}", {"batch": batch, "d": width, "layers": layers}
    rows.measure("prefix", case, params, sides, exact, ONE_BATCH, graphs=False)
    side_tokens = side // patch
    planned = work.dem(dem, GRID, (side_tokens, side_tokens), batch, pixels.element_size())
    planned += work.vit(tower, layers - 1, batch * (N * N + 1), pixels.element_size())
    planned += work.mlp(batch * side_tokens**2, width, text, pixels.element_size())
    _limit(rows, "prefix", case, params, "limit of planned operations", planned, limits)


SECTIONS = (
    *(enhancement, small_ops, host_time, photographs, prefix, compiled_as_aimed),
    *(gradient_steps, arrangements, compiled_peers),  # what no aim names
)


if __name__ == "__main__":
    main()
