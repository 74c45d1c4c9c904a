"""What an import loads, seen from a fresh interpreter."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import dualview
from tests.fresh import run_fresh

OPTIONAL = {
    "transformers",
    "timm",
    "open_clip",
    "triton",
    "torchvision",
    "PIL",
    "matplotlib",
    "tqdm",
    "tifffile",
    "zarr",
    "accelerate",
    "peft",
    "yaml",
}


def loaded_after(statements: str) -> set[str]:
    """Names of the modules that the statements load in a fresh interpreter, beyond those of `import torch`."""
    code = (
        "import json, sys, torch\nbefore = set(sys.modules)\n"
        f"{statements}\nprint(json.dumps(sorted(set(sys.modules) - before)))"
    )
    run = run_fresh(code)
    assert run.returncode == 0, run.stderr
    return set(json.loads(run.stdout))


def top_level(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


def test_import_dualview_costs_little_over_torch():
    names = "from dualview import *"
    loaded = top_level(loaded_after(f"{names}\nassert LocalCrop"))
    third_party = {name for name in loaded if name.lstrip("_") not in {n.lstrip("_") for n in sys.stdlib_module_names}}
    assert third_party == {"dualview", "einops"}


def test_import_dualview_alone_loads_nothing():
    """So that the command answers at once."""
    code = "import sys; import dualview, dualview.cli; print('torch' in sys.modules, 'PIL' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout == "False False\n"


def test_every_name_is_found_where_it_is_said_to_be():
    assert sorted([*dualview._HOME_OF, "testing", "__version__"]) == dualview.__all__
    assert set(dir(dualview)) >= set(dualview.__all__)
    tree = ast.parse(Path(dualview.__file__).read_text(encoding="utf-8"))
    typed = next(node for node in tree.body if isinstance(node, ast.If))  # what type checkers see
    seen = {alias.name: node.module for node in typed.body for alias in node.names}
    assert seen.pop("testing") == "dualview"
    assert seen == {name: f"dualview.{home}" for name, home in dualview._HOME_OF.items()}
    for name in dualview.__all__:
        assert getattr(dualview, name) is not None


@pytest.mark.parametrize("first", ["import dualview.explain", "from dualview.explain import Stage", "dv.explain"])
def test_explain_is_the_function_whatever_is_imported_first(first):
    loaded_after(
        f"import dualview as dv, pickle\n{first}\n"
        "from dualview import explain\n"
        "assert dv.explain is explain and callable(explain)\n"
        "assert pickle.loads(pickle.dumps(dv.explain)) is explain\n"
        "made = dv.Explanation(())\n"
        "assert pickle.loads(pickle.dumps(made)) == made and dv.explain is explain\n"
    )


def test_import_of_training_alone_loads_nothing():
    assert not top_level(loaded_after("import dualview.train")) & OPTIONAL


def test_names_that_are_not_there():
    with pytest.raises(AttributeError, match=r"module 'dualview' has no attribute 'NoSuchThing'$"):
        dualview.NoSuchThing  # noqa: B018
    with pytest.raises(AttributeError, match=r"from dualview\.models import InfLlavaConfig"):
        dualview.InfLlavaConfig  # noqa: B018


def test_import_models_loads_no_optional_dependency():
    assert not top_level(loaded_after("import dualview, dualview.models, dualview.testing")) & OPTIONAL


def test_asking_for_inf_llava_loads_it():
    loaded = loaded_after("import dualview.models\ndualview.models.InfLlavaConfig")
    assert {"transformers", "dualview.models.inf_llava.modeling_inf_llava"} <= loaded


def test_inf_llava_without_transformers_says_what_to_install():
    loaded_after(
        "sys.modules['transformers'] = None\n"
        "import dualview.models\n"
        "try:\n    dualview.models.InfLlavaConfig\n"
        "except ImportError as error:\n    assert 'pip install -e \".[hf]\"' in str(error), error\n"
        "else:\n    raise AssertionError('found without transformers')"
    )


def test_pictures_without_pillow_say_what_to_install():
    loaded_after(
        "sys.modules['PIL'] = None\n"
        "import dualview\n"
        "assert dualview.load_image(torch.zeros(3, 4, 5)).shape == (3, 4, 5)\n"
        "try:\n    dualview.load_image('a.png')\n"
        "except ImportError as error:\n    assert 'pip install -e \".[hf]\"' in str(error), error\n"
        "else:\n    raise AssertionError('read without pillow')"
    )


def test_unknown_name_is_an_attribute_error():
    loaded_after(
        "import dualview.models\n"
        "assert not hasattr(dualview.models, 'NoSuchModel')\n"
        "assert set(dir(dualview.models)) >= set(dualview.models.__all__)"
    )
