"""Plans: the choice of method, blocks, coarse solver and iterations for one number of steps."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, cast

from . import program
from .errors import InvalidArgument, PlanMismatch
from .methods import Chords, FixedPoint, Options, from_dict, options_of, to_dict
from .program import Program
from .steps import COARSE_SOLVERS, CoarseSolver

Method = Literal["sequential", "srds", "collocation", "parataa", "paradigms", "chords"]
ENGINES: tuple[str, ...] = ("auto", "eager", "graph", "wave-graphs")
GRAPH_ENGINES = ENGINES[2:]
# with fewer steps a second iteration already costs as many waves as the sequential sampler
FEWEST_STEPS_FOR_SRDS = 6
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

    def __post_init__(self) -> None:
        name, _ = options_of(self.method)
        if self.num_blocks is not None and name not in ("srds", "auto"):
            raise InvalidArgument(
                f"num_blocks was given together with method={name!r}. Only SRDS cuts its steps into blocks. Leave it out."
            )
        _one_of("coarse_solver", self.coarse_solver, ("auto", *COARSE_SOLVERS))
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
        for name, low in (("num_blocks", 1), ("max_iterations", 0), ("max_rows", 1)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
                raise InvalidArgument(f"{name} is {value!r}. It must be a whole number, {low} or more, or None.")


def refuse_beside(plan: Plan | None, settings: Settings, defaults: Settings) -> None:
    """Raise InvalidArgument where settings were given beside a plan, which fixes them all, or it is no plan."""
    if plan is not None and not isinstance(plan, Plan):
        raise InvalidArgument(
            f"plan is a {type(plan).__name__}. It must be a Plan. Pass one from plan_for or from srds_fast.Plan.load."
        )
    changed = [
        field.name for field in fields(Settings) if getattr(settings, field.name) != getattr(defaults, field.name)
    ]
    if plan is not None and changed:
        raise InvalidArgument(
            f"plan was given together with {', '.join(changed)}. A plan fixes every setting of a call. "
            "Leave one of the two out."
        )


@dataclass(frozen=True)
class Plan:
    """How one call will run. Print it to see waves and rows after each iteration.

    Attributes:
        method: its name, see `srds_fast.methods`.
        num_inference_steps: N.
        num_blocks: B (1 for the sequential method).
        max_iterations: iterations at most; the tolerance may stop the call earlier.
        coarse_solver: "ddim" or "2m".
        pipelined, max_rows, engine, tolerance, exact: as in `compile`.
        options: of the method, None for sequential and srds.
        calibrated: run max_iterations, whatever the change of the samples: so many were found to be enough.
    """

    method: Method
    num_inference_steps: int
    num_blocks: int
    max_iterations: int
    coarse_solver: CoarseSolver
    pipelined: bool
    max_rows: int | None
    engine: str
    tolerance: float
    exact: bool
    options: Options | None = None
    calibrated: bool = False

    @property
    def bits_only(self) -> bool:
        """Stop only where nothing moves by a bit."""
        return self.exact or self.tolerance == 0.0

    @property
    def signature(self) -> Hashable:
        """What of it a recording depends on: all but when to stop."""
        return (
            self.method,
            self.num_inference_steps,
            self.num_blocks,
            self.max_iterations,
            self.coarse_solver,
            self.pipelined,
            self.max_rows,
            self.bits_only,
            self.options,
        )

    @property
    def num_checkpoints(self) -> int:
        """Whole samples that come into being, at most."""
        match self.options:
            case FixedPoint():
                return self.max_iterations if self.options.window is None else 1
            case Chords():
                return self.options.num_cores
        return 1 if self.method == "sequential" else self.max_iterations + 1

    @property
    def slides(self) -> bool:
        """Whether what a wave evaluates depends on what was found in those before."""
        return isinstance(self.options, FixedPoint) and self.options.window is not None

    def program(self) -> Program:
        """The waves of this plan, if nothing stops it earlier."""
        steps, options = self.num_inference_steps, self.options
        if isinstance(options, FixedPoint) and options.window is not None:
            return program.windows(steps, min(options.window, self.max_rows or options.window))
        if isinstance(options, FixedPoint):
            sparse = None if self.bits_only else options.num_nodes
            whole: Program = program.fixed_point(steps, self.max_iterations, sparse)
        elif self.method == "sequential":
            whole = program.sequential(steps)
        else:
            whole = program.srds(steps, self.num_blocks, self.max_iterations, self.pipelined)
        return whole.limited_to(self.max_rows)

    def __str__(self) -> str:
        if self.method == "sequential":
            return f"sequential: {self.num_inference_steps} waves of one row"
        waves = self.program()
        if self.slides:
            return (
                f"{self.method}: {self.num_inference_steps} steps, windows of at most {waves.peak_rows} rows, at most "
                f"{waves.num_waves} waves: how far a window slides is found on the way"
            )
        what = f"at most {self.max_iterations} iterations"
        if self.method == "srds":
            what = f"{self.num_blocks} blocks, coarse solver {self.coarse_solver}, {what}"
        lines = [
            f"{self.method}: {self.num_inference_steps} steps, {what} (sequential: {self.num_inference_steps} waves)"
        ]
        fewest = 1 if self.method == "srds" else 4
        for iteration in [*range(fewest, min(self.max_iterations, 4 + fewest)), self.max_iterations]:
            spent = waves.spent(iteration)
            lines.append(
                f"  stopped after iteration {iteration}: waves {spent.waves}, rows {spent.rows}, "
                f"peak rows {spent.peak_rows}"
            )
        if self.method == "srds" and self.pipelined and self.max_iterations > 1:
            lines.append("  (rows begun for later iterations included: fewer with a smaller max_iterations)")
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        found = {**asdict(self), "options": to_dict(self.options)}
        Path(path).write_text(json.dumps(found, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that `save` wrote.

        Raises:
            PlanMismatch: the file is no plan of this version.
        """
        try:
            found: Any = json.loads(Path(path).read_text())
        except json.JSONDecodeError as error:
            raise PlanMismatch(f"{path} holds no plan: it is not JSON. Write one with Plan.save(path).") from error
        known = {field.name for field in fields(cls)}
        if not isinstance(found, dict) or set(found) != known:
            odd = sorted(known ^ set(found)) if isinstance(found, dict) else "everything"
            raise PlanMismatch(
                f"{path} holds no plan of this version. It differs in {odd}. Write it anew with Plan.save(path)."
            )
        try:
            return cls(**{**found, "options": from_dict(found["method"], found["options"])})
        except (ValueError, TypeError) as error:
            raise PlanMismatch(
                f"{path} holds no plan of this version: {error}. Its method is not as it was. Write it anew."
            ) from error


