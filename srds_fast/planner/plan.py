"""Plans: the choice of method, options and iterations for one number of steps."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import InvalidArgument, PlanMismatch
from ..files import path_of
from ..schedulers.steps import CoarseSolver
from ..solvers.checks import check_number, check_one_of, check_whole
from ..solvers.method import Method, Target
from ..solvers.program import Program
from ..solvers.registry import BY_NAME, SEQUENTIAL
from ..words import counted
from . import json_files
from .context import Context
from .cost_curve import CostCurve
from .settings import ENGINES, MOST_STEPS, Settings, engine_name

# of a program with the updates of its waves: 1.1 GB for a million rows
BYTES_OF_A_ROW = 2**10
# of a program: 2 GiB. More takes minutes to make
MOST_ROWS = 2**21
# why a plan cannot be recorded
SLIDES = "each wave decides how far its window slides, and a replay cannot decide"
PREVIEWS = "a stream shows what the network predicts on the way, and a replay does not give that"
STATES_KEPT = "the states of all steps are kept, and a replay does not give them"


def refuse_beside(plan: Plan | None, settings: Settings, defaults: Settings) -> None:
    """Raise InvalidArgument where settings were given beside a plan, which fixes them all, or it is no plan."""
    if not isinstance(plan, Plan | None):
        raise InvalidArgument(
            f"plan is a {type(plan).__name__}. It must be a Plan. Pass one from plan_for or from srds_fast.Plan.load."
        )
    changed = [each.name for each in fields(Settings) if getattr(settings, each.name) != getattr(defaults, each.name)]
    if plan is not None and changed:
        raise InvalidArgument(
            f"plan was given together with {', '.join(changed)}. A plan fixes every setting of a call. "
            "Leave one of the two out."
        )


@dataclass(frozen=True)
class Candidate:
    """What a plan is predicted to take."""

    name: str
    iterations: int  # after which half of its runs are expected to have stopped
    waves: int  # until then, as rows and peak_rows
    rows: int
    peak_rows: int
    seconds: float  # predicted, the mean over how many iterations runs are expected to take
    fixed_seconds: float  # predicted for a run that always ends after these iterations
    nbytes: int | None = None  # memory that the widest network call takes; None: not measured


@dataclass(frozen=True)
class Prediction:
    """Why a plan was chosen."""

    chosen: Candidate
    candidates: tuple[Candidate, ...]  # those that were looked at closely, the fastest first
    why: str
    curve: CostCurve  # the costs it follows from
    earliest: int = 1  # iteration before which no run of it is expected to stop

    def __str__(self) -> str:
        sequential = self.chosen.name.startswith(SEQUENTIAL)
        lines = [f"because {self.why}" if sequential else f"chosen because it is {self.why}"]
        lines.append(f"  {'predicted ms':>12}  {'waves':>5}  {'rows':>5}  {'peak':>4}  {'MiB':>6}  plan")
        for each in self.candidates:
            memory = "-" if each.nbytes is None else f"{each.nbytes / 2**20:.0f}"
            counts = f"{each.waves:5}  {each.rows:5}  {each.peak_rows:4}  {memory:>6}"
            mark = ">" if each == self.chosen else " "
            lines.append(f"{mark} {1e3 * each.seconds:12.2f}  {counts}  {each.name}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Plan:
    """How one call will run. Print it to see waves and rows after each iteration.

    Attributes:
        options: of its method, complete.
        num_inference_steps: N.
        max_iterations: iterations at most; the tolerance may stop the call earlier.
        max_rows, engine, tolerance, exact: as in `compile`.
        calibrated: run max_iterations, however the samples change: so many were found to be enough.
        replicated: where several ranks make the call, each evaluates all rows by itself, and nothing is gathered.
        prediction: what it is expected to take and why it was chosen, if costs were measured.
        context: where they were; a call elsewhere raises PlanMismatch.
    """

    options: Method
    num_inference_steps: int
    max_iterations: int
    max_rows: int | None
    engine: str
    tolerance: float
    exact: bool
    calibrated: bool = False
    replicated: bool = False
    prediction: Prediction | None = field(default=None, compare=False)
    context: Context | None = field(default=None, compare=False)

    @property
    def method(self) -> str:
        """Name of the method, see `srds_fast.methods`."""
        return self.options.name

    @property
    def is_sequential(self) -> bool:
        return self.method == SEQUENTIAL

    @property
    def num_blocks(self) -> int:
        """B of SRDS; 1 for other methods."""
        return int(getattr(self.options, "num_blocks", 1))

    @property
    def coarse_solver(self) -> CoarseSolver:
        """Of SRDS: "ddim" or "2m"; without meaning for other methods."""
        solver: CoarseSolver = getattr(self.options, "coarse_solver", "2m")
        return solver

    @property
    def bitwise(self) -> bool:
        """Stop only where nothing moves by a bit."""
        return self.exact or self.tolerance == 0.0

    @property
    def fixed_by(self) -> str | None:
        """Why its runs end after `max_iterations`, however the samples change, as a clause; None: they need not."""
        if not self.calibrated or self.is_sequential:
            return None
        if self.context is not None and self.context.call is not None:  # `calibrate` alone asks for a kind of call
            return f"calibrated at a tolerance of {self.tolerance:.2g}"
        return "as latency='constant' asks"

    @property
    def signature(self) -> Hashable:
        """What a recording depends on: all but when to stop."""
        asked = self.max_rows, self.bitwise, self.replicated
        return self.options, self.num_inference_steps, self.max_iterations, *asked

    def costs(self, curve: CostCurve) -> CostCurve:
        """The costs of its network calls, out of those of all ways to make them."""
        return curve.replicated if self.replicated and curve.replicated is not None else curve

    @property
    def slides(self) -> bool:
        return self.options.slides

    def program(self) -> Program:
        """The waves of this plan, if nothing stops it earlier. Raises InvalidArgument if these take too much memory."""
        steps, iterations = self.num_inference_steps, self.max_iterations
        if self.rows > MOST_ROWS:
            raise InvalidArgument(
                f"{self.short()} has up to {counted(self.rows, 'row')} for {counted(steps, 'step')}, whose program "
                f"would take about {self.rows * BYTES_OF_A_ROW / 2**30:.1f} GiB of host memory. The most is "
                f"{MOST_ROWS * BYTES_OF_A_ROW / 2**30:.1f} GiB. Pass fewer max_iterations, num_blocks or steps, or "
                "method='sequential'."
            )
        whole = self.options.program(steps, iterations, max_rows=self.max_rows, bitwise=self.bitwise)
        return whole.limited_to(self.max_rows)

    @property
    def rows(self) -> int:
        """Rows of its program, at most: told without making it."""
        return self.options.rows(self.num_inference_steps, self.max_iterations)

    def widths(self, iteration: int) -> list[int]:
        """Rows of each wave of a run that stops after `iteration`; as of its program, and most often without it."""
        cut, steps = self.max_rows, self.num_inference_steps
        whole = self.options.widths(steps, iteration, self.max_iterations, max_rows=cut, bitwise=self.bitwise)
        if cut is None or max(whole) <= cut:
            return whole
        return [rows for width in whole for rows in (*[cut] * (width // cut), width % cut) if rows]

    def short(self) -> str:
        """Its name among candidates."""
        fixed = [counted(self.max_iterations, "iteration")] if self.calibrated and not self.is_sequential else []
        return ", ".join([self.method, *self.options.words(), *fixed, *(["replicated"] if self.replicated else [])])

    def __str__(self) -> str:
        return "\n".join([*self._counts(), *([] if self.prediction is None else [str(self.prediction)])])

    def _counts(self) -> list[str]:
        steps, most = self.num_inference_steps, self.max_iterations
        if self.is_sequential:
            return [f"{self.method}: {counted(steps, 'wave')} of one row"]
        waves = self.program()
        if self.slides:
            bounds = f"windows of at most {counted(waves.peak_rows, 'row')}, at most {counted(waves.num_waves, 'wave')}"
            return [f"{self.method}: {counted(steps, 'step')}, {bounds}: how far a window slides is found on the way"]
        bound = f"{'' if self.calibrated else 'at most '}{counted(most, 'iteration')}"
        what = ", ".join([*self.options.details(), bound])
        lines = [f"{self.method}: {counted(steps, 'step')}, {what} (sequential: {counted(steps, 'wave')})"]
        fewest, _ = self.options.tried
        for iteration in [*range(fewest, min(most, 4 + fewest)), most]:
            spent = waves.spent(iteration)
            counts = f"waves {spent.waves}, rows {spent.rows}, peak rows {spent.peak_rows}"
            lines.append(f"  stopped after iteration {iteration}: {counts}")
        return [*lines, *(f"  {note}" for note in self.options.notes(most))]

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON. An older file stays as it is until the new one is complete.

        Raises InvalidArgument if the path is no place for a file, or is a symbolic link; OSError if writing fails.
        """
        json_files.write(path_of("path", path), self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON types, as `save` writes it."""
        return {"method": self.method, **asdict(self), "options": self.options.to_dict()}

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that `save` wrote.

        Raises PlanMismatch if the file is no plan of this version; OSError if it cannot be read.
        """
        place = path_of("path", path)
        try:
            found = json_files.read(place)
            if not isinstance(found, dict):
                raise ValueError(f"it holds a {type(found).__name__}")
            method = found.pop("method", None)
            check_one_of("method", method, tuple(BY_NAME))
            options = json_files.build(BY_NAME[method], found.pop("options", None))
            if isinstance(found.get("engine"), str):
                found["engine"] = engine_name(found["engine"])
            plan = json_files.build(cls, found, options=options)
            plan._check()
            return plan
        except ValueError as error:  # also where it is not JSON, and where options refuse a value
            what = f"{path} holds no plan of this version: {error}"
            raise PlanMismatch(f"{what}. Write it anew with Plan.save(path).") from error

    def _check(self) -> None:
        """Raise InvalidArgument if no settings lead to this plan."""
        check_whole("num_inference_steps", self.num_inference_steps, 1, MOST_STEPS)
        check_whole("max_rows", self.max_rows, 1, optional=True)
        check_number("tolerance", self.tolerance, 0)
        check_one_of("engine", self.engine, ENGINES)
        target = Target(self.num_inference_steps, self.tolerance, self.exact)
        self.options.check(target)
        if (complete := self.options.with_defaults(target)) != self.options:
            raise InvalidArgument(f"its options are {self.options}. Those of a plan are complete, such as {complete}.")
        fewest = complete.first_iteration
        check_whole("max_iterations", self.max_iterations, fewest, max(fewest, complete.most_iterations(target)))
