"""A class of diffusers, a scheduler and the methods: each call compared with the stock pipeline's, and its verdict.

exact: equal to the stock result but for rounding. exact to rounding: the difference is larger than that, and yet no
larger than what rounding makes of the stock loop itself, as `rounding.py` measures it.
within: the mean absolute difference is within the tolerance. beyond: it was estimated to be, and is up to ten times as
large. stock: the call ran on the stock loop, for the reason given. refused: `compile` raised the reason. Nothing else
may come out: wrong, or failed, where the call raised.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, astuple, dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor

import srds_fast
from bench.workloads.classes import CASES, Case, Variation
from srds_fast.errors import SrdsFastError, UnsupportedScheduler
from srds_fast.solvers.method import SAME_LAW
from srds_fast.solvers.registry import BY_NAME, SEQUENTIAL
from srds_fast.telemetry.report import Report

from .rounding import relative, rounding

EXACT, ROUNDED, WITHIN, BEYOND, STOCK, REFUSED = "exact", "exact to rounding", "within", "beyond", "stock", "refused"
WRONG, FAILED = "wrong", "failed"
# of the largest value, in float32
ROUNDING = 1e-5
# a difference in float32 that may be rounding
DOUBTFUL = 1e-3
# of compile, and what its estimate of the error may miss it by
TOLERANCE, ESTIMATE = 4e-3, 10

ONE = {"sequential": {"method": SEQUENTIAL}}
FEW: dict[str, dict[str, Any]] = {
    "srds, exact": {"method": "srds", "exact": True},
    "collocation": {"method": "collocation"},
}
LONG: dict[str, dict[str, Any]] = {"srds": {"method": "srds"}, "collocation": {"method": "collocation"}}
EVERY: dict[str, dict[str, Any]] = ONE | {
    name + end: {"method": name, "exact": exact}
    for name, each in BY_NAME.items()
    if name != SEQUENTIAL and each.promise != SAME_LAW
    for end, exact in ((", exact", True), ("", False))
}


@dataclass
class Run:
    """A call.

    Attributes:
        difference: the largest one to stock, relative to the largest value.
        in_float64, of_stock, of_width: see `rounding.Rounding`; None: it was not asked for, or cannot be made.
        error: the mean absolute difference in tolerances, where the call was to be within one.
        waves, path: of the report.
        reason: why it ran on the stock loop, or why that was not taken over, or what was raised.
    """

    verdict: str
    difference: float | None = None
    in_float64: float | None = None
    of_stock: float | None = None
    of_width: float | None = None
    error: float | None = None
    waves: int | None = None
    path: str | None = None
    reason: str | None = None


@dataclass
class Cell:
    """A case with a scheduler and a call, and what became of it by each method.

    Attributes:
        change: what the call asks for beyond the case's own; "" if nothing.
        own: the scheduler is the case's own.
        steps: `num_inference_steps`; turns: how often the stock loop steps.
        reason: why the stock pipeline does not run with this scheduler, or None.
        earlier: it was measured in a run before that of the file.
    """

    case: str
    change: str
    scheduler: str
    own: bool
    steps: int
    turns: int | None = None
    reason: str | None = None
    earlier: bool = False
    runs: dict[str, Run] = field(default_factory=dict)

    @property
    def as_shipped(self) -> bool:
        """With the case's own scheduler and call."""
        return self.own and not self.change

    def to_dict(self) -> dict[str, Any]:
        found = {**asdict(self), "runs": {name: _said(asdict(run)) for name, run in self.runs.items()}}
        return _said(found)

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Cell:
        return cls(**{**found, "runs": {name: Run(**run) for name, run in found.get("runs", {}).items()}})


def _said(found: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in found.items()
        if (value not in (None, {}, "") or name == "change") and (value or name != "earlier")
    }


# ---- schedulers

_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
# what a pipeline that predicts noise, velocity or the sample may be given, and what one of flow matching may
DIFFUSION = {
    "DDIM": "DDIMScheduler",
    "Euler": "EulerDiscreteScheduler",
    "DPM++ 2M": "DPMSolverMultistepScheduler",
    "UniPC": "UniPCMultistepScheduler",
    "Heun": "HeunDiscreteScheduler",
    "PNDM": "PNDMScheduler",
}
MATCHING = {
    "Flow Euler": "FlowMatchEulerDiscreteScheduler",
    "Flow Heun": "FlowMatchHeunDiscreteScheduler",
    "Flow UniPC": "UniPCMultistepScheduler",
    "Flow DPM++ 2M": "DPMSolverMultistepScheduler",
}


def matches_flow(scheduler: Any) -> bool:
    return "Flow" in type(scheduler).__name__ or bool(scheduler.config.get("use_flow_sigmas", False))


def others(scheduler: Any) -> dict[str, Any]:
    """Other schedulers for the network of this one, by their short names."""
    config, found = scheduler.config, {}
    if not matches_flow(scheduler):
        for name, cls in DIFFUSION.items():
            if cls != type(scheduler).__name__:
                # a scheduler that clips by default would clip latents too, which are not within -1 and 1
                found[name] = getattr(diffusers, cls).from_config({"clip_sample": False, **config})
        return found
    shift = float(config.get("flow_shift") or config.get("shift") or 1.0)
    for name, cls in MATCHING.items():
        if cls == type(scheduler).__name__:
            continue
        options = {"shift": shift} if "Flow" in cls else {**_FLOW, "flow_shift": shift}
        found[name] = getattr(diffusers, cls)(**options)
    return found


