"""The bundled robot policy: does it do its task as well with every method, and how long does it take to decide?

    python -m bench.quality.policy --json bench/results/policy.json

Two measurements, of every method at its defaults. Success: episodes of the push task, each with a seed of its own; the
interval is Wilson's, of 95 %. "more" is the interval of the share less that of the first of the methods, the sequential
sampler, in points (Newcombe's, of 95 %, for independent episodes), and "other end" counts the episodes that end
otherwise. Speculative sampling takes other samples of the same law: there only the shares compare.
Calls: the policy decides for states that it meets in its episodes, one robot at a time, all methods in turn on the same
state and noise; "max" and "mean" are of the differences between its actions and those of the stock loop. A step of the
pusher is at most 0.08 long, and the disc has arrived within 0.05 of the goal.

The file is written after every method. An interrupted run goes on with --resume.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

import srds_fast
from bench.command import parser, revision, write
from bench.runner import AUTO, SEQUENTIAL
from bench.speed.timing import reason, timed
from bench.workloads.networks import DEVICE
from bench.workloads.problems import states_met
from srds_fast import Report, zoo
from srds_fast.cli.output import show_table
from srds_fast.zoo.push_policy import PushPolicy

from .intervals import apart, percent, wilson

STOCK = "stock"
METHODS = (SEQUENTIAL, AUTO, "collocation", "srds", "parataa", "speculative")
SCHEDULERS = {"DDPM": DDPMScheduler, "DDIM": DDIMScheduler}
# episodes that run at once; not those of "auto", which is asked what is fastest for one robot
TOGETHER = 50
# calls before the timed ones: "auto" times plans in the first three
WARM_UP = 5
Row = dict[str, Any]


class Decider:
    """One way to sample the policy.

    Attributes:
        reports: of every call; the stock loop makes none.
    """

    def __init__(self, policy: PushPolicy, scheduler: Any, steps: int, method: str) -> None:
        self.policy, self.scheduler, self.steps, self.method = policy, scheduler, steps, method
        self.reports: list[Report] = []

    def trajectory(self, noise: Tensor, observation: Tensor, generators: list[torch.Generator]) -> Tensor:
        """See `srds_fast.zoo.push_policy.Sampler`."""
        policy = self.policy
        if self.method == STOCK:
            policy.noise_scheduler, policy.num_inference_steps = self.scheduler, self.steps
            return policy.conditional_sample(len(noise), observation.flatten(1), generators, noise)
        given = {"cond": {"observation": observation}, "generator": generators, "method": self.method}
        found = srds_fast.sample(policy.denoiser, noise, self.scheduler, self.steps, **given)
        self.reports.append(found.report)
        return found.sample

    def actions(self, observation: Tensor, number: int) -> Tensor:
        """For one robot, [n_action_steps, 2]; the noise is that of the call of this number."""
        generator, config = torch.Generator().manual_seed(number), self.policy.config
        noise = torch.randn(1, config.horizon, config.action_dim, generator=generator).to(DEVICE)
        return self.policy.chunk(self.trajectory(noise, observation, [generator]))[0]


def called(deciders: Sequence[Decider], states: Sequence[Tensor]) -> dict[str, Row]:
    """Seconds, work and differences of every method, by its name; the first is what the others are compared with."""
    seconds: dict[str, list[float]] = {each.method: [] for each in deciders}
    errors: dict[str, list[Tensor]] = {each.method: [] for each in deciders}
    for each in deciders:
        for number in range(WARM_UP):
            each.actions(states[number % len(states)], number)
        each.reports.clear()
    for number, state in enumerate(states):
        expected = None
        for each in deciders:
            took, found = timed(partial(each.actions, state, number))
            expected = found if expected is None else expected
            seconds[each.method].append(took)
            errors[each.method].append((found - expected).abs())
    return {each.method: _row(each, seconds, errors, deciders[0].method) for each in deciders}


def _row(each: Decider, seconds: dict[str, list[float]], errors: dict[str, list[Tensor]], first: str) -> Row:
    mine, off = seconds[each.method], torch.stack(errors[each.method])
    return {
        "seconds": statistics.median(mine),
        "slowest": max(mine),
        "over_stock": statistics.median(a / b for a, b in zip(seconds[first], mine, strict=True)),
        "max_difference": float(off.max()),
        "mean_difference": float(off.mean()),
        "waves": statistics.mean(report.waves for report in each.reports) if each.reports else each.steps,
        "rows": statistics.mean(report.rows for report in each.reports) if each.reports else each.steps,
        "ran": each.reports[-1].method if each.reports else STOCK,
    }


def ended(decider: Decider, episodes: int) -> list[bool]:
    """Whether each episode succeeded."""
    at_once = 1 if decider.method == AUTO else TOGETHER
    seeds = (range(first, min(first + at_once, episodes)) for first in range(0, episodes, at_once))
    return [task.succeeded for part in seeds for task in decider.policy.episodes(part, decider.trajectory)]


def succeeded(ends: list[bool], sequential: list[bool]) -> Row:
    lower, upper = wilson(sum(ends), len(ends))
    failed = [seed for seed, end in enumerate(ends) if not end]
    other = sum(one != another for one, another in zip(ends, sequential, strict=True))
    counts = {"successes": sum(ends), "episodes": len(ends), "lower": lower, "upper": upper}
    return {**counts, "failed_seeds": failed, "other_end": other}


def unfinished(path: Path | None, about: Row) -> list[Row]:
    """The rows that an interrupted run has written, if it was of the same commit, steps and seeds; else none."""
    if path is None or not path.is_file():
        return []
    found = json.loads(path.read_text())
    same = about["commit"] and not about["commit"].endswith("-dirty") and about.items() <= found.items()
    return list(found["results"]) if same else []


def _try(function: Callable[[], Any]) -> tuple[Any, str | None]:
    try:
        return function(), None
    except srds_fast.SrdsFastError as error:  # a method that is not for this scheduler
        return None, reason(error)


def main(arguments: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    found = parser("bench.quality.policy", __doc__)
    found.add_argument("--steps", type=int, default=100)
    found.add_argument("--episodes", type=int, default=100, help="seeds 0 and up")
    found.add_argument("--calls", type=int, default=20, help="timed calls of every method")
    found.add_argument("--schedulers", nargs="+", choices=SCHEDULERS, default=list(SCHEDULERS))
    found.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="beside the stock loop")
    found.add_argument("--resume", action="store_true", help="keep what --json has of this very commit")
    options = found.parse_args(arguments)
    about = {"commit": revision(Path.cwd()), "steps": options.steps, "seeds": [0, options.episodes]}
    about |= {"device": str(DEVICE), "threads": torch.get_num_threads()}
    rows = unfinished(options.json, about) if options.resume else []
    policy = zoo.load("policy").to(DEVICE)
    for name in options.schedulers:
        scheduler = SCHEDULERS[name].from_config(policy.noise_scheduler.config)
        done = {row["method"]: row for row in rows if row["scheduler"] == name}
        stock = Decider(policy, scheduler, options.steps, STOCK)
        others = [Decider(policy, scheduler, options.steps, each) for each in options.methods if each not in done]
        states = states_met(policy, stock.trajectory, options.calls)
        failed = {each.method: _try(partial(each.actions, states[0], 0))[1] for each in others}
        calls = called([stock, *(each for each in others if failed[each.method] is None)], states) if others else {}
        sequential = _ends(done[SEQUENTIAL]) if SEQUENTIAL in done else []
        for each in others if STOCK in done else (stock, *others):
            row: Row = {"scheduler": name, "method": each.method, "left_out": failed.get(each.method)}
            if row["left_out"] is None:
                row |= calls[each.method]
                if each is not stock:
                    ends = ended(each, options.episodes)
                    sequential = sequential or ends
                    row |= succeeded(ends, sequential)
            rows.append(row)
            write(options.json, **about, results=rows)
        show(rows, name, options.steps)


def _ends(row: Row) -> list[bool]:
    """What `ended` has returned for a row."""
    return [seed not in row["failed_seeds"] for seed in range(row["episodes"])]


def show(rows: Sequence[Row], scheduler: str, steps: int) -> None:
    """Print the methods that ran with a scheduler, and why others did not."""
    here = [row for row in rows if row["scheduler"] == scheduler]
    first = next((row for row in here if "successes" in row), {})
    show_table(
        [_cells(row, first) for row in here if row["left_out"] is None],
        text=("method", "success", "95 %", "more"),
        title=f"\npush task, {scheduler}, N = {steps}",
    )
    for row in here:
        if row["left_out"] is not None:
            print(f"left out: {row['method']}: {row['left_out']}")


def _cells(row: Row, first: Row) -> dict[str, object]:
    """first: the row whose share of successes the others are compared with."""
    done = "successes" in row
    more = None
    if done and row is not first:
        counts = ((row[name], first[name]) for name in ("successes", "episodes"))
        more = percent(apart(*counts), signed=True)
    return {
        "method": row["method"] if row["method"] == row["ran"] else f"{row['method']} ran {row['ran']}",
        "success": f"{row['successes']} of {row['episodes']}" if done else None,
        "95 %": percent((row["lower"], row["upper"])) if done else None,
        "more": more,
        "other end": row["other_end"] if done else None,
        "max": f"{row['max_difference']:.2g}",
        "mean": f"{row['mean_difference']:.2g}",
        "waves": f"{row['waves']:.1f}",
        "rows": f"{row['rows']:.0f}",
        "ms": f"{1e3 * row['seconds']:.0f}",
        "x stock": row["over_stock"],
    }


if __name__ == "__main__":
    main()
