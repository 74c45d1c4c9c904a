"""What an attached module costs: a forward of a host with it, beside the host alone."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import dualview as dv
from benchmarks.cases import OURS, TOLERANCE, Case, Comparison, Size
from benchmarks.measure import Place

ALONE = "the host alone"
GRID = (2, 2)
IMAGE = 60


def attached(size: Size) -> Iterable[Case]:
    """Two hosts of the proportions of a trained one: a language model of twenty times the tower's weights."""
    side, width, layers, text, blocks = (112, 32, 2, 32, 1) if size == "tiny" else (336, 256, 6, 1024, 8)
    for kind, sources in (("llava", ("upsample", "hires")), ("qwen2_5_vl", ("upsample", "native", "hires"))):
        for source in sources:
            for part in ("features", "forward"):
                params = {"kind": kind, "source": source, "part": part, "side": side, "d": width, "layers": layers}
                build = partial(_with_and_without, **params, text=text, blocks=blocks if part == "forward" else 1)
                what = "features of an image" if part == "features" else "whole forward"
                yield Case("attach", f"{kind}, {source}: {what}", params, build)


def _with_and_without(
    place: Place, kind: str, source: Any, part: str, side: int, d: int, layers: int, text: int, blocks: int
) -> Comparison:
    make = {"llava": _llava, "qwen2_5_vl": _qwen}[kind]
    host, plain = (make(side, d, layers, text, blocks).eval().to(place.device, place.dtype) for _ in range(2))
    dv.attach(host, GRID, source)
    stock, large = (_pixels(kind, side, wanted, place) for wanted in ("upsample", source))
    with torch.no_grad():
        tokens = sum(len(one) for one in plain.model.get_image_features(**stock).pooler_output)
    ids = torch.tensor([[IMAGE] * tokens + [5] * 32], device=place.device)
    extra = {"mm_token_type_ids": (ids == IMAGE).int()} if kind == "qwen2_5_vl" else {}

    @torch.no_grad()
    def run(model: Any, pixels: dict[str, Tensor]) -> Tensor:
        if part == "features":
            return torch.cat(list(model.model.get_image_features(**pixels).pooler_output))
        logits: Tensor = model(input_ids=ids, **extra, **pixels).logits
        return logits

    sides = {OURS: partial(run, host, large), ALONE: partial(run, plain, stock)}
    return Comparison(sides, None, TOLERANCE[place.dtype], frozenset({ALONE}))


def _text(text: int, blocks: int) -> dict[str, Any]:
    return {
        "hidden_size": text,
        "intermediate_size": 4 * text,
        "num_hidden_layers": blocks,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 64,
    }


def _llava(side: int, d: int, layers: int, text: int, blocks: int) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=d,
        intermediate_size=4 * d,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=side,
        patch_size=14,
    )
    words = LlamaConfig(**_text(text, blocks))
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=words, image_token_index=IMAGE))


def _qwen(side: int, d: int, layers: int, text: int, blocks: int) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        "hidden_size": d,
        "intermediate_size": 4 * d,
        "depth": layers,
        "num_heads": 4,
        "out_hidden_size": text,
        "fullatt_block_indexes": [layers - 1],
    }
    section = [text // 16 - 2 * (text // 64), text // 64, text // 64]  # of half a head
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section}
    words = _text(text, blocks) | {"rope_parameters": rope}
    ids = {"image_token_id": IMAGE, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(vision_config=vision, text_config=words, **ids))


def _pixels(kind: str, side: int, source: str, place: Place) -> dict[str, Tensor]:
    """One image, as the processor that goes with the source delivers it."""
    if kind == "llava":
        n = 2 if source == "hires" else 1
        return {"pixel_values": place.randn(1, 3, n * side, n * side)}
    rows = side // 14
    patches = place.randn(rows * rows * (5 if source == "hires" else 1), 3 * 2 * 14 * 14)
    return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, rows, rows]], device=place.device)}
