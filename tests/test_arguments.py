"""The checks of arguments, kind by kind: what they take, what they refuse, and with which words."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import dualview as dv
from dualview import arguments, tensors
from dualview.testing import coordinate_images
from tests.checks import refuses

ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(),
    st.lists(st.integers()),
    st.dictionaries(st.text(), st.integers()),
    st.complex_numbers(),
)


@given(ANYTHING, st.integers(0, 9), st.integers(0, 9))
def test_a_count_is_an_integer_within_its_bounds(value: object, low: int, more: int) -> None:
    right = isinstance(value, int) and not isinstance(value, bool) and low <= value <= low + more
    if right:
        assert arguments.check_count(value, "count", low=low, high=low + more) == value
    else:
        with refuses("count=", arguments.shown(value), "integer"):
            arguments.check_count(value, "count", low=low, high=low + more)


@pytest.mark.parametrize("value", [np.int64(3), np.uint8(3), np.array(3), torch.tensor(3)])
def test_integers_of_numpy_and_torch_become_integers(value: object) -> None:
    count = arguments.check_count(value, "count", multiple_of=3, divisor_of=6)
    assert (count, type(count)) == (3, int)
    assert arguments.check_size(value, "size") == (3, 3)
    assert arguments.check_indices([value], "offsets") == (3,)
    assert arguments.check_number(value, "scale") == 3.0


@pytest.mark.parametrize("value", [np.bool_(True), np.float64(3), torch.tensor(True), torch.tensor([3, 3]), "3", 3.0])
def test_what_only_looks_like_an_integer_is_none(value: object) -> None:
    for check in (arguments.check_count, arguments.check_index):
        with refuses("n=", "integer"):
            check(value, "n")


@given(ANYTHING)
def test_a_number_is_finite_and_no_text(value: object) -> None:
    right = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    if right and not math.isnan(value):  # type: ignore[arg-type]  # a number
        assert arguments.check_number(value, "scale") == value
    elif not isinstance(value, int | float) or isinstance(value, bool) or math.isnan(value) or math.isinf(value):
        with refuses("scale=", "finite number"):
            arguments.check_number(value, "scale")


def test_numbers_are_one_per_channel() -> None:
    for three in ([1, 2.5, 3], (1, 2, 3), np.array([1, 2, 3]), torch.tensor([1.0, 2, 3])):
        assert len(arguments.check_numbers(three, "mean", 3)) == 3
    for wrong in ([1, 2], [1, 2, None], [1, 2, math.nan], "123", b"123", 3, np.array(3), torch.tensor(3.0), None):
        with refuses("mean=", "one number per channel", "3 channels"):
            arguments.check_numbers(wrong, "mean", 3)
    with refuses("std=", "not 0"):
        arguments.check_numbers([1, 0, 1], "std", 3, zero=False)


@given(ANYTHING)
def test_a_choice_is_one_of_them(value: object) -> None:
    with refuses("mode=", 'must be "one" (the first), "two" (the second) or a module'):
        arguments.check_choice(value, "mode", {"one": "the first", "two": "the second"}, also="a module")
    assert arguments.check_choice("one", "mode", ("one", None)) == "one"
    assert arguments.check_choice(None, "mode", ("one", None)) is None


def test_arrays_and_tensors_are_no_choice_and_no_flag() -> None:
    for wrong in (np.zeros(2), torch.zeros(2), np.array(["one", "one"]), [True], 1, "yes", None):
        with refuses("mode=", '"one"'):
            arguments.check_choice(wrong, "mode", ("one",))
        with refuses("bias=", "True or False"):
            arguments.check_flags(bias=wrong)
    arguments.check_flags(bias=True, norm=np.bool_(False))


def test_values_are_shown_in_one_short_line() -> None:
    class Odd:
        def __repr__(self) -> str:
            raise RuntimeError

    for value in (
        torch.zeros(50, 50),
        [torch.zeros(9)] * 99,
        "a" * 999,
        10**999,
        nn.Sequential(*[nn.ReLU()] * 99),
        Odd(),
    ):
        text = arguments.shown(value)
        assert len(text) < 500
        assert "\n" not in text
    assert arguments.shown(np.zeros((2, 3))) == "ndarray of shape (2, 3) and type float64"


# --- Tensors ----------------------------------------------------------------------------------------------------------

NESTED = torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(1, 3)])


@pytest.mark.parametrize("x", [torch.zeros(3, 3).to_sparse(), torch.zeros(3, 3).to_sparse_csr(), NESTED], ids=str)
def test_sparse_and_nested_tensors_are_refused_with_the_remedy(x: torch.Tensor) -> None:
    with refuses("x=", "dense", "one tensor each" if x.is_nested else ".to_dense()", error=TypeError):
        tensors.check_tensors(x=x)


CALLS: dict[str, tuple[str, Callable[[Any], object]]] = {
    "DEM": ("local_tiles", lambda x: dv.DualPerspectiveEnhance.paper(8)(x, x, (2, 3))),
    "TileAttention": ("query", lambda x: dv.TileAttention(8)(x.flatten(2, 3), x.flatten(2, 3))),
    "LinearConcatFusion": ("v_loc", lambda x: dv.LinearConcatFusion(8)(x, x)),
    "Conv3x3Fusion": ("v_loc", lambda x: dv.Conv3x3Fusion(8)(x[0], x[0])),
}


@pytest.mark.parametrize("name", CALLS)
def test_inputs_have_the_type_and_the_device_of_the_weights(name: str) -> None:
    argument, call = CALLS[name]
    tiles = torch.rand(1, 6, 2, 3, 8)
    for wrong, part in ((tiles.double(), "float64"), (tiles.half(), "float16"), (tiles.to("meta"), "meta")):
        with refuses(f"{argument}=", part, "the weights are of type torch.float32 on cpu", error=TypeError):
            call(wrong)
    for wrong in (tiles.long(), tiles > 0, tiles.to(torch.complex64), tiles.to(torch.float8_e4m3fn)):
        with refuses(f"{argument}=", str(wrong.dtype), "floating-point", error=TypeError):
            call(wrong)
    with torch.autocast("cpu", torch.bfloat16):
        call(tiles.bfloat16())


def test_weights_that_are_quantised_or_offloaded_say_nothing_of_the_inputs() -> None:
    linear = nn.Linear(2, 2)
    linear.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    tensors.check_floats(linear, x=torch.zeros(2))
    tensors.check_floats(nn.Linear(2, 2, device="meta"), x=torch.zeros(2))
    with refuses("y=", "float64", "x is of type torch.float32", error=TypeError):
        tensors.check_floats(linear, x=torch.zeros(2), y=torch.zeros(2).double())


def test_keys_of_another_batch_are_refused() -> None:
    with refuses("(2, 6, 5, 8)", "(1, 6, 5, 8)", "same leading dimensions"):
        dv.TileAttention(8)(torch.zeros(2, 6, 5, 8), torch.zeros(1, 6, 5, 8))


@pytest.mark.parametrize("mask", [[True], (None, None), torch.ones(4, 9), torch.ones(4, 8) > 0, "all"], ids=repr)
def test_key_masks_of_other_kinds_are_refused(mask: Any) -> None:
    tiles = torch.rand(1, 6, 2, 3, 8)
    with refuses("key_mask", error=ValueError if isinstance(mask, torch.Tensor) else TypeError):
        dv.DualPerspectiveEnhance.paper(8)(tiles, tiles, (2, 3), key_mask=mask)


@pytest.mark.parametrize(
    "live", [5, "all", ((0,),), ((0.5,), (1,)), ((6,), (0,)), ((0, 0), (1,)), (None, None)], ids=repr
)
def test_live_tiles_of_other_kinds_are_refused(live: Any) -> None:
    tiles = torch.rand(1, 6, 2, 3, 8)
    for dem in (dv.DualPerspectiveEnhance.paper(8), dv.DirectReadout()):
        with refuses("live=", "index from 0 to 5", "at most once"):
            dem(tiles, tiles, (2, 3), live=live)
    with refuses("live=", "missing are local tiles [1"):
        dv.DirectReadout()(tiles[:, :1], tiles, (2, 3), live=((0,), range(6)))


@pytest.mark.parametrize(
    "bad", [{"device": "cuda:99"}, {"device": "gpu"}, {"dtype": torch.int64}, {"dtype": "float32"}]
)
def test_places_and_types_of_weights_must_exist(bad: dict[str, Any]) -> None:
    (name, value), *_ = bad.items()
    for make in (dv.DualPerspectiveEnhance.paper, dv.TileAttention, dv.WeightedAdditionFusion, dv.Conv3x3Fusion):
        with refuses(f"{name}={value!r}"):
            make(8, **bad)


# --- Bounds -----------------------------------------------------------------------------------------------------------


def test_what_would_fill_the_memory_or_the_time_is_refused_at_once() -> None:
    dem = dv.DualPerspectiveEnhance.paper(8)
    for plan in (dem.plan, dv.DirectReadout().plan):
        with refuses("tokens=(1000000, 1000000)", "262,144"):
            plan((2, 3), (10**6, 10**6))
    with refuses("dim=1000000000", "65,536"):
        dv.DualPerspectiveEnhance(10**9)
    with refuses("tile=(1000000000, 1000000000)", "65,536"):
        dv.DualPerspectiveCrop((10**9, 10**9))
    with refuses("size=(1000000, 1000000)", "16,777,216"):
        coordinate_images((10**6, 10**6))


def test_checks_of_pipelines_check_their_own_arguments() -> None:
    with refuses("batch=0", "positive integer"):
        dv.testing.assert_tile_order(lambda x: x, (2, 3), (4, 3), batch=0)
    with refuses("data_format='CHANNELS_FIRST'", '"channels_first"'):
        coordinate_images((2, 3), data_format="CHANNELS_FIRST")  # type: ignore[arg-type]
    with refuses("fn=", "function", error=TypeError):
        dv.testing.assert_tile_order(None, (2, 3), (4, 3))  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match=r"^fn=.* returned None"):
        dv.testing.assert_tile_order(lambda x: None, (2, 3), (4, 3))


# --- Checkpoints ------------------------------------------------------------------------------------------------------

SPOILT: dict[str, Callable[[torch.Tensor], object]] = {
    "nan": lambda x: x * math.nan,
    "overflow": lambda x: x.double() + 1e300,
    "bool": lambda x: x > 0,
    "complex": lambda x: x.to(torch.complex64),
    "integers": lambda x: x.long(),
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "array": lambda x: x.detach().numpy(),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_spoilt_tensor_of_a_checkpoint_is_refused_before_anything_is_loaded(kind: str) -> None:
    dem = dv.DualPerspectiveEnhance.released(16)
    weights: dict[str, Any] = {name: x.detach() + 1 for name, x in dem.released_state_dict().items()}
    last = sorted(weights)[-1]
    weights[last] = SPOILT[kind](weights[last])
    before = [p.clone() for p in dem.parameters()]
    for strict in (True, False):
        with refuses("state_dict=", f"{last}: ", "nothing was loaded"):
            dem.load_released(weights, strict=strict)
    assert all(torch.equal(p, q) for p, q in zip(dem.parameters(), before, strict=True))
