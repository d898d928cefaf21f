"""Whole runs of the solvers through the kernels, against the same runs through the references."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from definitions import randomly, references
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from problems import scheduler
from torch import Tensor

import srds_fast
from srds_fast.kernels.wave_update import NetworkInput, kernel
from srds_fast.schedulers.verify import noise_table
from srds_fast.solvers import program
from srds_fast.solvers.collocation.options import Collocation
from srds_fast.solvers.contract import Checkpoint, Core, Evaluate, SolverInputs, Trajectory
from srds_fast.solvers.fixed_point.options import ParaTAA
from srds_fast.solvers.method import Method
from srds_fast.solvers.srds import srds

torch.set_num_threads(1)
STEPS = 7
SCHEDULERS = {
    "ddim": scheduler(),
    "ddim clipped": DDIMScheduler(),
    "ddim sample, clipped": DDIMScheduler(prediction_type="sample"),
    "ddim eta": scheduler(),
    "ddim clipped, eta": DDIMScheduler(),
    "ddpm": DDPMScheduler(),
    "dpm++ 2m": DPMSolverMultistepScheduler(),
    "euler": EulerDiscreteScheduler(),
    "euler ancestral": EulerAncestralDiscreteScheduler(),
    "flow": FlowMatchEulerDiscreteScheduler(),
}
METHODS: dict[str, dict[str, Any]] = {
    "sequential": {"method": "sequential"},
    "exact": {"method": "srds", "exact": True},
    "srds": {"method": "srds", "tolerance": 1e-4},
    "three differences": {"method": ParaTAA(history=3), "max_iterations": 3},
    "not mixed": {"method": ParaTAA(history=0), "max_iterations": 3},
    "parataa": {"method": ParaTAA(), "max_iterations": 3},
    "secants": {"method": Collocation(num_nodes=5), "max_iterations": 5},
    "five secants": {"method": Collocation(num_nodes=5, history=5, cover=2), "max_iterations": 6},
    "responses, exact": {"method": Collocation(num_nodes=5, history=0), "exact": True},
    "picard": {"method": ParaTAA(history=0, data_std=None), "max_iterations": 3},
}


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("ddim clipped", "sequential"),
        ("ddim sample, clipped", "picard"),
        ("ddpm", "srds"),
        ("euler ancestral", "exact"),
        ("dpm++ 2m", "exact"),
        ("dpm++ 2m", "srds"),
        ("ddim eta", "srds"),
        ("euler", "srds"),
        ("ddim", "three differences"),
        ("ddim clipped, eta", "parataa"),
        ("dpm++ 2m", "parataa"),
        ("flow", "not mixed"),
        ("ddim", "secants"),
        ("ddim clipped, eta", "secants"),
        ("dpm++ 2m", "five secants"),
        ("euler ancestral", "secants"),
        ("flow", "responses, exact"),
    ],
)
def test_a_whole_run_is_that_of_the_references(
    name: str, method: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, eta = SCHEDULERS[name], float(name.endswith("eta"))
    stock.set_timesteps(STEPS)
    x = randomly(2, 12, seed=1, device=device) * float(getattr(stock, "init_noise_sigma", 1.0))
    curve = 1 + 2 * randomly(1, 12, seed=2, device=device).abs()
    launches = []
    launch = kernel.wave_update_kernel

    class Counted:
        def __getitem__(self, grid: Any) -> Any:
            launches.append(grid)
            return launch[grid]

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(curve * x) * (0.5 + t.to(x)[:, None] / 2000)

    def sample() -> srds_fast.SampleResult:
        generator = torch.Generator().manual_seed(0)
        return srds_fast.sample(denoiser, x, stock, STEPS, eta=eta, generator=generator, **METHODS[method])

    monkeypatch.setattr(kernel, "wave_update_kernel", Counted())
    found = sample()
    assert found.report.kernels != "torch"
    of_blocks = method in ("sequential", "exact", "srds")
    assert len(launches) == (found.report.waves + 1 if of_blocks else 0), "one a wave, and one before the first"
    with references():
        expected = sample()
    assert len(launches) == (found.report.waves + 1 if of_blocks else 0)
    scale = max(1.0, float(expected.sample.abs().max()))
    torch.testing.assert_close(found.sample, expected.sample, rtol=1e-7, atol=1e-7 * scale)
    assert found.report.iterations_per_sample == expected.report.iterations_per_sample
    assert (found.report.waves, found.report.rows) == (expected.report.waves, expected.report.rows)
    change, wanted = ([each for all_samples in run.report.change for each in all_samples] for run in (found, expected))
    assert [each is None for each in change] == [each is None for each in wanted]
    assert [each or 0.0 for each in change] == pytest.approx([each or 0.0 for each in wanted], rel=1e-6, abs=1e-9)


def seen_of(core: Core, running: dict[int, tuple[int, ...]], network: NetworkInput) -> list[Tensor]:
    """All that a core asks for and returns; running: after these iterations only these samples go on."""
    seen: list[Tensor] = []
    answer: Any = None
    while True:
        try:
            event = core.send(answer)
        except StopIteration as stop:
            return [*seen, stop.value]
        if isinstance(event, Evaluate):
            assert event.x.dtype == (network.dtype or torch.float64)
            assert not network.channels_last or event.x[0].is_contiguous(memory_format=torch.channels_last)
            seen.append(event.x.double())
            answer = torch.tanh(event.x)
        else:
            assert isinstance(event, Checkpoint)
            seen += [event.sample, *([] if event.change is None else [event.change])]
            answer = running.get(event.iteration)


@pytest.mark.parametrize(
    ("options", "max_rows"),
    [(None, None), (ParaTAA(), 3), (ParaTAA(), None), (Collocation(num_nodes=5), 3)],
    ids=["srds", "narrow", "parataa", "secants"],
)
def test_samples_leave_and_the_rest_goes_on(device: torch.device, options: Method | None, max_rows: int | None) -> None:
    """With two branches, in waves that are too wide, in half precision and channels last, from a guess."""
    stock = DDIMScheduler()
    stock.set_timesteps(8)
    noise = noise_table(stock)
    network = NetworkInput(torch.float16, 2, channels_last=True)
    x, guess = (randomly(*shape, 3, 2, 3, 3, seed=1, device=device) for shape in ((), (9,)))
    guidance = torch.tensor([-0.5, 1.5], dtype=torch.float64, device=device)
    common = SolverInputs(network=network, scaled=True, guidance=guidance, initial_guess=guess if options else None)

    def run() -> list[Tensor]:
        inputs = replace(common, trajectory=Trajectory(8))
        if options is None:
            core = srds(x, noise, program.srds(8, 4, 4), inputs=inputs)
        else:
            waves = options.program(8, 5, max_rows=max_rows, bitwise=False).limited_to(max_rows)
            core = options.core(x, noise, waves, inputs, bitwise=False)
        seen = seen_of(core, {2: (0, 2), 4: (1,)}, network)
        assert inputs.trajectory is not None
        return seen + [each for each in (*inputs.trajectory.x, *inputs.trajectory.carried) if each is not None]

    found = run()
    with references():
        expected = run()
    for ours, theirs in zip(found, expected, strict=True):
        # a half-precision row may fall to the other side
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)
