"""Settings: what a user asks for, checked."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import InvalidArgument
from ..schedulers.table import NoiseTable
from ..solvers.checks import check_number, check_one_of, check_switch, check_whole
from ..solvers.method import SAME_LAW, Method, Target
from ..solvers.registry import AUTO, requested

ENGINES: tuple[str, ...] = ("auto", "eager", "graph", "network-graphs")
GRAPH_ENGINES = ENGINES[2:]
LATENCIES = ("adaptive", "constant")
# what the planner keeps of the sequential sampler where it has the choice
SAME = SAMPLE, LAW = "sample", "law"
# beyond this a number of steps is a mistake: schedulers would allocate, programs would be built, for hours
MOST_STEPS = 10_000
TOLERANCE = "It bounds a mean absolute error: 4e-3 is half a grey level of 256; 0 means to run until nothing changes."
EXPLORE = "It is the time for timing other plans, counted in sequential calls; 0 means to rely on predictions."


@dataclass(frozen=True)
class Settings:
    """What a user asks for, see `compile`, checked; `choose` turns it into a plan for one number of steps."""

    method: str | Method = AUTO
    tolerance: float = 4e-3
    exact: bool = False
    num_blocks: int | None = None
    max_iterations: int | None = None
    coarse_solver: str = "auto"
    pipelined: bool = True
    max_rows: int | None = None
    engine: str = "auto"
    in_flight: int | None = None
    explore: float = 3.0
    latency: str = "adaptive"
    same: str = SAMPLE

    def __post_init__(self) -> None:
        choice = self.methods
        object.__setattr__(self, "engine", engine_name(self.engine))
        check_one_of("engine", self.engine, ENGINES)
        check_one_of("latency", self.latency, LATENCIES)
        check_one_of("same", self.same, SAME)
        check_switch("exact", self.exact)
        check_number("tolerance", self.tolerance, 0, why=TOLERANCE)
        check_number("explore", self.explore, 0, why=EXPLORE)
        if self.latency == "constant" and (self.exact or self.tolerance == 0):
            raise InvalidArgument(
                "latency='constant' was given together with exact=True or tolerance=0. Such runs end when nothing "
                "changes any more, and how many waves that takes is not known before. Leave one of the two out."
            )
        if self.exact and self.max_iterations is not None:
            raise InvalidArgument(
                f"exact=True was given together with max_iterations={self.max_iterations}. An exact run takes as many "
                "iterations as it has blocks. Leave one of the two out."
            )
        check_whole("max_iterations", self.max_iterations, 0, optional=True)
        check_whole("max_rows", self.max_rows, 1, optional=True)
        if len(choice) == 1:
            choice[0].check(self.target(0))

    @property
    def methods(self) -> tuple[Method, ...]:
        """The methods that a call may run, with their options; one where the planner has no choice."""
        keywords = {name: getattr(self, name) for name in ("num_blocks", "coarse_solver", "pipelined", "in_flight")}
        return requested(self.method, keywords)

    def target(self, num_steps: int, *, stochastic: bool = False, ranks: int = 1) -> Target:
        """What a call of N steps asks for. stochastic: whether steps add noise. ranks: that share each wave's rows."""
        return Target(
            num_steps,
            float(self.tolerance),
            self.exact,
            self.max_iterations,
            stochastic,
            ranks=ranks,
            same_law=self.same == LAW,
        )

    def fitting(self, noise: NoiseTable) -> Settings:
        """The same for a call with these steps: a method that cannot run them is not among those to choose from."""
        others = [each for each in self.methods if each.promise == SAME_LAW and each.why_not(noise) is not None]
        return replace(self, same=SAMPLE) if self.same == LAW and others else self

    @property
    def measures(self) -> bool:
        """Whether the plan is chosen by measured costs."""
        return self.method == AUTO and self.max_iterations != 0


def engine_name(name: str) -> str:
    """The current name of an engine: "wave-graphs" is the old name of "network-graphs"."""
    return "network-graphs" if isinstance(name, str) and name == "wave-graphs" else name
