"""Whether a network is a function of its row, checked once per kind of call.

Waves call a network for other rows, in another order and less often than the pipeline's own loop does. A network that
looks across its batch (attention between images), counts its calls or keeps something from one call for the next (a
cache between steps) would give another image without an error. Such a call runs on the pipeline's own loop.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from types import CellType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..engine.graphs.cache_key import leaves_of_module
from .merging.rounding import distance
from .merging.rule import flatten

# packages whose networks keep nothing between calls, unless an attribute of a module shows it
KNOWN = ("torch", "diffusers", "transformers", "accelerate", "peft", "xformers", "srds_fast")


# levels of dictionaries and lists in what a module holds, below which a check may leave changes
MOST_DEEP = 3


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


def check_answers(calls: Sequence[Callable[[], Any]], network: nn.Module) -> str | None:
    """Why a network is no function of its arguments, a clause; None: nothing speaks against it.

    calls: of the network, for rows at different steps, in the order of the steps; at all steps where foreign code
    stands in the network.
    """

    def apart(one: Any, other: Any) -> bool:
        return max(map(distance, flatten(one)[0], flatten(other)[0]), default=0.0) > 1

    first = calls[0]()
    before = Held([network])
    again = calls[0]()
    if (changed := before.changed()) is not None:
        return f"a call of its network changes what a part of it holds ({changed})"
    if apart(first, again):
        return TWO_ANSWERS
    return why_order_matters(calls, [network], apart)


def why_order_matters(
    calls: Sequence[Callable[[], Any]], networks: Sequence[nn.Module], apart: Callable[[Any, Any], bool]
) -> str | None:
    """Make calls in two orders, where foreign code stands in the networks. apart: whether two answers differ."""
    if (foreign := foreign_code(networks)) is None:
        return None
    forward = [call() for call in calls]
    # a counter with a period may give the same answers in the reverse order
    for number in torch.randperm(len(calls), generator=torch.Generator().manual_seed(0), device="cpu").tolist():
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


class Held:
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
    loop with what the calls of a check have left. Random generators begin where they are now, those of `generators`
    too. Tensors that a call writes to in place stay as it leaves them.
    """

    def __init__(self, networks: Iterable[nn.Module], generators: Iterable[torch.Generator] = ()) -> None:
        self._kept: list[tuple[Any, Any]] = []  # dictionaries and lists, each with a copy
        self._cells: list[tuple[CellType, Any]] = []
        self._random = {id(each): (each, each.get_state()) for each in generators}
        self._seen = set[int]()  # dictionaries and lists
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
        for value in (*held, *values):
            self._keep_value(value, MOST_DEEP)

    def _keep_value(self, value: Any, deep: int) -> None:
        """A generator, a dictionary or a list, and what is in these: patches of attention nest their options."""
        if isinstance(value, torch.Generator):
            self._random.setdefault(id(value), (value, value.get_state()))
        elif type(value) in (dict, list) and id(value) not in self._seen:
            self._seen.add(id(value))
            self._kept.append((value, value.copy()))
            if deep:
                for each in value.values() if isinstance(value, dict) else value:
                    self._keep_value(each, deep - 1)

    def restore(self) -> None:
        for value, before in self._kept:
            if not _holds(value, before):  # compiled code also checks whether a dictionary was written to
                value.clear()
                value.extend(before) if isinstance(value, list) else value.update(before)
        for cell, content in self._cells:
            cell.cell_contents = content
        for generator, state in self._random.values():
            generator.set_state(state)


def _equal(one: list[Any], other: list[Any]) -> bool:
    if len(one) != len(other):
        return False
    return all(
        a is b or (not isinstance(a, Tensor | nn.Module) and type(a) is type(b) and a == b)
        for a, b in zip(one, other, strict=True)
    )
