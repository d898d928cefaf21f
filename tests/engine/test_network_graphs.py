"""Network graphs: waves of every plan replay the network's call of their width, to the bit what an eager run gives."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from calls import assert_close, by_turns
from tape import Tape
from torch import Tensor
from twins import Twins

import srds_fast
from srds_fast import CaptureFailed
from srds_fast.engine.graphs import cache, network_graphs, recorder, utilisation
from srds_fast.engine.graphs.utilisation import BUSY
from srds_fast.engine.run import Run
from srds_fast.methods import ParaDiGMS, ParaTAA

METHODS: dict[str, dict[str, Any]] = {
    "srds": {"method": "srds", "num_blocks": 3, "max_iterations": 2},
    "exact": {"method": "srds", "exact": True, "num_blocks": 4},
    "one in flight, few rows": {"method": "srds", "tolerance": 0.0, "num_blocks": 3, "in_flight": 1, "max_rows": 2},
    "sequential": {"method": "sequential"},
    "collocation": {"method": "collocation", "max_iterations": 2},
    "chords": {"method": "chords"},
    "sliding window": {"method": ParaDiGMS(window=4)},
    "sliding window that mixes": {"method": ParaTAA(window=4, step_tolerance=0.1, order=3, history=1)},
}


def widths_of(twins: Twins) -> int:
    return len({len(positions) for positions in twins.fast.plan_for(**twins.base).program().positions})


@pytest.mark.parametrize("method", METHODS)
def test_every_method_replays_one_graph_a_width(method: str, launched: list[Tape]) -> None:
    """From the first call on: only the first wave of each width runs eagerly, and is recorded."""
    twins = Twins("flux", engine="network-graphs", **METHODS[method])
    twins.base["num_inference_steps"] = 8
    twins.same(0)
    met_twice = "sliding" in method or twins.report.waves > widths_of(twins)
    assert twins.report.engine == ("network graphs" if met_twice else "eager")
    assert twins.report.capture_seconds > 0
    recorded = len(set(map(id, launched)))
    assert recorded <= widths_of(twins)
    launched.clear()
    twins.replayed(1)
    assert len(set(map(id, launched))) <= recorded
    assert twins.report.waves >= len(launched) > 0
    if "sliding" not in method:
        assert len(launched) == twins.report.waves, "one launch a wave"
    assert twins.counts[0] == 1


FEW = ("stable_diffusion_controlnet_2", "stable_diffusion_3", "flux_guidance", "dit", "ddpm")


@pytest.mark.parametrize(
    "name",
    [
        name if name in FEW else pytest.param(name, marks=pytest.mark.exhaustive)
        for name in tiny.PIPELINES
        if "inpaint" not in name
    ],
)
def test_every_pipeline(name: str) -> None:
    twins = Twins(name, engine="network-graphs", method="srds", num_blocks=2, max_iterations=1)
    twins.base["num_inference_steps"] = 4
    twins.same(0)
    twins.replayed(1)


def _look(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return tensors


def _change(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"latents": tensors["latents"] * 1.1} if step == 3 else {}


@pytest.mark.parametrize("engine", ["graph", "network-graphs"])
@pytest.mark.parametrize(
    "name", ["stable_diffusion", "stable_diffusion_controlnet_2", "stable_diffusion_inpaint", "flux"]
)
def test_a_loop_that_is_driven_replays_its_network(name: str, engine: str, launched: list[Tape]) -> None:
    """The first wave is the loop's own call, and runs eagerly."""
    twins = Twins(name, engine=engine, method="srds", num_blocks=2, max_iterations=1)
    driven = by_turns(twins.fast)
    by_turns(twins.eager)
    twins.base["num_inference_steps"] = 6
    twins.same(0, **driven)
    assert twins.report.capture_seconds > 0
    launched.clear()
    twins.same(1, **driven)
    assert (twins.report.path, twins.report.engine) == ("drive", "network graphs")
    assert twins.report.engine_reason == f"the pipeline's own loop runs for the rows: {twins.report.drive_reason}"
    assert twins.report.capture_seconds == 0
    calls_a_wave = 2 if "controlnet" in name else 1
    assert len(launched) >= calls_a_wave * (twins.report.waves - 1) > 0


def test_a_callback_that_changes_the_latents_goes_on_with_graphs(launched: list[Tape]) -> None:
    twins = Twins("flux", engine="network-graphs", method="srds", num_blocks=2)
    twins.base["num_inference_steps"] = 8
    for seed in range(2):
        launched.clear()
        twins.same(seed, callback_on_step_end=_change)
        assert "the callback changed latents at step 3" in twins.report.fallback_reason
    assert twins.report.engine == "network graphs"
    assert len(launched) == twins.report.waves


