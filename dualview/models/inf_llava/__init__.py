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

__all__ = [
    "InfLlavaConfig",
    "InfLlavaForConditionalGeneration",
    "InfLlavaImageProcessor",
    "InfLlavaModel",
    "InfLlavaProcessor",
    "convert_inf_llava",
]

AutoConfig.register(InfLlavaConfig.model_type, InfLlavaConfig)
AutoModel.register(InfLlavaConfig, InfLlavaModel)
AutoModelForImageTextToText.register(InfLlavaConfig, InfLlavaForConditionalGeneration)
AutoModelForMultimodalLM.register(InfLlavaConfig, InfLlavaForConditionalGeneration)
AutoImageProcessor.register(InfLlavaConfig, image_processor_classes={"torchvision": InfLlavaImageProcessor})
AutoProcessor.register(InfLlavaConfig, InfLlavaProcessor)
