"""A wave of a fixed-point method: against its reference, sweep by sweep and in whole runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from definitions import randomly, scan_by_definition, thinned
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import srds_fast
from srds_fast.errors import InvalidArgument
from srds_fast.kernels.common import dispatch
from srds_fast.kernels.common.network_input import NetworkInput
from srds_fast.kernels.fixed_point_wave import (
    LOCAL,
    Memory,
    SweepResult,
    Table,
    bytes_per_element,
    fixed_point_wave,
    mix_kernel,
    operations,
    reference,
    sweep_kernel,
    walk,
)
from srds_fast.schedulers.steps import TensorSpec
from srds_fast.schedulers.table import NoiseTable
from srds_fast.schedulers.verify import noise_table
from srds_fast.solvers.contract import Evaluate, SolverInputs
from srds_fast.solvers.fixed_point import program as sweeps
from srds_fast.solvers.fixed_point.grid import grid_of, interpolation
from srds_fast.solvers.fixed_point.options import Collocation, FixedPoint, ParaTAA
from srds_fast.solvers.fixed_point.solver import fixed_point

torch.set_num_threads(1)
STEPS = 11
FEATURES = ("clip", "momentum", "noise", "scaled")


@contextmanager
def references() -> Iterator[None]:
    """Within it no kernel runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "interpreted", lambda: False)
        patch.setenv("SRDS_FAST_KERNELS", "torch")
        grid_of.cache_clear()
        yield
    grid_of.cache_clear()


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
        self.program = sweeps.fixed_point(steps, steps, self.options.num_nodes)
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
        spec = TensorSpec(self.state, self.device, len(self.shape))
        return grid_of(self.noise, self.program, self.options, spec, scaled="scaled" in self.features).table

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

    def run(self, change: Any = lambda memory: None, **how: Any) -> tuple[Memory, SweepResult]:
        table = self.table()
        memory = self.memory(table)
        change(memory)
        arguments = {"guidance": self.guidance, "network": self.network, "check_stationary": True, **how}
        return memory, fixed_point_wave(table, self.number, memory, self.m, **arguments)

    def both(self, change: Any = lambda memory: None, **how: Any) -> list[tuple[Memory, SweepResult]]:
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
    assert torch.equal(found.stationary, expected.stationary)
    assert memory.lasts == expected_memory.lasts
    assert not memory.tickets.any()
    assert (found.next_input is None) == (expected.next_input is None)
    if found.next_input is not None:
        assert found.next_input.dtype == expected.next_input.dtype
        assert found.next_input.stride() == expected.next_input.stride()
        near = max(bound, 2 * torch.finfo(found.next_input.dtype).eps)
        scale = max(1.0, float(expected.next_input.double().abs().max()))
        torch.testing.assert_close(
            found.next_input.double(), expected.next_input.double(), rtol=near, atol=bound * scale
        )


def test_a_kernel_runs(device: torch.device) -> None:
    """The rest of this file means nothing otherwise."""
    assert dispatch.implementation(device) != "torch"


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    nodes = draw(st.sampled_from([None, 5, 6, 9]))
    history = draw(st.integers(0, 5))
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


RANDOM = settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


@RANDOM
@given(problems())
def test_equals_reference(device: torch.device, problem: dict[str, Any]) -> None:
    assert_right(Problem(device, **problem))


@pytest.mark.exhaustive
@settings(RANDOM, max_examples=100)
@given(problems())
def test_equals_reference_in_many_cases(device: torch.device, problem: dict[str, Any]) -> None:
    assert_right(Problem(device, **problem))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(5, 12), st.booleans())
def test_what_a_sweep_walks_along_is_the_interpolation(left: int, num_nodes: int, between: bool) -> None:
    positions = sweeps.nodes(3, 3 + left, num_nodes, between=between)
    if len(positions) == left:
        return
    way = -torch.arange(3 + left, dtype=torch.float64)
    dense = interpolation(way[list(positions)], way[3:])
    rows, weights = walk(positions, dense)
    around = list(range(LOCAL))
    for point, (row, comes, position) in enumerate(rows.tolist()):
        if comes >= 0:
            around = [*around[1:], comes]
            # not yet written over by what is learnt
            assert position == positions[comes] > point + 3
        assert row == (positions.index(point + 3) if point + 3 in positions else -1)
        assert torch.equal(weights[point], dense[point, around])
        assert int((dense[point] != 0).sum()) == int((weights[point] != 0).sum())


