"""Plans: the choice of method, blocks, coarse solver and iterations for one number of steps."""

from __future__ import annotations

import json
from collections.abc import Hashable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ..errors import InvalidArgument, PlanMismatch
from ..schedulers.steps import CoarseSolver
from ..solvers import program
from ..solvers.chords.options import Chords
from ..solvers.chords.program import chord_starts, chords
from ..solvers.fixed_point.options import Collocation, FixedPoint
from ..solvers.fixed_point.program import fixed_point, windows
from ..solvers.method import Options, from_dict, to_dict
from ..solvers.program import Program
from .context import Context
from .cost_curve import CostCurve
from .settings import Settings, engine_name

Method = Literal["sequential", "srds", "collocation", "parataa", "paradigms", "chords"]
# why a plan cannot be recorded
SLIDES = "its window slides by what is found in every wave, which a replay cannot look at"
STATES_KEPT = "the states on the way are kept, which a replay does not tell"


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
class Candidate:
    """What a plan is predicted to take.

    Attributes:
        name: of the plan, short.
        iterations: after which half of its runs are expected to have stopped.
        waves, rows, peak_rows: until then.
        seconds: predicted, the mean over how many iterations runs are expected to take.
        fixed_seconds: predicted where it is told before to end after so many iterations.
        nbytes: memory that the widest network call takes, None where that was not measured.
    """

    name: str
    iterations: int
    waves: int
    rows: int
    peak_rows: int
    seconds: float
    fixed_seconds: float
    nbytes: int | None = None


@dataclass(frozen=True)
class Prediction:
    """Why a plan was chosen.

    Attributes:
        chosen: the plan itself.
        candidates: those that were looked at closely, the fastest first.
        why: in words.
        curve: the costs it follows from.
        earliest: iteration before which no run of it is expected to stop.
    """

    chosen: Candidate
    candidates: tuple[Candidate, ...]
    why: str
    curve: CostCurve
    earliest: int = 1

    def __str__(self) -> str:
        heading = f"  {'predicted ms':>12}  {'waves':>5}  {'rows':>5}  {'peak':>4}  {'MiB':>6}  plan"
        lines = [f"chosen because it is {self.why}" if self.chosen.name != "sequential" else f"because {self.why}"]
        for each in self.candidates:
            memory = "-" if each.nbytes is None else f"{each.nbytes / 2**20:.0f}"
            lines.append(
                f"{'>' if each == self.chosen else ' '} {1e3 * each.seconds:12.2f}  {each.waves:5}  {each.rows:5}  "
                f"{each.peak_rows:4}  {memory:>6}  {each.name}"
            )
        return "\n".join([lines[0], heading, *lines[1:]])


@dataclass(frozen=True)
class Plan:
    """How one call will run. Print it to see waves and rows after each iteration.

    Attributes:
        method: its name, see `srds_fast.methods`.
        num_inference_steps: N.
        num_blocks: B (1 for the sequential method).
        max_iterations: iterations at most; the tolerance may stop the call earlier.
        coarse_solver: "ddim" or "2m".
        pipelined, max_rows, engine, tolerance, exact, in_flight: as in `compile`.
        options: of the method, None for sequential and srds.
        calibrated: run max_iterations, whatever the change of the samples: so many were found to be enough.
        prediction: what it was found to take and why it was chosen, where that was measured.
        context: where; a call elsewhere raises PlanMismatch.
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
    in_flight: int | None = None
    calibrated: bool = False
    prediction: Prediction | None = field(default=None, compare=False)
    context: Context | None = field(default=None, compare=False)

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
            self.in_flight,
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
            return windows(steps, min(options.window, self.max_rows or options.window))
        if isinstance(options, FixedPoint):
            sparse = None if self.bits_only else options.num_nodes
            whole: Program = fixed_point(steps, self.max_iterations, sparse)
        elif isinstance(options, Chords):
            whole = chords(steps, options.starts or chord_starts(steps, options.num_cores))
        elif self.method == "sequential":
            whole = program.sequential(steps)
        else:
            whole = program.srds(steps, self.num_blocks, self.max_iterations, self.pipelined, in_flight=self.in_flight)
        return whole.limited_to(self.max_rows)

    def short(self) -> str:
        """Its name among candidates."""
        words: list[str] = [self.method]
        match self.options:
            case Collocation():
                words.append(f"{self.options.num_nodes or 'all'} nodes")
            case Chords():
                words.append(f"{self.options.num_cores} cores")
            case FixedPoint() if self.options.window is not None:
                words.append(f"window {self.options.window}")
        if self.method == "srds":
            words.append(f"{self.num_blocks} blocks, {self.coarse_solver} jumps")
            if self.in_flight is not None:
                words.append(f"{self.in_flight} in flight")
        if self.calibrated and self.method != "sequential":
            words.append(f"{self.max_iterations} iterations")
        return ", ".join(words)

    def __str__(self) -> str:
        found = self._counts()
        return found if self.prediction is None else f"{found}\n{self.prediction}"

    def _counts(self) -> str:
        if self.method == "sequential":
            return f"sequential: {self.num_inference_steps} waves of one row"
        waves = self.program()
        if self.slides:
            return (
                f"{self.method}: {self.num_inference_steps} steps, windows of at most {waves.peak_rows} rows, at most "
                f"{waves.num_waves} waves: how far a window slides is found on the way"
            )
        what = f"{'' if self.calibrated else 'at most '}{self.max_iterations} iterations"
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
        if self.method == "srds" and self.in_flight is not None and self.max_iterations > self.in_flight:
            ones = "one iteration" if self.in_flight == 1 else f"{self.in_flight} iterations"
            lines.append(f"  ({ones} in flight: later ones begin when those before were not enough)")
        elif self.method == "srds" and self.pipelined and self.max_iterations > 1:
            lines.append(
                "  (rows begun for later iterations included: fewer with a smaller max_iterations or in_flight)"
            )
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
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise PlanMismatch(f"{path} holds no plan: it is not JSON. Write one with Plan.save(path).") from error
        known = {field.name for field in fields(cls)}
        if not isinstance(found, dict) or set(found) != known:
            odd = sorted(known ^ set(found)) if isinstance(found, dict) else "everything"
            raise PlanMismatch(
                f"{path} holds no plan of this version. It differs in {odd}. Write it anew with Plan.save(path)."
            )
        try:
            options = from_dict(found["method"], found["options"])
            context = None if found["context"] is None else Context(**found["context"])
            return cls(
                **{
                    **found,
                    "options": options,
                    "engine": engine_name(found["engine"]),
                    "prediction": _prediction(found["prediction"]),
                    "context": context,
                }
            )
        except (ValueError, TypeError, KeyError) as error:
            raise PlanMismatch(
                f"{path} holds no plan of this version: {error}. Its method is not as it was. Write it anew."
            ) from error


def _prediction(found: Any) -> Prediction | None:
    if found is None:
        return None
    curve: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in found["curve"].items()
    }
    candidates = tuple(Candidate(**each) for each in found["candidates"])
    return Prediction(Candidate(**found["chosen"]), candidates, found["why"], CostCurve(**curve), found["earliest"])
