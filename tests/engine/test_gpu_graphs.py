"""Graphs on a CUDA device: what the tape promises on the CPU, of CUDA graphs.

The eager twin of every call runs on the same device, the same kernels on the same shapes. At one sample a replay
repeats its launches, so it must give the same bits: no operation of these networks adds atomically, cuDNN does not
benchmark, and torch gives cuBLAS a workspace of the same size on every stream.
"""

from __future__ import annotations

import functools
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tiny
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from twins import Act, Twins, differ

import srds_fast
from srds_fast.engine.graphs import utilisation
from srds_fast.engine.graphs.runner import GraphRunner

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
STEPS = 4
ENGINES = {"graph": "loop graph", "network-graphs": "network graphs"}
METHODS: dict[str, dict[str, Any]] = {
    "srds": {"method": "srds", "num_blocks": 3},
    "exact": {"method": "srds", "num_blocks": 3, "exact": True},
    "sequential": {"method": "sequential"},
}


@functools.cache
def untouched(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A pipe for tests that do not change it."""
    return tiny.PIPELINES[name][0]().to(DEVICE, dtype)


def twins_of(
    name: str = "flux", pipe: Any = None, engine: str = "graph", graphs: dict[str, Any] | None = None, **settings: Any
) -> Twins:
    """A pipe on the device, on two engines; flux records fastest."""
    pipe = tiny.PIPELINES[name][0]().to(DEVICE) if pipe is None else pipe
    twins = Twins(name, pipe, graphs, engine, **settings)
    twins.base["num_inference_steps"] = STEPS
    return twins


FEW = ("stable_diffusion", "flux", "ddpm", "stable_diffusion_inpaint")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.exhaustive) for name in tiny.PIPELINES]
)
def test_replay_equals_eager(name: str, engine: str, method: str, dtype: torch.dtype) -> None:
    """A loop that is driven replays its network alone, and says so."""
    twins = twins_of(name, untouched(name, dtype), engine, **METHODS[method])
    results = [twins.same()]
    if twins.report.path == "drive":
        assert "driven" in twins.report.engine_reason
        twins.same(1)
        assert twins.report.engine == "network graphs"
        return
    assert twins.fast.graphs.captured == 1, twins.report.engine_reason
    assert torch.equal(twins.replayed(), results[0])
    results.append(twins.replayed(1))
    assert differ(*results)


@pytest.mark.parametrize("engine", ENGINES)
def test_kinds_of_calls_that_share_memory(engine: str) -> None:
    """What one recording leaves in the pool the next one overwrites: of one pipeline, and of two."""
    flux, sd = (twins_of(name, untouched(name), engine) for name in ("flux", "stable_diffusion"))
    kinds: list[tuple[Twins, dict[str, Any]]] = [
        (flux, {}),
        (flux, {"num_inference_steps": STEPS + 2}),
        (sd, {}),
        (sd, {"width": 48}),
    ]
    results = [twins.same(**call) for twins, call in kinds]
    for _ in range(2):
        for (twins, call), expected in zip(kinds, results, strict=True):
            assert torch.equal(twins.replayed(**call), expected)
    kept = [twins.alone(twins.fast, 1, **call)[0] for twins, call in kinds]
    for (twins, call), found in zip(kinds, kept, strict=True):
        assert torch.equal(found, twins.alone(twins.eager, 1, **call)[0])


def test_eviction_and_reset_give_memory_back() -> None:
    """All graphs of the pool may be gone by then."""
    twins = twins_of(graphs={"max_graphs": 1}, method="sequential")
    stats = twins.fast.graphs

    def alternate(calls: int) -> int:
        for number in range(calls):
            twins.alone(twins.fast, num_inference_steps=2 + number % 2)
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_reserved()

    before = alternate(6)
    assert alternate(50) <= before
    assert (stats.captured, stats.evicted, stats.held) == (56, 55, 1)
    reserved = []
    for _ in range(4):
        twins.fast.reset()
        assert stats.held == 0
        gc.collect()
        torch.cuda.empty_cache()
        reserved.append(torch.cuda.memory_reserved())
        twins.first()
        twins.replayed(1)
    assert reserved[-1] <= reserved[0]


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_leaks_over_a_thousand_replays(engine: str) -> None:
    fast = srds_fast.compile(untouched("ddim"), engine=engine, method="sequential")
    call = {**tiny.PIPELINES["ddim"][1], "num_inference_steps": 2}

    def replay(calls: int) -> tuple[int, int]:
        for _ in range(calls):
            fast(**call, generator=torch.Generator(DEVICE).manual_seed(0))
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    allocated, reserved = replay(10)
    after = replay(1000)
    assert after[0] == allocated
    assert after[1] <= reserved
    assert fast.graphs.replayed >= 1009, fast.report.engine_reason


@pytest.mark.parametrize("seen", [True, False], ids=["recorded before", "recorded meanwhile"])
def test_three_threads_on_streams_of_their_own(seen: bool) -> None:
    """Each gets what it gets alone."""
    twins = twins_of("stable_diffusion", untouched("stable_diffusion"), **METHODS["exact"])
    calls: list[dict[str, Any]] = [{"prompt": "a cat"}, {"prompt": "ships"}, {"num_inference_steps": STEPS + 1}]
    expected = [twins.alone(twins.eager, number, **call)[0] for number, call in enumerate(calls)]
    for call in calls if seen else []:
        twins.alone(twins.fast, **call)
    torch.cuda.synchronize()
    gate = threading.Barrier(len(calls))

    def work(number: int) -> tuple[list[Tensor], str]:
        with torch.cuda.stream(torch.cuda.Stream()):
            gate.wait()
            given = {**twins.base, **calls[number]}
            found = [twins.fast(**given, generator=torch.Generator().manual_seed(number))[0] for _ in range(6)]
            torch.cuda.current_stream().synchronize()
        return found, twins.fast.report.engine

    with ThreadPoolExecutor(len(calls)) as pool:
        for (found, engine), right in zip(pool.map(work, range(len(calls))), expected, strict=True):
            assert engine == "loop graph"
            assert all(torch.equal(each, right) for each in found)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("read", "why"),
    [(lambda y: y.sum().item(), "makes the host wait for a value"), (lambda y: torch.cuda.synchronize(), "captur")],
    ids=["refused", "by CUDA"],
)
def test_what_cannot_be_captured_runs_eagerly(read: Any, why: str, engine: str) -> None:
    """Refused before it runs, or by CUDA in the middle of a capture; what comes after runs as if nothing had been."""
    twins = twins_of(engine=engine)
    layer = twins.network.proj_out
    stream = torch.cuda.current_stream()
    twins.network.proj_out = Act(layer, lambda y: (read(y), y * 2.0)[1])
    results = []
    for seed in (0, 0, 1):
        results.append(twins.eagerly(why, seed))
        assert torch.cuda.current_stream() == stream
        assert not torch.cuda.is_current_stream_capturing()
    assert torch.equal(results[0], results[1])
    assert differ(*results[1:])
    stats = twins.fast.graphs
    assert (stats.captured, stats.replayed, stats.failed, stats.held) == (0, 0, 1, 0)
    twins.network.proj_out = layer
    twins.same()
    twins.replayed(1)


@pytest.fixture
def sync_is_an_error_in_replays(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """From the inputs of a replay to its result, operations that wait for the device raise; returns what replayed.

    torch flags reads of values and copies that block, not copies to pinned memory nor the wait for an event, which is
    how a replay looks at the change. What is copied to the device before it starts is not part of it.
    """
    replay, ran = GraphRunner._replay, []

    def watched(use: GraphRunner, captured: Any, *args: Any) -> Any:
        ran.append(captured.name)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return replay(use, captured, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(GraphRunner, "_replay", watched)
    return ran


# the sample of a sequential or an exact run is looked at for NaN at its end, which waits
UNDECIDED: dict[str, Any] = {"method": "srds", "num_blocks": 3, "max_iterations": 2, "tolerance": 1e-30}


@pytest.mark.parametrize("name", ["sample", "stable_diffusion", "flux"])
def test_no_replay_of_a_loop_waits_between_checkpoints(name: str, sync_is_an_error_in_replays: list[str]) -> None:
    if name == "sample":
        network, x, cond = eps_network()
        graphs = srds_fast.Graphs()
        for seed in range(3):
            srds_fast.sample(network, x + seed, scheduler(), 6, cond=cond, engine="graph", graphs=graphs, **UNDECIDED)
    else:
        twins = twins_of(name, untouched(name), **UNDECIDED)
        for seed in range(3):
            twins.alone(twins.fast, seed, num_inference_steps=6)
    assert sync_is_an_error_in_replays == ["loop graph"] * 2


@pytest.mark.parametrize("name", ["flux", "stable_diffusion"])
def test_auto_weighs_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny networks leave the device idle; a device that is slow to launch on may be told otherwise."""
    shares = []
    weigh = utilisation.utilisation

    def weighed(*args: Any) -> float:
        shares.append(weigh(*args))
        return shares[-1]

    monkeypatch.setattr(utilisation, "utilisation", weighed)
    twins = twins_of(name, untouched(name), graphs={"engine": "auto"})
    for seed in range(3):
        twins.same(seed)
        report = twins.fast.report
        assert report.engine in ENGINES.values() or report.engine_reason
    assert len(shares) == 1
    assert 0.0 < shares[0] <= 1.0
    if report.engine == "eager":
        assert "busy" in report.engine_reason


def test_compiled_code_in_a_graph() -> None:
    """One width: torch compiles once. Its code rounds otherwise than the network."""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=DEVICE))
    except Exception as why:
        pytest.skip(f"torch.compile does not work here: {type(why).__name__}")
    pipe = untouched("flux")
    twins = twins_of(pipe=pipe, method="sequential", torch_compile="default")
    plain = twins_of(pipe=pipe, method="sequential")
    twins.alone(twins.fast)
    for seed in (0, 1):
        found, expected = twins.alone(twins.fast, seed)[0], plain.alone(plain.eager, seed)[0]
        assert twins.fast.report.engine in ENGINES.values(), twins.report.engine_reason
        assert twins.fast.report.left_out == []
        assert float((found - expected).abs().max()) <= 1e-2 * float(expected.abs().max())


