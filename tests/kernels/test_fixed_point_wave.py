"""A wave of a fixed-point method against its reference."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from definitions import noise_of, randomly, references, scan_by_definition
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from srds_fast.errors import InvalidArgument
from srds_fast.kernels.common.network_input import NetworkInput, guided
from srds_fast.kernels.fixed_point_wave import (
    Memory,
    SweepResult,
    Table,
    bytes_per_element,
    fixed_point_wave,
    mix_kernel,
    operations,
    sweep_kernel,
)
from srds_fast.schedulers.steps import TensorSpec
from srds_fast.solvers.fixed_point import program as sweeps
from srds_fast.solvers.fixed_point.grid import grid_of
from srds_fast.solvers.fixed_point.options import FixedPoint, ParaTAA

torch.set_num_threads(1)
STEPS = 11
FEATURES = ("clip", "momentum", "noise", "scaled")


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
        self.program = sweeps.fixed_point(steps, steps)
        self.network = NetworkInput(network, branches, channels_last)
        self.begins, self.seed = begins and "momentum" in features, seed
        rows = len(self.program.positions[number])
        self.m = self.random(branches * rows, *shape, dtype=network)
        if channels_last and len(shape) == 4:
            self.m = self.m.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, (-1, shape[0]))
        weights = [-1.5, 2.5, 0.25][:branches]
        self.guidance = torch.tensor(weights, dtype=state, device=device) if branches > 1 else None

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return randomly(*shape, seed=self.seed, dtype=dtype or self.state, device=self.device)

    def table(self) -> Table:
        spec = TensorSpec(self.state, self.device, len(self.shape))
        return grid_of(self.noise, self.program, self.options, spec, scaled="scaled" in self.features)[0]

    def memory(self, table: Table) -> Memory:
        draws = self.random(table.num_steps, *self.shape) if "noise" in self.features else None
        carried = self.random(1, *self.shape) if self.begins else None
        memory = Memory(table, self.random(*self.shape), draws, carried)
        memory.lasts += [table.num_steps] * self.number
        for written in (memory.iterates, memory.residuals, memory.m):
            written.copy_(self.random(*written.shape))
        # before the first row nothing moves
        for age in (0, 1):
            memory.iterate(age)[: self.number + 1] = memory.iterate(0)[: self.number + 1]
        return memory

    def run(self, **how: Any) -> tuple[Memory, SweepResult]:
        table = self.table()
        memory = self.memory(table)
        arguments = {"guidance": self.guidance, "network": self.network, "check_stationary": True, **how}
        return memory, fixed_point_wave(table, self.number, memory, self.m, **arguments)

    def both(self, **how: Any) -> list[tuple[Memory, SweepResult]]:
        grid_of.cache_clear()
        found = self.run(**how)
        with references():
            return [found, self.run(**how)]


def assert_right(problem: Problem, **how: Any) -> None:
    (memory, found), (expected_memory, expected) = problem.both(**how)
    first = problem.number
    bound = 2e-10 if problem.state == torch.float64 else 2e-3
    pairs = [(memory.x[first:], expected_memory.x[first:]), (memory.m[first:], expected_memory.m[first:])]
    pairs += [(found.sample, expected.sample), (found.change, expected.change)]
    if problem.options.history:
        pairs.append((memory.residual(1)[first + 1 :], expected_memory.residual(1)[first + 1 :]))
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=bound * max(1.0, float(theirs.abs().max())))
    assert torch.equal(found.stationary, expected.stationary)
    assert memory.lasts == expected_memory.lasts
    assert not memory.tickets.any()
    assert (found.next_input is None) == (expected.next_input is None)
    if found.next_input is not None:
        near = max(bound, 2 * torch.finfo(found.next_input.dtype).eps)
        scale = max(1.0, float(expected.next_input.double().abs().max()))
        how_close: Any = {"rtol": near, "atol": bound * scale, "check_stride": True}
        torch.testing.assert_close(found.next_input, expected.next_input, **how_close)


PROBLEMS = st.fixed_dictionaries(
    {
        "shape": st.builds(
            lambda samples, trailing: (samples, *trailing),
            st.integers(1, 2),
            st.sampled_from([(7,), (300,), (5, 5, 5), (2, 6, 10)]),
        ),
        "options": st.builds(ParaTAA, history=st.integers(0, 5)),
        "number": st.integers(0, STEPS - 1),
        "features": st.sets(st.sampled_from(FEATURES)),
        "begins": st.booleans(),
        "state": st.sampled_from([torch.float32, torch.float64]),
        "network": st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
        "branches": st.integers(1, 3),
        "channels_last": st.booleans(),
        "seed": st.integers(0, 100),
    }
)


@settings(
    max_examples=settings().max_examples // 2,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(PROBLEMS)
def test_equals_reference(device: torch.device, problem: dict[str, Any]) -> None:
    assert_right(Problem(device, **problem))


@pytest.mark.parametrize(
    ("number", "features", "state"),
    [
        (0, FEATURES, torch.float32),
        (0, (), torch.float64),
        (8, FEATURES, torch.float64),
        (8, ("momentum",), torch.float32),
    ],
    ids=str,
)
def test_steps_round_as_the_reference_does(
    device: torch.device, number: int, features: tuple[str, ...], state: torch.dtype
) -> None:
    """To the bit, and with them the first point that moves: it is not mixed."""
    problem = Problem(device, (1, 300), number=number, features=features, state=state, branches=2)
    table = problem.table()
    memory, expected = problem.memory(table), problem.memory(table)
    sweep_kernel.sweep(table, table.sweeps[number], memory, problem.m, problem.guidance)
    expected.m[number:] = guided(problem.m, problem.guidance, state)
    added = operations.additions(table, expected, number, STEPS)
    y, m = expected.x[number:], expected.m[number:]
    points = scan_by_definition(y, m, table.scan.table[number:], added, table.clip)
    assert torch.equal(memory.m[number:], expected.m[number:])
    assert torch.equal(memory.after[number:], torch.cat([y[:1], points]))
    mix_kernel.mix(table, table.sweeps[number], memory, problem.network, False)
    assert torch.equal(memory.x[number + 1], points[0])
    assert not torch.equal(memory.x[number + 1 :], points) or number == 0


@pytest.mark.parametrize(("value", "features"), [(torch.nan, ()), (torch.nan, ("clip",)), (-torch.inf, ("clip",))])
@pytest.mark.parametrize("history", [0, 2])
def test_what_is_not_finite_stays_in_its_sample(
    device: torch.device, history: int, value: float, features: tuple[str, ...]
) -> None:
    problem = Problem(device, (3, 20), ParaTAA(history=history), features=features, branches=2)
    problem.m[1, 1, 5] = value
    (memory, found), (expected_memory, expected) = problem.both()
    assert found.change.isnan().tolist() == expected.change.isnan().tolist() == [False, True, False]
    others = [0, 2]
    torch.testing.assert_close(found.sample[others], expected.sample[others], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(memory.x[2:, others], expected_memory.x[2:, others], rtol=1e-9, atol=1e-9)


def test_many_tiles_and_many_points(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the last program takes at once, of both; and several tiles a program."""
    for name, value in (("BLOCK", 32), ("REDUCED", 64), ("POINTS", 16), ("PROGRAMS", 40)):
        monkeypatch.setattr(mix_kernel, name, value)
    monkeypatch.setitem(sweep_kernel.SWEEP_BLOCK, torch.float64, 64)
    assert_right(Problem(device, (1, 5 * 32 - 5), steps=18))


