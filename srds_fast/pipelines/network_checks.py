"""Whether a network is a function of its row, checked once per kind of call.

Waves call a network for other rows, in another order and less often than the pipeline's own loop does. A network that
looks across its batch (attention between images), counts its calls or keeps something from one call for the next (a
cache between steps) would give another image without an error. Such a call runs on the pipeline's own loop.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..engine.merging.rounding import distance
from ..engine.merging.rule import flatten
from .hooks import KNOWN, acting_hooks, code_of_hook, package_of
from .module_state import ModuleState


class Checked(NamedTuple):
    """What a check found."""

    reason: str | None  # why rows cannot be merged, a clause; None: nothing speaks against it
    calls: int  # network calls that it made
    seconds: float


TWO_ANSWERS = "its network gave two answers to the same call: it draws random numbers, or counts its calls"
CHANGES = "a call of its network changes what a part of it holds ({})"
NO_CHECK = Checked(None, 0, 0.0)


def parts_that_decide(networks: Iterable[nn.Module]) -> Hashable:
    """What a user may replace in networks, or hang on them: a check is valid for these."""
    found: list[Any] = []
    waiting: list[nn.Module | None] = list(networks)
    while waiting:  # every call asks, and this takes a third of the time of `modules()`
        if (module := waiting.pop()) is not None:
            state = module.__dict__
            found += (type(module), state.get("forward"), state.get("processor"))
            if state["_forward_hooks"] or state["_forward_pre_hooks"]:
                found += map(code_of_hook, acting_hooks(module))
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
    before = ModuleState([network])
    again = calls[0]()
    if (changed := before.changed()) is not None:
        return CHANGES.format(changed)
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
                if (package := package_of(code)) not in KNOWN:
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
    yield from (("a hook", each) for each in acting_hooks(module))
