"""The matrix of support: the page says what was measured, and what is measured says what happened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from bench.quality import every_scheduler, support, support_page, verdicts
from bench.quality.rounding import TIMES, Rounding
from bench.quality.support_page import PAGE, counts, page
from bench.quality.verdicts import Cell, Run, cell
from bench.workloads.classes import CASES, VARIATIONS, Case
from srds_fast.pipelines import known_classes

FOUND = json.loads(support.FILE.read_text())
CELLS = [Cell.from_dict(each) for each in FOUND["cells"]]
NEWEST = FOUND["environment"]["diffusers"] == diffusers.__version__


def test_the_page_is_written_from_the_committed_file() -> None:
    assert PAGE.read_text() == page(FOUND), "run `python -m bench.quality.support --page`"
    assert support.to_json(FOUND) == support.FILE.read_text()
    assert support.to_json({**FOUND, "cells": [each.to_dict() for each in CELLS]}) == support.FILE.read_text()


def test_every_case_was_measured_and_nothing_is_wrong() -> None:
    number = counts(CELLS)
    assert (number["wrong"], number["failed"]) == (0, 0)
    assert number["accelerated"] >= 50
    assert number["classes"] == len({case.cls for case in CASES.values()})
    assert {(each.case, each.change) for each in CELLS} == {
        *((name, "") for name in CASES),
        *((each.case, each.note) for each in VARIATIONS),
    }
    assert all(each.runs for each in CELLS if each.own), "stock runs with its own scheduler and every call"


@pytest.mark.skipif(not NEWEST, reason="the file is of another version of diffusers")
def test_every_scheduler_of_diffusers_has_a_verdict() -> None:
    told = {row["scheduler"] + "Scheduler": row for row in FOUND["schedulers"]}
    assert set(told) == set(every_scheduler.classes())
    assert {row["verdict"] for row in told.values()} == {"exact", "refused"}
    assert all(row["reason"] for row in told.values() if row["verdict"] == "refused")


@pytest.mark.parametrize(
    ("name", "config", "found"),
    [
        ("PNDMScheduler", {"skip_prk_steps": True}, {"verdict": "exact", "vectors": 4, "turns": 21, "noise": False}),
        ("EulerAncestralDiscreteScheduler", {}, {"verdict": "exact", "vectors": 1, "noise": True}),
        ("KarrasVeScheduler", {}, {"verdict": "refused"}),
        ("ConsistencyDecoderScheduler", {}, {"verdict": "refused"}),
    ],
)
def test_the_verdict_of_a_scheduler(name: str, config: dict[str, Any], found: dict[str, Any]) -> None:
    row = every_scheduler.verdict(name, config)
    assert {**row, **found} == row


def test_the_command_replaces_what_it_measures_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = dict(known_classes.digests())
    for module, name in ((support, "FILE"), (support, "PAGE"), (known_classes, "FILE")):
        monkeypatch.setattr(module, name, tmp_path / f"{module.__name__} {name}")
    kept = [each for each in FOUND["cells"] if each["case"] in ("DDIMPipeline", "SanaPipeline")]
    support.FILE.write_text(support.to_json({**FOUND, "cells": kept}))
    monkeypatch.setattr(
        verdicts, "EVERY", {name: verdicts.EVERY[name] for name in ("sequential", "srds", "srds, exact")}
    )
    support.main(["--only", "SanaPipeline", "--steps", "4", "--length", "0", "--write"])
    found = json.loads(support.FILE.read_text())
    assert found["schedulers"] == FOUND["schedulers"]
    assert [each for each in found["cells"] if each["case"] == "DDIMPipeline"] == [
        {**each, "earlier": True} for each in kept if each["case"] == "DDIMPipeline"
    ]
    sana = [each for each in found["cells"] if each["case"] == "SanaPipeline"]
    assert {each["steps"] for each in sana} == {4}
    assert {run["verdict"] for each in sana for run in each.get("runs", {}).values()} <= {"exact", "within"}
    assert support.PAGE.read_text() == page(found)
    classes = json.loads(known_classes.FILE.read_text())["classes"]
    named = {name: getattr(diffusers, name) for name in ("DDIMPipeline", "SanaPipeline")}
    assert classes == {name: known_classes.digest_of(cls) for name, cls in named.items()}
    assert known_classes.digests() == known
    assert "SanaPipeline |  | Flow DPM++ 2M | N = 4, 4 turns" in capsys.readouterr().out


def test_a_difference_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that is a little off is within, beyond or wrong, by how much and by what was asked for."""
    case = CASES["DDIMPipeline"]
    pipe = case.build()
    called = verdicts.called
    for off, expected in ((1e-7, "exact"), (1e-3, "within"), (1e-2, "beyond"), (1.0, "wrong"), (float("nan"), "wrong")):

        def changed(pipe: Any, call: dict[str, Any], steps: int, off: float = off) -> torch.Tensor:
            found = called(pipe, call, steps)
            return found + off if hasattr(pipe, "report") else found

        monkeypatch.setattr(verdicts, "called", changed)
        found = cell(case, pipe, "DDIM", 4, ["sequential", "srds"])
        assert found.runs["srds"].verdict == expected
        assert found.runs["sequential"].verdict == ("exact" if expected == "exact" else "wrong")
        assert support.line(found).count(expected)


def test_what_is_rounding_is_measured() -> None:
    """Of a difference nothing may be left in float64, and stock itself must be as far off in float32."""
    assert Rounding(1e-13, 1e-5, None).explains(TIMES * 1e-5)
    assert Rounding(1e-13, None, 1e-5).explains(TIMES * 1e-5)
    assert not Rounding(1e-13, 1e-5, 1e-6).explains(1.1 * TIMES * 1e-5)
    assert not Rounding(1e-5, 1.0, 1.0).explains(2e-5)
    assert not Rounding(None, 1.0, 1.0).explains(2e-5)
    kept = [run for each in CELLS for run in each.runs.values() if run.verdict == "exact to rounding"]
    assert all(Rounding(run.in_float64, run.of_stock, run.of_width).explains(run.difference) for run in kept)
    assert all(
        run.difference <= verdicts.ROUNDING for each in CELLS for run in each.runs.values() if run.verdict == "exact"
    )


def test_what_raises_has_its_reason() -> None:
    refused = CASES["KandinskyV22PriorPipeline"]
    pipe = refused.build(diffusers.KarrasVeScheduler())
    assert cell(refused, pipe, "KarrasVe", 4, ["srds"]).reason
    with pytest.raises(ImportError, match="is not in diffusers"):
        Case("NoPipeline", dict, {}).build()


def test_words_of_the_page() -> None:
    runs = {
        "srds": Run("exact", 1e-7, waves=5, path="takeover"),
        "collocation": Run("stock", 0.0, path="stock", reason="so"),
    }
    found = Cell("DDIMPipeline", "", "DDIM", True, 50, 9, runs=runs)
    assert support_page.is_accelerated(found)
    text = page({**FOUND, "cells": [found.to_dict()], "schedulers": []})
    assert "| DDIMPipeline | DDIM | taken over | 5 of 9 | - |" in text
    assert "Of 1 classes 1 take fewer waves" in text
    runs["srds"].waves = 9
    assert not support_page.is_accelerated(found)
