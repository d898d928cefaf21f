"""Recordings on the CPU's tape: what is recorded when, kept how long, launched how often, and what is refused."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from problems import scheduler
from tape import Tape
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from twins import FIRST, Act, Twins, differ, in_a_thread, put

import srds_fast
from srds_fast import CaptureFailed, DivergenceError
from srds_fast.engine import costs as pricing
from srds_fast.engine.graphs.loop_graph import LoopGraph
from srds_fast.engine.run import Run
from srds_fast.pipelines.lockstep import driver
from srds_fast.planner.choose import choose, fixed_at
from srds_fast.planner.cost_curve import CostCurve
from srds_fast.planner.plan import Candidate, Prediction
from srds_fast.planner.settings import Settings
from srds_fast.schedulers.verify import noise_table
from srds_fast.solvers.convergence import Diverged


@pytest.fixture
def flux() -> Twins:
    return Twins()


# what cannot be replayed


@pytest.mark.parametrize("where", ["proj_out", "every module"])
def test_hooks_are_called_and_replays_go_on_without_them(where: str, flux: Twins) -> None:
    def double(module: nn.Module, args: Any) -> Any:
        return (args[0] * 2,) if module is flux.network.proj_out else None

    before = flux.first()
    on_all = where == "every module"
    handle = (register_module_forward_pre_hook if on_all else flux.network.proj_out.register_forward_pre_hook)(double)
    try:
        for _ in range(2):
            assert differ(flux.eagerly(f"{where} has a hook"), before)
    finally:
        handle.remove()
    assert torch.equal(flux.replayed(), before)
    assert flux.fast.graphs.failed == 0


@pytest.mark.parametrize("how", ["module", "wrapped"])
def test_compiled_networks(how: str, flux: Twins) -> None:
    before = flux.first()
    if how == "module":
        flux.network.proj_out.compile(backend="eager")
    else:
        flux.pipe.transformer = torch.compile(flux.network, backend=lambda graph, inputs: graph.forward)
    for seed in (0, 0, 1):
        found = flux.same(seed)
        if seed == 0:
            assert torch.allclose(found, before, rtol=1e-4, atol=1e-4)


def test_strict_refuses_hooks_and_offloading_and_auto_does_not(flux: Twins) -> None:
    handle = flux.network.proj_out.register_forward_hook(lambda *_: None)
    strict = srds_fast.compile(flux.pipe, engine="graph", exact=True, strict=True, method="srds")
    with pytest.raises(CaptureFailed, match="proj_out has a hook"):
        flux.alone(strict)
    flux.alone(srds_fast.compile(flux.pipe, exact=True, strict=True, method="srds"))
    handle.remove()
    expected = flux.first()
    flux.network.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(CaptureFailed, match="offloaded"):
        flux.alone(strict)
    assert torch.equal(flux.eagerly("the network is offloaded"), expected)
    assert flux.counts == (1, 0)


@pytest.fixture
def _unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks that draw or count would run on the stock loop; here they are to reach the graphs."""

    def verified(*given: Any, **options: Any) -> Iterator[Any]:
        yield from ()

    monkeypatch.setattr(driver, "verified", verified)


HIDDEN = torch.tensor([1.5])
UNCAPTURABLE: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "item": (lambda y: y * (2.0 if y.sum().item() < 1e9 else 1.0), "makes the host wait for a value"),
    "randn_like": (lambda y: y + torch.randn_like(y), "draws random numbers"),
    "closure": (lambda y: y * HIDDEN, "neither an argument nor held by one of its modules"),
    "NumPy": (lambda y: torch.from_numpy(y.numpy() * 2), "numpy"),
}


