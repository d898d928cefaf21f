"""What holds of every method: tests over the registry. A new method is tested here as soon as it is registered."""

from __future__ import annotations

import ast
import functools
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cores import assert_close, feed, one_by_one, table
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from fixed_points import FORMS
from problems import noise, scheduler
from promises import call_of, same_law, stock_of
from samplers import DIMENSIONS, MIXTURE, SAMPLERS, mixture, run
from thinned import by_pairs, thinned_product
from torch import Tensor

import srds_fast
from srds_fast import DivergenceError, Graphs, InvalidArgument, methods, sample
from srds_fast.engine.run import Run
from srds_fast.methods import SRDS, Chords, Collocation, ParaDiGMS, ParaSolver, ParaTAA, Speculative
from srds_fast.planner.choose import choose
from srds_fast.planner.plan import Plan
from srds_fast.planner.settings import Settings
from srds_fast.schedulers.table import NoiseTable
from srds_fast.solvers.contract import Checkpoint, Constrain, Core, SolverInputs, Trajectory
from srds_fast.solvers.method import Method, Target
from srds_fast.solvers.registry import BY_NAME, METHODS, REGISTERED, options_of

STEPS = 17
PACKAGE = Path(srds_fast.__file__).parent

# every method with its defaults, and what its waves do differently for other options
OPTIONS: dict[str, Method] = {method.name: method() for method in REGISTERED} | {
    "srds-plain": SRDS(num_blocks=5, coarse_solver="ddim", pipelined=False),
    "srds-held": SRDS(num_blocks=6, in_flight=1),
    "collocation-nodes": Collocation(num_nodes=6),
    "collocation-uncovered": Collocation(num_nodes=5, cover=None, history=5, data_std=math.inf),
    "collocation-response": Collocation(num_nodes=7, cover=2, history=0),
    **FORMS,
    "chords-starts": Chords(3, (0, 2, 9)),
    "parasolver-intervals": ParaSolver(num_coarse=2, window=3, num_intervals=5),
    "parasolver-whole": ParaSolver(num_coarse=1, window=40, step_tolerance=1e-6),
    "speculative-window": Speculative(window=5, data_std=1.0),
}
# those that end with the sequential sample
SEQUENTIAL_IN_THE_END = {name: each for name, each in OPTIONS.items() if not same_law(each)}
every = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
registered = pytest.mark.parametrize("method", REGISTERED, ids=BY_NAME)


def fitted(options: Method, num_steps: int = STEPS, **settings: Any) -> Plan | None:
    """The plan of these options; None where they need more steps."""
    try:
        return choose(num_steps, Settings(method=options, **settings))
    except InvalidArgument:
        return None


def plan_of(options: Method, **settings: Any) -> Plan:
    plan = fitted(options, **settings)
    assert plan is not None
    return plan


@functools.cache
def sequential_sample(name: str, num_steps: int) -> Tensor:
    return run(name, num_steps, method="sequential")


def to_the_end(options: Method) -> dict[str, float]:
    """Settings with which a run ends when nothing moves any more, where that is promised."""
    return {} if same_law(options) else {"tolerance": 0.0}


TO_THE_END = {"exact": {"exact": True}, "tolerance-0": {"tolerance": 0.0}}


@pytest.mark.parametrize(
    ("name", "options", "until"), by_pairs(list(SAMPLERS), list(SEQUENTIAL_IN_THE_END), list(TO_THE_END), share=4)
)
def test_run_to_the_end_it_is_sequential(name: str, options: str, until: str) -> None:
    method, settings = OPTIONS[options], TO_THE_END[until]
    for num_steps in (1, 2, 3, 5, 17):
        if fitted(method, num_steps, **settings) is not None:
            expected = sequential_sample(name, num_steps)
            assert_close(run(name, num_steps, method=method, **settings), expected)


