"""The public names, frozen, and what the documentation of each must say."""

import importlib
import inspect
import re
from types import FunctionType

import pytest
from torch import nn

PUBLIC = {
    "dualview": {
        "AdditionFusion",
        "BottleneckConcatFusion",
        "Conv3x3Fusion",
        "DirectReadout",
        "DualPerspectiveCrop",
        "DualPerspectiveEnhance",
        "DualPerspectiveTileBatch",
        "DualPerspectiveTiles",
        "DualViewEncoder",
        "EnhancedMaps",
        "Explanation",
        "GlobalStrideCrop",
        "HfEncoder",
        "LinearConcatFusion",
        "LoadReport",
        "LocalCrop",
        "MaxPoolFusion",
        "MultiplicationFusion",
        "OpenClipEncoder",
        "SubfeatureRecombine",
        "TileAttention",
        "TileBatch",
        "TileGrid",
        "TimmEncoder",
        "WeightedAdditionFusion",
        "__version__",
        "choose_grid",
        "explain",
        "global_stride_crop",
        "local_crop",
        "low_pass",
        "read_out",
        "recombine",
        "testing",
        "tile_attention",
    },
    "dualview.models": {
        "DualViewEncoder",
        "HfEncoder",
        "InfLlavaConfig",
        "InfLlavaForConditionalGeneration",
        "InfLlavaImageProcessor",
        "InfLlavaModel",
        "InfLlavaProcessor",
        "OpenClipEncoder",
        "TimmEncoder",
    },
    "dualview.ops.functional": {
        "crop",
        "global_stride_crop",
        "local_crop",
        "low_pass",
        "read_out",
        "recombine",
        "tile_attention",
    },
    "dualview.testing": {"assert_tile_order", "coordinate_images"},
}

OBJECTS = {
    f"{module}.{name}": getattr(importlib.import_module(module), name)
    for module, names in PUBLIC.items()
    for name in sorted(names - {"__version__"})
}
CALLABLE = {name: thing for name, thing in OBJECTS.items() if inspect.isclass(thing) or inspect.isfunction(thing)}


def own_methods(thing: type) -> dict[str, FunctionType]:
    """Public methods that the class itself defines; the class docstring speaks for `forward` and `extra_repr`."""
    found = {name: inspect.unwrap(getattr(member, "__func__", member)) for name, member in vars(thing).items()}
    return {
        name: member
        for name, member in found.items()
        if isinstance(member, FunctionType) and not name.startswith("_") and name not in ("forward", "extra_repr")
    }


def section(doc: str, title: str) -> bool:
    return re.search(rf"^{title}:$", doc, re.MULTILINE) is not None


@pytest.mark.parametrize("module", sorted(PUBLIC))
def test_exports_are_frozen(module):
    imported = importlib.import_module(module)
    assert sorted(imported.__all__) == sorted(PUBLIC[module])
    assert list(imported.__all__) == sorted(imported.__all__)


@pytest.mark.parametrize("name", sorted(OBJECTS))
def test_has_a_docstring(name):
    thing = OBJECTS[name]
    assert inspect.getdoc(thing)
    for method, function in own_methods(thing).items() if inspect.isclass(thing) else ():
        assert inspect.getdoc(function), f"{name}.{method} has no docstring"


@pytest.mark.parametrize("name", sorted(name for name, thing in CALLABLE.items() if inspect.isfunction(thing)))
def test_function_documents_every_argument(name):
    doc = inspect.getdoc(CALLABLE[name])
    parameters = inspect.signature(CALLABLE[name]).parameters
    undocumented = [p for p in parameters if not re.search(rf"^    {p}: ", doc, re.MULTILINE)]
    assert not undocumented or name.endswith(".crop"), f"{name}: Args lacks {undocumented}"


def takes_tensors(thing: object) -> bool:
    if inspect.isclass(thing):
        return issubclass(thing, nn.Module)
    return any("Tensor" in str(p.annotation) for p in inspect.signature(thing).parameters.values())


def raises(thing: object) -> bool:
    source = inspect.getsource(inspect.unwrap(thing.__init__ if inspect.isclass(thing) else thing))
    return re.search(r"^\s+raise |_check|check_|\.of\(", source, re.MULTILINE) is not None


@pytest.mark.parametrize("name", sorted(CALLABLE))
def test_says_shapes_errors_and_shows_an_example(name):
    print(name, takes_tensors(CALLABLE[name]), raises(CALLABLE[name]))
    doc = inspect.getdoc(CALLABLE[name])
    if takes_tensors(CALLABLE[name]):
        assert section(doc, "Shape"), "no Shape: section"
        assert section(doc, "Example"), "no Example: section"
    if raises(CALLABLE[name]):
        assert section(doc, "Raises"), "no Raises: section"