@pytest.mark.parametrize("nodes", [2, 3])
def test_fewer_nodes_than_a_cubic_takes(device: torch.device, nodes: int) -> None:
    positions = tuple(range(0, 2 * nodes, 2))
    way = -torch.arange(9, dtype=torch.float64)
    dense = interpolation(way[list(positions)], way)
    rows, weights = walk(positions, dense)
    assert (rows[:, 1:] == -1).all()
    assert torch.equal(weights[:, :nodes], dense)
    assert (weights[:, nodes:] == 0).all()
    problem = Problem(device, (2, 300), Collocation(num_nodes=5), steps=9)
    table, memory = problem.table(), None
    wave = table.sweeps[0]._replace(
        first=0,
        last=positions[-1],
        positions=torch.tensor(positions, device=device),
        weights=dense.to(device),
        walk=walk(positions, dense).to(device, torch.float64),
    )
    found = []
    for sweep in (sweep_kernel.sweep, reference.sweep):
        memory = problem.memory(table)
        sweep(table, wave, memory, problem.random(nodes, 2, 300), None)
        found += [memory.m, memory.after]
    for ours, theirs in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("number", "features", "state"),
    thinned(
        list(product((0, 8), ((), FEATURES, *((each,) for each in FEATURES[:3])), (torch.float32, torch.float64))),
        (0, FEATURES, torch.float32),
        (0, (), torch.float64),
        (8, FEATURES, torch.float64),
        (8, ("momentum",), torch.float32),
    ),
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
    expected.m[number:] = operations.guided(problem.m, problem.guidance, state)
    added = operations.additions(table, expected, number, STEPS)
    y, m = expected.x[number:], expected.m[number:]
    points = scan_by_definition(y, m, table.scan.table[number:], added, table.clip)
    assert torch.equal(memory.m[number:], expected.m[number:])
    assert torch.equal(memory.after[number:], torch.cat([y[:1], points]))
    mix_kernel.mix(table, table.sweeps[number], memory, problem.network, False)
    assert torch.equal(memory.x[number + 1], points[0])
    assert not torch.equal(memory.x[number + 1 :], points) or number == 0


@pytest.mark.parametrize("history", [0, 2])
@pytest.mark.parametrize("nodes", [None, 6])
def test_nan_stays_in_its_sample(device: torch.device, nodes: int | None, history: int) -> None:
    options = ParaTAA(history=history) if nodes is None else Collocation(num_nodes=nodes, history=history)
    problem = Problem(device, (3, 20), options, branches=2)
    problem.m[1, 1, 5] = torch.nan
    (memory, found), (expected_memory, expected) = problem.both()
    for tensor, theirs in ((found.change, expected.change), (found.stationary, expected.stationary)):
        assert torch.equal(tensor.isnan(), theirs.isnan())
    assert found.change.isnan().tolist() == [False, True, False]
    others = [0, 2]
    assert found.sample[others].isfinite().all()
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
    for nodes in (None, 5):
        options = ParaTAA(history=0) if nodes is None else Collocation(num_nodes=nodes, history=0)
        problem = Problem(device, (2, 7), options, number=0, steps=6)
        table = problem.table()
        memory = problem.memory(table)
        memory.lasts.clear()
        sweep = partial(fixed_point_wave, table, 0, memory, problem.m, check_stationary=True)
        seen = [sweep() for _ in range(8 if nodes is None else 1)]
        assert not seen[0].stationary.any()
        assert fixed_point_wave(table, 0, memory, problem.m).stationary is None
        if nodes is None:
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


