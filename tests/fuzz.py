"""Wrong arguments for every public callable: the table, the pool, and what an error must be.

A row is a valid call. A draw puts values of the pool in the place of one or two of its arguments; then the call must
succeed, or raise an error that a ``raise`` of the package made and that names one of them and shows its value.
"""

from __future__ import annotations

import dis
import re
import signal
import time
import warnings
from collections import UserList
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction
from pathlib import Path
from random import Random
from types import FrameType, MappingProxyType, SimpleNamespace, TracebackType
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import dualview as dv
from dualview.arguments import shown

PACKAGE = Path(dv.__file__).parent
KINDS = (ValueError, TypeError, RuntimeError, ImportError, IndexError, FileNotFoundError, FileExistsError)
"""What an error may be; and no subclass of RuntimeError or others that Python raises of itself."""
NOT_OURS = (NotImplementedError, RecursionError, UnicodeError)
LONGEST = 5.0
"""Seconds that a call may take."""


class Row(NamedTuple):
    """A valid call: what is called, and with what."""

    call: Callable[..., object]
    given: Mapping[str, object] = {}
    fixed: Mapping[str, object] = {}
    """Arguments that are never replaced."""
    aliases: Mapping[str, str] = {}
    """What an argument may be called in place of its name: a regular expression."""


class Finding(NamedTuple):
    """A call whose error is not as it should be."""

    row: str
    replaced: dict[str, str]
    fault: str

    def __str__(self) -> str:
        given = ", ".join(f"{name}={value}" for name, value in self.replaced.items())
        return f"{self.row}({given}): {self.fault}"


# --- The pool ---------------------------------------------------------------------------------------------------------


class Unprintable:
    """Its text cannot be had."""

    def __repr__(self) -> str:
        raise RuntimeError


class Odd(IntEnum):
    """An integer by another name."""

    TWO = 2


class Name(str):
    """A text of another class."""


def anything() -> list[object]:
    """Values of every kind, wrong for most arguments."""
    flat = [None, True, False, 0, 1, -1, 2, 3, 7, 2.5, float("nan"), float("inf"), 10**9, 10**30, 2**31, -(10**30)]
    texts = ["", "abc", "local", "none", "channels_last", "cuda:7", "meta", "2x3", b"abc", "a" * 300]
    numpy_ = [np.int64(2), np.float32(2.5), np.float64(2), np.bool_(True), np.uint8(3), np.str_("local")]
    numpy_ += [np.array(3), np.array([1, 2]), np.zeros((2, 3)), np.zeros((8, 9, 3), np.uint8), np.array([object()])]
    tensors = [torch.tensor(2), torch.tensor(2.5), torch.tensor(True), torch.tensor([1, 2]), torch.rand(0)]
    tensors += [torch.rand(2, 3), torch.rand(1, 3, 8, 9), torch.rand(1, 6, 2, 3, 8), torch.rand(3, 0, 9)]
    pairs = [(2,), (2, 3), [2, 3], (2, 3, 4), (0, 1), (-1, 2), (2.5, 1), (2.0, 3.0), (True, 2), (float("nan"), 2)]
    pairs += [("2", "3"), (None, None), [[0], [1]], ([0, 0], [1]), ([0.5], [1]), (10**9, 10**9), (16384, 1), (7, 1)]
    pairs += [([99], [1]), (np.int64(2), np.int64(3)), (torch.tensor(2), 3), [(2, 3)], [(1, 1)] * 2]
    empty = [[], (), {}, set(), range(0), iter(()), (x for x in (1, 2))]
    objects = [object(), object, int, dv.TileGrid(2, 3), dv.TileGrid(3, 2), dv.TileGrid, nn.Linear(8, 8), len]
    objects += [lambda *_, **__: None, torch.float32, torch.int64, torch.complex64, torch.float8_e4m3fn]
    objects += [torch.device("cpu"), torch.device("meta"), slice(1, 2), range(3), {"a": 1}, {1, 2}, ...]
    objects += [Path("nowhere.png"), Image.new("RGB", (9, 8)), SimpleNamespace(shape=(1, 2)), Unprintable(), 1j]
    rare = [
        Decimal(2),
        Fraction(3, 2),
        date(2024, 1, 1),
        np.datetime64("2024"),
        np.array("x"),
        np.float16("nan"),
        Odd.TWO,
    ]
    rare += [
        bytearray(b"ab"),
        memoryview(b"ab"),
        torch.Generator(),
        torch.Size([2, 3]),
        UserList([2, 3]),
        Name("local"),
    ]
    rare += [MappingProxyType({"a": 1}), range(2, 4), np.zeros((2, 3)).T, np.complex64(1), nn.Sequential(), 1 << 40]
    rare += [torch.zeros((1,) * 12), torch.zeros(2, 3, dtype=torch.uint16), torch.zeros(1, 3, 8, 9).expand(2, 3, 8, 9)]
    rare += [torch.quantize_per_tensor(torch.zeros(2, 3), 1.0, 0, torch.quint8), torch.zeros(2, 3).to_mkldnn()]
    rare += [torch.zeros(1, 3, 8, 9, dtype=torch.float8_e5m2), torch.zeros(2, 3, dtype=torch.complex64).conj()]
    return [*flat, *texts, *numpy_, *tensors, *pairs, *empty, *objects, *rare]


