"""The table says what is computed: its numbers are compared with those of a real call."""

import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPVisionConfig, CLIPVisionModel

from benchmarks.rates import assumed
from dualview import (
    DirectReadout,
    DualPerspectiveEnhance,
    DualViewEncoder,
    Explanation,
    HfEncoder,
    TileGrid,
    explain,
    full_computation,
    use_backend,
)
from dualview.cost import cost_of
from dualview.geometry import LiveTiles
from dualview.kernels import dispatch
from dualview.models import InfLlavaConfig, InfLlavaForConditionalGeneration
from dualview.ops.planned import products
from tests.checks import refuses
from tests.strategies import some

TILE, TOKENS, DIM = (4, 9), (2, 3), 16
GRIDS = [(2, 3), (1, 2), (3, 1), (1, 1)]


class Patches(nn.Module):
    """Remembers the shapes that go in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, DIM, (2, 3), stride=(2, 3))
        self.shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def forward(self, pixels: Tensor) -> Tensor:
        out = self.conv(pixels).movedim(1, -1)
        self.shapes.append((tuple(pixels.shape), tuple(out.shape)))
        return out


def rows_of(explanation: Explanation) -> dict[str, tuple[str, str]]:
    rows = {stage.name: (stage.planned, stage.full) for stage in explanation.stages}
    assert len(rows) == len(explanation.stages)
    return rows


DEMS = {
    "paper": DualPerspectiveEnhance.paper(DIM),
    "released": DualPerspectiveEnhance.released(DIM),
    "direct": DirectReadout("local"),
    "none": None,
}


@pytest.mark.parametrize("grid, low_res, name", some(product([*GRIDS, (3, 3), (5, 3)], ["mean", "add", None], DEMS), 5))
def test_encoder_rows_are_what_is_encoded(grid: tuple[int, int], low_res: str | None, name: str) -> None:
    dem = DEMS[name]
    model = DualViewEncoder(Patches(), dem, tile=TILE, low_res=low_res, max_tiles_per_pass=1000)
    rows = rows_of(explain(model, grid=grid, tokens=TOKENS))
    model.encoder.shapes.clear()
    image = torch.randn(1, 3, grid[0] * TILE[0], grid[1] * TILE[1])
    model(image)
    with full_computation():
        model(image)
    planned, full = (given[0] for given, _ in model.encoder.shapes)
    assert rows["encoder"] == (f"{planned} sub-images, at most 1000 in one pass", f"{full} sub-images")
    tiles = [int(rows[name][1]) for name in ("local tiles", "stride tiles")]
    assert sum(tiles) + rows["low resolution"][1].startswith("1") == full
    assert list(rows)[:5] == ["canvas", "local tiles", "stride tiles", "low resolution", "encoder"]


@pytest.mark.parametrize("grid", [(2, 3), (3, 3), (1, 1)])
@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize("enhance", ["both", "local", "global"])
def test_dem_rows_are_what_is_attended(grid: tuple[int, int], preset: str, enhance: str) -> None:
    tokens = (6, 6)
    dem = getattr(DualPerspectiveEnhance, preset)(DIM, enhance=enhance, num_heads=4)
    rows = rows_of(explain(dem, grid=grid, tokens=tokens))
    attended: list[tuple[int, int, int]] = []
    dem.attentions[0].register_forward_hook(
        lambda _, given, __: attended.append((given[0].shape[1], given[0].shape[2], given[1].shape[2]))
    )
    tiles = torch.randn(2, 1, grid[0] * grid[1], *tokens, DIM)
    dem(*tiles, grid)
    with full_computation():
        dem(*tiles, grid)
    directions = {"both": ["V_loc", "V_glo"], "local": ["V_loc"], "global": ["V_glo"]}[enhance]
    assert list(rows) == ["DEM", *directions, "fusion, readout", "total"]
    cut = {"paper": {"V_loc": "block", "V_glo": "stride"}, "released": {"V_loc": "stride", "V_glo": "block"}}[preset]
    for name, planned, full in zip(directions, attended[: len(directions)], attended[len(directions) :], strict=True):
        for text, (count, queries, keys) in zip(rows[name], (planned, full), strict=True):
            plural = "s" if count > 1 else ""
            assert text.startswith(f"{count} {cut[name]}{plural} x {queries} queries x {keys} keys")


def test_costs_are_those_of_the_calls() -> None:
    """The parts add up to the whole, and the whole is counted from the very call."""
    dem = DualPerspectiveEnhance.released(32)
    stages = explain(dem, grid=(3, 3), tokens=(6, 6)).stages

    def call(it: nn.Module) -> Tensor:
        return it(torch.empty(1, 9, 6, 6, 32), torch.empty(1, 9, 6, 6, 32), (3, 3))

    assert stages[-1].planned_cost == cost_of(call, dem)
    with full_computation():
        assert stages[-1].full_cost == cost_of(call, dem)
    for kind in ("planned_cost", "full_cost"):
        parts = [getattr(stage, kind) for stage in stages[1:]]
        assert sum(part.operations for part in parts[:-1]) == parts[-1].operations
        assert sum(part.bytes for part in parts[:-1]) == parts[-1].bytes


def test_released_module_at_1008_pixels() -> None:
    """22 billion operations of 113; ten sub-images of nineteen, one of them in two roles."""
    encoder = DualViewEncoder(Patches(), DualPerspectiveEnhance.released(1024, device="meta"), grid=(3, 3))
    stages = {stage.name: stage for stage in explain(encoder, tokens=(24, 24)).stages}
    assert stages["low resolution"].planned == "is stride tile 4, mixed by mean"
    assert stages["encoder"].planned == "10 sub-images"
    # d = 1024, 576 keys a tile; two operations a multiply-addition
    d, k = 1024, 576
    projected = 2 * (4 * 576 * d * d + 2 * 576 * k * d)
    absorbed = 2 * 9 * (4 * 64 * d * d + 2 * 8 * 64 * k * d)
    assert stages["V_loc"].planned_cost.operations == projected
    assert stages["V_glo"].planned_cost.operations == absorbed
    assert stages["V_glo"].full_cost.operations == 9 * projected
    assert stages["encoder"].full_cost.operations * 10 == stages["encoder"].planned_cost.operations * 19


def test_layers_of_the_encoder() -> None:
    """Four of six layers planned, all and the norm in full; the tokens' widths come from it, too."""
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=2, image_size=28, patch_size=7
    )
    encoder = HfEncoder(CLIPVisionModel(config), layer=4)
    model = DualViewEncoder(encoder, DirectReadout("sum", "centre"), tile=(28, 28), grid=(3, 3), low_res=None)
    stages = {stage.name: stage for stage in explain(model).stages}
    assert (stages["layers"].planned, stages["layers"].full) == (
        "4 of 6, without the final norm", "6 of 6, and the final norm"
    )  # fmt: skip
    # 17 tokens: four projections and two of the MLP, scores and values; and the patches.
    layer = 2 * (4 * 17 * 32**2 + 2 * 17 * 32 * 64 + 2 * 17**2 * 32)
    patches = 2 * 16 * 3 * 7**2 * 32
    planned, full = stages["encoder"].planned_cost, stages["encoder"].full_cost
    assert (planned.operations, full.operations) == (10 * (4 * layer + patches), 18 * (6 * layer + patches))
    readout = stages["readout"]
    assert (readout.planned, readout.full) == ("10 tiles, sum, centre", "18 tiles")
    assert readout.planned_cost.operations == readout.full_cost.operations == 0
    # In full, two maps of 9 * 16 tokens are put back, added, and read out; planned, only their centres.
    token = 32 * 4
    assert readout.full_cost.bytes >= (2 * 2 + 3) * 9 * 16 * token
    assert 3 * 16 * token <= readout.planned_cost.bytes < readout.full_cost.bytes / 3
    assert stages["total"].planned_cost.bytes == planned.bytes + readout.planned_cost.bytes


