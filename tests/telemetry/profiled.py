"""Calls of every kind, for the tests of ranges. As a program it prints their reports, one JSON object a line."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import tape
import tiny
import torch
from diffusers import DDIMScheduler
from torch import Tensor

import srds_fast
from srds_fast import Report

STEPS = 6
NAMES = (
    "srds",
    "collocation",
    "sequential",
    "lanes",
    "recorded",
    "replayed",
    "widths recorded",
    "widths replayed",
    "driven",
    "stock",
    "sample",
    "short",
    "recorded on",
)
EXACT = {"method": "srds", "num_blocks": 3, "exact": True}


class Linear(torch.nn.Module):
    """A denoiser."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 1e-3 * self.layer(x)


def calls() -> Iterator[Report]:
    """Makes the calls, in the order of `NAMES`; their reports."""
    torch.set_num_threads(1)
    pipe, call = tiny.stable_diffusion(), {**tiny.PIPELINES["stable_diffusion"][1], "num_inference_steps": STEPS}

    def made(times: int = 1, more: dict[str, Any] | None = None, **settings: Any) -> Report:
        fast = srds_fast.compile(pipe, **settings)
        for _ in range(times):
            fast(**call, **(more or {}))
        report: Report = fast.report
        return report

    yield made(**EXACT)
    yield made(method="collocation", tolerance=1e-30, max_iterations=3)
    yield made(method="sequential")
    yield made(**EXACT, overlap="streams")
    fast = srds_fast.compile(pipe, **EXACT, engine="graph")
    for _ in range(2):
        fast(**call)
        yield fast.report
    fast = srds_fast.compile(pipe, **EXACT, engine="network-graphs")
    for _ in range(2):
        fast(**call)
        yield fast.report
    yield made(**EXACT, more={"callback_on_step_end": lambda pipe, step, timestep, given: given})
    yield made(**EXACT, more={"callback": lambda step, timestep, latents: None, "callback_steps": 1})
    layer = Linear()
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    yield srds_fast.sample(layer, x, DDIMScheduler(), STEPS, **EXACT).report
    graphs = srds_fast.Graphs()
    for tolerance in (1e3, 1e-30):
        yield srds_fast.sample(
            layer, x, DDIMScheduler(), STEPS, num_blocks=3, tolerance=tolerance, engine="graph", graphs=graphs
        ).report


def calls_in_threads() -> None:
    """Two in each of three threads at once."""
    layer = Linear()

    def call(seed: int) -> None:
        x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed))
        for _ in range(2):
            srds_fast.sample(layer, x, DDIMScheduler(), STEPS, **EXACT)

    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    tape.install()
    for report in calls():
        print(json.dumps(report.to_dict()))
    calls_in_threads()
