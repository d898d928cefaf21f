"""What benchmarks call: networks of the sizes they are named after, and loops that have one answer."""

from __future__ import annotations

import copy
import json
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import engines, rows
from bench.workloads import WORKLOADS

STEPS = 6


def test_real_sizes() -> None:
    """What a GPU runs, counted without making it: Stable Diffusion 1.5 and XL to a parameter."""
    with torch.device("meta"):
        sd15, sdxl, dit = (build(small=False) for build in (rows.sd15_unet, rows.sdxl_unet, rows.dit_transformer))
    assert parameters(sd15) == 859_520_964
    assert parameters(sdxl) == 2_567_463_684
    # diffusers embeds label and timestep in every layer anew, the published DiT-XL/2 of 675 M once
    embeddings = [parameters(block.norm1.emb) for block in dit.transformer_blocks]
    assert len(embeddings) == 28
    assert parameters(dit) - sum(embeddings[1:]) == pytest.approx(675e6, rel=1e-3)
    assert [each.config.sample_size for each in (sd15, sdxl, dit)] == [64, 128, 32]


def parameters(network: Any) -> int:
    return sum(each.numel() for each in network.parameters())


@pytest.mark.parametrize("name", WORKLOADS)
def test_all_loops_have_one_answer_for_a_sample(name: str) -> None:
    torch.manual_seed(0)
    workload = WORKLOADS[name]()
    stock = workload.stock(STEPS)
    twin = copy.deepcopy(workload.network.network)
    calls: list[object] = []
    twin.register_forward_pre_hook(lambda *_: calls.append(None))
    again = workload.stock(STEPS, twin)
    sequential = workload.ours(STEPS, {"method": "sequential", "engine": "eager"})
    exact = workload.ours(STEPS, {"method": "srds", "exact": True, "engine": "graph"})
    answers = []
    for sample in (0, 3):
        answers.append(stock.call(sample).clone())
        for loop in (again, sequential, exact):
            found = loop.call(sample)
            assert found.shape == answers[-1].shape
            assert float((found - answers[-1]).abs().max()) <= 1e-4 * float(answers[-1].abs().max())
    assert not torch.equal(*answers)
    assert len(calls) == 2 * STEPS
    assert sequential.ran()[2:] == ("sequential", STEPS, STEPS, 1, ())
    assert sequential.widths() == stock.widths() == [1] * STEPS
    ran = exact.ran()
    assert (ran.waves, ran.rows, ran.peak_rows) == (len(exact.widths()), sum(exact.widths()), max(exact.widths()))


def test_a_curve_ends_where_calls_become_long() -> None:
    found = rows.curve("policy", [4, 1, 2], longest=0.0)
    assert found["rows"] == [1]
    assert len(found["eager"]) == 1
    assert rows.curve("policy", [4, 1, 2])["rows"] == [1, 2, 4]


def test_the_picture_of_the_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the curves, or from what was written, alone or in gpu_check.json; of a GPU there are replays too."""
    written, drawn = tmp_path / "rows.json", tmp_path / "rows.png"
    small = ["--networks", "policy", "--rows", "1", "2"]
    rows.main([*small, "--json", str(written), "--picture", str(drawn)])
    assert drawn.read_bytes().startswith(b"\x89PNG")
    whole = json.loads(written.read_text())
    for curve in whole["curves"]:
        curve["replayed"] = [seconds / 2 for seconds in curve["eager"]]
    checked, both = tmp_path / "gpu_check.json", tmp_path / "both.png"
    checked.write_text(json.dumps({"parts": {"rows": {"result": {**whole, "gpu": "of a test"}}}}))
    rows.main(["--from", str(checked), "--picture", str(both)])
    wide, narrow = (struct.unpack(">II", each.read_bytes()[16:24]) for each in (both, drawn))
    assert wide == (2 * narrow[0], narrow[1])
    checked.write_text(json.dumps({"parts": {"rows": {"result": None}}}))
    with pytest.raises(SystemExit, match="holds no curves"):
        rows.main(["--from", str(checked), "--picture", str(both)])
    with pytest.raises(SystemExit):
        rows.main(["--from", str(written)])
    assert "--picture rows.png" in capsys.readouterr().err


def test_engines(tmp_path: Path) -> None:
    written = tmp_path / "engines.json"
    engines.main(["--workloads", "policy", "--steps", "6", "--repeat", "1", "--json", str(written)])
    results = json.loads(written.read_text())["results"]
    assert len(results) == 1 + len(engines.METHODS) * len(engines.ENGINES)
    for each in results:
        assert each["over_stock"] == pytest.approx(results[0]["seconds"] / each["seconds"])
