"""Training of INF-LLaVA in two stages, on transformers' Trainer.

Names are loaded when they are first asked for: they need transformers, accelerate, and what else the extra `train` has.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dualview.train.collator import Collator
    from dualview.train.config import BaseConfig, DataConfig, LoraConfig, StageConfig, TrainConfig
    from dualview.train.dataset import LlavaDataset
    from dualview.train.features import FeatureCache
    from dualview.train.parts import freeze
    from dualview.train.run import train
    from dualview.train.stages import training_arguments
    from dualview.train.trainer import DualViewTrainer

_HOMES = {
    "collator": ("Collator",),
    "config": ("BaseConfig", "DataConfig", "LoraConfig", "StageConfig", "TrainConfig"),
    "dataset": ("LlavaDataset",),
    "features": ("FeatureCache",),
    "parts": ("freeze",),
    "run": ("train",),
    "stages": ("training_arguments",),
    "trainer": ("DualViewTrainer",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "BaseConfig",
    "Collator",
    "DataConfig",
    "DualViewTrainer",
    "FeatureCache",
    "LlavaDataset",
    "LoraConfig",
    "StageConfig",
    "TrainConfig",
    "freeze",
    "train",
    "training_arguments",
]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(f"dualview.train.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
