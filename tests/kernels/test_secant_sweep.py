"""A secant sweep against its reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from definitions import noise_of, randomly, references
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from srds_fast.errors import InvalidArgument
from srds_fast.kernels.common.network_input import NetworkInput, guided
from srds_fast.kernels.secant_sweep import (
    LOCAL,
    Memory,
    SecantTable,
    SweepResult,
    bytes_per_element,
    launches,
    learn_kernel,
    secant_sweep,
    sizes,
    walk_kernel,
)
from srds_fast.schedulers.steps import TensorSpec
from srds_fast.solvers.collocation.nodes import FULL_FROM, secant_sweeps
from srds_fast.solvers.collocation.table import secant_table

torch.set_num_threads(1)
STEPS = 12
FEATURES = ("clip", "momentum", "noise", "scaled")
FULL = FULL_FROM + 1


class Problem:
    """A sweep in the middle of a run whose memory holds random numbers; the same numbers whoever asks."""

    def __init__(
        self,
        device: torch.device,
        shape: tuple[int, ...] = (2, 7),
        number: int = 3,
        *,
        history: int = 2,
        nodes: int = 6,
        features: Any = (),
        state: torch.dtype = torch.float64,
        network: torch.dtype = torch.float32,
        branches: int = 1,
        channels_last: bool = False,
        steps: int = STEPS,
        begins: bool = False,
        seed: int = 0,
    ) -> None:
        self.device, self.shape, self.number, self.history, self.state = device, shape, number, history, state
        self.features, self.seed, self.begins = features, seed, begins and "momentum" in features
        noise = noise_of(steps, features)
        self.program = secant_sweeps(steps, steps, nodes, 1)
        spec = TensorSpec(state, device, len(shape))
        self.table: SecantTable = secant_table(
            noise, self.program, "auto", history, 1e-2, spec, scaled="scaled" in features
        )
        self.network = NetworkInput(network, branches, channels_last)
        self.m = self.random(branches * len(self.program.positions[number]), *shape, dtype=network)
        if channels_last and len(shape) == 4:
            self.m = self.m.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, (-1, shape[0]))
        weights = [-1.5, 2.5, 0.25][:branches]
        self.guidance = torch.tensor(weights, dtype=state, device=device) if branches > 1 else None

    def random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return randomly(*shape, seed=self.seed, dtype=dtype or self.state, device=self.device)

    def memory(self) -> Memory:
        table, number = self.table, self.number
        draws = self.random(table.num_steps, *self.shape) if "noise" in self.features else None
        memory = Memory(table, self.random(*self.shape), draws, self.random(1, *self.shape) if self.begins else None)
        memory.sweeps = number
        for written in (memory.iterates, memory.outputs, memory.expected, memory.doubts):
            written.copy_(self.random(*written.shape))
        memory.doubts.abs_()
        # before the first row nothing moves, nor has it in the last sweep
        memory.expected[:number] = 0.0
        memory.doubts[:number] = 0.0
        return memory

    def run(self, **how: Any) -> tuple[Memory, SweepResult]:
        memory = self.memory()
        arguments = {"guidance": self.guidance, "network": self.network, "check_stationary": True}
        return memory, secant_sweep(self.table, self.number, memory, self.m, **{**arguments, **how})

    def both(self, **how: Any) -> list[tuple[Memory, SweepResult]]:
        found = self.run(**how)
        with references():
            return [found, self.run(**how)]


def assert_right(problem: Problem, **how: Any) -> None:
    def written(memory: Memory, found: SweepResult) -> list[Tensor]:
        """From the first row on: what lies before it is not read again."""
        outputs = [memory.output(age) for age in range(1, problem.history + 2)]
        of_points = [each[problem.number :] for each in (memory.points(0), memory.expected, memory.doubts, *outputs)]
        return [*of_points, found.sample, found.change, found.doubt]

    (memory, found), (expected_memory, expected) = problem.both(**how)
    bound = 1e-9 if problem.state == torch.float64 else 5e-3
    for ours, theirs in zip(written(memory, found), written(expected_memory, expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=bound * max(1.0, float(theirs.abs().max())))
    assert torch.equal(found.stationary, expected.stationary)
    assert memory.sweeps == expected_memory.sweeps
    assert (found.next_input is None) == (expected.next_input is None)
    if found.next_input is not None:
        near = max(bound, 2 * torch.finfo(found.next_input.dtype).eps)
        scale = max(1.0, float(expected.next_input.double().abs().max()))
        how_close: Any = {"rtol": near, "atol": near * scale, "check_stride": True}
        torch.testing.assert_close(found.next_input, expected.next_input, **how_close)


PROBLEMS = st.fixed_dictionaries(
    {
        "shape": st.builds(
            lambda samples, trailing: (samples, *trailing),
            st.integers(1, 2),
            st.sampled_from([(7,), (300,), (5, 5, 5), (2, 6, 10)]),
        ),
        "history": st.integers(0, 5),
        "number": st.integers(0, STEPS - 1),
        "nodes": st.sampled_from([5, 6, 9]),
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
    ("history", "features"), [(0, FEATURES), (1, ()), (2, FEATURES), (5, ("clip",))], ids=["0", "1", "2", "5"]
)
def test_samples_that_several_programs_share(
    device: torch.device, history: int, features: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One launch a step; each program takes two tiles, the last one fewer."""
    monkeypatch.setattr(sizes, "MOST_WARPS", 1)
    monkeypatch.setattr(sizes, "MOST_PARTS", 2)
    size = sizes.sharing(1, torch.float64, history).block
    problem = Problem(device, (2, 3 * size - 5), 2, history=history, features=features, steps=6, nodes=5)
    assert sizes.sharing(3 * size - 5, torch.float64, history)[2:] == (2, 2)
    assert_right(problem)


