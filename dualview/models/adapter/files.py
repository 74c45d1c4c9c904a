"""Attached modules on disk: their weights, and what is needed to attach them again."""

from __future__ import annotations

import json
import os
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dualview.arguments import check_path, shown
from dualview.models.adapter.attach import Model, attach, attached, attachment_of, detach
from dualview.models.adapter.dems import Dem
from dualview.models.adapter.module import AttachedEnhance
from dualview.outputs import replace_file

WEIGHTS, DESCRIPTION = "dualview_adapter.safetensors", "dualview_adapter.json"
FORMAT = 1


def save_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write what is attached to a model into a folder: the weights, and the arguments of `attach`.

    The host's own weights are not written. Each of the two files is replaced as a whole, or stays as it is. Options of
    the DEM that are modules cannot be written down: [`load_adapter`][dualview.load_adapter] then needs them again.

    Args:
        model: The model, or what has been put around it.
        folder: Is made where it does not exist.

    Raises:
        ValueError: Nothing is attached, a layer of it has been replaced (LoRA: merge it first), or the folder cannot be
            made.
        TypeError: ``folder`` is no path.
        OSError: A file cannot be written.

    Example:
        >>> from torch import nn
        >>> save_adapter(nn.Identity(), "adapter")
        Traceback (most recent call last):
        ValueError: model: nothing is attached to this Identity.
    """
    from safetensors.torch import save

    record = attachment_of(model)
    child = _active(attached(model))
    weights = {name: _whole(value) for name, value in child.state_dict().items()}
    if wrong := [name for name in weights if ".lora_" in name or ".base_layer." in name]:
        raise ValueError(
            f"{wrong[0]} belongs to an adapter inside of the attached module: merge it first (merge_and_unload), or "
            "save it with PEFT."
        )
    content = save(weights)
    description = {
        "format": FORMAT,
        "model_type": record.model_type,
        "grid": list(record.grid),
        "source": record.source,
        "layers": list(record.layers),
        "dem": _written(record.dem),
        "sha256": sha256(content).hexdigest(),
    }
    folder = Path(check_path(folder, "folder"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"folder={shown(str(folder))} cannot be made: {getattr(error, 'strerror', error)}.") from error
    replace_file(folder / WEIGHTS, memoryview(content))
    replace_file(folder / DESCRIPTION, memoryview(f"{json.dumps(description, indent=2)}\n".encode()))


def load_adapter(
    model: Model,
    folder: str | os.PathLike[str],
    *,
    dem: Dem | None = None,
    max_tiles_per_pass: int | None = None,
) -> Model:
    """Attach to a model what [`save_adapter`][dualview.save_adapter] has written.

    Args:
        model: A model of the family that it was attached to, with nothing attached.
        folder: What was written.
        dem: Where modules of yours were attached, or options that hold any: as for [`attach`][dualview.attach]. Their
            weights are overwritten.
        max_tiles_per_pass: As for [`attach`][dualview.attach].

    Returns:
        ``model``, changed.

    Raises:
        ValueError: The files are not what was written, belong to another model, or something is attached already. The
            model is as it was.
        TypeError: ``folder`` is no path, or ``dem`` is of the wrong type.
        FileNotFoundError: A file is missing.

    Example:
        >>> from torch import nn
        >>> load_adapter(nn.Identity(), "nowhere")
        Traceback (most recent call last):
        FileNotFoundError: nowhere holds no dualview_adapter.json: give the folder that save_adapter has written.
    """
    folder = Path(check_path(folder, "folder"))
    for name in (DESCRIPTION, WEIGHTS):
        if not os.path.isfile(folder / name):  # noqa: PTH113 - Path raises where a name is too long
            raise FileNotFoundError(f"{folder} holds no {name}: give the folder that save_adapter has written.")
    description = _described(folder / DESCRIPTION)
    content = (folder / WEIGHTS).read_bytes()
    if sha256(content).hexdigest() != description["sha256"]:
        raise ValueError(
            f"{folder / WEIGHTS} is not the file that {DESCRIPTION} describes: it is damaged, or one of the two comes "
            "from elsewhere. Write both again with save_adapter."
        )
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family != description["model_type"]:
        raise ValueError(
            f"model={shown(model)}: {folder} was attached to a model of model_type={description['model_type']!r}, and "
            f"this one is {family!r}: load it into a model of that family."
        )
    if description["dem"] is None and dem is None:
        raise ValueError(
            f"what {folder} holds was attached with modules of the caller's making: give load_adapter the same dem= as "
            "attach."
        )
    attach(
        model,
        description["grid"],
        description["source"],
        dem=_read(description["dem"]) if dem is None else dem,
        layers=description["layers"],
        max_tiles_per_pass=max_tiles_per_pass,
    )
    try:
        _fill(attached(model), content, folder)
    except Exception:
        detach(model)
        raise
    return model


def _written(dem: dict[str, Any] | None) -> dict[str, Any] | None:
    """Options of DEMs as JSON has them, without the device; None if some of them are modules."""
    written = {name: value for name, value in (dem or {}).items() if name != "device"}
    if isinstance(dtype := written.get("dtype"), torch.dtype):
        written["dtype"] = str(dtype).removeprefix("torch.")
    try:
        json.dumps(written)
    except TypeError:
        return None
    return None if dem is None else written


def _read(written: dict[str, Any]) -> dict[str, Any]:
    """The options that `_written` has written."""
    dtype = written.get("dtype")
    return {**written, "dtype": getattr(torch, dtype, dtype)} if isinstance(dtype, str) else written


def _described(path: Path) -> dict[str, Any]:
    """What the description says, checked."""
    expected: dict[str, tuple[type, ...]] = {
        "format": (int,),
        "model_type": (str,),
        "grid": (list,),
        "source": (str,),
        "layers": (list,),
        "dem": (dict, type(None)),
        "sha256": (str,),
    }
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        fits = set(found) == set(expected) and all(type(found[name]) in kinds for name, kinds in expected.items())
    except (ValueError, TypeError, RecursionError):
        fits = False
    if not fits:
        raise ValueError(f"{path} is not a description that save_adapter has written: it needs {sorted(expected)}.")
    if found["format"] != FORMAT:
        raise ValueError(f"{path} has format {found['format']}, and this version reads {FORMAT}: use a newer dualview.")
    return cast(dict[str, Any], found)


def _fill(child: AttachedEnhance, content: bytes, folder: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        weights = load(content)
    except SafetensorError as error:
        raise ValueError(
            f"{folder / WEIGHTS} is no file of safetensors: {error}. Write it again with save_adapter."
        ) from error
    own_weights = child.state_dict()
    own = {name: tuple(value.shape) for name, value in own_weights.items()}
    given = {name: tuple(value.shape) for name, value in weights.items()}
    if own != given:
        differ = sorted({*own.items()} ^ {*given.items()})[0][0]
        raise ValueError(
            f"{folder} does not fit this model: {differ} has shape {given.get(differ)} there and {own.get(differ)} "
            "here (None: it is missing). It was attached to a model of another size."
        )
    for name, value in weights.items():
        here = own_weights[name].dtype
        if value.dtype != here and not (value.is_floating_point() and here.is_floating_point):
            raise ValueError(
                f"{folder / WEIGHTS} holds {name} in {value.dtype}, and here it is {here}: numbers of another kind. "
                "Write it again with save_adapter."
            )
        if not value.isfinite().all():
            raise ValueError(
                f"{folder / WEIGHTS} holds NaN or infinity in {name}, with which no host could answer: the training "
                "that it comes from diverged. Load an earlier one."
            )
    child.load_state_dict(weights)


def _active(child: nn.Module) -> AttachedEnhance:
    """The module that is used, of those that PEFT's modules_to_save keeps."""
    copies = getattr(child, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict):
        return cast(AttachedEnhance, copies[cast(Any, child).active_adapters[0]])
    return cast(AttachedEnhance, child)


def _whole(value: Tensor) -> Tensor:
    """A tensor for a file: of a sharded one, all of it."""
    gathered = value.full_tensor() if hasattr(value, "full_tensor") else value
    return cast(Tensor, gathered).detach().to(torch.device("cpu")).contiguous()