def choose(num_steps: int, settings: Settings, stochastic: bool = False) -> Plan:
    """The plan for N steps. No device is asked: blocks and coarse solver follow the settings, or the defaults below.

    Defaults: the 2M jump, and blocks of about sqrt(N) / 2 steps. Pipelined, iteration p is ready after p * S + B - p
    waves, so for the one or two iterations that the 2M jump needs, more and shorter blocks than the paper's sqrt(N)
    are better on both counts: fewer waves and a closer coarse sweep. Where the scheduler's steps add noise
    (stochastic), x0 follows no line, and first-order jumps are several times closer after one iteration.

    Raises:
        InvalidArgument: more blocks than steps, or more iterations than blocks.
    """
    method, options = options_of(settings.method)
    if method == "auto":
        method = "srds" if num_steps >= FEWEST_STEPS_FOR_SRDS else "sequential"
    blocks, most = 1, num_steps
    if method == "srds":
        blocks = settings.num_blocks or max(1, round(num_steps / max(2, round(math.sqrt(num_steps) / 2))))
        if blocks > num_steps:
            raise InvalidArgument(
                f"num_blocks is {blocks} for {num_steps} steps. A block holds at least one step. "
                f"Pass at most {num_steps}, or leave it out."
            )
        most = blocks
    elif isinstance(options, Chords):
        options = replace(options, num_cores=min(options.num_cores, num_steps))
        most = options.num_cores - 1
    elif method == "sequential":
        most = 1
    coarse_solver = settings.coarse_solver
    if coarse_solver == "auto":
        coarse_solver = "ddim" if stochastic else "2m"
    iterations = most if settings.exact or settings.max_iterations is None else min(settings.max_iterations, most)
    if isinstance(options, FixedPoint):
        iterations = max(1, iterations)
    return Plan(
        method=cast(Method, method),
        num_inference_steps=num_steps,
        num_blocks=blocks,
        max_iterations=iterations,
        coarse_solver=cast(CoarseSolver, coarse_solver),
        pipelined=settings.pipelined,
        max_rows=settings.max_rows,
        engine=settings.engine,
        tolerance=float(settings.tolerance),
        exact=settings.exact,
        options=options,
    )


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InvalidArgument(f"{name} is {value!r}. Known are {', '.join(known)}. Pass one of these.")
