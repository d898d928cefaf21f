"""Wave graphs, and the other ways in which a recording is kept small: what runs is the same to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from diffusers import DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler
from torch import Tensor
from twins import Twins

import srds_fast
from srds_fast import CaptureFailed
from srds_fast.engine.graphs import cache as graphs_module
from srds_fast.engine.graphs import use as use_module
from srds_fast.engine.graphs.tape import Tape
from srds_fast.engine.graphs.utilisation import BUSY, why_not_worth

METHODS: dict[str, dict[str, Any]] = {
    "srds": {"method": "srds", "num_blocks": 3, "max_iterations": 2},
    "exact": {"exact": True, "num_blocks": 4},
    "tolerance 0": {"tolerance": 0.0, "num_blocks": 3},
    "not pipelined": {"exact": True, "num_blocks": 3, "pipelined": False},
    "one in flight": {"tolerance": 0.0, "num_blocks": 3, "in_flight": 1},
    "few rows": {"exact": True, "num_blocks": 3, "max_rows": 2},
    "blocks of one step": {"exact": True, "num_blocks": 6},
    "sequential": {"method": "sequential"},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["flux", "ddpm", "pixart"])
def test_replay_equals_eager(name: str, method: str) -> None:
    twins = Twins(name, engine="wave-graphs", **METHODS[method])
    twins.base["num_inference_steps"] = 6
    twins.first(0)
    twins.replayed(1)
    twins.replayed(2)


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "dit", "ddim"])
def test_of_every_family(name: str) -> None:
    twins = Twins(name, engine="wave-graphs")
    twins.first(0)
    twins.replayed(1)


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda: EulerAncestralDiscreteScheduler(**tiny.SD_BETAS, steps_offset=1),
        lambda: DPMSolverMultistepScheduler(**tiny.SD_BETAS, steps_offset=1),
    ],
    ids=["noise", "two steps back"],
)
def test_schedulers_with_more_than_a_state(scheduler: Any) -> None:
    twins = Twins("stable_diffusion", tiny.stable_diffusion(scheduler()), engine="wave-graphs")
    twins.base |= {"num_inference_steps": 5, "height": 16, "width": 16}
    twins.first(0)
    twins.replayed(1)


def test_guidance_with_two_calls_and_samples_that_finish_apart() -> None:
    twins = Twins("flux", engine="wave-graphs", num_blocks=4, tolerance=1e-3)
    call = {"true_cfg_scale": 3.0, "negative_prompt": "dog", "num_inference_steps": 8, "num_images_per_prompt": 3}
    twins.first(0, 1e-5, **call)
    for seed in range(1, 4):
        twins.same(seed, 1e-5, **call)
        assert twins.report.engine == "wave graphs"
    twins.replayed(4, 1e-5, **call | {"true_cfg_scale": 2.0})


def replays(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    launched: list[Tape] = []
    replay = Tape.replay

    def counted(self: Tape) -> None:
        launched.append(self)
        replay(self)

    monkeypatch.setattr(Tape, "replay", counted)
    return launched


@pytest.mark.parametrize("method", ["exact", "sequential"])
def test_one_launch_a_wave_and_one_graph_a_width(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one to begin a run."""
    twins = Twins("flux", engine="wave-graphs", **METHODS[method])
    twins.base["num_inference_steps"] = 8
    twins.first(0)
    launched = replays(monkeypatch)
    twins.replayed(1)
    assert len(launched) == twins.report.waves + 1
    widths = {len(positions) for positions in twins.fast.plan_for(**twins.base).program().positions}
    assert len(set(map(id, launched))) == len(widths) + 1


def test_an_interrupt_comes_through_between_two_waves() -> None:
    twins = Twins("flux", engine="wave-graphs", num_blocks=3, tolerance=0.0)
    twins.base["num_inference_steps"] = 9
    twins.first(0)
    seen: list[int] = []

    def interrupt(checkpoint: Any) -> None:
        seen.append(checkpoint.iteration)
        twins.fast._interrupt = True

    from srds_fast.pipelines.call import run_call

    run_call(twins.fast, (), {**twins.base, "generator": torch.Generator().manual_seed(1)}, interrupt)
    assert seen == [0]
    assert twins.report.interrupted
    assert twins.report.engine == "wave graphs"
    twins.fast._interrupt = False
    twins.replayed(2)