def test_the_channels_that_a_sampler_wants(device: torch.device) -> None:
    """Of a network that also predicts variances: rows are not contiguous."""
    problem = Problem(device, (2, 3, 4, 5), branches=2)
    wide = problem.random(*problem.m.shape[:2], 6, 4, 5, dtype=torch.float32)
    problem.m = wide[:, :, :3]
    assert_right(problem)


def test_points_may_be_constrained_between_sweep_and_mixing(device: torch.device) -> None:
    def constrain(points: Tensor, first: int) -> Tensor:
        position = torch.arange(first, first + len(points), device=points.device)[:, None, None]
        return torch.where(torch.arange(points.shape[-1], device=points.device) < 3, position.to(points), points)

    assert_right(Problem(device), constrain=constrain)


def test_what_does_not_move_is_stationary(device: torch.device) -> None:
    """The network's answer is always the same: after as many sweeps as there are steps nothing moves."""
    problem = Problem(device, (2, 7), ParaTAA(history=0), number=0, steps=6)
    table = problem.table()
    memory = problem.memory(table)
    memory.lasts.clear()
    sweep = partial(fixed_point_wave, table, 0, memory, problem.m, check_stationary=True)
    seen = [sweep() for _ in range(8)]
    assert not seen[0].stationary.any()
    assert seen[-1].stationary.all()
    assert not seen[-1].change.any()
    assert torch.equal(seen[-1].sample, seen[-2].sample)
    memory.x[3, 1, 2] += 1.0
    assert sweep().stationary.tolist() == [True, False]


def test_two_calls_give_the_same_bits(device: torch.device) -> None:
    problem = Problem(device, (1, 1100), ParaTAA(history=3), state=torch.float32, number=3, steps=6)
    (memory, found), (again, other) = problem.run(), problem.run()
    assert torch.equal(memory.x[3:], again.x[3:])
    assert torch.equal(found.change, other.change)
    assert torch.equal(found.next_input, other.next_input)


def test_arguments_that_do_not_fit_are_named(device: torch.device) -> None:
    problem = Problem(device)
    memory = problem.memory(problem.table())
    for m, weights, says in (
        (torch.zeros(3, 2, 7), None, r"m has shape \(3, 2, 7\)"),
        (problem.m, torch.ones(1), "guidance is torch.float32"),
    ):
        guidance = None if weights is None else weights.to(device)
        with pytest.raises(InvalidArgument, match=says):
            fixed_point_wave(problem.table(), problem.number, memory, m.to(device), guidance=guidance)


def test_bytes() -> None:
    half, single = torch.float16, torch.float32
    assert bytes_per_element(single, half, 0) == 24
    assert bytes_per_element(single, half, 2) == 40 + 12 * 2
    assert bytes_per_element(single, half, 2, branches=2) == bytes_per_element(single, half, 2) + 4