@pytest.mark.parametrize("method", ["srds", "sequential"])
def test_a_callback_that_changes_the_network_ends_the_replays(method: str, launched: list[Tape]) -> None:
    """A graph would go on with the number that it was recorded with."""
    twins = Twins("flux", engine="network-graphs", method=method)
    twins.base["num_inference_steps"] = 8
    norm = twins.network.norm_out.norm
    before = norm.eps

    def change(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        norm.eps = 0.5 if step == 3 else norm.eps
        return tensors

    def found(each: Any, seed: int, **call: Any) -> Tensor:
        norm.eps = before
        return twins.alone(each, seed, **call)[0]

    for seed in range(3):
        launched.clear()
        expected = found(twins.eager, seed, callback_on_step_end=change)
        assert torch.equal(found(twins.fast, seed, callback_on_step_end=change), expected)
        assert "FluxTransformer2DModel.norm_out.norm.eps at step 3" in twins.report.fallback_reason
    assert 0 < len(launched) < twins.report.waves
    assert not torch.equal(expected, found(twins.eager, 2))
    norm.eps = before
    twins.same(3, callback_on_step_end=_look)


def test_a_network_that_another_thread_changes_is_not_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    twins = Twins("flux")
    twins.first(0)
    twins.replayed(1)
    norm, received = twins.network.norm_out.norm, Run.received

    def switch(run: Run) -> None:
        norm.eps = 0.5
        received(run)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "received", switch)
        found = twins.alone(twins.fast, 2)[0]
    assert "norm_out.norm.eps was changed in the middle of the call" in twins.report.fallback_reason
    assert twins.report.engine == "eager"
    # a loop of one row a wave gives the same but for rounding
    assert_close(found, twins.alone(twins.eager, 2)[0])


