"""Frozen encoders of the probe: the small vision tower, trained from nothing by a seed, on pages of its own kind."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dualview.outputs import new_folder
from dualview.probe.features import Encode

TRAINING = (
    "dualview.models.reader.modeling_reader",
    *(f"dualview.reader.{name}" for name in ("pretrain", "pages", "drawing", "glyphs", "descent")),
)
"""Modules whose code decides what a tower becomes, besides its seed, its steps and its sizes."""


def pretrained_tower(
    seed: int,
    steps: int,
    *,
    device: torch.device | str = "cpu",
    folder: Path | None = None,
    watch: Callable[[int, float], None] | None = None,
) -> nn.Module:
    """The small vision tower after so many steps of its own training.

    Args:
        seed: Of its weights and of its pages.
        steps: How many.
        device: Where to train.
        folder: Where towers are kept, so that the next call need not train: under the name that `name_of` gives.
        watch: Called with step and loss.
    """
    from dualview.models.reader import ReaderVisionConfig, ReaderVisionModel
    from dualview.reader.pretrain import pretrain

    kept = None if folder is None else folder / name_of(seed, steps)
    if kept is not None and kept.is_dir():
        found: nn.Module = ReaderVisionModel.from_pretrained(kept)
        return found.to(device).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower = ReaderVisionModel(ReaderVisionConfig())
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
    pretrain(tower, steps, seed=seed, device=device, watch=watch)
    if kept is not None:
        with new_folder(kept) as half:
            tower.save_pretrained(half)
    trained: nn.Module = tower.eval()
    return trained


def name_of(seed: int, steps: int) -> str:
    """The name of a tower by all that decides its weights but rounding: other sizes or other code give another one.

    Example:
        >>> name_of(0, 2000).rpartition("-")[0]
        'tower-0-2000'
    """
    from dualview.models.reader import ReaderVisionConfig

    config: dict[str, Any] = ReaderVisionConfig().to_dict()
    sizes = {name: value for name, value in config.items() if name != "transformers_version"}
    said = [json.dumps([seed, steps, sizes], sort_keys=True)]
    said += [inspect.getsource(importlib.import_module(module)) for module in TRAINING]
    return f"tower-{seed}-{steps}-{hashlib.sha256(json.dumps(said).encode()).hexdigest()[:12]}"


def encoder_of(tower: nn.Module, at_once: int = 512) -> Encode:
    """Pixels from 0 to 1 to a map of tokens, by a tower of patches of 14 pixels."""
    from dualview.reader.pretrain import MEAN, STD

    patch = int(cast(int, tower.config.patch_size))  # type: ignore[union-attr]

    @torch.no_grad()
    def encode(pixels: Tensor) -> Tensor:
        size = (pixels.shape[-2] // patch, pixels.shape[-1] // patch)
        parts = [tower((part - MEAN) / STD).last_hidden_state for part in pixels.split(at_once)]
        tokens: Tensor = torch.cat(parts).unflatten(1, size)
        return tokens

    return encode
