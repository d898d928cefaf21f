"""Whether a network is a function of its row, checked once per kind of call.

Waves call a network for other rows, in another order and less often than the pipeline's own loop does. A network that
looks across its batch (attention between images), counts its calls or keeps something from one call for the next (a
cache between steps) would give another image without an error. Such a call runs on the pipeline's own loop.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import CellType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..engine.eager import Evaluator
from ..engine.graphs.cache_key import leaves_of_module
from ..kernels.wave_update import NetworkInput
from ..solvers.contract import Evaluate
from ..solvers.program import Boundary, Program, Row, Wave
from .merging.rounding import distance
from .merging.rule import flatten

# packages whose networks keep nothing between calls, unless an attribute of a module shows it
KNOWN = ("torch", "diffusers", "transformers", "accelerate", "peft", "xformers", "srds_fast")


class Checked(NamedTuple):
    """What a check found."""

    reason: str | None  # why rows cannot be merged, a clause; None: nothing speaks against it
    calls: int  # network calls that it made
    seconds: float


TWO_ANSWERS = "its network gave two answers to the same call: it draws random numbers, or counts its calls"
NO_CHECK = Checked(None, 0, 0.0)


def parts_that_decide(networks: Iterable[nn.Module]) -> Hashable:
    """What a user may replace in networks: a check is valid for these."""
    found: list[Any] = []
    waiting: list[nn.Module | None] = list(networks)
    while waiting:  # every call asks, and this takes a third of the time of `modules()`
        if (module := waiting.pop()) is not None:
            state = module.__dict__
            found += (type(module), state.get("forward"), state.get("processor"))
            waiting += state["_modules"].values()
    return tuple(found)


@torch.no_grad()
def check_rows(
    evaluator: Callable[[Program], Evaluator],
    num_steps: int,
    state: Tensor,
    given: NetworkInput,
    networks: Sequence[nn.Module],
    *,
    merged: bool = True,
) -> Checked | None:
    """Call the networks of a loop for two rows, alone and merged, and look at what that changes.

    Where foreign code stands in a network, its answers to rows of all steps, one by one, are also compared with those
    in another order: 2 N more calls.

    Args:
        evaluator: makes the evaluator of a program; see `sampling.session.Network`.
        num_steps: N.
        state: starting noise, [batch, ...].
        given: the format of the network's input.
        networks: all networks that are called.
        merged: whether waves of several rows are made at all.

    Returns:
        what was found. None: the network gave NaN or Inf, or two rows did not fit into memory, as the run will find.
    """
    begun = time.perf_counter()
    last = num_steps - 1
    foreign = foreign_code(networks)
    steps = range(num_steps) if foreign is not None else ()
    # as in a run, the first wave has one row and the second more: torch.compile looks at offsets in storage, too
    positions = [(0,), (0, last), (last,), *((step,) for step in steps)]
    evaluate = evaluator(rows_at(num_steps, positions))
    draw = torch.Generator().manual_seed(0)
    # companions are unlike the row, and larger: what leaks from them then exceeds the rounding of half precision
    other = 3 * torch.randn(state.shape, generator=draw).to(state)
    calls = 0

    def answers(number: int, *states: Tensor) -> Tensor:
        """[branches, rows, samples, ...]"""
        nonlocal calls
        calls += 1
        x = given.empty(len(states), state)
        x.unflatten(0, (given.branches, -1)).copy_(torch.stack(states))
        m = evaluate(Evaluate(x, positions[number], tuple(range(len(state))), number))
        by_row: Tensor = m.unflatten(0, (-1, len(states)))
        return by_row

    def reason() -> str | None:
        first, second = answers(0, state), answers(2, other)
        if not bool(first.isfinite().all() and second.isfinite().all()):
            raise FloatingPointError
        if merged:
            together, alone = answers(1, state, other), torch.cat((first, second), 1)
            if distance(together.flatten(0, 2), alone.flatten(0, 2)) > 1:
                return "the output of its network for a row depends on the other rows of the call"
        before = _Held(networks)
        again = answers(0, state)
        if (changed := before.changed()) is not None:
            return f"a call of its network changes what a part of it holds ({changed})"
        if distance(again.flatten(0, 2), first.flatten(0, 2)) > 1:
            return "its network gave two answers to the same call: it draws random numbers, or counts its calls"
        if foreign is not None:
            forward = [answers(3 + step, state) for step in steps]
            # a counter with a period may give the same answers in the reverse order
            for step in torch.randperm(num_steps, generator=draw).tolist():
                if distance(answers(3 + step, state).flatten(0, 2), forward[step].flatten(0, 2)) > 1:
                    return f"its network answers calls in another order differently ({foreign})"
        return None

    with _undone(networks):
        try:
            found = reason()
        except FloatingPointError:
            return None
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AssertionError) as why:
            if isinstance(why, torch.OutOfMemoryError):
                return None
            found = f"its network cannot be called for two rows at once ({type(why).__name__}: {why})"
    evaluate.forget()
    return Checked(found, calls, time.perf_counter() - begun)


def check_answers(calls: Sequence[Callable[[], Any]], network: nn.Module) -> str | None:
    """Why a network is no function of its arguments, a clause; None: nothing speaks against it.

    calls: of the network, for rows at different steps, in the order of the steps; at all steps where foreign code
    stands in the network.
    """

    def apart(one: Any, other: Any) -> bool:
        return max(map(distance, flatten(one)[0], flatten(other)[0]), default=0.0) > 1

    first = calls[0]()
    before = _Held([network])
    again = calls[0]()
    if (changed := before.changed()) is not None:
        return f"a call of its network changes what a part of it holds ({changed})"
    if apart(first, again):
        return TWO_ANSWERS
    if (foreign := foreign_code([network])) is not None:
        forward = [call() for call in calls]
        # a counter with a period may give the same answers in the reverse order
        for number in torch.randperm(len(calls), generator=torch.Generator().manual_seed(0)).tolist():
            if apart(calls[number](), forward[number]):
                return f"its network answers calls in another order differently ({foreign})"
    return None


def foreign_code(networks: Iterable[nn.Module]) -> str | None:
    """The first part of the networks that runs code from a package that is not known, with where that is from."""
    for network in networks:
        for name, module in network.named_modules():
            for what, code in _code_of(module):
                package = str(getattr(code, "__module__", None) or type(code).__module__).partition(".")[0]
                if package not in KNOWN:
                    return f"{what} of {name or type(module).__name__} is from {package}"
    return None


def _code_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    state = module.__dict__
    yield "the class", type(module)
    if (forward := state.get("forward")) is not None:
        # accelerate and diffusers wrap with functools.wraps or partial, which name the code that they wrap
        yield "a replaced forward", getattr(getattr(forward, "func", forward), "__wrapped__", forward)
        yield "a replaced forward", getattr(forward, "func", forward)
    if (processor := state.get("processor")) is not None:
        yield "the attention processor", type(processor)


def _moves_weights(module: nn.Module) -> bool:
    """Whether hooks for offloading, of accelerate or diffusers, move what the module holds in every call."""
    return "_hf_hook" in module.__dict__ or "_diffusers_hook" in module.__dict__


class _Held:
    """What the modules of some networks hold: numbers and switches by value, tensors and objects by identity."""

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        self._networks = tuple(networks)
        self._before = dict(self._parts())

    def changed(self) -> str | None:
        """The name of a part that holds something else than before, or None."""
        after = dict(self._parts())
        if after.keys() != self._before.keys():
            return "its modules"
        return next((name for name, held in after.items() if not _equal(held, self._before[name])), None)

    def _parts(self) -> Iterator[tuple[str, list[Any]]]:
        for network in self._networks:
            for name, module in network.named_modules():
                if _moves_weights(module):
                    continue
                leaves = leaves_of_module(module)
                versions = [leaf._version for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_inference()]
                yield f"{type(network).__name__}.{name}".rstrip("."), [*leaves, *versions]


def _holds(value: Any, before: Any) -> bool:
    """Whether a dictionary or a list holds the same objects as its copy."""
    same_names = isinstance(value, list) or list(value) == list(before)
    now, then = (list(each) if isinstance(each, list) else list(each.values()) for each in (value, before))
    return same_names and len(now) == len(then) and all(map(operator.is_, now, then))


class Undo:
    """Gives modules, attention processors and functions in the place of `forward` back what they hold now.

    A network that counts its calls or keeps something from one for the next would otherwise begin the pipeline's own
    loop with what the calls of a check have left. Tensors that a call writes to in place stay as it leaves them.
    """

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        self._kept: list[tuple[Any, Any]] = []  # dictionaries and lists, each with a copy
        self._cells: list[tuple[CellType, Any]] = []
        for network in networks:
            for module in network.modules():
                if not _moves_weights(module):
                    self._keep(module)

    def _keep(self, module: nn.Module) -> None:
        held = [module.__dict__, getattr(module.__dict__.get("processor"), "__dict__", {})]
        values = [value for state in held for value in state.values()]
        for cell in getattr(module.__dict__.get("forward"), "__closure__", None) or ():
            with suppress(ValueError):  # the variable has no value yet
                self._cells.append((cell, cell.cell_contents))
                values.append(cell.cell_contents)
        self._kept += [(value, value.copy()) for value in (*held, *values) if type(value) in (dict, list)]

    def restore(self) -> None:
        for value, before in self._kept:
            if not _holds(value, before):  # compiled code also checks whether a dictionary was written to
                value.clear()
                value.extend(before) if isinstance(value, list) else value.update(before)
        for cell, content in self._cells:
            cell.cell_contents = content


@contextmanager
def _undone(networks: Iterable[nn.Module]) -> Iterator[None]:
    """In the end, networks hold what they hold now."""
    undo = Undo(networks)
    try:
        yield
    finally:
        undo.restore()


def _equal(one: list[Any], other: list[Any]) -> bool:
    if len(one) != len(other):
        return False
    return all(
        a is b or (not isinstance(a, Tensor | nn.Module) and type(a) is type(b) and a == b)
        for a, b in zip(one, other, strict=True)
    )


def rows_at(num_steps: int, positions: Sequence[tuple[int, ...]]) -> Program:
    """A program whose waves are rows at these steps."""
    waves = [
        Wave(tuple(Row(number, 0, step, step, coarse=False, fine=True) for step in steps), (Boundary(number, 1),))
        for number, steps in enumerate(positions)
    ]
    return Program(num_steps, (0, num_steps), len(waves), tuple(waves))
