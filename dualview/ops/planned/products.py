"""How the products of the live tokens are arranged: a question of cost, answered per device by estimated time.

For queries x, keys y and the projections of one head, scores and results may be made in several ways,

    scores:   (x W_q) (y W_k)^T  =  ((x W_q) W_k^T) y^T  =  (x (W_q W_k^T)) y^T
    results:  mean_i P_i (y W_v)  =  (mean_i P_i) (y W_v)  =  ((mean_i P_i) y) W_v

all equal in exact arithmetic (the bias of the keys adds one constant to the scores of a query, which the softmax drops,
and the rows of P sum to one). Few queries against many keys need fewer operations if the keys are not projected; but no
attention kernel is as fast for wide heads as for narrow ones, so that operations alone do not decide.

Time is estimated from rates of a device, by kind of work (rates.json, with the source of every figure): of a forward
pass or, where gradients are recorded, of both passes. Where there are no rates nothing is rearranged. Nor is anything
where a layer is not what its class made it: a layer that is wrapped, hooked, quantised, offloaded or replaced is
called, and its weights are never read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.resources import files
from itertools import product
from types import MethodType
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as module_hooks

from dualview.kernels.dispatch import capability
from dualview.ops.fusion import FUSIONS, BottleneckConcatFusion, LinearConcatFusion, declared
from dualview.ops.planned.live import EnhancePlan, EnhanceSpec, constant, plan_enhance
from dualview.ops.tile_attention import TileAttention

Pool: TypeAlias = Literal["cells", "map"] | None


class Arrangement(NamedTuple):
    """How one direction is computed.

    Attributes:
        absorb: Queries are projected into the space of the keys, and the keys not at all.
        fold: Absorbed with one head: W_q W_k^T is one matrix.
        pool: Where the average of the readout is taken, before W_v and all that follows: over "cells" of each tile's
            attention rows (cut by blocks of whole cells), on the "map" of what was collected, or not here.
    """

    absorb: bool = False
    fold: bool = False
    pool: Pool = None


class Products(NamedTuple):
    """How all directions are computed.

    Attributes:
        directions: One arrangement for each direction of the plan.
        fold_values: Whether W_v is folded into the linear layers of the fusion.
        together: Whether both directions meet their layers in one product each, where no key is masked: fewer launches.
            The queries, with one more copy of what was attended; or, with ``fold_values``, the keys, where no gradient
            is recorded.
        seconds: Estimated time for one image; None where the device has no rates.
        estimates: The same of all ways, first that of the equations.
    """

    directions: tuple[Arrangement, ...]
    fold_values: bool = False
    together: bool = False
    seconds: float | None = None
    estimates: tuple[float, ...] = ()

    @classmethod
    def as_written(cls, directions: int) -> Products:
        """Every direction as the equations stand."""
        return cls((Arrangement(),) * directions)


class Rates(NamedTuple):
    """What a device does per second, and what a launch costs: in a forward pass, or in both passes.

    In both passes, too, it is the operations of the forward pass that are counted: the time is that of both.

    Attributes:
        dense: Operations of products with weights; a multiply-addition is two.
        attention: Operations of unpooled attention, by width of a head: (widest, operations), rising.
        pooled: Operations of attention whose rows are averaged inside.
        moved: Elements that are copied, each read and written.
        launch: Seconds that every further operation costs.
    """

    dense: float
    attention: tuple[tuple[int, float], ...]
    pooled: float
    moved: float
    launch: float


def records() -> list[dict[str, Any]]:
    """The committed rates as they stand in the file, each with its source."""
    return list(json.loads(files(__package__).joinpath("rates.json").read_text(encoding="utf-8"))["records"])


def rates_of(device: torch.device, dtype: torch.dtype, *, training: bool = False) -> Rates | None:
    """The committed rates of a device for operands of a type, None where there are none.

    With ``training`` those of both passes; where only a forward pass has been measured, it decides.
    """
    name, of_type = device.type, str(dtype).removeprefix("torch.")
    if name == "cuda" and (found := capability(device)) is not None:
        name = f"cuda sm_{found[0]}{found[1]}"
    for record in records():
        if record["device"] == name and of_type in record["dtypes"]:
            of = record.get("training" if training else "forward", record["forward"])
            attention = tuple(map(tuple, of["attention"]))
            return Rates(of["dense"], attention, of["pooled"], of["moved"] / (2 * dtype.itemsize), of["launch"])
    return None


class Layers(NamedTuple):
    """What of the layers of one direction decides.

    Attributes:
        dim: Width D of the tokens.
        heads: Number of heads.
        out_proj: Whether a linear layer follows the attention.
        linear: Whether nothing but linear layers follows the softmax.
        weights_alone: Whether there is nothing but W_q, W_k and W_v of one head, without biases.
    """

    dim: int
    heads: int
    out_proj: bool
    linear: bool
    weights_alone: bool


def products_of(spec: EnhanceSpec, attentions: list[TileAttention], fusion: nn.Module, like: Tensor) -> Products:
    """How the directions are computed by these layers, for tokens of the type and on the device of ``like``.

    Args:
        spec: What decides which tokens are live.
        attentions: The attention of each direction of the plan.
        fusion: What merges the directions.
        like: A tensor of tokens.
    """
    if not all(readable(attention, like) for attention in attentions):
        return Products.as_written(len(attentions))
    device, dim = like.device.type, attentions[0].dim
    autocast = not like.is_meta and torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else like.dtype
    linear = type(fusion) is nn.Linear or (declared(fusion, "radius") == 0 and bool(declared(fusion, "linear")))
    commutes = linear and as_declared(fusion, like)
    return choose_products(
        spec,
        tuple(sizes_of(attention) for attention in attentions),
        like.device,
        dtype,
        training=torch.is_grad_enabled() and any(x.requires_grad for a in attentions for x in (like, *a.parameters())),
        shared=attentions[0] is attentions[-1],
        commutes=commutes,
        concat=type(fusion) is LinearConcatFusion
        and all(_is_linear(half, (dim // 2, dim), like) and half.bias is None for half in fusion.children()),
        fusion_weights=sum(p.numel() for p in fusion.parameters()) if commutes else 0,
    )


Sizes: TypeAlias = tuple[int, int, bool, bool, bool]
"""The values of `Layers` in a plain tuple, which a compiler takes as a constant."""


def sizes_of(attention: TileAttention) -> Sizes:
    """What of an attention decides."""
    others = (
        *(p.bias for p in (attention.q_proj, attention.k_proj, attention.v_proj)),
        attention.out_proj,
        attention.norm,
    )
    alone = attention.num_heads == 1 and not attention.residual and all(part is None for part in others)
    return attention.dim, attention.num_heads, attention.out_proj is not None, attention.norm is None, alone


@constant
def choose_products(
    spec: EnhanceSpec,
    sizes: tuple[Sizes, ...],
    device: torch.device,
    dtype: torch.dtype,
    *,
    training: bool,
    shared: bool,
    commutes: bool,
    concat: bool,
    fusion_weights: int,
) -> Products:
    """The arrangement with the least estimated time for one image; none without rates.

    Args:
        spec: What decides which tokens are live.
        sizes: Those of the layers of each direction.
        device: Where they are.
        dtype: Type of the operands.
        training: Whether a backward pass will follow.
        shared: Whether both directions have the same layers.
        commutes: Whether the fusion may be applied to averages.
        concat: Whether it is the linear concatenation, into which W_v can be folded.
        fusion_weights: Its parameters, if it commutes: its multiply-additions per token.
    """
    plan, layers = plan_enhance(*spec), [Layers(*values) for values in sizes]
    if (rates := rates_of(device, dtype, training=training)) is None:
        return Products.as_written(len(layers))
    averaged = plan.cell != (1, 1) and commutes and all(layer.linear for layer in layers)
    ways = list(_candidates(plan, layers, shared=shared, averaged=averaged, concat=concat))
    estimates = tuple(seconds_of(plan, layers, way, rates, shared, fusion_weights) for way in ways)
    return ways[estimates.index(min(estimates))]._replace(seconds=min(estimates), estimates=estimates)


def _candidates(
    plan: EnhancePlan, layers: list[Layers], *, shared: bool, averaged: bool, concat: bool
) -> Iterator[Products]:
    """Every arrangement that gives the same result; first that of the equations."""
    all_ask = plan.whole_cells and all(d.queries == d.keys for d in plan.directions)
    for pooled in (False, True) if averaged else (False,):
        ways = []
        for d, layer in zip(plan.directions, layers, strict=True):
            # Averages are taken in the earliest place where the tokens of a cell meet.
            pool: Pool = ("cells" if d.cut == "local" and plan.whole_cells else "map") if pooled else None
            folds = (False, True) if layer.heads == 1 else (False,)
            ways.append([Arrangement(False, False, pool), *(Arrangement(True, fold, pool) for fold in folds)])
        for directions in product(*ways):
            yield Products(directions)
            if pooled and concat and all(a.absorb for a in directions) and all(x.weights_alone for x in layers):
                yield Products(directions, fold_values=True)
                if shared and all_ask and all(a.fold for a in directions):
                    yield Products(directions, fold_values=True, together=True)
    one_of_each_cell = plan.cell == (1, 1) and plan.whole_cells and not plan.looks_around
    if shared and one_of_each_cell and len(layers) == 2 and any(d.num_tiles == 1 for d in plan.directions):
        yield Products.as_written(2)._replace(together=True)


def seconds_of(
    plan: EnhancePlan, layers: list[Layers], chosen: Products, rates: Rates, shared: bool, fusion_weights: int
) -> float:
    """Estimated time of one image, from the tokens to the fused map; other arguments as for `choose_products`."""
    dim, pooled_tokens = layers[0].dim, plan.tokens[0] * plan.tokens[1]
    folds = sum(a.fold for a in chosen.directions)
    dense = (min(folds, 1) if shared else folds) * dim**3 + chosen.fold_values * dim**3
    seconds = 0.0
    for d, layer, a in zip(plan.directions, layers, chosen.directions, strict=True):
        queries, keys = d.num_tiles * d.queries, d.num_tiles * d.keys
        results = pooled_tokens if a.pool else queries
        absorbed = (not a.fold) * queries + (not chosen.fold_values) * results
        rows = queries + results * layer.out_proj + (absorbed if a.absorb else 2 * keys)  # that meet a matrix of d x d
        dense += rows * dim**2
        inside = a.pool == "cells"
        meet_values = results if inside else queries
        scores = (queries + meet_values) * d.keys * dim * (layer.heads if a.absorb else 1)
        width = dim if a.absorb else dim // layer.heads
        of_width = [rate for widest, rate in rates.attention if width <= widest] or [rates.attention[-1][1]]
        attention = 2 * scores / (rates.pooled if inside else of_width[0])
        copied = queries * dim if a.pool and d.cut == "local" else 0  # to bring the tokens of cells together
        seconds += attention + copied / rates.moved + (12 if inside else 8) * rates.launch
    if chosen.together:  # with queries, what was attended is stacked; they are gathered in any case, as keys are
        seconds += -4 * rates.launch if chosen.fold_values else 2 * queries * dim / rates.moved - 5 * rates.launch
    of_map = len(plan.fused[0]) * len(plan.fused[1])
    dense += fusion_weights * (pooled_tokens if chosen.directions[0].pool else of_map)
    return seconds + 2 * dense / rates.dense


# --- What may be read ------------------------------------------------------------------------------------------------


KNOWN: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv2d,
    nn.GELU,
    nn.LayerNorm,
    nn.Sequential,
    nn.Identity,
    TileAttention,
    *FUSIONS.values(),
)
FORWARDS: dict[type[nn.Module], Any] = {layer: layer.forward for layer in KNOWN}
"""As the classes are made: somebody may put another one into a class."""


def untouched(layer: nn.Module, like: Tensor, but_of: str = "") -> bool:
    """Whether a call of a layer is that of its class, with parameters of its own on the device of ``like``.

    False for layers with hooks (but those made in the module ``but_of``), parametrisations, a forward of the instance,
    hooks of accelerate, and for weights that are offloaded, sharded, quantised or replaced by other tensors.
    """
    kinds = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    hooked = any(getattr(hook, "__module__", None) != but_of for hooks in kinds for hook in hooks.values())
    # torch.compile does not guard the first condition; it guards the method, but misses its function by getattr.
    forward: Any = layer.forward
    patched = "forward" in vars(layer) or not isinstance(forward, MethodType)
    ordinary = FORWARDS.get(type(layer), type(layer).forward)
    if hooked or _global_hook() or patched or forward.__func__ is not ordinary or hasattr(layer, "_hf_hook"):
        return False
    parameters = [p for p in layer._parameters.values() if p is not None]
    # Of no other kind of tensor; fake ones stand for plain ones while costs are counted.
    return all(
        isinstance(p, nn.Parameter) and type(p) in (nn.Parameter, FakeTensor) and p.device == like.device
        for p in parameters
    )


def _global_hook() -> bool:
    """Whether there is a hook on all modules. Those of torch's own tools, which count and trace, are none."""
    names = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")
    hooks = [hook for name in names for hook in getattr(module_hooks, f"_global_{name}").values()]
    return any(not getattr(hook, "__module__", "").startswith("torch.") for hook in hooks)


