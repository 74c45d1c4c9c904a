"""The public names, frozen, and what the documentation of each must say."""

import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterable
from types import FunctionType

import pytest
from torch import nn
from transformers import PreTrainedModel

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
        "NormalizedTiles",
        "OpenClipEncoder",
        "SubfeatureRecombine",
        "TileAttention",
        "TileBatch",
        "TileGrid",
        "TileReader",
        "TileWriter",
        "TimmEncoder",
        "WeightedAdditionFusion",
        "__version__",
        "blend_tiles",
        "adapt_processor",
        "attach",
        "attached",
        "choose_grid",
        "detach",
        "explain",
        "full_computation",
        "global_stride_crop",
        "load_adapter",
        "load_embedded",
        "load_image",
        "local_crop",
        "low_pass",
        "normalized_crop",
        "predict_tiled",
        "read_out",
        "recombine",
        "save_adapter",
        "testing",
        "tile_attention",
        "use_backend",
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
        "adapt_processor",
        "attach",
        "attached",
        "detach",
        "load_adapter",
        "save_adapter",
        "convert_inf_llava",
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
    "dualview.train": {
        "BaseConfig",
        "Collator",
        "DataConfig",
        "DualViewTrainer",
        "FeatureCache",
        "LlavaDataset",
        "LoraConfig",
        "StageConfig",
        "TrainConfig",
        "freeze",
        "train",
        "training_arguments",
    },
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


def own_doc(thing: object) -> str:
    """What was written for this very thing: nothing inherited, nothing generated."""
    doc = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
    generated = inspect.isclass(thing) and (doc or "").startswith(f"{thing.__name__}(")
    return "" if generated else inspect.cleandoc(doc or "")


def undocumented(doc: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if not re.search(rf"^    (\*\*)?{name}: ", doc, re.MULTILINE)]


def fields_of(thing: type) -> list[str]:
    """The fields that a NamedTuple or a dataclass itself has."""
    is_record = dataclasses.is_dataclass(thing) or hasattr(thing, "_fields")
    return list(inspect.get_annotations(thing)) if is_record else []


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
    assert own_doc(thing)
    for method, function in own_methods(thing).items() if inspect.isclass(thing) else ():
        assert own_doc(function), f"{name}.{method} has no docstring"


@pytest.mark.parametrize(
    "name", sorted(name for name, thing in CALLABLE.items() if inspect.isclass(thing) and issubclass(thing, nn.Module))
)
def test_help_shows_no_text_of_torch(name):
    assert inspect.getdoc(CALLABLE[name].forward) != inspect.getdoc(nn.Module.forward)


def defers(doc: str) -> bool:
    """Whether the first line points to another object, whose documentation then speaks for both."""
    return "][dualview." in doc.splitlines()[0]


@pytest.mark.parametrize("name", sorted(name for name, thing in CALLABLE.items() if inspect.isfunction(thing)))
def test_function_documents_its_arguments_and_shapes(name):
    doc, parameters = own_doc(CALLABLE[name]), inspect.signature(CALLABLE[name]).parameters
    if defers(doc):
        return
    assert section(doc, "Args") or not parameters, f"{name} has no Args: section"
    assert not (missing := undocumented(doc, parameters)), f"{name}: Args lacks {missing}"
    takes_tensors = any(re.match(r"Tensor\b", str(p.annotation)) for p in parameters.values())
    assert section(doc, "Shape") or not takes_tensors, f"{name} has no Shape: section"
    assert section(doc, "Example"), f"{name} has no Example: section"
    raises = re.search(r"^\s+raise ", inspect.getsource(CALLABLE[name]), re.MULTILINE)
    assert section(doc, "Raises") or not raises, f"{name} raises, and has no Raises: section"


@pytest.mark.parametrize("name", sorted(name for name, thing in CALLABLE.items() if inspect.isclass(thing)))
def test_class_documents_its_arguments_or_attributes(name):
    """A record that others make has attributes; one that a caller makes may call them arguments."""
    thing = CALLABLE[name]
    doc, fields = own_doc(thing), fields_of(thing)
    names = fields or inspect.signature(thing).parameters
    assert section(doc, "Args") or (fields and section(doc, "Attributes")) or not names, f"{name} lists nothing"
    assert not (missing := undocumented(doc, names)), f"{name} does not say what {missing} are"


@pytest.mark.parametrize("name", sorted(name for name, thing in CALLABLE.items() if inspect.isclass(thing)))
def test_class_documents_its_shapes_and_errors(name):
    thing = CALLABLE[name]
    doc, members = own_doc(thing), vars(thing)
    # The models of transformers document the shapes where the tensors are: at `forward`.
    if issubclass(thing, nn.Module) and not issubclass(thing, PreTrainedModel):
        assert section(doc, "Shape"), f"{name} has no Shape: section"
        assert section(doc, "Example"), f"{name} has no Example: section"
    if issubclass(thing, PreTrainedModel):
        assert section(inspect.getdoc(thing.forward), "Shape"), f"{name}.forward has no Shape: section"
    # Dataclasses generate an __init__ that has no source.
    checks = [members[method] for method in ("__init__", "__post_init__") if method in members]
    sources = [
        inspect.getsource(check) for check in checks if inspect.getsourcefile(check) == inspect.getsourcefile(thing)
    ]
    raises = any(re.search(r"^\s+raise ", source, re.MULTILINE) for source in sources)
    assert section(doc, "Raises") or not raises, f"{name} raises, and has no Raises: section"
