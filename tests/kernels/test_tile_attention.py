"""Tile attention by tables: the kernel against plain torch, and plain torch against the equation, query by query."""

import json
import os
import subprocess
import sys
from collections import Counter
from functools import partial
from itertools import product

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from dualview.geometry import position
from dualview.kernels import dispatch
from dualview.kernels.tile_attention import check_tables, tile_attention
from tests.checks import assert_compiles_once, refuses
from tests.kernels.conftest import examples, guarded
from tests.strategies import grids, tiles

pytest.importorskip("triton")

few = settings(phases=(Phase.explicit, Phase.generate))  # the interpreter is too slow to search for a simpler example
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


class Case:
    """Tensors and tables of one call, with tokens in a random order; no table names ``spare`` queries and keys."""

    def __init__(
        self, p, m, r, keys, heads, e, v, *, batch=2, tile_p=True, tile_m=True, one_kv=False, fill=0.0, spare=(3, 2)
    ):
        tiles_of = (p if tile_p else 1, m if tile_m else 1)
        self.q_at = table((p, m, r), spare[0], fill)
        self.k_at = table((*tiles_of, keys), spare[1], fill)
        self.out_at, live = torch.full((p, r), -1, dtype=torch.int32), torch.rand(p, r) >= fill
        self.out_tokens, self.scale, self.key_mask = int(live.sum()), e**-0.5, None
        self.out_at[live] = torch.randperm(self.out_tokens).to(torch.int32)
        q_tokens, k_tokens = p * m * r + spare[0], tiles_of[0] * tiles_of[1] * keys + spare[1]
        self.q = torch.randn(batch, q_tokens, heads, e)
        self.k = torch.randn(batch, k_tokens, 1 if one_kv else heads, e)
        self.v = torch.randn(batch, k_tokens, 1 if one_kv else heads, v)
        self.grad = torch.randn(batch, self.out_tokens, heads, v)

    def masked(self, share):
        self.key_mask = torch.rand(self.k.shape[:2]) < share
        return self

    def operands(self, dtype, device):
        q, k = (guarded(x.to(device, dtype)) for x in (self.q, self.k))
        return [q, k, k if self.v is self.k else guarded(self.v.to(device, dtype))]

    def run(self, q, k, v, backend="triton"):
        tables = [guarded(x.to(q.device)) for x in (self.q_at, self.k_at, self.out_at)]
        mask = None if self.key_mask is None else guarded(self.key_mask.to(q.device))
        return tile_attention(
            q, k, v, *tables, self.out_tokens, scale=self.scale, key_mask=mask, backend=backend
        )  # fmt: skip

    def results(self, dtype, device, backend, needed=(True, True, True)):
        """The result, and the gradients of those of q, k and v that need one."""
        given = self.operands(dtype, device)
        wanted = [x for x, need in zip(given, needed, strict=True) if need]
        for x in wanted:
            x.requires_grad_()
        out = self.run(*given, backend=backend)
        grads = torch.autograd.grad(out, wanted, self.grad.to(device, dtype)) if wanted else ()
        return [out.detach(), *grads]


def table(shape, spare, fill):
    """Each entry another token, in random order; a share ``fill`` of them -1."""
    count = torch.Size(shape).numel()
    entries = torch.randperm(count + spare)[:count].to(torch.int32).reshape(shape)
    return torch.where(torch.rand(shape) < fill, -1, entries).to(torch.int32)


def assert_as_exact_as_torch(case, dtype, device, needed=(True, True, True)):
    """The error against float64 is at most twice that of plain torch, in the result and in every gradient.

    Where torch's is accidentally small, as in a sum of two numbers, a quarter of the last bit is allowed.
    """
    exact = case.results(torch.float64, device, "torch", needed)
    theirs, ours = (case.results(dtype, device, backend, needed) for backend in ("torch", "triton"))
    for name, x, a, b in zip(("out", "first", "second", "third"), exact, theirs, ours, strict=False):
        assert b.dtype == dtype
        assert b.isfinite().all(), name
        error, allowed = (b - x).norm(), 2 * (a - x).norm() + torch.finfo(dtype).eps / 4 * x.norm()
        assert error <= allowed, f"{name}: {error:.2e}, of which {allowed:.2e} are allowed"


tile_kinds = st.tuples(st.booleans(), st.booleans())