def test_large_samples_in_single_precision_and_channels_last(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sizes, "MOST_WARPS", 0)
    kinds: dict[str, Any] = {"state": torch.float32, "network": torch.float16, "channels_last": True}
    assert_right(Problem(device, (1, 3, 10, 11), 2, branches=2, steps=6, nodes=5, features=("momentum",), **kinds))


@pytest.mark.parametrize("features", [(), FEATURES], ids=["plain", "everything"])
@pytest.mark.parametrize("number", [0, FULL])
def test_waves_of_all_points(device: torch.device, number: int, features: tuple[str, ...]) -> None:
    """And the first wave, in which all rows are nodes."""
    assert_right(Problem(device, (2, 20), number, features=features, nodes=STEPS, begins=True))


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("features", [(), FEATURES], ids=["plain", "everything"])
def test_the_first_step_is_the_schedulers_to_the_bit(
    device: torch.device, features: tuple[str, ...], large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It departs from a point that does not move; rows are the network's outputs to the bit, or their weighted sum."""
    if large:
        monkeypatch.setattr(sizes, "MOST_WARPS", 0)
    problem = Problem(
        device, (1, 300), features=features, branches=2, steps=8, state=torch.float32, network=torch.float32
    )
    (memory, _), (expected, _) = problem.both()
    first, rows = problem.number, problem.table.rows[problem.number]
    assert torch.equal(memory.points(0)[first : first + 2], expected.points(0)[first : first + 2])
    assert torch.equal(memory.output(1)[rows], guided(problem.m, problem.guidance, torch.float32))
    assert not bool(memory.expected[first].any())


def test_what_the_kernel_reads_of_nodes_is_the_interpolation(device: torch.device) -> None:
    table = Problem(device, steps=40, nodes=9).table
    sparse = [wave for wave in table.waves.values() if wave.interpolation is not None]
    assert len(sparse) == FULL_FROM
    for wave in sparse:
        between, (places, weights) = wave.interpolation, wave.around
        assert between is not None
        behind = between.first - wave.first
        for number, dense in enumerate((between.weights, between.doubt)):
            found = torch.zeros(len(dense), len(wave.positions), dtype=dense.dtype, device=device)
            local = weights[behind:, number * LOCAL : (number + 1) * LOCAL]
            found.scatter_add_(1, places[behind:, 2 : 2 + LOCAL].long(), local)
            assert torch.equal(found[:, between.nodes], dense)
        rows, positions = places[behind:, 2 : 2 + LOCAL].long(), places[behind:, 2 + LOCAL :].long()
        assert torch.equal(wave.positions[rows], positions)
        assert not bool(weights[:behind].any())
        asked = places[:, 0] >= 0
        assert torch.equal(wave.first + asked.nonzero()[:, 0], wave.positions)
        assert torch.equal(places[asked, 0].long(), torch.arange(len(wave.positions), device=device))
        assert torch.equal(wave.first + places[:, 1].nonzero()[:, 0], wave.new_positions)


@pytest.mark.parametrize(("value", "features"), [(torch.nan, ()), (-torch.inf, ("clip",))])
@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_what_is_not_finite_stays_in_its_sample(
    device: torch.device, large: bool, value: float, features: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    if large:
        monkeypatch.setattr(sizes, "MOST_WARPS", 0)
    problem = Problem(device, (3, 150), features=features, branches=2, steps=6, nodes=5)
    problem.m[1, 1, 5] = value
    (memory, found), (expected_memory, expected) = problem.both()
    assert found.change.isnan().tolist() == expected.change.isnan().tolist() == [False, True, False]
    others, first = [0, 2], problem.number
    torch.testing.assert_close(found.sample[others], expected.sample[others], rtol=1e-9, atol=1e-9)
    ours, theirs = (each.points(0)[first:, others] for each in (memory, expected_memory))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_points_that_are_not_finite_spoil_none_before_them(device: torch.device) -> None:
    problem = Problem(device, (1, 10), 2, history=3, steps=6, nodes=6)
    memory = problem.memory()
    for age in range(3):
        memory.points(age)[4:] = torch.inf
    secant_sweep(problem.table, 2, memory, problem.m)
    assert bool(memory.points(0)[2:5].isfinite().all())
    assert not bool(memory.points(0)[6].isfinite().any())


def test_a_point_that_has_not_moved_has_learnt_nothing(device: torch.device) -> None:
    """The response is then the expected one: what differs from it in the outputs has no movement to belong to."""
    moved, still = Problem(device, history=3), Problem(device, history=3)
    memory = still.memory()
    memory.iterates[:] = memory.points(0).clone()
    secant_sweep(still.table, 3, memory, still.m)
    without = Problem(device, history=0)
    plain = without.memory()
    plain.points(0).copy_(moved.memory().points(0))
    for each, theirs in ((plain.output(1), still.memory().output(1)), (plain.expected, still.memory().expected)):
        each.copy_(theirs)
    secant_sweep(without.table, 3, plain, without.m)
    assert torch.equal(memory.points(0)[3:], plain.points(0)[3:])


def test_what_does_not_move_is_stationary(device: torch.device) -> None:
    """The network's answer is always the same: after as many sweeps as there are steps nothing moves."""
    problem = Problem(device, (2, 7), 0, history=1, steps=5, nodes=5)
    memory = problem.memory()
    seen = []
    for _ in range(7):
        seen.append(secant_sweep(problem.table, 0, memory, problem.m, check_stationary=True))
    assert not seen[0].stationary.any()
    assert bool(seen[-1].stationary.all())
    assert not seen[-1].change.any()
    assert torch.equal(seen[-1].sample, seen[-2].sample)
    memory.points(0)[3, 1, 2] += 1.0
    assert secant_sweep(problem.table, 0, memory, problem.m, check_stationary=True).stationary.tolist() == [True, False]


def test_nothing_is_stationary_that_was_interpolated(device: torch.device) -> None:
    problem = Problem(device, (1, 7), 0, history=0, steps=20, nodes=5)
    memory = problem.memory()
    seen = [secant_sweep(problem.table, 0, memory, problem.m, check_stationary=True) for _ in range(3)]
    assert not any(bool(each.stationary.any()) for each in seen)


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_two_calls_give_the_same_bits(device: torch.device, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a sample those that it has alone."""
    if large:
        monkeypatch.setattr(sizes, "MOST_WARPS", 0)
    problem = Problem(device, (2, 200), history=3, state=torch.float32, number=3, steps=6, nodes=5)
    (memory, found), (again, other) = problem.run(), problem.run()
    assert torch.equal(memory.points(0)[3:], again.points(0)[3:])
    assert torch.equal(found.change, other.change)
    assert torch.equal(found.next_input, other.next_input)
    alone = problem.memory()
    alone.keep(torch.tensor([1], device=device))
    told = secant_sweep(problem.table, 3, alone, problem.m[:, 1:2], network=problem.network)
    assert torch.equal(told.sample, found.sample[1:2])
    assert torch.equal(told.change, found.change[1:2])
    assert torch.equal(alone.expected[3:, 0], memory.expected[3:, 1])


def test_the_channels_that_a_sampler_wants(device: torch.device) -> None:
    """Of a network that also predicts variances: rows are not contiguous."""
    problem = Problem(device, (2, 3, 4, 5), branches=2, steps=6, nodes=5)
    wide = problem.random(*problem.m.shape[:2], 6, 4, 5, dtype=torch.float32)
    problem.m = wide[:, :, :3]
    assert_right(problem)


def test_a_constraint_is_met_by_the_reference(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(device, steps=6, nodes=5)
    monkeypatch.setattr(walk_kernel, "secant_sweep", None)
    memory, _ = problem.run(constrain=lambda states, position: torch.full_like(states, position))
    assert [float(each.mean()) for each in memory.points(0)[4:]] == [4.0, 5.0, 6.0]


def test_arguments_that_do_not_fit_are_named(device: torch.device) -> None:
    problem = Problem(device)
    memory = problem.memory()
    for m, weights, says in (
        (torch.zeros(3, 2, 7), None, r"m has shape \(3, 2, 7\)"),
        (problem.m, torch.ones(1), "guidance is torch.float32"),
    ):
        guidance = None if weights is None else weights.to(device)
        with pytest.raises(InvalidArgument, match=says):
            secant_sweep(problem.table, problem.number, memory, m.to(device), guidance=guidance)


def test_launches_and_bytes(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many launches as are counted."""
    launched = []

    def counted(module: Any, name: str) -> None:
        kernel = getattr(module, name)

        class Counted:
            def __getitem__(self, grid: Any) -> Any:
                launched.append(name)
                return kernel[grid]

        monkeypatch.setattr(module, name, Counted())

    for name in ("_learn", "_solve"):
        counted(learn_kernel, name)
    for name in ("_walk", "_step", "_end"):
        counted(walk_kernel, name)
    for elements, steps in ((7, 5), (2000, 5)):
        launched.clear()
        problem = Problem(device, (1, elements), 1, history=1, steps=steps + 1, nodes=5)
        problem.run()
        assert len(launched) == launches(steps, elements, torch.float64, 1)
    half, single = torch.float16, torch.float32
    assert bytes_per_element(single, half, 0) == 28 + 4
    assert bytes_per_element(single, half, 2) == 60 + 4
    assert bytes_per_element(single, half, 2, branches=2) == bytes_per_element(single, half, 2) + 4


def test_sharing() -> None:
    """A latent is shared by programs of a warp, a video by few enough that each can add up what all have summed."""
    single = torch.float32
    assert sizes.sharing(28, single, 2) == (256, 1, 1, 1)
    assert sizes.sharing(2048, single, 2) == (2048, 8, 1, 1)
    assert sizes.sharing(4 * 64 * 64, single, 2) == (256, 1, 64, 1)
    block, _, parts, tiles = sizes.sharing(16 * 21 * 60 * 104, single, 5)
    assert parts <= sizes.MOST_PARTS
    assert block * parts * tiles >= 16 * 21 * 60 * 104 > block * (parts - 1) * tiles
