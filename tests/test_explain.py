"""The table says what is computed: its numbers are compared with those of a real call."""

import pytest
import torch
from torch import Tensor, nn

from dualview import DirectReadout, DualPerspectiveEnhance, DualViewEncoder, Explanation, explain
from tests.checks import refuses

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


def rows_of(explanation: Explanation) -> dict[str, tuple[str, str, str]]:
    rows = {stage.name: (stage.what, stage.count, stage.shape) for stage in explanation.stages}
    assert len(rows) == len(explanation.stages)
    return rows


def written(shape: tuple[int, ...]) -> str:
    return " x ".join(str(side) for side in shape)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("low_res", ["mean", "add", None])
@pytest.mark.parametrize(
    "dem", [DualPerspectiveEnhance.paper(DIM), DirectReadout("local"), None], ids=["paper", "direct", "none"]
)
def test_encoder_rows_are_what_is_encoded(grid: tuple[int, int], low_res: str | None, dem: nn.Module | None) -> None:
    model = DualViewEncoder(Patches(), dem, tile=TILE, low_res=low_res, max_tiles_per_pass=1000)
    rows = rows_of(explain(model, grid=grid, tokens=TOKENS))
    out = model(torch.randn(1, 3, grid[0] * TILE[0], grid[1] * TILE[1]))
    ((given, encoded),) = model.encoder.shapes

    what, count, shape = rows["encoder"]
    assert (what, count, shape) == ("Patches", f"{given[0]} sub-images", written(encoded[:3]))
    views = [name for name in ("local crop", "stride crop", "low resolution") if name in rows]
    assert sum(int(rows[name][1].split()[0]) for name in views) == given[0]
    for name in views:
        assert rows[name][2] == written((int(rows[name][1].split()[0]), *given[1:]))
    n = grid[0] * grid[1]
    high = dem is not None and n > 1
    assert [name in rows for name in ("local crop", "stride crop")] == [high, high]
    if high:
        assert rows["local crop"] == ("contiguous blocks", f"{n} sub-images", f"{n} x 3 x 4 x 9")
        assert rows["stride crop"] == ("interleaved strides", f"{n} sub-images", f"{n} x 3 x 4 x 9")
    if "low resolution" in rows:
        assert rows["low resolution"] == ("image reduced to 4 x 9", "1 sub-image", "1 x 3 x 4 x 9")

    assert ("mix" in rows) == (dem is not None and low_res is not None)
    if "mix" in rows:
        tokens = out.shape[1] * out.shape[2]
        assert rows["mix"] == (f"{low_res} with the low-resolution view", f"{tokens} tokens", written(out.shape[1:3]))
    assert ("readout" in rows) == (dem is not None)
    order = ["local crop", "stride crop", "low resolution", "encoder", "V_loc", "V_glo"]
    order += ["fusion", "recombine", "readout", "mix"]
    assert list(rows) == [name for name in order if name in rows]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize("enhance", ["both", "local", "global"])
@pytest.mark.parametrize("readout", ["average", "none"])
def test_dem_rows_are_what_is_attended(grid: tuple[int, int], preset: str, enhance: str, readout: str) -> None:
    dem = getattr(DualPerspectiveEnhance, preset)(DIM, enhance=enhance, readout=readout, num_heads=4)
    rows = rows_of(explain(dem, grid=grid, tokens=TOKENS))
    attended: list[tuple[Tensor, Tensor]] = []
    dem.attentions[0].register_forward_hook(lambda _, given, __: attended.append((given[0], given[1])))
    tiles = torch.randn(2, 1, grid[0] * grid[1], *TOKENS, DIM)
    out = dem(*tiles, grid)

    directions = {"both": ["V_loc", "V_glo"], "local": ["V_loc"], "global": ["V_glo"]}[enhance]
    assert list(rows) == [*directions, "fusion", "readout"]
    maps = dem.enhanced_maps(*tiles, grid)
    for name, full, (query, key) in zip(
        directions, [m for m in maps if m is not None], attended[: len(directions)], strict=True
    ):
        _, count, queries, _ = query.shape
        asking = {"V_loc": "local", "V_glo": "global"}[name]
        cut = {"paper": {"local": "blocks", "global": "strides"}, "released": {"local": "strides", "global": "blocks"}}
        assert rows[name] == (
            f"heads 4, {asking} queries, both maps cut by {cut[preset][asking]}",
            f"{count} x {queries} queries x {key.shape[2]} keys",
            written(full.shape[1:]),
        )
    fused = maps.local if maps.local is not None else maps.stride
    fusion = {"both": {"paper": "LinearConcatFusion", "released": "BottleneckConcatFusion"}[preset]}
    assert rows["fusion"] == (
        fusion.get(enhance, "Linear"),
        f"{fused.shape[1] * fused.shape[2]} tokens",
        written(fused.shape[1:]),
    )
    assert rows["readout"] == (readout, f"{out.shape[1] * out.shape[2]} tokens", written(out.shape[1:3]))


