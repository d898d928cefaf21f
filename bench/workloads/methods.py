"""Every method with a fixed number of iterations: rounding decides nothing, so every machine runs the same waves."""

from __future__ import annotations

import math
from typing import Any

from srds_fast.solvers.chords import Chords
from srds_fast.solvers.collocation.nodes import FEWEST_NODES
from srds_fast.solvers.collocation.options import Collocation
from srds_fast.solvers.fixed_point.options import ParaDiGMS, ParaTAA

# no change falls below the first, every error is within the second
NEVER, ALWAYS = 1e-30, 1e30
SRDS_TWICE: dict[str, Any] = {"tolerance": NEVER, "method": "srds", "max_iterations": 2}


def fixed_methods(steps: int) -> dict[str, dict[str, Any]]:
    """Method -> settings of `srds_fast.compile` and `srds_fast.sample`, for so many steps.

    Iterations are about as many as half a grey level takes on the digits pipeline; windows slide as far as they can.
    """
    four: dict[str, Any] = {"tolerance": NEVER, "max_iterations": 4}
    blocks = max(1, round(math.sqrt(steps)))
    published = {"num_blocks": blocks, "coarse_solver": "ddim", "pipelined": False, "max_iterations": min(2, blocks)}
    window = min(10, max(1, steps // 3))
    return {
        "sequential": {"method": "sequential"},
        "srds, as published": SRDS_TWICE | published,
        "srds": SRDS_TWICE,
        "collocation": {**four, "method": Collocation(num_nodes=min(24, max(FEWEST_NODES, steps // 2)))},
        "parataa": {**four, "method": ParaTAA()},
        "paradigms": {"tolerance": NEVER, "method": ParaDiGMS(window=window, step_tolerance=ALWAYS)},
        "chords": {"tolerance": NEVER, "method": Chords()},
    }
