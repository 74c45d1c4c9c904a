"""Configuration of INF-LLaVA."""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from dualview.arguments import check_mapping
from dualview.geometry import TileGrid
from dualview.models.inf_llava.input_checks import check_fields, named_errors
from dualview.models.parts import low_res_of
from dualview.ops.direct_readout import DirectReadout
from dualview.ops.enhance import DualPerspectiveEnhance
from dualview.tensors import check_factory

LLAMA_3_8B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128320,  # 128256, the padding and the image token, filled up to a multiple of 64
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "bos_token_id": 128000,
    "eos_token_id": 128009,
    "pad_token_id": 128256,
}
CLIP_VIT_L_14_336: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
DEM_PRESETS = ("released", "paper", "direct", "none")
VISION_FIELDS = ("hidden_size", "image_size", "patch_size")
TEXT_FIELDS = ("hidden_size", "vocab_size")
Layers: TypeAlias = int | list[int]
"""Indices into a tower's hidden states: of one, or of several whose channels are joined."""


def listed(layers: Layers) -> Sequence[int]:
    """A list of layers, also where there is one."""
    return [layers] if isinstance(layers, int) else layers


@named_errors
@strict
class InfLlavaConfig(PreTrainedConfig):
    """What an INF-LLaVA is made of; the default is the released model: CLIP ViT-L/14-336, DEM, MLP, Llama-3-8B.

    Args:
        vision_config: Configuration (or dict with ``model_type``) of a CLIP or SigLIP vision tower.
        text_config: Configuration (or dict with ``model_type``) of any causal language model.
        grid: Rows and columns of tiles; an image of another size is resized to it inside the model.
        image_token_id: Token that stands for one image token in ``input_ids``; below the vocabulary's size.
        image_seq_length: Image tokens per image; must be the token count of one tile. None: worked out.
        dem: ``{"preset": "released" | "paper"}`` and any argument of `DualPerspectiveEnhance` in place of the preset's;
            ``{"preset": "direct"}`` and the arguments of `DirectReadout`; or ``{"preset": "none"}`` for the vision
            tower alone. None: released. With ``gate=True`` the model starts as the tower alone.
        low_res: How the low-resolution view is mixed in: "mean", "add" or None (not at all). "auto" is "mean" with the
            released DEM and "add" with the paper's; the configuration then holds what it is.
        vision_feature_layer: Index into the vision tower's hidden states. No layer after it is run. A list of indices
            joins the channels of several; the enhancement module and the projector are then as much wider.
        vision_feature_select_strategy: Only "default": prefix tokens are dropped, for the DEM needs a token map.
        projector_hidden_act: Activation between the two linear layers of the projector.
        tie_word_embeddings: Whether the language model's head shares the input embeddings. None: as ``text_config``
            says.

    Raises:
        ValueError: Fields do not fit each other; the message says which, and what to write instead.

    Example:
        >>> config = InfLlavaConfig()
        >>> config.grid, config.image_seq_length, config.vision_config.hidden_size
        ((3, 3), 576, 1024)
    """

    model_type = "inf_llava"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012 - transformers' own form
    base_model_fsdp_plan = {  # noqa: RUF012
        "vision_tower.encoder.layers.*": "free_full_weight",
        "dem": "free_full_weight",
        "multi_modal_projector": "free_full_weight",
    }

    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    text_config: dict[str, Any] | PreTrainedConfig | None = None
    grid: list[int] | tuple[int, ...] = (3, 3)
    image_token_id: int = 128257
    image_seq_length: int | None = None
    dem: dict[str, Any] | None = None
    low_res: Literal["auto", "mean", "add"] | None = "auto"
    vision_feature_layer: int | list[int] = -2
    vision_feature_select_strategy: str = "default"
    projector_hidden_act: str = "gelu"
    tie_word_embeddings: bool | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As for every configuration; that of another model is refused, not taken for the default.

        Raises:
            ValueError: ``model_type`` is another one.
        """
        cls.check_model_type(config_dict)
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def check_model_type(cls, config_dict: dict[str, Any]) -> None:
        """Raise a ValueError if the fields of a configuration are another model's."""
        kind = check_mapping(config_dict, "config_dict").get("model_type", cls.model_type)
        if kind != cls.model_type:
            remedy = "load it with the class of its own model"
            if kind == "llava_llama":
                remedy = (
                    "a released INF-LLaVA is converted first: run `dualview convert SRC DST`, or call "
                    "dualview.models.convert_inf_llava(source, target), and load the new directory"
                )
            raise ValueError(
                f"config_dict: a configuration of model_type={kind!r} is none of {cls.model_type!r}: {remedy}."
            )

    def __post_init__(self, **kwargs: Any) -> None:
        self.vision_config = _sub_config("vision_config", self.vision_config, CLIP_VIT_L_14_336, VISION_FIELDS)
        self.text_config = _sub_config("text_config", self.text_config, LLAMA_3_8B, TEXT_FIELDS)
        check_fields(self)
        if not 0 <= self.image_token_id < self.text_config.vocab_size:
            raise ValueError(
                f"image_token_id={self.image_token_id} is no token of text_config, which has a vocab_size of "
                f"{self.text_config.vocab_size}: give the id that the tokenizer has for the image token, and a "
                "vocab_size that holds it."
            )
        self.dem = {"preset": "released"} if self.dem is None else self.dem
        self.grid = tuple(TileGrid.of(self.grid))
        tokens = (self.vision_config.image_size // self.vision_config.patch_size) ** 2
        self.image_seq_length = tokens if self.image_seq_length is None else self.image_seq_length
        if self.image_seq_length != tokens:
            raise ValueError(
                f"image_seq_length={self.image_seq_length}, but a tile of {self.vision_config.image_size} pixels with "
                f"patches of {self.vision_config.patch_size} has {tokens} tokens, and the model keeps one tile's "
                "count. Omit it."
            )
        if self.vision_feature_select_strategy != "default":
            raise ValueError(
                f"vision_feature_select_strategy={self.vision_feature_select_strategy!r}: prefix tokens have no place "
                'on the grid of tiles, so only "default" (drop them) is possible.'
            )
        if not listed(self.vision_feature_layer):
            raise ValueError("vision_feature_layer=[]: name at least one layer, as -2.")
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        dem = self.build_dem(device="meta")  # a wrong option fails here, not when the weights are loaded
        self.low_res = low_res_of(dem) if self.low_res == "auto" else self.low_res
        super().__post_init__(**kwargs)

    @property
    def tile(self) -> tuple[int, int]:
        """Tile size (h, w) in pixels: the vision tower's input size."""
        size: int = self.vision_config.image_size
        return size, size

    @property
    def vision_width(self) -> int:
        """Width of the image tokens before the projector: that of the tower, as often as layers are read."""
        width: int = self.vision_config.hidden_size
        return width * len(listed(self.vision_feature_layer))

    def build_dem(
        self, kind: type[DualPerspectiveEnhance] = DualPerspectiveEnhance, *, device: torch.device | str | None = None
    ) -> nn.Module | None:
        """The module that ``dem`` describes, for the vision tower's width.

        Args:
            kind: Class of the enhancement module.
            device: Where its weights are.

        Raises:
            ValueError: The preset or an option is unknown, or the readout would not give one tile's token count.
        """
        check_factory(device, None)
        options = dict(self.dem or {})
        preset = options.pop("preset", None)
        if preset not in DEM_PRESETS or options.get("readout") == "none":
            raise ValueError(
                f"dem={self.dem}: needs a preset of {DEM_PRESETS}, and a readout that gives the token count of one "
                'tile (not "none").'
            )
        try:
            if preset == "none":
                if options:
                    raise TypeError(f"the preset 'none' has no options, got {sorted(options)}")
                return None
            if preset == "direct":
                return DirectReadout(**options)
            build = kind.released if preset == "released" else kind.paper
            return build(self.vision_width, device=device, **options)
        except TypeError as error:
            raise ValueError(f"dem={self.dem}: {error}. Options are the arguments of the preset's module.") from error


def _sub_config(
    name: str, config: dict[str, Any] | PreTrainedConfig | None, default: dict[str, Any], fields: tuple[str, ...]
) -> Any:
    """A configuration object from a dict (of the default's model type unless it names one), or the default itself."""
    if not isinstance(config, PreTrainedConfig):
        values = {"model_type": default["model_type"], **config} if config is not None else dict(default)
        model_type = values.pop("model_type")
        if model_type not in CONFIG_MAPPING:
            raise ValueError(
                f"{name} has model_type={model_type!r}, which this version of transformers does not know: give the "
                f"model_type of a configuration of transformers, as {default['model_type']!r}."
            )
        config = CONFIG_MAPPING[model_type](**values)
    wrong = {field: value for field in fields if not isinstance(value := getattr(config, field, None), int)}
    if wrong:
        raise ValueError(
            f"{name} of model_type={config.model_type!r} has {wrong}, where integers are needed: give the "
            f"configuration of a single tower or language model, as {default['model_type']!r}."
        )
    return config
