"""Who decides which implementation runs, and what it says about it."""

import json
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from dualview.kernels import dispatch
from dualview.kernels.dispatch import KERNEL_TYPES, choose, use_backend
from dualview.ops import tiling
from dualview.ops.normalized_crop import normalized_crop
from tests.checks import refuses
from tests.fresh import run_fresh

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")


def in_a_fresh_interpreter(code, **environment):
    """What the code prints; where it fails, its errors."""
    run = run_fresh(code, **environment)
    return run.stdout.strip() if run.returncode == 0 else run.stderr


@pytest.fixture
def x(device):
    return torch.zeros(2, device=device)


def test_the_call_comes_before_the_context_and_that_before_the_environment(x):
    by_argument = ("torch", ('backend="torch", by the argument of the call',))
    with use_backend("torch"):
        assert choose("retile", x) == ("torch", ('backend="torch", by use_backend',))
        with use_backend("triton"):
            assert choose("retile", x) == ("triton", ('backend="triton", by use_backend',))
            assert choose("retile", x, backend="torch") == by_argument
        assert choose("retile", x).name == "torch"
        assert choose("retile", x, backend="triton").name == "triton"
    code = """
        import torch
        from dualview.kernels.dispatch import choose, use_backend

        with use_backend("auto"):
            print(choose("retile", torch.zeros(1)).reasons)
        print(choose("retile", torch.zeros(1)).reasons)
    """
    in_context, outside = in_a_fresh_interpreter(code, DUALVIEW_BACKEND="torch").splitlines()
    assert "DUALVIEW_BACKEND" not in in_context
    assert 'backend="torch", by DUALVIEW_BACKEND' in outside


def test_the_context_ends_with_an_error(x):
    with pytest.raises(KeyError), use_backend("triton"):
        raise KeyError
    assert choose("retile", x).name == "torch"


def test_the_environment_is_read_at_import():
    code = "import torch; from dualview.kernels.dispatch import choose; print(choose('retile', torch.zeros(1)))"
    assert "by DUALVIEW_BACKEND" in in_a_fresh_interpreter(code, DUALVIEW_BACKEND="torch")
    assert "cannot run" in in_a_fresh_interpreter(code, DUALVIEW_BACKEND="triton", CUDA_VISIBLE_DEVICES="")
    wrong = in_a_fresh_interpreter(code, DUALVIEW_BACKEND="cuda")
    assert "DUALVIEW_BACKEND='cuda': must be" in wrong


def test_unknown_backends_are_refused(x):
    with refuses("backend='cuda'", '"auto", "torch" or "triton"'):
        choose("retile", x, backend="cuda")
    with refuses("backend='cuda'"), use_backend("cuda"):
        pass


def test_auto_takes_what_was_measured_on_a_gpu(x, monkeypatch):
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    monkeypatch.setattr(dispatch, "runs_on", lambda x: True)
    for kernel in KERNEL_TYPES:
        assert choose(kernel, x) == ("triton", (dispatch.MEASURED[kernel],))