def test_a_long_loop_gets_wave_graphs_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs_module, "MOST_OPERATIONS", 500)
    twins = Twins("flux")
    twins.first(0)
    twins.same(1)
    assert twins.report.engine == "wave graphs"
    assert "One graph of the loop would hold about" in twins.report.engine_reason


def test_memory_is_left_for_the_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """First the loop graph takes too much, then the wave graphs as well."""
    left = iter([100, 40, 100, 80, 100, 40, 100, 10])
    monkeypatch.setattr(graphs_module, "_free_memory", lambda device: next(left))
    twins = Twins("flux")
    twins.first(0)
    assert twins.fast.graphs.nbytes == 20
    twins.same(1)
    assert twins.report.engine == "wave graphs"
    assert "Room must be left to decode" in twins.report.engine_reason
    twins.same(2, num_inference_steps=4)
    twins.eagerly("The wave graphs would take", 3, num_inference_steps=4)
    strict = Twins("flux", graphs={"strict": True})
    monkeypatch.setattr(graphs_module, "_free_memory", lambda device: next(falling))
    falling = iter([100, 10, 100, 10])
    with pytest.raises(CaptureFailed, match="Room must be left"):
        strict.fast(**strict.base)


def test_what_keeps_its_device_busy_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decision, not a fallback: strict does not raise, and nothing is measured twice."""
    assert why_not_worth(BUSY - 0.01) is None
    measured: list[int] = []

    def share(call: Any, evaluate: Any) -> float:
        measured.append(1)
        return 0.95

    monkeypatch.setattr(use_module, "busy_share", share)
    twins = Twins("flux", graphs={"strict": True})
    twins.fast._srds.planner.settings = srds_fast.planner.settings.Settings(engine="auto")
    monkeypatch.setattr("srds_fast.pipelines.call._graphs_on", lambda device: True)
    for seed in range(3):
        assert twins.alone(twins.fast, seed)[0].isfinite().all()
        assert "busy for 95%" in twins.report.engine_reason
    assert measured == [1]
    assert (twins.fast.graphs.captured, twins.fast.graphs.failed) == (0, 0)


@pytest.mark.parametrize("engine", ["graph", "wave-graphs"])
@pytest.mark.parametrize("name", ["stable_diffusion_controlnet", "stable_diffusion_controlnet_2"])
def test_another_conditioning_scale_needs_no_other_recording(name: str, engine: str) -> None:
    twins = Twins(name, engine=engine, method="sequential")
    twins.base |= {"num_inference_steps": 2, "height": 16, "width": 16}
    several = name.endswith("2")
    scales = [[0.3, 0.7], [1.0, 0.2]] if several else [0.3, 1.2]
    found: list[Tensor] = [twins.first(0, controlnet_conditioning_scale=scales[0])]
    found.append(twins.replayed(0, controlnet_conditioning_scale=scales[1]))
    assert not torch.equal(*found)


def test_another_lora_scale_needs_no_other_recording() -> None:
    twins = Twins("flux")
    tiny.add_lora(twins.network)
    found = [twins.first(0, joint_attention_kwargs={"scale": 0.3})]
    found.append(twins.replayed(0, joint_attention_kwargs={"scale": 1.5}))
    found.append(twins.replayed(0, joint_attention_kwargs={"scale": 0.0}))
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])
    scaling = [layer.scaling for layer in twins.network.modules() if hasattr(layer, "scale_layer")]
    assert all(isinstance(number, float) for numbers in scaling for number in numbers.values()), "numbers are put back"


@pytest.mark.parametrize("engine", ["graph", "wave-graphs"])
def test_a_network_made_faster_is_recorded_so(engine: str) -> None:
    """Weights and states channels last, another attention: to rounding what it was, and replay equals eager."""
    pipe = tiny.stable_diffusion()
    options = {"attention": "sdpa", "channels_last": True, "method": "sequential"}
    plain = srds_fast.compile(pipe, method="sequential", engine="eager")
    call = {**tiny.PIPELINES["stable_diffusion"][1], "num_inference_steps": 2}

    def run(each: Any, seed: int) -> Tensor:
        return torch.as_tensor(each(**call, generator=torch.Generator().manual_seed(seed))[0])

    expected = run(plain, 1)
    fast, eager = (srds_fast.compile(pipe, engine=each, **{"method": "srds", **options}) for each in (engine, "eager"))
    run(fast, 0)
    found = run(fast, 1)
    assert fast.report.engine in ("loop graph", "wave graphs")
    assert fast.report.left_out == []
    assert torch.equal(found, run(eager, 1))
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert pipe.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert "AttnProcessor2_0" in {type(each).__name__ for each in pipe.unet.attn_processors.values()}


def test_what_cannot_be_had_is_told(caplog: pytest.LogCaptureFixture) -> None:
    twins = Twins("flux", graphs={"attention": "xformers", "channels_last": True})
    twins.same(0)
    assert any("xformers" in reason for reason in twins.report.left_out)
    assert any("no convolution network" in reason for reason in twins.report.left_out)
    assert "xformers" in str(twins.report)
    told = len(caplog.records)
    twins.same(1)
    assert len(caplog.records) == told, "once"
    strict = srds_fast.compile(twins.pipe, attention="xformers", strict=True, method="srds")
    with pytest.raises(srds_fast.UnsupportedPipeline, match="xformers"):
        strict(**twins.base)


@pytest.mark.parametrize(
    "settings",
    [
        {"attention": "flashy"},
        {"channels_last": 1},
        {"torch_compile": "reduce-overhead"},
        {"max_graphs": 0},
        {"max_graphs": True},
        {"lazy_capture": 1},
        {"engine": "graphs"},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_by_name(settings: dict[str, Any]) -> None:
    with pytest.raises(srds_fast.InvalidArgument, match=next(iter(settings))):
        srds_fast.compile(tiny.flux(), **{"method": "srds", **settings})


@pytest.mark.parametrize("name", ["flux", "ddpm", "stable_diffusion_controlnet"])
def test_coarse_rows_in_a_call_of_their_own(name: str) -> None:
    """To rounding what one batch gives; replay equals eager; the report tells."""
    both = Twins(name, method="srds", exact=True, num_blocks=3, overlap="streams")
    both.base |= {"num_inference_steps": 6, **({"height": 16, "width": 16} if "diffusion" in name else {})}
    both.first(0)
    found = both.replayed(1)
    assert both.report.overlap == "streams"
    assert both.eager.report.overlap == "streams"
    batch = srds_fast.compile(both.pipe, engine="eager", method="srds", exact=True, num_blocks=3)
    expected, *_ = both.alone(batch, 1)
    assert batch.report.overlap == "batch"
    assert float((found - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_two_calls_of_the_network_where_a_wave_has_both_kinds() -> None:
    pipe = tiny.flux()
    call = {**tiny.PIPELINES["flux"][1], "num_inference_steps": 6, "true_cfg_scale": 2.0, "negative_prompt": "dog"}
    fast = srds_fast.compile(pipe, engine="eager", method="srds", exact=True, num_blocks=3, overlap="streams")
    widths: list[int] = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    fast(**call)
    program = fast.plan_for(**call).program()
    assert widths == [len(positions) for positions in program.in_lanes().positions for _ in range(2)]
    assert len(program.in_lanes()) > len(program)


def test_where_there_is_but_one_batch_it_is_told() -> None:
    waves = Twins("flux", engine="wave-graphs", method="srds", exact=True, num_blocks=3, overlap="streams")
    waves.base["num_inference_steps"] = 6
    waves.same(0, 1e-5)
    waves.same(1, 1e-5)
    assert waves.report.engine == "wave graphs"
    assert waves.report.left_out == ["overlap='streams' was left out: a graph of a wave's width holds one batch"]
    driven = srds_fast.compile(waves.pipe, method="srds", exact=True, num_blocks=3, overlap="streams")
    driven(**waves.base, callback_on_step_end=lambda pipe, step, time, tensors: tensors)
    assert driven.report.left_out == ["overlap='streams' was left out: the loop is driven"]
    alone = srds_fast.compile(waves.pipe, method="sequential", overlap="streams")
    alone(**waves.base)
    assert alone.report.left_out == [], "there are no coarse rows"
    with pytest.raises(srds_fast.InvalidArgument, match="overlap"):
        srds_fast.compile(waves.pipe, overlap="stream", method="srds")


def test_the_faster_way_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the times say."""
    monkeypatch.setattr("srds_fast.pipelines.call._graphs_on", lambda device: True)
    for slow in ("streams", "batch"):
        monkeypatch.setattr(graphs_module, "_seconds", lambda captured, call, slow=slow: captured.overlap == slow)
        twins = Twins("flux", method="srds", exact=True, num_blocks=3, graphs={"overlap": "auto"})
        twins.base["num_inference_steps"] = 6
        twins.first(0, 1e-5)
        twins.same(1, 1e-5)
        assert twins.report.engine == "loop graph"
        assert twins.report.overlap != slow
