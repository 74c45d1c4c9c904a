"""Whatever a user does to a layer of the enhancement module takes effect: adapters, offloading, shards, hooks.

Where the fast path would read a weight, or average before a layer, it must notice that the layer is no longer its own.
The truth is the full computation of the same module, which calls every layer as it stands; and besides, the module with
its adapters merged, with its weights dequantised, or without the wrapper.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as every_module
from torch.nn.utils import parametrizations, prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import dualview as dv
from tests.strategies import some

DIM = 32
Pair = tuple[int, int]
Outcome = dict[str, Tensor]
ENDS = ("output", "gradient of local_tiles", "gradient of stride_tiles")


class Case(NamedTuple):
    """A module, and the sizes that decide what its fast path skips."""

    preset: Callable[..., dv.DualPerspectiveEnhance]
    options: dict[str, Any]
    grid: Pair
    tokens: Pair


PAPER, RELEASED = dv.DualPerspectiveEnhance.paper, dv.DualPerspectiveEnhance.released
CASES = {
    "paper": Case(PAPER, {}, (2, 3), (6, 6)),  # W_q W_k^T and W_v folded, pooled inside the tiles
    "paper, pooled on the map": Case(PAPER, {}, (3, 3), (4, 6)),
    "paper, two attentions": Case(PAPER, {"share_weights": False}, (2, 3), (4, 6)),
    "paper, one direction": Case(PAPER, {"enhance": "global"}, (2, 3), (6, 6)),  # its fusion is a linear layer
    "paper, conv3x3": Case(PAPER, {"fusion": "conv3x3"}, (2, 3), (4, 6)),  # nothing can be skipped
    "released": Case(RELEASED, {}, (2, 3), (4, 6)),  # live queries only, the fusion averages
    "released, absorbed": Case(RELEASED, {}, (3, 3), (6, 6)),  # W_k and W_v applied to the queries, head by head
    "released, conv3x3": Case(RELEASED, {"fusion": "conv3x3"}, (2, 5), (4, 6)),  # some columns are far from any read
    "released, conv3x3 close by": Case(RELEASED, {"fusion": "conv3x3"}, (3, 3), (6, 6)),  # no token is
}
FASTER = [name for name in CASES if name not in ("paper, conv3x3", "released, conv3x3 close by")]
every_case = pytest.mark.parametrize("name", CASES)


def make(name: str, dtype: torch.dtype = torch.float64) -> dv.DualPerspectiveEnhance:
    """The module of a case, always with the same weights; none is at its neutral start."""
    torch.manual_seed(0)
    dem = CASES[name].preset(DIM, **CASES[name].options, dtype=dtype)
    with torch.no_grad():
        for parameter in dem.parameters():
            parameter.normal_(std=0.3)
    return dem


def places_of(name: str, *types: type[nn.Module]) -> list[str]:
    """Where the layers of these types are in the module of a case."""
    return [place for place, layer in make(name).named_modules() if type(layer) in types]


def layers_of(names: Iterable[str]) -> list[tuple[str, str]]:
    """Every case with each of its linear and convolutional layers."""
    return [(name, place) for name in names for place in places_of(name, nn.Linear, nn.Conv2d)]


def tiles_of(name: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Pair]:
    case, generator = CASES[name], torch.Generator().manual_seed(1)
    shape = (2, 1, case.grid[0] * case.grid[1], *case.tokens, DIM)
    local, stride = torch.randn(shape, dtype=dtype, generator=generator)
    return local, stride, case.grid


def outcome(dem: nn.Module, name: str, dtype: torch.dtype = torch.float64) -> Outcome:
    """The output, and the gradients of the inputs and of all parameters in memory; zeros where there is none."""
    local, stride, grid = tiles_of(name, dtype)
    given = {"local_tiles": local.requires_grad_(), "stride_tiles": stride.requires_grad_()}
    out = dem(local, stride, grid)
    if out.requires_grad:
        (out * torch.linspace(-1, 1, out.numel(), dtype=dtype).reshape(out.shape)).sum().backward()
    found = {"output": out.detach()}
    for label, x in (given | dict(dem.named_parameters())).items():
        gradient, x.grad = x.grad, None
        if gradient is not None:
            found[f"gradient of {label}"] = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        elif not x.is_meta:
            found[f"gradient of {label}"] = torch.zeros(x.shape, dtype=dtype)
    return found


def truth_of(dem: nn.Module, name: str, dtype: torch.dtype = torch.float64) -> Outcome:
    """The same with everything computed, as the equations are written."""
    with dv.full_computation():
        return outcome(dem, name, dtype)


@lru_cache
def untouched(name: str) -> Outcome:
    return truth_of(make(name), name)


def assert_same(found: Outcome, truth: Outcome, labels: Any = None, **tolerance: float) -> None:
    assert labels is not None or found.keys() == truth.keys()
    for label in labels or truth:
        torch.testing.assert_close(
            found[label], truth[label], **tolerance, msg=lambda message, label=label: f"{label}: {message}"
        )


def differ(one: Outcome, other: Outcome) -> bool:
    """Whether anything that both have is another."""
    labels = one.keys() & other.keys()
    return any(not torch.allclose(one[label], other[label], rtol=1e-3, atol=1e-3) for label in labels)


class OperationCounter(TorchDispatchMode):
    """Floating-point operations of products and convolutions, counted without hooks, which would be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), options: Any = None) -> Any:
        out = function(*given, **(options or {}))
        if count := flop_registry.get(function._overloadpacket):
            self.total += count(*given, **(options or {}), out_val=out)
        return out


