"""What is compared: every case names our side, the peers, the work it cannot do without, and what it aims at.

One registry for all sizes: "tiny" for the tests, "quick" for `make bench`, "full" for everything. What a GPU is bought
for, larger batches and CUDA graphs, is in `benchmarks.gpu`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, nn

import dualview as dv
from benchmarks import peers, work
from benchmarks.measure import Place, Run
from benchmarks.rates import arranged
from dualview.geometry import LiveTiles
from dualview.kernels.dispatch import Backend, interpreting
from dualview.kernels.retile import retile
from dualview.ops.planned.products import Arrangement, Products

Size = Literal["tiny", "quick", "full"]
Mode = Literal["forward", "frozen features", "features too"]
OURS = "dualview"
KERNELS = "dualview, Triton"
SEED = 0
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference by type, relative to the largest value; what only moves data must be equal."""


@dataclass
class Comparison:
    """What a case runs.

    Attributes:
        sides: What is timed; the first is ours.
        work: Operations and bytes that ours cannot do without; None where neither bounds it.
        tolerance: Largest difference of values.
        other: Sides that compute another function: a cost to know, no values to compare with ours.
        targets: Least ratio of time to each of these sides.
        memory_targets: Least ratio of peak memory.
        fraction_target: Least fraction of what the machine could do.
    """

    sides: dict[str, Run]
    work: work.Work | None
    tolerance: float
    other: frozenset[str] = frozenset()
    targets: dict[str, float] = field(default_factory=dict)
    memory_targets: dict[str, float] = field(default_factory=dict)
    fraction_target: float | None = None


@dataclass(frozen=True)
class Case:
    """A comparison that ``build`` makes at a place.

    Attributes:
        suite: The suite that it belongs to.
        name: Its name there.
        params: What the name stands for.
        build: Makes the sides.
        process: Peak memory is that of a child process.
        alone: Sides that are each measured in a process of their own, where they may fail; empty if all run in turn.
    """

    suite: str
    name: str
    params: dict[str, Any]
    build: Callable[[Place], Comparison]
    process: bool = False
    alone: tuple[str, ...] = ()


def registry(size: Size) -> list[Case]:
    """All cases of a size, what is aimed at first."""
    from benchmarks.attached import attached
    from benchmarks.large import large

    suites = (
        _forward, _prefix, _ops, _photo, _backward, _train_step, _absorb, _direct, _preprocess, _imports, _scaling,
        attached, large,
    )  # fmt: skip
    return [case for suite in suites for case in suite(size)]


def prepare(case: Case, place: Place) -> Comparison:
    """The sides of a case, from the same random numbers every time."""
    torch.manual_seed(SEED)
    return case.build(place)


def _with_kernels(place: Place) -> bool:
    """Whether a kernel can run, or must say why it cannot."""
    return place.device == "cuda" or interpreting()


# --- ops -------------------------------------------------------------------------------------------------------------


def _ops(size: Size) -> Iterable[Case]:
    side, tokens, width = (4, 4, 8) if size == "tiny" else (336, 24, 1024)
    ns = {"tiny": (2,), "full": (3, 5)}.get(size, (3,))
    for n in ns:
        params, label = {"n": n, "batch": 1}, f"n={n}"
        shapes = {"images": (1, 3, n * side, n * side), "tokens": (1, n * tokens, n * tokens, width)}
        for kind, cut, inverse in product(shapes, ("local", "global"), (False, True)):
            op = "recombine" if inverse else {"local": "local_crop", "global": "global_stride_crop"}[cut]
            name = f"{op}, {cut} {kind}, {label}" if inverse else f"{op}, {kind}, {label}"
            compiled = size == "full" or (size, kind, cut) == ("tiny", "tokens", "global")  # it takes seconds
            build = partial(_tiling, shapes[kind], (n, n), kind, cut, inverse, compiled)
            yield Case("ops", name, params | {"shape": "x".join(map(str, shapes[kind]))}, build)
        tiles = (1, n * n, tokens, tokens, width)
        for source, target in (("local", "global"), ("global", "local")):
            build = partial(_retile, tiles, (n, n), source, target, size == "full")
            params["shape"] = "x".join(map(str, tiles))
            yield Case("ops", f"re-tile, {source} to {target}, {label}", dict(params), build)