def test_warmup_touches_no_random_state() -> None:
    """DDPM draws from the global generator of the device where none is given."""
    twins = twins_of("ddpm", untouched("ddpm"))
    torch.cuda.manual_seed(5)
    states = torch.get_rng_state(), torch.cuda.get_rng_state()
    for _ in range(2):
        twins.fast.warmup(**twins.base)
        assert torch.equal(torch.get_rng_state(), states[0])
        assert torch.equal(torch.cuda.get_rng_state(), states[1])
    assert twins.fast.graphs.captured == 1, twins.report.engine_reason
    results, after = [], []
    for each in (twins.fast, twins.eager):
        torch.cuda.set_rng_state(states[1])
        results.append(torch.as_tensor(each(**twins.base)[0]))
        after.append(torch.cuda.get_rng_state())
    assert twins.report.engine == "loop graph"
    assert torch.equal(*results)
    assert torch.equal(*after)


@pytest.mark.parametrize(("method", "engine"), [("srds", "graph"), ("srds", "network-graphs"), ("parataa", "graph")])
def test_warmup_records_what_its_own_run_did_not_come_to(method: str, engine: str) -> None:
    """All iterations, though it stops after the first: a kernel that was never launched cannot be recorded."""
    twins = twins_of("ddim", untouched("ddim"), engine, method=method, tolerance=1e9)
    twins.base |= {"num_inference_steps": 7, "batch_size": 3}
    twins.fast.warmup(**twins.base)
    assert twins.fast.graphs.captured == 1, twins.report.engine_reason
    twins.alone(twins.fast)
    assert twins.fast.report.engine in ENGINES.values(), twins.report.engine_reason


