"""A small vision tower that reads glyphs. Importing this package registers it with the Auto classes."""

from transformers import AutoConfig, AutoModel

from dualview.models.reader.configuration_reader import ReaderVisionConfig
from dualview.models.reader.modeling_reader import ReaderVisionModel

__all__ = ["ReaderVisionConfig", "ReaderVisionModel"]

AutoConfig.register(ReaderVisionConfig.model_type, ReaderVisionConfig)
AutoModel.register(ReaderVisionConfig, ReaderVisionModel)