def _tiling(
    shape: tuple[int, ...], grid: tuple[int, int], kind: str, cut: Any, inverse: bool, compile_too: bool, place: Place
) -> Comparison:
    layout: Any = "channels_first" if kind == "images" else "channels_last"
    x = place.randn(*shape)
    if inverse:
        x = dv.ops.tiling.crop(x, grid, cut, data_format=layout)
        ours: Run = lambda: dv.recombine(x, grid, cut, data_format=layout)  # noqa: E731
    else:
        crop = dv.local_crop if cut == "local" else dv.global_stride_crop
        ours = lambda: crop(x, grid, data_format=layout)  # noqa: E731
    sides: dict[str, Run] = {OURS: ours}
    if kind == "tokens" and _with_kernels(place):
        source, target = (cut, "raster") if inverse else ("raster", cut)
        sides[KERNELS] = partial(retile, x, source, target, grid, backend="triton")
    others = peers.tiling(kind, cut, compile_too=compile_too)
    sides |= {name: partial(peer, x, grid, inverse=inverse) for name, peer in others.items()}
    sides[CLONE] = x.clone
    alike = kind == "tokens" or cut == "local"  # of strided pixels no two neighbours stay neighbours
    targets = dict.fromkeys(others, 0.9) | ({CLONE: 1 / 1.5} if alike else {})
    return _copying(sides, x, targets, place, alike=alike)


CLONE = "clone of the same bytes"


def _copying(sides: dict[str, Run], x: Tensor, targets: dict[str, float], place: Place, *, alike: bool) -> Comparison:
    """Of sides that move every element of ``x`` once; ``alike`` if whole runs of them stay together."""
    on_gpu = place.device == "cuda"
    return Comparison(
        sides,
        work.copy(x.numel(), x.element_size()),
        0,
        frozenset({CLONE}),
        {} if on_gpu else targets,
        # What is smaller stays in a GPU's cache, or is over before it has begun.
        fraction_target=0.85 if on_gpu and alike and x.nbytes > 2**27 else None,
    )


def _retile(
    shape: tuple[int, ...], grid: tuple[int, int], source: Any, target: Any, compile_too: bool, place: Place
) -> Comparison:
    x = place.randn(*shape)
    sides: dict[str, Run] = {OURS: partial(retile, x, source, target, grid)}
    if _with_kernels(place):
        sides[KERNELS] = partial(retile, x, source, target, grid, backend="triton")
    others = {"view + permute, twice": peers.retile_by_view, "einops": peers.retile_by_einops}
    if compile_too:
        others["view + permute, twice, torch.compile"] = peers.compiled(peers.retile_by_view)
    sides |= {name: partial(peer, x, grid, source, target) for name, peer in others.items()}
    sides[CLONE] = x.clone
    return _copying(sides, x, dict.fromkeys(others, 0.9), place, alike=True)


# --- photo: bytes to normalised tiles --------------------------------------------------------------------------------


def _photo(size: Size) -> Iterable[Case]:
    n, side = (3, 4) if size == "tiny" else (3, 336)
    for live in (False, True):
        name = "live tiles" if live else "all tiles"
        yield Case("photo", f"uint8 to normalised, {name}, n={n}", {"n": n}, partial(_photograph, n, side, live))


def _photograph(n: int, side: int, live: bool, place: Place) -> Comparison:
    photo = torch.randint(256, (n * side, n * side, 3), dtype=torch.uint8).to(place.device)
    mean, std = (torch.tensor(v, device=place.device) for v in (CLIP_MEAN, CLIP_STD))
    everything = tuple(range(n * n))
    stride = dv.DualPerspectiveEnhance.released(16).plan((n, n), (n, n)).live.stride if live else everything
    wanted = LiveTiles(everything, stride)

    def ours(backend: Backend | None = None) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {"live": wanted, "data_format": "channels_last", "backend": backend}
        return dv.normalized_crop(photo, (n, n), mean=CLIP_MEAN, std=CLIP_STD, **options)

    def plain() -> tuple[Tensor, Tensor]:
        local, strides = peers.normalise_then_cut(photo, (n, n), mean, std)
        return local, strides[list(stride)] if live else strides

    out = (n * n + len(stride)) * 3 * side * side * 4
    name = "normalise, permute, rearrange twice"
    sides: dict[str, Run] = {OURS: ours, name: plain}
    if _with_kernels(place):
        sides[KERNELS] = partial(ours, "triton")
    on_gpu = place.device == "cuda"
    targets = {} if live or on_gpu else {name: 2.0}
    moved = work.Work(moved=photo.numel() + out)
    return Comparison(sides, moved, 1e-6, targets=targets, fraction_target=0.85 if on_gpu else None)