def operations_of(dem: nn.Module, name: str) -> int:
    with OperationCounter() as counter, sdpa_kernel(SDPBackend.MATH):  # which consists of products
        dem(*tiles_of(name))
    return counter.total


def full_operations_of(dem: nn.Module, name: str) -> int:
    with dv.full_computation():
        return operations_of(dem, name)


# What is done to a layer: functions of the module and of the layer's place in it. What changes its output squashes it:
# that commutes neither with an average nor with a product of matrices.


def forward_hook(dem: nn.Module, place: str) -> None:
    dem.get_submodule(place).register_forward_hook(lambda layer, given, out: out.tanh())


def forward_pre_hook(dem: nn.Module, place: str) -> None:
    dem.get_submodule(place).register_forward_pre_hook(lambda layer, given: (given[0].tanh(), *given[1:]))


def backward_hook(dem: nn.Module, place: str) -> None:
    dem.get_submodule(place).register_full_backward_hook(lambda layer, of_input, of_output: tripled(of_input))


def backward_pre_hook(dem: nn.Module, place: str) -> None:
    dem.get_submodule(place).register_full_backward_pre_hook(lambda layer, of_output: tripled(of_output))


def tripled(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if gradient is None else 3 * gradient for gradient in gradients)


def own_forward(dem: nn.Module, place: str) -> None:
    layer = dem.get_submodule(place)
    before = layer.forward

    def forward(*given: Any, **options: Any) -> Tensor:
        return before(*given, **options).tanh()

    layer.forward = forward


def own_class(dem: nn.Module, place: str) -> None:
    layer = dem.get_submodule(place)

    class Own(type(layer)):
        def forward(self, *given: Any, **options: Any) -> Tensor:
            return super().forward(*given, **options).tanh()

    layer.__class__ = Own


class Squashed(nn.Module):
    """Another module around a layer, with neither its class nor its attributes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *given: Tensor) -> Tensor:
        return self.inner(*given).tanh()


def replaced(dem: nn.Module, place: str) -> None:
    dem.set_submodule(place, Squashed(dem.get_submodule(place)))


def biased(dem: nn.Module, place: str) -> None:
    """A plain linear layer with a bias, in place of one without."""
    before = dem.get_submodule(place)
    layer = nn.Linear(before.in_features, before.out_features, dtype=before.weight.dtype)
    nn.init.normal_(layer.bias)
    layer.weight = before.weight
    dem.set_submodule(place, layer)


def trained(layer: nn.Module) -> None:
    """A step of training: what was derived from the parameters before is stale."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.rand_like(parameter))


def pruned(dem: nn.Module, place: str) -> None:
    trained(prune.l1_unstructured(dem.get_submodule(place), "weight", amount=0.5))