def test_a_driven_loop_on_a_busy_device_records_nothing_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under engine="auto" the network is weighed before the first recording, and not again in later calls."""
    shares: list[float] = []
    monkeypatch.setattr(utilisation, "utilisation", lambda call, device: shares.append(BUSY) or BUSY)
    monkeypatch.setattr("srds_fast.pipelines.call._graphs_on", lambda device: True)
    twins = Twins("flux", graphs={"engine": "auto"}, num_blocks=2, max_iterations=1)
    for seed in range(2):
        twins.eagerly("the device is busy", seed, callback_on_step_end=_look)
        assert twins.counts == (0, 0)
    assert shares == [BUSY]


def test_plans_of_one_network_share_its_graphs() -> None:
    """Another method, number of steps or tolerance, and keep_trajectory: no width is recorded twice."""
    pipe, graphs = tiny.flux(), None
    seen: set[int] = set()
    for settings, steps in (
        ({"method": "srds", "num_blocks": 4, "exact": True}, 8),
        ({"method": "srds", "num_blocks": 4, "tolerance": 1e-3}, 8),
        ({"method": "sequential"}, 11),
    ):
        twins = Twins("flux", pipe, engine="network-graphs", **settings)
        twins.fast._srds.graphs = graphs = graphs or twins.fast._srds.graphs
        twins.base["num_inference_steps"] = steps
        twins.same(0)
        widths = {len(positions) for positions in twins.fast.plan_for(**twins.base).program().positions}
        assert (twins.report.capture_seconds > 0) == bool(widths - seen)
        seen |= widths
        assert twins.counts[0] == 1
    twins.replayed(1, keep_trajectory=True)


def test_samples_that_finish_apart_narrow_the_batch_as_in_an_eager_run() -> None:
    twins = Twins("flux", engine="network-graphs", num_blocks=4, tolerance=1e-3)
    call = {"true_cfg_scale": 3.0, "negative_prompt": "dog", "num_inference_steps": 8, "num_images_per_prompt": 3}
    for seed in range(4):
        twins.same(seed, **call)
        assert twins.report.engine == "network graphs"
        assert twins.report.evaluations == twins.eager.report.evaluations
    twins.replayed(3, **call | {"true_cfg_scale": 2.0})


@pytest.mark.parametrize(
    ("settings", "call"),
    [({"method": ParaDiGMS(window=4)}, {}), ({"method": "srds", "num_blocks": 3}, {"keep_trajectory": True})],
    ids=["sliding window", "states kept"],
)
def test_what_no_loop_graph_can_hold_runs_on_network_graphs(settings: dict[str, Any], call: dict[str, Any]) -> None:
    """Asked for "graph", it says why there is none."""
    twins = Twins("flux", **settings)
    twins.base["num_inference_steps"] = 8
    twins.first(0, **call)
    for seed in (1, 2):
        twins.same(seed, **call)
        assert twins.report.engine == "network graphs"
        assert "replay cannot decide" in twins.report.engine_reason or "replay does not" in twins.report.engine_reason
    assert twins.counts == (1, 2)


def test_a_long_loop_runs_on_network_graphs_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MOST_OPERATIONS", 500)
    twins = Twins("flux")
    twins.base["num_inference_steps"] = 6
    twins.first(0)
    twins.same(1)
    assert twins.report.engine == "network graphs"
    assert "One graph of the loop would hold about" in twins.report.engine_reason


def test_memory_is_left_for_the_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """First the loop graph takes too much, then the network graphs as well."""
    left = iter([100, 40, *[100, 98] * 20])
    monkeypatch.setattr(recorder, "free_memory", lambda device: next(left))
    twins = Twins("flux")
    twins.base["num_inference_steps"] = 6
    twins.first(0)
    twins.same(1)
    assert twins.report.engine == "network graphs"
    assert "Decoding needs memory too" in twins.report.engine_reason
    assert twins.fast.graphs.nbytes == 2 * widths_of(twins)
    some = Twins("flux", engine="network-graphs", method="srds", num_blocks=4, exact=True)
    some.base["num_inference_steps"] = 8
    left = iter([*[100, 98] * 2, *[100, 10] * 20])
    for seed in range(2):
        some.same(seed)
        assert some.report.engine == "network graphs", "what was recorded before is replayed"
        assert "The network graphs would take" in some.report.engine_reason
    assert some.counts == (1, 2)
    strict = Twins("flux", engine="network-graphs", graphs={"strict": True})
    left = iter([100, 10] * 20)
    with pytest.raises(CaptureFailed, match="The network graphs would take"):
        strict.fast(**strict.base)


def test_the_widths_of_a_network_are_bounded(monkeypatch: pytest.MonkeyPatch, launched: list[Tape]) -> None:
    monkeypatch.setattr(network_graphs, "MOST_WIDTHS", 2)
    twins = Twins("flux", engine="network-graphs", method="srds", num_blocks=4, exact=True)
    twins.base["num_inference_steps"] = 8
    twins.same(0)
    assert widths_of(twins) > 2
    (graphs,) = twins.fast._srds.graphs._kept.values()
    assert len(graphs._graphs) == 2
    twins.same(1)


def test_nothing_is_recorded_while_serving_and_warmup_records_every_width() -> None:
    """Also the widths that the run of the warm-up did not come to."""
    twins = Twins("flux", engine="network-graphs", method="srds", num_blocks=4, graphs={"lazy_capture": False})
    twins.base["num_inference_steps"] = 8
    twins.same(0)
    assert twins.report.engine == "eager"
    assert "lazy_capture=False" in twins.report.engine_reason
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_judge", lambda self, checkpoint: ())  # every run stops at its first checkpoint
        twins.fast.warmup(**twins.base)
    assert twins.report.waves < len(twins.fast.plan_for(**twins.base).program())
    twins.replayed(1)
    (graphs,) = twins.fast._srds.graphs._kept.values()
    assert len(graphs._graphs) == widths_of(twins)


def test_an_interrupt_ends_a_sequential_run_where_it_stands() -> None:
    twins = Twins("flux", engine="network-graphs", method="sequential")
    twins.base["num_inference_steps"] = 6
    twins.same(0)
    calls: list[int] = []

    def step(self: Any, *args: Any) -> None:
        calls.append(1)
        twins.fast._interrupt = len(calls) == 3

    with pytest.MonkeyPatch.context() as patch:
        replay = Tape.replay
        patch.setattr(Tape, "replay", lambda self: (step(self), replay(self))[1])
        found, *_ = twins.alone(twins.fast, 1)
    assert twins.report.interrupted
    assert found.isfinite().all()
    assert len(calls) == 3
    twins.fast._interrupt = False
    twins.replayed(2)


def test_the_older_name_is_accepted(tmp_path: Any) -> None:
    fast = srds_fast.compile(tiny.flux(), engine="wave-graphs", method="sequential")
    plan = fast.plan_for("a cat", num_inference_steps=3)
    assert plan.engine == "network-graphs"
    plan.save(tmp_path / "plan.json")
    kept = (tmp_path / "plan.json").read_text().replace("network-graphs", "wave-graphs")
    (tmp_path / "older.json").write_text(kept)
    assert srds_fast.Plan.load(tmp_path / "older.json") == plan


def test_without_a_recorder_of_its_device_a_call_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    from srds_fast.engine.graphs.recorder import RECORDERS

    monkeypatch.delitem(RECORDERS, "cpu")
    for engine in ("graph", "network-graphs"):
        Twins("flux", engine=engine).eagerly("graphs need a CUDA device, and the network is on cpu")


def test_what_keeps_its_device_busy_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decision, not a fallback: strict does not raise, and nothing is measured twice."""
    measured: list[int] = []
    monkeypatch.setattr(utilisation, "utilisation", lambda call, device: measured.append(1) or 0.95)
    monkeypatch.setattr("srds_fast.pipelines.call._graphs_on", lambda device: True)
    for settings in ({"method": "srds", "num_blocks": 3}, {"method": ParaDiGMS(window=3)}):
        twins = Twins("flux", graphs={"strict": True, "engine": "auto"}, **settings)
        measured.clear()
        for seed in range(3):
            assert twins.alone(twins.fast, seed)[0].isfinite().all()
            assert "busy for 95%" in twins.report.engine_reason
        assert measured == [1]
        assert (twins.fast.graphs.captured, twins.fast.graphs.failed) == (0, 0)