# --- dem -------------------------------------------------------------------------------------------------------------


def _forward(size: Size) -> Iterable[Case]:
    return _dem(size, ("forward",))


def _backward(size: Size) -> Iterable[Case]:
    return _dem(size, ("frozen features", "features too"))


def _dem(size: Size, modes: tuple[Mode, ...]) -> Iterable[Case]:
    tokens, width = (4, 32) if size == "tiny" else (24, 1024)
    ns = {"tiny": (2, 3), "full": (3, 5)}.get(size, (3,))
    for preset, n, mode in product(("released", "paper"), ns, modes):
        if size == "quick" and preset == "paper" and mode != "forward":
            continue
        params = {"preset": preset, "n": n, "d": width, "batch": 1, "tokens": tokens, "mode": mode}
        name = mode if mode == "forward" else f"forward + backward, {mode}"
        build = partial(_enhance, **params, few=size in ("tiny", "quick"), compile_too=size == "full")
        yield Case("dem", f"{preset}, n={n}: {name}", params, build)


DEM_TARGETS = {
    ("released", 3, "forward"): 5.0,
    ("released", 5, "forward"): 10.0,
    ("released", 3, "frozen features"): 5.0,
    ("released", 3, "features too"): 3.5,
    ("paper", 3, "forward"): 2.2,
}
"""Aims on a CPU against the loop over tiles; memory is a third of the loop's wherever a time is aimed at."""

LOOP, COMPILED, FLEX = "loop over tiles", "the same, torch.compile", "FlexAttention, permuted"
PLAN_COMPILED = "dualview, torch.compile"


def _enhance(
    place: Place,
    *,
    preset: str,
    n: int,
    d: int,
    batch: int,
    tokens: int,
    mode: Mode,
    few: bool,
    compile_too: bool = False,
    only_loop: bool = False,
) -> Comparison:
    dem = getattr(dv.DualPerspectiveEnhance, preset)(d).to(place.device, place.dtype)
    local, stride = (place.randn(batch, n * n, tokens, tokens, d) for _ in range(2))
    weight, grid = place.randn(batch, tokens, tokens, d), (n, n)
    features = [x.requires_grad_() for x in (local, stride)] if mode == "features too" else []
    wanted = [*_learnt(dem), *features]

    def step(forward: Callable[[], Tensor]) -> Run:
        if mode == "forward":
            return torch.no_grad()(forward)

        def both() -> tuple[Tensor, ...]:
            out = forward()
            gradients = torch.autograd.grad((out * weight).sum(), wanted, allow_unused=True)
            pairs = zip(gradients, wanted, strict=True)
            return out.detach(), *(torch.zeros_like(w) if g is None else g for g, w in pairs)

        return both

    def in_full() -> Tensor:
        with dv.full_computation():
            return dem(local, stride, grid)

    given = (dem, local, stride, grid)
    batched = partial(peers.dem_batched, attend=peers.tiles_as_batch)
    runs: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: dem(local, stride, grid),
        LOOP: partial(peers.dem_per_tile, *given),
    }
    if not only_loop:
        if not few or mode == "forward":
            runs["dualview, full computation"] = in_full
            runs["view + permute + batched SDPA"] = partial(batched, *given)
        if compile_too:
            runs[PLAN_COMPILED] = partial(peers.compiled(lambda a, b: dem(a, b, grid, backend="torch")), local, stride)
            runs[COMPILED] = partial(peers.compiled(batched), *given)
            runs[FLEX] = partial(peers.dem_batched, *given, attend=peers.flex)
        if not few:  # without a GPU it is slower than the loop
            runs["NATTEN"] = partial(peers.dem_batched, *given, attend=peers.natten)
    backward: work.Backward = {"forward": "none", "frozen features": "weights", "features too": "all"}[mode]
    aimed_at = place.device == "cpu" and d == 1024 and (preset, n, mode) in DEM_TARGETS
    targets = {LOOP: DEM_TARGETS[preset, n, mode]} if aimed_at else {}
    return Comparison(
        {name: step(run) for name, run in runs.items()},
        work.dem(dem, grid, (tokens, tokens), batch, local.element_size(), backward),
        TOLERANCE[place.dtype],
        targets=targets,
        memory_targets=dict.fromkeys(targets, 3.0),
    )


