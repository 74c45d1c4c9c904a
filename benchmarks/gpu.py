"""All that is measured on a GPU, in one unattended call of less than eight minutes: `python -m benchmarks.gpu`.

The kernels' tests come first; unless they pass, torch alone is measured. Then every way to do the same work, eager and
as a CUDA graph: what is aimed at first, for what finds no time is missing with this reason. Values and gradients are
compared with float64 before a time counts. One result file has the GPU's name; at the end every aim is printed with
"reached", "fell short" or "not measured". `--device cpu --tiny` tries the script where there is no GPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dualview as dv
from benchmarks import gpu_bars, measure, peers, results, runner, work
from benchmarks.cases import CLIP_MEAN, CLIP_STD, CLONE, KERNELS, LOOP, OURS, SEED, _learnt, _tower
from benchmarks.gpu_bars import BATCHED, BY_VIEW, COMPILED, ONE_BATCH, PLAIN
from benchmarks.gpu_rows import Rows, quietly
from benchmarks.measure import Place, Run
from benchmarks.rates import arranged
from dualview.geometry import LiveTiles
from dualview.kernels.retile import retile
from dualview.ops.planned.products import Arrangement

TEST_SECONDS = 150
SECONDS = 450
"""From the start to the last row; half a minute stays for what is under way then."""
ABSORBED, PROJECTED = "dualview, absorbed", "dualview, projected"
FORWARD, BACKWARD = "forward", "forward and backward, frozen features"
N = 3
GRID = (N, N)


class Sizes:
    """Of everything that is measured; tiny ones show that the script runs."""

    def __init__(self, tiny: bool) -> None:
        self.tokens, self.width, self.side = (3, 32, 6) if tiny else (24, 1024, 336)
        self.batches, self.steps = ((1,), (1,)) if tiny else ((1, 8, 16, 32), (8, 1, 16, 32))
        self.many, self.photos = (1, (1,)) if tiny else (32, (1, 8, 32))
        self.tower = (32, 2, 4, 28, 7, 48) if tiny else (1024, 24, 16, 336, 14, 4096)
        self.compiler = "aot_eager" if tiny else "inductor"


def main() -> None:
    """Test and measure."""
    start = time.perf_counter()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="small sizes: no figures, only whether it runs")
    parser.add_argument("--output", type=Path, default=results.FOLDER / "gpu", help="folder of the result file")
    options = parser.parse_args()
    workers = str(len(os.sched_getaffinity(0)))
    gate = "skipped: tiny"
    if not options.tiny:
        gate = runner.run_tests("--numprocesses", workers, "tests/kernels", seconds=TEST_SECONDS)
    print(f"tests {gate} ({time.perf_counter() - start:.0f} s)", flush=True)
    deadline = float("inf") if options.tiny else start + SECONDS
    document = measured(Place(options.device, torch.bfloat16), options.tiny, gate, deadline, options.output)
    print(gpu_bars.table(document["bars"]))
    print(f"{time.perf_counter() - start:.0f} s in all")


def measured(place: Place, tiny: bool, gate: str, deadline: float, folder: Path) -> dict[str, Any]:
    """Measure everything; the file is written after each section, so that an end that comes early costs the rest."""
    torch.manual_seed(SEED)
    sizes, rows = Sizes(tiny), Rows(place, deadline, rounds=1 if tiny else 5)
    header = results.header(place.device, place.dtype, "tiny" if tiny else "gpu", gate, SEED)
    limits = asdict(measure.Limits(1e12, 1e12) if tiny else measure.limits(place))
    name = re.sub(r"\W+", "-", header["machine"]["name"]).strip("-").lower()
    document: dict[str, Any] = {}
    with dv.use_backend("torch" if gate.startswith("failed") else "auto"):
        for section in (enhancement, prefix, small_ops, photographs, gradient_steps):
            quietly(partial(section, rows, sizes, limits), section.__name__)
            document = header | {"limits": limits, "rows": rows.found, "bars": gpu_bars.bars(rows.found, limits)}
            path = folder / f"{name}{'-tiny' if tiny else ''}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
            print(f"wrote {path}: {len(rows.found)} rows", flush=True)
    return document


# --- The enhancement module -------------------------------------------------------------------------------------------


def enhancement(rows: Rows, sizes: Sizes, limits: dict[str, float]) -> None:
    """Forward, all batches; then forward and backward at the batch that is aimed at."""
    for preset, batch in product(("released", "paper"), sizes.batches):
        _enhance(rows, sizes, limits, preset, batch, FORWARD)
    for preset in ("released", "paper"):
        _enhance(rows, sizes, limits, preset, sizes.steps[0], BACKWARD)


def gradient_steps(rows: Rows, sizes: Sizes, limits: dict[str, float]) -> None:
    """Forward and backward at the other batches."""
    for preset, batch in product(("released", "paper"), sizes.steps[1:]):
        _enhance(rows, sizes, limits, preset, batch, BACKWARD)


def _enhance(rows: Rows, sizes: Sizes, limits: dict[str, float], preset: str, batch: int, mode: str) -> None:
    place, d = rows.place, sizes.width
    dem = getattr(dv.DualPerspectiveEnhance, preset)(d).to(place.device, place.dtype)
    local, stride = (place.randn(batch, N * N, sizes.tokens, sizes.tokens, d) for _ in range(2))
    weight = place.randn(batch, sizes.tokens, sizes.tokens, d)

    def step(forward: Callable[..., Tensor], module: nn.Module = dem, tiles: Any = (local, stride)) -> Run:
        if mode == FORWARD:
            return torch.no_grad()(lambda: forward(module, *tiles, GRID))

        def both() -> tuple[Tensor, ...]:
            out = forward(module, *tiles, GRID)
            learnt = _learnt(module)
            gradients = torch.autograd.grad((out * weight.to(out.dtype)).sum(), learnt, allow_unused=True)
            pairs = zip(gradients, learnt, strict=True)
            return out.detach(), *(torch.zeros_like(p) if g is None else g for g, p in pairs)

        return both

    def ours(arrangement: Arrangement | None = None) -> Run:
        def call(module: Any, *given: Any) -> Tensor:
            if arrangement is None:
                return module(*given)
            with arranged(arrangement):
                return module(*given)

        return step(call)

    batched = partial(peers.dem_batched, attend=peers.tiles_as_batch)
    sides = {
        LOOP: step(peers.dem_per_tile),
        BATCHED: step(batched),  # before ours: plans that it leaves behind must not harm ours
        OURS: ours(),
        ABSORBED: ours(Arrangement(absorb=True)),
        PROJECTED: ours(Arrangement()),
        "varlen attention": step(partial(peers.dem_batched, attend=peers.varlen)),
        "NATTEN": step(partial(peers.dem_batched, attend=peers.natten)),
    }
    if mode == FORWARD or batch == sizes.steps[0]:  # what is compiled takes its time, and for every size again
        flex = partial(peers.flex, compiler=sizes.compiler)
        sides[COMPILED] = step(peers.compiled(batched, sizes.compiler))
        sides["FlexAttention"] = step(partial(peers.dem_batched, attend=flex))
        sides["FlexAttention, FLASH"] = step(partial(peers.dem_batched, attend=partial(flex, backend="FLASH")))
    wide = copy.deepcopy(dem).double(), (local.double(), stride.double())
    exact = step(peers.dem_per_tile, *wide)()
    case = f"{preset}, batch {batch}: {mode}"
    params = {"preset": preset, "n": N, "d": d, "batch": batch, "tokens": sizes.tokens, "mode": mode}
    rows.measure("dem", case, params, sides, exact, LOOP)
    with arranged(Arrangement()):
        given = (dem, GRID, (sizes.tokens, sizes.tokens), batch, local.element_size())
        least = work.dem(*given, "none" if mode == FORWARD else "weights")
    _limit(rows, "dem", case, params, "limit of projected operations", least, limits)


def _limit(
    rows: Rows, suite: str, case: str, params: dict[str, Any], side: str, least: work.Work, limits: dict[str, float]
) -> None:
    """A row with the time that this GPU needs at least: computed from what it reaches, not measured."""
    seconds = measure.Limits(**limits).seconds(least.operations, least.moved)
    row = {"suite": suite, "case": case, "params": params, "side": side, "eager_ms": 1000 * seconds}
    rows.found.append(row | dict.fromkeys(("graph_ms", "peak_bytes", "error", "missing", "no_graph")))


# --- Small operations -------------------------------------------------------------------------------------------------


def small_ops(rows: Rows, sizes: Sizes, limits: dict[str, float]) -> None:
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
            f"{BY_VIEW}, torch.compile": peers.compiled(by_view, sizes.compiler),
            CLONE: x.clone,
        }
        params = {"batch": b, "moved_bytes": 2 * x.nbytes}
        rows.measure("ops", f"{name}, {kind}, batch {b}", params, sides, by_view().double(), BY_VIEW, other=CLONE)


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
        rows.measure("photo", case, {"batch": count}, sides, plain(torch.float64), PLAIN)


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
    rows.measure("prefix", case, params, sides, exact(), ONE_BATCH, graphs=False)
    side_tokens = side // patch
    planned = work.dem(dem, GRID, (side_tokens, side_tokens), batch, pixels.element_size())
    planned += work.vit(tower, layers - 1, batch * (N * N + 1), pixels.element_size())
    planned += work.mlp(batch * side_tokens**2, width, text, pixels.element_size())
    _limit(rows, "prefix", case, params, "limit of planned operations", planned, limits)


if __name__ == "__main__":
    main()