@pytest.mark.usefixtures("_unchecked")
@pytest.mark.parametrize("engine", ["graph", "network-graphs"])
@pytest.mark.parametrize("name", UNCAPTURABLE)
def test_what_cannot_be_captured_runs_eagerly(name: str, engine: str, caplog: pytest.LogCaptureFixture) -> None:
    act, why = UNCAPTURABLE[name]
    twins = Twins(engine=engine)
    put(twins, act)
    with caplog.at_level(logging.WARNING, "srds_fast"):
        # what the first call of a kind does beside its waves also draws from a network's generator
        _, *results = [twins.eagerly(why, seed) for seed in (0, 0, 0, 1)]
        assert twins.report.capture_seconds == 0, "it is not tried again"
    assert torch.equal(results[0], results[1])
    assert differ(*results[1:])
    stats = twins.fast.graphs
    assert (stats.captured, stats.replayed, stats.failed, stats.held) == (0, 0, 1, 0)
    assert len(caplog.records) == 1
    assert why in caplog.text
    if engine == "graph":
        twins.eagerly(why, num_inference_steps=5)
        assert stats.failed == 2, "another kind of call is tried"
    strict = srds_fast.compile(twins.pipe, engine=engine, exact=True, strict=True, method="srds")
    for _ in range(2):
        with pytest.raises(CaptureFailed, match=why):
            twins.alone(strict)


@pytest.mark.usefixtures("_unchecked")
@pytest.mark.parametrize("engine", ["graph", "network-graphs"])
def test_an_unrepeatable_network_is_found_out_by_the_comparison(engine: str) -> None:
    """What it reads is in no tensor and no attribute, and has changed by the time that it is recorded."""
    twins, calls = Twins(engine=engine), itertools.count()
    put(twins, lambda y: y * (1.0 + 0.1 * next(calls)))
    for tried in (True, False):
        twins.alone(twins.fast)
        assert twins.report.engine == "eager"
        assert "differs from the eager run" in twins.report.engine_reason
        assert (twins.report.capture_seconds > 0) == tried
    assert twins.fast.graphs.failed == 1


def loose() -> Twins:
    """Needs one iteration, and more once it is scaled up: its network is changed in place."""
    twins = Twins(method="srds", tolerance=1e-5, num_blocks=4)
    twins.base |= {"num_inference_steps": 8, "prompt": "ships"}
    scale(twins, 1e-6)
    return twins


def scale(twins: Twins, factor: float = 1e6) -> None:
    layer = getattr(twins.network.proj_out, "layer", twins.network.proj_out)
    with torch.no_grad():
        layer.weight.mul_(factor)
        layer.bias.mul_(factor)


def test_a_run_that_goes_further_records_the_rest() -> None:
    twins = loose()
    twins.first()
    assert twins.report.iterations == 1
    scale(twins)
    twins.same(1)
    assert twins.report.engine == "loop graph"
    assert twins.report.iterations > 1
    assert twins.report.iterations == twins.eager.report.iterations
    assert twins.counts == (1, 1)
    twins.replayed(2)
    twins.replayed(1)


def test_a_run_that_goes_further_than_can_be_recorded(caplog: pytest.LogCaptureFixture) -> None:
    """It runs eagerly, and so do those after it: what was recorded by then leads nowhere. A stream repeats nothing."""
    for streamed in (False, True):
        twins, broken = loose(), []
        put(twins, lambda y, broken=broken: y * (1.0 + 0.0 * y.sum().item()) if broken else y)
        twins.first()
        scale(twins)
        broken.append(1)
        if streamed:
            found, expected = refinements(twins, twins.fast), refinements(twins, twins.eager)
            assert "makes the host wait" in twins.report.engine_reason
            same_refinements(found, expected)
        with caplog.at_level(logging.WARNING, "srds_fast"):
            for seed in (1, 2, 1):
                twins.eagerly("makes the host wait", seed)
                assert twins.report.iterations > 1
        stats = twins.fast.graphs
        assert (stats.captured, stats.replayed, stats.failed, stats.held) == (1, 0, 1, 0)
    assert len(caplog.records) == 2


@pytest.mark.usefixtures("_unchecked")
@pytest.mark.parametrize("engine", ["graph", "network-graphs"])
def test_a_network_that_counts_its_calls_in_its_attributes_is_not_recorded(engine: str) -> None:
    twins = Twins(engine=engine)
    layer = put(twins)
    layer.act = lambda y: setattr(layer, "calls", getattr(layer, "calls", 0) + 1) or y
    for seed in range(2):
        twins.eagerly("changed its own attributes", seed)
        assert twins.counts == (0, 0)
    twins.network.proj_out = layer.layer
    twins.same(2)
    twins.replayed(3)


