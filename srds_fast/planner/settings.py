"""Settings: what a user asks for, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import InvalidArgument
from ..schedulers.steps import COARSE_SOLVERS
from ..solvers.method import Options, options_of

ENGINES: tuple[str, ...] = ("auto", "eager", "graph", "network-graphs")
GRAPH_ENGINES = ENGINES[2:]
# beyond this a number of steps is a mistake: schedulers would allocate, programs would be built, for hours
MOST_STEPS = 10_000


@dataclass(frozen=True)
class Settings:
    """What a user asks for; `choose` turns it into a plan for one number of steps. See `compile` for the meaning.

    Raises:
        InvalidArgument: a value is out of its range or of no known name.
    """

    method: str | Options = "auto"
    tolerance: float = 4e-3
    exact: bool = False
    num_blocks: int | None = None
    max_iterations: int | None = None
    coarse_solver: str = "auto"
    pipelined: bool = True
    max_rows: int | None = None
    engine: str = "auto"
    in_flight: int | None = None

    def __post_init__(self) -> None:
        name, _ = options_of(self.method)
        if self.num_blocks is not None and name not in ("srds", "auto"):
            raise InvalidArgument(
                f"num_blocks was given together with method={name!r}. Only SRDS cuts its steps into blocks. "
                "Leave one of the two out."
            )
        _one_of("coarse_solver", self.coarse_solver, ("auto", *COARSE_SOLVERS))
        if name not in ("srds", "auto", "sequential") and (self.coarse_solver != "auto" or not self.pipelined):
            raise InvalidArgument(
                f"coarse_solver or pipelined was given together with method={name!r}. Only SRDS has coarse jumps and "
                "iterations that overlap. Leave it out."
            )
        if self.in_flight is not None and (name not in ("srds", "auto") or not self.pipelined or self.exact):
            beside = (
                f"method={name!r}" if name not in ("srds", "auto") else "exact=True" if self.exact else "no pipelining"
            )
            raise InvalidArgument(
                f"in_flight={self.in_flight!r} was given together with {beside}. It holds back iterations of SRDS that "
                "overlap, as those before may be enough. Leave it out."
            )
        _, options = options_of(self.method)
        if getattr(options, "window", None) is not None and self.max_iterations is not None:
            raise InvalidArgument(
                f"max_iterations was given together with a window of {name}. Its window slides until the last step has "
                "settled. Leave it out, or give the method no window."
            )
        object.__setattr__(self, "engine", engine_name(self.engine))
        _one_of("engine", self.engine, ENGINES)
        if not isinstance(self.tolerance, int | float) or not 0 <= self.tolerance < math.inf:
            raise InvalidArgument(
                f"tolerance is {self.tolerance!r}. It bounds a mean absolute error, so it is a number of 0 or more. "
                "Pass 0 to run until nothing moves, or leave it at 4e-3 (half a grey level)."
            )
        if self.exact and self.max_iterations is not None:
            raise InvalidArgument(
                f"exact=True was given together with max_iterations={self.max_iterations}. An exact run takes as many "
                "iterations as it has blocks. Leave one of the two out."
            )
        for name, low in (("num_blocks", 1), ("max_iterations", 0), ("max_rows", 1), ("in_flight", 1)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
                raise InvalidArgument(f"{name} is {value!r}. It must be a whole number, {low} or more, or None.")

    @property
    def measures(self) -> bool:
        """Whether the plan is to be chosen by what calls cost."""
        return self.method == "auto" and self.max_iterations != 0


def engine_name(name: str) -> str:
    """The name of an engine, given one of its names: "wave-graphs" is what "network-graphs" was called before."""
    return "network-graphs" if name == "wave-graphs" else name


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InvalidArgument(f"{name} is {value!r}. Known are {', '.join(known)}. Pass one of these.")
