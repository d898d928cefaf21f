"""Checks of what a caller passes. Each raises InvalidArgument, and names the value. They need no torch."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

from ..errors import InvalidArgument, shown


def check_whole(name: str, value: object, low: int, high: int | None = None, *, optional: bool = False) -> None:
    """The value is a whole number from `low` to `high`. optional: or None."""
    if value is None and optional:
        return
    most = sys.maxsize if high is None else high
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= most:
        allowed = f"{low} or more" if high is None else f"{low} to {high}"
        raise InvalidArgument(
            f"{name} is {shown(value)}. It must be a whole number, {allowed}{', or None' * optional}."
        )


def check_positive(
    name: str, value: object, *, optional: bool = False, infinite: bool = False, word: str | None = None
) -> None:
    """The value is a number above 0. optional: or None; infinite: math.inf is allowed; word: or this word."""
    if (value is None and optional) or (isinstance(value, str) and value == word):
        return
    number = _number(value)
    if not number > 0 or (number == math.inf and not infinite):
        others = ", or None" * optional + ("" if word is None else f", or {word!r}")
        raise InvalidArgument(f"{name} is {shown(value)}. It must be a positive number{others}.")


def check_one_of(name: str, value: object, known: Sequence[str]) -> None:
    """The value is one of the known names."""
    if not isinstance(value, str) or value not in known:
        raise InvalidArgument(f"{name} is {shown(value)}. Known are {', '.join(known)}. Pass one of these.")


def check_number(name: str, value: object, low: float, high: float = math.inf, *, why: str = "") -> None:
    """The value is a finite number from `low` to `high`. why: a sentence that says what it is for."""
    number = _number(value)
    if not (low <= number <= high and number < math.inf):
        allowed = f"{low:g} or more" if high == math.inf else f"from {low:g} to {high:g}"
        raise InvalidArgument(f"{name} is {shown(value)}. {why}{' ' * bool(why)}It must be a number, {allowed}.")


def _number(value: object) -> float:
    """The value as a number; NaN if it is none, and infinite if it is a whole number that is too large for one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def check_switch(name: str, value: object) -> None:
    """The value is True or False."""
    if not isinstance(value, bool):
        raise InvalidArgument(f"{name} is {shown(value)}. It is a switch. Pass True or False.")
