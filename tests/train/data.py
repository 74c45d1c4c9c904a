"""A tiny INF-LLaVA, captions and conversations of letters, and a configuration that trains it in seconds."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dualview.train import TrainConfig
from tests.tiny import TINY_LLM, tiny_model, tiny_processor

PICTURES = 8


def turns(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


CAPTIONS = [{"image": f"{i}.png", "conversations": turns("<image>\nsay", f"a cat {'abc'[i % 3]}")} for i in range(8)]
CHATS = [
    *({"image": f"{i}.png", "conversations": turns("<image>\nwhat", f"it is {'abc'[i % 3]}", "sure", "yes")}
      for i in range(6)),
    *({"conversations": turns("hello" * i, "hi you")} for i in range(1, 6)),
    {"image": ["0.png", "1.png"], "conversations": turns("<image>\n<image>\nsame", "no")},
]  # fmt: skip


def write_data(folder: Path, dropout: float = 0.0, **options) -> Path:
    """Pictures, rows and a model of random weights; with dropout the state of random numbers matters."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i in range(PICTURES):
        Image.fromarray(rng.integers(0, 256, (30 + 4 * i, 90, 3), dtype=np.uint8)).save(folder / "images" / f"{i}.png")
    (folder / "captions.json").write_text(json.dumps(CAPTIONS))
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, CHATS)))
    tiny_model(text_config=TINY_LLM | {"attention_dropout": dropout}).save_pretrained(folder / "base")
    tiny_processor(**options).save_pretrained(folder / "base")
    return folder


def fields(folder: Path, output: str = "run", **stage2) -> dict:
    """Three steps of stage 1, six of stage 2 in two epochs."""
    common = {"batch_size": 4, "precision": "fp32", "workers": 0, "learning_rate": 5e-3, "warmup_ratio": 0.0}
    rows = {"captions.json": "stage1", "chats.jsonl": "stage2"}
    stages = {
        name: {"data": [{"file": str(folder / file), "images": str(folder / "images")}], **common}
        for file, name in rows.items()
    }
    stages["stage1"] |= {"max_steps": 3, "save_steps": 2}
    stages["stage2"] |= {"epochs": 2, "save_steps": 2, "rows_per_device": 2, **stage2}
    return {"model": str(folder / "base"), "output": str(folder / output), "seed": 3, **stages}


def config(folder: Path, output: str = "run", **stage2) -> TrainConfig:
    return TrainConfig.of(fields(folder, output, **stage2))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")
