"""INF-LLaVA: a vision tower seen from two perspectives, a projector, and a causal language model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from dualview.arguments import check_instance
from dualview.geometry import GridLike, LiveTiles, TileGrid
from dualview.models.encode_views import encode_dual_view, encode_views
from dualview.models.hf_tower import HfTower, check_tower
from dualview.models.inf_llava.configuration_inf_llava import InfLlavaConfig, Layers, listed
from dualview.models.inf_llava.input_checks import (
    CACHE,
    check_alone,
    check_encoded,
    check_features,
    check_language_model,
    check_pictures,
    check_places,
    check_tokens,
)
from dualview.models.inf_llava.language_head import build_head, finish_logits
from dualview.models.inf_llava.shards import INDEX, entries_of
from dualview.models.inf_llava.tower_layers import TowerLayers
from dualview.models.parts import DualView, Encoder, LowRes, ViewOptions
from dualview.models.view_plan import interpolate
from dualview.ops.enhance import DualPerspectiveEnhance
from dualview.ops.tiling import recombine

RELEASED_STARTS = ("model.layers.", "model.mm_projector.", "model.spatial_embed.", "model.vision_tower.vision_tower.")
"""How names of tensors start in a released checkpoint, and not here."""


@dataclass
class InfLlavaModelOutputWithPast(BaseModelOutputWithPast):
    """Output of the base model.

    Attributes:
        image_hidden_states: Projected image tokens, (num_images, image_seq_length, text hidden size).
    """

    image_hidden_states: Tensor | None = None


@dataclass
class InfLlavaCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Output with logits: loss, logits, the language model's cache, its hidden states and attentions, and the images.

    Attributes:
        image_hidden_states: Projected image tokens, (num_images, image_seq_length, text hidden size).
    """

    image_hidden_states: Tensor | None = None


