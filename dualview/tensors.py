"""Checks of tensor arguments, one for each kind: any tensor, numbers to calculate with, masks, lists, parameters.

All of them trace: under `torch.compile`, `torch.export`, `torch.vmap` and with fake tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any, cast

import torch
from torch import Tensor, nn

from dualview.arguments import MOST_WIDTH, TEXTS, check_count, shown

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Types that are calculated with."""


def check_tensors(**named: object) -> None:
    """Raise a TypeError for the first argument that is no ordinary tensor, with the call that makes it one."""
    for name, x in named.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, not {_conversion(x)}.")
        if x.layout != torch.strided or x.is_nested:
            raise TypeError(f"{name}={shown(x)}: must be a dense tensor, not {_layout(x)}.")


def check_floats(of: nn.Module | None = None, /, **named: Tensor) -> None:
    """Raise a TypeError unless these are tensors of one floating-point type on one device: those of a module's weights.

    Under autocast the types may differ.
    """
    check_tensors(**named)
    weight, like = None if of is None else _first_weight(of), next(iter(named.values()))
    # Quantised, offloaded and sharded weights say nothing about the inputs of their layer.
    if type(weight) is nn.Parameter and weight.dtype in FLOATS and not weight.is_meta:
        like = weight
    for name, x in named.items():
        if x.dtype not in FLOATS:
            floats = ", ".join(map(str, FLOATS))
            raise TypeError(f"{name}={shown(x)}: must be a floating-point tensor, of {floats}. Convert it first.")
        mixed = x.dtype != like.dtype and (x.is_meta or not torch.is_autocast_enabled(x.device.type))
        if mixed or x.device != like.device:
            owner = "the weights are" if like is weight else f"{next(iter(named))} is"
            raise TypeError(
                f"{name}={shown(x)} on {x.device}, and {owner} of type {like.dtype} on {like.device}: convert or move "
                "one of them. torch.autocast takes mixed types."
            )


def array_of(x: Tensor, name: str) -> Any:
    """The array of NumPy that shares the memory of a tensor.

    Raises:
        TypeError: It is no ordinary tensor in the memory of this machine, or of a type that NumPy does not have.
    """
    check_tensors(**{name: x})
    try:
        return x.detach().numpy()
    except (TypeError, RuntimeError) as error:
        raise TypeError(f"{name}={shown(x)} on {x.device}: must be such that NumPy can share it. {error}") from None


def check_averaged(**named: Tensor) -> None:
    """Raise a TypeError for the first argument of a type that torch cannot bring to a wider one, such as float8."""
    for name, x in named.items():
        if x.is_floating_point() and x.dtype not in FLOATS:
            raise TypeError(f"{name}={shown(x)}: numbers of this type cannot be averaged. Convert it first.")


def check_brightness(**named: Tensor) -> None:
    """Raise a TypeError for the first argument that is neither bytes nor floating-point numbers."""
    check_tensors(**named)
    for name, x in named.items():
        if x.dtype != torch.uint8 and x.dtype not in FLOATS:
            raise TypeError(f"{name}={shown(x)}: must be bytes (uint8) or a floating-point tensor. Convert it first.")


def _first_weight(module: nn.Module) -> Tensor | None:
    """The first parameter, None if there is none: what ``module.parameters()`` takes ten times as long to say."""
    found: Tensor | None = None
    for parameter in module._parameters.values():
        found = parameter if found is None else found
    for child in module._modules.values():
        found = _first_weight(child) if found is None and child is not None else found
    return found