def test_tokens_and_their_type_are_those_of_the_encoder() -> None:
    model = DualViewEncoder(Patches(), DualPerspectiveEnhance.paper(DIM), tile=(4, 12), grid=(2, 3))
    assert explain(model) == explain(model, tokens=(2, 4)) != explain(model, tokens=(4, 4))
    uncounted = DualViewEncoder(lambda pixels: pixels.item(), model.dem, tile=(4, 12), grid=(2, 3))
    assert explain(uncounted) == explain(uncounted, tokens=(24, 24))
    readouts = [
        explain(DualViewEncoder(Patches().to(dtype), DirectReadout(), tile=TILE, grid=(2, 3), low_res=None)).stages[-2]
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert readouts[0].planned_cost.bytes == 2 * readouts[1].planned_cost.bytes


def test_implementations_of_weights_that_are_nowhere_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    nowhere, here = (
        explain(DualPerspectiveEnhance.paper(DIM, device=device), grid=(2, 3)).implementations
        for device in ("meta", None)
    )
    if not torch.cuda.is_available():
        assert nowhere.keys() == here.keys()
        assert all(here[name].startswith(text) for name, text in nowhere.items())  # but for what to do about it


def test_a_readout_alone_has_no_width_to_count_with() -> None:
    stages = explain(DirectReadout(), grid=(2, 3)).stages
    assert [stage.name for stage in stages] == ["readout", "total"]
    assert stages[0].planned_cost is None


def test_an_encoder_that_cannot_be_counted_has_no_cost() -> None:
    def values_matter(pixels: Tensor) -> Tensor:
        return pixels.movedim(1, -1) if pixels.sum().item() > 0 else pixels.movedim(1, -1) + 1

    stages = {s.name: s for s in explain(DualViewEncoder(values_matter, None, tile=TILE, grid=(2, 3))).stages}
    assert stages["encoder"].planned_cost is None
    assert stages["total"].planned_cost == (0, 0)


def test_creating_a_tensor_moves_nothing() -> None:
    assert cost_of(lambda: torch.ones(4, 8)) == (0, 0)
    assert cost_of(lambda: torch.ones(4, 8) + 1) == (0, 2 * 4 * 8 * 4)


def test_what_is_overwritten_or_not_taken_is_not_read() -> None:
    def copy() -> None:
        torch.empty(4, 8).copy_(torch.empty(4, 8))

    assert cost_of(copy) == (0, 2 * 4 * 8 * 4)
    assert cost_of(lambda: torch.empty(100, 8).index_select(0, torch.tensor([3, 5]))) == (0, 2 * 2 * 8 * 4 + 2 * 8)
    assert cost_of(lambda: torch.empty(4, 8).add_(torch.empty(4, 8))) == (0, 3 * 4 * 8 * 4)


def test_figures_are_those_of_the_stages() -> None:
    made = explain(DualPerspectiveEnhance.released(1024, device="meta"), grid=(3, 5), tokens=(4, 6))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        lines = str(made).splitlines()[3:]  # below the options
    for stage, pair in zip(made.stages[1:], zip(lines[::2], lines[1::2], strict=False), strict=False):
        assert stage.planned_cost.operations < stage.full_cost.operations
        assert stage.planned_cost.bytes < stage.full_cost.bytes
        assert pair[0].startswith(stage.name)
        for cost, line, what in zip((stage.planned_cost, stage.full_cost), pair, ("computed", "in full"), strict=True):
            assert what in line
            assert line.split()[-2:] == [f"{cost.operations / 1e9:.2f}", f"{cost.bytes / 1e6:.1f}"]
    fusion = made.stages[-2]
    assert (fusion.planned, fusion.full) == ("BottleneckConcatFusion, 24 tokens, bilinear", "360 tokens")


def test_last_line_says_what_runs() -> None:
    for dem in ("released", "paper"):
        with use_backend("torch"):
            made = explain(getattr(DualPerspectiveEnhance, dem)(DIM), grid=(2, 3))
        assert made.implementations == {"retile": 'by torch: backend="torch", by use_backend'}
        assert str(made).splitlines()[-1] == f"retile {made.implementations['retile']}"


def test_last_line_says_that_a_call_would_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "KERNEL_TYPES", {"retile": ()})
    with use_backend("triton"):
        made = explain(DualPerspectiveEnhance.paper(DIM), grid=(2, 3))
    line = made.implementations["retile"]
    assert line in " ".join(str(made).split())
    assert line.startswith("would raise an error: ")
    assert all(part in line for part in ("the kernel retile cannot run", "float32", "cast it to"))


