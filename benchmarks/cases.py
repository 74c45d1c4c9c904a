"""What is compared: every case names our side, the peers, the work it cannot do without, and what it aims at.

One registry for all sizes: "tiny" for the tests, "quick" for `make bench`, "full" for everything, "gpu" for what a GPU
is bought for: larger batches, and the kernels beside torch.
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
from dualview.kernels.dispatch import Backend
from dualview.kernels.retile import retile
from dualview.ops.plan import LiveTiles

Size = Literal["tiny", "quick", "full", "gpu"]
Mode = Literal["forward", "frozen features", "features too"]
OURS = "dualview"
KERNELS = "dualview, Triton"
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
    """

    sides: dict[str, Run]
    work: work.Work | None
    tolerance: float
    other: frozenset[str] = frozenset()
    targets: dict[str, float] = field(default_factory=dict)
    memory_targets: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """A comparison that ``build`` makes at a place. ``process``: peak memory is that of a child process."""

    suite: str
    name: str
    params: dict[str, Any]
    build: Callable[[Place], Comparison]
    process: bool = False


def registry(size: Size) -> list[Case]:
    """All cases of a size."""
    return [case for suite in (_ops, _photo, _dem, _prefix, _train_step, _preprocess, _imports, _scaling)
            for case in suite(size)]  # fmt: skip


# --- ops -------------------------------------------------------------------------------------------------------------


def _ops(size: Size) -> Iterable[Case]:
    for n in {"tiny": (2,), "quick": (3,), "full": (3, 5), "gpu": (3,)}[size]:
        side, tokens, width = (4, 4, 8) if size == "tiny" else (336, 24, 1024)
        shapes = {"images": (1, 3, n * side, n * side), "tokens": (1, n * tokens, n * tokens, width)}
        for kind, shape in shapes.items():
            for cut in ("local", "global"):
                for inverse in (False, True):
                    op = "recombine" if inverse else {"local": "local_crop", "global": "global_stride_crop"}[cut]
                    name = f"{op}, {cut} {kind}" if inverse else f"{op}, {kind}"
                    build = partial(_tiling, shape, (n, n), kind, cut, inverse, size != "quick")
                    yield Case("ops", f"{name}, n={n}", {"n": n, "shape": "x".join(map(str, shape))}, build)


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
    others = peers.tiling(kind, cut, compile_too=compile_too)
    targets = dict.fromkeys(others, 0.9)
    if kind == "tokens" and place.device == "cuda":
        others = {KERNELS: _moved_by_kernel(grid, cut), **others}
    sides = {OURS: ours} | {name: partial(peer, x, grid, inverse=inverse) for name, peer in others.items()}
    sides["clone of the same bytes"] = x.clone
    if kind == "tokens" or cut == "local":  # of strided pixels no two neighbours stay neighbours
        targets["clone of the same bytes"] = 1 / 1.5
    return Comparison(sides, work.copy(x.numel(), x.element_size()), 0, frozenset({"clone of the same bytes"}), targets)


def _moved_by_kernel(grid: tuple[int, int], cut: Any) -> Callable[..., Tensor]:
    def move(x: Tensor, _: tuple[int, int], *, inverse: bool) -> Tensor:
        source, target = (cut, "raster") if inverse else ("raster", cut)
        return retile(x, source, target, grid, backend="triton")

    return move


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
    if place.device == "cuda":
        sides[KERNELS] = partial(ours, "triton")
    return Comparison(sides, work.Work(moved=photo.numel() + out), 1e-6, targets={} if live else {name: 2.0})


# --- dem -------------------------------------------------------------------------------------------------------------


