"""The loops that bench/policy.py compares: the best sequential one by hand, and those of `srds_fast.sample`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import srds_fast
from srds_fast.planner.choose import choose
from srds_fast.planner.plan import Plan
from srds_fast.planner.settings import Settings
from srds_fast.solvers.fixed_point.options import Collocation
from srds_fast.solvers.method import Options
from srds_fast.telemetry.report import Report

from . import demonstrations
from .rows import PolicyNetwork

NODES = (16, 24)
BY_HAND, SEQUENTIAL = "by hand", "sequential"

Loop = Callable[[Tensor, Tensor], tuple[Tensor, Report | None]]


def by_hand(network: PolicyNetwork, steps: int) -> Loop:
    """The sequential loop that one would write for this policy alone."""
    ddim = demonstrations.scheduler()
    ddim.set_timesteps(steps)
    abar = ddim.alphas_cumprod[ddim.timesteps].double()
    times = ddim.timesteps.to(next(network.parameters()).device)
    after = torch.cat([abar[1:], torch.ones(1, dtype=torch.float64)])
    columns = (1 / abar.sqrt(), -((1 - abar) / abar).sqrt(), after.sqrt(), (1 - after).sqrt())
    numbers = list(zip(times.split(1), *(column.tolist() for column in columns), strict=True))

    @torch.inference_mode()
    def loop(x: Tensor, observation: Tensor) -> tuple[Tensor, None]:
        for t, p, q, a, s in numbers:
            m = network(x, t, observation)
            x0 = torch.add(p * x, m, alpha=q).clamp_(-1.0, 1.0)
            x = torch.add(s * m, x0, alpha=a)
        return x, None

    return loop


def ours(network: PolicyNetwork, steps: int, **settings: Any) -> Loop:
    """A loop of `sample`."""
    ddim = demonstrations.scheduler()

    @torch.no_grad()
    def loop(x: Tensor, observation: Tensor) -> tuple[Tensor, Report]:
        found = srds_fast.sample(network, x, ddim, steps, cond={"observation": observation}, **settings)
        return found.sample, found.report

    return loop


def _planned(steps: int, method: Options) -> Plan:
    return choose(steps, Settings(method=method))


def loops(network: PolicyNetwork, steps: int) -> dict[str, Loop]:
    """All that are compared, by name."""
    return {
        BY_HAND: by_hand(network, steps),
        SEQUENTIAL: ours(network, steps, method="sequential"),
        "srds": ours(network, steps, method="srds"),
        **{
            f"collocation, {nodes} nodes": ours(network, steps, plan=_planned(steps, Collocation(num_nodes=nodes)))
            for nodes in NODES
        },
        "auto": ours(network, steps, method="auto"),
    }


class Case(NamedTuple):
    """One call: starting noise and observation, batch 1."""

    x: Tensor
    observation: Tensor


def cases(count: int) -> list[Case]:
    """Of every round another."""
    generator = torch.Generator().manual_seed(1)
    return [
        Case(
            torch.randn(1, demonstrations.ACTIONS, demonstrations.HORIZON, generator=generator),
            demonstrations.observations(1, generator),
        )
        for _ in range(count)
    ]