def readable(attention: TileAttention, like: Tensor) -> bool:
    """Whether the layers of an attention may be read, or called in another order."""
    layers = [attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj]
    norm: Any = attention.norm
    return (
        type(attention) is TileAttention
        and untouched(attention, like)
        and all(_is_linear(layer, 2 * (attention.dim,), like) for layer in layers if layer is not None)
        and (norm is None or (type(norm) is nn.LayerNorm and untouched(norm, like)))
    )


def _is_linear(layer: nn.Module, shape: tuple[int, ...], like: Tensor) -> bool:
    """Whether a layer is exactly torch's linear layer, with a weight of its own, of this shape."""
    weight = layer._parameters.get("weight")
    return type(layer) is nn.Linear and untouched(layer, like) and weight is not None and weight.shape == shape


def plain_bottlenecks(fusion: nn.Module, like: Tensor) -> bool:
    """Whether a fusion is the released one as it was made, with two bottlenecks alike."""
    layers = [layer for layer in fusion.modules() if type(layer) is nn.Linear]
    return (
        type(fusion) is BottleneckConcatFusion
        and [type(layer) for layer in fusion.modules()] == BOTTLENECKS
        and all(untouched(layer, like) for layer in fusion.modules())
        and [layer.weight.shape for layer in layers[:2]] == [layer.weight.shape for layer in layers[2:]]
        and all(layer.bias is not None for layer in layers)
        and all(layer.approximate == "none" for layer in fusion.modules() if type(layer) is nn.GELU)
    )


BOTTLENECKS = [BottleneckConcatFusion, *2 * [nn.Sequential, nn.Linear, nn.GELU, nn.Linear], nn.LayerNorm]
LINEAR_LAYERS = (nn.Linear, nn.Conv2d, nn.Identity, nn.Sequential, nn.ModuleList)


def as_declared(fusion: nn.Module, like: Tensor) -> bool:
    """Whether a fusion that declares itself linear still is: nothing is hooked on, and no layer inside is replaced."""
    return all(
        untouched(layer, like) and (type(layer) in LINEAR_LAYERS or bool(declared(layer, "linear")))
        for layer in fusion.modules()
    )