def test_who_has_no_tensors_is_not_told_to_move_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of a configuration that is only explained are nowhere."""
    monkeypatch.setattr(dispatch, "KERNEL_TYPES", {"retile": ()})
    dem = DualPerspectiveEnhance.paper(DIM, device="meta")
    for backend in ("auto", "triton"):
        with use_backend(backend):
            text = str(explain(dem, grid=(2, 3)))
        assert not re.search(r"(move|cast) them", text)
        assert "by torch" in text or "would raise an error" in text


@pytest.mark.parametrize("columns", [1, 70, 80, 100, 300])
@pytest.mark.parametrize("preset", ["released", "paper"])
def test_table_is_aligned_and_fits_the_terminal(columns: int, preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    made = explain(getattr(DualPerspectiveEnhance, preset)(1024, device="meta"), grid=(2, 3))
    lines = str(made).splitlines()
    assert lines[0].split() == ["stage", "what", "GFLOP", "MB", "moved"]
    assert set(lines[1]) == {"-", " "}
    ends = [i for i, c in enumerate(lines[1] + " ") if c == " " and lines[1][i - 1] == "-"]
    below = next(i for i, line in enumerate(lines) if line.startswith("products"))
    for line in lines[2:below]:
        assert all(len(line) <= end or line[end] == " " for end in ends)
    assert all(line == line.rstrip() for line in lines)
    if columns > 1:
        assert max(map(len, lines)) <= columns
    words = " ".join(" ".join(line[ends[1] : ends[2]] for line in lines[2:below]).split())
    for stage in made.stages:  # whatever is broken, nothing is lost
        assert stage.planned in words
        assert stage.full in words


class Corner(nn.Module):
    """A dem of a user's own that needs one tile of each perspective."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(DIM, DIM)

    def plan(self, grid: TileGrid, tokens: tuple[int, int]) -> SimpleNamespace:
        return SimpleNamespace(live=((0,), (grid.num_tiles - 1,)))

    def forward(self, local: Tensor, stride: Tensor, grid: TileGrid, *, live: LiveTiles) -> Tensor:
        return self.proj(local + stride).mean(1)