def _dem(size: Size) -> Iterable[Case]:
    tokens, width = (4, 32) if size == "tiny" else (24, 1024)
    ns = {"tiny": (2, 3), "quick": (3,), "full": (3, 5), "gpu": (3,)}[size]
    batches = (1, 8, 16, 32) if size == "gpu" else (1,)
    for preset, n, batch in product(("released", "paper"), ns, batches):
        for mode in ("forward", "frozen features", "features too"):
            if size in ("quick", "gpu") and preset == "paper" and mode != "forward":
                continue
            params = {"preset": preset, "n": n, "d": width, "batch": batch, "tokens": tokens, "mode": mode}
            name = mode if mode == "forward" else f"forward + backward, {mode}"
            name = f"{preset}, n={n}{f', batch {batch}' if batch > 1 else ''}: {name}"
            yield Case("dem", name, params, partial(_enhance, **params, few=size in ("tiny", "quick")))


DEM_TARGETS = {
    ("released", 3, "forward"): 5.0,
    ("released", 5, "forward"): 10.0,
    ("released", 3, "frozen features"): 5.0,
    ("released", 3, "features too"): 3.5,
    ("paper", 3, "forward"): 2.2,
}
"""Aims at width 1024 against the loop over tiles; memory is a third of the loop's wherever a time is aimed at."""


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
        "loop over tiles": partial(peers.dem_per_tile, *given),
    }
    if place.device == "cuda":
        runs[KERNELS] = lambda: dem(local, stride, grid, backend="triton")
    if not only_loop:
        if not few or mode == "forward":
            runs["dualview, full computation"] = in_full
        if not few or mode == "forward":
            runs["view + permute + batched SDPA"] = partial(batched, *given)
        if not few:  # what is compiled takes its time
            runs["the same, torch.compile"] = partial(peers.compiled(batched), *given)
            runs["FlexAttention, permuted"] = partial(peers.dem_batched, *given, attend=peers.flex)
        runs["NATTEN"] = partial(peers.dem_batched, *given, attend=peers.natten)
        if mode == "forward" and not few:
            everywhere = partial(peers.everywhere, attention=peers.sdpa)
            runs["direct cross-attention, SDPA"] = partial(peers.dem_batched, *given, attend=everywhere)
            runs["direct cross-attention, math"] = partial(peers.direct_in_full, *given)
    backward: work.Backward = {"forward": "none", "frozen features": "weights", "features too": "all"}[mode]
    target = {"loop over tiles": DEM_TARGETS[preset, n, mode]} if (preset, n, mode) in DEM_TARGETS and d == 1024 else {}
    return Comparison(
        {name: step(run) for name, run in runs.items()},
        work.dem(dem, grid, (tokens, tokens), batch, local.element_size(), backward),
        TOLERANCE[place.dtype],
        frozenset(name for name in runs if name.startswith("direct")),
        target,
        dict.fromkeys(target, 3.0),
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
    name, width, layers, heads, side, patch, text = towers["full" if size == "gpu" else size]
    ns = {"tiny": (2, 3), "quick": (3,), "full": (2, 3, 4, 5), "gpu": (3,)}[size]
    for n, batch in product(ns, (1, 8) if size == "gpu" else (1,)):
        params = {"n": n, "tower": name, "d": width, "layers": layers, "batch": batch}
        build = partial(_pixels_to_tokens, n, batch, width, layers, heads, side, patch, text)
        of_batch = f", batch {batch}" if batch > 1 else ""
        yield Case("prefix", f"{name}, {n * side} pixels, n={n}{of_batch}", params, build, process=True)


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
    yield Case("train_step", name, params, partial(_stage_1, width, layers, side, patch), process=True)


def _stage_1(width: int, layers: int, side: int, patch: int, place: Place) -> Comparison:
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

    return Comparison(
        {
            OURS: lambda: step(pixel_values=pixels),
            f"19 passes, {layers} layers, tile by tile": schedule,
            "dualview, full computation": in_full,
        },
        None,
        TOLERANCE[place.dtype] * 10,
    )


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
    if size != "tiny":
        yield Case("import_time", "a new process that imports it", {}, _import_processes, process=True)


def _import_processes(place: Place) -> Comparison:
    def importing(name: str) -> Run:
        return lambda: subprocess.run([sys.executable, "-c", f"import {name}"], check=True) and None

    return Comparison({OURS: importing("dualview"), "torch alone": importing("torch")}, None, 0)


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