@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(8, 36), st.integers(8, 40)),
    heads=st.integers(1, 3),
    widths=st.sampled_from([(8, 8), (40, 24), (24, 70), (64, 64)]),
    tile=tile_kinds,
    one_kv=st.booleans(),
    mask=st.sampled_from([None, 0.5]),
    dtype=dtypes,
    seed=st.integers(0, 99),
)
@example(  # all rows ask keys of their own
    sizes=(2, 2, 9, 40),
    heads=1,
    widths=(40, 24),
    tile=(True, True),
    one_kv=False,
    mask=0.5,
    dtype=torch.bfloat16,
    seed=0,
)
@example(  # all rows of all heads ask the same keys
    sizes=(3, 2, 9, 40),
    heads=2,
    widths=(8, 8),
    tile=(False, False),
    one_kv=True,
    mask=None,
    dtype=torch.float16,
    seed=0,
)
@settings(few, max_examples=examples(3))
def test_error_is_at_most_twice_that_of_torch(device, sizes, heads, widths, tile, one_kv, mask, dtype, seed):
    torch.manual_seed(seed)
    case = Case(*sizes, heads, *widths, tile_p=tile[0], tile_m=tile[1], one_kv=one_kv)
    assert_as_exact_as_torch(case if mask is None else case.masked(mask), dtype, device)


