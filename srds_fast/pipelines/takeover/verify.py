"""Whether an inferred takeover gives what turns of the loop give, before it is trusted."""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from ..lockstep.rehearsal import Passes
from ..lockstep.turns import Ran, Turn
from ..merging.rounding import distance
from .network import RecordedNetwork


def differs(network: RecordedNetwork, passes: Passes, first: Ran, m: Tensor) -> Generator[Turn, Ran, bool]:
    """Compare rows of the first and the last step, made in one wave, with turns of the loop itself.

    first: the loop's first turn; m: its guided output, of the network if the turn was live.
    """
    last = network.noise.num_steps - 1
    states, expected = [first.x], [m]
    if not first.turn.live:
        expected = [(yield from passes.turn(Turn(0, first.x, live=True))).m.clone()]
    ran = yield from passes.turn(Turn(last, 3 * first.x.flip(0), live=True))
    states.append(ran.x.clone())
    expected.append(ran.m)
    assert network.turn.weights is not None
    bound = float(network.turn.weights.abs().sum())  # a weighted sum also adds up the rounding of its terms
    try:
        found = network.guided([0, last], states)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AssertionError):
        return True
    return distance(found.to(m.dtype).flatten(0, 1), torch.cat(expected)) > max(1.0, bound)
