"""What an import loads, seen from a fresh interpreter."""

import json
import subprocess
import sys

OPTIONAL = {"transformers", "timm", "open_clip", "triton", "torchvision", "PIL", "matplotlib", "tqdm"}


def loaded_after(statements: str) -> set[str]:
    """Names of the modules that the statements load in a fresh interpreter, beyond those of `import torch`."""
    code = (
        "import json, sys, torch\nbefore = set(sys.modules)\n"
        f"{statements}\nprint(json.dumps(sorted(set(sys.modules) - before)))"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(json.loads(run.stdout))


def top_level(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules}


def test_import_dualview_costs_little_over_torch():
    loaded = top_level(loaded_after("import dualview"))
    third_party = {name for name in loaded if name.lstrip("_") not in {n.lstrip("_") for n in sys.stdlib_module_names}}
    assert third_party == {"dualview", "einops"}


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
        "except ImportError as error:\n    assert 'pip install \"dualview[hf]\"' in str(error), error\n"
        "else:\n    raise AssertionError('found without transformers')"
    )


def test_unknown_name_is_an_attribute_error():
    loaded_after(
        "import dualview.models\n"
        "assert not hasattr(dualview.models, 'NoSuchModel')\n"
        "assert set(dir(dualview.models)) >= set(dualview.models.__all__)"
    )
