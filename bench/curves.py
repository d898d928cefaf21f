"""c(rows) as a curve: read from what bench/rows.py wrote, or measured; and what a run would take under it."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from srds_fast.planner.cost_curve import CostCurve

Call = Callable[[], object]


@dataclass(frozen=True)
class Curve:
    """What a network call costs by its rows.

    Attributes:
        name: for tables.
        cost: seconds of a call.
    """

    name: str
    cost: CostCurve

    def speed_up(self, steps: int, runs: Iterable[Sequence[int]]) -> float:
        """N calls of one row against what runs of these widths take in the mean."""
        return steps * self.cost(1) / statistics.mean(map(self.cost.of, runs))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {"name": self.name, "rows": self.cost.rows, "seconds": self.cost.seconds}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Curve:
        """What `to_dict` made, read from JSON."""
        return cls(found["name"], CostCurve(tuple(found["rows"]), tuple(found["seconds"])))


def read(path: Path) -> list[Curve]:
    """The curves in a file of bench/rows.py: replayed from a graph where they were, eager elsewhere."""
    return [
        Curve.from_dict(
            {**found, "name": f"{path.stem} {found['network']}", "seconds": found["replayed"] or found["eager"]}
        )
        for found in json.loads(path.read_text())["curves"]
    ]


@torch.no_grad()
def measure(name: str, call: Callable[[int], Call], rows: Sequence[int], repeat: int = 15) -> Curve:
    """Seconds of a call of each number of rows, taken in turn; the fastest is the one that was disturbed least.

    Args:
        call: rows -> a function that makes one call.
    """
    calls = [call(each) for each in rows]
    times: list[list[float]] = [[] for _ in rows]
    for each in calls:
        each()
    for _ in range(repeat):
        for each, of_each in zip(calls, times, strict=True):
            started = time.perf_counter()
            each()
            of_each.append(time.perf_counter() - started)
    return Curve(name, CostCurve(tuple(rows), tuple(map(min, times))))
