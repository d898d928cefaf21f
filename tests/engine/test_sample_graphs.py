"""`sample` on graphs: what is looked up behind a callable, and that nothing else can go stale."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler
from torch import Tensor, nn

import srds_fast
from srds_fast import InvalidArgument
from srds_fast.engine.graphs.cache_key import function_key, modules_of

Denoiser = Callable[..., Tensor]


class Policy(nn.Module):
    """A small conditional network for action trajectories [rows, 16, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor, t: Tensor, goal: Tensor) -> Tensor:
        joined = torch.cat([x, goal[:, None].expand(-1, x.shape[1], -1)], -1)
        found: Tensor = self.b(torch.relu(self.a(joined))) * (t[:, None, None] / 1000)
        return found


@pytest.fixture
def policy() -> Policy:
    torch.manual_seed(0)
    return Policy()


def run(denoiser: Denoiser, seed: int = 0, scheduler: Any = None, **settings: Any) -> srds_fast.SampleResult:
    scheduler = scheduler or DDIMScheduler()
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 16, 4, generator=generator) * scheduler.init_noise_sigma
    goal = torch.randn(2, 4, generator=generator)
    settings = {"num_blocks": 4, "max_iterations": 2, **settings}
    return srds_fast.sample(denoiser, x, scheduler, 12, cond={"goal": goal}, generator=generator, **settings)


def same(denoiser: Denoiser, seed: int, engine: str, graphs: srds_fast.Graphs, **settings: Any) -> str:
    """The result is that of the eager engine; returns what ran."""
    expected = run(denoiser, seed, engine="eager", **settings)
    found = run(denoiser, seed, engine=engine, graphs=graphs, **settings)
    assert torch.equal(found.sample, expected.sample)
    assert torch.is_grad_enabled()
    assert not found.sample.requires_grad
    return found.report.engine


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerAncestralDiscreteScheduler])
@pytest.mark.parametrize("engine", ["graph", "network-graphs"])
def test_replay_equals_eager(engine: str, scheduler: Any, policy: Policy) -> None:
    graphs = srds_fast.Graphs()
    ran = [same(policy, seed, engine, graphs, scheduler=scheduler()) for seed in range(3)]
    if engine == "graph":
        assert ran == ["eager", "loop graph", "loop graph"]
    else:
        assert ran == ["network graphs"] * 3
    assert (graphs.stats.captured, graphs.stats.replayed) == (1, len(ran) - ran.count("eager"))


def _partial(policy: Policy, gain: float) -> Denoiser:
    return functools.partial(lambda w, x, t, goal: w * policy(x, t, goal), gain)


def _nested(policy: Policy, gain: float) -> Denoiser:
    def scaled(x: Tensor) -> Tensor:
        return gain * x

    return lambda x, t, goal: scaled(policy(x, t, goal))


class Agent:
    def __init__(self, policy: Policy, gain: float) -> None:
        self.policy, self.gain = policy, gain

    def act(self, x: Tensor, t: Tensor, goal: Tensor) -> Tensor:
        return self.gain * self.policy(x, t, goal)

    __call__ = act


class Slots:
    __slots__ = ("gain",)

    def __init__(self, gain: float) -> None:
        self.gain = gain


def _dictionary(policy: Policy, gain: float) -> Denoiser:
    settings = {"gain": gain}
    return lambda x, t, goal: settings["gain"] * policy(x, t, goal)


def _attribute(policy: Policy, settings: Any) -> Denoiser:
    return lambda x, t, goal: settings.gain * policy(x, t, goal)


# each makes, of a policy, a denoiser that multiplies its output by a number
SCALED: dict[str, Callable[[Policy, float], Denoiser]] = {
    "lambda": lambda policy, gain: lambda x, t, goal, gain=gain: gain * policy(x, t, goal),
    "partial": _partial,
    "nested function": _nested,
    "method": lambda policy, gain: Agent(policy, gain).act,
    "object": Agent,
    "dictionary": _dictionary,
    "namespace": lambda policy, gain: _attribute(policy, SimpleNamespace(gain=gain)),
    "slots": lambda policy, gain: _attribute(policy, Slots(gain)),
    "global": lambda policy, gain: FunctionType(_global.__code__, {"GAIN": gain, "network": policy}),
}


def _global(x: Tensor, t: Tensor, goal: Tensor) -> Tensor:
    return GAIN * network(x, t, goal)  # type: ignore[name-defined,no-any-return] # noqa: F821


