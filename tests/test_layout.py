"""The floors of the package: a file imports only from floors below its own, or from its own folder; and no circles."""

import ast
from collections.abc import Iterator
from fnmatch import fnmatch
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dualview"

FLOORS = (  # from the ground up
    ("arguments.py",),
    ("geometry.py", "tensors.py"),
    ("views.py", "interpolation.py", "padding.py", "records.py", "switches.py", "tile_positions.py"),
    ("blending.py",),
    ("kernels/*.py", "ops/tile_batch.py"),
    ("dual_tiles.py",),
    (
        *(f"ops/{name}.py" for name in ("__init__", "tiling", "dual_crop", "low_pass")),
        *(f"ops/{name}.py" for name in ("normalized_crop", "tile_attention", "fusion", "readout", "released_weights")),
        "cost.py",
    ),
    ("ops/planned/*.py",),
    ("ops/enhance.py", "ops/direct_readout.py", "ops/functional.py"),
    ("pixels.py", "picture_files.py", "images.py", "outputs.py", "canvas.py", "terminal.py", "testing.py"),
    ("large/*.py",),
    ("models/*.py", "visualize.py", "answers.py"),
    ("embedded/*.py",),
    ("train/*.py",),
    ("probe/glyphs.py", "probe/backgrounds.py"),
    ("reader/*.py",),
    ("probe/[!bg]*.py", "probe/grid.py"),
    ("explain.py", "stages.py", "full_size.py", "demo.py", "chat.py"),
    ("evaluation.py", "lmms_model.py"),
    ("commands.py",),
    ("__init__.py",),
    ("cli.py",),
    ("__main__.py",),
)


def files() -> list[str]:
    return sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def floor_of(file: str) -> int:
    floors = [number for number, patterns in enumerate(FLOORS) if any(fnmatch(file, p) for p in patterns)]
    assert len(floors) == 1, f"dualview/{file} must stand on one floor, not {len(floors)}: give it its place in FLOORS"
    return floors[0]


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Names of what is imported, also inside functions and for types; of `from a import b`, a.b comes before a."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: import by the full name, not relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def file_of(name: str) -> str | None:
    """The file of the package that defines an imported name, None for other packages."""
    first, *parts = name.split(".")
    if first != "dualview":
        return None
    while True:
        for candidate in (
            Path(*parts).with_suffix(".py") if parts else Path("__init__.py"),
            Path(*parts, "__init__.py"),
        ):
            if (PACKAGE / candidate).is_file():
                return candidate.as_posix()
        parts.pop()  # the last part was a name inside a module


def targets(file: str) -> set[str]:
    tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    return {target for name in imported_modules(tree) if (target := file_of(name)) is not None}


def test_files_are_found():
    assert {"geometry.py", "ops/tiling.py", "models/inf_llava/modeling_inf_llava.py"} <= set(files())
    assert "geometry.py" in targets("ops/tiling.py")


@pytest.mark.parametrize("file", files())
def test_imports_come_from_lower_floors(file):
    own_floor = floor_of(file)
    for target in targets(file):
        same_folder = Path(target).parts[:-1][:1] == Path(file).parts[:-1][:1]
        allowed = floor_of(target) < own_floor or (floor_of(target) == own_floor and same_folder)
        assert allowed, (
            f"dualview/{file} (floor {own_floor}) must not import dualview/{target} (floor {floor_of(target)})"
        )


def test_there_is_no_import_circle():
    try:
        TopologicalSorter({file: targets(file) for file in files()}).prepare()
    except CycleError as error:
        pytest.fail(f"import circle: {' -> '.join(error.args[1])}")