@every
def test_the_same_call_gives_the_same_bits(options: Method) -> None:
    first, second = (run("ddpm", STEPS, seed=3, method=options) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("max_rows", [None, 4])
@every
def test_the_network_sees_the_rows_of_the_program(options: Method, max_rows: int | None) -> None:
    plan, seen = plan_of(options, max_rows=max_rows), list[tuple[int, ...]]()
    program, timesteps = plan.program(), table(STEPS).timesteps.tolist()

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        seen.append(tuple(timesteps.index(each) for each in t.tolist()))
        return MIXTURE(x, t)

    stock = stock_of(options)
    report = sample(denoiser, noise(1, DIMENSIONS), stock, STEPS, method=options, max_rows=max_rows).report
    if plan.slides:  # some waves are left out, and of others the last rows
        waves = iter(program.positions)
        assert all(any(wave[: len(positions)] == positions for wave in waves) for positions in seen)
    else:
        spent = program.spent(report.iterations or program.num_iterations)
        assert seen == list(program.positions[: spent.waves])
        assert spent == (report.waves, report.rows, report.peak_rows)
    assert (report.waves, report.rows) == (len(seen), sum(map(len, seen)))
    assert report.peak_rows == max(map(len, seen)) <= (max_rows or STEPS)
    assert report.evaluations == report.rows


@every
def test_the_report_names_the_method_and_its_options(options: Method) -> None:
    report = sample(MIXTURE, noise(2, DIMENSIONS), stock_of(options), STEPS, method=options).report
    assert report.method == options.name
    told = plan_of(options).options.reported()
    assert {name: getattr(report, name) for name in told} == told
    # windows with bounds of their own leave errors of any size
    own_bounds = options.slides and getattr(options, "step_tolerance", None) is not None
    assert all(report.converged) or own_bounds or report.stopped_by == ["same law"] * 2
    assert same_law(options) == ("same law" in report.stopped_by)
    json.dumps(report.to_dict())


@every
def test_checkpoints_are_as_many_as_promised(options: Method) -> None:
    seen: list[int] = []
    how = call_of(options, tolerance=0.0, observer=lambda each: seen.append(each.iteration))
    sample(MIXTURE, noise(1, DIMENSIONS), stock_of(options), STEPS, **how)
    plan = plan_of(options, **to_the_end(options))
    assert 1 <= len(seen) <= plan.options.num_checkpoints(plan.max_iterations)
    assert seen == sorted(set(seen))


@every
def test_samples_stop_apart_and_keep_their_value_and_noise(options: Method) -> None:
    grid, x = table(STEPS, DDPMScheduler()), noise(4, DIMENSIONS)
    plan = plan_of(options, **to_the_end(options))
    inputs = SolverInputs(noise(STEPS, 4, DIMENSIONS, seed=3), scaled=True)

    def core() -> Core:
        return plan.options.core(x, grid, plan.program(), inputs, bitwise=True)

    _, all_waves, expected = feed(core(), mixture, grid)
    order: list[Checkpoint] = []

    def keep(checkpoint: Checkpoint) -> tuple[int, ...]:
        """One more sample leaves at each."""
        order.append(checkpoint)
        return tuple(i for i, sample in enumerate(checkpoint.samples) if sample != len(order) - 1)

    found, waves, _ = feed(core(), mixture, grid, keep)
    assert [checkpoint.samples for checkpoint in order] == [tuple(range(i, 4)) for i in range(min(4, len(expected)))]
    assert len(waves) <= len(all_waves)
    assert waves[-1].x.shape[1] == len(order[-1].samples)
    for which, value in enumerate(found):
        assert_close(value, expected[min(which, len(expected) - 1)].sample[which])


@every
def test_a_run_that_is_stopped_counts_what_was_run(options: Method) -> None:
    grid, x = table(STEPS, stock_of(options)), noise(2, DIMENSIONS)
    inputs = SolverInputs(None if grid.spread is None else noise(STEPS, 2, DIMENSIONS, seed=3))
    started = Run(plan_of(options, tolerance=1e-9), x, grid, inputs)
    wave, rows = started.next(None), 0
    for _ in range(3):
        assert wave is not None
        rows += len(wave.positions)
        t = grid.timesteps[wave.steps(STEPS).flatten()]
        wave = started.next(MIXTURE(wave.x.flatten(0, 1), t).view_as(wave.x))
    assert wave is not None
    started.stop(x)
    assert (started.counts.waves, started.counts.rows) == (3, rows)
    assert started.sample is x
    assert started.final_steps == STEPS


STOCKS: dict[str, Any] = {"plain": scheduler(), "clipped": DDIMScheduler(), "noise": DDPMScheduler()}
VALUES = {"plain": math.nan, "clipped": math.inf, "noise": -math.inf}
on_every_stock = pytest.mark.parametrize(
    ("options", "kind"),
    [
        pytest.param(options, kind, id=f"{name}-{kind}")
        for name, options in OPTIONS.items()
        for kind in STOCKS
        if kind == "noise" or not same_law(options)
    ],
)


@on_every_stock
def test_nan_and_inf_from_the_network_are_an_error_with_the_report(options: Method, kind: str) -> None:
    """Also where the scheduler clips: the clamp would make infinity a number."""
    value, stock = VALUES[kind], STOCKS[kind]

    def broken(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(t[:, None] < 500, value, MIXTURE(x, t))

    with pytest.raises(DivergenceError, match="NaN or Inf") as caught:
        sample(broken, noise(2, DIMENSIONS), stock, STEPS, method=options)
    assert caught.value.report.waves > 0
    assert not any(caught.value.report.converged)


@on_every_stock
def test_one_call_that_gives_infinity_is_an_error(options: Method, kind: str) -> None:
    """Though the network is right when it is asked again: one of its two answers to the same input is wrong."""
    stock = STOCKS[kind]
    calls = itertools.count(1)
    if sample(MIXTURE, noise(2, DIMENSIONS), stock, STEPS, method=options).report.fallback_reason is not None:
        pytest.skip("the method is unstable here, whatever the network does")

    def broken(x: Tensor, t: Tensor) -> Tensor:
        return MIXTURE(x, t) * (math.inf if next(calls) == 3 else 1.0)

    with pytest.raises(DivergenceError, match="NaN or Inf"):
        sample(broken, noise(2, DIMENSIONS), stock, STEPS, method=options)


def scaled(x: Tensor, t: Tensor) -> Tensor:
    """A network that can be recorded."""
    return x * (t[:, None] / 1000)


@every
@pytest.mark.parametrize("max_rows", [None, 4])
def test_a_network_may_return_one_buffer_in_every_call_and_an_observer_may_write(
    options: Method, max_rows: int | None
) -> None:
    """As a recorded network does, and as one who shows what an observer is given."""
    buffer = torch.empty(STEPS * 2, DIMENSIONS, dtype=torch.float64)

    def reused(x: Tensor, t: Tensor) -> Tensor:
        return buffer[: len(x)].copy_(MIXTURE(x, t))

    def scribble(checkpoint: Checkpoint) -> None:
        for each in (checkpoint.sample, checkpoint.change, checkpoint.doubt, checkpoint.error):
            if each is not None:
                each.fill_(7.0)

    x, stock = noise(2, DIMENSIONS), stock_of(options)
    expected = sample(MIXTURE, x, stock, STEPS, **call_of(options, max_rows=max_rows))
    found = sample(reused, x, stock, STEPS, **call_of(options, max_rows=max_rows, observer=scribble))
    assert torch.equal(found.sample, expected.sample)
    assert found.report.change == expected.report.change


@every
@pytest.mark.parametrize("stock", [scheduler(), PNDMScheduler(skip_prk_steps=True)], ids=["ddim", "pndm"])
def test_a_recording_gives_the_bits_of_an_eager_run(options: Method, stock: Any) -> None:
    graphs, stock = Graphs(), stock_of(options) if same_law(options) else stock
    for seed in range(3):
        x = noise(2, DIMENSIONS, seed=seed)
        expected = sample(scaled, x, stock, STEPS, **call_of(options))
        found = sample(scaled, x, stock, STEPS, **call_of(options, engine="graph", graphs=graphs))
        assert torch.equal(found.sample, expected.sample)
        assert (found.report.waves, found.report.rows) == (expected.report.waves, expected.report.rows)
        replayed = "network graphs" if options.slides else "loop graph"
        assert found.report.engine == (replayed if seed else "eager")


@every
def test_a_warm_start_is_taken_or_refused(options: Method) -> None:
    x, how = noise(2, DIMENSIONS), call_of(options, tolerance=0.0)
    cold = sample(MIXTURE, x, stock_of(options), STEPS, keep_trajectory=True, **how)
    assert cold.trajectory is not None
    if not options.takes_warm_start:
        with pytest.raises(InvalidArgument, match="This method cannot start from a trajectory"):
            sample(MIXTURE, x, scheduler(), STEPS, warm_start=cold.trajectory, **how)
        return
    warm = sample(MIXTURE, x, scheduler(), STEPS, warm_start=cold.trajectory, **how)
    assert warm.report.waves <= cold.report.waves
    assert_close(warm.sample, cold.sample)


@pytest.mark.parametrize("options", SEQUENTIAL_IN_THE_END.values(), ids=SEQUENTIAL_IN_THE_END)
def test_the_trajectory_of_an_exact_run_is_the_sequential_one(options: Method) -> None:
    x, how = noise(2, DIMENSIONS), {"keep_trajectory": True}
    found = sample(MIXTURE, x, scheduler(), STEPS, method=options, tolerance=0.0, **how).trajectory
    expected = sample(MIXTURE, x, scheduler(), STEPS, method="sequential", **how).trajectory
    assert found is not None
    assert expected is not None
    assert_close(found, expected)


KINDS: dict[str, Any] = {
    "ddim": None,
    "ddim-clip": DDIMScheduler(),
    "ddpm": DDPMScheduler(),
    "dpm": DPMSolverMultistepScheduler(),
    "pndm": PNDMScheduler(skip_prk_steps=True),
    "unipc": UniPCMultistepScheduler(solver_order=3),
    "dpm-3-sde": DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=3),
}


def halves(image: Tensor, grid: NoiseTable, noise: Tensor) -> Constrain:
    """The first half of every state is that of an image, at the noise level of its position."""
    mask = torch.arange(image.shape[1]) < image.shape[1] // 2

    def constrain(x: Tensor, position: int, samples: tuple[int, ...]) -> Tensor:
        at_end = position == grid.num_steps
        alpha, sigma = (1.0, 0.0) if at_end else (float(grid.alpha[position]), float(grid.sigma[position]))
        return torch.where(mask, (alpha * image + sigma * noise)[list(samples)], x)

    return constrain


@functools.cache
def constrained_and_continued(kind: str) -> tuple[NoiseTable, Tensor, SolverInputs, Tensor]:
    """The middle of a grid, where to start, with what, and the sequential sample; its trajectory is in the inputs."""
    grid, x = table(STEPS + 6, KINDS[kind]).part(6, STEPS + 6, afresh=False), noise(2, DIMENSIONS)
    draws = None if grid.spread is None else noise(STEPS, 2, DIMENSIONS, seed=3)
    constrain = halves(noise(2, DIMENSIONS, seed=1), grid, x)
    carried = noise(max(1, grid.carried(0)), 2, DIMENSIONS, seed=2)
    inputs = SolverInputs(draws, constrain, Trajectory(STEPS), carried, scaled=True)
    return grid, x, inputs, one_by_one(x, grid, mixture, inputs)


@pytest.mark.parametrize(("name", "kind"), thinned_product(SEQUENTIAL_IN_THE_END, KINDS))
def test_constraints_noise_and_history_reach_every_state(name: str, kind: str) -> None:
    """As in inpainting, and where a run begins in the middle of the grid of a multistep solver."""
    options = OPTIONS[name]
    grid, x, inputs, expected_sample = constrained_and_continued(kind)
    found, expected = Trajectory(STEPS), inputs.trajectory
    assert expected is not None
    plan = plan_of(options, tolerance=0.0)
    ours = replace(inputs, trajectory=found)
    sample = feed(plan.options.core(x, grid, plan.program(), ours, bitwise=True), mixture, grid)[0]
    assert_close(sample, expected_sample)
    for kept, wanted in zip([*found.x[1:], *found.carried], [*expected.x[1:], *expected.carried], strict=True):
        if wanted is not None and wanted.numel():  # the others keep what is carried for multistep schedulers only
            assert kept is not None
            assert_close(kept, wanted)


@registered
def test_options_refuse_what_they_cannot_be(method: type[Method]) -> None:
    for field in fields(method):
        with pytest.raises(InvalidArgument, match=field.name):
            method(**{field.name: "no such value"})


@pytest.mark.parametrize(
    ("keywords", "says"),
    [
        ({"method": "chords", "num_blocks": 4}, "num_blocks was given together with method='chords'"),
        ({"method": SRDS(), "coarse_solver": "ddim"}, "coarse_solver was given together with method=SRDS"),
        ({"method": "sequential", "in_flight": 1}, "in_flight was given together with method='sequential'"),
        ({"in_flight": 1, "pipelined": False}, "in_flight=1 was given together with pipelined=False"),
        ({"in_flight": 1, "exact": True}, "in_flight=1 was given together with exact=True"),
        ({"method": "srds", "pipelined": 1}, "pipelined is 1"),
    ],
    ids=str,
)
def test_keywords_that_do_not_go_together_are_refused(keywords: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidArgument, match=says):
        Settings(**keywords)


@registered
def test_it_is_known_by_its_name_and_by_its_options(method: type[Method]) -> None:
    assert options_of(method.name) == method()
    assert method.name in METHODS
    assert getattr(methods, method.__name__) is method
    assert method.about


@registered
@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("stochastic", [False, True])
def test_the_planner_is_given_what_fits(method: type[Method], stochastic: bool, calibrated: bool) -> None:
    for num_steps, ranks in itertools.product((4, 5, 12, 50), (1, 3, 16)):
        target = Target(num_steps, 4e-3, stochastic=stochastic, ranks=ranks)
        found = list(method().candidates(target, calibrated=calibrated))
        of_one = method().candidates(replace(target, ranks=1), calibrated=calibrated)
        assert set(found) >= set(of_one), "several ranks leave nothing out"
        assert len(found) == len(set(found))
        for options in found:
            plan = choose(num_steps, Settings(method=options), stochastic)
            assert not plan.slides
            assert plan.program().spent(plan.max_iterations).waves >= 1


def code() -> Iterator[tuple[Path, ast.AST]]:
    """Every node of the package's code outside the solvers."""
    for path in PACKAGE.rglob("*.py"):
        place = path.relative_to(PACKAGE)
        if place.parts[0] not in ("solvers", "methods.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                yield place, node


def test_only_solvers_name_a_method_or_ask_for_its_class() -> None:
    """A new method is its own file and a line of the registry: nothing else may depend on which one runs."""
    classes = {each.__name__ for method in REGISTERED for each in method.__mro__ if each is not object}
    found = []
    for place, node in code():
        if isinstance(node, ast.Constant) and node.value in BY_NAME:
            found.append(f"{place}:{node.lineno} names {node.value}")
        asks = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance"
        if asks or isinstance(node, ast.MatchClass):
            assert isinstance(node, ast.Call | ast.MatchClass)
            asked = node.args[1] if isinstance(node, ast.Call) else node.cls
            names = {each.id for each in ast.walk(asked) if isinstance(each, ast.Name)}
            names |= {each.attr for each in ast.walk(asked) if isinstance(each, ast.Attribute)}
            found += [f"{place}:{node.lineno} asks for {name}" for name in sorted(names & classes)]
    assert not found, "\n".join(found)


FUSED = [SRDS(), Chords(), ParaTAA(), Collocation()]
PLAIN = [ParaTAA(order=3), ParaTAA.published(window=5), ParaDiGMS(), ParaSolver(), Speculative()]


@pytest.mark.parametrize(
    ("options", "kernels"), [*((each, "triton") for each in FUSED), *((each, "torch") for each in PLAIN)], ids=str
)
def test_the_report_names_pytorch_if_no_kernel_runs(
    options: Method, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("srds_fast.sampling.session.implementation", lambda device: "triton")
    assert sample(mixture, noise(1, DIMENSIONS), stock_of(options), 10, method=options).report.kernels == kernels


@pytest.mark.parametrize(("options", "kernels"), [(Collocation(), "torch"), (ParaTAA(), "triton")], ids=str)
def test_the_report_names_pytorch_if_a_constraint_keeps_the_kernel_from_running(
    options: Method, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inpainting keeps the known part of every state as it arrives."""
    monkeypatch.setattr("srds_fast.sampling.session.implementation", lambda device: "triton")
    build, call = tiny.PIPELINES["stable_diffusion_inpaint"]
    fast = srds_fast.compile(build(), method=options, max_iterations=2, engine="eager")
    fast(**call, num_inference_steps=5)
    assert fast.report.kernels == kernels