def test_a_network_changed_while_it_is_recorded_is_not_taken_for_the_one_before(flux: Twins) -> None:
    """As another thread might: the recording must not be found by what the network was when the call began."""
    layer = put(flux)
    layer.factor = 1.0
    layer.act = Act(nn.Identity(), lambda y: y * layer.factor)
    graphs = flux.fast._srds.graphs
    with pytest.MonkeyPatch.context() as patch:
        own = graphs.find
        patch.setattr(graphs, "find", lambda key: (own(key), setattr(layer, "factor", 2.0))[0])
        flux.alone(flux.fast)
    layer.factor = 1.0
    assert differ(flux.same(), flux.same(1))
    flux.same()


# recordings kept and given up


def test_the_least_recently_used_recording_goes_first() -> None:
    twins = Twins(graphs={"max_graphs": 2})
    stats = twins.fast.graphs
    twins.first(num_inference_steps=4)
    twins.first(num_inference_steps=5)
    twins.replayed(num_inference_steps=4)
    assert (stats.held, stats.evicted) == (2, 0)
    twins.first(num_inference_steps=6)
    twins.replayed(1, num_inference_steps=4)
    twins.replayed(1, num_inference_steps=6)
    assert (stats.held, stats.evicted) == (2, 1)
    twins.first(1, num_inference_steps=5)
    twins.first(num_inference_steps=4)
    assert (stats.held, stats.evicted, stats.captured, stats.replayed, stats.failed) == (2, 3, 5, 3, 0)


