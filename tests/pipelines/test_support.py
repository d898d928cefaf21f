"""The support matrix: every cell of the guide's tables, against the stock pipeline."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import support
import tiny
import torch
from calls import assert_close, denoiser, drive, of_waves, watched
from support import DRIVEN, FEATURES, PIPELINES, SCHEDULERS, STEPS, Feature, Pipeline, Verdict
from thinned import thinned, thinned_product
from torch import Tensor

import srds_fast
from srds_fast import UnsupportedPipeline, UnsupportedScheduler
from srds_fast.schedulers import verify as noise

MODES: dict[str, dict[str, Any]] = {
    "sequential": {"method": "sequential"},
    "exact": {"exact": True},
    # the pipeline's own loop: with its own guidance, the oracle of the other way
    "driven": {"exact": True, "coarse_solver": "ddim", "num_blocks": 3},
}


@pytest.fixture(autouse=True)
def _no_tables_of_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell builds and checks its noise table on the scheduler as its own pipeline leaves it."""
    monkeypatch.setattr(noise, "_checked", {})


def run(pipe: Any, call: dict[str, Any]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Result, the states that the denoiser was given, and the states of all generators afterwards."""
    seeds = call.get("generator", 0)
    generators = [torch.Generator().manual_seed(seed) for seed in (seeds if isinstance(seeds, list) else [seeds])]
    torch.manual_seed(7)
    call = {"num_inference_steps": STEPS, **call, "generator": generators if len(generators) > 1 else generators[0]}
    with watched(denoiser(pipe)) as seen:
        output = pipe(**call)
    return torch.as_tensor(output[0]), seen, [*(each.get_state() for each in generators), torch.get_rng_state()]


def check(pipe: Any, call: dict[str, Any], verdict: Verdict, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell: equal to stock, rows as reported, nothing of the user's touched."""
    scheduler, config = pipe.scheduler, copy.deepcopy(dict(pipe.scheduler.config))
    expected, stock_seen, stock_states = run(pipe, call)
    parts = {name: vars(pipe)[name] for name in pipe.components}
    method = "auto" if call.get("num_inference_steps") == 1 else "srds"  # one step is not cut into blocks
    fast = srds_fast.compile(pipe, **{"method": method, **MODES[mode]})
    if mode == "driven":
        drive(monkeypatch)
    found, seen, states = run(fast, call)
    if fast.report.path == "drive" and verdict == DRIVEN:
        # later calls know what the first one has found out
        again, seen, states = run(fast, call)
        assert fast.report.rehearsal_calls == 0
        assert_close(again, found)
    report = fast.report
    if verdict == DRIVEN:
        assert report.fallback_reason is None
        assert report.path == ("takeover" if report.drive_reason is None else "drive")
        if report.path == "drive" and mode != "driven":
            assert any(word in report.drive_reason for word in ("callback", "guidance", "network", "step", "tensors"))
        samples, per_step = len(report.converged), len(stock_seen) // report.num_inference_steps
        seen = of_waves(seen, report, per_step, hasattr(pipe, "controlnet"))
        per_evaluation, odd = divmod(sum(map(len, stock_seen)), report.num_inference_steps * samples)
        if not odd:  # its calls are the same in all steps
            rows, waves = sum(map(len, seen)), len(seen)
            expected_rows, expected_waves = report.evaluations * per_evaluation, report.waves * per_step
            if report.path == "drive":  # rows at a point that is known need no turn
                assert rows <= expected_rows
                assert waves <= expected_waves
            else:
                assert rows == expected_rows
                # a wave over steps with and without a ControlNet calls its networks once for each of both
                windows = "control_guidance_start" in call
                assert expected_waves <= waves <= expected_waves * (1 + windows)
        assert report.evaluations == report.rows * samples
        assert all(report.converged)
    else:
        assert verdict.why in report.fallback_reason
        assert (report.path == "stock") == (verdict.kind == "stock loop")
    assert bool(expected.isfinite().all())
    assert_close(found, expected)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(states, stock_states, strict=True))
    assert pipe.scheduler is scheduler
    assert dict(pipe.scheduler.config) == config
    assert all(vars(pipe)[name] is part for name, part in parts.items())
    again, _, _ = run(pipe, call)
    assert torch.equal(again, expected), "the pipe gives its own result as before"


def name_of(value: Any) -> str:
    return getattr(value, "tiny", None) or getattr(value, "name", str(value))


def in_mode(mode: str, pipeline: Pipeline, scheduler: str, parity: int) -> bool:
    """Cells run "exact" and "sequential" in turn, so that both meet every pipeline and every scheduler.

    The matrix of `bench.quality.support` has both for all of them.
    """
    if mode == "driven":  # turns of the loop know nothing of a scheduler that its own tests do not
        return scheduler == pipeline.schedulers[0]
    return mode == ("exact", "sequential")[parity % 2] or len(pipeline.schedulers) == 1


