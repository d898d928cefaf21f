"""Ranges timed by events of a CUDA device: eager waves, replays, and nothing of them in what is recorded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import srds_fast
from srds_fast import zoo

pytestmark = pytest.mark.gpu

CALL = {"num_inference_steps": 20, "guidance_scale": 3.0, "output_type": "latent"}
EXACT = {"method": "srds", "tolerance": 1e-30, "max_iterations": 1}


@pytest.mark.parametrize("overlap", ["batch", "streams"])
def test_eager_waves_are_timed_on_the_device(tmp_path: Path, overlap: str) -> None:
    fast = srds_fast.compile(zoo.load("digits").to("cuda"), engine="eager", overlap=overlap, **EXACT)
    fast("the digit one", **CALL)
    with srds_fast.profile(tmp_path / "trace.json"):
        fast("the digit one", **CALL)
    timeline = fast.report.timeline
    assert timeline["wave"]["count"] == fast.report.waves
    assert timeline["network"]["device_seconds"] > 0
    if overlap == "batch":  # otherwise two calls run side by side
        assert timeline["network"]["device_seconds"] <= timeline["wave"]["device_seconds"] * 1.001
    assert timeline["wave"]["device_seconds"] <= timeline["iteration"]["device_seconds"] * 1.001
    assert timeline["encode"]["device_seconds"] is None
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert "kernel" in {each.get("cat") for each in events}
    on_device = [each["name"] for each in events if each.get("cat") == "gpu_user_annotation"]
    assert [name for name in on_device if name.startswith("iteration")] == ["iteration 0", "iteration 1"]


@pytest.mark.parametrize("engine", ["graph", "network-graphs"])
def test_replays_are_timed_and_recordings_hold_no_event(tmp_path: Path, engine: str) -> None:
    pipe = zoo.load("digits").to("cuda")
    fast = srds_fast.compile(pipe, engine=engine, **EXACT)
    plain = srds_fast.compile(pipe, engine=engine, **EXACT)
    plain.warmup("the digit one", **CALL)
    with srds_fast.profile(tmp_path / "trace.json"):
        fast.warmup("the digit one", **CALL)  # recorded while somebody looks
        found = fast("the digit one", generator=torch.Generator("cuda").manual_seed(0), **CALL).images
    assert fast.report.engine == {"graph": "loop graph", "network-graphs": "network graphs"}[engine]
    assert fast.report.timeline["replay"]["device_seconds"] > 0
    expected = plain("the digit one", generator=torch.Generator("cuda").manual_seed(0), **CALL).images
    assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))
