"""Results as one JSON document, written whole after every row."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from dualview.outputs import replace_file
from dualview.probe.draws import Draw, digest
from dualview.probe.grid import Plan, Row
from dualview.probe.pages import VERSION
from dualview.probe.questions import TASKS

Document = dict[str, Any]


def new_document(plan: Plan, device: torch.device) -> Document:
    """A document without encoders and rows: what was planned, and where."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    sample = Draw("test", "test", 0, 12)
    images, questions = digest(sample)
    return {
        "version": VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"gpu": gpu, "processor": platform.machine(), "threads": torch.get_num_threads()},
        "versions": {name: _version(name) for name in ("torch", "numpy", "matplotlib", "scikit-learn", "scikit-image")},
        "tasks": TASKS,
        "budget": asdict(plan.budget),
        "seeds": list(plan.seeds),
        "pages": {str(pixels): list(counts) for pixels, counts in plan.pages.items()},
        "digest": {"pages": sample.count, "images": images, "questions": questions},
        "encoders": [],
        "planned": [[arm.name, arm.table, seed, arm.pixels] for arm, seed in plan.jobs()],
        "rows": [],
    }


def add_row(document: Document, row: Row, path: Path) -> None:
    """Add a row and write the document, whole, in the place of what is there."""
    document["rows"].append(row)
    write(document, path)


def write(document: Document, path: Path) -> None:
    """Write a document, a line for each row."""
    rows = ",\n".join(json.dumps(row) for row in document["rows"])
    rest = json.dumps({name: value for name, value in document.items() if name != "rows"}, indent=1)
    replace_file(path.resolve(), memoryview(f'{rest[:-2]},\n "rows": [\n{rows}\n ]\n}}\n'.encode()))


def missing(document: Document) -> list[tuple[str, int]]:
    """Arms and seeds that were planned and have no row."""
    found = {(row["arm"], row["seed"]) for row in document["rows"]}
    return [(arm, seed) for arm, _, seed, _ in document["planned"] if (arm, seed) not in found]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
