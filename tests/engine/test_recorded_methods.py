"""The methods beside SRDS, recorded and replayed: on the CPU's tape, and on a device without memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tiny
import torch
from problems import noise, scheduler
from test_fake_cuda import _no_tables_of_the_device_are_kept, capturable, check_loop, record_loop
from twins import Twins

import srds_fast
from srds_fast.kernels import fixed_point_wave, secant_sweep
from srds_fast.solvers import chords
from srds_fast.solvers.chords import Chords
from srds_fast.solvers.collocation import table
from srds_fast.solvers.collocation.options import Collocation
from srds_fast.solvers.fixed_point import grid
from srds_fast.solvers.fixed_point.options import ParaTAA

METHODS = {
    "collocation": Collocation(num_nodes=6),
    "parataa": ParaTAA(),
    "parataa, order 3": ParaTAA(order=3, history=1),
    "chords": Chords(3),
}
STEPS = 10

__all__ = ["_no_tables_of_the_device_are_kept"]


@pytest.fixture(autouse=True)
def _nothing_of_the_device_is_kept() -> Iterator[None]:
    yield
    grid.grid_of.cache_clear()
    table.secant_table.cache_clear()
    chords.compiled.cache_clear()


@pytest.mark.parametrize(
    ("method", "name"),
    [
        *((method, "flux") for method in METHODS),
        ("parataa", "ddpm"),  # a replay takes the noise of its call
        *(pytest.param(method, "stable_diffusion", marks=pytest.mark.exhaustive) for method in METHODS),
    ],
)
def test_a_replay_equals_an_eager_run_bit_for_bit(method: str, name: str) -> None:
    twins = Twins(name, method=METHODS[method], max_iterations=2)
    twins.first(num_inference_steps=STEPS)
    for seed in (1, 2):
        twins.replayed(seed, num_inference_steps=STEPS)
    assert twins.report.waves == twins.eager.report.waves
    assert twins.report.rows == twins.eager.report.rows


@pytest.mark.parametrize(
    "name",
    ["ddpm", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("stable_diffusion", "flux"))],
)
@pytest.mark.parametrize("method", METHODS)
def test_its_waves_need_nothing_of_the_host(method: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, arguments = tiny.PIPELINES[name]
    grid.grid_of.cache_clear()
    table.secant_table.cache_clear()
    call = capturable(build(), arguments, monkeypatch, method=METHODS[method], max_iterations=2)
    check_loop(*record_loop(call), len(call.program))


class Launch:
    """Stands for a kernel; a device without memory cannot run one."""

    def __init__(self, name: str, launched: list[str]) -> None:
        self._name, self._launched = name, launched

    def __getitem__(self, programs: tuple[int, ...]) -> Callable[..., None]:
        assert programs > (0,)

        def launch(*arguments: Any, **options: Any) -> None:
            self._launched.append(self._name)

        return launch


@pytest.mark.parametrize("name", ["stable_diffusion", "ddpm"])
@pytest.mark.parametrize("method", ["collocation", "parataa"])
def test_nor_do_the_kernels_of_its_waves(method: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which run in their order."""
    from srds_fast.kernels.fixed_point_wave import mix_kernel, sweep_kernel
    from srds_fast.kernels.secant_sweep import learn_kernel, walk_kernel

    build, arguments = tiny.PIPELINES[name]
    call = capturable(build(), arguments, monkeypatch, method=METHODS[method], max_iterations=4)
    launched: list[str] = []
    for operation in (fixed_point_wave, secant_sweep):
        monkeypatch.setattr(operation, "implementation", lambda device: "triton")
    kernels = [(sweep_kernel, "_sweep"), (mix_kernel, "_gram"), (mix_kernel, "_mix")]
    if method == "collocation":
        kernels = [(learn_kernel, "_learn"), (walk_kernel, "_walk")]
    for module, each in kernels:
        monkeypatch.setattr(module, each, Launch(each, launched))
    check_loop(*record_loop(call), len(call.program))
    rehearsed = recorded = 4
    assert launched == (rehearsed + recorded) * [each for _, each in kernels]


def test_a_warm_start_is_an_input_of_the_recording() -> None:
    graphs = srds_fast.Graphs()
    how: dict[str, Any] = {"method": "collocation", "max_iterations": 2}

    def denoiser(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x * (t[:, None] / 1000)

    for seed in range(3):
        x = noise(2, 64, seed=seed)
        guess = torch.stack([x] * 31) * (1 + seed)
        found = srds_fast.sample(denoiser, x, scheduler(), 30, engine="graph", graphs=graphs, warm_start=guess, **how)
        expected = srds_fast.sample(denoiser, x, scheduler(), 30, warm_start=guess, **how)
        assert torch.equal(found.sample, expected.sample)
        assert (found.report.engine == "loop graph") == (seed > 0)
    assert graphs.stats.captured == 1