@contextmanager
def no_collector() -> Iterator[None]:
    """What is freed in here is freed because nothing refers to it, not even itself."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def test_recordings_are_freed_when_evicted_when_reset_and_with_the_pipeline() -> None:
    """Whether or not anything was evicted or reset before."""

    def kept(twins: Twins) -> list[weakref.ref[Any]]:
        return [weakref.ref(captured) for captured in twins.fast._srds.graphs._kept.values()]

    with no_collector():
        twins = Twins(graphs={"max_graphs": 1})
        twins.first()
        evicted = kept(twins)
        twins.first(num_inference_steps=5)
        assert [reference() for reference in evicted] == [None]
        reset = kept(twins)
        twins.fast.reset()
        assert [reference() for reference in reset] == [None]
        assert twins.fast.graphs.held == 0
        twins.first(num_inference_steps=5)
        twins.replayed(num_inference_steps=5)
        last, network = kept(twins), weakref.ref(twins.network)
    del twins
    gc.collect()
    assert [reference() for reference in last] == [None]
    assert network() is None


def test_reset_forgets_what_could_not_be_recorded(flux: Twins) -> None:
    why = "makes the host wait"
    layer = put(flux, UNCAPTURABLE["item"][0])
    assert why in flux.fast.warmup(**flux.base).engine_reason
    flux.fast.reset()
    flux.eagerly(why)
    assert flux.fast.graphs.failed == 2
    layer.act = torch.tanh
    flux.first()
    flux.replayed(1)


# warmup


@pytest.mark.parametrize("recorded", [False, True])
def test_warmup_records_all_iterations(recorded: bool) -> None:
    """Also of a call that was recorded as far as it went."""
    twins = loose()
    if recorded:
        twins.first()
    report = twins.fast.warmup(**twins.base)
    assert report.iterations == 1
    assert report.engine == ("loop graph" if recorded else "eager")
    assert recorded or report.engine_reason.startswith(FIRST)
    assert report is twins.report
    scale(twins)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tape.TapeRecorder.record", None)
        twins.replayed(1)
    assert twins.report.iterations > 1
    assert twins.fast.graphs.captured == 1


def test_warmup_touches_no_random_state() -> None:
    """Neither of a generator, nor the global one that DDPM draws from where none is given."""
    twins = Twins("ddpm")
    generator = torch.Generator().manual_seed(3)
    states = generator.get_state(), torch.get_rng_state()
    for given in ({}, {"generator": generator}):
        twins.fast.warmup(**twins.base, **given)
        assert torch.equal(generator.get_state(), states[0])
        assert torch.equal(torch.get_rng_state(), states[1])
    twins.replayed(2)


def test_nothing_is_recorded_while_serving() -> None:
    twins = Twins(graphs={"lazy_capture": False})
    for _ in range(2):
        twins.eagerly("lazy_capture=False")
    assert twins.counts == (0, 0)
    twins.fast.warmup(**twins.base)
    assert twins.counts == (1, 0)
    twins.replayed(1)
    twins.eagerly("lazy_capture=False", num_inference_steps=5)
    assert twins.counts == (1, 1)
    strict = srds_fast.compile(twins.pipe, engine="graph", lazy_capture=False, strict=True, method="srds")
    with pytest.raises(CaptureFailed, match="warmup"):
        twins.alone(strict)


# streams, interrupts, threads, errors


def refinements(twins: Twins, each: Any, seed: int = 0) -> list[Any]:
    call = {name: value for name, value in twins.base.items() if name != "output_type"}
    return list(each.stream(**call, generator=torch.Generator().manual_seed(seed)))


def same_refinements(found: list[Any], expected: list[Any]) -> None:
    assert len(expected) > 2
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.iteration, ours.change) == (theirs.iteration, theirs.change)
        assert torch.equal(ours.latents, theirs.latents)


def test_refinements_of_a_replay_are_those_of_an_eager_run(flux: Twins) -> None:
    flux.base["num_inference_steps"] = 6
    flux.first()
    for seed in (1, 2):
        found = refinements(flux, flux.fast, seed)
        assert flux.report.engine == "loop graph"
        same_refinements(found, refinements(flux, flux.eager, seed))
    assert torch.equal(found[-1].latents, flux.replayed(2))


def test_a_stream_left_early_gives_the_device_back(flux: Twins) -> None:
    flux.first()
    for left_after in (1, 2):
        stream = flux.fast.stream(**flux.base, generator=torch.Generator().manual_seed(1))
        for _ in range(left_after):
            next(stream)
        stream.close()
        expected = flux.alone(flux.eager, 2)[0]
        assert torch.equal(in_a_thread(lambda: flux.alone(flux.fast, 2)[0]), expected)
    flux.replayed(1)


def test_an_interrupted_replay_gives_the_newest_whole_sample(flux: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    flux.base["num_inference_steps"] = 6
    flux.first()
    whole = [each.latents for each in refinements(flux, flux.eager, 1)]
    replay, launched = Tape.replay, itertools.count(1)

    def interrupting(tape: Tape) -> None:
        replay(tape)
        flux.pipe._interrupt = next(launched) == 2

    with monkeypatch.context() as patch:
        patch.setattr(Tape, "replay", interrupting)
        found = flux.alone(flux.fast, 1)[0]
    assert flux.report.engine == "loop graph"
    assert flux.report.interrupted
    assert any(torch.equal(found, each) for each in whole[:-1])
    assert torch.equal(in_a_thread(lambda: flux.alone(flux.fast, 1)[0]), whole[-1])
    flux.replayed(2)
    assert not flux.report.interrupted


def test_an_interrupted_first_call_is_not_recorded(flux: Twins) -> None:
    flux.base["num_inference_steps"] = 6

    def interrupt(y: Tensor) -> Tensor:
        flux.pipe._interrupt = True
        return y

    layer = put(flux, interrupt)
    flux.alone(flux.fast)
    assert flux.report.interrupted
    assert flux.counts == (0, 0)
    layer.act = torch.tanh
    flux.first()


def test_an_error_between_waves_gives_the_device_back(flux: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while the traceback of the error is kept, as sys.last_exc does."""

    def fail(*_: Any) -> None:
        raise ValueError("of the bar")

    flux.first()
    with monkeypatch.context() as patch:
        bar = SimpleNamespace(update=fail)
        patch.setattr(type(flux.pipe), "progress_bar", lambda *_, **__: nullcontext(bar))
        with pytest.raises(ValueError, match="of the bar") as kept:
            flux.alone(flux.fast)
    assert torch.equal(in_a_thread(lambda: flux.alone(flux.fast, 1)[0]), flux.alone(flux.eager, 1)[0])
    assert kept.value.__traceback__ is not None


def test_three_threads_get_what_each_gets_alone(flux: Twins) -> None:
    calls: list[dict[str, Any]] = [{"prompt": "a cat"}, {"prompt": "ships"}, {"num_inference_steps": 5}]
    expected = [flux.alone(flux.eager, number, **call)[0] for number, call in enumerate(calls)]
    gate = threading.Barrier(len(calls))

    def work(number: int) -> list[str]:
        torch.set_num_threads(1)
        gate.wait()
        engines = []
        for _ in range(4):
            given = {**flux.base, **calls[number]}
            found = flux.fast(**given, generator=torch.Generator().manual_seed(number))[0]
            assert torch.equal(found, expected[number])
            engines.append(flux.fast.report.engine)
        return engines

    with ThreadPoolExecutor(len(calls)) as pool:
        engines = list(pool.map(work, range(len(calls))))
    assert {ran[-1] for ran in engines} == {"loop graph"}
    assert flux.fast.graphs.held == 2
    assert flux.fast.graphs.replayed == sum(ran.count("loop graph") for ran in engines)


