"""The small vision tower: a convolutional stem, convolutional blocks, and attention layers as in CLIP."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPEncoder, CLIPPreTrainedModel
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from dualview.models.reader.configuration_reader import ReaderVisionConfig


class FrozenBatchNorm(nn.BatchNorm2d):
    """A batch norm that uses its stored statistics, also in training, unless `learning` is set.

    So a tower in training mode makes of a tile what it makes of it alone.
    """

    learning = False

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.learning,
            self.momentum or 0.0,
            self.eps,
        )


class ReaderConvBlock(nn.Module):
    """Depthwise 3 x 3 convolution, LayerNorm, MLP, residual, on a map (T, h, w, D)."""

    def __init__(self, config: ReaderVisionConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.depthwise(x.movedim(-1, 1)).movedim(1, -1)
        return x + cast(Tensor, self.fc2(self.act(self.fc1(self.norm(mixed)))))


class ReaderVisionEmbeddings(nn.Module):
    """Stem, positions and convolutional blocks: tiles (T, 3, h, w) to tokens (T, h/14 * w/14, D)."""

    def __init__(self, config: ReaderVisionConfig) -> None:
        super().__init__()
        a, b, c = config.stem_widths
        stem: list[nn.Module] = []
        for before, after, stride in ((config.num_channels, a, 2), (a, b, 1), (b, c, 1)):
            stem += [nn.Conv2d(before, after, 3, stride, 1, bias=False), FrozenBatchNorm(after), nn.ReLU()]
        self.stem = nn.Sequential(*stem)
        self.patches = nn.Conv2d(c, config.hidden_size, 9, stride=7, padding=1)
        self.positions = nn.Linear(4 * len(HALF_WAVES), config.hidden_size, bias=False)
        self.blocks = nn.Sequential(*(ReaderConvBlock(config) for _ in range(config.num_conv_blocks)))

    def forward(self, pixel_values: Tensor) -> Tensor:
        tokens = self.patches(self.stem(pixel_values)).movedim(1, -1)
        places = waves(tokens.shape[1], tokens.shape[2], tokens)
        placed: Tensor = self.blocks(tokens + self.positions(places))
        return placed.flatten(1, 2)


HALF_WAVES = (1, 2, 4, 8, 6, 12, 24)
"""Of a place in a tile. The last three are waves of a local tile, for tokens of a stride tile, which spans the page."""


def waves(rows: int, cols: int, like: Tensor) -> Tensor:
    """Where each token lies in its tile, (rows, cols, 28): sines and cosines of the place as a fraction of the tile.

    A place has one code whatever the tile's size, so a tower works with tiles larger than those of its training.
    """
    halves = math.pi * torch.tensor(HALF_WAVES, device=like.device)
    axes = []
    for count in (rows, cols):
        place = (torch.arange(count, device=like.device) + 0.5) / count
        angles = place[:, None] * halves
        axes.append(torch.cat([angles.sin(), angles.cos()], dim=-1))
    of_rows, of_cols = axes[0][:, None].expand(-1, cols, -1), axes[1][None].expand(rows, -1, -1)
    return torch.cat([of_rows, of_cols], dim=-1).to(like.dtype)


class ReaderVisionModel(CLIPPreTrainedModel):
    """The small vision tower: tiles of any size that is a multiple of 14 pixels.

    Its batch norms use stored statistics, in training mode, too: what is made of a tile never depends on others.

    Args:
        config: The configuration.

    Example:
        >>> tower = ReaderVisionModel(ReaderVisionConfig())
        >>> tower(torch.rand(2, 3, 56, 84)).last_hidden_state.shape
        torch.Size([2, 24, 160])
    """

    config: ReaderVisionConfig
    config_class = ReaderVisionConfig
    base_model_prefix = "vision_tower"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["CLIPEncoderLayer", "ReaderVisionEmbeddings"]  # noqa: RUF012 - transformers' own form

    def __init__(self, config: ReaderVisionConfig) -> None:
        super().__init__(config)
        self.embeddings = ReaderVisionEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @classmethod
    def is_custom_code(cls) -> bool:
        """Weights are drawn by the rules of every part, as in models of transformers."""
        return False

    def get_input_embeddings(self) -> nn.Module:
        """The convolution that cuts patches."""
        return self.embeddings.patches

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Encode tiles.

        Args:
            pixel_values: Normalised tiles.
            **kwargs: ``output_hidden_states``, ``output_attentions``, ``return_dict``.

        Shape:
            - pixel_values: (T, 3, h, w), h and w multiples of 14
            - last_hidden_state: (T, h/14 * w/14, D)
            - pooler_output: (T, D), the mean over the tokens

        Raises:
            ValueError: A side of the tiles is no multiple of 14.
        """
        height, width = pixel_values.shape[-2:]
        if height % self.config.patch_size or width % self.config.patch_size or 0 in (height, width):
            raise ValueError(
                f"pixel_values: tiles of {height} x {width} pixels (height x width) are no whole number of patches of "
                f"{self.config.patch_size}: use sides that are multiples of it."
            )
        states = self.encoder(inputs_embeds=self.embeddings(pixel_values), **kwargs).last_hidden_state
        tokens = self.post_layernorm(states)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=tokens.mean(1))
