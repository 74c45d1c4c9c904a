"""Where in a model a module is attached, and which models are refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import nn

from dualview.arguments import check_indices, shown
from dualview.models.adapter.hosts import HOSTS, REFUSED, Host, Place

NAME = "dualview"
"""The child's name in the tower: for PEFT's ``modules_to_save``, for optimizers, and in checkpoints."""
WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule", "PeftModel")
"""Classes that are put around models, by a name in their ancestry: none of the libraries is imported for this."""


def _wrapped(model: nn.Module) -> bool:
    return any(kind.__name__ in WRAPPERS for kind in type(model).__mro__)


def check_bare(model: nn.Module) -> None:
    """Nothing has been put around the model or a part of it that would not see what is attached."""
    for name, module in model.named_modules():
        compiled = _wrapped(module) or getattr(module, "_compiled_call_impl", None) is not None
        if compiled or any(hasattr(parameter, "full_tensor") for parameter in module.parameters(recurse=False)):
            done = "compiled or wrapped" if compiled else "sharded"
            raise ValueError(
                f"model: {name or 'it'} ({type(module).__name__}) is {done} already: attach to the model as it was "
                "loaded, then wrap, shard or compile it."
            )


def family_of(model: nn.Module) -> tuple[Any, Host]:
    """The configuration of a model, and the record of its family."""
    if isinstance(model, nn.Module) and _wrapped(model):
        raise ValueError(
            f"model: {type(model).__name__} is around a model: attach to the model inside, and wrap it afterwards."
        )
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or not hasattr(config, "model_type"):
        raise TypeError(
            f"model={shown(model)}: {type(model).__name__} is no multimodal model of transformers. For a vision tower "
            "alone use DualViewEncoder with HfEncoder, TimmEncoder, OpenClipEncoder or a function of your own."
        )
    family = cast(Any, config).model_type
    if family in REFUSED:
        raise ValueError(f"model_type={family!r} is not supported: {REFUSED[family]}.")
    if family == "llava" and cast(Any, config).vision_config.model_type == "pixtral":
        return config, HOSTS["mistral3"]
    if family not in HOSTS:
        raise ValueError(
            f"model_type={family!r} has not been tested, so nothing is attached to it. Tested are {', '.join(HOSTS)}. "
            "A family whose tower takes square images of one size may need no more than a record in "
            "dualview/models/adapter/hosts.py and a configuration in the tests."
        )
    return config, HOSTS[family]


def tower_of(model: nn.Module, host: Host) -> nn.Module:
    """The module whose output is enhanced."""
    tower = part_of(model, "get_encoder", modality="image")
    try:
        tower = tower.get_submodule(host.inner)
    except AttributeError as error:
        raise ValueError(
            f"model: its vision tower, {type(tower).__name__}, has no part {host.inner!r}. {REMEDY}"
        ) from error
    if hasattr(tower, NAME):
        raise ValueError(f"{type(tower).__name__} has something of the name {NAME!r} already.")
    return tower


def part_of(model: nn.Module, method: str, **options: str) -> nn.Module:
    """What a method of a model gives: its vision tower, or its language model."""
    ask = getattr(model, method, None)
    part = ask(**options) if callable(ask) else None
    if not isinstance(part, nn.Module):
        raise ValueError(f"model: {method} of this {type(model).__name__} gives {shown(part)}, and no module. {REMEDY}")
    return part


REMEDY = "Load the whole model, images and text, as AutoModelForImageTextToText does, and attach to it."


def places_of(config: Any, host: Host, layers: Sequence[int] | None) -> dict[int, Place]:
    """The places of the layers that are enhanced, in the order in which the model reads them."""
    places = host.places(config)
    if layers is None:
        vision = config.vision_config
        count = cast(int, getattr(vision, "num_hidden_layers", None) or getattr(vision, "depth", 0))
        return dict([max(places.items(), key=lambda item: item[0] % (count + 1))])
    given, layers = layers, check_indices(layers, "layers")
    unknown = [layer for layer in layers if layer not in places]
    if unknown or not layers or len(set(layers)) != len(layers):
        raise ValueError(
            f"layers={shown(given)}: must be some of those that this model reads, {list(places)}, each once; what it "
            "does not read would have no effect."
        )
    return {layer: place for layer, place in places.items() if layer in layers}
