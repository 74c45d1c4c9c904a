"""INF-LLaVA on the conventions of transformers. Importing this package registers it with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from dualview.models.inf_llava.configuration_inf_llava import InfLlavaConfig
from dualview.models.inf_llava.convert import convert_inf_llava
from dualview.models.inf_llava.image_processing_inf_llava import InfLlavaImageProcessor
from dualview.models.inf_llava.modeling_inf_llava import InfLlavaForConditionalGeneration, InfLlavaModel
from dualview.models.inf_llava.processing_inf_llava import InfLlavaProcessor
from dualview.models.reader import ReaderVisionConfig, ReaderVisionModel

__all__ = [
    "InfLlavaConfig",
    "InfLlavaForConditionalGeneration",
    "InfLlavaImageProcessor",
    "InfLlavaModel",
    "InfLlavaProcessor",
    "ReaderVisionConfig",
    "ReaderVisionModel",
    "convert_inf_llava",
]


def register() -> None:
    """Make the model known to the Auto classes, as importing does: an entry point of servers, called more than once."""
    AutoConfig.register(InfLlavaConfig.model_type, InfLlavaConfig, exist_ok=True)
    AutoModel.register(InfLlavaConfig, InfLlavaModel, exist_ok=True)
    AutoModelForImageTextToText.register(InfLlavaConfig, InfLlavaForConditionalGeneration, exist_ok=True)
    AutoModelForMultimodalLM.register(InfLlavaConfig, InfLlavaForConditionalGeneration, exist_ok=True)
    processors = {"torchvision": InfLlavaImageProcessor}
    AutoImageProcessor.register(InfLlavaConfig, image_processor_classes=processors, exist_ok=True)
    AutoProcessor.register(InfLlavaConfig, InfLlavaProcessor, exist_ok=True)


register()
