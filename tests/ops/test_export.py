"""`torch.export` with a dynamic batch, for every option of the module and every way to arrange its products."""

import warnings
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import dualview as dv
from dualview.kernels.chunked_attention import SCORES_AT_ONCE
from tests.checks import assert_exports
from tests.ops.planned.rates import machine
from tests.strategies import ALL

OPTIONS: list[dict[str, Any]] = [
    {},
    {"norm": True},
    {"residual": True, "out_proj": True, "bias": True},
    {"num_heads": 2},
    {"share_weights": False},
    {"gate": True},
    *({"fusion": fusion} for fusion in ("addition", "weighted_addition", "multiplication", "max_pool", "conv3x3")),
    *({"readout": readout} for readout in ("average", "bilinear", "centre", "none")),
    *({"enhance": enhance} for enhance in ("global", "local")),
    *({"source": source} for source in ("local", "global", "sum")),
]

PRESETS = ["paper", "released"]
WITH_PRESETS = [
    (preset, options) for n, options in enumerate(OPTIONS) for preset in (PRESETS if ALL else [PRESETS[n % 2]])
]


class OnAGrid(nn.Module):
    """A module with its grid and, if it is to be masked, a mask."""

    def __init__(self, dem: nn.Module, grid: tuple[int, int], *, masked: bool) -> None:
        super().__init__()
        self.dem, self.grid, self.masked = dem, grid, masked

    def forward(self, local_tiles: Tensor, stride_tiles: Tensor) -> Tensor:
        size = self.grid[0] * local_tiles.shape[2], self.grid[1] * local_tiles.shape[3]
        mask = torch.ones(size, dtype=torch.bool) if self.masked else None
        return self.dem(local_tiles, stride_tiles, self.grid, mask)


def exports(dem: nn.Module, grid: tuple[int, int], tokens: tuple[int, int], *, masked: bool = False) -> None:
    def inputs(batch: int) -> tuple[Tensor, Tensor]:
        local, stride = torch.randn(2, batch, grid[0] * grid[1], *tokens, 16)
        return local, stride

    assert_exports(OnAGrid(dem, grid, masked=masked), inputs)


@pytest.mark.more
@pytest.mark.parametrize("preset, options", WITH_PRESETS, ids=str)
def test_every_option(preset: str, options: dict[str, Any]) -> None:
    dem = getattr(dv.DualPerspectiveEnhance, preset)(16, **options)
    exports(dem, (2, 3), (4, 6), masked=preset == "released")


@pytest.mark.more
@pytest.mark.parametrize("masked", [True, False][: 1 + ALL])
@pytest.mark.parametrize("fastest", ["attention is free", "projections are free", "never measured"])
@pytest.mark.parametrize("preset", ["paper", "released"])
def test_every_arrangement(preset: str, fastest: str, masked: bool) -> None:
    with machine(fastest):
        exports(getattr(dv.DualPerspectiveEnhance, preset)(16), (3, 3), (5, 6), masked=masked)


@pytest.mark.more
@pytest.mark.parametrize("preset", ["paper", "released"])
def test_both_directions_together(preset: str) -> None:
    dem, fastest = getattr(dv.DualPerspectiveEnhance, preset)(16), {"paper": "operations count, then launches"}
    with torch.no_grad(), machine(fastest.get(preset, "launches count")):
        assert dem.products((3, 3), (6, 6), torch.empty(0)).together
        exports(dem, (3, 3), (6, 6))


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_the_equations(preset: str) -> None:
    with dv.full_computation():
        exports(getattr(dv.DualPerspectiveEnhance, preset)(16), (2, 3), (4, 6))


@pytest.mark.parametrize("source", ["sum", "local", "global"][: 3 if ALL else 1])
def test_a_readout_alone(source: str) -> None:
    exports(dv.DirectReadout(source), (2, 3), (4, 6))


@pytest.mark.more
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("preset", ["paper", "released"])
def test_a_strict_exporter_has_nothing_to_warn_of(preset: str, recorded: bool) -> None:
    """No side effects; without gradients the tiles are taken one at a time."""
    dem, inputs = getattr(dv.DualPerspectiveEnhance, preset)(16), tuple(torch.randn(2, 1, 9, 6, 6, 16))
    with torch.set_grad_enabled(recorded), patch.dict(SCORES_AT_ONCE, cpu=1), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        program = torch.export.export(OnAGrid(dem, (3, 3), masked=False), inputs, strict=True)
    torch.testing.assert_close(program.module()(*inputs), dem(*inputs, (3, 3)))