@pytest.mark.parametrize("behind", SCALED)
def test_what_is_behind_a_denoiser_is_compared_by_value(behind: str, policy: Policy) -> None:
    make = functools.partial(SCALED[behind], policy)
    one, twin, other = map(make, (1.0, 1.0, 2.0))
    assert function_key(one) == function_key(twin) != function_key(other)
    assert modules_of(one) == (policy,)
    graphs = srds_fast.Graphs()
    ran = [same(make(gain), seed, "graph", graphs) for seed, gain in enumerate((1.0, 1.0, 2.0, 1.0))]
    assert ran == ["eager", "loop graph", "eager", "loop graph"]


def test_a_tensor_that_no_module_holds_is_refused_with_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    table = torch.linspace(0.1, 0.2, 4)
    graphs = srds_fast.Graphs()

    def denoiser(x: Tensor, t: Tensor, goal: Tensor) -> Tensor:
        return x * table + 0 * goal[:, None]

    with caplog.at_level(logging.WARNING, "srds_fast"):
        assert [same(denoiser, seed, "graph", graphs) for seed in range(3)] == ["eager"] * 3
    assert sum("neither an argument nor held" in record.getMessage() for record in caplog.records) == 1
    assert (graphs.stats.captured, graphs.stats.failed) == (0, 1)
    reason = run(denoiser, 0, engine="graph", graphs=graphs).report.engine_reason
    assert "Make it a parameter or a buffer" in (reason or "")


def test_graphs_without_a_place_to_keep_them_are_refused(policy: Policy) -> None:
    with pytest.raises(InvalidArgument, match=r"srds_fast\.Graphs\(\)"):
        run(policy, engine="graph")
    assert run(policy, engine="auto", graphs=srds_fast.Graphs()).report.engine == "eager", "on a CPU"


def test_a_setting_in_a_module_that_is_a_global_is_seen(policy: Policy) -> None:
    settings, graphs = ModuleType("settings"), srds_fast.Graphs()
    denoiser = FunctionType(_of_a_module.__code__, {"settings": settings, "network": policy})
    ran = []
    for gain in (1.0, 1.0, 2.0, 1.0):
        settings.gain = gain  # type: ignore[attr-defined]
        ran.append(same(denoiser, len(ran), "graph", graphs))
    assert ran == ["eager", "loop graph", "eager", "loop graph"]


def _of_a_module(x: Tensor, t: Tensor, goal: Tensor) -> Tensor:
    return settings.gain * network(x, t, goal)  # type: ignore[name-defined,no-any-return] # noqa: F821


def test_what_cannot_be_looked_into_is_not_recorded(policy: Policy) -> None:
    table = numpy.ones(4, dtype=numpy.float32)
    graphs = srds_fast.Graphs()
    denoiser = lambda x, t, goal: float(table[0]) * policy(x, t, goal)  # noqa: E731
    for seed in range(2):
        assert same(denoiser, seed, "graph", graphs) == "eager"
        table[0] += 1
    reason = run(denoiser, engine="graph", graphs=graphs).report.engine_reason
    assert "ndarray, whose contents are not known" in (reason or "")


def test_a_call_in_the_middle_of_a_replay_runs_eagerly(policy: Policy) -> None:
    """On the memory of the other it would spoil it. Between the waves of network graphs no call has the device."""
    graphs = srds_fast.Graphs()
    same(policy, 0, "graph", graphs)
    expected = [run(policy, seed, engine="eager").sample for seed in (1, 2)]
    for engine, ran in (("graph", "eager"), ("network-graphs", "network graphs")):
        nested: list[srds_fast.SampleResult] = []
        found = run(
            policy,
            1,
            engine=engine,
            graphs=graphs,
            observer=lambda _, nested=nested, engine=engine: nested.append(
                run(policy, 2, engine=engine, graphs=graphs)
            ),
        )
        assert torch.equal(found.sample, expected[0])
        for each in nested:
            assert torch.equal(each.sample, expected[1])
            assert each.report.engine == ran
    assert same(policy, 3, "graph", graphs) == "loop graph"


def test_a_call_that_waits_for_one_that_waits_for_it_goes_on_eagerly(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("srds_fast.engine.graphs.device_lock.LONGEST_WAIT", 0.2)
    graphs = srds_fast.Graphs()
    same(policy, 0, "graph", graphs)
    other: list[srds_fast.SampleResult] = []

    def observe(_: Any) -> None:
        thread = threading.Thread(target=lambda: other.append(run(policy, 2, engine="graph", graphs=graphs)))
        thread.start()
        thread.join()

    run(policy, 1, engine="graph", graphs=graphs, observer=observe)
    assert torch.equal(other[0].sample, run(policy, 2, engine="eager").sample)
    assert "may wait for this call" in (other[0].report.engine_reason or "")
    assert same(policy, 3, "graph", graphs) == "loop graph", "the recording is as good as before"