def weight_norm(dem: nn.Module, place: str) -> None:
    trained(parametrizations.weight_norm(dem.get_submodule(place)))


def orthogonal(dem: nn.Module, place: str) -> None:
    trained(parametrizations.orthogonal(dem.get_submodule(place)))


def old_weight_norm(dem: nn.Module, place: str) -> None:
    trained(nn.utils.weight_norm(dem.get_submodule(place)))


def old_spectral_norm(dem: nn.Module, place: str) -> None:
    trained(nn.utils.spectral_norm(dem.get_submodule(place)).eval())  # no step of the power iteration per call


OF_ANY_LAYER = [forward_hook, forward_pre_hook, backward_hook, backward_pre_hook, own_forward, own_class, replaced]
OF_A_WEIGHT = [pruned, weight_norm, orthogonal, old_weight_norm, old_spectral_norm]
OF_A_WHOLE_MODULE = [forward_hook, forward_pre_hook, backward_hook, backward_pre_hook, own_forward, own_class]


def touched_layers() -> Iterator[Any]:
    """Every layer of every case with everything that can be done to it."""
    for name in CASES:
        dem = make(name)
        for place in places_of(name, nn.Linear, nn.Conv2d, nn.LayerNorm):
            layer = dem.get_submodule(place)
            touches = list(OF_ANY_LAYER)
            if not isinstance(layer, nn.LayerNorm):
                touches += OF_A_WEIGHT
            if isinstance(layer, nn.Linear) and layer.bias is None:
                touches.append(biased)
            for touch in touches:
                yield pytest.param(name, place, touch, id=f"{name}-{place}-{touch.__name__}")


def touched_modules() -> Iterator[Any]:
    """The attention and the fusion of every case; a fusion may also be replaced by any module of two maps."""
    for name in CASES:
        for place in places_of(name, dv.TileAttention):
            for touch in OF_A_WHOLE_MODULE:
                yield pytest.param(name, place, touch, id=f"{name}-{place}-{touch.__name__}")
        if not isinstance(make(name).fusion, nn.Linear):  # which is among the layers
            for touch in (*OF_A_WHOLE_MODULE, replaced):
                yield pytest.param(name, "fusion", touch, id=f"{name}-fusion-{touch.__name__}")


def check_that_it_takes_effect(name: str, place: str, touch: Callable[[nn.Module, str], None]) -> None:
    dem = make(name)
    touch(dem, place)
    found = outcome(dem, name)  # before the truth: to call a layer may bring its weight up to date
    truth = truth_of(dem, name)
    assert_same(found, truth)
    if not (touch is biased and place.endswith("k_proj")):  # one constant for all keys of a query: softmax drops it
        assert differ(truth, untouched(name))


@pytest.mark.filterwarnings("ignore::FutureWarning:torch")
@pytest.mark.parametrize("name, place, touch", some(touched_layers(), 5))
def test_what_is_done_to_a_layer(name: str, place: str, touch: Callable[[nn.Module, str], None]) -> None:
    check_that_it_takes_effect(name, place, touch)


@pytest.mark.parametrize("name, place, touch", some(touched_modules(), 5))
def test_what_is_done_to_the_attention_or_the_fusion(
    name: str, place: str, touch: Callable[[nn.Module, str], None]
) -> None:
    check_that_it_takes_effect(name, place, touch)


