"""The stretch that is captured, on a device that is not the CPU: what tests on the CPU alone cannot see.

In place of a CUDA device stands torch's "meta" device: its tensors have no memory, and every build has it. (Fake tensors
of a CUDA device cannot be indexed in a build without CUDA.) Everything but the waves is done beforehand, as the eager
run before a capture does it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler
from torch import Tensor, nn

import srds_fast
from srds_fast.engine.graph import Capturable, Captured, LoopGraph
from srds_fast.engine.guard import Guard, tensors_in
from srds_fast.engine.wave_graphs import WaveGraphs
from srds_fast.errors import CaptureFailed
from srds_fast.solvers import waves
from srds_fast.takeover import Takeover

DEVICE = torch.device("meta")
STEPS = 6
KINDS = {"loop graph": LoopGraph, "wave graphs": WaveGraphs}


class Watch(Guard):
    """A guard that also notes what touches the CPU at all."""

    def __init__(self) -> None:
        super().__init__()
        self.on_host: list[str] = []

    def after(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        if any(tensor.device != DEVICE for tensor in tensors_in((args, kwargs, out))):
            self.on_host.append(str(func))


class Once:
    """Stands for a graph; it is not replayed."""

    def replay(self) -> None:
        raise AssertionError("there is nothing to replay")

    def reset(self) -> None:
        pass


class Recorder:
    """Runs what is to be recorded, under guards that are kept."""

    name = "fake"

    def __init__(self) -> None:
        self.guards: list[Watch] = []

    def record(self, work: Callable[[Guard], Any]) -> tuple[Once, Any]:
        guard = Watch()
        self.guards.append(guard)
        with guard:
            return Once(), work(guard)


@pytest.fixture(autouse=True)
def _no_tables_of_the_device_are_kept() -> Iterator[None]:
    waves._updates.cache_clear()
    yield
    waves._updates.cache_clear()


def capturable(pipe: Any, call: dict[str, Any], monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Capturable:
    """What a call on the CPU would have recorded."""
    made: list[Takeover] = []
    begin = Takeover.__init__

    def watched(self: Takeover, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        made.append(self)

    with monkeypatch.context() as patch:
        patch.setattr(Takeover, "__init__", watched)
        fast = srds_fast.compile(pipe, engine="eager", **settings)
        fast(**call, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0))
    assert fast.report.path == "takeover"
    found, reason = made[0]._capturable()
    assert reason is None
    assert found is not None
    return found


def record(call: Capturable, kind: str) -> tuple[Captured, list[Watch]]:
    """All stretches of a call on the device."""
    recorder = Recorder()
    for network in call.networks:
        network.to(DEVICE)
    with torch.no_grad():
        here = replace(call, inputs={name: tensor.to(DEVICE) for name, tensor in call.inputs.items()})
        # the eager run before a capture makes the tables
        core, _ = here.begin(here.inputs)
        next(core)
        captured = KINDS[kind](here, recorder)
        captured.extend_to(call.checkpoints)
    return captured, recorder.guards


def check(captured: Captured, guards: list[Watch], num_waves: int) -> None:
    numbers = [number for stretch in captured._stretches for piece in stretch.pieces for _, number in piece.waves]
    assert numbers == list(range(num_waves))
    assert len(captured._stretches) == captured.checkpoints
    assert captured.operations > 100
    assert any(guard.read_by_network for guard in guards)
    for guard in guards:
        assert guard.on_host == []
        assert {tensor.device for tensor in guard.read} == {DEVICE}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux", "pixart", "dit", "ddim", "ddpm"]
)
def test_the_waves_need_nothing_of_the_host(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No wait, no copy from or to it, no tensor of it, from checkpoint to checkpoint, solver and network."""
    build, arguments = tiny.PIPELINES[name]
    call = capturable(build(), arguments, monkeypatch, num_blocks=3, max_iterations=1)
    check(*record(call, kind), call.num_waves)
