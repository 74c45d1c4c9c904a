"""Tiny models with random weights, one for each family, and inputs for them."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig

IMAGE = 9  # the id of the image token
TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VIT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
PINPOINTS = [[16, 32], [32, 16], [32, 32]]


def text(model_type: str, **more: Any) -> dict[str, Any]:
    return {"model_type": model_type, **TEXT, **more}


def vit(model_type: str | None = None, **more: Any) -> dict[str, Any]:
    return {**({"model_type": model_type} if model_type else {}), **VIT, **more}


def configured(family: str) -> Any:
    """The configuration of a tiny model."""
    clip, siglip = vit("clip_vision_model"), vit("siglip_vision_model")
    llama, qwen2 = text("llama"), text("qwen2")
    T = transformers  # noqa: N806
    match family:
        case "llava":
            return T.LlavaConfig(vision_config=clip, text_config=llama, image_token_index=IMAGE)
        case "vipllava":
            return T.VipLlavaConfig(
                vision_config=clip, text_config=llama, image_token_index=IMAGE, vision_feature_layers=[-1, -2, 1]
            )
        case "llava_next":
            return T.LlavaNextConfig(
                vision_config=clip, text_config=llama, image_token_index=IMAGE, image_grid_pinpoints=PINPOINTS
            )
        case "llava_onevision":
            return T.LlavaOnevisionConfig(
                vision_config=siglip,
                text_config=qwen2,
                image_token_index=IMAGE,
                image_grid_pinpoints=PINPOINTS,
                vision_feature_layer=-1,
            )
        case "granite4_vision":
            return T.Granite4VisionConfig(
                vision_config=vit("siglip_vision_model", hidden_size=64),
                text_config={k: v for k, v in TEXT.items() if k != "head_dim"},
                qformer_config={
                    "model_type": "blip_2_qformer",
                    "num_hidden_layers": 1,
                    "intermediate_size": 32,
                    "hidden_size": 64,
                    "encoder_hidden_size": 64,
                    "num_attention_heads": 1,
                    "hidden_dropout_prob": 0.0,
                    "attention_probs_dropout_prob": 0.0,
                },
                projector_dropout=0.0,
                image_token_index=IMAGE,
                image_grid_pinpoints=PINPOINTS,
                vision_feature_select_strategy="full",
                downsample_rate="1/2",
                deepstack_layer_map=[(-2, 0)],
                spatial_target_layers=[1],
            )
        case "internvl" | "qianfan_ocr":
            of_family = {"internvl": T.InternVLConfig, "qianfan_ocr": T.QianfanOCRConfig}[family]
            return of_family(
                vision_config=vit(**({} if family == "internvl" else {"drop_path_rate": 0.0})),
                text_config=text({"internvl": "qwen2", "qianfan_ocr": "qwen3"}[family]),
                image_token_id=IMAGE,
                image_seq_length=4,
            )
        case "paligemma":
            return T.PaliGemmaConfig(
                vision_config=vit("siglip_vision_model", projection_dim=32, vision_use_head=False),
                text_config=text("gemma"),
                image_token_index=IMAGE,
                projection_dim=32,
                hidden_size=32,
            )
        case "gemma3":
            return T.Gemma3Config(
                vision_config=vit("siglip_vision_model", vision_use_head=False),
                text_config={**TEXT, "sliding_window": 64},
                image_token_index=IMAGE,
                image_token_id=IMAGE,
                mm_tokens_per_image=4,
            )
        case "gemma3n":
            return T.Gemma3nConfig(
                vision_config={
                    "architecture": "test_efficientnet",  # of the kind of MobileNetV5
                    "model_args": {"pretrained_cfg_overlay": {"input_size": (3, 64, 64)}},
                    "hidden_size": 256,
                    "vocab_size": 16,
                    "vocab_offset": 100,
                },
                text_config={
                    **TEXT,
                    "vocab_size_per_layer_input": 99,
                    "hidden_size_per_layer_input": 16,
                    "num_hidden_layers": 4,
                    "layer_types": ["sliding_attention", "full_attention"] * 2,
                    "num_kv_shared_layers": 0,
                    "laurel_rank": 8,
                    "sliding_window": 64,
                },
                audio_config={
                    "hidden_size": 16,
                    "conf_num_attention_heads": 2,
                    "conf_num_hidden_layers": 1,
                    "vocab_size": 8,
                },
                image_token_id=IMAGE,
                vision_soft_tokens_per_image=4,
            )
        case "idefics2":
            return T.Idefics2Config(
                vision_config=vit(),
                perceiver_config={
                    "hidden_size": 32,
                    "resampler_n_latents": 3,
                    "resampler_depth": 1,
                    "resampler_n_heads": 2,
                    "num_key_value_heads": 1,
                    "resampler_head_dim": 8,
                },
                text_config=text("mistral"),
                image_token_id=IMAGE,
            )
        case "idefics3" | "smolvlm":
            of_family = {"idefics3": T.Idefics3Config, "smolvlm": T.SmolVLMConfig}[family]
            return of_family(vision_config=vit(), text_config=llama, image_token_id=IMAGE, scale_factor=2)
        case "aria":
            return T.AriaConfig(
                vision_config=Idefics3VisionConfig(**VIT),
                text_config=T.AriaTextConfig(**TEXT, moe_num_experts=2, moe_topk=1, moe_num_shared_experts=1),
                image_token_index=IMAGE,
                projector_patch_to_query_dict={16: 3},
            )
        case "aya_vision":
            return T.AyaVisionConfig(vision_config=siglip, text_config=text("cohere2"), image_token_index=IMAGE)
        case "cohere2_vision":
            return T.Cohere2VisionConfig(
                vision_config=siglip, text_config=text("cohere2"), image_token_id=IMAGE, alignment_intermediate_size=64
            )
        case "got_ocr2":
            return T.GotOcr2Config(
                vision_config=vit(
                    mlp_dim=48,
                    initializer_range=0.02,
                    output_channels=32,
                    window_size=2,
                    global_attn_indexes=[2],
                    image_size=64,
                ),
                text_config=qwen2,
                image_token_index=IMAGE,
            )
        case "fast_vlm":
            return T.FastVlmConfig(
                vision_config={
                    "model_type": "timm_wrapper",
                    "architecture": "fastvit_mci3",
                    "do_pooling": True,
                    "global_pool": "avg",
                    "hidden_size": 64,
                    "model_args": {
                        "layers": [1] * 5,
                        "embed_dims": [4, 8, 16, 32, 32],
                        "inference_mode": True,
                        "mlp_ratios": [1] * 5,
                    },
                },
                text_config=qwen2,
                image_token_index=IMAGE,
            )
        case "florence2":
            return T.Florence2Config(
                vision_config={
                    "embed_dim": [8, 8, 16, 16],
                    "depths": [1, 1, 1, 1],
                    "num_heads": [1, 1, 2, 2],
                    "num_groups": [1, 1, 2, 2],
                    "projection_dim": 32,
                    "window_size": 4,
                    "drop_path_rate": 0.0,
                },
                text_config={
                    "model_type": "bart",
                    "vocab_size": 99,
                    "d_model": 32,
                    "encoder_layers": 1,
                    "decoder_layers": 1,
                    "encoder_attention_heads": 2,
                    "decoder_attention_heads": 2,
                    "encoder_ffn_dim": 32,
                    "decoder_ffn_dim": 32,
                    "pad_token_id": 0,
                    "bos_token_id": 1,
                    "eos_token_id": 2,
                    "decoder_start_token_id": 2,
                    "dropout": 0.0,
                },
                image_token_id=IMAGE,
            )
        case "deepseek_vl":
            return T.DeepseekVLConfig(text_config=llama, vision_config=siglip, image_token_id=IMAGE)
        case "janus":
            return T.JanusConfig(
                text_config=llama,
                vision_config=vit(projection_dim=32, mlp_ratio=2),
                vq_config={
                    "embed_dim": 4,
                    "num_embeddings": 16,
                    "latent_channels": 4,
                    "base_channels": 32,
                    "channel_multiplier": [1, 1],
                    "num_res_blocks": 1,
                    "num_patches": 4,
                    "projection_dim": 32,
                    "image_token_embed_dim": 32,
                },
                image_token_id=IMAGE,
            )
        case "llama4":
            return T.Llama4Config(
                vision_config=vit(
                    vision_output_dim=64, projector_input_dim=64, projector_output_dim=64, intermediate_size=128
                ),
                text_config={
                    **TEXT,
                    "intermediate_size_mlp": 48,
                    "num_local_experts": 2,
                    "attention_chunk_size": 64,
                    "moe_layers": [],
                },
                image_token_index=IMAGE,
            )
        case "perception_lm":
            return T.PerceptionLMConfig(
                vision_config={
                    "model_type": "timm_wrapper",
                    "architecture": "vit_pe_core_large_patch14_336",
                    "model_args": TIMM,
                },
                text_config=llama,
                image_token_id=IMAGE,
            )
        case "ovis2":
            return T.Ovis2Config(
                vision_config=vit(vocab_size=24, num_visual_indicator_tokens=5, hidden_stride=2),
                text_config=qwen2,
                image_token_id=IMAGE,
                visual_indicator_token_ids=[20, 21, 22, 23, 24],
                vocab_size=99,
                hidden_size=32,
            )
        case "qwen2_vl":
            return T.Qwen2VLConfig(
                vision_config={
                    "depth": 2,
                    "embed_dim": 32,
                    "hidden_size": 32,
                    "num_heads": 2,
                    "mlp_ratio": 2,
                    "patch_size": 4,
                },
                text_config=TEXT | MROPE,
                **PACKED_IDS,
            )
        case "qwen2_5_vl":
            return T.Qwen2_5_VLConfig(
                vision_config={
                    "depth": 3,
                    "hidden_size": 32,
                    "out_hidden_size": 32,
                    "intermediate_size": 48,
                    "num_heads": 2,
                    "patch_size": 4,
                    "window_size": 16,
                    "fullatt_block_indexes": [1],
                },
                text_config=TEXT | MROPE,
                **PACKED_IDS,
            )
        case "qwen3_vl":
            return T.Qwen3VLConfig(
                vision_config={
                    "depth": 3,
                    "hidden_size": 32,
                    "out_hidden_size": 32,
                    "intermediate_size": 48,
                    "num_heads": 2,
                    "patch_size": 4,
                    "num_position_embeddings": 16,
                    "deepstack_visual_indexes": [0, 1],
                },
                text_config=TEXT | MROPE,
                **PACKED_IDS,
            )
        case "glm4v":
            return T.Glm4vConfig(
                vision_config={
                    "depth": 2,
                    "hidden_size": 32,
                    "out_hidden_size": 32,
                    "intermediate_size": 48,
                    "num_heads": 2,
                    "patch_size": 4,
                    "image_size": 32,
                },
                text_config=TEXT | MROPE,
                image_token_id=IMAGE,
                video_token_id=10,
                image_start_token_id=11,
                image_end_token_id=12,
                video_start_token_id=13,
                video_end_token_id=14,
            )
        case "mistral3":
            return T.Mistral3Config(
                vision_config=vit("pixtral", head_dim=16), text_config=text("mistral"), image_token_index=IMAGE
            )
        case "llava_pixtral":
            return T.LlavaConfig(
                vision_config=vit("pixtral", head_dim=16),
                text_config=text("mistral"),
                image_token_index=IMAGE,
                vision_feature_layer=-1,
                vision_feature_select_strategy="full",
            )
        case "lfm2_vl":
            return T.Lfm2VlConfig(
                vision_config=vit("siglip2_vision_model", num_patches=16, vision_use_head=False),
                text_config=text("lfm2", layer_types=["conv", "full_attention"]),
                image_token_id=IMAGE,
                projector_hidden_size=32,
            )
        case "gemma4":
            return T.Gemma4Config(
                vision_config=vit(
                    num_key_value_heads=2, head_dim=16, pooling_kernel_size=2, position_embedding_size=64
                ),
                text_config=TEXT
                | {
                    "hidden_size_per_layer_input": 8,
                    "vocab_size_per_layer_input": 99,
                    "sliding_window": 64,
                    "global_head_dim": 8,
                },
                audio_config=None,
                image_token_id=IMAGE,
                video_token_id=10,
                audio_token_id=11,
                boi_token_id=12,
                eoi_token_id=13,
            )
    raise KeyError(family)


MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
PACKED_IDS = {"image_token_id": IMAGE, "video_token_id": 10, "vision_start_token_id": 11, "vision_end_token_id": 12}


TIMM = {
    "embed_dim": 32,
    "img_size": [28, 28],
    "depth": 2,
    "num_heads": 2,
    "global_pool": "",
    "use_post_transformer_norm": False,
    "init_values": 0.1,
    "ref_feat_shape": [2, 2],
}
SQUARE = (
    *("aria", "aya_vision", "cohere2_vision", "deepseek_vl", "fast_vlm", "florence2", "gemma3", "gemma3n", "got_ocr2"),
    *("granite4_vision", "idefics2", "idefics3", "internvl", "janus", "llama4", "llava", "llava_next"),
    *("llava_onevision", "ovis2", "paligemma", "perception_lm", "qianfan_ocr", "smolvlm", "vipllava"),
)
PACKED = ("gemma4", "glm4v", "lfm2_vl", "llava_pixtral", "mistral3", "qwen2_5_vl", "qwen2_vl", "qwen3_vl")


def often(families: Iterable[str], *quick: str) -> list[object]:
    """Parameters for tests: the ``quick`` families always, the rest by `make test-more`."""
    return [pytest.param(one, marks=[] if one in quick else pytest.mark.more, id=one) for one in families]


def built(family: str) -> nn.Module:
    """A tiny model. Parameters that start at zero, or nearly, become random, so that every part has an effect."""
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(configured(family)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().max() < 1e-3:
                parameter.normal_(0, 0.1)
    return model


SIDES = {"fast_vlm": 128, "florence2": 64, "gemma3n": 64, "got_ocr2": 64, "perception_lm": 28}
"""Height and width of an image, where it is not 16 pixels."""


def inputs_for(model: nn.Module, family: str, images: int = 1) -> dict[str, Tensor]:
    """Two prompts with ``images`` random images each."""
    side = SIDES.get(family, 16)
    count = 2 * images
    inputs: dict[str, Tensor] = {}
    match family:
        case "llava_next" | "llava_onevision" | "granite4_vision":
            inputs["pixel_values"] = torch.randn(count, 5, 3, side, side)
            inputs["image_sizes"] = torch.tensor([[2 * side, 2 * side]] * count)
        case "idefics2" | "idefics3" | "smolvlm":
            inputs["pixel_values"] = torch.randn(2, images, 3, side, side)
        case "perception_lm":
            inputs["pixel_values"] = torch.randn(count, 1, 3, side, side)
        case "qwen2_vl" | "qwen2_5_vl" | "qwen3_vl" | "glm4v":  # 16 x 24 and 24 x 16 pixels
            inputs["pixel_values"] = torch.randn(count * 24, 3 * 2 * 4 * 4)
            inputs["image_grid_thw"] = torch.tensor([[1, 4, 6], [1, 6, 4]] * images)
        case "mistral3" | "llava_pixtral":
            inputs["pixel_values"] = torch.randn(count, 3, 24, 24)
            inputs["image_sizes"] = torch.tensor([[16, 24], [24, 16]] * images)
        case "lfm2_vl":
            inputs["pixel_values"] = torch.randn(count, 30, 3 * 4 * 4)
            inputs["spatial_shapes"] = torch.tensor([[4, 6], [6, 4]] * images)
            inputs["pixel_attention_mask"] = (torch.arange(30) < 24).int().expand(count, -1)
        case "gemma4":
            inputs["pixel_values"] = torch.rand(count, 28, 3 * 4 * 4)
            places = [torch.cartesian_prod(torch.arange(h), torch.arange(24 // h)).flip(1) for h in (4, 6)]
            inputs["image_position_ids"] = torch.stack(
                [torch.cat([p, torch.full((4, 2), -1)]) for p in places] * images
            )
        case _:
            inputs["pixel_values"] = torch.randn(count, 3, side, side)
    tokens = prompts(model, inputs, images)
    if family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "gemma4"):
        inputs["mm_token_type_ids"] = (tokens == IMAGE).int()
    return {"input_ids": tokens} | inputs


def prompts(model: nn.Module, inputs: dict[str, Tensor], images: int) -> Tensor:
    """Two prompts that hold as many image tokens as the model makes of the images."""
    with torch.no_grad():
        features = model.base_model.get_image_features(**inputs)
    found = features.pooler_output
    if found is None:  # of Granite, and of Llama 4, where the tower gives one for each
        found = features.deepstack_features[0][1] if "deepstack_features" in features else features.last_hidden_state
    total = sum(f[..., 0].numel() for f in found)
    return torch.tensor([[1, *([*[IMAGE] * (total // 2 // images), 5] * images), 6]] * 2)