class TestEveryLayerAtOnce:
    """All layers squash their outputs, and the module is given or made to do something else besides."""

    def touched(self, name: str) -> dv.DualPerspectiveEnhance:
        dem = make(name)
        for place in places_of(name, nn.Linear, nn.Conv2d):
            forward_hook(dem, place)
        return dem

    @every_case
    def test_masks(self, name: str) -> None:
        dem, (local, stride, grid) = self.touched(name), tiles_of(name)
        mask = torch.rand(grid[0] * CASES[name].tokens[0], grid[1] * CASES[name].tokens[1]) < 0.5
        mask[: CASES[name].tokens[0], : CASES[name].tokens[1]] = False  # no key at all for the first local tile
        with dv.full_computation():
            truth = dem(local, stride, grid, mask)
        torch.testing.assert_close(dem(local, stride, grid, mask), truth)

    @every_case
    def test_tiles_that_are_absent(self, name: str) -> None:
        dem, (local, stride, grid) = self.touched(name), tiles_of(name)
        live = dem.plan(grid, CASES[name].tokens).live
        out = dem(local[:, live.local], stride[:, live.stride], grid, live=live)
        with dv.full_computation():
            torch.testing.assert_close(out, dem(local, stride, grid))

    @every_case
    def test_maps_before_the_fusion(self, name: str) -> None:
        dem, given = self.touched(name), tiles_of(name)
        with dv.full_computation():
            truth = dem.enhanced_maps(*given)
        torch.testing.assert_close(dem.enhanced_maps(*given), truth)

    @every_case
    def test_weights_given_with_the_call(self, name: str) -> None:
        """torch.func: plain tensors, or what vmap makes of them, where the parameters were."""
        dem, given = make(name), tiles_of(name)
        weights = {label: 1.5 * parameter.detach() for label, parameter in dem.named_parameters()}
        with dv.full_computation():
            truth = torch.func.functional_call(dem, weights, given)
        torch.testing.assert_close(torch.func.functional_call(dem, weights, given), truth)
        assert not torch.allclose(truth, untouched(name)["output"])

    @pytest.mark.parametrize("name", ["paper", "released, absorbed"])
    def test_compiled(self, name: str) -> None:
        dem, given = self.touched(name), tiles_of(name)
        torch._dynamo.reset()
        out = torch.compile(dem, backend="eager", fullgraph=True)(*given)
        with dv.full_computation():
            torch.testing.assert_close(out, dem(*given))


class TestHooksOnEveryModule:
    """Hooks that torch calls for all modules of the process: profilers, loggers, tools that change activations."""

    def check(self, name: str, register: Callable[[Any], Any], hook: Callable[..., Any]) -> None:
        dem = make(name)
        handle = register(hook)
        try:
            truth, found = truth_of(dem, name), outcome(dem, name)
        finally:
            handle.remove()
        assert_same(found, truth)
        assert differ(truth, untouched(name))

    @every_case
    @pytest.mark.parametrize("kind", [(nn.Linear, nn.Conv2d), dv.TileAttention])
    def test_forward(self, name: str, kind: Any) -> None:
        def hook(layer: nn.Module, given: Any, out: Tensor) -> Tensor | None:
            return out.tanh() if isinstance(layer, kind) else None

        self.check(name, every_module.register_module_forward_hook, hook)

    @every_case
    @pytest.mark.parametrize("kind", [(nn.Linear, nn.Conv2d), dv.TileAttention])
    def test_before_forward(self, name: str, kind: Any) -> None:
        def hook(layer: nn.Module, given: Any) -> Any:
            return (given[0].tanh(), *given[1:]) if isinstance(layer, kind) else None

        self.check(name, every_module.register_module_forward_pre_hook, hook)

    @every_case
    def test_backward(self, name: str) -> None:
        def hook(layer: nn.Module, of_input: Any, of_output: Any) -> Any:
            return tripled(of_input) if isinstance(layer, (nn.Linear, nn.Conv2d)) else None

        self.check(name, every_module.register_module_full_backward_hook, hook)

    @every_case
    def test_every_layer_is_seen(self, name: str) -> None:
        dem, seen = make(name), set()
        handle = every_module.register_module_forward_hook(lambda layer, given, out: seen.add(layer))
        try:
            dem(*tiles_of(name))
        finally:
            handle.remove()
        skipped = [place for place, layer in dem.named_modules() if layer not in seen and place != "attentions"]
        assert not skipped


def adapted_parts() -> Iterator[tuple[str, str]]:
    """What gets adapters at once: one kind of projection, all of them, the layers of the fusion, every layer."""
    for name in CASES:
        for part in ("q_proj", "k_proj", "v_proj", "out_proj", "attentions", "fusion", ""):
            if any(part in place for place in places_of(name, nn.Linear, nn.Conv2d)):
                yield name, part


