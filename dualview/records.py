"""Results that hold tensors and what is known of them: moved, pinned, printed and taken apart by torch as one thing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import Any, ClassVar, Self, TypeAlias

from torch import Tensor
from torch.utils._pytree import GetAttrKey, KeyEntry, register_pytree_node, tree_map_only

Known: TypeAlias = tuple[tuple[str, ...], tuple[tuple[str, Any], ...]]
"""The names of the tensors, and the other fields."""


class Record:
    """Base of frozen dataclasses some of whose fields are tensors, or None, or such records.

    These fields are named when a class is made, ``class TileBatch(Record, tensors=("data",))``. They are leaves of
    torch's pytrees, so `torch.compile`, `vmap` and `export` take and return records; what is known of them goes along.
    A record that torch puts together is not checked: it may hold anything in place of tensors.
    """

    _tensors: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls, *, tensors: tuple[str, ...] | None = None) -> None:
        super().__init_subclass__()
        cls._tensors = cls._tensors if tensors is None else tensors
        register_pytree_node(
            cls,
            _apart,
            partial(_together, cls),
            serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
            flatten_with_keys_fn=_apart_with_keys,
        )

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """The same with every tensor on another device or of another type; arguments as for `torch.Tensor.to`."""
        moved: Self = tree_map_only(Tensor, lambda x: x.to(*args, **kwargs), self)
        return moved

    def pin_memory(self) -> Self:
        """The same in page-locked memory, from which copies to a GPU need not wait: a `DataLoader` calls it."""
        pinned: Self = tree_map_only(Tensor, Tensor.pin_memory, self)
        return pinned

    def __repr__(self) -> str:
        return short_repr(self)


def short_repr(record: Any) -> str:
    """A dataclass or a named tuple, its tensors by shape, type and device."""
    names: Sequence[str] = getattr(record, "_fields", ()) or [field.name for field in fields(record) if field.repr]
    return f"{type(record).__name__}({', '.join(f'{name}={_short(getattr(record, name))}' for name in names)})"


def _short(value: object) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return (
        f"<{' x '.join(map(str, value.shape)) or 'scalar'}, {str(value.dtype).removeprefix('torch.')}, {value.device}>"
    )


def _apart(record: Record) -> tuple[list[Any], Known]:
    held = tuple(name for name in record._tensors if getattr(record, name) is not None)
    rest = tuple((field.name, getattr(record, field.name)) for field in fields(record) if field.name not in held)  # type: ignore[arg-type]
    return [getattr(record, name) for name in held], (held, rest)


def _apart_with_keys(record: Record) -> tuple[list[tuple[KeyEntry, Any]], Known]:
    values, known = _apart(record)
    return [(GetAttrKey(name), value) for name, value in zip(known[0], values, strict=True)], known


def _together(cls: type[Record], values: Sequence[Any], known: Known) -> Record:
    record, (held, rest) = object.__new__(cls), known
    for name, value in (*zip(held, values, strict=True), *rest):
        object.__setattr__(record, name, value)
    return record