def near(valid: object) -> list[object]:
    """Values that are nearly right: of another rank, size, type, device or layout, or in another container."""
    if isinstance(valid, Tensor):
        found: list[object] = [valid[None], valid.flatten(), valid.mT if valid.dim() > 1 else valid, valid[..., :1]]
        found += [valid[..., None], valid[:0], valid[..., :0], torch.cat([valid, valid]), valid.to("meta")]
        found += [valid.to(d) for d in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8)]
        found += [valid.to(d) for d in (torch.bool, torch.complex64, torch.float8_e4m3fn)]
        found += [valid.float() * float("nan"), valid.float() + float("inf"), valid.to_sparse()]
        found += [valid.numpy(), valid.tolist(), [valid], (valid, valid), {"x": valid}, nn.Parameter(valid.float())]
        found += [torch.nested.nested_tensor([valid.float(), valid.float()], layout=torch.jagged)]
        found += [torch.nested.nested_tensor([valid.float(), valid.float()])]
        found += [x for k in range(valid.dim()) if valid.shape[k] for x in [valid.narrow(k, 0, valid.shape[k] - 1)]]
        found += [valid[0]] if valid.dim() and len(valid) else []
        return found
    if isinstance(valid, (list, tuple)) and valid:
        other = [[*valid, valid[0]], valid[:-1], [None, *valid[1:]], list(valid), tuple(valid), iter(valid), [valid]]
        other += [dict(enumerate(valid))]
        return other + [[bad, *valid[1:]] for bad in near(valid[0])]
    if isinstance(valid, bool):
        return [int(valid), str(valid), np.bool_(valid), torch.tensor(valid), [valid]]
    if isinstance(valid, int):
        return [valid + 1, -valid, float(valid), np.int32(valid), np.float64(valid), str(valid), [valid], 10**9 + valid]
    if isinstance(valid, float):
        return [-valid, str(valid), np.float32(valid), [valid], complex(valid), 10**400]
    if isinstance(valid, str):
        return [valid.upper(), valid + " ", [valid], np.str_(valid), valid.encode()]
    return [[valid], (valid, valid), type(valid)]


# --- What an error must be --------------------------------------------------------------------------------------------


def fault_of(error: BaseException, given: Mapping[str, object], aliases: Mapping[str, str]) -> str:
    """What is wrong with an error, empty if nothing is."""
    text = str(error)
    said = f"{type(error).__name__}: {' '.join(text.split())[:300]}"
    innermost = _innermost(error.__traceback__)
    where = f"{innermost.tb_frame.f_code.co_filename}:{innermost.tb_lineno}"
    if not Path(innermost.tb_frame.f_code.co_filename).is_relative_to(PACKAGE):
        return f"raised by {where}: {said}"
    if not isinstance(error, (*KINDS, AssertionError)) or isinstance(error, NOT_OURS) or not _by_raise(innermost):
        return f"of no documented kind, or not by a raise, at {where}: {said}"
    named = [name for name in given if re.search(rf"\b({aliases.get(name, name)})\b", text)]
    if not named:
        return f"names none of {list(given)}: {said}"
    return "" if any(_shows(text, given[name]) for name in named) else f"shows the value of none of {named}: {said}"


