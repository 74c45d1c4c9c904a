"""Released checkpoints to model directories, and back."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import CLIPVisionConfig, GenerationConfig, PreTrainedTokenizerFast

from dualview.arguments import check_path
from dualview.models.inf_llava.configuration_inf_llava import InfLlavaConfig
from dualview.models.inf_llava.image_processing_inf_llava import InfLlavaImageProcessor
from dualview.models.inf_llava.modeling_inf_llava import InfLlavaForConditionalGeneration
from dualview.models.inf_llava.processing_inf_llava import InfLlavaProcessor
from dualview.models.inf_llava.released_names import (
    COMPUTED,
    TOWER,
    check_released,
    config_of,
    released_config,
    renamed,
)
from dualview.models.inf_llava.shards import (
    MOST_BYTES,
    CheckpointError,
    Entry,
    entries_of,
    read_json,
    tensors_of,
    write_json,
    write_shards,
)
from dualview.outputs import new_folder

PathLike = str | os.PathLike[str]
VOCABULARY = ("model.language_model.embed_tokens.weight", "lm_head.weight")
NOTICE = """Weights converted from a released INF-LLaVA, which was made from Meta Llama 3.

Built with Meta Llama 3. Meta Llama 3 is licensed under the Meta Llama 3 Community License, Copyright (c) Meta
Platforms, Inc. All Rights Reserved. Its licence (https://llama.meta.com/llama3/license) and its Acceptable Use Policy
hold for these weights.
The vision tower is CLIP ViT-L/14-336 of OpenAI.
"""
STAGE_ONE = {"model_type": "llava_llama"}


def convert_inf_llava(
    source: PathLike,
    target: PathLike,
    *,
    vision_tower: PathLike | None = None,
    language_model: PathLike | None = None,
    tokenizer: PathLike | None = None,
    most_bytes: int = MOST_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Make a directory for the Auto classes of a released INF-LLaVA; or, of such a directory, a released checkpoint.

    Weights, configuration, tokenizer, chat template, processor and generation settings are written; the tensors keep
    their values and type. No more than one new file of weights is in memory. No code of the checkpoint is run.

    Args:
        source: Directory of a released checkpoint, with the tower's weights or without them; the file
            ``mm_projector.bin`` of its first training stage; or a directory that this function has written, for the
            way back.
        target: The new directory. It appears when it is complete, and must not exist.
        vision_tower: Directory of the vision tower (openai/clip-vit-large-patch14-336), where the checkpoint lacks it.
        language_model: Directory of the language model (Meta-Llama-3-8B-Instruct), for ``mm_projector.bin``.
        tokenizer: Directory of the tokenizer, where it is not beside the weights.
        most_bytes: About how much one new file holds.
        progress: Called with the bytes that are done, and all bytes.

    Raises:
        CheckpointError: The checkpoint is another model's, is not whole, is damaged, or has no tokenizer; the message
            names every tensor that is missing, unexpected or wrongly shaped. Nothing is written.
        FileExistsError: There is something at ``target``.

    Example:
        ``convert_inf_llava("INF-LLaVA", "inf-llava")``, and afterwards ``AutoProcessor.from_pretrained("inf-llava")``.
    """
    source, target = Path(check_path(source, "source")), Path(check_path(target, "target"))
    if not source.exists():
        raise CheckpointError(f"{source}: no such file or directory.")
    config = read_json(source / "config.json") if source.is_dir() else STAGE_ONE
    if config.get("model_type") == InfLlavaConfig.model_type:
        plan = _to_released(source)
    else:
        tower, llm, words = (None if at is None else Path(at) for at in (vision_tower, language_model, tokenizer))
        plan = _from_released(source, config, tower, llm, words)
    total = sum(entry.bytes for entry in plan.entries.values())
    with new_folder(target) as folder:
        if (free := shutil.disk_usage(folder).free) < total:
            raise OSError(f"{target} needs {total / 2**30:.1f} GiB, and the disk has {free / 2**30:.1f} GiB left.")
        plan.write(folder)
        write_shards(folder, _counted(plan.tensors(), total, progress), most_bytes)


class _Plan(NamedTuple):
    """What is written: tensors, and everything beside them."""

    entries: dict[str, Entry]
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]
    write: Callable[[Path], None]


