"""Training of INF-LLaVA in two stages, on transformers' Trainer."""

from dualview.train.collator import Collator
from dualview.train.config import DataConfig, LoraConfig, StageConfig, TrainConfig
from dualview.train.dataset import LlavaDataset
from dualview.train.checkpoints import checkpoints
from dualview.train.features import FeatureCache
from dualview.train.run import train
from dualview.train.stages import freeze, training_arguments
from dualview.train.trainer import DualViewTrainer

__all__ = [
    "Collator",
    "DataConfig",
    "DualViewTrainer",
    "FeatureCache",
    "LlavaDataset",
    "LoraConfig",
    "StageConfig",
    "TrainConfig",
    "checkpoints",
    "freeze",
    "train",
    "training_arguments",
]