def _innermost(traceback: TracebackType | None) -> TracebackType:
    assert traceback is not None
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback


def _by_raise(traceback: TracebackType) -> bool:
    """Whether a frame was left by a `raise`, and not by what Python itself raises."""
    code = traceback.tb_frame.f_code
    name = next(i.opname for i in dis.get_instructions(code) if i.offset == traceback.tb_lasti)
    return name in ("RAISE_VARARGS", "RERAISE")


def _shows(text: str, value: object) -> bool:
    """Whether a value, its type or its shape stands in a text."""
    marks = {shown(value)[:30]}
    if re.search(rf"\b{type(value).__name__}\b", text):  # "int" stands in "integer", "list" in "listed"
        return True
    if isinstance(value, type):
        marks.add(value.__name__)
    if getattr(value, "is_nested", False):  # which has no shape
        return any(mark in text for mark in marks)
    if isinstance(value, (Tensor, np.ndarray)):
        marks |= {
            str(tuple(value.shape)),
            str(tuple(value.shape[-2:])),
            str(value.dtype).removeprefix("torch."),
            " x ".join(map(str, value.shape[-2:])),
        }
        marks |= {f"{value.shape[0]} images"} if value.ndim else set()
        marks |= {str(value.device)} if isinstance(value, Tensor) else set()
        marks |= {" x ".join(map(str, value.shape[-3:-1]))} if value.ndim > 2 else set()
    if isinstance(value, (list, tuple, range, set, UserList, dv.TileGrid)) and not hasattr(value, "_fields"):
        parts = list(value)
        marks |= {"x".join(map(str, parts)), " x ".join(map(str, parts)), str(tuple(parts))}
        marks |= {shown(tuple(parts)), shown(list(parts))}
        return any(mark and mark in text for mark in marks) or any(_shows(text, part) for part in parts)
    if isinstance(value, Mapping):
        marks |= {f"{key!r}: {each!r}" for key, each in value.items()}
    if isinstance(value, (str, Path)):
        marks.add(str(value))
    if isinstance(value, (int, float, np.generic)) or getattr(value, "shape", None) == ():
        value = value.item() if hasattr(value, "item") else value
    if isinstance(value, (int, float)):
        marks |= {str(value), f"{value:,}", str(float(value)) if abs(value) < 1e300 else ""}
    return any(mark and mark in text for mark in marks)


# --- Draws ------------------------------------------------------------------------------------------------------------


class Hangs(BaseException):
    """A call takes too long."""


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def stop(signum: int, frame: FrameType | None) -> None:
        raise Hangs

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def try_call(name: str, row: Row, replaced: Mapping[str, object]) -> Finding | None:
    """Call once with some arguments replaced."""
    given, start = {**row.fixed, **row.given, **replaced}, time.perf_counter()
    fault = ""
    try:
        with _limited(LONGEST), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row.call(**given)
    except Hangs:
        fault = f"takes more than {LONGEST} s"
    except Exception as error:
        fault = fault_of(error, given, row.aliases)
    if time.perf_counter() - start > LONGEST:
        fault = fault or f"takes more than {LONGEST} s"
    return Finding(name, {key: shown(value) for key, value in replaced.items()}, fault) if fault else None


def draws(rows: Mapping[str, Row], count: int, seed: int) -> Iterator[Finding]:
    """Try ``count`` wrong calls, the rows in turn, and give what is wrong."""
    random, pool, names = Random(seed), anything(), [name for name, row in rows.items() if row.given]
    for k in range(count):
        name = names[k % len(names)]
        row = rows[name]
        chosen = random.sample(sorted(row.given), k=min(len(row.given), 1 if random.random() < 0.75 else 2))
        replaced = {
            argument: random.choice(near(row.given[argument]) if random.random() < 0.5 else pool) for argument in chosen
        }
        finding = try_call(name, row, replaced)
        if finding is not None:
            yield finding