def _learnt(module: nn.Module) -> list[nn.Parameter]:
    """Parameters with a gradient: a bias of the keys adds one number to all scores of a query, which softmax drops.

    What is computed for it is rounding alone, and no two sides agree on that.
    """
    return [p for name, p in module.named_parameters() if not name.endswith("k_proj.bias")]


# --- prefix: pixels to projected tokens ------------------------------------------------------------------------------


def _prefix(size: Size) -> Iterable[Case]:
    towers = {  # width, layers, heads, tile, patch, width of the language model
        "tiny": ("tiny ViT", 32, 3, 4, 28, 7, 48),
        "quick": ("small ViT", 256, 6, 4, 336, 14, 512),
        "full": ("ViT-L/14-336", 1024, 24, 16, 336, 14, 4096),
    }
    name, width, layers, heads, side, patch, text = towers[size]
    for n in {"tiny": (2, 3), "quick": (3,), "full": (2, 3, 4, 5)}[size]:
        params = {"n": n, "tower": name, "d": width, "layers": layers, "batch": 1}
        build = partial(_pixels_to_tokens, n, 1, width, layers, heads, side, patch, text)
        yield Case("prefix", f"{name}, {n * side} pixels, n={n}", params, build, process=True)


def _tower(width: int, layers: int, heads: int, side: int, patch: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": side,
        "patch_size": patch,
    }