def check_pixels(model: nn.Module, pixels: Tensor, channels: int, size: tuple[int, int] | None = None) -> None:
    """Raise an error unless a tower can encode these tiles.

    Args:
        model: The tower. Those of transformers convert tiles to the type of their weights.
        pixels: Tiles.
        channels: How many they have.
        size: Their size, where there is one alone.

    Raises:
        TypeError: They are no tensor of floating-point numbers, or not on the tower's device or of its type.
        ValueError: They have another number of dimensions or channels, or another size, or there are none.
    """
    weight = _first_weight(model)
    ordinary = type(weight) is nn.Parameter and not weight.is_meta and not hasattr(model, "_hf_hook")
    converts = type(model).__module__.startswith("transformers.")
    check_floats(model if ordinary and not converts else None, pixels=pixels)
    if ordinary and pixels.device != cast(Tensor, weight).device:
        raise TypeError(f"pixels={shown(pixels)} are on {pixels.device}, and the weights are not: move one of them.")
    wrong_size = size is not None and tuple(pixels.shape[-2:]) != size
    if pixels.dim() != 4 or 0 in pixels.shape or pixels.shape[1] != channels or wrong_size:
        expected = f"(T, {channels}, {'h, w' if size is None else f'{size[0]}, {size[1]}'})"
        raise ValueError(f"pixels={shown(pixels)}: {type(model).__name__} takes {expected}, at least one tile.")


def check_list(tensors: object, name: str, count: int | None = None) -> list[Tensor]:
    """A list of tensors from any sequence of them, or from a tensor along its first dimension.

    Raises:
        TypeError: It is none.
        ValueError: There are not ``count`` of them.
    """
    if isinstance(tensors, Tensor):
        check_tensors(**{name: tensors})
        listed = list(tensors) if tensors.dim() else []
    elif isinstance(tensors, TEXTS) or not isinstance(tensors, Sequence):
        raise TypeError(f"{name} must be a torch.Tensor, not {_conversion(tensors)}. A list of them will do, too.")
    else:
        listed = list(tensors)
    check_tensors(**{f"{name}[{i}]": x for i, x in enumerate(listed)})
    if count not in (None, len(listed)):
        raise ValueError(f"{name}={shown(tensors)}: must be {count} tensors, one per image.")
    return listed


def check_alike(tensors: Sequence[Tensor], name: str) -> None:
    """Raise a ValueError unless images (..., C, H, W) have the same channels, type and device."""
    for x in tensors[1:]:
        if x.shape[-3] != tensors[0].shape[-3] or x.dtype != tensors[0].dtype or x.device != tensors[0].device:
            raise ValueError(
                f"{name}={shown(list(tensors))}: all must have the same number of channels, type and device."
            )


def check_mask(
    mask: object, name: str, shapes: Sequence[tuple[int, ...]], like: Tensor | None, means: str, broadcast: bool = False
) -> Tensor:
    """``mask`` if it is a boolean tensor of one of the shapes, on the device of ``like``.

    Args:
        mask: What was given.
        name: The argument's name.
        shapes: What it may have.
        like: What it belongs to; None if whatever device will do.
        means: What it is True for.
        broadcast: Whether it may also be broadcastable to the first shape, and is brought to it.

    Raises:
        TypeError: It is no tensor.
        ValueError: Its shape, type or device is another.
    """
    check_tensors(**{name: mask})
    assert isinstance(mask, Tensor)
    fits = tuple(mask.shape) in [shape for shape in shapes if len(shape) == mask.dim()]  # what an exporter may compare
    if broadcast and mask.dim() <= len(shapes[0]):
        fits = all(side in (1, full) for side, full in zip(mask.shape[::-1], shapes[0][::-1], strict=False))
    device = mask.device if like is None else like.device
    if mask.dtype != torch.bool or mask.device != device or not fits:
        raise ValueError(
            f"{name}={shown(mask)} on {mask.device}: must be boolean, True for {means}, of shape "
            f"{' or '.join(str(shape) for shape in dict.fromkeys(shapes))}, on {device}."
        )
    return mask.expand(shapes[0]) if broadcast else mask


def check_queries(of: nn.Module | None, width: int | None, **named: Tensor) -> None:
    """Raise an error unless ``query``, ``key`` and, where there is one, ``value`` are tokens of the same tiles.

    Args:
        of: The module whose weights they meet, if it has some.
        width: The width that it takes.
        **named: The tokens.

    Raises:
        TypeError: One of them is no tensor, or not of the type or the device of the others and of the weights.
        ValueError: Their widths or leading dimensions differ.
    """
    check_floats(of, **named)
    query, key = named["query"], named["key"]
    alike = query.shape[:-2] == key.shape[:-2] and query.shape[-1] == key.shape[-1] and width in (None, key.shape[-1])
    if query.dim() < 2 or not alike or 0 in query.shape[-1:] or named.get("value", key).shape != key.shape:
        given = ", ".join(f"{name} {tuple(x.shape)}" for name, x in named.items())
        raise ValueError(
            f"got {given}: they must be (..., tokens, {width or 'D'}), with the same leading dimensions and width; key "
            "and value must have one shape."
        )


