"""Configuration of the small vision tower."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class ReaderVisionConfig(PreTrainedConfig):
    """What the small vision tower is made of; the default has 1.3 million parameters.

    Args:
        hidden_size: Width of the tokens, a multiple of 8 and of ``num_attention_heads``.
        intermediate_size: Width inside the MLPs.
        num_hidden_layers: Attention layers.
        num_conv_blocks: Convolutional blocks on the token map, before the attention layers.
        num_attention_heads: Heads of each attention layer.
        num_channels: Channels of a picture.
        image_size: Tile size that a model built around the tower uses. The tower itself takes any.
        patch_size: Pixels a side that one token stands for; only 14.
        stem_widths: Channels of the three convolutions before the patches are cut.
        hidden_act: Activation inside the MLPs.
        layer_norm_eps: Epsilon of the LayerNorms.
        attention_dropout: Dropout of attention weights.
        initializer_range: Standard deviation of the weights at the start.
        initializer_factor: Scale of the attention layers' weights at the start.

    Raises:
        ValueError: ``patch_size`` is not 14, or the widths do not fit each other.

    Example:
        >>> config = ReaderVisionConfig()
        >>> config.hidden_size, config.patch_size
        (160, 14)
    """

    model_type = "dualview_reader"
    base_config_key = "vision_config"

    hidden_size: int = 160
    intermediate_size: int = 480
    num_hidden_layers: int = 2
    num_conv_blocks: int = 2
    num_attention_heads: int = 4
    num_channels: int = 3
    image_size: int = 112
    patch_size: int = 14
    stem_widths: list[int] | tuple[int, ...] = (24, 32, 32)
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02
    initializer_factor: float = 1.0

    def validate_architecture(self) -> None:
        """Raise a ValueError where no tower can be built of these fields."""
        if self.patch_size != 14:
            raise ValueError(
                f"patch_size={self.patch_size}: must be 14, for the stem halves the picture and then cuts patches by a "
                "convolution of stride 7."
            )
        if self.hidden_size % self.num_attention_heads or self.hidden_size % 8:
            raise ValueError(
                f"hidden_size={self.hidden_size}: must be a multiple of 8 and of "
                f"num_attention_heads={self.num_attention_heads}."
            )
        if len(self.stem_widths) != 3:
            raise ValueError(f"stem_widths={self.stem_widths}: must be three numbers of channels.")
