"""The form of a result file: strict JSON, with a version, and everything needed to judge the figures."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

SCHEMA_VERSION = 1
FOLDER = Path(__file__).parent / "results"
LIBRARIES = (
    "torch",
    "transformers",
    "torchvision",
    "einops",
    "timm",
    "kornia",
    "monai",
    "natten",
    "triton",
    "numpy",
    "zarr",
)

NUMBER = (int, float)
OPTIONAL = (int, float, type(None))
TOP = {
    "schema_version": int,
    "created": str,
    "commit": (str, type(None)),
    "selection": str,
    "gate": str,
    "seed": int,
    "device": str,
    "dtype": str,
    "machine": dict,
    "versions": dict,
    "limits": dict,
    "meters": dict,
    "rows": list,
}
MACHINE = {
    "name": str,
    "system": str,
    "cores": int,
    "threads": int,
    "memory_bytes": int,
    "load_before": OPTIONAL,
    "load_after": OPTIONAL,
}
LIMITS = {"copy_bytes_per_s": NUMBER, "matmul_ops_per_s": NUMBER}
ROW = {
    "suite": str,
    "case": str,
    "params": dict,
    "side": str,
    "role": str,  # "ours", "peer", "other function"
    "seconds": (dict, type(None)),  # median, q1, q3, rounds
    "peak_bytes": OPTIONAL,
    "meter": (str, type(None)),
    "ratio": OPTIONAL,  # time of this side over ours
    "memory_ratio": OPTIONAL,
    "target": OPTIONAL,  # of the ratio; of the fraction, where the side is ours
    "memory_target": OPTIONAL,
    "operations": OPTIONAL,  # that our sides cannot do without
    "moved_bytes": OPTIONAL,
    "limit_seconds": OPTIONAL,  # for these, on this machine
    "fraction": OPTIONAL,  # limit over measured time
    "difference": OPTIONAL,
    "tolerance": OPTIONAL,
    "missing": (str, type(None)),
}
SPREAD = {"median": NUMBER, "q1": NUMBER, "q3": NUMBER, "rounds": int}


def check(document: dict[str, Any]) -> None:
    """Raise a ValueError that names the first place where a document has not this form."""

    def fields(value: dict[str, Any], form: dict[str, Any], where: str) -> None:
        if value.keys() != form.keys():
            raise ValueError(f"{where}: fields {sorted(value.keys() ^ form.keys())} are missing or unknown")
        for name, kind in form.items():
            if not isinstance(value[name], kind) or isinstance(value[name], bool):
                raise ValueError(f"{where}.{name}: {value[name]!r} is no {kind}")

    if document.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"schema_version {document.get('schema_version')!r}: this program reads {SCHEMA_VERSION}")
    fields(document, TOP, "document")
    fields(document["machine"], MACHINE, "machine")
    fields(document["limits"], LIMITS, "limits")
    for i, row in enumerate(document["rows"]):
        fields(row, ROW, f"rows[{i}]")
        if (row["missing"] is None) != (row["seconds"] is not None):
            raise ValueError(f"rows[{i}]: a side has either a time or the reason why it has none")
        if row["seconds"] is not None:
            fields(row["seconds"], SPREAD, f"rows[{i}].seconds")


def read(path: Path) -> dict[str, Any]:
    """A checked document."""
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    check(document)
    return document


def write(document: dict[str, Any], path: Path) -> None:
    """Check and write; neither NaN nor Infinity, which are no JSON."""
    check(document)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def header(device: str, dtype: torch.dtype, selection: str, gate: str, seed: int) -> dict[str, Any]:
    """Everything but the figures."""
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = "not installed"
    return {
        "schema_version": SCHEMA_VERSION,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "selection": selection,
        "gate": gate,
        "seed": seed,
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "machine": {
            "name": torch.cuda.get_device_name() if device == "cuda" else _processor(),
            "system": platform.platform(),
            "cores": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "load_before": round(os.getloadavg()[0], 2),
            "load_after": None,
        },
        "versions": versions,
    }


def _commit() -> str | None:
    """The commit of the working tree, with a + if files that it holds were changed since."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"],
            cwd=FOLDER.parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
