"""Checks: graphs of the network in calls that ranks share, recorded on the CPU by tapes, and on two GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tape
import torch
from answers import Perceptron
from calls import by_turns
from ranked import apart, check, latents, named, noise, own_gpu, pipeline, sampled

import srds_fast
from srds_fast.engine.graphs.recorder import RECORDERS


def called(call: Any) -> list[list[Any]]:
    """Two calls: how far the sample is from that of one process, engine, its reason, replays so far."""
    return [call() for _ in range(2)]


@check
def graphs_of_the_network() -> Any:
    """The denoiser of `sample`; calls of a pipeline that are repeated for rows; turns of its own loop."""
    tape.install()
    try:
        found = {f"graph, {name}": called(case("graph")) for name, case in CASES.items()}
        return {**found, "network-graphs, sample": called(of_sample("network-graphs"))}
    finally:
        del RECORDERS["cpu"]


@check
def graphs_without_a_share() -> Any:
    """Rows of one unit, one after another: rank 0 has them all."""
    tape.install()
    try:
        graphs = srds_fast.Graphs()
        how = {"method": "sequential", "engine": "graph", "graphs": graphs, "parallel": "auto"}
        for _ in range(2):
            report = sampled(Perceptron(split=False).double(), noise()[:1], **how).report
    finally:
        del RECORDERS["cpu"]
    return [report.engine, report.engine_reason or ""]


ENGINES = ("graph", "network-graphs")


def of_sample(engine: str) -> Any:
    graphs, network = srds_fast.Graphs(), Perceptron(split=False).double()
    expected = sampled(network, method="srds").sample

    def call() -> list[Any]:
        found = sampled(network, method="srds", engine=engine, graphs=graphs, parallel="auto")
        return told(apart(found.sample, expected), found.report, graphs.stats)

    return call


def of_pipeline(engine: str, more: Callable[[Any], dict[str, Any]] = lambda pipe: {}) -> Any:
    pipe, arguments = pipeline("stable_diffusion")
    arguments = {**arguments, "num_inference_steps": 6, **more(pipe)}
    expected = latents(pipe, arguments)
    fast = srds_fast.compile(pipe, method="srds", exact=True, engine=engine, parallel="auto")

    def call() -> list[Any]:
        return told(apart(latents(fast, arguments), expected), fast.report, fast.graphs)

    return call


def told(difference: float, report: srds_fast.Report, stats: Any) -> list[Any]:
    return [difference, report.engine, report.engine_reason or "", stats.replayed]


CASES = {
    "sample": of_sample,
    "recorded calls": of_pipeline,
    "its own turns": lambda engine: of_pipeline(engine, by_turns),
}


@named
def graphs_on_gpus() -> Any:
    """As `of_sample`, a device for each rank; by engine."""
    return {engine: called(of_gpu(engine, own_gpu())) for engine in ENGINES}


def of_gpu(engine: str, device: torch.device) -> Any:
    graphs, network = srds_fast.Graphs(), Perceptron(split=False).to(device)
    x = noise(dtype=torch.float32).to(device)
    expected = sampled(network, x, method="srds").sample

    def call() -> list[Any]:
        found = sampled(network, x, method="srds", engine=engine, graphs=graphs, parallel="auto")
        return told(apart(found.sample, expected), found.report, graphs.stats)

    return call
