"""The same suites on a GPU, in one call of less than nine minutes: `python -m benchmarks.gpu`.

bfloat16 first, all sizes; then float16 for as long as there is time. Every type writes a result file of its own, which
`python -m benchmarks.report` puts on the page.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from benchmarks import results, runner
from benchmarks.cases import Size
from benchmarks.measure import Place

SECONDS = 480
"""For all types together: half a minute stays for the start, and half a minute for the case that is under way."""
SUITES = ("dem", "prefix", "ops", "photo", "train_step", "preprocess", "scaling")


def main() -> None:
    """Measure on the GPU (``--device cpu --size tiny`` tries the script where there is none)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--size", default="gpu", choices=("gpu", "tiny"))
    parser.add_argument("--output", type=Path, default=results.FOLDER, help="folder of the result files")
    options = parser.parse_args()
    start, size = time.perf_counter(), options.size
    for dtype, share in ((torch.bfloat16, 0.6), (torch.float16, 1.0)):
        left = SECONDS * share - (time.perf_counter() - start)
        measure_type(Place(options.device, dtype), size, left, options.output)


def measure_type(place: Place, size: Size, seconds: float, folder: Path) -> None:
    """All suites in one type."""
    document = runner.run(place, size, gate="skipped", suites=SUITES, deadline=seconds)
    path = folder / f"{place.device}-{size}-{document['dtype']}.json"
    results.write(document, path)
    print(f"wrote {path}: {len(document['rows'])} rows", flush=True)


if __name__ == "__main__":
    main()
