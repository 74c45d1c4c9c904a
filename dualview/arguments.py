"""Checks of arguments that are no tensors, one for each kind, and how errors show a value.

Every message has the name of the argument, its value, the rule and the remedy. Nothing here imports torch, so that the
command line need not wait for it; checks of tensors are in `dualview.tensors`.
"""

from __future__ import annotations

import math
import operator
import os
import reprlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar, cast

T = TypeVar("T")

MOST = 2**31 - 1
"""Largest count, and longest side, that is taken."""
TEXTS = (str, bytes, bytearray, memoryview)
"""Sequences that are no lists of anything."""
MOST_WIDTH = 65_536
"""Widest tokens that are taken: far more than a model has, and a mistake does not fill the memory."""


def check_count(
    value: object,
    name: str,
    *,
    low: int = 1,
    high: int = MOST,
    multiple_of: int = 1,
    divisor_of: int | None = None,
    why: str = "",
) -> int:
    """``value`` as an integer from ``low`` to ``high``; NumPy's integers are some, booleans are not.

    Args:
        value: What was given.
        name: The argument's name.
        low: Smallest number allowed.
        high: Largest number allowed.
        multiple_of: What it must be a multiple of.
        divisor_of: A width that it must divide.
        why: What the message adds.

    Raises:
        ValueError: It is something else.
    """
    count = integer_of(value)
    if (
        count is None
        or not low <= count <= high
        or count % multiple_of
        or (divisor_of is not None and divisor_of % count)
    ):
        rule = "integer" if multiple_of == 1 else f"multiple of {multiple_of}"
        rule = rule if divisor_of is None else f"divisor of the width {divisor_of}"
        rule = f"a positive {rule}" if low == 1 else f"an {rule} of at least {low:,}"
        rule += f", at most {high:,}" if high < MOST else ""
        raise ValueError(f"{name}={shown(value)}: must be {rule}.{why and f' {why}'}")
    return count


def check_index(value: object, name: str) -> int | None:
    """``value`` as an integer, positive or negative; None stays None.

    Raises:
        ValueError: It is something else.
    """
    index = integer_of(value)
    if index is None and value is not None:
        raise ValueError(f"{name}={shown(value)}: must be an integer.")
    return index


def check_indices(values: object, name: str) -> tuple[int, ...]:
    """A sequence of integers.

    Raises:
        ValueError: It is something else.
    """
    try:
        found = [None] if isinstance(values, (*TEXTS, Mapping)) else [integer_of(each) for each in cast(Any, values)]
    except (TypeError, RuntimeError):
        found = [None]
    if None in found:
        raise ValueError(f"{name}={shown(values)}: must be a sequence of integers.")
    return tuple(index for index in found if index is not None)


def check_number(value: Any, name: str, *, above: float = -math.inf) -> float:
    """``value`` as a finite number larger than ``above``.

    Raises:
        ValueError: It is something else.
    """
    if not (number := number_of(value)) > above or math.isinf(number):
        bound = {-math.inf: "", 0: "positive, "}.get(above, f"larger than {above:g}, ")
        raise ValueError(f"{name}={shown(value)}: must be a {bound}finite number.")
    return number


def check_numbers(values: Any, name: str, count: int | None, *, zero: bool = True) -> list[float]:
    """A sequence of ``count`` finite numbers, of any number if None, without a zero unless ``zero``.

    Raises:
        ValueError: It is something else.
    """
    scalar = isinstance(values, TEXTS) or not isinstance(values, Iterable) or getattr(values, "shape", None) == ()
    numbers = [] if scalar else [number_of(value) for value in values]
    if (
        scalar
        or len(numbers) != (count or len(numbers))
        or not all(map(math.isfinite, numbers))
        or (not zero and 0 in numbers)
    ):
        rule = "finite" if zero else "finite and not 0"
        channels = "" if count is None else f", for {count} channels"
        raise ValueError(f"{name}={shown(values)}: must be one number per channel{channels}, all {rule}.")
    return numbers


def check_size(value: object, name: str, *, high: int = MOST) -> tuple[int, int]:
    """``value`` as a pair of positive integers (height, width), at most ``high``; one integer stands for a square.

    Whatever counts as an integer does (NumPy's integers too); under ``torch.export`` and ``torch.compile`` the values
    may be symbolic.

    Raises:
        ValueError: It is something else.
    """
    if isinstance(value, tuple) and len(value) == 2:
        height, width = value
        if _is_side(height, high) and _is_side(width, high):
            return operator.index(height), operator.index(width)
    many = hasattr(value, "__getitem__") and not isinstance(value, (*TEXTS, Mapping))
    try:
        pair = tuple(cast("Iterable[object]", value)) if many else (value, value)
    except (TypeError, RuntimeError):  # tensors and arrays without dimensions, or of a layout of their own
        pair = (value, value)
    sides = [side for side in map(integer_of, pair) if side is not None and 1 <= side <= high] if len(pair) == 2 else []
    if len(sides) != 2:
        most = "" if high == MOST else f", at most {high:,}"
        raise ValueError(
            f"{name}={shown(value)}: must be two positive integers (height, width), or one for a square{most}."
        )
    return sides[0], sides[1]


