"""The enhancement module as a layer of transformers."""

from typing import Any

from transformers.modeling_layers import GradientCheckpointingLayer

from dualview.geometry import LiveTiles, TileGrid
from dualview.ops.enhance import DualPerspectiveEnhance


class InfLlavaEnhance(GradientCheckpointingLayer, DualPerspectiveEnhance):
    """A [`DualPerspectiveEnhance`][dualview.DualPerspectiveEnhance] that gradient checkpointing takes for a layer.

    After ``model.gradient_checkpointing_enable()`` its maps are not kept for the backward pass, but computed again.
    Grids and tile indices reach `forward` as plain tuples: transformers' exporters look into what a part is called
    with, and can follow these alone.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*map(_plain, args), **{name: _plain(value) for name, value in kwargs.items()})


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (TileGrid, LiveTiles)) else value