@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 40)),
    widths=st.sampled_from([(1, 3), (17, 5), (8, 33)]),
    tile=tile_kinds,
    one_kv=st.booleans(),
    mask=st.sampled_from([None, 0.5, 0.03]),
    fill=st.sampled_from([0.0, 0.3, 0.9]),
    seed=st.integers(0, 99),
)
@settings(few, max_examples=examples(6))
def test_any_shape_with_gaps_and_few_keys(device, sizes, widths, tile, one_kv, mask, fill, seed):
    torch.manual_seed(seed)
    case = Case(*sizes, 2, *widths, tile_p=tile[0], tile_m=tile[1], one_kv=one_kv, fill=fill)
    case = case if mask is None else case.masked(mask)
    exact, ours = (case.results(*how) for how in ((torch.float64, device, "torch"), (torch.float32, device, "triton")))
    for x, y in zip(ours, exact, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "sizes, heads, e, v, shared",
    [
        ((2, 1, 9, 40), 8, 1024, 1024, True),  # absorbed projections
        ((1, 2, 9, 40), 1, 1024, 1024, False),  # one wide head, pooled over tiles
        ((1, 1, 5, 40), 1, 300, 600, False),
        ((2, 1, 40, 40), 2, 128, 128, False),
        ((2, 1, 5, 40), 1, 256, 160, False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_heads(device, sizes, heads, e, v, shared, dtype):
    case = Case(*sizes, heads, e, v, batch=1, one_kv=shared)
    if shared:
        exact, theirs, ours = (
            shared_results(case, *how, device)
            for how in ((torch.float64, "torch"), (dtype, "torch"), (dtype, "triton"))
        )
        for x, a, b in zip(exact, theirs, ours, strict=True):
            assert (b - x).norm() <= 2 * (a - x).norm()
    else:
        assert_as_exact_as_torch(case, dtype, device)


def shared_results(case, dtype, backend, device):
    """The result and the gradients where keys are their own values."""
    q, k, _ = (x.requires_grad_() for x in case.operands(dtype, device))
    out = case.run(q, k, k, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, (q, k), case.grad.to(out))]


# --- Tables of real grids ---------------------------------------------------------------------------------------------

orders = st.sampled_from(["raster", "local", "global"])


def token(order, grid, tile, at):
    """Where the token at (y, x) of the map lies, in raster order or tile by tile of a perspective."""
    if order == "raster":
        return at[0] * grid[1] * tile[1] + at[1]
    (i, u), (j, v) = (
        next((t, o) for t, o in product(range(n), range(size)) if position(order, t, o, n, size) == where)
        for n, size, where in zip(grid, tile, at, strict=True)
    )
    return ((i * grid[1] + j) * tile[0] + u) * tile[1] + v


def tiles_of(cut, grid, tile):
    """The map's positions (y, x) of every tile."""
    (rows, cols), (h, w) = grid, tile
    return [
        [(position(cut, i, u, rows, h), position(cut, j, v, cols, w)) for u, v in product(range(h), range(w))]
        for i, j in product(range(rows), range(cols))
    ]


def whole_tables(grid, tile, cut, of, live):
    """Queries at the live positions, each in its tile; the result has those only, in the order of ``of["out"]``."""
    ranks = {at: rank for rank, at in enumerate(sorted(live, key=of["out"]))}
    asked = [[at for at in found if at in live] for found in tiles_of(cut, grid, tile)]
    most = max(map(len, asked))
    fillers = [[-1] * (most - len(found)) for found in asked]
    return (
        [[[of["q"](at) for at in found] + more] for found, more in zip(asked, fillers, strict=True)],
        [[[of["k"](at) for at in found]] for found in tiles_of(cut, grid, tile)],
        [[ranks[at] for at in found] + more for found, more in zip(asked, fillers, strict=True)],
    )


def pooled_tables(grid, tile, cut, of):
    """All queries; cells of rows x cols tokens of the map make one token of the result, in raster order."""
    tiles_ = tiles_of(cut, grid, tile)
    if cut == "global":  # the tokens of a cell lie at one place of all tiles
        queries, keys = ([[[of[x](at) for at in found] for found in tiles_]] for x in ("q", "k"))
        return queries, keys, [list(range(tile[0] * tile[1]))]
    (rows, cols), (_, w) = grid, tile  # the cells of a tile
    corners = [[(y, x) for y, x in found if y % rows == x % cols == 0] for found in tiles_]
    return (
        [
            [[of["q"]((y + a, x + b)) for y, x in found] for a, b in product(range(rows), range(cols))]
            for found in corners
        ],
        [[[of["k"](at) for at in found]] for found in tiles_],
        [[y // rows * w + x // cols for y, x in found] for found in corners],
    )


def by_hand(q, k, v, mask, grid, tile, cut, of, scale):
    """softmax(q k^T) v of every position of the map, query by query and head by head, from the equation."""
    out = {}
    for found in tiles_of(cut, grid, tile):
        keys = [of["k"](at) for at in found if mask[of["k"](at)]]
        for at in found:
            heads = []
            for h in range(q.shape[1]):
                scores = (
                    scale * torch.stack([q[of["q"](at), h] @ k[key, h] for key in keys]) if keys else q.new_zeros(0)
                )
                weights = scores.exp() / scores.exp().sum()
                heads.append(
                    sum((p * v[key, h] for p, key in zip(weights, keys, strict=True)), v.new_zeros(v.shape[2]))
                )
            out[at] = torch.stack(heads)
    return out


def check_grid(device, grid, tile, cut, order_of, pooled, share, masked, backend, dtype):
    of = {name: partial(token, order, grid, tile) for name, order in zip(("q", "k", "out"), order_of, strict=True)}
    everywhere = list(product(range(grid[0] * tile[0]), range(grid[1] * tile[1])))
    live = {at for at in everywhere if torch.rand(()) < share} or {everywhere[0]}
    tables = pooled_tables(grid, tile, cut, of) if pooled else whole_tables(grid, tile, cut, of, live)
    q_at, k_at, out_at = (torch.tensor(entries, dtype=torch.int32) for entries in tables)
    q, k, v = (torch.randn(len(everywhere), 2, width, dtype=torch.float64) for width in (5, 5, 3))
    mask = torch.rand(len(everywhere)) < (0.5 if masked else 1.1)
    expected = by_hand(q, k, v, mask, grid, tile, cut, of, 0.7)
    if pooled:
        (rows, cols), (h, w) = grid, tile
        wanted = [
            sum(expected[y * rows + a, x * cols + b] for a, b in product(range(rows), range(cols))) / (rows * cols)
            for y, x in product(range(h), range(w))
        ]
    else:
        wanted = [expected[at] for at in sorted(live, key=of["out"])]
    out = tile_attention(
        *(x.to(device, dtype)[None] for x in (q, k, v)), *(x.to(device) for x in (q_at, k_at, out_at)), len(wanted),
        scale=0.7, key_mask=mask[None].to(device) if masked else None, backend=backend,
    )  # fmt: skip
    assert out.is_contiguous()
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(out[0].cpu().double(), torch.stack(wanted), rtol=tolerance, atol=tolerance)


@given(grids, tiles, st.sampled_from(["local", "global"]), st.tuples(orders, orders, orders), st.booleans())
@settings(max_examples=examples(20))
def test_plain_torch_is_the_equation_on_every_grid(device, grid, tile, cut, order_of, masked):
    check_grid(device, grid, tile, cut, order_of, False, 0.6, masked, "torch", torch.float64)
    whole_cells = (2 * grid[0], grid[1]) if cut == "local" else tile
    check_grid(device, grid, whole_cells, cut, order_of, True, 1.0, masked, "torch", torch.float64)


@given(st.sampled_from(["local", "global"]), st.tuples(orders, orders, orders), st.booleans(), st.booleans())
@settings(few, max_examples=examples(6))
def test_kernel_is_the_equation_on_a_grid(device, cut, order_of, pooled, masked):
    tile = (2, 6) if cut == "local" and pooled else (3, 4)
    check_grid(device, (2, 3), tile, cut, order_of, pooled, 0.6, masked, "triton", torch.float32)


# --- What the operator promises beside its values ---------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 2])
def test_a_row_without_keys_is_zero_forward_and_backward(device, m):
    case = Case(2, m, 3, 5, 2, 8, 8)
    case.key_mask = torch.ones(case.k.shape[:2], dtype=torch.bool)
    case.key_mask[1] = False
    for x in case.results(torch.float32, device, "triton"):
        assert (x[1] == 0).all()
        assert x.isfinite().all()
        assert x[0].any()


LAYOUTS = {
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "sliced": lambda x: torch.cat([x, x.new_full((*x.shape[:3], 3), float("nan"))], -1)[..., : x.shape[-1]],
    "columns apart": lambda x: x.mT.contiguous().mT,
    "one batch": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("m", [1, 2])
def test_strides_do_not_matter(device, layout, m):
    case = Case(2, m, 5, 6, 2, 8, 8)
    case.q, case.k, case.v, case.grad = (LAYOUTS["one batch"](x).clone() for x in (case.q, case.k, case.v, case.grad))
    plain_layout = case.results(torch.float32, device, "triton")
    case.q, case.k, case.v, case.grad = (LAYOUTS[layout](x) for x in (case.q, case.k, case.v, case.grad))
    given = [LAYOUTS[layout](x.to(device)).requires_grad_() for x in (case.q, case.k, case.v)]
    out = case.run(*given)
    grads = torch.autograd.grad(out, given, LAYOUTS[layout](case.grad.to(device)))
    for x, same in zip((out, *grads), plain_layout, strict=True):
        assert torch.equal(x, same)


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("needed", [n for n in product([True, False], repeat=3) if any(n)])
def test_only_needed_gradients_are_computed(device, monkeypatch, m, needed):
    from dualview.kernels import tile_attention_launch as launch
    from dualview.kernels import tile_attention_triton as kernels

    ran, ordinary = [], launch._launch
    monkeypatch.setattr(
        launch, "_launch", lambda kernel, *a, **flags: (ran.append((kernel, flags)), ordinary(kernel, *a, **flags))
    )
    case = Case(1, m, 3, 4, 1, 8, 8, batch=1)
    expected = case.results(torch.float64, device, "torch", needed)
    found = case.results(torch.float32, device, "triton", needed)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)
    of_keys = [flags for kernel, flags in ran if kernel is kernels.key_gradients]
    assert of_keys == ([{"DK": needed[1], "DV": needed[2]}] if needed[1] or needed[2] else [])
    of_queries = [flags["DELTA"] for kernel, flags in ran if kernel is kernels.query_gradients]
    assert of_queries == [True] * (m > 1 and needed[:2] != (False, False)) + [False] * needed[0]


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("one_kv", [False, True])
def test_the_gradient_of_every_token_that_is_named_is_written(device, monkeypatch, m, one_kv):
    from dualview.kernels import tile_attention_launch as launch

    case = Case(1, m, 35, 37, 2, 8, 70, batch=1, one_kv=one_kv, spare=(0, 0))
    exact = case.results(torch.float64, device, "torch")
    monkeypatch.setattr(launch, "_zeros", lambda like: dispatch.empty(*like.shape, like=like))  # poisoned
    for x, y in zip(case.results(torch.float32, device, "triton"), exact, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


def test_denominators_are_kept_for_gradients_only(device, monkeypatch):
    made, ordinary = [], dispatch.empty

    def empty(*shape, like, dtype=None):
        made.append((shape, dtype))
        return ordinary(*shape, like=like, dtype=dtype)

    monkeypatch.setattr(dispatch, "empty", empty)
    case = Case(2, 1, 3, 4, 1, 8, 8)
    q, k, v = case.operands(torch.bfloat16, device)
    case.run(q, k, v)
    with torch.no_grad():
        case.run(q.requires_grad_(), k, v)
    assert {shape for shape, dtype in made if dtype == torch.float32} == {(0,)}
    case.run(q, k, v)
    assert ((2, 2, 1, 3, 1), torch.float32) in made


@pytest.mark.parametrize("kind", ["batch", "keys", "queries"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("m", [1, 2])
def test_nothing_to_do(device, kind, backend, m):
    case = Case(
        0 if kind == "queries" else 2, m, 3, 0 if kind == "keys" else 4, 2, 8, 8, batch=0 if kind == "batch" else 2
    )
    for x in case.results(torch.float32, device, backend):
        assert (x == 0).all()


def arguments(case, device, grad):
    given = [x.requires_grad_(grad) for x in (case.q.to(device), case.k.to(device), case.v.to(device))]
    tables = [x.to(device) for x in (case.q_at, case.k_at, case.out_at)]
    return (
        *given,
        *tables,
        None if case.key_mask is None else case.key_mask.to(device),
        case.scale,
        case.out_tokens,
        grad,
    )


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("where", ["unguarded", "elsewhere"])
@pytest.mark.parametrize("m", [1, 2])
def test_opcheck(device, request, grad, where, m):
    request.getfixturevalue("unguarded")
    request.getfixturevalue(where)
    case = Case(2, m, 3, 4, 2, 8, 5, fill=0.2).masked(0.7)
    torch.library.opcheck(torch.ops.dualview.tile_attention.default, arguments(case, device, grad))


@pytest.mark.parametrize("where", ["unguarded", "elsewhere"])
@pytest.mark.parametrize("m, needed", [(1, [True, True, True]), (2, [False, True, False])])
def test_opcheck_of_the_backward_pass(device, request, needed, where, m):
    request.getfixturevalue("unguarded")
    request.getfixturevalue(where)
    case = Case(2, m, 3, 4, 2, 8, 5, fill=0.2).masked(0.7)
    *given, out_tokens, _ = arguments(case, device, False)
    out, lse = torch.ops.dualview.tile_attention(*given, out_tokens, True)
    found = case.grad.to(device), lse, out if m == 1 else None
    torch.library.opcheck(torch.ops.dualview.tile_attention_backward.default, (*given, *found, needed))


@pytest.mark.usefixtures("elsewhere")
@given(tile=st.tuples(st.booleans(), st.booleans()), one_kv=st.booleans(), seed=st.integers(0, 9))
@settings(max_examples=examples(10))
def test_the_operator_runs_where_no_kernel_does(device, tile, one_kv, seed):
    torch.manual_seed(seed)
    case = Case(2, 3, 3, 4, 2, 8, 5, tile_p=tile[0], tile_m=tile[1], one_kv=one_kv, fill=0.2).masked(0.5)
    for x, y in zip(*(case.results(torch.float64, device, backend) for backend in ("triton", "torch")), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_compiles_to_one_graph_for_all_batches(device, backend):
    case = Case(2, 2, 3, 4, 2, 8, 8, tile_m=False)
    tables = [x.to(device) for x in (case.q_at, case.k_at, case.out_at)]

    def attend(q, k, v, mask):
        found = tile_attention(q, k, v, *tables, case.out_tokens, scale=0.3, key_mask=mask, backend=backend)
        return found * 2, tile_attention(q, k, k, *tables, case.out_tokens, scale=0.3, backend=backend)

    def inputs(batch):
        q, k, v = (torch.randn(batch, *x.shape[1:], device=device) for x in (case.q, case.k, case.v))
        return q, k, v, torch.rand(k.shape[:2], device=device) < 0.8

    assert_compiles_once(attend, inputs, batches=(2, 3))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_autocast_makes_all_of_one_type(device, backend):
    case = Case(1, 2, 3, 4, 2, 8, 8)
    q, k, v = (x.to(device) for x in (case.q, case.k, case.v))
    with torch.autocast(device, torch.bfloat16):
        out = case.run(q.bfloat16().requires_grad_(), k.requires_grad_(), v, backend=backend)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert k.grad.dtype == torch.float32
    torch.testing.assert_close(out.float(), case.run(q, k, v, backend="torch"), rtol=0.03, atol=0.03)


def test_meta_tensors_have_the_shape_of_the_result():
    case = Case(2, 2, 3, 4, 2, 8, 5)
    q, k, v = (x.to("meta") for x in (case.q, case.k, case.v))
    assert case.run(q, k, v, backend="auto").shape == (2, 6, 2, 5)


def test_second_derivatives_are_for_torch(device):
    case = Case(1, 2, 2, 3, 1, 3, 3, batch=1)
    q, k, v = (x.double().to(device).requires_grad_() for x in (case.q, case.k, case.v))
    assert torch.autograd.gradgradcheck(partial(case.run, backend="torch"), (q, k, v))
    q, k, v = (x.float() for x in (q, k, v))
    (grad,) = torch.autograd.grad(case.run(q, k, v).sum(), q, create_graph=True)
    with refuses("no second derivative", 'backend="torch"', error=RuntimeError):
        grad.sum().backward()


def test_says_what_does_not_fit():
    case = Case(2, 2, 3, 4, 2, 8, 8, batch=2)
    given = {"q": case.q, "k": case.k, "v": case.v, "q_at": case.q_at, "k_at": case.k_at, "out_at": case.out_at}

    def call(**changed):
        return tile_attention(**(given | {"out_tokens": 6, "scale": 0.3} | changed))

    with refuses("k (2, 18, 3, 8)", "(B, Nk, H or 1, E)"):
        call(k=torch.zeros(2, 18, 3, 8))
    with refuses("torch.float16", "of one type", "autocast"):
        call(v=case.v.half())
    with refuses("q_at (2, 2, 3) of torch.int64", "torch.int32"):
        call(q_at=case.q_at.long())
    with refuses("k_at (3, 2, 4)", "(P or 1, M or 1, K)"):
        call(k_at=case.k_at[:1].repeat(3, 1, 1))
    with refuses("key_mask (2, 17) of torch.bool", "(2 or 1, 18)"):
        call(key_mask=torch.ones(2, 17, dtype=torch.bool))
    with refuses("scale=-1", "positive"):
        call(scale=-1)
    with refuses("float64", "cast", error=RuntimeError):
        call(**{name: given[name].double() for name in "qkv"}, backend="triton")
    with refuses("q_at names tokens from 15 to 15 of 15", "-1"):
        call(q_at=torch.full_like(case.q_at, 15))
    with refuses("q_at names token 3 twice", "asks once"):
        call(q_at=torch.full_like(case.q_at, 3))
    with refuses("k_at names token", "twice", "Let k_at have 1"):
        call(k_at=case.k_at[:1].repeat(2, 1, 1))
    with refuses("out_at names 6 of the 7", "out_tokens"):
        call(out_tokens=7)
    check_tables(case.q_at, case.k_at[:, :1], case.out_at, 15, 18, 6)


# --- Every choice of block sizes, compiled for an H200 ---------------------------------------------------------------

COMPILE = """
import json, sys
import torch
from dualview.kernels.tile_attention import tile_attention
from tests.kernels.compilation import compile_in_place_of_launching

compile_in_place_of_launching()
for dtype, precision, width, heads, masked, m, needed in json.loads(sys.argv[1]):
    torch.backends.cuda.matmul.fp32_precision = precision
    q_at = torch.arange(2 * m * 4, dtype=torch.int32).view(2, m, 4)
    q, k, v = (
        torch.zeros(2, 2 * m * 4, h, width, dtype=getattr(torch, dtype), requires_grad=name in needed)
        for name, h in (("q", heads), ("k", 1), ("v", 1))
    )
    mask = torch.ones(1, k.shape[1], dtype=torch.bool) if masked else None
    out_at = torch.arange(8, dtype=torch.int32).view(2, 4)
    out = tile_attention(q, k, v, q_at, q_at, out_at, 8, scale=0.3, key_mask=mask, backend="triton")
    if needed:
        out.sum().backward()
"""

COVERING = [
    # type, precision of float32, width, heads, masked, queries per row, gradients
    ("bfloat16", "ieee", 128, 1, True, 1, "qkv"),
    ("bfloat16", "ieee", 256, 8, False, 1, "qk"),
    ("bfloat16", "ieee", 256, 1, True, 2, ""),
    ("bfloat16", "ieee", 1024, 8, True, 1, "qk"),
    ("bfloat16", "ieee", 1024, 1, False, 2, ""),
    ("float32", "ieee", 128, 8, False, 1, ""),
    ("float32", "ieee", 256, 1, False, 1, ""),
    ("float32", "tf32", 1024, 1, True, 2, "kv"),
]
EVERYTHING = [
    (*types, *sizes)
    for types in (("float32", "ieee"), ("float32", "tf32"), ("bfloat16", "ieee"))
    for sizes in product((128, 256, 1024), (1, 8), (False, True), (1, 2), ("", "qkv", "k", "v"))
]


def test_every_choice_of_blocks_compiles_for_an_h200_and_fits_into_its_shared_memory():
    """As they are launched, with all that decides which program is compiled: in `make test-all` in every pairing."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    calls = json.dumps(EVERYTHING if "TEST_ALL" in os.environ else COVERING)
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, calls], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    found = [json.loads(line) for line in run.stdout.splitlines()]
    assert [kernel for kernel in found if kernel["shared"] > 227 * 1024] == []

    def seen(kernel, *names):
        return {tuple(x[name] for name in names) for x in found if x["kernel"] == kernel}

    assert seen("attend", "VALUES", "KEEP") == {(True, True), (True, False), (False, True)}
    assert seen("query_gradients", "DELTA") == {(True,), (False,)}
    assert seen("key_gradients", "DK", "DV") == {(True, True), (True, False), (False, True)}
    both = {(False, 1), (False, 8), (True, 1), (True, 8)}
    assert {pair for kernel in ("attend", "key_gradients") for pair in seen(kernel, "MASKED", "HEADS")} == both
    choices = Counter(x[:2] for x in seen("attend", "type", "E", "BLOCK_R", "BLOCK_K", "CHUNK"))
    widths = (128, 256, 1024)
    assert choices == {("*bf16", width): 2 for width in widths} | {("*fp32", width): 1 for width in widths}
    assert seen("attend_pooled", "type") == {("*bf16",), ("*fp32",)}


@pytest.mark.gpu
def test_more_elements_than_an_int32_counts(device):
    case = Case(2, 1, 64, 64, 1, 64, 64, batch=1)
    small = case.results(torch.bfloat16, device, "triton")
    around = torch.zeros(1, 2**25 + 400, 1, 64, dtype=torch.bfloat16, device=device)
    shift = 2**25 + 100
    given = []
    for x in (case.q, case.k, case.v):
        given.append(around.clone())
        given[-1][:, shift : shift + x.shape[1]] = x.to(device)
    case.q_at, case.k_at = case.q_at + shift, case.k_at + shift
    out = case.run(*(x.requires_grad_() for x in given))
    grads = torch.autograd.grad(out, given, case.grad.to(out))
    assert torch.equal(out, small[0])
    for grad, x, same in zip(grads, (case.q, case.k, case.v), small[1:], strict=True):
        assert torch.equal(grad[:, shift : shift + x.shape[1]], same)


@pytest.mark.gpu
@pytest.mark.usefixtures("unguarded")
@pytest.mark.parametrize("m", [1, 4])
def test_in_a_graph_on_another_stream(device, m):
    case = Case(4, m, 64, 64, 2, 64, 64)
    q, k, v = (x.requires_grad_() for x in case.operands(torch.bfloat16, device))
    tables = [x.to(device) for x in (case.q_at, case.k_at, case.out_at)]
    grad = case.grad.to(device, torch.bfloat16)

    def step():
        out = tile_attention(q, k, v, *tables, case.out_tokens, scale=case.scale, backend="triton")
        return out, *torch.autograd.grad(out, (q, k, v), grad)

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        step()  # compiled, and the blocks chosen, before it is captured
        with torch.cuda.graph(graph, stream=stream):
            captured = step()
        with torch.no_grad():
            q.normal_()
        graph.replay()
        expected = step()  # sums have one order: the same bits
    stream.synchronize()
    for x, y in zip(captured, expected, strict=True):
        assert torch.equal(x, y)
