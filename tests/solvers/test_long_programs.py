"""Long programs are made and compiled while they run: the same waves and bits, and no more than is run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cores import feed, table
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given
from hypothesis import strategies as st
from problems import GaussianMixture, noise
from torch import Tensor

from srds_fast.schedulers.steps import TensorSpec
from srds_fast.solvers import program
from srds_fast.solvers import wave_table as compiling
from srds_fast.solvers.collocation.nodes import secant_sweeps
from srds_fast.solvers.collocation.options import Collocation
from srds_fast.solvers.compiled import Form
from srds_fast.solvers.contract import NO_INPUTS, Checkpoint, SolverInputs, Trajectory
from srds_fast.solvers.fixed_point import program as sweeps
from srds_fast.solvers.fixed_point.options import ParaTAA
from srds_fast.solvers.method import Method
from srds_fast.solvers.on_demand import OnDemand
from srds_fast.solvers.program import LongProgram, Program
from srds_fast.solvers.srds import srds

MIXTURE = GaussianMixture.random(8)
SCHEDULERS = {
    "ddim": lambda: DDIMScheduler(clip_sample=False),
    "ddim-clip": lambda: DDIMScheduler(clip_sample_range=1.5),
    "ddpm": DDPMScheduler,
    "ancestral": EulerAncestralDiscreteScheduler,
    "dpm": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
}


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    compiling.stages.cache_clear()  # type: ignore[attr-defined]
    yield
    compiling.stages.cache_clear()  # type: ignore[attr-defined]


def made(patch: pytest.MonkeyPatch, *arguments: Any, rows: int = 9, **options: Any) -> LongProgram:
    """`program.srds`, made while it runs, in stages of so many rows."""
    patch.setattr(program, "LONG", 0)
    patch.setattr(program, "ROWS_OF_A_STAGE", rows)
    found = program.srds.__wrapped__(*arguments, **options)  # type: ignore[attr-defined]
    assert isinstance(found, LongProgram)
    return found


@given(st.data())
def test_a_long_program_has_the_waves_of_a_short_one(data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, 30))
    blocks = data.draw(st.integers(1, steps))
    arguments = steps, blocks, data.draw(st.integers(0, blocks)), data.draw(st.booleans())
    in_flight = data.draw(st.sampled_from([None, 1, 2])) if arguments[-1] else None
    whole: Program = program.srds(*arguments, in_flight=in_flight)
    with pytest.MonkeyPatch.context() as patch:
        long: Program = made(patch, *arguments, in_flight=in_flight)
    if data.draw(st.booleans()):
        whole, long = (each.limited_to(3) for each in (whole, long))
    names = "all_widths", "num_rows", "peak_rows", "num_waves"
    counts = [[getattr(each, name) for name in names] for each in (whole, long)]
    assert isinstance(long.waves, OnDemand)
    assert (long.waves.made, counts[0]) == (0, counts[1]), "counts are known before any wave is made"
    for name in ("positions", "final_steps", "waves"):
        assert tuple(getattr(long, name)) == getattr(whole, name)


class Seen:
    """What a core gives when it is run on a program."""

    def __init__(self, waves: Program, name: str, solver: Any, bitwise: bool, constrained: bool) -> None:
        grid = table(waves.num_steps, SCHEDULERS[name]())
        x = noise(3, 8) * grid.init_noise_sigma
        drawn = torch.randn(grid.num_steps, *x.shape, generator=torch.Generator().manual_seed(1)).to(x)

        def constrain(states: Tensor, position: int, samples: tuple[int, ...]) -> Tensor:
            return states + 1e-3 * position

        self.trajectory = Trajectory(grid.num_steps)
        inputs = SolverInputs(
            draws=None if grid.spread is None else drawn,
            trajectory=self.trajectory,
            scaled=True,
            constrain=constrain if constrained else None,
        )

        def keep(checkpoint: Checkpoint) -> tuple[int, ...] | None:  # one sample leaves after iteration 1
            return (0, 2) if checkpoint.iteration == 1 and len(checkpoint.samples) == 3 else None

        core = srds(x, grid, waves, solver, inputs, bitwise=bitwise)
        self.sample, self.waves, self.checkpoints = feed(core, lambda x, t: MIXTURE(x, t.long()), grid, keep)

    def tensors(self) -> list[Tensor | None]:
        found: list[Tensor | None] = [self.sample, *self.trajectory.x, *self.trajectory.carried]
        found += [each.x for each in self.waves]
        for each in self.checkpoints:
            found += [each.sample, each.change, each.stationary]
        return found


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(
    ("solver", "options", "bitwise", "constrained"),
    [("2m", {}, False, True), ("ddim", {"in_flight": 2}, True, False), ("2m", {"pipelined": False}, True, False)],
    ids=["2m", "ddim", "plain"],
)
def test_stages_give_the_bits_of_the_whole(
    name: str, solver: Any, options: dict[str, Any], bitwise: bool, constrained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = table(23, SCHEDULERS[name]()).num_steps
    whole = program.srds(steps, 7, 7, **options)
    long = made(monkeypatch, steps, 7, 7, **options)
    assert len(long.stages()) > 5
    expected, found = (Seen(each, name, solver, bitwise, constrained) for each in (whole, long))
    for ours, theirs in zip(found.tensors(), expected.tensors(), strict=True):
        assert (ours is None) == (theirs is None)
        assert ours is None or torch.equal(ours, theirs)
    signs = [[each.signs() for each in seen.checkpoints[1:]] for seen in (found, expected)]
    assert signs[0] == signs[1]


def test_a_run_that_stops_makes_and_compiles_little_more_than_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    long, grid, x = made(monkeypatch, 400, 40, 40, rows=100), table(400), noise(1, 8)
    _, waves, _ = feed(
        srds(x, grid, long, "ddim"),
        lambda x, t: 0.1 * x,
        grid,
        lambda checkpoint: () if checkpoint.iteration == 1 else None,
    )
    stages = compiling.stages(grid, long, "ddim", Form.of(x, NO_INPUTS))
    assert isinstance(stages, OnDemand)
    assert isinstance(long.waves, OnDemand)
    assert len(waves) <= sum(len(each.waves) for each in stages[: stages.made]) == long.waves.made - 1
    assert stages.made < 0.2 * len(stages)


def test_slots_of_stages_are_those_of_what_is_read_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory does not grow with the number of iterations."""
    form = Form(TensorSpec(torch.float64, torch.device("cpu"), 2))
    grid, long = table(100), made(monkeypatch, 100, 20, 20, rows=30)
    slots = [each.table.num_slots for each in compiling.stages(grid, long, "2m", form)]
    assert slots == sorted(slots)
    assert slots[-1] <= 5 * 20