def test_auto_is_torch_under_the_interpreter(x, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("retile", x) == ("torch", ('under the interpreter a kernel is slow; backend="triton" runs it',))


def test_auto_falls_back_for_each_reason_and_triton_says_it(x, monkeypatch):
    def reasons(*parts, x=x, refused=()):
        name, said = choose("crop_normalize", x, refused=refused)
        assert name == "torch"
        assert any(all(part in reason for part in parts) for reason in said), said
        with refuses("crop_normalize", "the argument of the call", *parts, 'backend="auto"', error=RuntimeError):
            choose("crop_normalize", x, backend="triton", refused=refused)

    reasons("torch.int64", "cast it to one of torch.float32", x=x.long())
    reasons("odd days only: wait", refused=("odd days only: wait",))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reasons("on cpu", "CUDA device", "TRITON_INTERPRET=1", x=x.cpu())
    monkeypatch.setattr(dispatch, "_triton_installed", False)
    reasons("triton is not installed", "pip install triton, on Linux")


def test_every_kernel_has_a_file_with_a_function_of_its_name():
    for name in KERNEL_TYPES:
        assert callable(getattr(import_module(f"dualview.kernels.{name}"), name))
    with_kernels = Path(dispatch.__file__).parent.glob("*_triton.py")
    assert {file.stem.removesuffix("_triton") for file in with_kernels} == KERNEL_TYPES.keys()
    assert dispatch.MEASURED.keys() == KERNEL_TYPES.keys()


def test_an_old_gpu_is_refused(x, monkeypatch):
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    monkeypatch.setattr(dispatch, "runs_on", lambda x: True)
    monkeypatch.setattr(dispatch, "capability", lambda device: (7, 5))
    name, reasons = choose("retile", x)
    assert name == "torch"
    assert reasons == ("the tensor is on a GPU of compute capability 7.5: move it to one of 8.0 or newer",)
    with refuses("retile", "compute capability 7.5", "8.0 or newer", 'backend="auto"', error=RuntimeError):
        choose("retile", x, backend="triton")
    for found in ((8, 0), (9, 0), (12, 0)):
        monkeypatch.setattr(dispatch, "capability", lambda device, found=found: found)
        assert choose("retile", x).name == choose("retile", x, backend="triton").name == "triton"


def test_capability_is_that_of_the_gpu(device):
    found = torch.cuda.get_device_capability() if device == "cuda" else None
    assert dispatch.capability(torch.zeros(1, device=device).device) == found


def crop_tokens(device):
    tiling.crop(torch.zeros(4, 6, 8, device=device), (2, 3), "local", data_format="channels_last")


def recombine_tokens(device):
    tiling.recombine(torch.zeros(6, 2, 2, 8, device=device), (2, 3), "local", data_format="channels_last")


def retile_tokens(device):
    tiling.retile(torch.zeros(6, 2, 2, 8, device=device), "local", "global", (2, 3))


def crop_photograph(device):
    normalized_crop(torch.zeros(3, 4, 6, device=device), (2, 3), mean=[0.5] * 3, std=[0.5] * 3)


@pytest.mark.parametrize(
    "call, kernel",
    [
        (crop_tokens, "retile"),
        (recombine_tokens, "retile"),
        (retile_tokens, "retile"),
        (crop_photograph, "crop_normalize"),
    ],
)
def test_a_call_chooses_once(device, monkeypatch, call, kernel):
    chosen, ordinary = [], dispatch.choose

    def choosing(kernel, *tensors, **options):
        chosen.append(kernel)
        return ordinary(kernel, *tensors, **options)

    monkeypatch.setattr(dispatch, "choose", choosing)
    with use_backend("triton"):  # "auto" has nothing to choose for a small map
        call(device)
    assert chosen == [kernel]


def test_torch_needs_no_triton():
    code = """
        import sys
        sys.modules["triton"] = None
        import torch
        from dualview.kernels.crop_normalize import crop_normalize
        from dualview.kernels.retile import retile
        from dualview.ops.enhance import DualPerspectiveEnhance

        retile(torch.zeros(4, 6, 2), "raster", "global", (2, 3))
        crop_normalize(torch.zeros(3, 4, 6), (2, 3), [(1.0, 0.0)] * 3)
        for dem in (DualPerspectiveEnhance.paper(16), DualPerspectiveEnhance.released(16)):
            local, stride = torch.zeros(2, 2, 6, 2, 3, 16, requires_grad=True)
            dem(local, stride, (2, 3)).sum().backward()
        print("done")
    """
    assert in_a_fresh_interpreter(code) == "done"


def test_kernels_compile_for_a_gpu_that_is_not_there(tmp_path):
    code = """
        import torch
        from dualview.kernels.crop_normalize import crop_normalize
        from dualview.kernels.retile import retile
        from tests.kernels.compilation import compile_in_place_of_launching

        compile_in_place_of_launching()
        for dtype in (torch.bool, torch.bfloat16):
            retile(torch.zeros(4, 6, 2, dtype=dtype), "raster", "global", (2, 3), backend="triton")
            image = torch.zeros(3, 4, 6, dtype=dtype)
            retile(image, "raster", "global", (2, 3), data_format="channels_first", backend="triton")
        image = torch.zeros(3, 4, 6, dtype=torch.uint8)
        crop_normalize(image, (2, 3), [(1.0, 0.0)] * 3, dtype=torch.bfloat16, backend="triton")
    """
    printed = in_a_fresh_interpreter(code, TRITON_CACHE_DIR=str(tmp_path))
    made = [json.loads(line) for line in printed.splitlines()]
    kernels = [(program["kernel"], program.get("IMAGES")) for program in made]
    assert kernels == [("_move", False), ("_move", True)] * 2 + [("_make", None)], printed
