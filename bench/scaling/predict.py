"""Predicted seconds of a call on G devices: the waves of the product's own programs, priced by its own formula.

A wave costs c(ceil(units / G)) and a gather, as the planner prices it where ranks share the rows, and what the host
does outside both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench.quality.contestants import CONTESTANTS
from srds_fast.planner import choose as choose_plans
from srds_fast.planner.choose import choose, until
from srds_fast.planner.plan import Plan
from srds_fast.planner.settings import Settings
from srds_fast.solvers.method import Stopping
from srds_fast.solvers.registry import SEQUENTIAL

from .models import Gather, Network

# what each method needs for half a grey level on the bundled digits pipeline
NEEDED = Path(__file__).parents[1] / "results" / "methods-digits.json"
BOUND = 0.5


class Way(NamedTuple):
    """A method with its setting, by the rows of its waves. plan, iteration: after which it stops."""

    name: str
    setting: str
    plan: Plan
    iteration: int

    def sharing(self, devices: int) -> int:
        """How many of these share its rows."""
        return 1 if self.plan.replicated else devices

    @property
    def steps(self) -> int:
        return self.plan.num_inference_steps

    @property
    def widths(self) -> list[int]:
        return until(self.plan, self.iteration).widths(self.iteration)


def ways(steps: int) -> tuple[list[Way], list[str]]:
    """The sequential loop and every method at the cheapest setting that is near enough; and who is left out, and why.

    Iterations are those that the digits pipeline needs, see `bench.quality.methods`.
    """
    found = [Way(SEQUENTIAL, "", choose(steps, Settings(method=SEQUENTIAL)), 1)]
    left_out = []
    for each in json.loads(NEEDED.read_text())["found"]:
        if each["steps"] != steps or not CONTESTANTS[each["method"]].peer:
            continue
        point = next((point for point in each["points"] if point["difference"] <= BOUND), None)
        made = None if point is None else _way(each["method"], steps, point)
        if made is None:
            left_out.append(
                f"{each['method']}: {'not near enough' if point is None else 'its window slides by values'}"
            )
        else:
            found.append(made)
    return found, left_out


def _way(method: str, steps: int, point: dict[str, Any]) -> Way | None:
    iteration = point["iteration"]
    plan = CONTESTANTS[method].plan(steps, point["tolerance"], iteration)
    if plan.slides:
        return None
    if iteration is None:  # it stops itself: after the iteration whose waves are nearest to those of the mean sample
        program = plan.program()
        every = range(plan.options.first_iteration, plan.max_iterations + 1)
        iteration = min(every, key=lambda each: abs(program.spent(each).waves - point["waves"]))
    return Way(method, point["setting"], plan, iteration)


def candidates(steps: int, devices: int) -> Iterator[Way]:
    """What `auto` would compare, each stopping where runs are expected to with any network."""
    found = [*choose_plans.candidates(steps, Settings(), False, ranks=devices)]
    if devices > 1:
        found += choose_plans.replicated(steps, Settings(), False)
    for plan in found:
        stopping = Stopping.of(plan.options, steps, plan.max_iterations, plan.tolerance, stochastic=False)
        expected = sorted(plan.options.expected_iterations(stopping)) or [plan.max_iterations]
        yield Way(plan.short(), "", plan, expected[len(expected) // 2])


def seconds(way: Way, network: Network, devices: int, gather: Gather) -> float:
    """Predicted seconds of a run."""
    widths, sharing = way.widths, way.sharing(devices)
    curve = network.curve.shared(
        sharing, network.units, lambda units: gather(sharing, units * network.unit_bytes), max(widths)
    )
    outside = network.by_method.get(way.plan.method, network.outside)
    return sum(map(curve, widths)) + outside.seconds(widths)
