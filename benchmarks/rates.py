"""`python -m benchmarks.rates`: measure how fast a device does each kind of work, and print a record of it.

Contribute the record to dualview/ops/planned/rates.json: by these rates `dualview` chooses how products are arranged.
Sizes are those of the enhancement module at 3 x 3 tiles of 24 x 24 tokens of width 1024.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.benchmark import Timer

from benchmarks.measure import Place
from benchmarks.results import header
from dualview.kernels.tile_attention import tile_attention
from dualview.ops.planned import products
from dualview.ops.planned.products import Arrangement, Products, Rates

DIM, TILES, TOKENS = 1024, 9, 576
CELLS = (8, 3, 8, 3)
"""Rows of cells and their height, columns of cells and their width: the tokens of a tile."""
WIDTHS = (64, 128, 256, 512, 1024)


@contextmanager
def assumed(rates: Rates | None) -> Iterator[None]:
    """Within the block products are arranged as if these were the rates of every device."""
    measured = products.rates_of
    products.rates_of = lambda device, dtype: rates
    products.choose_products.cache_clear()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        products.rates_of = measured
        products.choose_products.cache_clear()  # type: ignore[attr-defined]


@contextmanager
def arranged(arrangement: Arrangement) -> Iterator[None]:
    """Within the block every direction is computed in this way."""
    chosen = products.choose_products
    products.choose_products = lambda spec, sizes, *_, **__: Products((arrangement,) * len(sizes))
    try:
        yield
    finally:
        products.choose_products = chosen


def median(call: Callable[[], object]) -> float:
    """Seconds of a call, device work included."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=1.0).median)


def launch(place: Place) -> float:
    """Seconds that one more small operation takes: on a GPU as part of a graph, so without the host's time."""
    small, count = torch.ones(8, device=place.device), 100
    if place.device != "cuda":
        return median(lambda: small.add_(1))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            small.add_(1)
    return median(graph.replay) / count


def measure(place: Place, batch: int) -> dict[str, object]:
    """The rates of a place: operations and moved bytes per second, and seconds of a launch."""

    def tokens(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, device=place.device, dtype=place.dtype)

    x, weight = tokens(TILES * TOKENS, DIM), torch.randn(DIM, DIM, device=place.device, dtype=place.dtype)
    dense = 2 * batch * TILES * TOKENS * DIM**2 / median(lambda: F.linear(x, weight))

    def attend(q: Tensor, k: Tensor, v: Tensor, *, cells: tuple[int, int, int, int] | None = None) -> float:
        """Operations per second of two products with all scores, of which the second meets averages of cells only."""
        scores = q.shape[:-1].numel() * k.shape[2] * q.shape[-1]
        call = partial(tile_attention, scale=0.03, cells=cells)
        return 2 * (scores + scores / (cells[1] * cells[3] if cells else 1)) / median(lambda: call(q, k, v))

    attention = []
    for width in WIDTHS[:-1]:
        heads = DIM // width
        attention.append((width, attend(*(tokens(TILES, TOKENS, heads, width) for _ in range(3)))))
    keys = tokens(TILES, TOKENS, 1, DIM)
    attention.append((DIM, attend(tokens(TILES, CELLS[0] * CELLS[2], 8, DIM), keys, keys)))  # absorbed
    q = tokens(TILES, TOKENS, 1, DIM)
    return {
        "dense": dense,
        "attention": attention,
        "pooled": attend(q, keys, keys, cells=CELLS),
        "moved": 2 * x.numel() * x.element_size() / median(x.clone),
        "launch": launch(place),
    }


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rates", description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    place = Place(options.device, getattr(torch, options.dtype))
    name = options.device
    if name == "cuda":
        name += " sm_{}{}".format(*torch.cuda.get_device_capability())
    with torch.no_grad():
        rates = measure(place, batch=8 if options.device == "cuda" else 1)
    machine = header(options.device, place.dtype, "rates", "skipped", 0)["machine"]["name"]
    where = f"{machine}, torch {torch.__version__}, {date.today().isoformat()}"
    record = {"device": name, "dtypes": [options.dtype], "source": f"python -m benchmarks.rates: {where}", **rates}
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
