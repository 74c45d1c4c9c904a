"""`python -m benchmarks`: measure, write JSON and plots, print tables; or compare two result files."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from benchmarks import report, results, runner
from benchmarks.cases import OURS
from benchmarks.measure import Place


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suites", nargs="*", help='only these, such as: dem "prefix: n=3"')
    parser.add_argument("--full", action="store_true", help="all sizes, ViT-L/14-336: about an hour on two cores")
    parser.add_argument("--tiny", action="store_true", help="sizes of the tests: no figures, only whether it runs")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--memory", type=float, help="GiB that direct attention may get; default: all that is free")
    parser.add_argument("--no-gate", action="store_true", help="do not run the tests first")
    parser.add_argument(
        "--output", type=Path, help="default: benchmarks/results/DEVICE-SIZE-DTYPE.json, or none if only a part is run"
    )
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("OLD.json", "NEW.json"), help="only print ratios")
    options = parser.parse_args()
    if options.compare:
        print(report.compare(*(results.read(path) for path in options.compare)))
        return
    size = "tiny" if options.tiny else "full" if options.full else "quick"
    gate = "skipped" if options.no_gate else runner.gate(options.device)
    torch.set_num_threads(options.threads)
    place = Place(options.device, getattr(torch, options.dtype))
    memory = options.memory and int(options.memory * 2**30)
    document = runner.run(place, size, gate=gate, suites=tuple(options.suites), memory=memory)
    print(report.tables(document))
    whole = None if options.suites else results.FOLDER / f"{options.device}-{size}-{options.dtype}.json"
    if output := options.output or whole:  # a part does not replace the file of the whole
        results.write(document, output)
        print(f"wrote {output}")
        if output.resolve().parent == results.FOLDER.resolve():
            report.main()
    failed = [row for row in document["rows"] if row["side"] == OURS and (row["missing"] or "").startswith("failed")]
    if failed:
        raise SystemExit("\n".join(f"{row['suite']}: {row['case']}: {row['missing']}" for row in failed))


if __name__ == "__main__":
    main()
