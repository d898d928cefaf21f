"""The methods by name. A new method is one line in `REGISTERED`; the order is that of lists and of the planner."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..errors import InvalidArgument
from .chords.options import Chords
from .fixed_point.options import Collocation, ParaDiGMS, ParaTAA
from .method import Method
from .parasolver import ParaSolver
from .sequential import Sequential
from .srds import FEWEST_STEPS, SRDS

REGISTERED: tuple[type[Method], ...] = (
    Sequential,
    SRDS,
    Collocation,
    ParaTAA,
    ParaDiGMS,
    Chords,
    ParaSolver,
)
BY_NAME: dict[str, type[Method]] = {each.name: each for each in REGISTERED}
# the planner chooses
AUTO = "auto"
# the reference, and what a run falls back to
SEQUENTIAL = Sequential.name
# taken where costs are not known
DEFAULT = SRDS.name
METHODS: tuple[str, ...] = (AUTO, *BY_NAME)
WARM_START = tuple(each.name for each in REGISTERED if each.takes_warm_start)


def options_of(method: Any) -> Method | None:
    """Options of a method, given by its name or as options; None: the planner chooses.

    Raises:
        InvalidArgument: there is no such method.
    """
    if type(method) in REGISTERED:
        options: Method = method
        return options
    if isinstance(method, str) and method in BY_NAME:
        return BY_NAME[method]()
    if isinstance(method, str) and method == AUTO:
        return None
    raise InvalidArgument(
        f"method is {method!r}. Known are {', '.join(METHODS)}, and the options in srds_fast.methods. "
        "Pass one of these."
    )


def requested(method: Any, keywords: Mapping[str, Any]) -> tuple[Method, ...]:
    """The methods that a call may run: one, or those that "auto" may choose from.

    Args:
        method: name or options.
        keywords: num_blocks, coarse_solver, pipelined and in_flight, as given to the call: shorthand for SRDS.

    Raises:
        InvalidArgument: there is no such method, a keyword is out of its range, or the two do not go together.
    """
    options, shorthand = options_of(method), SRDS(**keywords)
    if options is None:
        # keywords narrow the choice to the method that takes them
        return tuple(each() for each in REGISTERED) if shorthand == SRDS() else (shorthand,)
    if method == SRDS.name:
        return (shorthand,)
    _refuse_keywords(shorthand, options)
    return (options,)


def _refuse_keywords(shorthand: SRDS, options: Method) -> None:
    """Raise InvalidArgument where keywords that are shorthand for SRDS were given beside other options."""
    if isinstance(options, SRDS):
        if shorthand != SRDS():
            raise InvalidArgument(
                "num_blocks, coarse_solver, pipelined or in_flight was given together with the options of SRDS. These "
                "keywords are shorthand for them. Leave one of the two out."
            )
        return
    beside = f"method={options.name!r}"
    if shorthand.num_blocks is not None:
        raise InvalidArgument(
            f"num_blocks was given together with {beside}. Only SRDS cuts its steps into blocks. "
            "Leave one of the two out."
        )
    jumps = shorthand.coarse_solver != "auto" or not shorthand.pipelined
    if jumps and not isinstance(options, Sequential):
        raise InvalidArgument(
            f"coarse_solver or pipelined was given together with {beside}. Only SRDS has coarse jumps and "
            "iterations that overlap. Leave it out."
        )
    if shorthand.in_flight is not None:
        shorthand.refuse_in_flight(beside)


def unmeasured(num_steps: int, choice: tuple[Method, ...]) -> Method:
    """The method that "auto" takes where costs are not known. choice: as `requested` gave it."""
    if num_steps < FEWEST_STEPS:
        return Sequential()
    return next(each for each in choice if each.name == DEFAULT)


def check_warm_start_method(options: Method | None) -> None:
    """Raise InvalidArgument where a method cannot begin with a trajectory. options: None if the planner chooses."""
    if options is None or not options.takes_warm_start:
        *others, last = (repr(name) for name in WARM_START)
        raise InvalidArgument(
            "warm_start was given to a method that does not refine all points at once. It could not begin with them. "
            f"Pass method={', '.join(others)} or {last}."
        )


def check_warm_start(found: Any, shape: tuple[int, ...]) -> None:
    """Raise InvalidArgument where a trajectory is no first guess for a call. shape: (N + 1, batch, ...)."""
    if tuple(getattr(found, "shape", ())) != shape:
        raise InvalidArgument(
            f"warm_start has shape {tuple(getattr(found, 'shape', ()))}. It must be a trajectory of the same steps, "
            f"{shape}: [steps + 1, batch, ...]. Keep one with keep_trajectory=True."
        )


def from_dict(method: Any, found: Any) -> Method:
    """What `Method.to_dict` wrote. method: its name.

    Raises:
        ValueError: it wrote no such thing.
    """
    cls = BY_NAME.get(method)
    if cls is None or not isinstance(found, dict) or set(found) != {field.name for field in fields(cls)}:
        raise ValueError(f"no options of {method}")
    return cls(
        **{
            name: math.inf if value == "inf" else tuple(value) if isinstance(value, list) else value
            for name, value in found.items()
        }
    )