# ---- calls


def called(pipe: Any, call: dict[str, Any], steps: int) -> Tensor:
    """What a call returns first, in float64; the same random numbers for every call."""
    torch.manual_seed(7)
    given = {} if {"sigmas", "timesteps"} & set(call) else {"num_inference_steps": steps}
    found = pipe(**call, **given, generator=torch.Generator().manual_seed(0))[0]
    return torch.as_tensor(found[0] if isinstance(found, list | tuple) else found).double()


def verdict_of(difference: float, error: float | None) -> str:
    """error: None where the call had to be exact."""
    if difference <= ROUNDING:
        return EXACT
    if error is None or error > ESTIMATE or difference == float("inf"):
        return WRONG
    return WITHIN if error <= 1 else BEYOND


def run(
    pipe: Any, call: dict[str, Any], steps: int, expected: Tensor, settings: dict[str, Any]
) -> tuple[Run, Report | None]:
    """One call, and its report; None where it has none."""
    try:
        fast = srds_fast.compile(pipe, **settings)
    except UnsupportedScheduler as why:
        return Run(REFUSED, reason=first_sentence(why)), None
    try:
        found = called(fast, call, steps)
    except Exception as why:
        kind = REFUSED if isinstance(why, SrdsFastError) else FAILED
        return Run(kind, reason=f"{type(why).__name__}: {first_sentence(why)}"), None
    report = fast.report
    difference, error = relative(found, expected), None
    if not (settings.get("exact") or settings["method"] == SEQUENTIAL or difference == float("inf")):
        error = float((found - expected).abs().mean()) / TOLERANCE
    verdict, reason = verdict_of(difference, error), report.fallback_reason
    if report.path == "stock" and verdict == EXACT:
        verdict = STOCK
    elif reason is None and report.path == "drive":
        reason = report.drive_reason
    error, waves = _short(error), report.waves or None
    return Run(verdict, _short(difference), error=error, waves=waves, path=report.path, reason=reason), report


def _short(number: float | None) -> float | None:
    return None if number is None else float(f"{number:.1e}")


def first_sentence(why: object) -> str:
    """What an error says first, without what it says to do."""
    lines = str(why).strip().splitlines() or [""]
    return lines[0].partition(". ")[0].rstrip(".")[:300]


def cell(
    case: Case,
    pipe: Any,
    name: str,
    steps: int,
    methods: Iterable[str],
    change: str = "",
    own: bool = True,
    **call: Any,
) -> Cell:
    """A case with the scheduler that its pipeline has; name: of that scheduler; call: other arguments."""
    found = Cell(case.name, change, name, own, steps)
    given = {**case.call, **call}
    try:
        expected = called(pipe, given, steps)
        if not bool(expected.isfinite().all()):
            raise ValueError("the stock loop ends in NaN or infinity")
    except Exception as why:
        found.reason = f"{type(why).__name__}: {first_sentence(why)}"
        return found
    every = EVERY | LONG | FEW
    for method in methods:
        ran, report = run(pipe, given, steps, expected, every[method])
        if report is not None and ran.verdict == WRONG and (ran.difference or 1) < DOUBTFUL:
            whose = rounding(case, pipe.scheduler, given, steps, every[method], report.peak_rows, called)
            ran.in_float64, ran.of_stock, ran.of_width = map(_short, astuple(whose))
            if whose.explains(ran.difference):
                ran.verdict = ROUNDED
        found.runs[method] = ran
        found.turns = found.turns or (report and report.num_inference_steps) or None
    return found


def short_name(scheduler: Any) -> str:
    """The name of a scheduler in the tables."""
    table = MATCHING if matches_flow(scheduler) else DIFFUSION
    known = {cls: name for name, cls in table.items()}
    cls = type(scheduler).__name__
    return known.get(cls, cls.removesuffix("Scheduler"))


def by_every_method(case: Case, steps: int) -> Cell:
    """A case with its own scheduler by every method."""
    pipe = case.build()
    return cell(case, pipe, short_name(pipe.scheduler), steps, EVERY)


def by_scheduler(case: Case, steps: int) -> Iterator[Cell]:
    """A case with the other schedulers of its kind by two methods."""
    own = case.build().scheduler
    if not hasattr(own, "set_timesteps"):
        return
    for name, scheduler in others(own).items():
        pipe = case.build()
        pipe.scheduler = scheduler
        yield cell(case, pipe, name, steps, FEW, own=False)


def at_length(case: Case, steps: int) -> Cell:
    """A case with its own scheduler and many steps: how many waves are left of them."""
    pipe = case.build()
    return cell(case, pipe, short_name(pipe.scheduler), steps, LONG)


def varied(variation: Variation, steps: int) -> Cell:
    """A call for another grid of steps, or another size."""
    case = CASES[variation.case]
    pipe = case.build()
    if variation.scheduler is not None:
        cls = getattr(diffusers, variation.scheduler)
        pipe.scheduler = cls.from_config(pipe.scheduler.config, **variation.options)
    name = short_name(pipe.scheduler)
    own = variation.scheduler is None
    return cell(case, pipe, name, steps, [*ONE, *FEW], variation.note, own, **variation.call)
