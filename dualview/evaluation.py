"""The entry point by which lmms-eval finds the model: `lmms_eval --model dualview --model_args pretrained=DIR`."""

from __future__ import annotations

from typing import Any


def manifests() -> Any:
    """What lmms-eval's group of entry points `lmms_eval.models` asks for; lmms-eval itself calls it."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("dualview", simple_class_path="dualview.lmms_model.DualViewLmms")