def _is_side(side: object, high: int) -> bool:
    return isinstance(side, int) and not isinstance(side, bool) and 1 <= side <= high


def check_choice(value: T, name: str, choices: Collection[object], *, also: str = "") -> T:
    """``value`` if it is one of the choices: strings, or None.

    Args:
        value: What was given.
        name: The argument's name.
        choices: What is allowed; a mapping says of each what it means.
        also: What else is allowed, and has been looked for before.

    Raises:
        ValueError: It is none of them.
    """
    if (isinstance(value, str) or value is None) and value in choices:
        return value
    meanings = choices if isinstance(choices, Mapping) else {}
    named = [_quoted(choice) + (f" ({meanings[choice]})" if choice in meanings else "") for choice in choices]
    last = also or named.pop()
    raise ValueError(f"{name}={shown(value)}: must be {', '.join(named)}{' or ' if named else ''}{last}.")


def check_flags(**named: object) -> None:
    """Raise a ValueError for the first argument that is neither True nor False."""
    for name, value in named.items():
        if value is not True and value is not False and type(value).__name__ not in ("bool", "bool_"):  # NumPy's
            raise ValueError(f"{name}={shown(value)}: must be True or False.")


def check_path(value: str | os.PathLike[str], name: str) -> str:
    """``value`` as the text of a path.

    Raises:
        TypeError: It is no path.
    """
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(path, str) or not path:
        raise TypeError(f"{name}={shown(value)}: must be a path.")
    return path


def check_mapping(value: Mapping[str, T], name: str) -> Mapping[str, T]:
    """``value`` if it is a mapping of names.

    Raises:
        TypeError: It is something else.
    """
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"{name}={shown(value)}: must be a mapping of names to tensors, as torch.load gives.")
    return value


def check_instance(value: T, name: str, types: type | tuple[type, ...], what: str) -> T:
    """``value`` if it is of one of the types.

    Raises:
        TypeError: It is something else.
    """
    if not isinstance(value, types):
        raise TypeError(f"{name}={shown(value)}: must be {what}.")
    return value


def check_callable(value: T, name: str, what: str) -> T:
    """``value`` if it can be called and is no class.

    Raises:
        TypeError: It cannot.
    """
    if not callable(value) or isinstance(value, type):
        made = f"an instance of {value.__name__}, not the class" if isinstance(value, type) else what
        raise TypeError(f"{name}={shown(value)}: must be {made}.")
    return value


def integer_of(value: Any) -> int | None:
    """What counts as an integer, None for all else."""
    if isinstance(value, bool) or (not isinstance(value, int) and _no_scalar(value)):
        return None
    try:
        return operator.index(value)  # which makes one number of a symbolic one
    except TypeError:
        return None


def shown(value: object) -> str:
    """A value as errors show it: in one line, cut short, arrays and tensors by their shape and type.

    Example:
        >>> shown([2.5, "a" * 100])
        "[2.5, 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa...aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa']"
    """
    return _SHORT.repr(value)


class _Short(reprlib.Repr):
    """Arrays and tensors by shape and type, all else cut short."""

    def repr1(self, x: Any, level: int) -> str:
        try:
            shape = getattr(x, "shape", None)
            if isinstance(shape, tuple) and shape and hasattr(x, "dtype"):
                return f"{type(x).__name__} of shape {tuple(shape)} and type {x.dtype}"
            return " ".join(super().repr1(x, level).split())
        except Exception:  # nested tensors have no shape, and anything may have no text
            return f"{type(x).__name__} (which cannot be printed)"


_SHORT = _Short()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def _quoted(choice: object) -> str:
    return f'"{choice}"' if isinstance(choice, str) else str(choice)


def _no_scalar(value: Any) -> bool:
    """Whether it is a boolean of NumPy or torch, or an array or a tensor with dimensions."""
    return "bool" in str(getattr(value, "dtype", "")) or bool(getattr(value, "ndim", 0))


def number_of(value: Any) -> float:
    """A real number, NaN for all else."""
    if isinstance(value, (bool, *TEXTS)) or _no_scalar(value):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return math.nan