def _pixels_to_tokens(
    n: int, batch: int, width: int, layers: int, heads: int, side: int, patch: int, text: int, place: Place
) -> Comparison:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    tower = CLIPVisionModel(CLIPVisionConfig(**_tower(width, layers, heads, side, patch))).eval()
    dem = dv.DualPerspectiveEnhance.released(width)
    projector = nn.Sequential(nn.Linear(width, text), nn.GELU(), nn.Linear(text, text))
    for module in (tower, dem, projector):
        module.to(place.device, place.dtype)
    model = dv.DualViewEncoder(dv.HfEncoder(tower), dem, tile=(side, side), grid=(n, n))
    pixels = place.randn(batch, 3, n * side, n * side)

    def ours() -> Tensor:
        return projector(model(pixels).flatten(1, 2))

    def in_full() -> Tensor:
        with dv.full_computation():
            return ours()

    schedule = f"{2 * n * n + 1} passes, {layers} layers, tile by tile"
    sides: dict[str, Run] = {
        OURS: ours,
        schedule: partial(peers.prefix, tower, dem, projector, pixels, (n, n), one_batch=False),
    }
    if layers < 24 or place.device == "cuda":  # a minute each on two cores
        sides["the same, one batch"] = partial(peers.prefix, tower, dem, projector, pixels, (n, n), one_batch=True)
        sides["dualview, full computation"] = in_full
    itemsize, tokens = pixels.element_size(), (side // patch, side // patch)
    planned = work.dem(dem, (n, n), tokens, batch, itemsize)
    views = batch * {2: 9, 3: 10, 4: 21, 5: 26}[n]  # distinct sub-images that determine the output
    of_tokens = batch * tokens[0] * tokens[1]
    planned += work.vit(tower, layers - 1, views, itemsize) + work.mlp(of_tokens, width, text, itemsize)
    target = {schedule: 1.9} if layers == 24 and n == 3 else {}
    return Comparison(
        {name: torch.no_grad()(run) for name, run in sides.items()}, planned, TOLERANCE[place.dtype], targets=target
    )


# --- train_step: stage 1, frozen tower and language model -------------------------------------------------------------


def _train_step(size: Size) -> Iterable[Case]:
    width, layers, side, patch = (32, 3, 28, 7) if size == "tiny" else (256, 6, 336, 14)
    params = {"n": 3, "d": width, "layers": layers, "batch": 1}
    name = "stage 1 of a small INF-LLaVA, n=3"
    build = partial(_stage_1, width, layers, side, patch, size != "quick")
    yield Case("train_step", name, params, build, process=True)


def _stage_1(width: int, layers: int, side: int, patch: int, full_too: bool, place: Place) -> Comparison:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    from dualview.models import InfLlavaConfig, InfLlavaForConditionalGeneration

    image, text = 63, 32
    config = InfLlavaConfig(
        vision_config=_tower(width, layers, 4, side, patch),
        text_config={
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": 64,
        },
        image_token_id=image,
    )
    model = InfLlavaForConditionalGeneration(config).to(place.device, place.dtype)
    inner = model.model
    trained = [*inner.dem.parameters(), *inner.multi_modal_projector.parameters()]
    compared = [*_learnt(inner.dem), *inner.multi_modal_projector.parameters()]
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_()
    # The cost of a step, and the same weights for every side; float16 has no 1e-8.
    optimizer = torch.optim.AdamW(trained, lr=0.0, eps=1e-3)
    pixels = place.randn(1, 3, 3 * side, 3 * side)
    ids = torch.tensor([[image] * config.image_seq_length + [5] * text], device=place.device)
    labels = ids.where(ids != image, -100)

    def step(**images: Any) -> tuple[Tensor, ...]:
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=labels, **images).loss
        loss.backward()
        optimizer.step()
        return loss.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad for p in compared)

    def in_full() -> tuple[Tensor, ...]:
        with dv.full_computation():
            return step(pixel_values=pixels)

    def schedule() -> tuple[Tensor, ...]:
        parts = inner.vision_tower, inner.dem, inner.multi_modal_projector
        tokens = peers.prefix(*parts, pixels, (3, 3), one_batch=False)
        return step(mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=list(tokens))})

    sides: dict[str, Run] = {
        OURS: lambda: step(pixel_values=pixels),
        f"19 passes, {layers} layers, tile by tile": schedule,
    }
    if full_too:
        sides["dualview, full computation"] = in_full
    return Comparison(sides, None, TOLERANCE[place.dtype] * 10)


# --- absorb: projections of the keys, or of the queries into key space ------------------------------------------------


def _absorb(size: Size) -> Iterable[Case]:
    """Around the share of live queries, a fifth, from which on projecting the keys takes fewer operations."""
    tokens, width = (4, 32) if size == "tiny" else (24, 1024)
    grids = {"tiny": ((2, 3),), "quick": ()}.get(size, ((3, 3), (3, 4), (4, 4)))
    for grid, mode in product(grids, ("forward", "frozen features")):
        params = {"rows": grid[0], "cols": grid[1], "d": width, "batch": 1, "tokens": tokens, "mode": mode}
        build = partial(_either_way, grid, tokens, width, mode)
        yield Case("absorb", f"released, {grid[0]} x {grid[1]}: {mode}", params, build)


def _either_way(grid: tuple[int, int], tokens: int, width: int, mode: Mode, place: Place) -> Comparison:
    dem = dv.DualPerspectiveEnhance.released(width).to(place.device, place.dtype)
    local, stride = (place.randn(1, grid[0] * grid[1], tokens, tokens, width) for _ in range(2))
    weights, of_out = _learnt(dem), place.randn(1, tokens, tokens, width)

    def call() -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(mode != "forward"):
            out = dem(local, stride, grid)
        return (out.detach(), *(torch.autograd.grad((out * of_out).sum(), weights) if mode != "forward" else ()))

    def forced(arrangement: Arrangement) -> tuple[Tensor, ...]:
        with arranged(Products((arrangement, arrangement))):
            return call()

    sides: dict[str, Run] = {
        OURS: call,
        "projected throughout": partial(forced, Arrangement()),
        "absorbed throughout": partial(forced, Arrangement(absorb=True)),
    }
    return Comparison(sides, None, TOLERANCE[place.dtype])


