"""One photograph through INF-LLaVA's vision path at the paper's sizes, every stage measured.

Nothing is downloaded: the architectures are the real ones, the weights are random.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from dualview.canvas import fit_canvas
from dualview.geometry import GridLike, TileGrid
from dualview.images import CLIP_MEAN, CLIP_STD, ImageSource, load_image
from dualview.models.dual_view_encoder import DualViewEncoder
from dualview.models.encoders import HfEncoder
from dualview.models.parts import LowRes
from dualview.ops.enhance import DualPerspectiveEnhance
from dualview.outputs import check_output, save_image
from dualview.switches import full_computation
from dualview.terminal import native_messages_dropped, say
from dualview.visualize import check_drawable, draw_tiles

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

Preset: TypeAlias = Literal["released", "paper"]

LOW_RES: dict[Preset, LowRes] = {"released": "mean", "paper": "add"}
"""How either version of the model mixes in the low-resolution view."""

QUESTION = "What does the picture show?"


@dataclass(frozen=True)
class Sizes:
    """Sizes of the models; the defaults are CLIP ViT-L/14-336 and a small Llama."""

    tile: int = 336
    patch: int = 14
    dim: int = 1024
    mlp_dim: int = 4096
    layers: int = 24
    heads: int = 16
    llm_dim: int = 512
    llm_layers: int = 4


@dataclass
class Stage:
    """One row of the table.

    Attributes:
        name: What was computed.
        shape: Shape of the result; the first sizes of repeated calls are added up.
        tokens: Number of tokens in it, 0 for pixels.
        seconds: Wall time since the end of the stage before.
        memory: Peak so far, in bytes; None where it cannot be known.
    """

    name: str
    shape: tuple[int, ...]
    tokens: int
    seconds: float
    memory: int | None


@dataclass
class Report:
    """What was measured and made: the rows of the table, the image tokens and the language model's scores."""

    stages: list[Stage]
    image_tokens: Tensor
    logits: Tensor