# scheduler, eta, how the network speaks
SAMPLERS: dict[str, tuple[Any, float]] = {
    "ddim": (DDIMScheduler(clip_sample=False), 0.0),
    "clip, noise": (DDIMScheduler(), 1.0),
    "ddpm": (DDPMScheduler(), 0.0),
    "dpm": (DPMSolverMultistepScheduler(), 0.0),
    "ancestral": (EulerAncestralDiscreteScheduler(), 0.0),
    "flow": (FlowMatchEulerDiscreteScheduler(), 0.0),
}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ddim", Collocation(num_nodes=5, history=3)),
        ("clip, noise", ParaTAA()),
        pytest.param("ddpm", Collocation(num_nodes=5), marks=pytest.mark.exhaustive),
        ("dpm", ParaTAA()),
        pytest.param("ancestral", ParaTAA(history=0, data_std=None), marks=pytest.mark.exhaustive),
        ("flow", Collocation(num_nodes=5, history=0)),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_a_whole_run_is_that_of_the_references(device: torch.device, name: str, options: FixedPoint) -> None:
    stock, eta = SAMPLERS[name]
    steps, shape = 7, (2, 12)
    stock.set_timesteps(steps)
    x = randomly(*shape, seed=1, dtype=torch.float64, device=device) * float(getattr(stock, "init_noise_sigma", 1.0))
    curve = 1 + 2 * randomly(1, 12, seed=2, dtype=torch.float64, device=device).abs()

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(curve * x) * (0.5 + t.to(x)[:, None] / 2000)

    def result() -> Any:
        generator = torch.Generator().manual_seed(0)
        how = {"method": options, "eta": eta, "generator": generator, "max_iterations": 3}
        return srds_fast.sample(denoiser, x, stock, steps, **how)

    found = result()
    assert found.report.kernels != "torch"
    with references():
        expected = result()
    torch.testing.assert_close(found.sample, expected.sample, rtol=1e-7, atol=1e-7)
    assert found.report.iterations_per_sample == expected.report.iterations_per_sample
    assert found.report.rows == expected.report.rows


@pytest.mark.parametrize(
    ("options", "max_rows"), [(Collocation(num_nodes=5), 3), (ParaTAA(), None)], ids=["collocation", "parataa"]
)
def test_a_run_from_a_guess_of_which_samples_leave(
    device: torch.device, options: FixedPoint, max_rows: int | None
) -> None:
    """With two branches, in waves that are too wide, in half precision and channels last."""
    noise = noise_of(7, ("scaled",))
    whole = sweeps.fixed_point(7, 5, options.num_nodes)
    waves = whole.limited_to(max_rows)
    network = NetworkInput(torch.float16, 2, channels_last=True)
    x = randomly(3, 2, 3, 3, seed=1, dtype=torch.float64, device=device)
    guess = randomly(8, 3, 2, 3, 3, seed=2, dtype=torch.float64, device=device)
    guidance = torch.tensor([-0.5, 1.5], dtype=torch.float64, device=device)

    def run() -> list[Tensor]:
        seen: list[Tensor] = []
        inputs = SolverInputs(network=network, scaled=True, guidance=guidance, initial_guess=guess)
        sweeps, answer = fixed_point(x, noise, waves, options, inputs), None
        try:
            while True:
                event = sweeps.send(answer)
                if isinstance(event, Evaluate):
                    assert event.x.dtype == torch.float16
                    assert event.x[0].is_contiguous(memory_format=torch.channels_last)
                    seen.append(event.x.double())
                    answer = torch.tanh(event.x)
                else:
                    seen += [event.sample, event.change]
                    answer = {2: (0, 2), 4: (1,)}.get(event.iteration)
        except StopIteration as stop:
            return [*seen, stop.value]

    found = run()
    with references():
        expected = run()
    for ours, theirs in zip(found, expected, strict=True):
        # a half-precision row may fall to the other side
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"m": torch.zeros(3, 2, 7)}, r"m has shape \(3, 2, 7\)"),
        ({"m": torch.zeros(STEPS - 1, 2, 7, dtype=torch.int32)}, "m is torch.int32"),
        ({"guidance": torch.ones(1)}, "guidance is torch.float32"),
        ({"guidance": torch.ones(4, dtype=torch.float64)}, r"guidance has shape \(4,\)"),
        ({"guidance": torch.ones(2, 2, dtype=torch.float64)}, r"guidance has shape \(2, 2\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments_that_do_not_fit_are_named(device: torch.device, change: dict[str, Tensor], says: str) -> None:
    problem = Problem(device)
    table = problem.table()
    arguments = {"m": problem.m, **{name: tensor.to(device) for name, tensor in change.items()}}
    with pytest.raises(InvalidArgument, match=says):
        fixed_point_wave(table, problem.number, problem.memory(table), arguments.pop("m"), **arguments)


def test_bytes() -> None:
    # sweep: x, m, the point, the output; products: 4; mixing: 3 + 1 + 2, and three written
    half, single = torch.float16, torch.float32
    assert bytes_per_element(single, half, 0) == 3 * 4 + 2 + 2 * 4 + 2
    assert bytes_per_element(single, half, 2) == 3 * 4 + 2 + 4 * 4 + 6 * 4 + 2 * 4 + 2
    assert bytes_per_element(single, half, 2, branches=2) == bytes_per_element(single, half, 2) + 4