def misfit(tensor: object, own: Tensor) -> str:
    """Why a tensor of a checkpoint cannot be loaded into a parameter, empty if it can."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        return f"{shown(tensor)} is no dense tensor with contents"
    if tensor.shape != own.shape:
        return f"{tuple(tensor.shape)} in the checkpoint, {tuple(own.shape)} here"
    if not tensor.is_floating_point() or not tensor.to(own.dtype).isfinite().all():
        return f"numbers of {tensor.dtype}, not all of which are finite as {own.dtype}"
    return ""


def check_base(base: Tensor, result: Tensor) -> Tensor:
    """Features of a host that a result is compared with; their type may differ, as under autocast.

    Raises:
        TypeError: They are no floating-point tensor.
        ValueError: They are of another shape, or on another device.
    """
    check_floats(base=base)
    if base.shape != result.shape or base.device != result.device:
        raise ValueError(
            f"base of shape {tuple(base.shape)} on {base.device}: must have the shape of the result, "
            f"{tuple(result.shape)}, and be on {result.device}."
        )
    return base


def check_maps(fusion: nn.Module, v_loc: Tensor, v_glo: Tensor) -> None:
    """Raise an error unless a fusion can merge these maps, of its width ``dim`` if it has one.

    Raises:
        TypeError: One of them is no tensor, or not of the type or the device of the other and of the weights.
        ValueError: Their shapes differ, or do not fit the fusion.
    """
    check_floats(fusion, v_loc=v_loc, v_glo=v_glo)
    width, shape = getattr(fusion, "dim", None), tuple(v_loc.shape)
    around = bool(getattr(fusion, "radius", 0))  # it looks at neighbours
    if shape != tuple(v_glo.shape) or not shape or width not in (None, shape[-1]) or (around and len(shape) != 4):
        expected = f"({'B, H, W' if around else '...'}, {width or 'D'})"
        raise ValueError(
            f"got v_loc {shape} and v_glo {tuple(v_glo.shape)}: {type(fusion).__name__} takes two maps {expected} of "
            "one shape."
        )


def check_width(dim: object, device: object, dtype: object, *, divisor: int = 1) -> int:
    """The width of a layer, if one of this width and type can be made on this device.

    Raises:
        ValueError: The width is no positive multiple of ``divisor``, or type or device are none.
    """
    check_factory(device, dtype)
    return check_count(dim, "dim", high=MOST_WIDTH, multiple_of=divisor)


def check_factory(device: object, dtype: object) -> None:
    """Raise a ValueError unless parameters of this type can be made on this device; None leaves either to torch."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype in FLOATS):
        raise ValueError(f"dtype={shown(dtype)}: must be one of {', '.join(map(str, FLOATS))}, or None.")
    try:
        torch.empty(0, device=cast(Any, device))
    except Exception as error:  # torch has many for this
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device={shown(device)}: must be a device that is there, or None. {reason}") from None


def _layout(x: Tensor) -> str:
    return "nested: give one tensor each, or pad them" if x.is_nested else f"of layout {x.layout}: call .to_dense()"


def _conversion(x: object) -> str:
    """The type of ``x``, and the call that makes a tensor of it."""
    kind = f"{type(x).__module__}.{type(x).__qualname__}".removeprefix("builtins.")
    remedy = "torch.as_tensor(x)"
    if kind.startswith("PIL."):
        remedy = "dualview.load_image(x)"
    elif kind.startswith("numpy."):
        remedy = "torch.from_numpy(x), or dualview.load_image(x) for a picture of height x width x channels"
    elif isinstance(x, str | PathLike):
        remedy = "dualview.load_image(x)"
    elif isinstance(x, list | tuple) and x and isinstance(x[0], Tensor):
        remedy = "torch.stack(x)"
    return f"{kind}. To convert it: {remedy}. It is {shown(x)}"
