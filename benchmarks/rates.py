"""`python -m benchmarks.rates`: measure how fast this machine does each kind of work, and print its records.

Contribute them to dualview/ops/planned/rates.json: by these rates `dualview` chooses how products are arranged.
Sizes are those of the enhancement module at 3 x 3 tiles of 24 x 24 tokens of width 1024. "forward" is measured without
gradients. "training" has the same operations in the time of both passes, with gradients of the weights and of what is
projected, and none of the features, as in the paper's training. `--tiny` tries the script.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.benchmark import Timer

from benchmarks.measure import Place, Run, captured
from benchmarks.results import header
from dualview import DualPerspectiveEnhance
from dualview.kernels.tile_attention import tile_attention
from dualview.ops.planned import products
from dualview.ops.planned.products import Products, Rates

TYPES = {"cpu": ("float32",), "cuda": ("bfloat16", "float16", "float32")}
"""What is measured of each device unless a type is named."""
LAUNCHES = 100

ANY_WIDTH = ((2**20, math.inf),)
WAYS: dict[str, Rates | None] = {
    "projected": Rates(math.inf, ((2**20, 1.0),), 1.0, math.inf, 0.0),
    "absorbed": Rates(1.0, ANY_WIDTH, math.inf, math.inf, 0.0),
    "as written": None,
    "in the fewest launches": Rates(math.inf, ANY_WIDTH, math.inf, math.inf, 1.0),
}
"""Arrangements by hand: what is chosen where nothing but attention, products with weights or launches takes time, or
where nothing has been measured."""


class Sizes:
    """Of what is measured; tiny ones show that the script runs."""

    def __init__(self, device: str, tiny: bool) -> None:
        self.batch, self.tiles = (1, 2) if tiny else (8 if device == "cuda" else 1, 9)
        self.dim = 32 if tiny else 1024
        self.widths = (8, 32) if tiny else (64, 128, 256, 512, 1024)  # of heads; the widest is that of absorbed keys
        self.cells = (2, 3, 2, 3) if tiny else (8, 3, 8, 3)  # rows of cells, their height, columns, their width
        self.seconds = 0.0 if tiny else 1.0

    @property
    def tokens(self) -> int:
        """Of a tile."""
        return math.prod(self.cells)


@contextmanager
def assumed(rates: Rates | None, training: Rates | None = None) -> Iterator[None]:
    """Within the block products are arranged as if these were the rates of every device."""
    measured = products.rates_of

    def assumed_rates(device: torch.device, dtype: torch.dtype, *, training: bool = False, of: Any = training) -> Any:
        return of if training and of is not None else rates

    products.rates_of = assumed_rates
    products.choose_products.cache_clear()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        products.rates_of = measured
        products.choose_products.cache_clear()  # type: ignore[attr-defined]


@contextmanager
def arranged(way: Products) -> Iterator[None]:
    """Within the block products are computed in this way."""
    chosen = products.choose_products
    products.choose_products = lambda *_, **__: way
    try:
        yield
    finally:
        products.choose_products = chosen


def ways(dem: DualPerspectiveEnhance, grid: tuple[int, int], tokens: int, like: Tensor) -> dict[str, Products]:
    """The arrangements by hand that differ for a module and a grid, by name."""
    found: dict[str, Products] = {}
    for name, rates in WAYS.items():
        with assumed(rates):
            way = order_of(dem.products(grid, (tokens, tokens), like))
        if way not in found.values():
            found[name] = way
    return found


def order_of(chosen: Products) -> Products:
    """A way to compute the products, without the times by which it was chosen."""
    return chosen._replace(seconds=None, estimates=())


def measure(place: Place, sizes: Sizes, *, training: bool) -> dict[str, Any]:
    """The rates of a place: operations and moved bytes per second, and seconds of a launch."""

    def given(*shape: int) -> Tensor:
        return place.randn(sizes.batch, sizes.tiles, *shape).requires_grad_(training)

    def seconds(forward: Callable[..., Tensor], *learnt: Tensor, given: Sequence[Tensor] = ()) -> float:
        """Of a pass with gradients of ``learnt``, or without any; on a GPU in a graph, without the host's time."""
        frozen = [x.detach() for x in given]
        run: Run = torch.no_grad()(partial(forward, *learnt, *frozen))
        if training:
            of_out = place.randn(*forward(*learnt, *frozen).shape)
            run = lambda: torch.autograd.grad(forward(*learnt, *frozen), learnt, of_out)  # noqa: E731
        timer = Timer("run()", globals={"run": captured(run, place.device)}, num_threads=torch.get_num_threads())
        return float(timer.blocked_autorange(min_run_time=sizes.seconds).median)

    def attention(*qkv: Tensor, learnt: int, cells: tuple[int, int, int, int] | None = None) -> float:
        """Operations per second of two products with all scores, of which the second meets averages of cells only."""
        q, k = qkv[0], qkv[1]
        scores = q.shape[:-1].numel() * k.shape[2] * q.shape[-1]

        def attend(*x: Tensor) -> Tensor:
            return tile_attention(x[0], x[1], x[-1], scale=0.03, cells=cells)

        took = seconds(attend, *qkv[:learnt], given=qkv[learnt:])
        return 2 * (scores + scores / (cells[1] * cells[3] if cells else 1)) / took

    def repeated(x: Tensor) -> Tensor:
        for _ in range(LAUNCHES):
            x = x * 0.5
        return x

    tokens, dim = sizes.tokens, sizes.dim
    x, weight = given(tokens, dim), place.randn(dim, dim).requires_grad_(training)
    by_width = []
    for width in sizes.widths[:-1]:
        projected = (given(tokens, dim // width, width) for _ in range(3))
        by_width.append((width, attention(*projected, learnt=3)))
    keys, queries = given(tokens, 1, dim), given(sizes.cells[0] * sizes.cells[2], 8, dim)
    by_width.append((dim, attention(queries, keys, learnt=1)))  # absorbed: all heads ask the same keys
    return {
        "dense": 2 * x.numel() * dim / seconds(lambda weight, x: F.linear(x, weight), weight, given=[x]),
        "attention": by_width,
        "pooled": attention(given(tokens, 1, dim), keys, learnt=1, cells=sizes.cells),
        "moved": 2 * x.numel() * x.element_size() / seconds(lambda x: x * 0.5, x),
        "launch": seconds(repeated, place.randn(8).requires_grad_(training)) / LAUNCHES,
    }


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rates", description=__doc__)
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=here, choices=tuple(TYPES), help="default: a GPU, if there is one")
    parser.add_argument("--dtype", choices=TYPES["cuda"], help="default: every type that is usual on the device")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--tiny", action="store_true", help="small sizes: no figures, only whether it runs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    types = (options.dtype,) if options.dtype else TYPES[options.device]
    print(json.dumps([record(options.device, dtype, options.tiny) for dtype in types], indent=2))


def name_of(device: str) -> str:
    """The name of this machine's device in rates.json."""
    return "cuda sm_{}{}".format(*torch.cuda.get_device_capability()) if device == "cuda" else device


def record(device: str, dtype: str, tiny: bool) -> dict[str, Any]:
    """The rates of a device and a type, with where they come from."""
    place, sizes = Place(device, getattr(torch, dtype)), Sizes(device, tiny)
    machine = header(device, place.dtype, "rates", "skipped", 0)["machine"]["name"]
    where = f"{machine}, torch {torch.__version__}, {date.today().isoformat()}, batch {sizes.batch}"
    return {
        "device": name_of(device),
        "dtypes": [dtype],
        "source": f"python -m benchmarks.rates: {where}" + (", tiny sizes: no rates" if tiny else ""),
        "forward": measure(place, sizes, training=False),
        "training": measure(place, sizes, training=True),
    }


if __name__ == "__main__":
    main()
