"""Schedulers that carry more from step to step than one x0, beside first-order ones: every method at its defaults.

    python -m bench.quality.histories --json histories.json       # half an hour

Samples of the bundled pipeline under guidance, in float32. The first two columns are the largest difference to the
scheduler's own loop, relative to the largest value: of our sequential loop and of SRDS and collocation with
`exact=True`. The others are, with the tolerance of half a grey level, waves and rows until the last of the samples
stops, and the largest difference of a sample in grey levels.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import diffusers
import torch
from torch import Tensor

from bench.command import parser, write
from bench.workloads.problems import Problem, difference, digits_problem

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIM", {}),
    "DPM-Solver++ 2M": ("DPMSolverMultistep", {}),
    "PNDM": ("PNDM", {"skip_prk_steps": True}),
    "PNDM, Runge-Kutta": ("PNDM", {"skip_prk_steps": False}),
    "UniPC 2": ("UniPCMultistep", {}),
    "UniPC 3": ("UniPCMultistep", {"solver_order": 3}),
    "DEIS 2": ("DEISMultistep", {}),
    "DEIS 3": ("DEISMultistep", {"solver_order": 3}),
    "DPM-Solver++ 3M": ("DPMSolverMultistep", {"solver_order": 3}),
    "DPM-Solver++ 3S": ("DPMSolverSinglestep", {"solver_order": 3}),
    "LMS 4": ("LMSDiscrete", {}),
    "SASolver": ("SASolver", {}),
}
METHODS = ("srds", "collocation", "parataa", "paradigms")


def own_loop(problem: Problem, steps: int) -> Tensor:
    """The scheduler's own steps, one after another."""
    scheduler, x = copy.deepcopy(problem.scheduler), problem.x
    scheduler.set_timesteps(steps)
    generator = {"generator": torch.Generator().manual_seed(0)} if takes_generator(scheduler) else {}
    for t in scheduler.timesteps:
        m = problem.denoiser(scheduler.scale_model_input(x, t), t.expand(len(x)), **problem.cond)
        x = scheduler.step(m, t, x, **generator, return_dict=False)[0]
    return x


def takes_generator(scheduler: Any) -> bool:
    return "generator" in inspect.signature(scheduler.step).parameters


def row(name: str, problem: Problem, steps: int) -> dict[str, Any]:
    """The figures of a scheduler."""
    cls, config = SCHEDULERS[name]
    scheduler = getattr(diffusers, f"{cls}Scheduler").from_config(problem.scheduler.config, **config)
    problem = problem._replace(scheduler=scheduler, x=problem.x * float(scheduler.init_noise_sigma))
    expected = own_loop(problem, steps)

    def sampled(**settings: Any) -> Any:
        return problem.sampled(steps, generator=torch.Generator().manual_seed(0), **settings)

    def off(**settings: Any) -> float:
        return float((sampled(**settings).sample - expected).abs().max() / expected.abs().max())

    reference = sampled(method="sequential")
    found = {
        "scheduler": name,
        "steps": reference.report.num_inference_steps,
        "state_vectors": reference.report.state_vectors,
        "sequential": float((reference.sample - expected).abs().max() / expected.abs().max()),
        "exact": max(off(method=method, exact=True) for method in METHODS[:2]),
    }
    for method in METHODS:
        ended = sampled(method=method)
        largest = float(difference(ended.sample, reference.sample).max())
        found[method] = {"waves": ended.report.waves, "rows": ended.report.rows, "grey_levels": largest}
    return found


def line(found: dict[str, Any]) -> str:
    """A row of the table."""
    cells = [f"{found['scheduler']} ({found['state_vectors']})", str(found["steps"])]
    cells += [f"{found[name]:.1e}" for name in ("sequential", "exact")]
    cells += ["{waves} / {rows} · {grey_levels:.2f}".format(**found[method]) for method in METHODS]
    return f"| {' | '.join(cells)} |"


def main(arguments: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    found = parser("bench.quality.histories", __doc__)
    found.add_argument("--smoke", action="store_true", help="a tiny size: 6 steps, 1 sample, 3 schedulers")
    options = found.parse_args(arguments)
    steps, samples = (6, 1) if options.smoke else (50, 4)
    names = ("PNDM", "UniPC 2", "SASolver") if options.smoke else tuple(SCHEDULERS)
    _, problem = digits_problem(samples)
    print(f"{problem.name}, {samples} samples\n")
    header = ["scheduler (vectors)", "steps", "sequential", "exact", *METHODS]
    print(f"| {' | '.join(header)} |\n|{' --- |' * len(header)}")
    results = list[dict[str, Any]]()
    for name in names:
        results.append(row(name, problem, steps))
        print(line(results[-1]), flush=True)
        write(options.json, results=results)


if __name__ == "__main__":
    main()
