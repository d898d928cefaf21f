"""The methods by name.

A new method is its own file, and here its import, its entry in `REGISTERED` and its name in `__all__`, which is what
`srds_fast.methods` shows to users.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import InvalidArgument, shown
from .chords import Chords
from .collocation.options import Collocation
from .fixed_point.options import FixedPoint, ParaDiGMS, ParaTAA
from .method import Method
from .parasolver import ParaSolver
from .sequential import Sequential
from .speculative import Speculative
from .srds import FEWEST_STEPS, SRDS

# the order is that of lists and of the planner
REGISTERED: tuple[type[Method], ...] = (
    Sequential,
    SRDS,
    Collocation,
    ParaTAA,
    ParaDiGMS,
    Chords,
    ParaSolver,
    Speculative,
)
__all__ = [
    "METHODS",
    "SRDS",
    "Chords",
    "Collocation",
    "FixedPoint",
    "Method",
    "ParaDiGMS",
    "ParaSolver",
    "ParaTAA",
    "Sequential",
    "Speculative",
]

BY_NAME: dict[str, type[Method]] = {each.name: each for each in REGISTERED}
# the planner chooses
AUTO = "auto"
# the reference, and what a run falls back to
SEQUENTIAL = Sequential.name
# taken if costs are not known
DEFAULT = SRDS.name
METHODS: tuple[str, ...] = (AUTO, *BY_NAME)


def options_of(method: Any) -> Method | None:
    """Options of a method, given by its name or as options; None: the planner chooses."""
    if type(method) in REGISTERED:
        options: Method = method
        return options
    if isinstance(method, str) and method in METHODS:
        return None if method == AUTO else BY_NAME[method]()
    raise InvalidArgument(
        f"method is {shown(method)}. Known are {', '.join(METHODS)}, and the options in srds_fast.methods. "
        "Pass one of these."
    )


def requested(method: Any, keywords: Mapping[str, Any]) -> tuple[Method, ...]:
    """The methods that a call may run: one, or those that "auto" may choose from. keywords: shorthand for SRDS."""
    options, shorthand, default = options_of(method), SRDS(**keywords), SRDS()
    if options is None:
        # keywords narrow the choice to the method that takes them
        return tuple(each() for each in REGISTERED) if shorthand == default else (shorthand,)
    if method == SRDS.name:
        return (shorthand,)
    # the sequential sampler has no jumps and no iterations: it is what these two leave of SRDS
    ignored = ("coarse_solver", "pipelined") if isinstance(options, Sequential) else ()
    for name in keywords:
        if getattr(shorthand, name) != getattr(default, name) and name not in ignored:
            raise InvalidArgument(
                f"{name} was given together with method={shown(method)}. This keyword is shorthand for method='srds'. "
                "Leave one of the two out."
            )
    return (options,)


def unmeasured(num_steps: int, choice: tuple[Method, ...]) -> Method:
    """The method that "auto" takes if costs are not known. choice: as `requested` gave it."""
    if num_steps < FEWEST_STEPS:
        return Sequential()
    return next(each for each in choice if each.name == DEFAULT)


def check_warm_start_method(options: Method | None) -> None:
    """Raise InvalidArgument if a method cannot begin with a trajectory. options: None if the planner chooses."""
    if options is None or not options.takes_warm_start:
        *others, last = (repr(each.name) for each in REGISTERED if each.takes_warm_start)
        raise InvalidArgument(
            "warm_start was given. This method cannot start from a trajectory. "
            f"Pass method={', '.join(others)} or {last}."
        )


def check_warm_start(found: Any, shape: tuple[int, ...]) -> None:
    """Raise InvalidArgument if a trajectory does not have the shape of a call's, (N + 1, batch, ...)."""
    if (given := tuple(getattr(found, "shape", ()))) != shape:
        raise InvalidArgument(
            f"warm_start has shape {given}. It must be a trajectory of the same steps, {shape}: [steps + 1, batch, "
            "...]. Keep one with keep_trajectory=True."
        )
