"""Methods by name, and what of each can be chosen."""

from __future__ import annotations

import math
from dataclasses import asdict, fields
from typing import Any

from ..errors import InvalidArgument
from .chords.options import Chords
from .fixed_point.options import Collocation, FixedPoint, ParaDiGMS, ParaTAA

Options = Collocation | ParaTAA | ParaDiGMS | Chords
OPTIONS: dict[str, type[Any]] = {each.name: each for each in (Collocation, ParaTAA, ParaDiGMS, Chords)}
WITHOUT_OPTIONS = ("sequential", "srds")
METHODS: tuple[str, ...] = ("auto", *WITHOUT_OPTIONS, *OPTIONS)


def options_of(method: Any) -> tuple[str, Options | None]:
    """Name and options of a method, given as either.

    Raises:
        InvalidArgument: there is no such method.
    """
    if type(method) in OPTIONS.values():
        return method.name, method
    if isinstance(method, str) and method in OPTIONS:
        return method, OPTIONS[method]()
    if isinstance(method, str) and method in METHODS:
        return method, None
    raise InvalidArgument(
        f"method is {method!r}. Known are {', '.join(METHODS)}, and the options in srds_fast.methods. "
        "Pass one of these."
    )


def check_warm_start_method(options: Options | None) -> None:
    """Raise InvalidArgument where a method cannot begin with a trajectory."""
    if not isinstance(options, FixedPoint):
        raise InvalidArgument(
            "warm_start was given to a method that does not refine all points at once. It could not begin with them. "
            "Pass method='collocation', 'parataa' or 'paradigms'."
        )


def check_warm_start(found: Any, shape: tuple[int, ...]) -> None:
    """Raise InvalidArgument where a trajectory is no first guess for a call. shape: (N + 1, batch, ...)."""
    if tuple(getattr(found, "shape", ())) != shape:
        raise InvalidArgument(
            f"warm_start has shape {tuple(getattr(found, 'shape', ()))}. It must be a trajectory of the same steps, "
            f"{shape}: [steps + 1, batch, ...]. Keep one with keep_trajectory=True."
        )


def to_dict(options: Options | None) -> dict[str, Any] | None:
    """Options as plain JSON types; infinite numbers by name."""
    if options is None:
        return None
    return {name: str(value) if value == math.inf else value for name, value in asdict(options).items()}


def from_dict(method: str, found: Any) -> Options | None:
    """What `to_dict` wrote.

    Raises:
        ValueError: it wrote no such thing.
    """
    if method in WITHOUT_OPTIONS:
        if found is not None:
            raise ValueError(f"{method} has no options")
        return None
    cls = OPTIONS.get(method)
    if cls is None or not isinstance(found, dict) or set(found) != {field.name for field in fields(cls)}:
        raise ValueError(f"no options of {method}")
    options: Options = cls(
        **{
            name: math.inf if value == "inf" else tuple(value) if isinstance(value, list) else value
            for name, value in found.items()
        }
    )
    return options