class Eps(nn.Module):
    """A small denoiser of points."""

    def __init__(self, size: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2 * size + 1, 32), nn.SiLU(), nn.Linear(32, size))

    def forward(self, x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        y: Tensor = self.layers(torch.cat([x, shift, t[:, None].to(x.dtype) / 1000], dim=1))
        return y


def eps_network() -> tuple[Eps, Tensor, dict[str, Tensor]]:
    """A network, starting noise and conditioning on the device."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    network = Eps().eval().requires_grad_(False).to(DEVICE)
    x, shift = (torch.randn(1, 16, generator=generator).to(DEVICE) for _ in range(2))
    return network, x, {"shift": shift}


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(clip_sample=False)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", METHODS)
def test_sample(method: str, engine: str) -> None:
    network, x, cond = eps_network()
    graphs = srds_fast.Graphs()
    settings = METHODS[method]

    def both(x: Tensor, cond: dict[str, Tensor]) -> str:
        expected = srds_fast.sample(network, x, scheduler(), 8, cond=cond, engine="eager", **settings)
        found = srds_fast.sample(network, x, scheduler(), 8, cond=cond, engine=engine, graphs=graphs, **settings)
        assert found.sample.device == x.device
        assert torch.equal(found.sample, expected.sample)
        assert found.report.waves == expected.report.waves
        return found.report.engine

    assert both(x, cond) == ("eager" if engine == "graph" else ENGINES[engine])
    for seed in range(3):
        assert both(x + seed, {"shift": cond["shift"] * seed}) == ENGINES[engine]
    network.layers[-1].weight.mul_(1.5)
    assert both(x, cond) == ENGINES[engine]
    assert graphs.stats.captured == 1
    assert graphs.stats.replayed >= 4