@pytest.mark.parametrize("settings", [{"num_blocks": 3}, {"method": "sequential"}, {"num_blocks": 3, "exact": True}])
def test_a_replay_that_diverges_raises_and_gives_the_device_back(settings: dict[str, Any]) -> None:
    twins = Twins(**settings)
    other = Twins()
    twins.first()
    other.first()
    weight = twins.network.proj_out.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
    with pytest.raises(DivergenceError) as raised:
        twins.alone(twins.fast)
    assert twins.report is raised.value.report
    # a method that diverges is followed by eager steps
    assert twins.report.engine == ("loop graph" if settings.get("method") == "sequential" else "eager")
    expected = other.alone(other.eager, 1)[0]
    assert torch.equal(in_a_thread(lambda: other.alone(other.fast, 1)[0]), expected)
    with torch.no_grad():
        weight.copy_(kept)
    twins.replayed(1)


@pytest.mark.parametrize(
    ("settings", "checkpoints"),
    [
        ({"method": "sequential"}, 1),
        ({"method": "srds", "num_blocks": 4, "exact": True}, 5),
        ({"method": "srds", "num_blocks": 4, "max_iterations": 1, "tolerance": 0.0}, 2),
        ({"method": "srds", "num_blocks": 4, "max_iterations": 0}, 1),
        ({"method": "srds", "num_blocks": 4, "tolerance": 1.0}, 2),
    ],
    ids=["sequential", "exact", "one iteration", "coarse sweep", "tolerance"],
)
def test_one_launch_from_checkpoint_to_checkpoint(
    settings: dict[str, Any], checkpoints: int, launched: list[Tape]
) -> None:
    twins = Twins(**settings)
    twins.first(num_inference_steps=8)
    launched.clear()
    twins.replayed(1, num_inference_steps=8)
    assert len(launched) == len(set(launched)) == checkpoints
    assert twins.report.dropped_waves == 0
    assert "loop graph" in str(twins.report)
    assert "recording" not in str(twins.report)


@pytest.mark.parametrize("settings", [{"tolerance": 0.0}, {"exact": True}], ids=["tolerance 0", "exact"])
def test_waves_launched_ahead_of_a_stop_are_dropped_and_reported(
    settings: dict[str, Any], launched: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where runs hardly ever stop early, the next waves are launched before it is known. Here they do, or fail."""
    twins = Twins(method="srds", num_blocks=6, **settings)
    twins.base["num_inference_steps"] = 12
    scale(twins, 1e-6)
    twins.first()
    assert twins.report.iterations < 6, "this test needs a run that stops early"
    assert twins.report.dropped_waves == 0
    launched.clear()
    report = (twins.replayed(1), twins.report)[1]
    assert len(launched) == report.iterations + 2
    assert report.dropped_waves > 0
    assert "dropped" in str(report)

    def fail(self: Run, checkpoint: Any) -> Any:
        raise Diverged("it was made to")

    monkeypatch.setattr(Run, "_judge", fail)
    with pytest.raises(DivergenceError) as caught:
        twins.alone(twins.fast, 1)
    assert caught.value.report.dropped_waves > 0


@pytest.mark.parametrize(
    ("kind", "ahead"),
    [("blind", [True, True, True, False, False]), ("calibrated", [True] * 5), ("streamed", [False] * 5)],
)
def test_where_a_run_cannot_stop_yet_the_next_waves_are_launched_before_its_change_is_read(
    kind: str, ahead: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of a sweep is estimated from the fourth change on, not before. A stream shows all samples."""
    twins = Twins(method="collocation", max_iterations=6, tolerance=1e-9)
    twins.base["num_inference_steps"] = 12
    if kind == "calibrated":
        plan = fixed_at(choose(12, Settings(method="collocation")), 6)
        twins.fast, twins.eager = (
            srds_fast.compile(twins.pipe, plan=dataclasses.replace(plan, engine=engine))
            for engine in ("graph", "eager")
        )
    twins.first()
    events: list[str] = []
    for owner, name, event in ((LoopGraph, "launch", "launch"), (Run, "_judge", "read")):
        own = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *given, own=own, event=event, **how: (events.append(event), own(*given, **how))[1]
        )
    if kind == "streamed":
        refinements(twins, twins.fast)
    else:
        twins.alone(twins.fast)
    assert twins.report.dropped_waves == 0
    between = [event for is_ahead in ahead for event in (["launch", "read"] if is_ahead else ["read", "launch"])]
    assert events == ["launch", *between, "read"]


