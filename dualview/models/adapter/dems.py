"""The enhancement modules that are attached: made of options, or of the caller's making."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import nn

from dualview.arguments import TEXTS, check_choice, check_flags, shown
from dualview.models.adapter.hosts import Source
from dualview.models.parts import low_res_of
from dualview.models.view_plan import gate_of, method_of
from dualview.ops.enhance import DualPerspectiveEnhance

Dem: TypeAlias = Mapping[str, Any] | nn.Module | Sequence[nn.Module]


def dems_of(
    dem: Dem | None, width: int, count: int, tower: nn.Module, source: Source
) -> tuple[list[nn.Module], dict[str, Any] | None]:
    """The modules, and the options that they were made of."""
    if isinstance(dem, Mapping) or dem is None:
        options = {"preset": "released", "gate": True, **(dem or {})}
        return [_made(options, width, like([], tower), source) for _ in range(count)], options
    listed = isinstance(dem, Sequence | nn.ModuleList) and not isinstance(dem, TEXTS)
    dems = list(cast(Sequence[nn.Module], dem)) if listed else [dem] if isinstance(dem, nn.Module) else []
    if (not dems and not listed) or not all(isinstance(one, nn.Module) for one in dems):
        raise TypeError(f"dem={shown(dem)}: must be options, a module, or a module for each of {count} layers.")
    if len(dems) != count or len({id(one) for one in dems}) != count:
        raise ValueError(
            f"dem={shown(dem)}: {len(dems)} modules were given for {count} layers: give each layer one of its own."
        )
    for one in dems:
        if getattr(one, "dim", width) != width:
            raise ValueError(f"a dem for tokens of width {shown(one.dim)}: this model reads tokens of width {width}.")
        if (readout := getattr(one, "readout", None)) is not None:
            _check_readout(readout, source)
        _check_call(one)
    if len({gate_of(one) is None for one in dems}) > 1:
        raise ValueError(f"dem={shown(dem)}: some of these modules have a gate and some have none: all must, or none.")
    if len({low_res_of(one) for one in dems}) > 1:
        raise ValueError(f"dem={shown(dem)}: these modules declare more than one low_res: all must declare the same.")
    return dems, None


def like(dems: Sequence[nn.Module], tower: nn.Module) -> dict[str, Any]:
    """Type and device of new parameters: those of the modules, where there are any, or of the tower."""
    found = (p for module in (*dems, tower) for p in module.parameters() if p.is_floating_point())
    first = next(found, torch.empty(0))
    hooks = (getattr(module, "_hf_hook", None) for module in tower.modules())  # accelerate's: weights are elsewhere
    devices = [device for hook in hooks if (device := getattr(hook, "execution_device", None)) is not None]
    return {"device": devices[0] if devices else first.device, "dtype": first.dtype}


def _made(options: Mapping[str, Any], width: int, of_tensors: dict[str, Any], source: Source) -> DualPerspectiveEnhance:
    rest = {name: value for name, value in options.items() if name != "gate"}
    presets = {"released": DualPerspectiveEnhance.released, "paper": DualPerspectiveEnhance.paper}
    preset = rest.pop("preset")
    check_choice(preset, 'dem["preset"]', tuple(presets))
    check_flags(**{'dem["gate"]': options["gate"]})
    if source == "native":
        rest.setdefault("readout", "none")
    if "readout" in rest:
        _check_readout(rest["readout"], source)
    try:
        return presets[preset](width, **{**of_tensors, **rest})
    except TypeError as error:
        raise ValueError(f"dem={dict(options)}: {error}. Options are the arguments of the preset's module.") from error


def _check_call(dem: nn.Module) -> None:
    """Its ``forward`` takes what `dualview.models.encode_views.mixed` gives."""
    given = ["local_tiles", "stride_tiles", "grid"]
    if gate_of(dem) is not None and low_res_of(dem) != "add":
        given += ["key_mask", "base"]
    named = {} if method_of(dem, "plan") is None else {"live": "live"}
    try:
        signature = inspect.signature(dem.forward)
    except ValueError:  # not of Python: what it takes is not known
        return
    try:
        if getattr(dem.forward, "__func__", None) is nn.Module.forward:
            raise TypeError("it has no forward of its own")
        signature.bind(*given, **named)
    except TypeError as error:
        why = " base: features that a module with a gate of its own subtracts before it." if "base" in given else ""
        raise ValueError(
            f"dem={type(dem).__name__}: its forward{signature} is called as ({', '.join([*given, *named])}): {error}. "
            f"Take these arguments.{why}"
        ) from error


def _check_readout(readout: object, source: Source) -> None:
    if (readout == "none") != (source == "native"):
        wanted = '"none", a token for each of the image\'s' if source == "native" else "one with the tokens of one tile"
        raise ValueError(f"dem with readout={shown(readout)}: with source={source!r} it must be {wanted}.")
