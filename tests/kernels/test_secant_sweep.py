"""A secant sweep against its reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from definitions import noise_of, randomly, references
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from srds_fast.kernels.common.network_input import NetworkInput
from srds_fast.kernels.secant_sweep import (
    Memory,
    SecantTable,
    SweepResult,
    secant_sweep,
    sizes,
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
        memory = Memory(table, self.random(*self.shape), draws, self.random(*self.shape) if self.begins else None)
        memory.sweeps = number
        for written in (memory.iterates, memory.outputs, memory.expected, memory.doubts, memory.found):
            written.copy_(self.random(*written.shape))
        memory.doubts.abs_()
        memory.found.abs_()
        # before the first row nothing moves, nor has it in the last sweep
        memory.expected[:number] = 0.0
        memory.doubts[:number] = 0.0
        return memory

    def run(self, **how: Any) -> tuple[Memory, SweepResult]:
        memory = self.memory()
        arguments = {"guidance": self.guidance, "network": self.network, "caution": 2.0, "check_stationary": True}
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
        return [*of_points, memory.found, found.sample, found.change]

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


@pytest.mark.parametrize("history", [0, 1, 2, 5])
@pytest.mark.parametrize("features", [(), FEATURES], ids=["plain", "everything"])
def test_samples_that_several_programs_share(
    device: torch.device, history: int, features: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One launch a step."""
    monkeypatch.setattr(sizes, "MOST_WARPS", 1)
    assert_right(Problem(device, (2, 5 * 128 - 5), history=history, features=features))
