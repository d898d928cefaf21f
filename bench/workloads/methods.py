"""Every method with a fixed number of iterations: rounding decides nothing, so every machine runs the same waves."""

from __future__ import annotations

import math
from typing import Any

from srds_fast.solvers.chords import Chords
from srds_fast.solvers.fixed_point.options import Collocation, ParaDiGMS, ParaTAA
from srds_fast.solvers.fixed_point.program import FEWEST_NODES

# no change falls below the first, every error is within the second
NEVER, ALWAYS = 1e-30, 1e30


def fixed_methods(steps: int) -> dict[str, dict[str, Any]]:
    """Method -> settings of `srds_fast.compile` and `srds_fast.sample`, for so many steps.

    Iterations are about as many as half a grey level takes on the digits pipeline; windows slide as far as they can.
    """
    few = {"tolerance": NEVER}
    blocks = max(1, round(math.sqrt(steps)))
    published = {"num_blocks": blocks, "coarse_solver": "ddim", "pipelined": False, "max_iterations": min(2, blocks)}
    return {
        "sequential": {"method": "sequential"},
        "srds, as published": {**few, "method": "srds", **published},
        "srds": {**few, "method": "srds", "max_iterations": 2},
        "collocation": {
            **few,
            "method": Collocation(num_nodes=min(24, max(FEWEST_NODES, steps // 2))),
            "max_iterations": 4,
        },
        "parataa": {**few, "method": ParaTAA(), "max_iterations": 4},
        "paradigms": {**few, "method": ParaDiGMS(window=min(10, max(1, steps // 3)), step_tolerance=ALWAYS)},
        "chords": {**few, "method": Chords()},
    }
