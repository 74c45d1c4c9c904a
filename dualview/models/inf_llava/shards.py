"""Weights in files: read tensor by tensor, never more of them in memory than one new file holds, and never as code."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"
NAMES = (INDEX, "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
"""What holds the weights of a directory, the first that is there."""
MOST_BYTES = 2 * 2**30
"""About how much one file of a new checkpoint holds."""


class CheckpointError(ValueError):
    """A checkpoint that is not read, and why."""


class Entry(NamedTuple):
    """A tensor of a checkpoint, not loaded.

    Attributes:
        file: Where it is.
        name: Its name there.
        shape: Its sizes.
        bytes: What it takes.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    bytes: int


def entries_of(path: Path) -> dict[str, Entry]:
    """The tensors of a directory or of one file, by name.

    Raises:
        CheckpointError: There are none, a file is damaged, missing or holds something else than tensors, or the index
            names tensors that are elsewhere.
    """
    if path.is_file():
        return _entries_of_file(path)
    found = next((path / name for name in NAMES if (path / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"{path} holds no weights: it has none of {', '.join(NAMES)}.")
    if found.suffix != ".json":
        return _entries_of_file(found)
    index = read_json(found).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise CheckpointError(f"{found} is no index of weights: it has no weight_map of names.")
    entries: dict[str, Entry] = {}
    for name in sorted(set(index.values())):
        if Path(name).name != name:
            raise CheckpointError(f"{found} names {name!r}, a file of another directory: that is not read.")
        own = _entries_of_file(path / name)
        if double := sorted(entries.keys() & own.keys()):
            raise CheckpointError(f"{path / name} holds tensors that another file has, too: {double}.")
        entries |= own
    wrong = sorted(name for name, file in index.items() if name not in entries or entries[name].file.name != file)
    if wrong:
        raise CheckpointError(f"{found} says that tensors are where they are not: {wrong}. Download the files again.")
    return entries


def tensors_of(entries: dict[str, Entry]) -> Iterator[tuple[str, Tensor]]:
    """The tensors themselves, file by file.

    Raises:
        CheckpointError: A tensor is no floating-point one, or holds what is no number.
    """
    for file in dict.fromkeys(entry.file for entry in entries.values()):
        with _Opened(file) as opened:
            for name in [name for name, entry in entries.items() if entry.file == file]:
                tensor = opened.tensor(entries[name].name)
                if not tensor.is_floating_point():
                    raise CheckpointError(
                        f"{file}: {name} is of type {tensor.dtype}; quantised weights are not converted. Take the "
                        "checkpoint that they were made from."
                    )
                if not tensor.isfinite().all():
                    raise CheckpointError(f"{file}: {name} holds values that are no finite numbers: it is damaged.")
                yield name, tensor


def write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]], most_bytes: int = MOST_BYTES) -> None:
    """Write tensors into files of about ``most_bytes``, and an index of them."""
    index: dict[str, str] = {}
    held: dict[str, Tensor] = {}
    files, total = 0, 0

    def write() -> None:
        nonlocal files, held
        files += 1
        name = f"model-{files:05d}.safetensors"
        save_file({key: value.contiguous() for key, value in held.items()}, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(held, name))
        held = {}

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if held and size + sum(t.numel() * t.element_size() for t in held.values()) > most_bytes:
            write()
        held[name] = tensor
        total += size
    write()
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})


def read_json(path: Path) -> dict[str, Any]:
    """What a file of JSON holds.

    Raises:
        CheckpointError: It is missing, or no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}: give the directory of a whole model.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object.")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file of JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _entries_of_file(file: Path) -> dict[str, Entry]:
    with _Opened(file) as opened:
        return {name: Entry(file, name, *opened.size(name)) for name in opened.names()}


class _Opened:
    """One file of weights, its tensors mapped and not loaded where the format allows it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> _Opened:
        try:
            self.content: Any = _open(self.file)
        except FileNotFoundError:
            raise CheckpointError(f"{self.file} is missing: download it again.") from None
        except (SafetensorError, UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
            said = "code" if isinstance(error, UnpicklingError) else str(error).partition(". ")[0].partition("\n")[0]
            raise CheckpointError(
                f"{self.file} cannot be read as weights ({said}): it is damaged, incomplete, or holds something "
                "else than tensors, which is never loaded. Download it again."
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        self.content = None

    def names(self) -> list[str]:
        return list(self.content.keys())

    def tensor(self, name: str) -> Tensor:
        tensor: Tensor = self.content[name] if isinstance(self.content, dict) else self.content.get_tensor(name)
        return tensor

    def size(self, name: str) -> tuple[tuple[int, ...], int]:
        if isinstance(self.content, dict):
            tensor = self.content[name]
            return tuple(tensor.shape), tensor.numel() * tensor.element_size()
        part = self.content.get_slice(name)
        shape = tuple(part.get_shape())
        bits = int("".join(c for c in part.get_dtype().partition("_")[0] if c.isdigit()) or 8)  # as F32, BF16, F8_E4M3
        return shape, torch.Size(shape).numel() * bits // 8


def _open(file: Path) -> Any:
    if file.suffix == ".safetensors":
        return safe_open(file, "pt")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        content = torch.load(file, map_location="cpu", weights_only=True)  # of the format before torch 1.6
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise ValueError("no dictionary of tensors")
    return content


def check_loaded(source: Any, report: Mapping[str, Collection[str]], *, whole: bool = True) -> None:
    """Raise a ValueError where a model of transformers has weights that its files do not have.

    Args:
        source: Named in the message.
        report: The loading info of ``from_pretrained``.
        whole: Whether the files may not have more than the model, either.
    """
    lacking, more = (sorted(report[name]) for name in ("missing_keys", "unexpected_keys"))
    if lacking or (more and whole):
        raise ValueError(
            f"{source}: weights and config.json do not belong together, so that the model would be of random numbers. "
            f"Without weights: {_shortened(lacking)}; without a place: {_shortened(more)}. Make the directory again."
        )


def _shortened(names: list[str]) -> str:
    """The first of many names, and how many there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "none"