def test_a_dem_of_a_users_own_has_a_row() -> None:
    rows = {s.name: s for s in explain(DualViewEncoder(Patches(), Corner(), tile=TILE, grid=(2, 3))).stages}
    assert (rows["local tiles"].planned, rows["local tiles"].full) == ("1", "6")
    assert (rows["Corner"].planned, rows["Corner"].full) == ("2 tiles", "12 tiles")
    operations = [cost.operations for cost in (rows["Corner"].planned_cost, rows["Corner"].full_cost)]
    assert operations == [2 * 6 * DIM**2, 6 * 2 * 6 * DIM**2]
    alone = explain(Corner(), grid=(2, 3)).stages
    assert [(s.name, s.planned, s.planned_cost) for s in alone] == [("Corner", "2 tiles", None), ("total", "", (0, 0))]


class Around(nn.Module):
    """A module around a dem that hands on its plan and its products."""

    def __init__(self, dem: nn.Module) -> None:
        super().__init__()
        self.dem = dem
        self.plan, self.products = dem.plan, dem.products

    def forward(self, *tiles: Any, **options: Any) -> Tensor:
        return self.dem(*tiles, **options)


def test_a_module_around_a_dem_has_a_row() -> None:
    dem = DualPerspectiveEnhance.released(DIM)
    rows = {s.name: s for s in explain(DualViewEncoder(Patches(), Around(dem), tile=TILE, grid=(3, 3))).stages}
    assert rows["Around"].planned == f"{sum(map(len, dem.plan((3, 3), TOKENS).live))} tiles"
    assert rows["Around"].planned_cost.operations < rows["Around"].full_cost.operations


def test_inf_llava() -> None:
    """As the encoder that is made of its parts; the language model is not looked at."""
    config = InfLlavaConfig(
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
                       "image_size": 28, "patch_size": 14},
        text_config={"vocab_size": 64, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
                     "num_attention_heads": 4, "num_key_value_heads": 2},
        grid=(3, 3), image_token_id=63,
    )  # fmt: skip
    model = InfLlavaForConditionalGeneration(config)
    parts = HfEncoder(model.model.vision_tower, -2), model.model.dem
    resized = explain(DualViewEncoder(*parts, tile=(28, 28), grid=(3, 3), resize=True))
    assert explain(model) == explain(model.model) == resized
    assert explain(model, grid=(2, 1)) == explain(DualViewEncoder(*parts, tile=(28, 28), grid=(2, 1)))
    assert "10 sub-images" in str(resized)