@pytest.mark.parametrize("readout", ["bilinear", "none"])
def test_direct_readout(readout: str) -> None:
    direct = DirectReadout("sum", readout)
    rows = rows_of(explain(direct, grid=(2, 3), tokens=TOKENS))
    out = direct(torch.zeros(1, 6, *TOKENS, DIM), torch.zeros(1, 6, *TOKENS, DIM), (2, 3))
    assert rows == {
        "recombine": ("sum features, no enhancement", "36 tokens", "4 x 9"),
        "readout": (readout, f"{out.shape[1] * out.shape[2]} tokens", written(out.shape[1:3])),
    }


def test_released_encoder_at_1008_pixels() -> None:
    """The 19 sub-images, 5184 tokens and 576 output tokens of the released model, with the default token map."""
    encoder = DualViewEncoder(Patches(), DualPerspectiveEnhance.released(1024), grid=(3, 3))
    text = str(explain(encoder))
    for line in (
        ("encoder", "Patches", "19 sub-images", "19 x 24 x 24"),
        ("V_glo", "heads 8, global queries, both maps cut by blocks", "9 x 576 queries x 576 keys", "72 x 72 x 1024"),
        ("fusion", "BottleneckConcatFusion", "5184 tokens", "72 x 72 x 1024"),
        ("readout", "bilinear", "576 tokens", "24 x 24"),
    ):
        assert any(all(cell in row for cell in line) for row in text.splitlines()), line


def test_table_is_aligned() -> None:
    lines = str(explain(DualPerspectiveEnhance.paper(DIM), grid=(2, 3))).splitlines()
    assert lines[0].split() == ["stage", "what", "count", "shape", "per", "image"]
    assert set(lines[1]) == {"-", " "}
    assert len(lines) == 2 + 4
    for title in ("what", "count", "shape"):
        column = lines[0].index(title)
        assert all(line[column - 1] == " " and line[column] != " " for line in lines)
    assert all(line == line.rstrip() for line in lines)


def test_a_dem_of_another_kind_has_no_rows_of_its_own() -> None:
    class Other(nn.Module):
        """Called as a DEM is."""

    rows = rows_of(explain(DualViewEncoder(Patches(), Other(), tile=TILE, grid=(2, 3)), tokens=TOKENS))
    assert list(rows) == ["local crop", "stride crop", "low resolution", "encoder", "mix"]


def test_refuses_what_it_cannot_explain() -> None:
    with refuses("grid=(rows, cols)"):
        explain(DualPerspectiveEnhance.paper(DIM))
    with refuses("grid=(rows, cols)"):
        explain(DualViewEncoder(Patches(), None))
    with refuses("got Linear", "DualViewEncoder", error=TypeError):
        explain(nn.Linear(2, 2), grid=(2, 3))
    fixed = DualViewEncoder(Patches(), None, grid=(2, 3))
    with refuses("grid=3x2", "fixed grid of 2x3", "omit"):
        explain(fixed, grid=(3, 2))
    assert explain(fixed, grid=(2, 3)) == explain(fixed)
