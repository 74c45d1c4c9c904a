"""The parts of a dual-view encoder: what a dem and an encoder may declare, and the options of the whole.

A user's own dem or encoder takes part in the plan by declaring what is asked here; its class does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol, TypeAlias

from torch import Tensor, nn

from dualview.dual_tiles import DualPerspectiveTileBatch, DualPerspectiveTiles
from dualview.geometry import LiveTiles, Size, TileGrid
from dualview.ops.planned.live import LayerPlan
from dualview.ops.tile_batch import TileBatch

Encoder: TypeAlias = Callable[[Tensor], Tensor]
Pixels: TypeAlias = Tensor | Sequence[Tensor] | TileBatch | DualPerspectiveTiles | DualPerspectiveTileBatch
LowRes: TypeAlias = Literal["mean", "add"] | None


class NamesTiles(Protocol):
    """A plan of a dem.

    Attributes:
        live: The tiles that are needed, by index, in order: of the local and of the global perspective.
    """

    @property
    def live(self) -> tuple[Sequence[int], Sequence[int]]: ...


class DeclaresTiles(Protocol):
    """A dem that needs few of the tiles says so by a `plan`, and is called with the tiles that it named.

    It may also declare ``low_res``, "mean" or "add": how ``low_res="auto"`` mixes its result with the low-resolution
    view ("mean" if it does not). A dem with a tensor ``gate`` multiplies its result by it. Unless the mix is "add" it
    is called with a mask (or None) and the features of that view as fourth and fifth argument, and subtracts the
    features before the gate.
    """

    def plan(self, grid: TileGrid, tokens: Size, /) -> NamesTiles:
        """What is needed for a grid and a token map (h, w) of one tile. Which tiles may not depend on ``tokens``."""

    def __call__(
        self,
        local_tiles: Tensor,
        stride_tiles: Tensor,
        grid: TileGrid,
        /,
        *,
        live: LiveTiles,
        key_mask: tuple[Tensor, Tensor] = ...,
    ) -> Tensor:
        """Tokens (B, h, w, D) from the tiles that ``live`` names, all tiles within `full_computation`.

        ``key_mask`` is given where pixels are padding: True for tokens that see a real pixel, of either map.
        """


class DeclaresLayers(Protocol):
    """An encoder that leaves layers out says which it runs."""

    def layer_plan(self) -> LayerPlan | None:
        """The layers that are run; None if that is not known."""


class DeclaresTokens(Protocol):
    """An encoder that knows how many tokens a tile gives before it is encoded."""

    def token_map(self, tile: Size, /) -> Size:
        """Tokens (h', w') of a tile of (h, w) pixels."""


class ViewOptions(NamedTuple):
    """How an image becomes sub-images and their features one map; `DualViewEncoder` documents the values.

    Attributes:
        tile: Input size (h, w) of the encoder in pixels.
        grid: Rows and columns of tiles; None where the size of an image says them.
        low_res: How the low-resolution view is mixed in.
        resize: Whether images are interpolated to the canvas of the grid.
        low_pass: Whether the image is smoothed before the stride crop.
        max_tiles_per_pass: Most sub-images in one call of the encoder; None for what suits the device.
    """

    tile: Size
    grid: TileGrid | None = None
    low_res: LowRes = "mean"
    resize: bool = False
    low_pass: bool = False
    max_tiles_per_pass: int | None = None


class DualView(NamedTuple):
    """The parts of a model as they are at the moment of a call.

    Attributes:
        encoder: Any callable (T, 3, h, w) -> (T, h', w', D).
        dem: A module called with tiles of both perspectives, or None.
        options: Tile size, grid, mix and passes.
    """

    encoder: Encoder
    dem: nn.Module | None
    options: ViewOptions


def all_tiles(grid: TileGrid) -> LiveTiles:
    """Every tile of both perspectives."""
    everything = tuple(range(grid.num_tiles))
    return LiveTiles(everything, everything)


def low_res_of(dem: nn.Module | None) -> LowRes:
    """What ``low_res="auto"`` is with a dem: what it declares, "mean" where it declares nothing."""
    return getattr(dem, "low_res", "mean")
