"""The model that training begins with: a vision tower, a language model, and between them what is not trained yet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
)

from dualview.arguments import check_instance, shown
from dualview.outputs import new_folder
from dualview.train.config import BaseConfig

IMAGE_TOKEN = "<image>"
ROWS = 64
"""The vocabulary gets a multiple of so many rows, as fast products want them."""
LLAMA_3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def make_base(base: BaseConfig, folder: Path, seed: int) -> None:
    """Write an INF-LLaVA of pretrained parts, with a random enhancement module and projector, and its processor.

    The weights have the type of the language model's. The tokenizer gets the token ``<image>``, and a pad token where
    it has none.

    Args:
        base: Where the parts are, and how they are joined.
        folder: Appears when it is complete.
        seed: Of what is random.

    Raises:
        ValueError: A part cannot be used, or the chat template is missing.
    """
    from dualview.models.inf_llava import (
        InfLlavaConfig,
        InfLlavaForConditionalGeneration,
        InfLlavaImageProcessor,
        InfLlavaProcessor,
    )

    with _part("language_model", base.language_model):
        tokenizer = AutoTokenizer.from_pretrained(base.language_model)
    template = _template(base, tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    with _part("language_model", base.language_model):
        language_model = _loaded(AutoModelForCausalLM, base.language_model, dtype="auto")
    rows = max(len(tokenizer), language_model.get_input_embeddings().num_embeddings)
    language_model.resize_token_embeddings(-(-rows // ROWS) * ROWS, mean_resizing=False)
    language_model.config.pad_token_id = tokenizer.pad_token_id

    with _part("vision_tower", base.vision_tower):
        tower = _tower(base.vision_tower, language_model.dtype)
    config = InfLlavaConfig(
        vision_config=tower.config.to_dict(),
        text_config=language_model.config.to_dict(),
        grid=base.grid,
        dem=dict(base.dem),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
    )
    torch.manual_seed(seed)
    model = InfLlavaForConditionalGeneration(config).to(language_model.dtype)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language_model.get_decoder().state_dict())
    model.lm_head.load_state_dict(language_model.get_output_embeddings().state_dict())
    model.tie_weights()
    model.generation_config = _generation(language_model, tokenizer)

    height, width = (side * tile for side, tile in zip(base.grid, config.tile, strict=True))
    pixels = InfLlavaImageProcessor(size=max(height, width), tile_size=config.tile)
    processor = InfLlavaProcessor(pixels, tokenizer, config.image_seq_length or 0, IMAGE_TOKEN, template)
    with new_folder(folder) as made:
        model.save_pretrained(made)
        processor.save_pretrained(made)


def _tower(name: str, kind: torch.dtype) -> Any:
    """The vision tower, also out of a model of images and text."""
    config = AutoConfig.from_pretrained(name)
    config = getattr(config, "vision_config", config)
    with torch.device("meta"):
        found = type(AutoModel.from_config(config))
    return _loaded(found, name, config=config, dtype=kind)


def _loaded(kind: Any, name: str, **options: Any) -> Any:
    from dualview.models.inf_llava.shards import check_loaded

    model, report = kind.from_pretrained(name, output_loading_info=True, **options)
    check_loaded(name, report, whole=False)  # of a model of images and text, a part is taken
    return model


@contextmanager
def _part(field: str, name: str) -> Iterator[None]:
    """What transformers says of a part that it cannot load is said of the field that names it."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"model.{field}={shown(name)}: cannot be loaded; give a directory or a name on the hub: {error}"
        ) from error


def _template(base: BaseConfig, tokenizer: Any) -> str | None:
    if base.chat_template is not None:
        file = Path(base.chat_template)
        if not file.is_file():
            raise ValueError(f"model.chat_template={base.chat_template}: no such file.")
        return file.read_text(encoding="utf-8")
    unknown = (None, tokenizer.unk_token_id)
    if missing := [token for token in LLAMA_3 if tokenizer.convert_tokens_to_ids(token) in unknown]:
        raise ValueError(
            f"{base.language_model}: the tokenizer has no {', '.join(missing)}, and the chat template of INF-LLaVA is "
            "in the format of Llama 3. Give a file with one of your own by model.chat_template; it writes <image> for "
            "each part of type image, and {% generation %} and {% endgeneration %} around an assistant's text and end."
        )
    return None  # INF-LLaVA's own


def _generation(language_model: Any, tokenizer: Any) -> GenerationConfig:
    """As the language model's, ended by the end of a turn, too; the image token and unused rows are not generated."""
    made = GenerationConfig.from_dict(language_model.generation_config.to_dict())
    known = tokenizer.get_vocab()
    ends = {known[token] for token in ("<|eot_id|>", tokenizer.eos_token) if token in known}
    image, rows = known[IMAGE_TOKEN], language_model.get_input_embeddings().num_embeddings
    made.update(
        eos_token_id=sorted(ends) or made.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=sorted({image, *range(len(tokenizer), rows)}),
    )
    return made


def load(source: str | Path) -> tuple[Any, Any]:
    """Model, with weights of float32, and processor of a directory.

    Raises:
        ValueError: There is no INF-LLaVA, or no processor of one, or they do not belong together.
    """
    from dualview.models.inf_llava import InfLlavaForConditionalGeneration
    from dualview.models.inf_llava.shards import check_loaded

    processor = load_processor(source)
    model, report = InfLlavaForConditionalGeneration.from_pretrained(
        source, dtype=torch.float32, output_loading_info=True
    )
    check_loaded(source, report)
    return model, processor


def load_outline(source: str | Path) -> Any:
    """The model of a directory without its weights, on the meta device."""
    from dualview.models.inf_llava import InfLlavaConfig, InfLlavaForConditionalGeneration

    config = InfLlavaConfig.from_pretrained(source)
    with torch.device("meta"):
        return InfLlavaForConditionalGeneration(config)


def load_processor(source: str | Path) -> Any:
    """The processor of a directory with an INF-LLaVA.

    Raises:
        ValueError: There is no model, or no processor, or the tokenizer is that of another language model.
    """
    from dualview.models.inf_llava import InfLlavaConfig, InfLlavaProcessor

    said = f"model={shown(str(source))}: "
    if not Path(source, "config.json").is_file():
        raise ValueError(f"{said}no model there; `dualview convert` makes such a directory.")
    try:
        processor = AutoProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"{said}its processor cannot be loaded: {error}") from error
    check_instance(processor, "processor", InfLlavaProcessor, "an InfLlavaProcessor")
    rows = InfLlavaConfig.from_pretrained(source).text_config.vocab_size
    if (last := max(processor.tokenizer.get_vocab().values())) >= rows:
        raise ValueError(
            f"{said}its tokenizer has ids up to {last}, and the language model {rows} rows: put the tokenizer of this "
            "language model into the directory."
        )
    return processor