@dataclass
class Stopwatch:
    """Measures stages one after the other: each lasts from the end of the one before to its own."""

    device: torch.device
    stages: list[Stage] = field(default_factory=list)
    last: float = field(default_factory=time.perf_counter)

    def lap(self, name: str, shape: tuple[int, ...], tokens: int = 0) -> None:
        """End a stage. A further lap of the same name continues it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        if self.stages and self.stages[-1].name == name:
            done = self.stages.pop()
            shape = (done.shape[0] + shape[0], *shape[1:])
            tokens, seconds = done.tokens + tokens, done.seconds + seconds
        self.stages.append(Stage(name, shape, tokens, seconds, _peak_memory(self.device)))

    def lap_map(self, name: str, tokens: Tensor) -> None:
        """End a stage that gave tokens (..., D)."""
        self.lap(name, tuple(tokens.shape), tokens[..., 0].numel())


def run_full_size(
    image: ImageSource | None,
    output: str | os.PathLike[str],
    *,
    grid: GridLike = (3, 3),
    preset: Preset = "released",
    seed: int = 0,
    config: Sizes | None = None,
    full: bool = False,
) -> Report:
    """Take a photograph through the vision path, print what happens, and write the picture.

    Args:
        image: Whatever [`load_image`][dualview.load_image] takes; None for the photograph that matplotlib ships.
        output: Where the picture of the tiles goes.
        grid: Rows and columns of tiles.
        preset: Which version of the enhancement module, and of mixing in the low-resolution view.
        seed: Of the random weights.
        config: Sizes of the models.
        full: Also encode and compute what does not reach the result
            ([`full_computation`][dualview.full_computation]).

    Raises:
        ImageError: The image cannot be read, or the picture cannot be written.
        ValueError: The grid is too large to be drawn, or for the memory.
    """
    grid, config = TileGrid.of(grid), config or Sizes()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_drawable(grid)
    check_output(output)
    _check_memory(grid, config, device)
    watch = Stopwatch(device)
    source = bundled_photograph() if image is None else image
    with native_messages_dropped():
        photo = load_image(source)
    say(f"image       {_named(source)}{' (Grace Hopper, a photograph that matplotlib ships)' * (image is None)}")
    watch.lap("image", (photo.shape[1], photo.shape[2], 3))

    canvas = fit_canvas(photo, grid.map_size((config.tile, config.tile)))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    pixels = ((canvas / (1 if canvas.is_floating_point() else 255) - mean) / std)[None].to(device)
    watch.lap("scale, pad, normalise", tuple(pixels.shape))
    save_image(draw_tiles(canvas, grid).picture, output)
    watch.lap("draw the tiles", (canvas.shape[1], canvas.shape[2], 3))

    torch.manual_seed(seed)
    say(f"models      {_describe(config, preset)}, on {device.type}")
    model, projector, llm = _build(config, grid, preset, device)
    modules = {"encoder": model.get_submodule("encoder"), "DEM": model.get_submodule("dem")}
    modules |= {"projector": projector, "language model": llm}
    counts = (f"{name} {sum(p.numel() for p in module.parameters()):,}" for name, module in modules.items())
    say(f"parameters  {'; '.join(counts)}")
    say("weights     RANDOM: shapes, tokens, times and memory mean something, the values of the result do not")
    watch.lap("build the models", ())

    size = grid.map_size((config.tile, config.tile))
    with full_computation():
        everything = len(model.plan(size).views)
    with torch.inference_mode():
        with full_computation() if full else nullcontext():
            views = len(model.plan(size).views)
            say(f"encoding    {_encoded(views, everything)}")
            with _watched(model, watch, views):
                features = model(pixels)
        image_tokens = projector(features.flatten(1, 2))
        watch.lap_map("projector", image_tokens)
        text = torch.tensor([list(QUESTION.encode())], device=device)
        embeddings = torch.cat([image_tokens, llm.get_input_embeddings()(text)], dim=1)
        logits = llm(inputs_embeds=embeddings).logits
        watch.lap("language model", tuple(logits.shape), logits.shape[1])

    say("")
    say(aligned(watch.stages, device))
    say("")
    say(f"The language model read {image_tokens.shape[1]} image tokens and the {text.shape[1]} bytes of {QUESTION!r}.")
    say(f"Wrote {output}: the image under its grid, its local tiles, its stride tiles.")
    say("Next: open it; then `dualview view YOUR_IMAGE --grid 2x3`, `dualview explain`; in Python,")
    say("dualview.DualViewEncoder takes your own encoder.")
    return Report(watch.stages, image_tokens, logits)


def aligned(stages: list[Stage], device: torch.device) -> str:
    """The stages, aligned, with a last row for the whole."""
    rows = [("stage", "shape", "tokens", "seconds", "peak memory")]
    for stage in stages:
        shape = " x ".join(map(str, stage.shape)) or "-"
        memory = "-" if stage.memory is None else f"{stage.memory / 2**30:.2f} GiB"
        rows.append((stage.name, shape, f"{stage.tokens:,}" if stage.tokens else "-", f"{stage.seconds:.2f}", memory))
    rows.append(("total", "", "", f"{sum(stage.seconds for stage in stages):.2f}", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    aligned = [[row[i].ljust(widths[i]) if i < 2 else row[i].rjust(widths[i]) for i in range(5)] for row in rows]
    lines = ["  ".join(cells).rstrip() for cells in aligned]
    rule = "-" * len(lines[0])
    meaning = (
        "peak memory: the most that the CUDA allocator has held up to then"
        if device.type == "cuda"
        else "peak memory: the most that the process, Python and torch included, has had resident up to then"
    )
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1], meaning])


def _build(
    config: Sizes, grid: TileGrid, preset: Preset, device: torch.device
) -> tuple[DualViewEncoder, nn.Module, LlamaForCausalLM]:
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    with device:
        tower = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=config.dim,
                intermediate_size=config.mlp_dim,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                image_size=config.tile,
                patch_size=config.patch,
                projection_dim=768,
            )
        )
        dem = getattr(DualPerspectiveEnhance, preset)(config.dim)
        projector = nn.Sequential(
            nn.Linear(config.dim, config.llm_dim), nn.GELU(), nn.Linear(config.llm_dim, config.llm_dim)
        )
        llm = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256,
                hidden_size=config.llm_dim,
                intermediate_size=4 * config.llm_dim,
                num_hidden_layers=config.llm_layers,
                num_attention_heads=8,
                max_position_embeddings=4096,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
    model = DualViewEncoder(
        HfEncoder(tower, layer=-2), dem, tile=(config.tile, config.tile), grid=grid, low_res=LOW_RES[preset]
    )
    return model.eval(), projector.eval(), llm.eval()


@contextmanager
def _watched(model: DualViewEncoder, watch: Stopwatch, views: int) -> Iterator[None]:
    """Measure the stages of an encoder by hooks, and show its progress."""
    from tqdm import tqdm

    assert isinstance(model.encoder, nn.Module)
    assert isinstance(model.dem, DualPerspectiveEnhance)
    bar = tqdm(total=views, desc="encoding", unit=" sub-image", file=sys.stderr)

    def tiles_cut(_: nn.Module, args: tuple[Any, ...]) -> None:
        if bar.n == 0:
            watch.lap("cut into tiles", (views, *args[0].shape[1:]))

    def encoded(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        watch.lap_map("encoder", out)
        bar.update(out.shape[0])

    def lap(name: str) -> Any:
        return lambda _, args, out: watch.lap_map(name, out)

    hooks = [
        model.encoder.register_forward_pre_hook(tiles_cut),
        model.encoder.register_forward_hook(encoded),
        model.dem.register_forward_hook(lap("DEM")),  # a hook inside would change how its products are arranged
        model.register_forward_hook(lap("mix")),
    ]
    try:
        yield
    finally:
        bar.close()
        for hook in hooks:
            hook.remove()


def _describe(config: Sizes, preset: Preset) -> str:
    tower = "ViT-L/14-336" if config == Sizes() else f"a ViT of {config.layers} layers, width {config.dim}"
    return f"{tower} (transformers), DEM {preset}({config.dim}), projector, Llama of {config.llm_layers} layers"


def _encoded(views: int, everything: int) -> str:
    if views == everything:
        return f"all {everything} sub-images"
    return f"{views} of {everything} sub-images determine the result; the others are not encoded"


def _check_memory(grid: TileGrid, config: Sizes, device: torch.device) -> None:
    """Refuse a grid whose pixels and features, some copies of each at a time, cannot be held."""
    pixels, tokens = config.tile**2, (config.tile // config.patch) ** 2
    per_tile = 4 * (4 * 3 * pixels + 8 * tokens * config.dim)  # bytes of float32; a tile lies in both perspectives
    needed, there = grid.num_tiles * per_tile, _whole_memory(device)
    if there is not None and needed > there:
        raise ValueError(
            f"a grid of {grid} takes about {needed / 2**30:.0f} GiB here, and there are {there / 2**30:.0f}: choose a "
            "smaller grid."
        )


def _whole_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):  # not on Windows
        return None


def _named(source: ImageSource) -> str:
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else f"a {type(source).__name__}"


def bundled_photograph() -> str:
    """The file of a photograph that matplotlib ships: Grace Hopper, by the US Navy, in the public domain."""
    from matplotlib.cbook import get_sample_data

    return str(get_sample_data("grace_hopper.jpg", asfileobj=False))


def _peak_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # Unix only
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
