"""Rates of machines that do not exist, for which each arrangement of products is the fastest."""

import math
from contextlib import AbstractContextManager

from benchmarks.rates import assumed
from dualview.ops.planned.products import Rates


def of(*, dense: float = 1.0, attention: float = 1.0, pooled: float = 1.0, launch: float = 0.0) -> Rates:
    """As many operations a second of every kind, unless told otherwise."""
    return Rates(dense, ((2**20, attention),), pooled, math.inf, launch)


MACHINES: dict[str, Rates | None] = {
    "operations count": of(),
    "attention is free": of(attention=1e6, pooled=1e6),
    "projections are free": of(dense=1e6),
    "pooled attention is slow": of(pooled=1e-6),
    "launches count": of(launch=1e9),
    "operations count, then launches": of(launch=1e-3),
    "never measured": None,
}


def machine(name: str) -> AbstractContextManager[None]:
    """Within the block products are arranged for one of `MACHINES`."""
    return assumed(MACHINES[name])
