"""Popular classes of diffusers at a tiny size: some of the cells of the matrix of support, with few steps."""

from __future__ import annotations

import json

import pytest

from bench.quality import support
from bench.quality.verdicts import at_length, cell, short_name, varied
from bench.workloads.classes import CASES, VARIATIONS

RECORD = json.loads(support.FILE.read_text())
STEPS = 5
# of the default command: a network of each kind that other tests do not call
SOME = (
    "KandinskyV22Pipeline",
    "StableDiffusionXLAdapterPipeline",
    "BriaPipeline",
    "MochiPipeline",
    "AudioLDM2Pipeline",
)
# rounding decides from run to run whether its rows can be merged
UNSURE = ("AllegroPipeline",)
# of the exhaustive one: every fourth
MORE = [name for number, name in enumerate(CASES) if (number % 4 == 0 and name not in UNSURE) or name in SOME]


def paths(name: str) -> set[str]:
    """How the calls of a case ran when the matrix was measured."""
    cells = [each for each in RECORD["cells"] if each["case"] == name and each["own"] and not each["change"]]
    return {run.get("path", "") for each in cells for run in each.get("runs", {}).values()}


@pytest.mark.parametrize(
    "name", [name if name in SOME else pytest.param(name, marks=pytest.mark.exhaustive) for name in MORE]
)
def test_a_class_runs_as_the_record_says(name: str) -> None:
    case = CASES[name]
    try:
        pipe = case.build()
    except ImportError as why:
        pytest.skip(str(why))
    found = cell(case, pipe, short_name(pipe.scheduler), STEPS, ["srds, exact"]).runs["srds, exact"]
    assert found.verdict in ("exact", "exact to rounding", "stock", "refused")
    assert (found.path or "") in paths(name)


@pytest.mark.parametrize(
    "variation", [each for each in VARIATIONS if "denoising" in each.note], ids=lambda each: each.note
)
def test_parts_of_a_grid(variation: object) -> None:
    found = varied(variation, 10)
    assert {run.verdict for run in found.runs.values()} <= {"exact", "within"}
    assert found.turns < 10


def test_many_steps_take_fewer_waves() -> None:
    found = at_length(CASES["SanaPipeline"], 25)
    assert all(run.verdict in ("exact", "within") and run.waves < 20 for run in found.runs.values())