def _from_released(
    source: Path, released: dict[str, Any], tower_at: Path | None, llm_at: Path | None, tokenizer_at: Path | None
) -> _Plan:
    entries = entries_of(source)
    check_released(released, entries, source)
    entries |= _language_model(llm_at, entries)
    if llm_at is not None:
        released = read_json(llm_at / "config.json") | {"mm_vision_select_layer": -2}
    entries |= _tower(tower_at, entries)
    entries = {name: entry for name, entry in entries.items() if not COMPUTED.search(name)}
    tokenizer = _tokenizer(tokenizer_at or llm_at or (source if source.is_dir() else source.parent))
    embeddings = entries.get("model.embed_tokens.weight")
    _check_words(tokenizer, released, embeddings)
    rows = max(len(tokenizer), embeddings.shape[0] if embeddings else 0)
    known = tower_at is not None and (tower_at / "config.json").is_file()
    tower_config = CLIPVisionConfig.from_pretrained(tower_at) if known else None
    config = config_of(
        released,
        {renamed(name) or "": entry.shape for name, entry in entries.items() if name.startswith(TOWER)},
        tower_config,
        vocab_size=-(-rows // 64) * 64,
        pad_token_id=tokenizer.pad_token_id,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    _compare(source, entries, config)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors_of(entries):
            new = renamed(name)
            assert new is not None, "compared before"
            yield new, _with_rows(tensor, config.text_config.vocab_size) if new in VOCABULARY else tensor

    def write(folder: Path) -> None:
        config.save_pretrained(folder)
        pixels = InfLlavaImageProcessor(size=config.grid[0] * config.tile[0], tile_size=config.tile[0])
        tokens = config.image_seq_length or 0
        InfLlavaProcessor(pixels, tokenizer, image_seq_length=tokens).save_pretrained(folder)
        _generation(config, tokenizer).save_pretrained(folder)
        (folder / "NOTICE").write_text(NOTICE, encoding="utf-8")
        for file in chain(source.glob("LICENSE*"), source.glob("USE_POLICY*")):
            shutil.copy(file, folder / file.name)

    return _Plan(entries, tensors, write)


def _to_released(source: Path) -> _Plan:
    config = InfLlavaConfig.from_pretrained(source)
    entries = entries_of(source)
    if config.dem != {"preset": "released"} or tuple(config.grid) != (3, 3):
        raise CheckpointError(
            f"{source} has dem={config.dem} and grid={tuple(config.grid)}: a released checkpoint has the released "
            "module and a grid of (3, 3)."
        )
    expected = _expected(config)
    _raise_unlike(source, {name: entry.shape for name, entry in entries.items()}, expected)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors_of(entries):
            yield renamed(name, back=True) or name, tensor[: config.image_token_id] if name in VOCABULARY else tensor

    def write(folder: Path) -> None:
        write_json(folder / "config.json", released_config(config))
        _without_image_token(PreTrainedTokenizerFast.from_pretrained(source)).save_pretrained(folder)
        (folder / "NOTICE").write_text(NOTICE, encoding="utf-8")

    return _Plan(entries, tensors, write)


def _language_model(folder: Path | None, entries: dict[str, Entry]) -> dict[str, Entry]:
    if any(name.startswith("model.layers.") for name in entries):
        return {}
    if folder is None:
        raise CheckpointError(
            "the checkpoint holds no language model, as an mm_projector.bin of the first training stage: give the one "
            "that it was trained with by language_model (--language-model), a directory of Meta-Llama-3-8B-Instruct."
        )
    return entries_of(folder)


def _tower(folder: Path | None, entries: dict[str, Entry]) -> dict[str, Entry]:
    if any(name.startswith(TOWER) for name in entries):
        return {}
    if folder is None:
        raise CheckpointError(
            "the checkpoint holds no vision tower, which was not trained: give it by vision_tower (--vision-tower), a "
            "directory of openai/clip-vit-large-patch14-336."
        )
    outside = ("text_model.", "logit_scale", "text_projection", "visual_projection")
    return {
        TOWER + name.removeprefix("vision_model."): entry
        for name, entry in entries_of(folder).items()
        if not name.startswith(outside)
    }


def _tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer.json: give the directory of the tokenizer by tokenizer (--tokenizer), as that "
            "of Meta-Llama-3-8B-Instruct."
        )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    tokenizer.padding_side = "left"  # as answers are generated
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    return tokenizer


def _check_words(tokenizer: PreTrainedTokenizerFast, released: dict[str, Any], embeddings: Entry | None) -> None:
    """Raise a CheckpointError where the tokenizer is another model's: its ids would name other words."""
    words = len(tokenizer) - 1  # but the image token
    if embeddings is not None and abs(words - embeddings.shape[0]) > 64:
        raise CheckpointError(
            f"the tokenizer has {words} tokens, and model.embed_tokens.weight {embeddings.shape[0]} rows: it is "
            "another model's. Give that of the checkpoint by tokenizer (--tokenizer)."
        )
    first = released.get("bos_token_id")
    if None not in (first, tokenizer.bos_token_id) and first != tokenizer.bos_token_id:
        raise CheckpointError(
            f"the tokenizer begins texts with token {tokenizer.bos_token_id}, and config.json says {first}: it is "
            "another model's. Give that of the checkpoint by tokenizer (--tokenizer)."
        )


def _without_image_token(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<image>"]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        **{name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token", "model_max_length")},
        padding_side="right",
    )