def test_arrangement_is_what_the_module_does() -> None:
    def made(module: nn.Module) -> Explanation:
        return explain(module, grid=(3, 3), tokens=(6, 6))

    dem = DualPerspectiveEnhance.paper(64)
    chosen = dem.products((3, 3), (6, 6), torch.empty(0))
    text = " ".join(str(made(dem)).split())
    least, second = sorted(set(chosen.estimates))[:2]
    times = [f"{1000 * seconds:.3g} ms" for seconds in (least, second, chosen.estimates[0])]
    said = "products rearranged by the rates of cpu and float32: {} estimated for one image, "
    said += "{} in the next best order, {} as the equations stand"
    assert said.format(*times) in text
    assert chosen.seconds == least < second < chosen.estimates[0]
    for stage, arranged in zip(made(dem).stages[1:3], chosen.directions, strict=True):
        for word, there in (
            ("absorbed", arranged.absorb),
            ("folded", arranged.fold),
            (f"pooled over {arranged.pool}", arranged.pool),
        ):
            assert (word in stage.planned) == bool(there)
    cells, _ = (stage.planned.split(", ")[-1] for stage in made(dem).stages[1:3])
    assert cells == "pooled over cells"

    dem.attentions[0].k_proj.register_forward_hook(lambda *_: pytest.fail("explain ran a hook"))
    text = " ".join(str(made(dem)).split())
    assert "products not rearranged: layers that are hooked, wrapped or replaced are called as they are" in text
    assert not any("absorbed" in stage.planned for stage in made(dem).stages)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("device, capability", [("cpu", None), ("cuda", (9, 0)), ("cuda", (8, 0))])
