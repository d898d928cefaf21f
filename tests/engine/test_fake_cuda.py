"""The stretch that is captured, on a device that is not the CPU: what tests on the CPU alone cannot see.

In place of a CUDA device stands torch's "meta" device: its tensors have no memory, and every build has it. (Fake
tensors of a CUDA device cannot be indexed in a build without CUDA.) Everything but the waves is done beforehand, as the
eager run before a capture does it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, UNet2DModel
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

import srds_fast
from srds_fast.engine.graphs import network_graphs
from srds_fast.engine.graphs.capturable import Capturable
from srds_fast.engine.graphs.capture_checks import CaptureCheck, tensors_in
from srds_fast.engine.graphs.loop_graph import LoopGraph
from srds_fast.engine.graphs.network_graphs import NetworkGraphs
from srds_fast.errors import CaptureFailed
from srds_fast.pipelines.lockstep.loop import LockstepLoop
from srds_fast.solvers import wave_table

DEVICE = torch.device("meta")
STEPS = 6
KINDS = ["loop graph", "network graphs"]


class Watch(CaptureCheck):
    """A guard that also notes what touches the CPU at all."""

    def __init__(self) -> None:
        super().__init__()
        self.on_host: list[str] = []

    def execute(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = super().execute(func, args, kwargs)
        if any(tensor.device != DEVICE for tensor in tensors_in((args, kwargs, out))):
            self.on_host.append(str(func))
        return out


class Once:
    """Stands for a graph; it is not replayed."""

    def replay(self) -> None:
        raise AssertionError("there is nothing to replay")


class Recorder:
    """Runs what is to be recorded, under guards that are kept."""

    def __init__(self) -> None:
        self.guards: list[Watch] = []

    def record(self, work: Callable[[CaptureCheck], Any]) -> tuple[Once, Watch, Any]:
        guard = Watch()
        self.guards.append(guard)
        with guard:
            return Once(), guard, work(guard)


@pytest.fixture(autouse=True)
def _no_tables_of_the_device_are_kept() -> Iterator[None]:
    wave_table.compiled.cache_clear()
    yield
    wave_table.compiled.cache_clear()


def capturable(pipe: Any, call: dict[str, Any], monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Capturable:
    """What a call on the CPU would have recorded."""
    made: list[LockstepLoop] = []
    begin = LockstepLoop.__init__

    def watched(self: LockstepLoop, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        made.append(self)

    with monkeypatch.context() as patch:
        patch.setattr(LockstepLoop, "__init__", watched)
        fast = srds_fast.compile(pipe, engine="eager", **{"method": "srds", **settings})
        fast(**call, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0))
    assert fast.report.path == "takeover"
    network = made[0].samples.network
    assert network is not None
    assert made[0].run is not None
    return network.capturable(made[0].run.plan, made[0].run.program)


def on_device(call: Capturable) -> Capturable:
    """The call on the device, after what the eager run before a capture does."""
    for network in call.calls.networks:
        network.to(DEVICE)
    here = replace(
        call,
        inputs={name: tensor.to(DEVICE) for name, tensor in call.inputs.items()},
        calls=replace(call.calls, device=DEVICE),
    )
    core, _ = here.begin(here.inputs, False)
    next(core)  # the eager run makes the tables
    return here


@torch.no_grad()
def record_loop(call: Capturable) -> tuple[LoopGraph, list[Watch]]:
    """All stretches of a call on the device."""
    recorder = Recorder()
    captured = LoopGraph(on_device(call), recorder)
    captured.extend_to(call.checkpoints)
    return captured, recorder.guards


@torch.no_grad()
def record_network(call: Capturable) -> list[Watch]:
    """The network call of every width, with the arguments that an eager run gives it, on the device."""
    recorder = Recorder()
    for network in call.calls.networks:
        network.to(DEVICE)
    graphs = NetworkGraphs(replace(call.calls, device=DEVICE))

    def graphed(function: Any, name: Any) -> Any:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            leaves, structure = tree_flatten((args, kwargs))
            here = [leaf.to(DEVICE) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            made = graphs._record(function, here, structure)
            return tree_unflatten(made.outputs, made.structure)

        return recorded

    evaluate = call.through(graphed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network_graphs, "recorder", lambda device: recorder)
        for width in call.widths:
            evaluate(call.wave_of_zeros(width))
    return recorder.guards


def check_loop(captured: LoopGraph, guards: list[Watch], num_waves: int) -> None:
    numbers = [number for stretch in captured._stretches for number in stretch.waves]
    assert numbers == list(range(num_waves))
    assert len(captured._stretches) == captured.checkpoints
    assert captured.operations > 100
    check(guards)


def check(guards: list[Watch]) -> None:
    assert any(guard.read_by_network for guard in guards)
    for guard in guards:
        assert guard.on_host == []
        assert {tensor.device for tensor in guard.read.values()} == {DEVICE}


def check_kind(call: Capturable, kind: str) -> None:
    if kind == "loop graph":
        check_loop(*record_loop(call), len(call.program))
    else:
        guards = record_network(call)
        assert len(guards) >= len(call.widths)
        check(guards)


FEW = ("stable_diffusion", "flux", "ddpm")
MORE = ("stable_diffusion_xl", "stable_diffusion_3", "pixart", "dit", "ddim")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*FEW, *(pytest.param(name, marks=pytest.mark.exhaustive) for name in MORE)])
def test_the_waves_need_nothing_of_the_host(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No wait, no copy from or to it, no tensor of it, from checkpoint to checkpoint, solver and network."""
    build, arguments = tiny.PIPELINES[name]
    call = capturable(build(), arguments, monkeypatch, num_blocks=3, max_iterations=1)
    check_kind(call, kind)


SETTINGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sequential": (None, {"method": "sequential"}),
    "exact": (None, {"exact": True, "num_blocks": 3}),
    "few rows": (None, {"max_rows": 2, "num_blocks": 3}),
    "unscaled, first order": (DDIMScheduler(**tiny.SD_NOISE), {"coarse_solver": "ddim", "num_blocks": 3}),
    "noise of every step": (EulerAncestralDiscreteScheduler(**tiny.SD_BETAS), {"num_blocks": 3}),
    "two steps back": (DPMSolverMultistepScheduler(**tiny.SD_BETAS), {"num_blocks": 3}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SETTINGS)
def test_nor_do_those_of_other_plans(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two prompts, on the pixel pipeline whose network is small."""
    scheduler, settings = SETTINGS[name]
    call = capturable(tiny.ddpm(scheduler), {"output_type": "pt", "batch_size": 2}, monkeypatch, **settings)
    check_kind(call, kind)


@pytest.mark.parametrize("method", ["srds", "parataa"])
def test_every_kernel_is_launched_before_it_is_recorded(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of waves that the run before did not come to."""
    call = capturable(tiny.ddim(), {"output_type": "pt"}, monkeypatch, method=method, tolerance=1e9)
    begun: list[Any] = []

    def begin(inputs: Any, beside: bool) -> Any:
        begun.append(call.begin(inputs, beside))
        return begun[-1]

    captured, _ = record_loop(replace(call, begin=begin))
    _, (recorded, _), (rehearsed, _) = begun  # the first is of the test
    assert captured._core is recorded
    assert rehearsed.gi_frame is None


# what a network does first with its sample
NEEDS: list[tuple[Callable[[Any, Tensor], Tensor], str]] = [
    (lambda net, sample: sample * torch.ones(3, 1, 1).to(DEVICE), "_to_copy.*copies between cpu and meta"),
    (lambda net, sample: sample * torch.ones(()), "mul.*copies between cpu and meta"),
    (lambda net, sample: sample * float(sample.amax()), "makes the host wait"),
    (lambda net, sample: sample * net.table[0].numpy().item(), "numpy has the host read"),
    (lambda net, sample: sample * torch.tensor([2.0], device=DEVICE), "makes a tensor from Python numbers"),
    (lambda net, sample: sample + torch.randn_like(sample), "draws random numbers"),
    (lambda net, sample: sample * ELSEWHERE, r"reads a tensor of shape \(1,\)"),
]
ELSEWHERE = torch.ones(1, device=DEVICE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("change", "why"), NEEDS, ids=["copy", "number", "wait", "table", "numbers", "draw", "outside"]
)
def test_a_network_that_needs_more_than_its_tensors_is_refused(
    change: Callable[[Any, Tensor], Tensor], why: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a real device would refuse it, or freeze what it found."""

    class Changed(UNet2DModel):
        def forward(self, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().forward(change(self, sample), *args, **kwargs)

    call = capturable(tiny.ddim(), {"output_type": "pt"}, monkeypatch, num_blocks=3, max_iterations=1)
    (network,) = call.calls.networks
    network.__class__ = Changed
    network.table = torch.ones(2)
    with pytest.raises(CaptureFailed, match=why):
        check_kind(call, kind)
