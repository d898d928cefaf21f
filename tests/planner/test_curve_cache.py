"""Cost curves on disk: found again by another process, refused where they are of something else."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from problems import noise, scheduler
from torch import Tensor, nn

import srds_fast
from srds_fast.engine.costs import Costs
from srds_fast.planner.curve_cache import VARIABLE, CurveCache
from srds_fast.sampling import sample as sample_module


class Network(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(width, width).double(), 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return 0.1 * self.layer(x)


def calls_beside_waves(folder: Any, monkeypatch: pytest.MonkeyPatch, network: Network | None = None) -> int:
    """Network calls that a first call of a fresh process makes in addition to its waves."""
    monkeypatch.setattr(sample_module, "costs_of_denoisers", Costs())
    network = network or Network()
    x = noise(1, network.layer.in_features)
    found = srds_fast.sample(network, x, scheduler(), 20, method="auto", explore=0, cache_dir=folder)
    return network.calls - found.report.waves


def test_another_process_finds_the_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert calls_beside_waves(tmp_path / "new", monkeypatch) > 0
    assert calls_beside_waves(tmp_path / "new", monkeypatch) == 0
    assert calls_beside_waves(tmp_path / "new", monkeypatch, Network(4)) > 0, "a network of other shapes"
    assert calls_beside_waves(None, monkeypatch) > 0
    monkeypatch.setenv(VARIABLE, str(tmp_path / "new"))
    assert calls_beside_waves(None, monkeypatch) == 0


@pytest.mark.parametrize("change", ["{", "[]", '{"of": 1}', "other call", "no rows", "infinite"])
def test_a_file_that_is_not_as_written_is_named_and_measured_anew(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls_beside_waves(tmp_path, monkeypatch)
    (file,) = tmp_path.iterdir()
    found = json.loads(file.read_text())
    if change == "other call":
        change = json.dumps({**found, "of": {**found["of"], "torch": "1.0"}})
    elif change == "no rows":
        change = json.dumps({**found, "curve": {**found["curve"], "rows": []}})
    elif change == "infinite":
        change = json.dumps(
            {**found, "curve": {**found["curve"], "seconds": [float("inf")] * len(found["curve"]["rows"])}}
        )
    file.write_text(change)
    caplog.set_level(logging.WARNING)
    assert calls_beside_waves(tmp_path, monkeypatch) > 0
    assert str(file) in caplog.text
    assert calls_beside_waves(tmp_path, monkeypatch) == 0, "it was written anew"
    assert [each.suffix for each in tmp_path.iterdir()] == [".json"]


def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for given in (tmp_path / "file" / "folder", 3):
        with pytest.raises(srds_fast.InvalidArgument, match="cache_dir"):
            CurveCache.of(given)  # type: ignore[arg-type]


def test_a_network_that_is_not_known_is_not_kept(tmp_path: Path) -> None:
    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return 0.1 * x

    srds_fast.sample(denoiser, torch.randn(1, 8), scheduler(), 20, method="auto", explore=0, cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_network_that_is_run_with_other_options_has_other_costs(tmp_path: Path) -> None:
    counts = []
    for options in ({}, {"channels_last": True}, {"channels_last": True}):
        pipe = tiny.ddim()
        calls: list[int] = []
        pipe.unet.register_forward_hook(lambda *args, calls=calls: calls.append(1))
        fast = srds_fast.compile(pipe, explore=0, cache_dir=tmp_path, **options)
        fast(num_inference_steps=10, output_type="pt")
        counts.append(len(calls) - fast.report.waves)
    recording = counts[-1]
    assert counts[0] > recording
    assert counts[1] > recording
    assert len(list(tmp_path.iterdir())) == 2
