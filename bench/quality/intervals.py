"""Shares of trials that succeeded, and of two of them how far they are apart: intervals of 95 %."""

from __future__ import annotations

import math

Z = 1.96


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The interval of a share, Wilson's."""
    share = successes / trials
    middle = share + Z**2 / (2 * trials)
    half = Z * math.sqrt(share * (1 - share) / trials + Z**2 / (4 * trials**2))
    return (middle - half) / (1 + Z**2 / trials), (middle + half) / (1 + Z**2 / trials)


def apart(successes: tuple[int, int], trials: tuple[int, int]) -> tuple[float, float]:
    """The interval of the first share less the second, Newcombe's (1998, his tenth), for independent trials."""
    first, second = (done / count for done, count in zip(successes, trials, strict=True))
    (lower, upper), (low, high) = (wilson(done, count) for done, count in zip(successes, trials, strict=True))
    off = first - second
    return off - math.hypot(first - lower, high - second), off + math.hypot(upper - first, second - low)


def percent(interval: tuple[float, float], signed: bool = False) -> str:
    """An interval of shares as text."""
    lower, upper = (f"{100 * each:{'+' if signed else ''}.1f}" for each in interval)
    return f"{lower} to {upper}"
