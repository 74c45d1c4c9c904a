"""Several layers of a vision tower at once, as an encoder."""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from dualview.geometry import Size
from dualview.models.hf_tower import HfTower
from dualview.ops.planned.live import LayerPlan


class TowerLayers(NamedTuple):
    """The channels of several hidden states of a vision tower, one after the other.

    Attributes:
        model: The tower; `check_tower` has passed it.
        layers: Indices into its hidden states.
    """

    model: nn.Module
    layers: tuple[int, ...]

    def layer_plan(self) -> LayerPlan:
        """All layers are run: the tower is called whole."""
        return HfTower(self.model, None).layer_plan()

    def token_map(self, tile: Size) -> Size:
        """Tokens (h', w') of a tile of (h, w) pixels."""
        return HfTower(self.model, None).token_map(tile)

    def __call__(self, pixels: Tensor) -> Tensor:
        """``hidden_states`` of the layers as one token map, (T, 3, h, w) -> (T, h', w', layers * D)."""
        states = cast(Any, self.model)(pixels, output_hidden_states=True).hidden_states
        if states is None:  # a sharded tower collects nothing
            return torch.cat([HfTower(self.model, layer)(pixels) for layer in self.layers], dim=-1)
        h, w = self.token_map((pixels.shape[-2], pixels.shape[-1]))
        tokens = torch.cat([states[layer] for layer in self.layers], dim=-1)
        return cast(Tensor, tokens[:, tokens.shape[1] - h * w :].unflatten(1, (h, w)))