CELLS = [
    (pipeline, scheduler, mode)
    for row, pipeline in enumerate(PIPELINES)
    for column, scheduler in enumerate(SCHEDULERS)
    if pipeline.verdict(scheduler)
    for mode in MODES
    if in_mode(mode, pipeline, scheduler, row + column)
]


def cases_of(feature: Feature) -> list[tuple[Feature, Pipeline, str]]:
    """A feature in all modes and on all its pipelines, each in turn."""
    names, modes = feature.pipelines, tuple(MODES)
    turns = range(max(len(names), len(modes)))
    return [(feature, support.BY_NAME[names[turn % len(names)]], modes[turn % len(modes)]) for turn in turns]


@pytest.mark.parametrize(("pipeline", "scheduler", "mode"), thinned(CELLS), ids=name_of)
def test_pipeline_by_scheduler(pipeline: Pipeline, scheduler: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = pipeline.verdict(scheduler)
    assert verdict is not None
    check(pipeline.build(scheduler), tiny.PIPELINES[pipeline.tiny][1], verdict, mode, monkeypatch)


@pytest.mark.parametrize(
    ("feature", "pipeline", "mode"),
    thinned(case for each in FEATURES for case in cases_of(each)),
    ids=name_of,
)
def test_feature(feature: Feature, pipeline: Pipeline, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = feature.build() if feature.build else pipeline.build(pipeline.schedulers[0])
    call = {**tiny.PIPELINES[pipeline.tiny][1], **feature.call}
    check(pipe, {**call, **(feature.prepare(pipe) or {})}, feature.verdict, mode, monkeypatch)


def test_the_default_command_runs_every_pipeline_scheduler_feature_and_mode() -> None:
    cells = [case.values for case in thinned(CELLS) if case.marks == ()]
    every = [{getattr(each, "name", each) for each in column} for column in zip(*cells, strict=True)]
    assert every == [set(support.BY_NAME), set(SCHEDULERS), set(MODES)]


@pytest.mark.parametrize(("name", "dtype"), thinned_product(tiny.PIPELINES, [torch.bfloat16, torch.float16]), ids=str)
def test_half_precision_loses_no_more_than_stock_and_the_network_keeps_its_dtype(name: str, dtype: torch.dtype) -> None:
    """Stock rounds its latents after every step, here they stay in float32: neither is the other's reference."""
    if (name, dtype) == ("ddpm", torch.bfloat16):
        support.needs_diffusers("0.40", "DDPMPipeline cannot give arrays of bfloat16")
    build, call = tiny.PIPELINES[name]
    scheduler = support.SCHEDULERS["Euler"]() if name in ("stable_diffusion", "stable_diffusion_inpaint") else None
    pipe = build(scheduler)
    expected = run(pipe, call)[0].float()
    pipe.to(dtype)
    error = []
    for settings in (None, {"method": "sequential"}, {"exact": True, "method": "srds"}):
        found, seen, _ = run(pipe if settings is None else srds_fast.compile(pipe, **settings), call)
        assert torch.isfinite(found).all()
        assert {states.dtype for states in seen} == {dtype}
        error.append(float((found.float() - expected).abs().mean()))
    assert max(error[1:]) < 2 * error[0]


@pytest.mark.parametrize("feature", [feature for feature in FEATURES if feature.verdict.kind == "stock loop"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_runs_on_the_stock_loop_is_logged_once_and_strict_refuses_it(feature: Feature, caplog: Any) -> None:
    pipeline = support.BY_NAME[feature.pipelines[0]]
    pipe = pipeline.build(pipeline.schedulers[0])
    call = {**tiny.PIPELINES[pipeline.tiny][1], **feature.call, **(feature.prepare(pipe) or {})}
    fast = srds_fast.compile(pipe, method="srds")
    for _ in range(2):
        fast(**call, num_inference_steps=2)
    assert [record.name for record in caplog.records].count("srds_fast") == 1
    with pytest.raises(UnsupportedPipeline, match=feature.verdict.why):
        srds_fast.compile(pipe, strict=True, method="srds")(**call, num_inference_steps=STEPS)


@pytest.mark.parametrize(("names", "other"), support.REPLACEMENTS.items())
def test_refused_schedulers_get_the_line_of_the_table(names: str, other: str) -> None:
    for name in names.split(", "):
        cls = next(
            found
            for suffix in ("Scheduler", "DiscreteScheduler", "MultistepScheduler")
            if (found := getattr(diffusers, name + suffix, None)) is not None
        )
        pipe = tiny.stable_diffusion()
        pipe.scheduler = cls()
        with pytest.raises(UnsupportedScheduler) as caught:
            srds_fast.compile(pipe, method="srds")
        assert f"`pipe.scheduler = diffusers.{other}.from_config(pipe.scheduler.config)`" in str(caught.value)


def test_the_guide_holds_the_tables() -> None:
    guide = support.GUIDE.read_text()
    assert support.written(guide) == guide, "run `python tests/support.py`"