def test_the_reason_is_said_in_milliseconds(
    device: str,
    capability: tuple[int, int] | None,
    n: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a CPU, and on a GPU with rates and one without, neither of which is there: by the committed rates."""
    dem = DualPerspectiveEnhance.released(1024, device="meta", dtype=dtype)
    with FakeTensorMode():
        weight = torch.empty(0, device=device, dtype=dtype)
    monkeypatch.setattr(products, "capability", lambda device: capability)
    monkeypatch.setattr("dualview.cost.device_of", lambda tensor: weight.device)
    monkeypatch.setattr(sys.modules["dualview.explain"], "_weight_of", lambda dem: weight)
    place = f"{weight.device} and {str(dtype).removeprefix('torch.')}"
    products.choose_products.cache_clear()  # type: ignore[attr-defined]
    try:
        found = explain(dem, grid=(n, n)).products
    finally:
        products.choose_products.cache_clear()  # type: ignore[attr-defined]
    rates = products.rates_of(weight.device, dtype)
    if rates is None:
        assert capability == (8, 0)
        assert found == f"not rearranged: no rates have been measured for {place}, by which to estimate times"
        return
    with assumed(rates):
        stands, *others = dem.products((n, n), (24, 24), torch.empty(0, device="meta", dtype=dtype)).estimates
    least, second = (f"{1000 * seconds:.3g} ms" for seconds in sorted({stands, *others})[:2])
    if stands < min(others):
        opening, end = "not rearranged, by", f"{second} in the next best order"
    elif stands == sorted({stands, *others})[1]:
        opening, end = "rearranged by", f"{second} as the equations stand"
    else:
        as_it_stands = f"{1000 * stands:.3g} ms as the equations stand"
        opening, end = "rearranged by", f"{second} in the next best order, {as_it_stands}"
    assert found == f"{opening} the rates of {place}: {least} estimated for one image, {end}"


def test_directions_that_share_a_folded_matrix_make_it_once() -> None:
    made = [
        explain(DualPerspectiveEnhance.paper(64, share_weights=shared), grid=(3, 3), tokens=(6, 6))
        for shared in (True, False)
    ]
    once, twice = (one.stages[2].planned_cost.operations for one in made)
    assert all("folded" in stage.planned for one in made for stage in one.stages[1:3])
    assert twice - once == 2 * 64**3


def test_nothing_is_rearranged_where_nothing_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "records", list)
    made = explain(DualPerspectiveEnhance.paper(1006), grid=(3, 3), tokens=(6, 6))
    said = "not rearranged: no rates have been measured for cpu and float32, by which to estimate times"
    assert made.products == said
    assert not any("absorbed" in stage.planned or "pooled" in stage.planned for stage in made.stages)


def test_the_module_is_neither_run_nor_changed() -> None:
    model = DualViewEncoder(Patches(), DualPerspectiveEnhance.released(DIM), tile=TILE, grid=(3, 3))
    for module in model.modules():
        module.register_forward_hook(lambda *_: pytest.fail("a hook ran"))
        module.register_forward_pre_hook(lambda *_: pytest.fail("a hook ran"))
    before = {name: id(p) for name, p in model.named_parameters()}
    explain(model)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert not model.encoder.shapes


def test_an_offloaded_module_is_explained() -> None:
    """As one whose layers are called, with no weight fetched."""
    dem = DualPerspectiveEnhance.released(DIM)
    full = explain(dem, grid=(3, 3), tokens=(6, 6)).stages[-1].full_cost
    cpu_offload(dem, torch.device("cpu"))
    assert all(p.is_meta for p in dem.parameters())
    made = explain(dem, grid=(3, 3), tokens=(6, 6))
    assert made.stages[-1].full_cost == full
    assert "not rearranged" in made.products


def test_explain_beside_inference_harms_neither() -> None:
    dem = DualPerspectiveEnhance.released(DIM)
    model = DualViewEncoder(Patches(), dem, tile=TILE, grid=(3, 3))
    image, described = torch.randn(1, 3, 12, 27), explain(model).stages
    with torch.no_grad():
        expected = model(image)
    ends = time.monotonic() + 3

    def infer() -> int:
        done = 0
        with torch.no_grad():
            while time.monotonic() < ends:
                out = model(image)
                assert type(out) is Tensor
                assert torch.equal(out, expected)
                done += 1
        return done

    def describe() -> int:
        done = 0
        while time.monotonic() < ends:
            assert explain(model).stages == described
            done += 1
        return done

    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(work) for work in (infer, infer, describe, describe)]
    assert all(run.result() > 0 for run in runs)


def test_a_dem_of_another_kind_has_no_rows_of_its_own() -> None:
    class Other(nn.Module):
        """Called as a DEM is."""

    rows = rows_of(explain(DualViewEncoder(Patches(), Other(), tile=TILE, grid=(2, 3)), tokens=TOKENS))
    assert list(rows) == ["canvas", "local tiles", "stride tiles", "low resolution", "encoder", "total"]


def test_refuses_what_it_cannot_explain() -> None:
    with refuses("grid=(rows, cols)"):
        explain(DualPerspectiveEnhance.paper(DIM))
    with refuses("grid=(rows, cols)"):
        explain(DualViewEncoder(Patches(), None))
    with refuses("module=Linear(", "DualViewEncoder", "plan(grid, tokens)", error=TypeError):
        explain(nn.Linear(2, 2), grid=(2, 3))
    fixed = DualViewEncoder(Patches(), None, grid=(2, 3))
    with refuses("grid=3x2", "fixed grid of 2x3", "omit"):
        explain(fixed, grid=(3, 2))
    assert explain(fixed, grid=(2, 3)) == explain(fixed)


def test_every_option_shows() -> None:
    def text(**options: object) -> str:
        return str(explain(DualPerspectiveEnhance(DIM, **options), grid=(2, 3)))

    plain = {"num_heads": 1}
    changes = {
        "num_heads": 2, "pairing": "released", "share_weights": False, "bias": True, "out_proj": True, "residual": True,
        "norm": True, "fusion": "addition", "readout": "centre", "enhance": "local", "source": "sum", "gate": True,
    }  # fmt: skip
    texts = [text(**plain), *(text(**plain | {name: value}) for name, value in changes.items())]
    assert len(set(texts)) == len(texts)

    def encoder(**options: object) -> str:
        model = DualViewEncoder(Patches(), DirectReadout(), **{"tile": TILE, "grid": (2, 3), **options})
        return str(explain(model, tokens=TOKENS))

    others: list[dict[str, object]] = [
        {"low_res": "add"}, {"low_res": None}, {"resize": True}, {"low_pass": True}, {"max_tiles_per_pass": 4},
        {"grid": (3, 2)}, {"tile": (8, 9)},
    ]  # fmt: skip
    texts = [encoder(), *(encoder(**change) for change in others)]
    assert len(set(texts)) == len(texts)
