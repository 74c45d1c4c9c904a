"""One row per public callable: a valid call of each, for `tests.fuzz`. A new public name needs a row here."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import chdir
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image

import dualview as dv
from dualview.geometry import LiveTiles
from dualview.ops.functional import crop
from tests.fuzz import Row

GRID, TILE, DIM = (2, 3), (4, 3), 8
IMAGES = torch.rand(1, 3, 8, 9)
TOKENS = torch.rand(1, 8, 9, DIM)
TILES = torch.rand(1, 6, 3, 4, 3)
LOCAL, STRIDE = torch.rand(2, 1, 6, 2, 3, DIM)
MASK = torch.ones(1, 4, 9, dtype=torch.bool)
LIVE = LiveTiles(tuple(range(6)), tuple(range(6)))
QUERY, KEY = torch.rand(2, 6, 5, DIM), torch.rand(2, 6, 7, DIM)
MAPS = {"v_loc": torch.rand(1, 4, 6, 16), "v_glo": torch.rand(1, 4, 6, 16)}
MADE = {"device": None, "dtype": None}
BATCH = dv.TileBatch.collate([torch.rand(6, 3, 4, 3), torch.rand(2, 3, 4, 3)], [(2, 3), (1, 2)], "local")
CUT = {"x": IMAGES, "grid": GRID, "data_format": "channels_first", "backend": None}
LARGE = {"overlap": (2, 1), "border": "shift"}
ATTENTION = {"num_heads": 2, "bias": False, "out_proj": False, "residual": False, "norm": False, "init": "xavier"}
DEM = {
    **ATTENTION,
    "pairing": "paper",
    "share_weights": True,
    "fusion": "addition",
    "readout": "average",
    "enhance": "both",
    "source": "dual",
    "gate": False,
}
PAIR = {"local_tiles": LOCAL, "stride_tiles": STRIDE, "grid": GRID}
OF_FILES = dict.fromkeys(("source", "image", "image_url_or_urls"), "source|picture|file|base64|cannot be read|numbers")
OF_PIXELS = {"pixel_values": "pixel_values|pixels"}
OF_STORES = {"source": "source", "target": "target|name", "store": "store|name"}
OF_IMAGES = {"images": "images?|image size"}
DUAL_CROP = {"tile": TILE, "remainder": "pad", "pad_value": 0.5, "low_pass": False, "perspectives": ("local",)}


HELD: list[TemporaryDirectory[str]] = []
"""Folders that rows need; they go with the process."""
RECORDS = {"EnhancedMaps", "Explanation", "LoadReport", "NormalizedTiles"}
"""Plain records: what is put into one is not looked at."""


@cache
def rows() -> dict[str, Row]:
    """Every row, by name."""
    return {
        **_geometry(),
        **_tiling(),
        **_enhancement(),
        **_batches(),
        **_other(),
        **_encoders(),
        **_inf_llava(),
        **_large(),
        **_attached(),
        **_training(),
    }


def _geometry() -> dict[str, Row]:
    grid = dv.TileGrid(2, 3)
    return {
        "TileGrid": Row(dv.TileGrid, {"rows": 2, "cols": 3}),
        "TileGrid.map_size": Row(grid.map_size, {"tile": TILE}),
        "TileGrid.tile_size": Row(grid.tile_size, {"size": (8, 9)}),
        "TileGrid.of": Row(dv.TileGrid.of, {"grid": GRID}),
        "TileGrid.parse": Row(dv.TileGrid.parse, {"text": "2x3"}),
        "TileGrid.tile_of": Row(grid.tile_of, {}, {"height": 8, "width": 9, "name": "x"}),
        "TileGrid.whole": Row(dv.TileGrid.whole, {"size": (8, 9), "tile": TILE}),
        "TileGrid.for_image": Row(dv.TileGrid.for_image, {"size": (8, 9), "tile": TILE}),
        "choose_grid": Row(dv.choose_grid, {"size": (8, 9), "tile": TILE, "max_tiles": 9}),
    }


def _tiling() -> dict[str, Row]:
    module = {"grid": GRID, "data_format": "channels_first"}
    tiles = {"tiles": TILES, "grid": GRID, "perspective": "local", "data_format": "channels_first"}
    smooth = {"x": IMAGES, "grid": GRID, "data_format": "channels_first"}
    normal = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "live": LIVE, "dtype": torch.float32, "backend": None}
    normal |= {"images": IMAGES, "grid": GRID, "data_format": "channels_first"}
    return {
        "local_crop": Row(dv.local_crop, CUT),
        "global_stride_crop": Row(dv.global_stride_crop, CUT),
        "crop": Row(crop, {**CUT, "perspective": "global"}),
        "recombine": Row(dv.recombine, {**tiles, "size": (8, 9), "backend": None}),
        "recombine of a batch": Row(dv.recombine, {"tiles": BATCH, "grid": [(2, 3), (1, 2)], "perspective": "local"}),
        "LocalCrop": Row(dv.LocalCrop, module),
        "LocalCrop.forward": Row(dv.LocalCrop(GRID), {"x": IMAGES}),
        "GlobalStrideCrop": Row(dv.GlobalStrideCrop, module),
        "GlobalStrideCrop.forward": Row(dv.GlobalStrideCrop(GRID), {"x": IMAGES}),
        "SubfeatureRecombine": Row(dv.SubfeatureRecombine, {**module, "perspective": "global"}),
        "SubfeatureRecombine.forward": Row(dv.SubfeatureRecombine(GRID, "global"), {"tiles": TILES}),
        "low_pass": Row(dv.low_pass, smooth),
        "read_out": Row(dv.read_out, {"x": TOKENS, "grid": GRID, "readout": "average"}),
        "normalized_crop": Row(dv.normalized_crop, normal),
    }


def _enhancement() -> dict[str, Row]:
    attention = {"query": QUERY, "key": KEY, "value": KEY, "num_heads": 2, "key_mask": torch.ones(6, 7) > 0}
    dem, direct = dv.DualPerspectiveEnhance.paper(DIM, num_heads=2), dv.DirectReadout("sum")
    released = dv.DualPerspectiveEnhance.released(16, num_heads=2)
    call = {**PAIR, "key_mask": MASK[..., :9].expand(1, 4, 9), "live": LIVE}
    plan = {"grid": GRID, "tokens": (2, 3)}
    fusions = [dv.LinearConcatFusion, dv.BottleneckConcatFusion, dv.AdditionFusion, dv.WeightedAdditionFusion]
    fusions += [dv.MultiplicationFusion, dv.MaxPoolFusion, dv.Conv3x3Fusion]
    return {
        **{cls.__name__: Row(cls, {"dim": 16, **MADE}) for cls in fusions},
        **{f"{cls.__name__}.forward": Row(cls(16), MAPS) for cls in fusions},
        "tile_attention": Row(dv.tile_attention, attention),
        "TileAttention": Row(dv.TileAttention, {"dim": DIM, **ATTENTION, **MADE}),
        "TileAttention.forward": Row(
            dv.TileAttention(DIM, num_heads=2), {"query": QUERY, "key": KEY, "key_mask": torch.ones(6, 7) > 0}
        ),
        "TileAttention.finish": Row(dv.TileAttention(DIM).finish, fixed={"attended": QUERY, "query": QUERY}),
        "DualPerspectiveEnhance": Row(dv.DualPerspectiveEnhance, {"dim": DIM, **DEM, **MADE}),
        "DualPerspectiveEnhance.paper": Row(dv.DualPerspectiveEnhance.paper, {"dim": DIM, **DEM}),
        "DualPerspectiveEnhance.released": Row(dv.DualPerspectiveEnhance.released, {"dim": DIM, **DEM}),
        "DualPerspectiveEnhance.forward": Row(dem, {**call, "base": torch.ones(1, 2, 3, DIM), "backend": None}),
        "DualPerspectiveEnhance.enhanced_maps": Row(dem.enhanced_maps, {**PAIR, "key_mask": call["key_mask"]}),
        "DualPerspectiveEnhance.plan": Row(dem.plan, plan),
        "DualPerspectiveEnhance.products": Row(dem.products, {**plan, "like": LOCAL}),
        "DualPerspectiveEnhance.load_released": Row(
            released.load_released, {"state_dict": released.released_state_dict(), "strict": True}
        ),
        "DualPerspectiveEnhance.released_state_dict": Row(released.released_state_dict),
        "DirectReadout": Row(dv.DirectReadout, {"source": "sum", "readout": "average"}),
        "DirectReadout.forward": Row(direct, {**PAIR, "live": LIVE}),
        "DirectReadout.plan": Row(direct.plan, plan),
    }


def _batches() -> dict[str, Row]:
    cut = dv.DualPerspectiveCrop(TILE, remainder="pad")
    images = [torch.rand(3, 7, 9), torch.rand(3, 4, 5)]
    made, packed = cut(torch.rand(3, 7, 9)), cut(images)
    encoded = made.with_data(local=torch.rand(6, 2, 3, DIM), stride=torch.rand(6, 2, 3, DIM))
    return {
        "TileBatch": Row(
            dv.TileBatch,
            {
                "data": BATCH.data,
                "offsets": (0, 6, 8),
                "grids": BATCH.grids,
                "perspective": "local",
                "images": packed.images,
            },
        ),
        "TileBatch.collate": Row(
            dv.TileBatch.collate,
            {"tiles": BATCH.split(), "grids": [(2, 3), (1, 2)], "perspective": "local", "images": packed.images},
        ),
        "TileBatch.split": Row(BATCH.split),
        "TileBatch.slice": Row(BATCH.slice, {"start": 0, "stop": 1}),
        "TileBatch.to": Row(BATCH.to, fixed={"dtype": torch.float16}),
        "TileBatch.pin_memory": Row(lambda: BATCH.pin_memory),
        "TileBatch.with_data": Row(BATCH.with_data, {"data": BATCH.data}),
        "TileBatch.checked_grids": Row(BATCH.checked_grids, {"grids": [(2, 3), (1, 2)]}),
        "TileBatch.checked_perspective": Row(BATCH.checked_perspective, {"perspective": "local"}),
        "DualPerspectiveCrop": Row(dv.DualPerspectiveCrop, DUAL_CROP),
        "DualPerspectiveCrop.forward": Row(cut, {"images": IMAGES}, aliases=OF_IMAGES),
        "DualPerspectiveCrop.forward, resizing": Row(
            dv.DualPerspectiveCrop((5, 4), remainder="resize"), {"images": IMAGES}
        ),
        "DualPerspectiveCrop.forward, filtered": Row(
            dv.DualPerspectiveCrop(TILE, low_pass=True), {"images": IMAGES}, aliases=OF_IMAGES
        ),
        "DualPerspectiveCrop.forward of a list": Row(cut, {"images": images}, aliases=OF_IMAGES),
        "recombine of a result": Row(
            dv.recombine, {"tiles": made, "grid": (2, 3), "perspective": "local", "data_format": "channels_first"}
        ),
        "DualPerspectiveEnhance.forward of a result": Row(
            dv.DualPerspectiveEnhance.paper(DIM), {"local_tiles": encoded}, {"stride_tiles": None, "grid": None}
        ),
        "DualPerspectiveTiles": Row(
            dv.DualPerspectiveTiles,
            {"local": made.local, "stride": made.stride, "image": made.image, "low_pass": False},
        ),
        "DualPerspectiveTiles.of": Row(made.of, {"perspective": "local"}),
        "DualPerspectiveTiles.with_data": Row(made.with_data, {"local": made.local, "stride": made.stride}),
        "DualPerspectiveTiles.key_mask": Row(made.key_mask, {"tokens": (2, 3)}),
        "DualPerspectiveTiles.checked_grid": Row(made.checked_grid, {"grid": (2, 3)}),
        "DualPerspectiveTiles.to": Row(made.to, fixed={"dtype": torch.float16}),
        "DualPerspectiveTiles.pin_memory": Row(lambda: made.pin_memory),
        "DualPerspectiveTileBatch": Row(
            dv.DualPerspectiveTileBatch, {"local": packed.local, "stride": packed.stride, "low_pass": False}
        ),
        "DualPerspectiveTileBatch.collate": Row(
            dv.DualPerspectiveTileBatch.collate, {"tiles": [cut(image) for image in images]}
        ),
        "DualPerspectiveTileBatch.of": Row(packed.of, {"perspective": "global"}),
        "DualPerspectiveTileBatch.with_data": Row(
            packed.with_data,
            {"local": packed.local.data, "stride": packed.stride.data},
            aliases=dict.fromkeys(("local", "stride"), "local|stride|data"),
        ),
        "DualPerspectiveTileBatch.checked_grid": Row(packed.checked_grid, {"grid": packed.grid}),
        "DualPerspectiveTileBatch.to": Row(packed.to, fixed={"dtype": torch.float16}),
        "DualPerspectiveTileBatch.pin_memory": Row(lambda: packed.pin_memory),
        "DualPerspectiveCrop.inverse": Row(
            cut.inverse, {"tiles": made, "perspective": "local", "data_format": "channels_first"}
        ),
        "DualPerspectiveCrop.inverse of a batch": Row(cut.inverse, {"tiles": packed, "perspective": "global"}),
    }


def _other() -> dict[str, Row]:
    dem = dv.DualPerspectiveEnhance.paper(DIM)
    order = {"fn": lambda x: dv.local_crop(x, GRID), "grid": GRID, "tile": TILE, "perspective": "local"}
    return {
        "explain": Row(dv.explain, {"module": dem, "grid": GRID, "tokens": (2, 3)}),
        "full_computation": Row(dv.full_computation),
        "use_backend": Row(dv.use_backend, {"backend": "torch"}),
        "load_embedded": Row(dv.load_embedded, {"view": "low-res"}),
        "load_image": Row(dv.load_image, {"source": Image.new("RGB", (5, 4))}, aliases=OF_FILES),
        "testing.coordinate_images": Row(
            dv.testing.coordinate_images, {"size": (8, 9), "batch": 2, "data_format": "channels_first"}
        ),
        "testing.assert_tile_order": Row(
            dv.testing.assert_tile_order, {**order, "data_format": "channels_first", "batch": 2}
        ),
    }


def _encoders() -> dict[str, Row]:
    import open_clip
    import timm
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=DIM,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    clip = CLIPVisionModel(config).eval()
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
    tower = open_clip.transformer.VisionTransformer(32, 16, 16, 2, 2, 2).eval()
    hf = dv.HfEncoder(clip)
    dem = dv.DualPerspectiveEnhance.paper(DIM)
    options = {"tile": (8, 8), "grid": GRID, "low_res": "add", "resize": False, "low_pass": False}
    encoder, ragged = dv.DualViewEncoder(hf, dem, tile=(8, 8), grid=GRID), dv.DualViewEncoder(hf, dem, tile=(8, 8))
    images, valid = torch.rand(1, 3, 16, 24), torch.ones(1, 16, 24, dtype=torch.bool)
    batch = dv.TileBatch.collate([torch.rand(6, 3, 8, 8), torch.rand(2, 3, 8, 8)], [(2, 3), (1, 2)], "local")
    pixels = torch.rand(1, 3, 32, 32)
    return {
        "HfEncoder": Row(dv.HfEncoder, {"model": clip, "layer": -2}),
        "HfEncoder.forward": Row(hf, {"pixels": torch.rand(1, 3, 8, 8)}),
        "HfEncoder.layer_plan": Row(hf.layer_plan),
        "HfEncoder.token_map": Row(hf.token_map, {"tile": (8, 8)}),
        "TimmEncoder": Row(dv.TimmEncoder, {"model": vit, "layer": -2, "norm": False}),
        "TimmEncoder.forward": Row(dv.TimmEncoder(vit), {"pixels": pixels}),
        "TimmEncoder.layer_plan": Row(dv.TimmEncoder(vit).layer_plan),
        "OpenClipEncoder": Row(dv.OpenClipEncoder, {"model": tower, "layer": -2, "norm": False}),
        "OpenClipEncoder.forward": Row(dv.OpenClipEncoder(tower), {"pixels": pixels}),
        "OpenClipEncoder.layer_plan": Row(dv.OpenClipEncoder(tower).layer_plan),
        "DualViewEncoder": Row(dv.DualViewEncoder, {"encoder": hf, "dem": dem, **options, "max_tiles_per_pass": 4}),
        "DualViewEncoder.forward": Row(encoder, {"pixels": images, "valid": valid}),
        "DualViewEncoder.forward of a list": Row(ragged, {"pixels": [images[0], images[0]], "valid": [valid[0]] * 2}),
        "DualViewEncoder.forward of a batch": Row(ragged, {"pixels": batch, "valid": None}),
        "DualViewEncoder.dual_view": Row(ragged.dual_view, {"grid": GRID}),
        "DualViewEncoder.plan": Row(ragged.plan, {"size": (16, 24), "grid": GRID, "tokens": (2, 3)}),
    }


TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
WRITER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
CONFIG = {
    "vision_config": {**TOWER, "image_size": 28, "patch_size": 14},
    "text_config": WRITER,
    "grid": [2, 3],
    "image_token_id": 63,
    "image_seq_length": 4,
    "dem": {"preset": "paper"},
    "low_res": "add",
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
    "tie_word_embeddings": False,
}


def _inf_llava() -> dict[str, Row]:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from dualview.models import (
        InfLlavaConfig,
        InfLlavaForConditionalGeneration,
        InfLlavaImageProcessor,
        InfLlavaModel,
        InfLlavaProcessor,
        convert_inf_llava,
    )

    config = InfLlavaConfig(**CONFIG)
    model = InfLlavaForConditionalGeneration(config).eval()
    pixels = {"pixel_values": torch.rand(1, 3, 56, 84), "image_grids": None, "image_sizes": None}
    tiles = {"pixel_values": torch.rand(6, 3, 28, 28), "image_grids": torch.tensor([[2, 3]])}
    tiles |= {"image_sizes": torch.tensor([[50, 84]])}
    ids = torch.tensor([[1, 63, 63, 63, 63, 5]])
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(6)[None]}
    processor = InfLlavaImageProcessor(size=28)
    words = {"<unk>": 0, "<image>": 1, "a": 2}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "<unk>")), unk_token="<unk>")
    both = {"image_processor": processor, "tokenizer": tokenizer, "image_seq_length": 4, "image_token": "<image>"}
    joined = InfLlavaProcessor(**both)
    picture = Image.new("RGB", (30, 20))
    found = {
        "InfLlavaConfig": Row(InfLlavaConfig, CONFIG),
        "InfLlavaConfig.build_dem": Row(config.build_dem, {"device": "meta"}),
        "InfLlavaModel": Row(InfLlavaModel, {"config": config}),
        "InfLlavaForConditionalGeneration": Row(InfLlavaForConditionalGeneration, {"config": config}),
        "InfLlavaImageProcessor": Row(
            lambda **given: InfLlavaImageProcessor(**given)(picture), {"size": 28, "image_mean": 0.5, "image_std": 0.5}
        ),
        "InfLlavaImageProcessor with options": Row(
            lambda **given: InfLlavaImageProcessor(**given)(picture),
            {"do_pad": True, "do_rescale": True, "rescale_factor": 0.01, "crop_size": {"height": 20, "width": 20}},
        ),
        "InfLlavaImageProcessor of tiles": Row(
            lambda **given: InfLlavaImageProcessor(**given)(picture), {"max_tiles": 4, "tile_size": 28}
        ),
        "InfLlavaImageProcessor.fetch_images": Row(
            processor.fetch_images, {"image_url_or_urls": picture}, aliases=OF_FILES
        ),
        "InfLlavaImageProcessor.process_image": Row(processor.process_image, {"image": picture}, aliases=OF_FILES),
        "InfLlavaConfig.check_model_type": Row(config.check_model_type, {"config_dict": {"model_type": "inf_llava"}}),
        "InfLlavaConfig.from_dict": Row(InfLlavaConfig.from_dict, fixed={"config_dict": config.to_dict()}),
        "InfLlavaModel.from_pretrained": Row(lambda: InfLlavaModel.from_pretrained),
        "InfLlavaForConditionalGeneration.from_pretrained": Row(
            lambda: InfLlavaForConditionalGeneration.from_pretrained
        ),
        "InfLlavaImageProcessor.get_number_of_image_patches": Row(
            InfLlavaImageProcessor(max_tiles=4).get_number_of_image_patches,
            {"height": 20, "width": 30, "images_kwargs": {"max_tiles": 5}},
            aliases={"images_kwargs": "images_kwargs|max_tiles|tile_size"},
        ),
        "InfLlavaProcessor.validate_inputs": Row(
            joined.validate_inputs, fixed={"images": [picture], "text": ["<image>"]}
        ),
        "convert_inf_llava": Row(lambda: convert_inf_llava),
        "InfLlavaProcessor": Row(InfLlavaProcessor, both),
        "InfLlavaProcessor.replace_image_token": Row(
            joined.replace_image_token, fixed={"image_inputs": {}, "image_idx": 0}
        ),
    }
    for name, part in (("InfLlavaModel", model.model), ("InfLlavaForConditionalGeneration", model)):
        found |= {
            f"{name}.dual_view": Row(part.dual_view, {"grid": (2, 3)}),
            f"{name}.get_view_features": Row(
                part.get_view_features, {k: v for k, v in tiles.items() if k != "image_sizes"}, aliases=OF_PIXELS
            ),
            f"{name}.get_image_features": Row(part.get_image_features, pixels, aliases=OF_PIXELS),
            f"{name}.get_image_features of tiles": Row(part.get_image_features, tiles, aliases=OF_PIXELS),
            f"{name}.forward": Row(part, {**text, "pixel_values": pixels["pixel_values"]}, aliases=OF_PIXELS),
            f"{name}.is_custom_code": Row(part.is_custom_code),
        }
    embeds = model.get_input_embeddings()(ids).detach()
    features = torch.rand(1, 4, 32)
    found["InfLlavaModel.get_placeholder_mask"] = Row(
        model.model.get_placeholder_mask, fixed={"input_ids": ids, "inputs_embeds": embeds, "image_features": features}
    )
    found["InfLlavaForConditionalGeneration.forward with labels"] = Row(
        model, {**text, **pixels, "labels": ids}, aliases=OF_PIXELS
    )
    found["InfLlavaForConditionalGeneration.get_output_embeddings"] = Row(model.get_output_embeddings)
    return found


def elsewhere(call: Callable[..., object]) -> Callable[..., object]:
    """The same in a folder of its own: what it writes is gone afterwards."""

    def called(**given: object) -> object:
        with TemporaryDirectory() as folder, chdir(folder):
            return call(**given)

    return called


def _large() -> dict[str, Row]:
    overlapping = {"x": IMAGES, "tile": TILE, **LARGE, "data_format": "channels_first"}
    tiles = dv.local_crop(**overlapping)
    picture = torch.rand(3, 8, 9).numpy()
    reader = dv.TileReader(picture, tile=TILE, overlap=(2, 1))
    writer = {"size": (8, 9), "overlap": (2, 1), "window": "hann"}

    def write(tiles: object) -> None:
        dv.TileWriter(picture.copy(), **writer).write(tiles)  # type: ignore[arg-type]

    return {
        "local_crop with overlap": Row(dv.local_crop, overlapping),
        "blend_tiles": Row(
            dv.blend_tiles,
            {"tiles": tiles, "size": (8, 9), **LARGE, "window": "hann", "data_format": "channels_first"},
        ),
        "predict_tiled": Row(
            dv.predict_tiled,
            {**overlapping, "margin": (1, 0), "batch_size": 2, "window": "linear", "device": None, "progress": False},
            {"model": lambda tiles: tiles.float()},
        ),
        "TileReader": Row(
            elsewhere(dv.TileReader),
            {"source": picture, "tile": TILE, **LARGE, "perspective": "local", "data_format": None, "progress": False},
            aliases=OF_STORES,
        ),
        "TileReader of strides": Row(
            elsewhere(dv.TileReader),
            {"store": "tiles.npy"},
            {"source": picture, "tile": TILE, "perspective": "global"},
            OF_STORES,
        ),
        "TileReader.position": Row(reader.position, {"index": 1}),
        "TileWriter": Row(
            elsewhere(dv.TileWriter),
            {
                **writer,
                "target": picture.copy(),
                "margin": 0,
                "border": "shift",
                "perspective": "local",
                "data_format": "channels_first",
            },
            aliases=OF_STORES,
        ),
        "TileWriter.write": Row(write, {"tiles": tiles[0, 0]}, aliases={"tiles": "tiles?"}),
        "TileWriter.close": Row(lambda: dv.TileWriter.close),
        "TileWriter.discard": Row(lambda: dv.TileWriter.discard),
    }


def _attached() -> dict[str, Row]:
    from tokenizers import Tokenizer, models
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    vision, text = CLIPVisionConfig(**TOWER, image_size=28, patch_size=14), LlamaConfig(**WRITER)

    def host() -> LlavaForConditionalGeneration:
        return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=9))

    bare, changed = host(), dv.attach(host())

    def attach(**given: object) -> None:
        try:
            dv.attach(**given)  # type: ignore[arg-type]
        finally:
            restore()

    def load(folder: object, **given: object) -> None:
        dv.save_adapter(changed, "adapter")
        try:
            dv.load_adapter(folder=folder, **given)  # type: ignore[arg-type]
        finally:
            restore()

    def restore() -> None:
        if any(name.endswith("dualview") for name, _ in bare.named_modules()):
            dv.detach(bare)

    def detach(model: object) -> None:
        dv.detach(model)  # type: ignore[arg-type]
        dv.attach(model)  # type: ignore[arg-type]

    words = {"<unk>": 0, "<image>": 1, "a": 2}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "<unk>")), unk_token="<unk>")
    processor = LlavaProcessor(CLIPImageProcessor(), tokenizer, patch_size=14, vision_feature_select_strategy="default")
    options = {"grid": (2, 2), "source": "upsample", "dem": {"preset": "paper"}, "layers": [-1]}
    return {
        "attach": Row(attach, {"model": bare, **options, "layers": None, "max_tiles_per_pass": 4}),
        "detach": Row(detach, {"model": changed}),
        "attached": Row(dv.attached, {"model": changed}),
        "save_adapter": Row(elsewhere(dv.save_adapter), {"model": changed, "folder": "adapter"}),
        "load_adapter": Row(
            elsewhere(load),
            {"model": bare, "folder": "adapter", "max_tiles_per_pass": None},
            aliases={"folder": "folder|holds"},
        ),
        "adapt_processor": Row(
            dv.adapt_processor,
            {"processor": processor, "grid": (2, 2), "source": "hires"},
            aliases={"processor": "processor|tested"},
        ),
    }


def _training() -> dict[str, Row]:
    from dualview import train
    from dualview.train import config as of_config
    from tests.tiny import tiny_model, tiny_processor

    model, processor = tiny_model(), tiny_processor()
    fields = {"model": "base", "output": "run", "stage2": {"data": [{"file": "rows.json"}]}}
    config = train.TrainConfig.of(fields)
    HELD.append(folder := TemporaryDirectory())
    rows, base = Path(folder.name, "rows.json"), Path(folder.name, "run.yaml")
    rows.write_text('[{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]')
    base.write_text("{model: base, output: run, stage1: {data: [{file: rows.json}]}}")
    data = train.LlavaDataset(processor)
    cache = train.FeatureCache(folder.name, model, processor, {})
    stage = {"stage": config.stages["stage2"], "name": "stage2", "folder": "run", "seed": 0, "processes": 2}
    options = {"form": "chat", "max_length": 9, "bad_rows": "skip", "images_kwargs": None, "report": print}
    parts = {"vision_tower": "clip", "language_model": "llama", "grid": (2, 3), "dem": {}, "chat_template": None}
    lora = {"rank": 4, "alpha": 8, "dropout": 0.1, "target_modules": "q_proj"}
    return {
        "train": Row(lambda: train.train),
        "freeze": Row(train.freeze, {"model": model, "train": ("dem",)}),
        "training_arguments": Row(train.training_arguments, stage),
        "TrainConfig": Row(lambda: train.TrainConfig),
        "TrainConfig.of": Row(train.TrainConfig.of, {"fields": fields}),
        "TrainConfig.load": Row(train.TrainConfig.load, {"file": base}, aliases={"file": "file|yaml"}),
        "TrainConfig.plain": Row(config.plain),
        "StageConfig": Row(lambda: of_config.StageConfig),
        "DataConfig": Row(of_config.DataConfig, {"file": "rows.json", "images": None, "source": None}),
        "LoraConfig": Row(of_config.LoraConfig, lora),
        "BaseConfig": Row(of_config.BaseConfig, parts),
        "LlavaDataset": Row(train.LlavaDataset, {"processor": processor, **options}),
        "LlavaDataset.add": Row(data.add, {"file": rows, "images": None}, aliases={"images": "images|folder"}),
        "LlavaDataset.lengths": Row(data.lengths),
        "Collator": Row(train.Collator, {"pad_token_id": 0}),
        "FeatureCache": Row(
            train.FeatureCache, {"folder": "cache", "model": model, "processor": processor, "images_kwargs": {}}
        ),
        "FeatureCache.fill": Row(cache.fill, fixed={"pictures": [], "model": model}),
        "FeatureCache.read": Row(cache.read, fixed={"paths": [rows]}),
        "DualViewTrainer": Row(lambda: train.DualViewTrainer),
        "DualViewTrainer.compute_loss": Row(lambda: train.DualViewTrainer.compute_loss),
        "DualViewTrainer.save_result": Row(lambda: train.DualViewTrainer.save_result),
    }
