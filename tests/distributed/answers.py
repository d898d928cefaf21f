"""Checks: several ranks give the sample of one process."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from calls import by_turns
from cancelling import Network
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler
from promises import call_of, stock_of
from ranked import STEPS, apart, check, ended, latents, named, noise, own_gpu, pipeline, rank, sampled
from torch import Tensor, nn

import srds_fast
from srds_fast.planner.choose import choose
from srds_fast.planner.settings import Settings
from srds_fast.solvers.registry import BY_NAME


@check
def every_method() -> Any:
    """Difference to one process, in float64; waves; units."""
    found = {}
    for name in BY_NAME:
        how: dict[str, Any] = {"scheduler": stock_of(name)}
        alone, together = (sampled(**how, **call_of(name, parallel=parallel)) for parallel in (None, "auto"))
        report = together.report
        found[name] = {
            "apart": apart(together.sample, alone.sample),
            "waves": [report.waves, alone.report.waves],
            "ranks": report.ranks,
            "units": report.rank_units,
        }
    return found


class Perceptron(nn.Module):
    """What it rounds to depends on how many rows a call has. split: make calls of as many rows as each rank would."""

    def __init__(self, *, split: bool) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(nn.Linear(8, 96), nn.Tanh(), nn.Linear(96, 8)).requires_grad_(False)
        self.split = split

    def forward(self, x: Tensor, t: Tensor, goal: Tensor | None = None) -> Tensor:
        if not self.split:
            return self._of(x, t, goal)
        parts = [slice(*ends) for ends in shares(len(x))]
        return torch.cat([self._of(x[part], t[part], None if goal is None else goal[part]) for part in parts])

    def _of(self, x: Tensor, t: Tensor, goal: Tensor | None) -> Tensor:
        return self.layers(x if goal is None else x - goal) * (0.5 + t[:, None] / 1000)


def shares(entries: int) -> list[tuple[int, int]]:
    """Where the share of each rank begins and ends; of those that have one."""
    bounds = [math.ceil(entries * number / dist.get_world_size()) for number in range(dist.get_world_size() + 1)]
    return [(begin, end) for begin, end in pairwise(bounds) if end > begin]


@check
def to_the_bit() -> Any:
    """Whether ranks give the bits of one process whose network calls have as many rows; by method and kind of call."""
    found = {}
    for name in BY_NAME:
        for cond in ({}, {"goal": noise(3, torch.float32)}):
            how: dict[str, Any] = {"scheduler": stock_of(name), "cond": cond}
            one, ours = (
                sampled(Perceptron(split=split), noise(dtype=torch.float32), **how, **call_of(name, parallel=parallel))
                for split, parallel in ((True, None), (False, "auto"))
            )
            found[f"sample, {name}, {len(cond)} conditions"] = torch.equal(one.sample, ours.sample)
    pipe, call = pipeline("stable_diffusion")
    whole = type(pipe.unet)

    class InShares(whole):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor, t: Tensor, text: Tensor | None = None, **more: Any) -> Any:
            text = more.pop("encoder_hidden_states") if text is None else text
            t = t.expand(len(x))
            parts = [slice(*ends) for ends in shares(len(x))]
            made = [
                whole.forward(self, x[part], t[part], encoder_hidden_states=text[part], **more)[0] for part in parts
            ]
            return (torch.cat(made),)

    call["num_inference_steps"] = 6
    for name in ("sequential", "srds"):  # a row has two guidance branches
        ours = latents(srds_fast.compile(pipe, method=name, parallel="auto"), call)
        pipe.unet.__class__ = InShares
        try:
            one = srds_fast.compile(pipe, method=name)
            found[f"stable_diffusion, {name}"] = torch.equal(latents(one, call), ours)
        finally:
            pipe.unet.__class__ = whole
        assert one.report.path == "takeover"
    return found


class RoundsOtherwise(Network):
    """On rank 1 each output is a little different, as on another device."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t) * (1 + 1e-12 * rank())


@check
def replicated() -> Any:
    """Of plans whose rows no rank shares: whether the sample has the bits of rank 0 alone; what tells stops; units."""
    found = {}
    for name in BY_NAME:
        plan = choose(STEPS, Settings(method=name), stochastic=False)
        if plan.slides:
            continue
        alone = sampled(Network(), plan=plan)
        ours = sampled(RoundsOtherwise(), plan=replace(plan, replicated=True), parallel="auto")
        report = ours.report
        stops = [report.stopped_by, report.change, report.iterations_per_sample, report.waves, report.ranks]
        found[name] = [torch.equal(ours.sample, alone.sample), stops, report.rank_units]
    return found


