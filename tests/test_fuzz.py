"""Wrong arguments of every kind end in an error of the package that names the argument and shows its value."""

import inspect
import os
import re
from typing import Any

import pytest
import torch
from torch import nn

import dualview as dv
import dualview.models
import dualview.train
from dualview.arguments import check_count
from dualview.ops import functional
from tests.fuzz import Row, draws, fault_of, try_call
from tests.fuzz_rows import RECORDS, rows

DRAWS = 5_000 if os.environ.get("TEST_ALL") else 600


def public() -> dict[str, Any]:
    """What is public and can be called, by the names that rows have."""
    found = {name: getattr(dv, name) for name in dv.__all__}
    found |= {name: getattr(dualview.models, name) for name in dualview.models.__all__}
    found |= {name: getattr(dualview.train, name) for name in dualview.train.__all__}
    found |= {name: getattr(functional, name) for name in functional.__all__}
    found |= {f"testing.{name}": getattr(dv.testing, name) for name in dv.testing.__all__}
    return {name: thing for name, thing in found.items() if callable(thing) and name not in RECORDS}


def methods(cls: type) -> set[str]:
    """What a class lets its users call: its own methods and those of its bases in the package."""
    found = [(name, getattr(member, "__func__", member)) for base in cls.__mro__ for name, member in vars(base).items()]
    names = {name for name, member in found if inspect.isfunction(member) and member.__module__.startswith("dualview.")}
    return {name for name in names if not name.startswith("_")} - {"extra_repr", "reset_parameters"}


def test_every_public_callable_has_a_row() -> None:
    """A new one needs a valid call in `tests.fuzz_rows`."""
    covered = {re.split(" of |,| with ", name)[0] for name in rows()}
    wanted = set()
    for name, thing in public().items():
        wanted.add(name)
        if inspect.isclass(thing):
            wanted |= {f"{name}.{method}" for method in methods(thing)}
    assert not wanted - covered, f"no rows for {sorted(wanted - covered)}"
    assert not covered - wanted, f"rows for nothing public: {sorted(covered - wanted)}"


@pytest.mark.parametrize("name", rows())
def test_every_row_is_a_valid_call(name: str) -> None:
    row = rows()[name]
    row.call(**row.fixed, **row.given)


def test_wrong_arguments_are_named() -> None:
    found = [str(finding) for finding in draws(rows(), DRAWS, seed=DRAWS)]
    assert not found, f"{len(found)} of {DRAWS}:\n" + "\n".join(found[:20])


@pytest.mark.parametrize(
    ("call", "fault"),
    [
        (lambda x: torch.zeros(2)[x], "raised by"),
        (lambda x: nn.Linear(2, 2).forward(x), "raised by"),
        (lambda x: dv.TileGrid(2, x), "names none"),
        (lambda x: dv.TileBatch.collate([torch.zeros(6, 3)] * (x is None), []), "names none"),
        (lambda x: check_count(0, "x"), "shows the value of none"),
    ],
)
def test_errors_that_do_not_help_are_found(call: Any, fault: str) -> None:
    """Of others, without the name, without the value: the fuzz would be worth nothing if it let them pass."""
    for wrong in ("wrong", -7):
        finding = try_call("call", Row(call, {"x": 3}), {"x": wrong})
        assert finding is not None
        assert fault in str(finding)


def test_what_python_raises_in_the_package_is_no_error_of_it() -> None:
    with pytest.raises(AttributeError) as raised:
        dv.DualPerspectiveEnhance.extra_repr(None)  # type: ignore[arg-type]
    assert "not by a raise" in fault_of(raised.value, {"self": None}, {})
