"""An INF-LLaVA of a few thousand weights, with a tokenizer of letters."""

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dualview.models import InfLlavaConfig, InfLlavaForConditionalGeneration, InfLlavaImageProcessor, InfLlavaProcessor

TINY_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
TINY_LLM = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 2048,
}
IMAGE = 63


def tiny_config(**changes):
    fields = {"vision_config": dict(TINY_TOWER), "text_config": dict(TINY_LLM), "grid": (2, 3), "image_token_id": IMAGE}
    return InfLlavaConfig(**(fields | changes))


def tiny_model(**changes):
    torch.manual_seed(0)
    return InfLlavaForConditionalGeneration(tiny_config(**changes)).eval()


def prompt(batch=1, images=1):
    """Token ids: BOS, the image tokens of each image, some text."""
    row = [1] + [IMAGE] * (4 * images) + [5, 6, 7]
    return torch.tensor([row] * batch)


def tiny_tokenizer():
    words = [
        "<pad>",
        "<s>",
        "<|eot_id|>",
        "<unk>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "system",
        "user",
        "assistant",
    ]
    words += [*"abcdefghijklmnopqrstuvwxyzA'.,\n "]
    vocab = {word: i for i, word in enumerate(words)} | {"<image>": IMAGE}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(pattern="", behavior="isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="<|eot_id|>", unk_token="<unk>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<image>", "<|start_header_id|>", "<|end_header_id|>"]})
    return fast


def tiny_processor(**options):
    size = {} if "max_tiles" in options else {"size": 84}
    image_processor = InfLlavaImageProcessor(tile_size=28, **size, **options)
    return InfLlavaProcessor(image_processor, tiny_tokenizer(), image_seq_length=4)


def photograph(height=60, width=90):
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