class InfLlavaMultiModalProjector(nn.Module):
    """mlp2x_gelu: Linear, activation, Linear. (..., vision width) -> (..., text width)"""

    def __init__(self, config: InfLlavaConfig, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(config.vision_width, width)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        projected: Tensor = self.linear_2(self.act(self.linear_1(features)))
        return projected


class InfLlavaEnhance(GradientCheckpointingLayer, DualPerspectiveEnhance):
    """A [`DualPerspectiveEnhance`][dualview.DualPerspectiveEnhance] that gradient checkpointing takes for a layer.

    After ``model.gradient_checkpointing_enable()`` its maps are not kept for the backward pass, but computed again.
    Grids and tile indices reach `forward` as plain tuples: transformers' exporters look into what a part is called
    with, and can follow these alone.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*map(_plain, args), **{name: _plain(value) for name, value in kwargs.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, TileGrid):
        return value.rows, value.cols
    return (value[0], value[1]) if isinstance(value, LiveTiles) else value  # torch.compile (2.11) does not unpack it


class InfLlavaPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of every INF-LLaVA class.

    Images of one size compile to a full graph. With ``image_grids`` the grids are read from a tensor, so the graph
    breaks there.
    """

    config: InfLlavaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["InfLlavaEnhance"]  # noqa: RUF012 - transformers' own form
    _skip_keys_device_placement = [CACHE]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: InfLlavaConfig, *inputs: Any, **kwargs: Any) -> None:
        check_instance(config, "config", InfLlavaConfig, "an InfLlavaConfig; from_pretrained loads a model")
        super().__init__(config, *inputs, **kwargs)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Weights are drawn by the rules of every part, as in models of transformers.

        In classes of others transformers passes over modules without parameters of their own, so that the tower's
        attention and MLP would not be drawn by the tower's own rule.
        """
        return False

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        """As for every model; a released checkpoint is refused until it is converted, not completed by random numbers.

        Raises:
            ValueError: The files are those of a released checkpoint, or of another model.
        """
        if Path(pretrained_model_name_or_path or "", "config.json").is_file():  # also where a configuration is given
            InfLlavaConfig.check_model_type(InfLlavaConfig.get_config_dict(pretrained_model_name_or_path)[0])
        if Path(pretrained_model_name_or_path or "", INDEX).is_file():
            entries_of(Path(pretrained_model_name_or_path))  # transformers does not see that files are exchanged
        wanted = kwargs.pop("output_loading_info", False)
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise ValueError(
                f"{pretrained_model_name_or_path}: a file of weights is damaged or not whole ({error}). Make the "
                "directory again, or download it again."
            ) from error
        if unlike := sorted(name for name in info["unexpected_keys"] if name.startswith(RELEASED_STARTS)):
            raise ValueError(
                f"{pretrained_model_name_or_path} holds {unlike[0]} and {len(unlike) - 1} more tensors of a released "
                "INF-LLaVA, in whose place there would be random ones: run `dualview convert SRC DST`, and load DST."
            )
        return (model, info) if wanted else model

    def _init_weights(self, module: nn.Module) -> None:
        dem: nn.Module | None = getattr(self, "dem", None)
        if dem is None or all(module is not part for part in dem.modules()):
            super()._init_weights(module)
        elif module is dem:  # last of its parts
            _draw_missing(dem)


def _draw_missing(dem: nn.Module) -> None:
    """Draw the parameters of a dem by its own rule, but for those that transformers has loaded and marked."""
    loaded = {p: p.detach().clone() for p in dem.parameters() if getattr(p, "_is_hf_initialized", False)}
    reset = getattr(dem, "reset_parameters", None)
    if reset is None or len(loaded) == len(list(dem.parameters())):
        return
    for parameter in loaded:  # transformers would not draw it, and others may be copies of what is drawn for it
        parameter._is_hf_initialized = False  # type: ignore[attr-defined]
    reset()
    for parameter, value in loaded.items():
        parameter.copy_(value)
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]


class InfLlavaModel(InfLlavaPreTrainedModel):
    """Vision tower, DEM, projector and language model, without the language modelling head.

    Args:
        config: The configuration.

    Attributes:
        tile: Input size (h, w) of the vision tower in pixels.
        max_tiles_per_pass: Most sub-images in one call of the vision tower, as in
            [`DualViewEncoder`][dualview.DualViewEncoder]. May be set at any time; it changes no result.

    Raises:
        ValueError: The vision tower is not of the build that [`HfEncoder`][dualview.HfEncoder] takes, or has no layer
            ``vision_feature_layer``.
    """

    def __init__(self, config: InfLlavaConfig) -> None:
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        for layer in listed(config.vision_feature_layer):
            check_tower(self.vision_tower, layer)
        self.dem = config.build_dem(InfLlavaEnhance)
        self.language_model = AutoModel.from_config(config.text_config)
        check_language_model(self.language_model)
        # The width of the embeddings, which need not be that of the layers.
        width = self.language_model.get_input_embeddings().embedding_dim
        self.multi_modal_projector = InfLlavaMultiModalProjector(config, width)
        self.tile = config.tile
        self.max_tiles_per_pass: int | None = None
        self.post_init()

    @property
    def connector(self) -> nn.Module | None:
        """The DEM, by a name that transformers' exporters look for: between the tower and the projector."""
        return self.dem

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Tensor | None = None,
        image_grids: Tensor | None = None,
        image_sizes: Tensor | None = None,
        vision_feature_layer: Layers | None = None,
        view_features: Tensor | None = None,
        image_canvases: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encode images into the tokens that the language model reads.

        Args:
            pixel_values: Normalised images of one size, which are resized inside to the configured grid of tiles and to
                the low-resolution view; or, with ``image_grids``, the local tiles of images with a grid each.
            image_grids: Rows and columns of each image.
            image_sizes: With ``image_grids``, height and width of the picture on each image's canvas; what lies below
                and to the right of it is padding, to which the DEM does not attend. None: no padding.
            vision_feature_layer: In place of the configured one; a list must have as many layers.
            view_features: What `get_view_features` has made of the same images before, in place of ``pixel_values``.
            image_canvases: With ``view_features``, height and width of each image in pixels.
            **kwargs: With ``output_hidden_states`` or ``output_attentions`` (or set so in ``vision_config``) the tower
                is asked for them once more, for the low-resolution view of each image in ``pixel_values``. Others are
                not used.

        Shape:
            - pixel_values: (num_images, 3, H, W), or (total_tiles, 3, h, w)
            - image_grids, image_sizes, image_canvases: (num_images, 2)
            - view_features: (sub-images of all images, h', w', vision width)
            - last_hidden_state: (num_images, image_seq_length, vision width)
            - pooler_output: a list of num_images tensors (image_seq_length, text width); one tensor where it is
              exported or, with torch 2.11, compiled
            - hidden_states, on request: a tuple of (num_images, prefix and patch tokens, vision width)
            - attentions, on request: a tuple of (num_images, heads, tokens, tokens)

        Raises:
            ValueError: Tiles, grids and sizes do not fit each other, or there is no such layer; or ``view_features``
                come with pictures, or with a request for another layer or for states of the tower.
        """
        valid = None
        if view_features is not None:
            check_alone(pixel_values, vision_feature_layer)
            floats = (p.dtype for p in self.multi_modal_projector.parameters() if p.is_floating_point())
            view_features = view_features.to(next(floats, self.dtype))  # quantised weights are integers
            pixels = _sizes_alone(view_features, image_canvases, uniform=image_grids is None)
        else:
            check_pictures(cast(Tensor, pixel_values), image_grids, image_sizes)
            pixels = self._images_of(cast(Tensor, pixel_values), image_grids)
        if image_sizes is not None:
            valid = _valid_pixels(pixels, image_sizes)
        parts = self.dual_view() if image_grids is None else self._parts(None, resize=False)
        if vision_feature_layer is not None:
            parts = parts._replace(encoder=self._encoder(self._checked(vision_feature_layer)))
        features = encode_dual_view(parts, pixels, valid, view_features).flatten(1, 2)
        asked = self._states_of_low_view(pixels if view_features is None else None, kwargs)
        projected = self.multi_modal_projector(features)
        tokens = projected if torch.compiler.is_exporting() else list(projected)  # a list has a fixed length
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=tokens, **asked)

    @torch.no_grad()
    def get_view_features(self, pixel_values: Tensor, image_grids: Tensor | None = None) -> Tensor:
        """What the vision tower makes of the sub-images that are needed, one image after the other, without gradients.

        Where the tower is not trained, this may be kept and given to `forward` in place of the images.

        Args:
            pixel_values: As for `get_image_features`.
            image_grids: As for `get_image_features`.

        Shape:
            - pixel_values: (num_images, 3, H, W), or (total_tiles, 3, h, w)
            - output: (sub-images of all images, h', w', vision width)
        """
        check_pictures(pixel_values, image_grids, None)
        parts = self.dual_view() if image_grids is None else self._parts(None, resize=False)
        return encode_views(parts, self._images_of(pixel_values, image_grids))

    def _idle_image(self, like: Tensor) -> Tensor:
        """A zero that depends on all parameters of the way from an image to the language model.

        Processes that train together wait for each other in sharded modules and for the gradient of every parameter;
        one whose batch holds text alone would keep the others waiting for good.
        """
        of_tower = next((p for p in self.vision_tower.parameters() if p.is_floating_point()), like)
        device = like.device if of_tower.is_meta else of_tower.device  # offloaded weights are on meta between calls
        tile = torch.full((1, 3, *self.tile), 0.5, device=device, dtype=of_tower.dtype)
        tokens: Tensor = self.multi_modal_projector(encode_dual_view(self._parts(None, resize=False), tile))
        return tokens.float().sum() * 0.0  # in half precision the sum could be infinite, and this NaN

    def _states_of_low_view(self, images: Tensor | list[Tensor] | None, options: Any) -> dict[str, Any]:
        """What the tower says of its layers, where that is asked for; without images a call must not."""
        config, names = self.config.vision_config, {"hidden_states", "attentions"}
        asked = {f"output_{name}": options.get(f"output_{name}") for name in names}
        if images is None:
            if wanted := [name for name, value in asked.items() if value]:
                raise ValueError(f"{wanted[0]}=True: view_features hold no states of the tower: give pixel_values.")
            return {}
        asked = {name: getattr(config, name, None) if value is None else value for name, value in asked.items()}
        if not any(asked.values()):
            return {}
        batches = [images] if isinstance(images, Tensor) else [image[None] for image in images]
        low = torch.cat([interpolate(batch, self.tile) for batch in batches])
        states = self.vision_tower(low, return_dict=True, **asked)
        return {name: getattr(states, name) for name in names}

    def _checked(self, layers: Layers) -> Layers:
        if len(listed(layers)) != len(listed(self.config.vision_feature_layer)):
            raise ValueError(
                f"vision_feature_layer={layers}, but this model was built for {self.config.vision_feature_layer}: give "
                "as many layers, for their number is the width of the enhancement module and of the projector."
            )
        for layer in listed(layers):
            check_tower(self.vision_tower, layer)
        return layers

    def dual_view(self, grid: GridLike | None = None) -> DualView:
        """Vision tower, DEM and options as they are now.

        Args:
            grid: The grid of an image that comes with ``image_grids``. None: the configured one, to which images are
                resized inside.
        """
        if grid is None:
            return self._parts(TileGrid.of(self.config.grid), resize=True)
        return self._parts(TileGrid.of(grid), resize=False)

    def _parts(self, grid: TileGrid | None, *, resize: bool) -> DualView:
        low_res = cast(LowRes, self.config.low_res)  # the configuration has put a value in the place of "auto"
        options = ViewOptions(self.tile, grid, low_res, resize, max_tiles_per_pass=self.max_tiles_per_pass)
        return DualView(self._encoder(self.config.vision_feature_layer), self.dem, options)

    def _encoder(self, layers: Layers) -> Encoder:
        tower: Any = HfTower(self.vision_tower, layers) if isinstance(layers, int) else None
        return cast(Encoder, tower or TowerLayers(self.vision_tower, tuple(listed(layers))))

    def _images_of(self, tiles: Tensor, image_grids: Tensor | None) -> Tensor | list[Tensor]:
        if image_grids is None:
            return tiles
        grids = [TileGrid.of(pair) for pair in image_grids.tolist()]
        counts = [grid.num_tiles for grid in grids]
        if tiles.shape[0] != sum(counts) or tuple(tiles.shape[-2:]) != self.tile:
            raise ValueError(
                f"pixel_values of shape {tuple(tiles.shape)} with image_grids {image_grids.tolist()}: expected "
                f"{sum(counts)} tiles of {self.tile[0]} x {self.tile[1]} pixels, all tiles of an image "
                "in row-major order, as InfLlavaImageProcessor(max_tiles=...) makes them."
            )
        return [recombine(part, g, "local") for part, g in zip(tiles.split(counts), grids, strict=True)]

    def get_placeholder_mask(self, input_ids: Tensor | None, inputs_embeds: Tensor, image_features: Tensor) -> Tensor:
        """Where the image tokens stand, (batch, sequence, 1), checked against the number of image features."""
        if input_ids is None:
            token = torch.tensor(self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(token)).all(-1)
        else:
            mask = input_ids == self.config.image_token_id
        check_features(mask.sum(), image_features, self.config)
        placeholder: Tensor = mask.unsqueeze(-1).to(inputs_embeds.device)
        return placeholder

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        image_grids: Tensor | None = None,
        image_sizes: Tensor | None = None,
        vision_feature_layer: Layers | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        cache: Cache | None = None,
        view_features: Tensor | None = None,
        image_canvases: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> InfLlavaModelOutputWithPast:
        """Run the language model on text tokens with the image tokens put in their places.

        Args:
            input_ids: Token ids; each image takes ``image_seq_length`` tokens ``image_token_id``.
            pixel_values: As for `get_image_features`.
            attention_mask: 1 for real tokens, 0 for padding.
            position_ids: Positions of the tokens.
            past_key_values: The language model's cache.
            inputs_embeds: Embedded tokens in place of ``input_ids``.
            image_grids: As for `get_image_features`.
            image_sizes: As for `get_image_features`.
            vision_feature_layer: As for `get_image_features`.
            mm_encoder_outputs: Image features computed before, ``{"image": ...}``, in place of ``pixel_values``.
            cache: The newer name of ``past_key_values``.
            view_features: As for `get_image_features`.
            image_canvases: As for `get_image_features`.
            **kwargs: Passed to the language model.

        In training, a batch without an image encodes one tile that counts for nothing: see `_idle_image`.

        Shape:
            - input_ids, attention_mask, position_ids: (batch, sequence)
            - inputs_embeds: (batch, sequence, text width)

        Raises:
            ValueError: Both or neither of two alternatives are given, or tokens and features do not match.
        """
        check_tokens(self.get_input_embeddings(), input_ids, inputs_embeds, attention_mask, position_ids)
        if sum(each is not None for each in (pixel_values, mm_encoder_outputs or None, view_features)) > 1:
            raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs or view_features.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)

        images = check_encoded(mm_encoder_outputs)
        if images is None and (pixel_values is not None or view_features is not None):
            images = self.get_image_features(
                pixel_values,
                image_grids,
                image_sizes,
                vision_feature_layer,
                view_features,
                image_canvases,
                output_hidden_states=False,
                output_attentions=False,
                return_dict=True,
            )
        image_features = None
        if images is not None:
            tokens = images.pooler_output
            image_features = (tokens if isinstance(tokens, Tensor) else torch.stack(list(tokens))).to(
                inputs_embeds.device, inputs_embeds.dtype
            )
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features)
            inputs_embeds = inputs_embeds.masked_scatter(mask, image_features)
        elif self.training and torch.is_grad_enabled():
            inputs_embeds = inputs_embeds + self._idle_image(inputs_embeds).to(inputs_embeds)

        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **{CACHE: past_key_values if cache is None else cache},
            **kwargs,
        )
        return InfLlavaModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=image_features,
            **{CACHE: getattr(outputs, CACHE)},
        )


def _sizes_alone(features: Tensor, canvases: Tensor | None, *, uniform: bool) -> Tensor | list[Tensor]:
    """Images of which the sizes alone will be read; they take no memory."""
    if canvases is None:
        raise ValueError("image_canvases=None: view_features come with height and width of each image.")
    sizes = [(int(height), int(width)) for height, width in canvases.tolist()]
    nothing = features.new_zeros(())
    if uniform and len(set(sizes)) == 1:
        return nothing.expand(len(sizes), 3, *sizes[0])
    return [nothing.expand(3, *size) for size in sizes]


def _valid_pixels(images: Tensor | list[Tensor], image_sizes: Tensor) -> list[Tensor] | None:
    """Masks (H, W) of what is picture and not padding, or None where nothing is padding."""
    sizes = [tuple(pair) for pair in image_sizes.tolist()]
    canvases = [tuple(image.shape[-2:]) for image in images]
    if (
        isinstance(images, Tensor)
        or len(sizes) != len(canvases)
        or any(
            not (1 <= h <= full_h and 1 <= w <= full_w)
            for (h, w), (full_h, full_w) in zip(sizes, canvases, strict=True)
        )
    ):
        raise ValueError(
            f"image_sizes {sizes} for images of {canvases} (height, width): with image_grids, give for each image the "
            "size of the picture on its canvas, as InfLlavaImageProcessor(max_tiles=...) does; omit it otherwise."
        )
    if sizes == canvases:
        return None
    masks = [image.new_zeros(image.shape[-2:], dtype=torch.bool) for image in images]
    for mask, (height, width) in zip(masks, sizes, strict=True):
        mask[:height, :width] = True
    return masks


class InfLlavaForConditionalGeneration(InfLlavaPreTrainedModel, GenerationMixin):
    """INF-LLaVA with its language modelling head: `forward` with labels, and `generate`.

    Args:
        config: The configuration.

    Raises:
        ValueError: The language model's own class makes logits in a way that is not known here.

    Example:
        >>> config = InfLlavaConfig(
        ...     vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        ...                    "num_attention_heads": 4, "image_size": 28, "patch_size": 14},
        ...     text_config={"vocab_size": 64, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
        ...                  "num_attention_heads": 4, "num_key_value_heads": 2},
        ...     grid=(2, 3), image_token_id=63)
        >>> model = InfLlavaForConditionalGeneration(config).eval()
        >>> tokens = torch.tensor([[1, 63, 63, 63, 63, 5, 6]])
        >>> model(input_ids=tokens, pixel_values=torch.randn(1, 3, 56, 84)).logits.shape
        torch.Size([1, 7, 64])
    """

    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012 - transformers' own form
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012

    def __init__(self, config: InfLlavaConfig) -> None:
        super().__init__(config)
        head = build_head(config.text_config)  # first, for it refuses what cannot be done
        self.model = InfLlavaModel(config)
        self.lm_head = head
        embeddings = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The language modelling head."""
        return self.lm_head

    def dual_view(self, grid: GridLike | None = None) -> DualView:
        """As [`InfLlavaModel.dual_view`][dualview.models.InfLlavaModel.dual_view]."""
        return self.model.dual_view(grid)

    def get_image_features(
        self,
        pixel_values: Tensor | None = None,
        image_grids: Tensor | None = None,
        image_sizes: Tensor | None = None,
        vision_feature_layer: Layers | None = None,
        view_features: Tensor | None = None,
        image_canvases: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """As [`InfLlavaModel.get_image_features`][dualview.models.InfLlavaModel.get_image_features]."""
        return self.model.get_image_features(
            pixel_values, image_grids, image_sizes, vision_feature_layer, view_features, image_canvases, **kwargs
        )

    def get_view_features(self, pixel_values: Tensor, image_grids: Tensor | None = None) -> Tensor:
        """As [`InfLlavaModel.get_view_features`][dualview.models.InfLlavaModel.get_view_features]."""
        return self.model.get_view_features(pixel_values, image_grids)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """What `generate` checks first: it would leave out ``view_features``, and answer without the images."""
        if model_kwargs.get("view_features") is not None:
            raise ValueError(
                "generate takes no view_features: give it pixel_values, or "
                'mm_encoder_outputs={"image": model.get_image_features(view_features=..., image_canvases=...)}.'
            )
        super()._validate_model_kwargs(model_kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        image_grids: Tensor | None = None,
        image_sizes: Tensor | None = None,
        vision_feature_layer: Layers | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        cache: Cache | None = None,
        view_features: Tensor | None = None,
        image_canvases: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> InfLlavaCausalLMOutputWithPast:
        """As [`InfLlavaModel.forward`][dualview.models.InfLlavaModel.forward], with logits and a loss.

        Args:
            input_ids: Token ids; each image takes ``image_seq_length`` tokens ``image_token_id``.
            pixel_values: Normalised images of one size; or, with ``image_grids``, all local tiles of all images.
            attention_mask: 1 for real tokens, 0 for padding.
            position_ids: Positions of the tokens.
            past_key_values: The language model's cache.
            inputs_embeds: Embedded tokens in place of ``input_ids``.
            image_grids: Rows and columns of each image.
            image_sizes: With ``image_grids``, height and width of the picture on each image's canvas.
            vision_feature_layer: In place of the configured one; a list must have as many layers.
            labels: Token ids to predict, shifted inside. -100 is ignored: give it to image tokens, questions, padding.
            logits_to_keep: How many of the last positions get logits (0: all), or their indices.
            mm_encoder_outputs: Image features computed before, ``{"image": ...}``, in place of ``pixel_values``.
            cache: The newer name of ``past_key_values``.
            view_features: What `get_view_features` has made of the images before, in place of ``pixel_values``.
            image_canvases: With ``view_features``, height and width of each image in pixels.
            **kwargs: Passed to the language model and to the loss.

        Shape:
            - input_ids, attention_mask, position_ids, labels: (batch, sequence)
            - pixel_values: (num_images, 3, H, W), or (total_tiles, 3, h, w)
            - image_grids, image_sizes: (num_images, 2)
            - inputs_embeds: (batch, sequence, text width)
            - logits: (batch, kept positions, vocabulary)
        """
        check_tokens(self.get_input_embeddings(), input_ids, inputs_embeds, attention_mask, position_ids, labels)
        if labels is not None and pixel_values is None and view_features is None and not mm_encoder_outputs:
            check_places(input_ids, self.config)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            image_grids=image_grids,
            image_sizes=image_sizes,
            vision_feature_layer=vision_feature_layer,
            mm_encoder_outputs=mm_encoder_outputs,
            view_features=view_features,
            image_canvases=image_canvases,
            return_dict=True,
            **{CACHE: past_key_values if cache is None else cache},
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = finish_logits(self.lm_head(outputs.last_hidden_state[:, kept, :]), self.config.text_config)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return InfLlavaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            **{CACHE: getattr(outputs, CACHE)},
        )
