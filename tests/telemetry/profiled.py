"""Calls of every kind, for the tests of ranges. As a program it prints their reports, one JSON object a line."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
    *("srds", "collocation", "sequential", "lanes", "recorded", "replayed", "widths recorded", "widths replayed"),
    *("driven at first", "driven", "stock", "sample", "short", "recorded on"),
)
EXACT = {"method": "srds", "num_blocks": 3, "exact": True}


def network() -> Any:
    layer = torch.nn.Linear(4, 4)
    return lambda x, t: 1e-3 * layer(x)


def noise(seed: int) -> Tensor:
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed))


def calls() -> Iterator[Report]:
    """Makes the calls, in the order of `NAMES`; their reports."""
    torch.set_num_threads(1)
    pipe, call = tiny.stable_diffusion(), {**tiny.PIPELINES["stable_diffusion"][1], "num_inference_steps": STEPS}

    def made(times: int = 1, more: dict[str, Any] | None = None, **settings: Any) -> Iterator[Report]:
        fast = srds_fast.compile(pipe, **settings)
        for _ in range(times):
            fast(**call, **(more or {}))
            yield fast.report

    yield from made(**EXACT)
    yield from made(method="collocation", tolerance=1e-30, max_iterations=3)
    yield from made(method="sequential")
    yield from made(**EXACT, overlap="streams")
    yield from made(2, **EXACT, engine="graph")
    yield from made(2, **EXACT, engine="network-graphs")
    yield from made(2, **EXACT, more={"guidance_rescale": 0.5})
    yield from made(**EXACT, more={"callback": lambda step, timestep, latents: None, "callback_steps": 1})
    layer, graphs = network(), srds_fast.Graphs()
    yield srds_fast.sample(layer, noise(0), DDIMScheduler(), STEPS, **EXACT).report
    for tolerance in (1e3, 1e-30):
        how = {"num_blocks": 3, "tolerance": tolerance, "engine": "graph", "graphs": graphs}
        yield srds_fast.sample(layer, noise(0), DDIMScheduler(), STEPS, **how).report


def calls_in_threads() -> None:
    """Two in each of three threads at once."""
    layer, gate = network(), threading.Barrier(3)

    def call(seed: int) -> None:
        gate.wait()
        for _ in range(2):
            srds_fast.sample(layer, noise(seed), DDIMScheduler(), STEPS, **EXACT)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(call, range(3)))


if __name__ == "__main__":
    tape.install()
    for report in calls():
        print(json.dumps(report.to_dict()))
    calls_in_threads()
