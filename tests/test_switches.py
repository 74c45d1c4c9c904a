"""Switches: who sees the value of a block, in eager code and in what torch.compile compiles."""

import asyncio
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from itertools import permutations
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dualview import DualPerspectiveEnhance, DualViewEncoder
from dualview.explain import explain
from dualview.kernels.dispatch import BACKEND, choose, use_backend
from dualview.switches import FULL, Switch, full_computation, planning
from tests.fresh import run_fresh

BONUS = {"off": 0.0, "on": 1.0, "more": 2.0}


@pytest.fixture
def switch() -> Switch[str]:
    return Switch("switch", "off")


@pytest.fixture(autouse=True)
def _without_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Compiled:
    """A function compiled to one graph at a time, and how many graphs there are."""

    def __init__(self, function: Callable[..., Any], *, fullgraph: bool = True, when_run: Any = None) -> None:
        self.graphs = 0
        self._when_run = when_run
        self._compiled = torch.compile(function, backend=self._compile, fullgraph=fullgraph)

    def _compile(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1

        def run(*args: Any) -> Any:
            if self._when_run is not None:
                self._when_run()
            return graph(*args)

        return run

    def __call__(self) -> Any:
        found = self._compiled(torch.zeros(()))
        return found.item() if isinstance(found, Tensor) else [x.item() for x in found]


def in_a_thread(function: Callable[[], Any]) -> Any:
    """What the function returns in a thread of its own."""
    found: list[Any] = []
    thread = Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join(60)
    return found[0]


# --- In eager code ----------------------------------------------------------------------------------------------------


def test_the_innermost_block_counts(switch: Switch[str]) -> None:
    assert switch.value() == "off"
    with switch.holding("on"):
        assert switch.value() == "on"
        with switch.holding("more"):
            assert switch.value() == "more"
        assert switch.value() == "on"
    assert switch.value() == "off"


def test_a_block_ends_with_an_error(switch: Switch[str]) -> None:
    with pytest.raises(KeyError), switch.holding("on"):
        raise KeyError
    assert switch.value() == "off"


def test_values_of_any_kind_count(switch: Switch[str]) -> None:
    flag = Switch("flag", default=True)
    with flag.holding(False):
        assert flag.value() is False
    assert flag.value() is True


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_blocks_are_left_in_any_order(switch: Switch[str], order: tuple[int, ...]) -> None:
    """In eager code and in a graph counts the block entered last of those that are left."""
    compiled = Compiled(lambda x: x + BONUS[switch.value()])
    values = ["on", "more", "off"]
    blocks: list[AbstractContextManager[None]] = [switch.holding(value) for value in values]
    for block in blocks:
        block.__enter__()
    entered = [0, 1, 2]
    for index in order:
        blocks[index].__exit__(None, None, None)
        entered.remove(index)
        expected = values[entered[-1]] if entered else "off"
        assert switch.value() == expected
        assert compiled() == BONUS[expected]


def test_a_block_is_left_once(switch: Switch[str]) -> None:
    """Two blocks of one value are two blocks."""
    first, second = switch.holding("on"), switch.holding("on")
    first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    assert switch.value() == "on"
    second.__exit__(None, None, None)
    assert switch.value() == "off"


def test_threads_do_not_see_each_others_blocks(switch: Switch[str]) -> None:
    both_in, seen = Barrier(2), {}

    def work(value: str) -> None:
        before = switch.value()
        with switch.holding(value):
            both_in.wait(60)
            seen[value] = before, switch.value()
            both_in.wait(60)
        seen[value] += (switch.value(),)

    threads = [Thread(target=work, args=(value,)) for value in ("on", "more")]
    with switch.holding("more"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert seen == {value: ("off", value, "off") for value in ("on", "more")}
    assert switch.value() == "off"


def test_tasks_do_not_see_each_others_blocks(switch: Switch[str]) -> None:
    async def work(value: str, steps: int) -> list[str]:
        seen = [switch.value()]
        with switch.holding(value):
            for _ in range(steps):
                await asyncio.sleep(0)
                seen.append(switch.value())
        await asyncio.sleep(0)
        return [*seen, switch.value()]

    async def together() -> list[list[str]]:
        outside = asyncio.create_task(work("on", 2))
        with switch.holding("more"):
            inside = asyncio.create_task(work("on", 4))  # begins with the value where it was made, and keeps that
            await asyncio.sleep(0)
        assert switch.value() == "off"
        return list(await asyncio.gather(outside, inside, work("more", 3)))

    assert asyncio.run(together()) == [
        ["off", "on", "on", "off"],
        ["more", "on", "on", "on", "on", "more"],
        ["off", "more", "more", "more", "off"],
    ]


def test_use_backend_is_of_the_thread() -> None:
    with use_backend("torch"):
        assert "by use_backend" in choose("retile", torch.zeros(1)).reasons[0]
        assert "use_backend" not in in_a_thread(lambda: choose("retile", torch.zeros(1))).reasons[0]


FORK = """
import os, signal, threading
from dualview.switches import Switch

switch = Switch("switch", "off")
ready, done = threading.Event(), threading.Event()


def of_another_thread():
    with switch.holding("more"), HELD:
        ready.set()
        done.wait(60)


with WITHIN:
    thread = threading.Thread(target=of_another_thread)
    thread.start()
    ready.wait(60)
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # ends a child that hangs
        seen = [switch.value(), switch._of_process]
        with switch.holding("more"):
            seen += [switch.value(), switch._of_process]
        seen += [switch.value(), switch._of_process]
        os._exit(0 if seen == EXPECTED else 1)
    _, status = os.waitpid(child, 0)
    done.set()
    thread.join(60)
print(os.waitstatus_to_exitcode(status), switch.value(), switch._of_process)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("held", ["switch._lock", 'switch.holding("on")'])
@pytest.mark.parametrize("within, value", [('switch.holding("on")', "on"), ('Switch("other", 0).holding(1)', "off")])
def test_a_forked_child_has_the_blocks_of_its_thread_alone(held: str, within: str, value: str) -> None:
    """Also where another thread holds the lock at that moment, which nobody in the child would release."""
    expected = [value, value, "more", "more", value, value]
    code = FORK.replace("HELD", held).replace("WITHIN", within).replace("EXPECTED", repr(expected))
    run = run_fresh(code)
    assert run.stdout.split() == ["0", "off", "off"], run.stderr


# --- In what torch.compile compiles -----------------------------------------------------------------------------------


def test_no_graph_outlives_its_value(switch: Switch[str]) -> None:
    compiled = Compiled(lambda x: x + BONUS[switch.value()])
    seen = []
    for value in ("off", "on", "more", "on", "off", "more"):
        with ExitStack() as stack:
            if value != "off":
                stack.enter_context(switch.holding(value))
            seen.append((value, compiled()))
        seen.append(("off", compiled()))
    assert seen == [(value, BONUS[value]) for value, _ in seen]
    assert compiled.graphs == 3


def test_a_graph_of_a_block_is_not_used_outside(switch: Switch[str]) -> None:
    compiled = Compiled(lambda x: x + BONUS[switch.value()])
    with switch.holding("on"):
        assert compiled() == 1.0
    assert compiled() == 0.0


def test_a_graph_sees_the_block_that_any_thread_entered_last(switch: Switch[str]) -> None:
    """The one way in which graphs differ from eager code."""
    compiled = Compiled(lambda x: x + BONUS[switch.value()])
    with switch.holding("on"):
        assert in_a_thread(switch.value) == "off"
        assert in_a_thread(compiled) == 1.0

        def inner() -> float:
            with switch.holding("more"):
                return compiled()

        assert in_a_thread(inner) == 2.0
        assert compiled() == 1.0
    assert compiled() == 0.0


def blocks_inside(switch: Switch[str]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """A function that enters blocks, left in their order, by an error, and not at all."""

    def function(x: Tensor) -> tuple[Tensor, ...]:
        before = x + BONUS[switch.value()]
        with switch.holding("on"):
            on = x + BONUS[switch.value()]
            with switch.holding("more"):
                more = x + BONUS[switch.value()]
            again = x + BONUS[switch.value()]
        try:
            with switch.holding("more"):
                raise KeyError
        except KeyError:
            after = x + BONUS[switch.value()]
        return before, on, more, again, after

    return function


def test_a_block_of_eager_code_alone_compiles_nothing_anew(switch: Switch[str]) -> None:
    compiled = Compiled(lambda x: x + BONUS[switch.value()])
    assert compiled() == BONUS["off"]
    with switch.holding("on", traced=False):
        assert switch.value() == "on"
        assert in_a_thread(compiled) == BONUS["off"]
    assert switch.value() == "off"
    assert compiled.graphs == 1


def test_explain_leaves_the_graphs_of_other_threads_alone() -> None:
    seen: list[tuple[Any, str]] = []

    class Encoder(nn.Module):
        """Says what a graph that is traced meanwhile is told, and what this thread is."""

        def forward(self, x: Tensor) -> Tensor:
            seen.append((FULL._of_process, BACKEND._of_process[0]))
            return x.new_zeros(len(x), 2, 2, 4)

    explain(DualViewEncoder(Encoder(), DualPerspectiveEnhance.paper(4), tile=(4, 4), grid=(2, 2)))
    assert set(seen) == {(False, "auto")}


def test_blocks_inside_of_a_graph(switch: Switch[str]) -> None:
    compiled = Compiled(blocks_inside(switch))
    for value in ("off", "more", "off"):
        with switch.holding(value):
            assert compiled() == [BONUS[value], 1.0, 2.0, 1.0, BONUS[value]]
            assert switch.value() == value
    assert compiled.graphs == 2
    assert Compiled(lambda x: x + BONUS[switch.value()])() == 0.0


def test_a_graph_with_blocks_leaves_those_alone_that_begin_meanwhile(switch: Switch[str]) -> None:
    """As another thread may enter one while the graph runs."""
    blocks = ExitStack()
    compiled = Compiled(blocks_inside(switch), when_run=lambda: blocks.enter_context(switch.holding("more")))
    look = Compiled(lambda x: x + BONUS[switch.value()])
    with blocks:
        compiled()
        assert switch.value() == "more"
        assert look() == 2.0
    assert look() == 0.0


def test_a_block_with_a_graph_break(switch: Switch[str]) -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        with switch.holding("on"):
            first = x + BONUS[switch.value()]
            torch._dynamo.graph_break()
            second = x + BONUS[switch.value()]
        return first, second, x + BONUS[switch.value()]

    compiled = Compiled(function, fullgraph=False)
    for value in ("off", "more", "off"):
        with switch.holding(value):
            assert compiled() == [1.0, 1.0, BONUS[value]]
    assert switch.value() == "off"


class Looking(nn.Module):
    """Looks at a switch."""

    def __init__(self, switch: Switch[str]) -> None:
        super().__init__()
        self.look = lambda x: x + BONUS[switch.value()]

    def forward(self, x: Tensor) -> Tensor:
        return self.look(x)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_keeps_the_value(switch: Switch[str], strict: bool) -> None:
    with switch.holding("on"):
        program = torch.export.export(Looking(switch), (torch.zeros(()),), strict=strict)
    assert program.module()(torch.zeros(())).item() == 1.0


class Entering(Looking):
    """Looks at a switch within a block and after it."""

    def __init__(self, switch: Switch[str]) -> None:
        super().__init__(switch)
        self.block = lambda: switch.holding("on")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with self.block():
            inside = self.look(x)
        return inside, self.look(x)


class AskingForTorch(nn.Module):
    """A call that says by itself which backend runs."""

    def __init__(self) -> None:
        super().__init__()
        self.dem = DualPerspectiveEnhance.paper(8)

    def forward(self, local: Tensor, stride: Tensor) -> Tensor:
        return self.dem(local, stride, (2, 3), backend="torch")


def quietly_exported(module: nn.Module, *given: Tensor) -> Any:
    """What a strict exporter makes, which warns of everything that outlives the call."""
    with warnings.catch_warnings(action="error", category=UserWarning):
        return torch.export.export(module, given, strict=True).module()


def test_a_strict_exporter_has_nothing_to_warn_of(switch: Switch[str]) -> None:
    module, x = AskingForTorch(), torch.zeros(())
    tiles = torch.randn(2, 1, 6, 2, 2, 8)
    assert [out.item() for out in quietly_exported(Entering(switch), x)(x)] == [1.0, 0.0]
    torch.testing.assert_close(quietly_exported(module, *tiles)(*tiles), module(*tiles))


def test_a_trace_that_fails_within_a_block_leaves_nothing(switch: Switch[str]) -> None:
    def fails(x: Tensor) -> Tensor:
        with switch.holding("on"):
            torch._dynamo.graph_break()
            return x

    with pytest.raises(torch._dynamo.exc.Unsupported):
        Compiled(fails)()
    assert switch.value() == "off"
    assert Compiled(Looking(switch))() == BONUS["off"]


def test_a_block_within_a_checkpoint(switch: Switch[str]) -> None:
    def function(x: Tensor) -> Tensor:
        return checkpoint(Entering(switch), x, use_reentrant=False)

    assert Compiled(function)() == [1.0, 0.0]


# --- use_backend ------------------------------------------------------------------------------------------------------


def chosen_by(x: Tensor) -> Tensor:
    """1 where use_backend has asked for torch."""
    return x + float("use_backend" in choose("retile", x).reasons[0])


def test_a_graph_follows_use_backend() -> None:
    compiled = Compiled(chosen_by)
    assert compiled() == 0.0
    with use_backend("torch"):
        assert compiled() == 1.0
        with use_backend("auto"):
            assert compiled() == 0.0
    assert compiled() == 0.0
    inside_first = Compiled(lambda x: chosen_by(x) * 2)
    with use_backend("torch"):
        assert inside_first() == 2.0
    assert inside_first() == 0.0


def test_use_backend_inside_of_a_graph() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        with use_backend("torch"):
            inside = chosen_by(x)
        return inside, chosen_by(x)

    compiled = Compiled(function)
    assert compiled() == [1.0, 0.0]
    with use_backend("torch"):
        assert compiled() == [1.0, 1.0]
    assert compiled() == [1.0, 0.0]
    assert "use_backend" not in choose("retile", torch.zeros(1)).reasons[0]


def test_a_wrong_backend_is_refused_in_a_graph() -> None:
    def function(x: Tensor) -> Tensor:
        with use_backend("cuda"):
            return x + 1

    with pytest.raises(Exception, match="backend='cuda'"):
        torch.compile(function, backend="eager")(torch.zeros(()))


def test_the_environment_is_checked_at_import() -> None:
    code = """
        import os
        os.environ["DUALVIEW_BACKEND"] = "cuda"
        try:
            import dualview.kernels.dispatch
        except ValueError as error:
            print(error)
    """
    run = run_fresh(code)
    assert run.stdout.startswith("the environment variable DUALVIEW_BACKEND='cuda': must be"), run.stderr


def test_a_block_that_is_left_in_another_thread_is_over() -> None:
    """A generator may be closed wherever its last reference goes."""

    def held() -> Iterator[None]:
        with full_computation():
            yield

    generator = held()
    next(generator)
    assert not planning()
    thread = Thread(target=generator.close)
    thread.start()
    thread.join()
    assert planning()
