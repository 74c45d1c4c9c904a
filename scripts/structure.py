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

# Commit 513480e had 2,069 statements in ops and kernels. What stood there and stands elsewhere now counts as if it had
# stayed: by the name that it has now, with the statements that did the same then, or those of now where they are fewer.
# So what has grown since counts with what it was: records of tiles remember their images, a switch belongs to a thread,
# one check serves the whole package, and those are new features. Overlap, blending, prediction by tiles and placements
# were never there, and do not count at all.
MOVED: dict[str, dict[str, int]] = {
    "geometry.py": {"LiveTiles": 3, "Readout": 1, "readout_support": 6, "Layout": 1, "DataFormat": 1},
    "switches.py": {"FULL": 1, "planning": 2, "full_computation": 6, "Switch": 9},  # the two `with` blocks
    "dual_tiles.py": {"DualPerspectiveTiles": 5, "DualPerspectiveTileBatch": 5},
    "interpolation.py": {"resized": 7},
    "padding.py": {"pad_to": 7},
    "arguments.py": {"check_choice": 22, "check_count": 4},  # check_backend, check_data_format, check_readout, loops
    "tensors.py": {"check_queries": 2, "check_mask": 2, "check_width": 3, "misfit": 1},
    "views.py": {
        "check_map": 4,  # check_rank
        "tile_size": 4,
        "check_result_size": 5,
        "check_tile_pair": 5,
        "shape_in": 4,
        "split_in": 7,  # what `_plain` of kernels/retile.py did where tiles hold whole cells
    },
}
ADDED = (
    ("ops/tile_batch.py", "TileBatch.valid"),
    ("ops/tile_batch.py", "TileBatch.images"),
    ("ops/dual_crop.py", "_without_padding"),
    ("ops/enhance.py", "EnhancedMaps.__repr__"),
    ("ops/normalized_crop.py", "NormalizedTiles.__repr__"),
)
"""Definitions inside that are new features since: results that remember their images, and show them."""


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


def statements(tree: ast.AST) -> int:
    """Statements of a file or of a definition, docstrings aside."""
    nodes = list(ast.walk(tree))
    docstrings = (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for node in nodes
    )
    return sum(isinstance(node, ast.stmt) for node in nodes) - sum(docstrings)


def parsed(name: str) -> ast.Module:
    """A file of the package."""
    return ast.parse((PACKAGE / name).read_text(encoding="utf-8"))


def defined(name: str, definition: str) -> int:
    """Statements of a function, a class, a method (``Class.method``) or a constant of a file."""
    body: list[ast.stmt] = parsed(name).body
    for part in definition.split("."):
        (found,) = [node for node in body if part in _names(node)]
        body = getattr(found, "body", [])
    return statements(found)


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def core() -> int:
    """Statements of ``ops`` and ``kernels`` with what has moved out of them, without what was added since."""
    names = [path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")]
    inside = sum(statements(parsed(name)) for name in names if name.startswith(("ops/", "kernels/")))
    moved = sum(
        min(then, defined(name, definition)) for name, found in MOVED.items() for definition, then in found.items()
    )
    added = sum(defined(name, definition) for name, definition in ADDED)
    return inside + moved - added


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
        "statements of ops and kernels": core(),
    }


if __name__ == "__main__":
    for name, figure in figures().items():
        print(f"{figure:6d}  {name}")
    files, functions = passed_through(as_written(paper_dem()))
    print("as written:", sorted(files), sorted(code.co_qualname for code in functions))
    print("planned:", sorted(passed_through(paper_dem())[0]))
    print("pixels to tokens:", sorted(passed_through(pixels_to_tokens())[0]))
