"""How benches are set up. Each function takes sizes and returns what is timed; what it needs is imported in it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple


class Prepared(NamedTuple):
    """A bench that has been set up.

    Attributes:
        call: what is timed.
        ran: what the last call was: waves, rows, peak_rows; bytes, the fewest it can move.
        countable: whether what it dispatches can be looked at: compiled code would be taken apart.
        replays: it replays graphs. What they launch is not dispatched, and the memory they run in is their pool's, not
            allocated by a call.
        stand_in: as of `Dispatched`.
    """

    call: Callable[[], object]
    ran: Callable[[], dict[str, int]] = dict
    countable: bool = True
    replays: bool = False
    stand_in: bool = True


def kernel(name: str, contestant: str, *, moved: int) -> Prepared:
    """An operation of `kernels.SUBJECTS`; moved: bytes that a call moves."""
    import torch

    from . import kernels

    subject = kernels.SUBJECTS[name](moved, kernels.DEVICE)
    kernels.checked(subject)
    subject.reset()
    call = subject.run if contestant == "kernel" else subject.reference
    if contestant == "compiled":
        call = torch.compile(call)
    return Prepared(
        call,
        lambda: {"bytes": subject.bytes},
        countable=contestant != "compiled",
        stand_in=contestant == "kernel",
    )


def host(pipeline: str, loop: str, *, steps: int) -> Prepared:
    """A loop of `host_time.Case`."""

    case = _host_case(pipeline, steps)
    return Prepared(lambda: case.call(loop), lambda: _of_report(case.loops[loop], steps))


def planning(method: str, *, steps: int) -> Prepared:
    """A run up to its first wave, with nothing kept from runs before it; auto: the search for a plan alone."""
    import torch
    from diffusers import DDIMScheduler

    from srds_fast.engine.run import Run
    from srds_fast.planner.choose import choose
    from srds_fast.planner.plan import Plan
    from srds_fast.planner.settings import Settings
    from srds_fast.schedulers.verify import noise_table

    x = torch.zeros(1, 4, 8, 8)
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(steps)

    def chosen() -> Plan:
        return choose(steps, Settings(method=method))

    def searched() -> Plan:
        from srds_fast.planner.context import context_of
        from srds_fast.planner.cost_curve import CostCurve
        from srds_fast.planner.search import Known, Pricing, usual

        known = Known(CostCurve((1, 32), (1e-3, 2e-3)))
        pricing = Pricing(known, lambda plan: 1e-4, context_of(x.device, noise_table(scheduler)))
        return usual(steps, Settings(method="auto"), False, pricing)

    def call() -> None:
        for forget in kept:
            forget()
        plan = searched() if method == "auto" else chosen()
        Run(plan, x, noise_table(scheduler), "bench").next(None)

    kept: list[Callable[[], None]] = []
    call()  # imports what it needs
    kept += _caches()
    return Prepared(call)


def ranges(contestant: str, *, steps: int) -> Prepared:
    """What ranges add to a wave: nobody looks, they are pushed, they are kept as well."""
    import tempfile
    from pathlib import Path

    import srds_fast

    case = _host_case("SD DDIM", steps)
    folder = tempfile.TemporaryDirectory()

    def call() -> None:
        if contestant == "off":
            case.call("srds")
            return
        with srds_fast.profile(Path(folder.name) / "trace.json" if contestant == "trace" else None):
            case.call("srds")

    return Prepared(call, lambda: _of_report(case.loops["srds"], steps))


def sampler(method: str, *, steps: int, samples: int) -> Prepared:
    """`sample` on a problem in closed form."""
    import srds_fast

    from .fixed import methods
    from .problems import mixture

    problem = mixture(samples)
    settings = methods(steps)[method]
    results: list[Any] = []

    def call() -> None:
        results[:] = [srds_fast.sample(problem.denoiser, problem.x, problem.scheduler, steps, **settings)]

    return Prepared(call, lambda: _of_report(results[0], steps))


def end_to_end(workload: str, method: str, engine: str, *, steps: int) -> Prepared:
    """A loop of `workloads.WORKLOADS`."""
    from .fixed import methods

    made = _workload(workload)
    loop = made.stock(steps) if method == "stock" else made.ours(steps, {**methods(steps)[method], "engine": engine})

    def ran() -> dict[str, int]:
        found = loop.ran()._asdict()
        return {name: found[name] for name in ("waves", "rows", "peak_rows") if name in found}

    return Prepared(loop.call, ran, replays=engine != "eager")


def rows(workload: str, number: int) -> Prepared:
    """One call of a workload's network with so many rows."""
    import torch

    call = _workload(workload).network.call(number)
    return Prepared(torch.no_grad()(call), lambda: {"rows": number})


@lru_cache(maxsize=1)
def _host_case(pipeline: str, steps: int) -> Any:
    from .host_time import Case

    return Case(pipeline, steps=steps)


@lru_cache(maxsize=1)
def _workload(name: str) -> Any:
    import torch

    from .workloads import WORKLOADS

    torch.manual_seed(0)
    return WORKLOADS[name]()


def _of_report(reporting: Any, steps: int) -> dict[str, int]:
    """Of what has a report; the stock loop has none."""
    report = getattr(reporting, "report", None)
    if report is None:
        return {"waves": steps, "rows": steps, "peak_rows": 1}
    return {"waves": report.waves, "rows": report.rows, "peak_rows": report.peak_rows}


def _caches() -> list[Callable[[], None]]:
    """What makes the library forget what it computed once and kept."""
    modules = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == "srds_fast"]
    values = {id(value): value for module in modules for value in vars(module).values()}
    return [value.cache_clear for value in values.values() if hasattr(value, "cache_clear")]
