"""A wave of a fixed-point method: against its reference, sweep by sweep and in whole runs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from srds_fast import program
from srds_fast.errors import InvalidArgument
from srds_fast.kernels import dispatch
from srds_fast.kernels import fixed_point_wave as package
from srds_fast.kernels.fixed_point_wave import Memory, Refined, Table, bytes_per_element, fixed_point_wave, kernel
from srds_fast.kernels.wave_update import NetworkInput
from srds_fast.methods import Collocation, FixedPoint, ParaTAA
from srds_fast.noise import NoiseTable, noise_table
from srds_fast.solvers import fixed_point as core
from srds_fast.solvers.core import Evaluate, Extras
from srds_fast.solvers.grid import grid_of
from srds_fast.steps import Like

torch.set_num_threads(1)
STEPS = 14
FEATURES = ("clip", "momentum", "noise", "scaled")


@contextmanager
def references() -> Iterator[None]:
    """Within it no kernel runs, those that a reference would call included."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "interpreted", lambda: False)
        patch.setenv("SRDS_FAST_KERNELS", "torch")
        grid_of.cache_clear()
        yield
    grid_of.cache_clear()


def randomly(*shape: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def noise_of(num_steps: int, features: Any) -> NoiseTable:
    """Of steps that do all this."""
    scheduler = DDIMScheduler(clip_sample="clip" in features)
    scheduler.set_timesteps(num_steps)
    noise = noise_table(scheduler)
    numbers = torch.rand(3, num_steps, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if "momentum" in features:
        noise = replace(noise, momentum=0.5 * numbers[0])
    if "noise" in features:
        noise = replace(noise, spread=numbers[1])
    if "scaled" in features:
        noise = replace(noise, input_scale=0.5 + numbers[2])
    return noise


class Problem:
    """A sweep in the middle of a run whose memory holds random numbers; the same numbers whoever asks."""

    def __init__(
        self,
        device: torch.device,
        shape: tuple[int, ...] = (2, 7),
        options: FixedPoint | None = None,
        number: int = 1,
        *,
        features: Any = (),
        state: torch.dtype = torch.float64,
        network: torch.dtype = torch.float32,
        branches: int = 1,
        channels_last: bool = False,
        steps: int = STEPS,
        begins: bool = False,
        seed: int = 0,
    ) -> None:
        self.device, self.shape, self.number, self.features, self.state = device, shape, number, features, state
        self.options = options or ParaTAA()
        self.noise = noise_of(steps, features)
        self.program = program.fixed_point(steps, steps, self.options.num_nodes)
        self.network = NetworkInput(network, branches, channels_last)
        self.begins, self.seed = begins, seed
        rows = len(self.program.positions[number])
        self.m = self.random(branches * rows, *shape, dtype=network)
        if channels_last and len(shape) == 4:
            self.m = self.m.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, (-1, shape[0]))
        weights = [-1.5, 2.5, 0.25][:branches]
        self.guidance = torch.tensor(weights, dtype=state, device=device) if branches > 1 else None

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return randomly(*shape, seed=self.seed, dtype=dtype or self.state, device=self.device)

    def table(self) -> Table:
        like = Like(self.state, self.device, len(self.shape))
        return grid_of(self.noise, self.program, self.options, like, scaled="scaled" in self.features).table

    def memory(self, table: Table) -> Memory:
        draws = self.random(table.num_steps, *self.shape) if "noise" in self.features else None
        x0_prev = self.random(*self.shape) if self.begins else None
        memory = Memory(table, self.random(*self.shape), draws, x0_prev)
        memory.lasts += [table.num_steps] * self.number
        for written in (memory.iterates, memory.residuals, memory.m):
            written.copy_(self.random(*written.shape))
        # before the first row nothing moves
        for age in (0, 1):
            memory.iterate(age)[: self.number + 1] = memory.iterate(0)[: self.number + 1]
        return memory

    def run(self, change: Any = lambda memory: None, **how: Any) -> tuple[Memory, Refined]:
        table = self.table()
        memory = self.memory(table)
        change(memory)
        arguments = {"guidance": self.guidance, "network": self.network, "watch": True, **how}
        return memory, fixed_point_wave(table, self.number, memory, self.m, **arguments)

    def both(self, change: Any = lambda memory: None, **how: Any) -> list[tuple[Memory, Refined]]:
        grid_of.cache_clear()
        found = self.run(change, **how)
        with references():
            return [found, self.run(change, **how)]


def assert_right(problem: Problem, **how: Any) -> None:
    (memory, found), (expected_memory, expected) = problem.both(**how)
    first = problem.number
    pairs = {
        "points": (memory.x[first:], expected_memory.x[first:]),
        "outputs": (memory.m[first:], expected_memory.m[first:]),
        "sample": (found.sample, expected.sample),
        "change": (found.change, expected.change),
    }
    if problem.options.history:
        pairs["residuals"] = memory.residual(1)[first + 1 :], expected_memory.residual(1)[first + 1 :]
    bound = 2e-10 if problem.state == torch.float64 else 2e-3
    for name, (ours, theirs) in pairs.items():
        assert ours.dtype == theirs.dtype == problem.state
        scale = max(1.0, float(theirs.abs().max()))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=bound * scale, msg=lambda text, name=name: name + text)
    assert torch.equal(found.still, expected.still)
    assert memory.lasts == expected_memory.lasts
    assert not memory.tickets.counts.any()
    assert (found.entering is None) == (expected.entering is None)
    if found.entering is not None:
        assert found.entering.dtype == expected.entering.dtype
        assert found.entering.stride() == expected.entering.stride()
        near = max(bound, 2 * torch.finfo(found.entering.dtype).eps)
        scale = max(1.0, float(expected.entering.double().abs().max()))
        torch.testing.assert_close(found.entering.double(), expected.entering.double(), rtol=near, atol=bound * scale)


def test_a_kernel_runs(device: torch.device) -> None:
    """The rest of this file means nothing otherwise."""
    assert dispatch.implementation(device) != "torch"


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    nodes = draw(st.sampled_from([None, 5, 6, 9]))
    history = draw(st.integers(0, 3))
    trailing = draw(st.sampled_from([(7,), (300,), (5, 5, 5), (2, 6, 10)]))
    features = draw(st.sets(st.sampled_from(FEATURES)))
    number = draw(st.integers(0, STEPS - 1))
    return {
        "shape": (draw(st.integers(1, 2)), *trailing),
        "options": ParaTAA(history=history) if nodes is None else Collocation(history=history, num_nodes=nodes),
        "number": number,
        "features": features,
        "begins": "momentum" in features and draw(st.booleans()),
        "state": draw(st.sampled_from([torch.float32, torch.float64])),
        "network": draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])),
        "branches": draw(st.integers(1, 3)),
        "channels_last": draw(st.booleans()),
        "seed": draw(st.integers(0, 100)),
    }


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(problems())
def test_equals_reference(device: torch.device, problem: dict[str, Any]) -> None:
    assert_right(Problem(device, **problem))