@check
def noisy_steps() -> Any:
    found = {}
    for scheduler in (DDPMScheduler(clip_sample=False), EulerAncestralDiscreteScheduler()):
        x = noise() * scheduler.init_noise_sigma
        results, states = [], []
        for parallel in (None, "auto"):
            generator = torch.Generator().manual_seed(5)
            results.append(sampled(x=x, scheduler=scheduler, generator=generator, parallel=parallel).sample)
            states.append(generator.get_state())
        found[type(scheduler).__name__] = [apart(results[1], results[0]), torch.equal(*states)]
    return found


@check
def conditions() -> Any:
    network = nn.Linear(8, 8, dtype=torch.float64).requires_grad_(False)
    for each in network.parameters():
        nn.init.constant_(each, 0.1)

    def denoiser(x: Tensor, t: Tensor, goal: Tensor) -> Tensor:
        return torch.tanh(network(x) - goal) * (t[:, None] / 1000)

    cond = {"goal": noise(3)}
    alone, together = (
        srds_fast.sample(denoiser, noise(), DDIMScheduler(), STEPS, cond=cond, parallel=parallel)
        for parallel in (None, "auto")
    )
    return apart(together.sample, alone.sample)


@check
def the_planner() -> Any:
    """Calls of "auto": the same plan on all ranks, whatever their clocks say."""
    network = Network(seen=lambda: time.sleep(0.001 * (1 + 3 * rank())))
    reports = [sampled(network, method="auto", parallel="auto").report for _ in range(4)]
    return [[each.method, each.plan_state, each.waves, each.rows, each.plan_reason] for each in reports]


@check
def pipelines() -> Any:
    """Difference to the stock call; the path; units of this rank, of all, of the busiest."""
    found = {}
    for name, (guided, labels) in PIPELINES.items():
        pipe, call = pipeline(name)
        call |= {**guided, "num_inference_steps": 6}
        stock = latents(pipe, call)
        for label in labels:
            fast = srds_fast.compile(pipe, parallel="auto", **SETTINGS[label.removeprefix("driven, ")])
            given = {**call, **by_turns(fast)} if label.startswith("driven") else call
            difference = apart(latents(fast, given), stock)
            found[f"{name}, {label}"] = [difference, fast.report.path, fast.report.rank_units, fast.report.waves]
    return found


# one network, several in a turn, and branches by calls of their own; all of them in `every_case`
PIPELINES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "stable_diffusion": ({}, ("sequential", "srds", "driven, collocation")),
    "stable_diffusion_controlnet": ({}, ("driven, sequential",)),
    "flux": ({"true_cfg_scale": 2.0, "negative_prompt": "a dog"}, ("sequential", "driven, sequential")),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "sequential": {"method": "sequential"},
    "srds": {"method": "srds", "exact": True},
    "collocation": {"method": "collocation", "exact": True},
}


@check
def groups() -> Any:
    """Ways to name the ranks."""
    mesh = dist.init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("ring", "time"))
    return {
        "group": sampled(parallel=dist.group.WORLD).report.ranks,
        "mesh": sampled(parallel=mesh).report.ranks,
        "none": sampled(parallel=None).report.ranks,
        "other": ended(lambda: sampled(parallel="all")),
        "unnamed": ended(lambda: sampled(parallel=dist.init_device_mesh("cpu", (1, dist.get_world_size())))),
    }


@named
def every_method_on_gpus() -> Any:
    """Difference to one process, over nccl, a device for each rank."""
    device = own_gpu()
    network = nn.Linear(8, 8).requires_grad_(False).to(device)
    for each in network.parameters():
        nn.init.constant_(each, 0.1)
    x = noise(dtype=torch.float32).to(device)
    found = {}
    for name in BY_NAME:
        how: dict[str, Any] = {"scheduler": stock_of(name)}
        alone, together = (
            sampled(lambda x, t: network(x), x, **how, **call_of(name, parallel=each)) for each in (None, "auto")
        )
        found[name] = apart(together.sample, alone.sample)
    plan = replace(choose(STEPS, Settings(method="srds")), replicated=True)
    alone, together = (sampled(lambda x, t: network(x), x, plan=plan, parallel=each) for each in (None, "auto"))
    return {**found, "srds, replicated": apart(together.sample, alone.sample)}
