"""How far a reader has to go: files and functions that a call passes through, and statements of the core.

    python scripts/structure.py

Files are counted when a function of theirs runs, except those on the ground floor (checks of arguments, geometry,
views, switches, kernels), which know nothing of what is built on them. Docstrings are no statements.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

import dualview as dv
from dualview.kernels.dispatch import choose

PACKAGE = Path(dv.__file__).parent
CHECKS = ("arguments.py", "tensors.py", "models/inf_llava/input_checks.py")
GROUND = ("__init__.py", *CHECKS, "geometry.py", "views.py", "switches.py", "kernels")


def passed_through(call: Callable[[], object], *, ground: bool = False) -> tuple[set[str], set[CodeType]]:
    """Files of the package, and functions in them, that a call enters."""
    entered: set[CodeType] = set()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            entered.add(frame.f_code)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    ours = {}
    for code in entered:
        path = Path(code.co_filename)
        if path.is_relative_to(PACKAGE):
            name = path.relative_to(PACKAGE).as_posix()
            if ground or not name.startswith(GROUND):
                ours[code] = name
    return set(ours.values()), {code for code in ours if not code.co_name.startswith("<")}


def statements(*folders: str) -> int:
    """Statements of all files below folders of the package, docstrings aside."""
    count = 0
    for folder in folders:
        for path in (PACKAGE / folder).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            count += sum(isinstance(node, ast.stmt) for node in ast.walk(tree))
            count -= sum(
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
                for node in ast.walk(tree)
            )
    return count


def paper_dem() -> Callable[[], object]:
    """A call of the module as the paper has it."""
    dem = dv.DualPerspectiveEnhance.paper(16)
    tiles = torch.randn(1, 6, 4, 6, 16)
    return lambda: dem(tiles, tiles, (2, 3))


def as_written(call: Callable[[], object]) -> Callable[[], object]:
    """The same under `full_computation`."""

    def full() -> None:
        with dv.full_computation():
            call()

    return full


def pixels_to_tokens() -> Callable[[], object]:
    """The image path of a small INF-LLaVA."""
    from dualview.models import InfLlavaConfig, InfLlavaModel

    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    text = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = InfLlavaConfig(
        vision_config=vision | {"image_size": 28, "patch_size": 14}, text_config=text, grid=(2, 3), image_token_id=63
    )
    model = InfLlavaModel(config).eval()
    pixels = torch.randn(1, 3, 56, 84)
    return lambda: model.get_image_features(pixels)


def figures() -> dict[str, int]:
    """Every figure by its name."""
    call = paper_dem()
    written, planned = passed_through(as_written(call)), passed_through(call)
    backend = passed_through(lambda: choose("retile", torch.zeros(1)), ground=True)
    return {
        "DEM as written: files": len(written[0]),
        "DEM as written: functions": len(written[1]),
        "DEM planned: files": len(planned[0]),
        "which backend runs: files": len(backend[0]),
        "pixels to tokens: files": len(passed_through(pixels_to_tokens())[0]),
        "statements of ops and kernels": statements("ops", "kernels"),
    }


if __name__ == "__main__":
    for name, figure in figures().items():
        print(f"{figure:6d}  {name}")
    files, functions = passed_through(as_written(paper_dem()))
    print("as written:", sorted(files), sorted(code.co_qualname for code in functions))
    print("planned:", sorted(passed_through(paper_dem())[0]))
    print("pixels to tokens:", sorted(passed_through(pixels_to_tokens())[0]))