@pytest.mark.parametrize("method", [ParaTAA, Collocation])
@pytest.mark.parametrize(("constrained", "max_rows"), [(False, None), (True, None), (False, 7)])
def test_long_sweeps_are_those_of_a_short_program(
    method: type[Method], constrained: bool, max_rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, count = 20, 12
    options: Any = method()
    make = sweeps.fixed_point if method is ParaTAA else secant_sweeps
    whole = make(steps, count).limited_to(max_rows)
    monkeypatch.setattr(sweeps, "LONG", 0)
    long = make.__wrapped__(steps, count).limited_to(max_rows)  # type: ignore[attr-defined]
    assert isinstance(long, sweeps.LongSweeps)
    assert isinstance(long.waves, OnDemand)
    assert (long.waves.made, long.all_widths) == (0, whole.all_widths)
    inputs = SolverInputs(constrain=(lambda x, position, samples: x + 1e-3 * position) if constrained else None)
    grid, x, found = table(steps), noise(3, 8), []
    for each in (whole, long):
        core = options.core(x, grid, each, inputs, bitwise=True)
        answers: Any = {3: (0, 2), 5: ()}
        found.append(feed(core, lambda x, t: MIXTURE(x, t.long()), grid, lambda at, by=answers: by.get(at.iteration)))
    assert long.waves.made == 1 + len(found[1][1]), "the next one's rows are needed"
    assert torch.equal(found[0][0], found[1][0])
    for ours, theirs in zip(*(each[2] for each in found), strict=True):
        assert torch.equal(ours.sample, theirs.sample)
        assert torch.equal(ours.change, theirs.change)
    for name in ("positions", "final_steps", "waves"):
        assert tuple(getattr(long, name)) == getattr(whole, name)


def test_what_was_interrupted_is_made_again_and_values_are_made_once() -> None:
    begun: list[int] = []

    def begin() -> Iterator[int]:
        begun.append(1)
        for number in range(9):
            if number == 4 and len(begun) == 1:
                raise KeyboardInterrupt
            yield number

    found = OnDemand(9, begin)
    assert (len(found), found.made, found[2], found.made) == (9, 0, 2, 3)
    with pytest.raises(KeyboardInterrupt):
        _ = found[5]
    assert (found.made, found[5], len(begun)) == (4, 5, 2)
    assert (found[-1], found[2:4], list(found)) == (8, (2, 3), list(range(9)))
    with pytest.raises(IndexError):
        _ = found[9]
    assert len(begun) == 2