class TestAdapters:
    """peft: LoRA and its relatives."""

    def targets(self, name: str, part: str) -> list[str]:
        """All layers of a part of the module; of the whole for the empty part."""
        return [place for place in places_of(name, nn.Linear, nn.Conv2d) if part in place]

    def adapted(self, name: str, targets: list[str], **options: Any) -> Any:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(make(name), LoraConfig(r=3, lora_alpha=6, target_modules=targets, **options))
        with torch.no_grad():
            for label, parameter in model.named_parameters():
                if "lora_B" in label:
                    parameter.normal_(std=0.3)
        return model.eval()

    def check(self, model: nn.Module, name: str) -> Outcome:
        """As in the full computation, and as with the adapters merged; returns what the merged module gives."""
        from copy import deepcopy

        merged = truth_of(deepcopy(model).merge_and_unload().requires_grad_(), name)
        truth, found = truth_of(model, name), outcome(model, name)
        assert_same(truth, merged, ENDS)
        assert differ(merged, untouched(name))
        assert_same(found, merged, ENDS)
        assert_same(found, truth)
        return merged

    @pytest.mark.parametrize("name, part", some(adapted_parts(), 2))
    def test_lora(self, name: str, part: str) -> None:
        targets = self.targets(name, part)
        model = self.adapted(name, targets)
        merged, found = self.check(model, name), outcome(model, name)
        for place in targets:  # W' = W + 2 B A
            of_weight = merged[f"gradient of {place}.weight"].flatten(1)
            inside = f"base_model.model.{place}"
            a, b = (model.get_parameter(f"{inside}.lora_{x}.default.weight") for x in "AB")
            truth = {
                f"gradient of {inside}.lora_A.default.weight": 2 * (b.flatten(1).mT @ of_weight).reshape(a.shape),
                f"gradient of {inside}.lora_B.default.weight": 2 * (of_weight @ a.flatten(1).mT).reshape(b.shape),
            }
            assert_same(found, truth, truth)
            assert all(bool(gradient.any()) for gradient in truth.values())

    @every_case
    def test_dora(self, name: str) -> None:
        self.check(self.adapted(name, self.targets(name, ""), use_dora=True), name)

    @every_case
    def test_a_part_that_is_trained_beside_the_adapters(self, name: str) -> None:
        model = self.adapted(name, self.targets(name, "attentions"), modules_to_save=["fusion"])
        with torch.no_grad():
            for parameter in model.base_model.model.fusion.parameters():
                if parameter.requires_grad:
                    parameter.mul_(-2)
        self.check(model, name)

    @every_case
    @pytest.mark.parametrize("part", ["attentions", "fusion"])
    def test_dropout(self, name: str, part: str) -> None:
        model = self.adapted(name, self.targets(name, part), lora_dropout=0.5)
        evaluated = outcome(model, name)
        model.train()
        one, other = outcome(model, name), outcome(model, name)
        assert differ({"output": one["output"]}, {"output": other["output"]})
        assert_same(outcome(model.eval(), name), evaluated)

    @every_case
    def test_switched_off_and_merged_in_place(self, name: str) -> None:
        model = self.adapted(name, self.targets(name, ""))
        with model.disable_adapter():
            assert_same(outcome(model, name), untouched(name), ENDS)
        truth = truth_of(model, name)
        model.merge_adapter()
        assert_same(outcome(model, name), truth, ENDS)

    @pytest.mark.parametrize("name", FASTER)
    def test_merged_and_unloaded_it_is_as_fast_as_before(self, name: str) -> None:
        unloaded = self.adapted(name, self.targets(name, "")).merge_and_unload()
        assert operations_of(unloaded, name) == operations_of(make(name), name) < full_operations_of(make(name), name)