def test_what_runs_are_expected_to_take_at_least_is_launched_ahead() -> None:
    """One iteration more is left to chance."""
    plan = choose(12, Settings(method="collocation", max_iterations=8, tolerance=1e-9))
    curve = CostCurve((1, 100), (1e-3, 1e-3))
    candidate = Candidate(plan.short(), 7, 7, 7, 7, 7e-3, 7e-3)
    plan = dataclasses.replace(plan, prediction=Prediction(candidate, (candidate,), "of a test", curve, earliest=7))
    stock = scheduler()
    stock.set_timesteps(12)
    run = Run(plan, torch.zeros(1, 4), noise_table(stock))
    assert [run.may_launch_ahead(iteration) for iteration in range(1, 9)] == [True] * 5 + [False] * 3


def test_what_is_recorded_in_warmup_alone_serves_the_plan_that_warmup_came_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls are learnt from, and might ask for another plan: not while nothing is recorded for it."""
    curve = CostCurve((1, 8, 32), (1e-3, 2.4e-3, 8e-3))
    monkeypatch.setattr(pricing, "measure", lambda *arguments, **kwargs: curve)
    monkeypatch.setattr(pricing, "between_calls", lambda *arguments: 0.0)
    twins = Twins()
    fast = srds_fast.compile(twins.pipe, engine="graph", lazy_capture=False, strict=True)
    call = {**twins.base, "num_inference_steps": 25}
    fast.warmup(**call)
    recorded = fast.graphs.captured
    for seed in range(3):
        fast(**call, generator=torch.Generator().manual_seed(seed))
        assert fast.report.engine != "eager"
    assert fast.graphs.captured == recorded


def test_a_recording_that_is_interrupted_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """By Ctrl-C, while a call goes further than any before it: no wave is lost, nothing is given up for good."""
    twins = loose()
    twins.first(0)
    scale(twins)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tape.TapeRecorder.record", interrupt)
        with pytest.raises(KeyboardInterrupt):
            twins.alone(twins.fast, 1)
    twins.first(0)
    twins.replayed(1)
    assert twins.fast.graphs.failed == 0


def test_a_call_that_is_done_does_not_fail_for_its_recording(flux: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens while it is made."""

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr("srds_fast.engine.graphs.cache.compare", fail)
    for seed in range(2):
        flux.eagerly("the device is gone", seed)
    assert flux.fast.graphs.failed == 1


def test_a_comparison_that_is_interrupted_gives_the_device_back(flux: Twins, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the error, and with it all its frames, is kept."""

    def interrupt(like: Tensor) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("srds_fast.engine.graphs.loop_graph._Arriving", interrupt)
        with pytest.raises(KeyboardInterrupt) as kept:
            flux.alone(flux.fast)
    assert in_a_thread(lambda: flux.alone(flux.fast, 1)[0]) is not None
    assert kept.value is not None


def test_compiled_code_is_not_compiled_again_in_a_capture() -> None:
    """It is guarded by the modes that are on: a guard that only stopped looking would make it compile anew."""
    from srds_fast.engine.graphs.capture_checks import CaptureCheck

    compilations: list[int] = []

    def backend(module: Any, inputs: Any) -> Any:
        compilations.append(1)
        return module.forward

    function = torch.compile(lambda x: x * 2 + 1, backend=backend)
    x = torch.randn(4)
    with torch.no_grad():
        expected = function(x)
        with CaptureCheck() as guard, guard.network(unseen=True):
            found = function(x)
            assert torch.equal(found, expected)
        with CaptureCheck() as guard, pytest.raises(CaptureFailed), guard.network():
            x.tolist()
    assert compilations == [1]