# --- direct: until memory ends ----------------------------------------------------------------------------------------


DIRECT = {
    "direct cross-attention, SDPA": peers.sdpa,
    "direct cross-attention, math": peers.math_attention,
}


def _direct(size: Size) -> Iterable[Case]:
    tokens, width = (4, 32) if size == "tiny" else (24, 1024)
    ns: Iterable[int] = {"tiny": (2, 8), "quick": (3,)}.get(size, range(2, 13))
    for n in ns:
        params = {"preset": "released", "n": n, "d": width, "batch": 1, "tokens": tokens}
        build = partial(_directly, n, tokens, width)
        yield Case("direct", f"released, n={n}", params, build, alone=(OURS, *DIRECT))


def _directly(n: int, tokens: int, width: int, place: Place) -> Comparison:
    dem = dv.DualPerspectiveEnhance.released(width).to(place.device, place.dtype)
    local, stride = (place.randn(1, n * n, tokens, tokens, width) for _ in range(2))
    runs: dict[str, Run] = {OURS: lambda: dem(local, stride, (n, n))}
    for name, attention in DIRECT.items():
        attend = partial(peers.everywhere, attention=attention)
        runs[name] = partial(peers.dem_batched, dem, local, stride, (n, n), attend)
    sides = {name: torch.no_grad()(run) for name, run in runs.items()}
    return Comparison(sides, None, TOLERANCE[place.dtype], frozenset(DIRECT))


# --- preprocess ------------------------------------------------------------------------------------------------------


def _preprocess(size: Size) -> Iterable[Case]:
    height, width, side = (40, 60, 84) if size == "tiny" else (1365, 2048, 1008)
    params = {"height": height, "width": width, "side": side}
    yield Case("preprocess", f"{height} x {width} bytes to {side}", params, partial(_processor, height, width, side))


def _processor(height: int, width: int, side: int, place: Place) -> Comparison:
    from dualview.models import InfLlavaImageProcessor

    photo = torch.randint(256, (3, height, width), dtype=torch.uint8).to(place.device)
    processor = InfLlavaImageProcessor(size=side)
    return Comparison(
        {
            OURS: lambda: processor(photo, return_tensors="pt", device=place.device)["pixel_values"][0],
            "torchvision, step by step": lambda: peers.preprocess(photo, side, CLIP_MEAN, CLIP_STD),
        },
        work.Work(moved=photo.numel() + 3 * side * side * 4),
        1e-6,
    )


# --- import_time -----------------------------------------------------------------------------------------------------


def _imports(size: Size) -> Iterable[Case]:
    if size in ("quick", "full"):
        yield Case("import_time", "a new process that imports it", {}, _import_processes, process=True)


def _import_processes(place: Place) -> Comparison:
    def importing(name: str) -> Run:
        return lambda: subprocess.run([sys.executable, "-c", f"import {name}"], check=True) and None

    return Comparison({OURS: importing("dualview.models"), "torch alone": importing("torch")}, None, 0)


# --- scaling: cost against n, batch and width -------------------------------------------------------------------------


def _scaling(size: Size) -> Iterable[Case]:
    tokens, base = {"tiny": (4, 32), "quick": (24, 128)}.get(size, (24, 512))
    sweeps = {
        "n": {"tiny": (1, 2), "quick": (1, 2, 3)}.get(size, (1, 2, 3, 4, 5, 6)),
        "batch": {"tiny": (2,), "quick": (1, 4)}.get(size, (1, 2, 4, 8)),
        "d": {"tiny": (64,), "quick": (64, 256)}.get(size, (128, 256, 512, 1024)),
    }
    for preset in ("released", "paper"):
        for axis, values in sweeps.items():
            for value in values:
                params = {"preset": preset, "n": 3, "d": base, "batch": 1, "tokens": tokens} | {axis: value}
                build = partial(_enhance, **params, mode="forward", few=True, only_loop=True)
                yield Case("scaling", f"{preset}, {axis}={value}", params | {"axis": axis}, build)
