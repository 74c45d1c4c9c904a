"""Encoders and models assembled from the ops.

The ``InfLlava*`` names load transformers when they are first asked for, and register INF-LLaVA with its Auto classes.
"""

from typing import TYPE_CHECKING, Any

from dualview.models.adapter.attach import attach, attached, detach
from dualview.models.adapter.files import load_adapter, save_adapter
from dualview.models.adapter.processors import adapt_processor
from dualview.models.dual_view_encoder import DualViewEncoder
from dualview.models.encoders import HfEncoder, OpenClipEncoder, TimmEncoder

if TYPE_CHECKING:
    from dualview.models.inf_llava import (
        InfLlavaConfig,
        InfLlavaForConditionalGeneration,
        InfLlavaImageProcessor,
        InfLlavaModel,
        InfLlavaProcessor,
        convert_inf_llava,
    )

__all__ = [
    "DualViewEncoder",
    "HfEncoder",
    "InfLlavaConfig",
    "InfLlavaForConditionalGeneration",
    "InfLlavaImageProcessor",
    "InfLlavaModel",
    "InfLlavaProcessor",
    "OpenClipEncoder",
    "TimmEncoder",
    "adapt_processor",
    "attach",
    "attached",
    "convert_inf_llava",
    "detach",
    "load_adapter",
    "save_adapter",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        try:
            from dualview.models import inf_llava
        except ModuleNotFoundError as error:
            raise ImportError(
                f"dualview.models.{name} needs transformers, torchvision and pillow ({error}): "
                'run pip install -e ".[hf]" in your clone.'
            ) from error
        return getattr(inf_llava, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
