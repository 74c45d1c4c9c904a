"""The enhancement module's weights under the names that a released checkpoint has for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dualview.arguments import check_flags, check_mapping, shown
from dualview.tensors import misfit

RELEASED_NAMES = {
    "attention.linears.0": "attentions.0.q_proj",
    "attention.linears.1": "attentions.0.k_proj",
    "attention.linears.2": "attentions.0.v_proj",
    "attention.linears.3": "attentions.0.out_proj",
    "attention.ln": "attentions.0.norm",
    "ffn_crop.0": "fusion.local_bottleneck.0",
    "ffn_crop.2": "fusion.local_bottleneck.2",
    "ffn_stride.0": "fusion.global_bottleneck.0",
    "ffn_stride.2": "fusion.global_bottleneck.2",
    "ln_fuse": "fusion.norm",
}
"""Layer names in a released checkpoint and here."""


class LoadReport(NamedTuple):
    """What did not fit when a checkpoint was loaded, by released names.

    Attributes:
        missing: Tensors that the checkpoint lacks.
        unexpected: Tensors that it has, but the module has not.
    """

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def load_released(module: nn.Module, state_dict: Mapping[str, Tensor], *, strict: bool) -> LoadReport:
    """What `DualPerspectiveEnhance.load_released` does; its arguments and errors."""
    check_flags(strict=strict)
    given = _strip_prefix(check_mapping(state_dict, "state_dict"))
    own = released_state_dict(module)
    report = LoadReport(tuple(sorted(own.keys() - given.keys())), tuple(sorted(given.keys() - own.keys())))
    if any(tensor.is_meta for tensor in own.values()):
        raise ValueError(
            "this module is on the meta device and holds no memory to load into: call to_empty(device=...)."
        )
    shared = own.keys() & given.keys()
    wrong = [f"{name}: {fault}" for name in sorted(shared) if (fault := misfit(given[name], own[name]))]
    if wrong or (strict and any(report)):
        raise ValueError(
            f"state_dict={shown(state_dict)} does not fit this module, and nothing was loaded. "
            f"Missing: {list(report.missing)}. Unexpected: {list(report.unexpected)}. Wrong: {wrong}. "
            "Released weights need DualPerspectiveEnhance.released(dim) with the checkpoint's dim (1024 on the "
            "hub); strict=False loads what fits by name."
        )
    with torch.no_grad():
        for name in shared:
            own[name].copy_(given[name])
    return report


def released_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """What `DualPerspectiveEnhance.released_state_dict` gives; its errors."""
    names = {new: old for old, new in RELEASED_NAMES.items()}
    renamed: dict[str, Tensor] = {}
    for name, tensor in module.named_parameters():
        if name == "gate":  # for use inside another model: not part of what was released
            continue
        layer, _, leaf = name.rpartition(".")
        if layer not in names:
            raise ValueError(
                f"parameter {name!r} has no name in a released checkpoint: only a module built as "
                "DualPerspectiveEnhance.released(dim) exchanges weights with one."
            )
        renamed[f"{names[layer]}.{leaf}"] = tensor
    return renamed


def _strip_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The DEM's tensors by their bare names: those under a prefix if any is there, else all."""
    prefixes = ("model.spatial_embed.", "spatial_embed.")
    prefix = next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in state_dict)), "")
    return {name.removeprefix(prefix): t for name, t in state_dict.items() if name.startswith(prefix)}
