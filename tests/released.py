"""A released INF-LLaVA of any size: its tensors by name, its configuration and its tokenizer."""

import json
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TOWER = "model.vision_tower.vision_tower.vision_model."
SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<pad>")


class Sizes(NamedTuple):
    """Widths and counts; the default is what was published."""

    rows: int = 128257
    llm: int = 4096
    kv: int = 1024
    mlp: int = 14336
    layers: int = 32
    tower: int = 1024
    positions: int = 577
    blocks: int = 24


LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())
TINY = Sizes(rows=len(LETTERS) + len(SPECIAL), llm=48, kv=24, mlp=64, layers=2, tower=64, positions=5, blocks=3)


def released_shapes(sizes=TINY):
    """Names and shapes of every tensor of a released checkpoint."""
    d, c = sizes.llm, sizes.tower
    shapes = {"model.embed_tokens.weight": (sizes.rows, d)}
    linear, norms = {}, []
    for i in range(sizes.layers):
        at = f"model.layers.{i}."
        widths = {"q": d, "k": sizes.kv, "v": sizes.kv, "o": d}
        shapes |= {f"{at}self_attn.{name}_proj.weight": (width, d) for name, width in widths.items()}
        shapes |= {f"{at}mlp.{name}_proj.weight": (sizes.mlp, d) for name in ("gate", "up")}
        shapes |= {f"{at}mlp.down_proj.weight": (d, sizes.mlp)}
        shapes |= {f"{at}{name}_layernorm.weight": (d,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (d,)}
    linear |= {f"model.spatial_embed.attention.linears.{i}": (c, c) for i in range(4)}
    for way in ("crop", "stride"):
        linear |= {
            f"model.spatial_embed.ffn_{way}.0": (c // 16, c),
            f"model.spatial_embed.ffn_{way}.2": (c // 2, c // 16),
        }
    linear |= {"model.mm_projector.0": (d, c), "model.mm_projector.2": (d, d)}
    norms += ["model.spatial_embed.attention.ln", "model.spatial_embed.ln_fuse"]
    shapes |= {f"{TOWER}embeddings.class_embedding": (c,), f"{TOWER}embeddings.patch_embedding.weight": (c, 3, 14, 14)}
    shapes |= {f"{TOWER}embeddings.position_embedding.weight": (sizes.positions, c)}
    norms += [f"{TOWER}pre_layrnorm", f"{TOWER}post_layernorm"]
    for i in range(sizes.blocks):
        at = f"{TOWER}encoder.layers.{i}."
        linear |= {f"{at}self_attn.{name}_proj": (c, c) for name in ("k", "v", "q", "out")}
        linear |= {f"{at}mlp.fc1": (4 * c, c), f"{at}mlp.fc2": (c, 4 * c)}
        norms += [f"{at}layer_norm1", f"{at}layer_norm2"]
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (c,), f"{name}.bias": (c,)}
    return shapes | {"lm_head.weight": (sizes.rows, d)}


def released_tensors(sizes=TINY, dtype=torch.float32):
    """Random ones, of a scale at which a small model still tells its inputs apart."""
    made = {}
    for name, shape in released_shapes(sizes).items():
        scale = 0.2 if len(shape) > 1 else 0.1
        made[name] = (torch.randn(shape) * scale + (1.0 if "norm" in name and name.endswith("weight") else 0.0)).to(
            dtype
        )
    return made


def released_config(sizes=TINY):
    """config.json, field by field as the training code writes it."""
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "attention_bias": False,
        "bos_token_id": sizes.rows - 6,
        "eos_token_id": sizes.rows - 2,
        "pad_token_id": sizes.rows - 1,
        "hidden_act": "silu",
        "hidden_size": sizes.llm,
        "intermediate_size": sizes.mlp,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": 2 * sizes.llm // sizes.kv,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "vocab_size": sizes.rows,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_hidden_size": sizes.tower,
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "use_mm_proj": True,
    }


def released_tokenizer(pad=True):
    """Letters, and the special tokens of Llama 3 after them; the padding token was added for training."""
    raw = Tokenizer(models.BPE({letter: i for i, letter in enumerate(LETTERS)}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL[: 6 if pad else 5]])
    names = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[4]} | ({"pad_token": SPECIAL[5]} if pad else {})
    return PreTrainedTokenizerFast(tokenizer_object=raw, padding_side="right", model_max_length=2048, **names)


def write_released(folder, tensors=None, *, files=1, binary=False, **changes):
    """A directory as it lies on the hub: weights in one file or several with their index, configuration, tokenizer."""
    folder.mkdir()
    tensors = released_tensors() if tensors is None else tensors
    stem, end = ("pytorch_model", "bin") if binary else ("model", "safetensors")
    names, index = sorted(tensors), {}
    for i in range(files):
        file = f"{stem}.{end}" if files == 1 else f"{stem}-{i + 1:05d}-of-{files:05d}.{end}"
        part = {name: tensors[name].contiguous() for name in names[i::files]}
        torch.save(part, folder / file) if binary else save_file(part, folder / file)
        index |= dict.fromkeys(part, file)
    if files > 1:
        (folder / f"{stem}.{end}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(released_config() | changes))
    released_tokenizer().save_pretrained(folder)
    return tensors