def _generation(config: InfLlavaConfig, tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """Greedy, to the end of the turn; rows of the vocabulary that were never trained are not generated."""
    known = tokenizer.get_vocab()
    ends = {known[token] for token in ("<|eot_id|>", "<|end_of_text|>", tokenizer.eos_token) if token in known}
    unused = {config.image_token_id, *range(len(tokenizer), config.text_config.vocab_size)}
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=sorted(unused),
        do_sample=False,
        max_new_tokens=512,
    )


def _expected(config: InfLlavaConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = InfLlavaForConditionalGeneration(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _compare(source: Path, entries: dict[str, Entry], config: InfLlavaConfig) -> None:
    """Compare by released names; the vocabulary may have fewer rows than the model gets."""
    expected = {renamed(name, back=True) or name: shape for name, shape in _expected(config).items()}
    given = {name: entry.shape for name, entry in entries.items()}
    for name in VOCABULARY:
        old = renamed(name, back=True) or name
        if old in given and len(given[old]) == 2 and given[old][0] <= expected[old][0]:
            given[old] = (expected[old][0], *given[old][1:])
    _raise_unlike(source, given, expected)


def _raise_unlike(source: Path, given: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    missing, unexpected = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    wrong = [
        f"{name}: {given[name]} in the file, {expected[name]} by its configuration"
        for name in sorted(given.keys() & expected.keys())
        if given[name] != expected[name]
    ]
    if missing or unexpected or wrong:
        raise CheckpointError(
            f"{source} does not hold the model of its configuration. Missing: {missing}. Unexpected: {unexpected}. "
            f"Wrong shape: {wrong}. Download the files again, or look for the files that belong together."
        )


def _with_rows(tensor: Tensor, rows: int) -> Tensor:
    """Rows of zeros for tokens that are never read or generated."""
    whole = tensor.new_zeros((rows, *tensor.shape[1:]))
    whole[: tensor.shape[0]] = tensor
    return whole


def _counted(
    tensors: Iterator[tuple[str, Tensor]], total: int, progress: Callable[[int, int], None] | None
) -> Iterator[tuple[str, Tensor]]:
    done = 0
    for name, tensor in tensors:
        yield name, tensor
        done += tensor.numel() * tensor.element_size()
        if progress is not None:
            progress(min(done, total), total)
