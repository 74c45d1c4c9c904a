"""The kernels' tests and the suites on a GPU, in one call of less than nine minutes: `python -m benchmarks.gpu`.

The tests come first. Unless they pass, torch alone is measured, and what kernels would have done is missing, with the
reason. bfloat16 first, all sizes; then float16 for as long as there is time. Every type writes a result file of its
own, which `python -m benchmarks.report` puts on the page.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch

import dualview as dv
from benchmarks import results, runner
from benchmarks.cases import OF_KERNELS, Size
from benchmarks.measure import Place

TEST_SECONDS = 170
SECONDS = 470
"""For the tests and all types: half a minute stays for the start, and half a minute for the case that is under way."""


def main() -> None:
    """Test and measure on the GPU (``--device cpu --size tiny`` tries the script where there is none)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--size", default="gpu", choices=("gpu", "tiny"))
    parser.add_argument("--output", type=Path, default=results.FOLDER, help="folder of the result files")
    options = parser.parse_args()
    start, size = time.perf_counter(), options.size
    workers = str(min(8, len(os.sched_getaffinity(0))))
    gate = runner.run_tests("--numprocesses", workers, "tests/kernels", seconds=TEST_SECONDS)
    print(f"tests/kernels {gate} ({time.perf_counter() - start:.0f} s)", flush=True)
    for dtype, share in ((torch.bfloat16, 0.7), (torch.float16, 1.0)):
        left = SECONDS - (time.perf_counter() - start)
        measure_type(Place(options.device, dtype), size, gate, left * share, options.output)


def measure_type(place: Place, size: Size, gate: str, seconds: float, folder: Path) -> None:
    """All suites in one type."""
    green = gate == "passed"
    refused = {} if green else dict.fromkeys(OF_KERNELS, f"not run: tests/kernels {gate}")
    with dv.use_backend("auto" if green else "torch"):
        document = runner.run(place, size, gate=gate, deadline=seconds, refused=refused)
    path = folder / f"{place.device}-{size}-{document['dtype']}.json"
    results.write(document, path)
    print(f"wrote {path}: {len(document['rows'])} rows", flush=True)


if __name__ == "__main__":
    main()
