"""Memory and time of training INF-LLaVA-8B on 1, 8 and 64 GPUs, computed, not measured: the table of docs/training.md.

Everything that is assumed stands here by name. Parameters are counted on INF-LLaVA's own classes, on no memory.

    python scripts/training_sizes.py
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import CLIPVisionConfig, LlamaConfig

from dualview.models import InfLlavaConfig, InfLlavaForConditionalGeneration

GIB = 2**30
PEAK = 989e12
"""Products of bfloat16 that an H100 SXM computes in a second at most, by its data sheet."""
SHARE_OF_PEAK = 0.4
"""What of it large language models reach in training, by published reports."""
NETWORK = {1: None, 8: 450e9, 64: 50e9}
"""Bytes that a GPU receives in a second: NVLink within 8 GPUs, a network of 400 Gbit/s a GPU beyond; data sheets."""
TOKENS = {"stage1": 640, "stage2": 1024}
"""Of a row: 576 of the image, the rest text."""
VIEWS, VIEW_TOKENS, LAYERS_RUN = 10, 577, 23 / 24
"""Sub-images of a picture, tokens of each, and the part of the tower's layers that is run: see docs/fast-path.md."""
BATCH = {"stage1": 256, "stage2": 128}
ROWS = {"stage1": 16, "stage2": 8}
"""Rows of one pass, where the batch reaches."""
LAYER_BYTES = 34
"""Bytes a token and a unit of width that the backward pass of one layer holds; attention keeps no square matrix."""
LOGIT_BYTES = 2 + 4 + 4
"""Logits in bfloat16 and float32, and their gradient."""
MARGIN = 1.1
"""For fragmentation, and what is not counted."""


@dataclass(frozen=True)
class Parts:
    """Numbers of parameters, and sizes of the language model."""

    tower: int
    dem_and_projector: int
    language_model: int
    layer: int
    layers: int
    width: int
    vocabulary: int


def parts() -> Parts:
    """Counted on the classes, with the released sizes."""
    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=128320, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = InfLlavaForConditionalGeneration(
            InfLlavaConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), image_token_id=128257)
        )

    def count(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    inner = model.model
    dem = count(inner.dem) + count(inner.multi_modal_projector)
    language = count(model) - count(inner.vision_tower) - dem
    layer = count(inner.language_model.layers[0])
    return Parts(count(inner.vision_tower), dem, language, layer, 32, 4096, 128320)


def memory(of: Parts, stage: str, gpus: int, *, sharded: bool, lora: int = 0) -> float:
    """Bytes on one GPU: weights of float32, gradients and Adam's two moments of what is trained, and activations."""
    everything = of.tower + of.dem_and_projector + of.language_model + lora
    trained = of.dem_and_projector + (0 if stage == "stage1" else lora or of.language_model)
    states = 4 * everything + (4 + 8) * trained
    rows = min(ROWS[stage], BATCH[stage] // gpus)
    tokens = rows * TOKENS[stage]
    kept = tokens * of.width * of.layers * 2  # what each layer reads, in bfloat16
    peak = max(tokens * of.width * LAYER_BYTES, tokens * of.vocabulary * LOGIT_BYTES)
    outside = everything - of.layers * of.layer  # embeddings, head and tower are gathered for the whole of a step
    gathered = 2 * (outside + 2 * of.layer) if sharded else 0
    return MARGIN * (states / (gpus if sharded else 1) + gathered + kept + peak)


def seconds(of: Parts, stage: str, gpus: int, *, sharded: bool, lora: int = 0) -> float:
    """Of one step over the whole batch: products, or what the network carries where that takes longer."""
    tokens = BATCH[stage] * TOKENS[stage]
    passes = 6 if stage == "stage1" or lora else 8  # forward, again, and backward; gradients of weights where trained
    language = passes * of.language_model * tokens
    vision = 2 * of.tower * LAYERS_RUN * VIEWS * VIEW_TOKENS * BATCH[stage]
    computing = (language + vision) / (gpus * PEAK * SHARE_OF_PEAK)
    trained = of.dem_and_projector + (0 if stage == "stage1" else lora or of.language_model)
    steps = max(1, BATCH[stage] // (gpus * ROWS[stage]))
    # Sharded weights in bfloat16 come twice a pass and gradients go once; else gradients of float32 are summed once.
    carried = 3 * 2 * of.language_model * steps if sharded else 2 * 4 * trained
    network = NETWORK[gpus]
    return computing if network is None else max(computing, carried / network)


def table() -> str:
    """The rows of docs/training.md."""
    of, lora = parts(), 335_544_320  # rank 128 in all products of 32 layers
    cases = [
        ("1, DDP", "stage1", 1, False, 0, 595_000),
        ("2, LoRA", "stage2", 1, False, lora, 665_000),
        ("2", "stage2", 1, False, 0, 665_000),
        ("1, DDP", "stage1", 8, False, 0, 595_000),
        ("2, FSDP2", "stage2", 8, True, 0, 665_000),
        ("1, DDP", "stage1", 64, False, 0, 595_000),
        ("2, FSDP2", "stage2", 64, True, 0, 665_000),
    ]
    lines = [
        "| GPUs | stage | memory of one, GiB | fits 80 GB | one step, s | one epoch, h |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, stage, gpus, sharded, extra, rows in cases:
        size = memory(of, stage, gpus, sharded=sharded, lora=extra) / GIB
        time = seconds(of, stage, gpus, sharded=sharded, lora=extra)
        fits = "yes" if size < 80e9 / GIB else "no"
        lines.append(
            f"| {gpus} | {name} | {size:.0f} | {fits} | {time:.1f} | {time * rows / BATCH[stage] / 3600:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
