"""Where the network is asked in every wave: a skeleton of nodes, and the other points once.

What is smooth along the grid the skeleton sees in every wave and carries to all points. What is rough from step to step
hardly changes between waves, so one visit of each other point is enough: the cover, in a few early waves. From
`FULL_FROM` on every point is asked. Only runs of small tolerances, exact runs and samples that moved far after the
cover was visited come there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ...caches import cached
from ..fixed_point.program import Sweeps, of_sweeps, sweep

FEWEST_NODES = 5
# the part of the grid behind this share of the steps has dense nodes: the network's output bends most there
DENSE_FROM = 0.88
# wave from which on all points are asked, counted from 0
FULL_FROM = 8


class Rule(NamedTuple):
    """Which points are nodes of the skeleton, and which waves visit the others.

    Attributes:
        body: nodes evenly spaced over what lies before the dense part.
        tail: in the dense part nodes lie (N - i) / tail apart, at least one step.
        waves: which visit an equal, interleaved share of the other points each. In later waves the states are better
            known, but what an early one finds can still be used by those after it.
    """

    body: int
    tail: float
    waves: tuple[int, ...]


FEW_STEPS, SHORT, LONG = 75, Rule(12, 6, (2, 3)), Rule(16, 8, (1, 2, 3))


def skeleton(num_steps: int, num_nodes: int | None = None) -> tuple[int, ...]:
    """Positions of the nodes that every wave has; num_nodes: about how many, None: as many as N asks for."""
    rule = _rule(num_steps)
    dense = _dense(num_steps, rule.tail if num_nodes is None else num_nodes / 3)
    body = rule.body if num_nodes is None else max(2, min(num_nodes, num_steps) - len(dense))
    return tuple(sorted({*dense, *(round(index * dense[-1] / body) for index in range(body))}))


def cover(num_steps: int, nodes: tuple[int, ...], every: int | None = 1) -> dict[int, tuple[int, ...]]:
    """By wave, the points besides the skeleton that it visits: all of them, every second and so on; None: none."""
    if every is None:
        return {}
    waves, others = _rule(num_steps).waves, sorted(set(range(num_steps)) - set(nodes))[every // 2 :: every]
    return {wave: tuple(others[share :: len(waves)]) for share, wave in enumerate(waves)}


@cached
def secant_sweeps(num_steps: int, num_iterations: int, num_nodes: int | None = None, every: int | None = 1) -> Sweeps:
    """The waves of collocation. Wave k begins at point k, which is exact then: N waves are the sequential sampler.

    Args:
        num_steps: N >= 1.
        num_iterations: waves, 1 to N.
        num_nodes: see `skeleton`.
        every: see `cover`.
    """
    nodes = skeleton(num_steps, num_nodes)
    others = cover(num_steps, nodes, every)

    def asked(number: int) -> Sequence[int]:
        if number >= FULL_FROM:
            return range(number, num_steps)
        return sorted({position for position in (number, *nodes, *others.get(number, ())) if position >= number})

    widths = [len(asked(number)) for number in range(num_iterations)]
    return of_sweeps(num_steps, widths, lambda number: sweep(number, asked(number)))


def _rule(num_steps: int) -> Rule:
    return SHORT if num_steps < FEW_STEPS else LONG


def _dense(num_steps: int, tail: float) -> list[int]:
    """Nodes from the last step back to `DENSE_FROM`, ever farther apart."""
    place = float(num_steps - 1)
    found = [num_steps - 1]
    while place > DENSE_FROM * num_steps:
        place -= max(1.0, (num_steps - place) / tail)
        found.append(round(place))
    return found