class TestOffloading:
    """accelerate: weights on meta that are fetched when a layer is called."""

    @every_case
    @pytest.mark.parametrize("to", ["cpu", "disk"])
    def test_the_whole_module(self, name: str, to: str, tmp_path: Path) -> None:
        from accelerate import cpu_offload, disk_offload

        dem = make(name)
        if to == "cpu":
            cpu_offload(dem, torch.device("cpu"))
        else:
            disk_offload(dem, tmp_path, torch.device("cpu"))
        assert {parameter.device.type for parameter in dem.parameters()} == {"meta"}
        for _ in range(2):
            assert_same(outcome(dem, name), untouched(name), ENDS)

    @pytest.mark.parametrize("name, place", some(layers_of(CASES), 3))
    def test_one_layer(self, name: str, place: str) -> None:
        from accelerate import cpu_offload

        dem = make(name)
        cpu_offload(dem.get_submodule(place), torch.device("cpu"))
        found = outcome(dem, name)
        assert_same(found, untouched(name), found)

    @every_case
    def test_a_map_of_devices(self, name: str, tmp_path: Path) -> None:
        """Every other layer on disk."""
        from accelerate import dispatch_model

        dem = make(name)
        places = places_of(name, nn.Linear, nn.Conv2d, nn.LayerNorm)
        devices = {place: "cpu" if number % 2 else "disk" for number, place in enumerate(places)}
        dispatch_model(dem, devices, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
        found = outcome(dem, name)
        assert_same(found, untouched(name), found)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One process that is a mesh of its own; it meets itself in a file, and no port is opened for others."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh

    meeting = tmp_path_factory.mktemp("shards") / "meeting"
    init_process_group("gloo", init_method=meeting.as_uri(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        destroy_process_group()


class TestShards:
    """FSDP2: weights are DTensors, and plain tensors while the module that was sharded is called."""

    def check(self, name: str, places: list[str], mesh: Any) -> None:
        from torch.distributed.fsdp import fully_shard

        dem = make(name)
        for place in places:
            fully_shard(dem.get_submodule(place), mesh=mesh)
        for _ in range(2):
            assert_same(outcome(dem, name), untouched(name))

    @pytest.mark.parametrize("name, place", some(layers_of(CASES), 3))
    def test_one_layer(self, name: str, place: str, mesh: Any) -> None:
        self.check(name, [place], mesh)

    @every_case
    def test_every_layer(self, name: str, mesh: Any) -> None:
        self.check(name, places_of(name, nn.Linear, nn.Conv2d, nn.LayerNorm), mesh)

    @every_case
    @pytest.mark.parametrize("places", [["attentions.0"], ["fusion"], [""], ["attentions.0", "fusion", ""]])
    @pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")
    def test_larger_parts(self, name: str, places: list[str], mesh: Any) -> None:
        self.check(name, places, mesh)


def with_weights(name: str, weights: dict[str, Tensor]) -> dv.DualPerspectiveEnhance:
    """The plain module of a case with other weights in some layers."""
    dem = make(name, torch.float32)
    with torch.no_grad():
        for place, weight in weights.items():
            dem.get_submodule(place).weight.copy_(weight)
    return dem


class TestQuantisedLayers:
    """Linear layers with integer weights. Where nothing else is rounded, the dequantised weights are the truth."""

    def check_against_weights(self, dem: nn.Module, name: str, weights: dict[str, Tensor]) -> None:
        truth = truth_of(with_weights(name, weights), name, torch.float32)
        rounding = {"rtol": 1e-3, "atol": 1e-4}
        assert_same(truth_of(dem, name, torch.float32), truth, ENDS, **rounding)
        assert_same(outcome(dem, name, torch.float32), truth, ENDS, **rounding)
        assert not torch.allclose(truth["output"], untouched(name)["output"].float(), rtol=1e-3, atol=1e-3)

    def check_against_full(self, quantise: Callable[[nn.Module], nn.Module], name: str) -> None:
        """Where activations are rounded, too, by the tokens that are present: the weights must be the quantised ones.

        They are rounded coarsely, for the weights of one channel are large. Nothing else comes of these: it is empty.
        """
        dem = make(name, torch.float32)
        local, stride, grid = tiles_of(name, torch.float32)
        local[..., 0], stride[..., 0] = 0, 0
        with torch.no_grad():
            for layer in dem.modules():
                for parameter in layer.parameters(recurse=False):
                    parameter[0] = 0
                if isinstance(layer, nn.Linear):
                    layer.weight[1:, 0] = 20
            with dv.full_computation():
                plain = dem(local, stride, grid)
                dem = quantise(dem)
                truth = dem(local, stride, grid)
            found = dem(local, stride, grid)
        assert (found - truth).abs().mean() < 0.2 * (plain - truth).abs().mean()

    @every_case
    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
    def test_dynamic(self, name: str) -> None:
        from torch.ao.quantization import quantize_dynamic

        self.check_against_full(lambda dem: quantize_dynamic(dem, {nn.Linear}, torch.qint8), name)

    @every_case
    @pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
    def test_torchao_int8(self, name: str) -> None:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        dem = make(name, torch.float32)
        quantize_(dem, Int8WeightOnlyConfig())
        layers = {place: dem.get_submodule(place) for place in places_of(name, nn.Linear)}
        assert {type(layer) for layer in layers.values()} == {nn.Linear}  # only its weight tells
        self.check_against_weights(dem, name, {place: layer.weight.dequantize() for place, layer in layers.items()})

    @every_case
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.filterwarnings("ignore::FutureWarning")
    def test_bitsandbytes_4_bits(self, name: str, training: bool) -> None:
        from bitsandbytes.functional import dequantize_4bit
        from bitsandbytes.nn import Linear4bit

        dem = self.exchanged(make(name, torch.float32), Linear4bit, quant_type="nf4", compute_dtype=torch.float32)
        dem.train(training)
        weights = [(place, dem.get_submodule(place).weight) for place in places_of(name, nn.Linear)]
        self.check_against_weights(dem, name, {place: dequantize_4bit(w.data, w.quant_state) for place, w in weights})

    @every_case
    @pytest.mark.parametrize("training", [True, False])
    def test_bitsandbytes_8_bits(self, name: str, training: bool) -> None:
        """Out of training its layers take no more than three dimensions."""
        from bitsandbytes.nn import Linear8bitLt

        def quantise(dem: nn.Module) -> nn.Module:
            return self.exchanged(dem, Linear8bitLt, has_fp16_weights=False).train(training)

        self.check_against_full(quantise, name)

    def exchanged(self, dem: nn.Module, kind: type[nn.Linear], **options: Any) -> nn.Module:
        """The module with its linear layers exchanged for another kind; moving that to a device quantises it."""
        for place, layer in list(dem.named_modules()):
            if isinstance(layer, nn.Linear):
                other = kind(layer.in_features, layer.out_features, bias=layer.bias is not None, **options)
                other.load_state_dict(layer.state_dict())
                dem.set_submodule(place, other)
        return dem.to("cpu")


class TestThatTheFastPathStays:
    """The other side: what nobody touched is skipped, folded and pooled as before."""

    @pytest.mark.parametrize("name", FASTER)
    def test_untouched(self, name: str) -> None:
        assert operations_of(make(name), name) < full_operations_of(make(name), name)

    @pytest.mark.parametrize("name", FASTER)
    def test_to_count_operations_changes_nothing(self, name: str) -> None:
        """torch's own counter hooks into every module, and its hooks never change a result."""
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            make(name)(*tiles_of(name))
        assert counter.get_total_flops() == operations_of(make(name), name)

    @pytest.mark.parametrize("name, place", some(layers_of(FASTER), 3))
    def test_touched_and_put_back(self, name: str, place: str) -> None:
        dem, fast = make(name), operations_of(make(name), name)
        layer = dem.get_submodule(place)
        layer.register_forward_hook(lambda layer, given, out: None).remove()
        assert operations_of(dem, name) == fast
        nn.utils.parametrize.remove_parametrizations(parametrizations.weight_norm(layer), "weight")
        assert operations_of(dem, name) == fast
        prune.remove(prune.l1_unstructured(layer, "weight", amount=1), "weight")
        assert operations_of(dem, name) == fast

    @pytest.mark.parametrize("name, place", some(layers_of(FASTER), 2))
    def test_a_touched_layer_is_called_on_live_tokens(self, name: str, place: str) -> None:
        """A bilinear readout leaves most tokens dead; under an average all are live, but no work is added."""
        dem, seen = make(name), []
        dem.get_submodule(place).register_forward_pre_hook(lambda layer, given: seen.append(given[0].numel()))
        planned = operations_of(dem, name)
        called_on = sum(seen)
        seen.clear()
        full = full_operations_of(dem, name)
        assert 0 < called_on <= sum(seen)
        assert planned <= full
        if name.startswith("released"):
            assert planned < full
            assert called_on < sum(seen) or place == "fusion.conv"
