"""Switches of `bench.switches`: each differs from the default in itself alone, and what cannot be had says why."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import switches


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    found = tmp_path_factory.mktemp("switches") / "found.json"
    on = ["streams", "late stop", "network graphs", "channels_last", "xformers"]
    switches.main(["--workloads", "dit", "--steps", "4", "--repeat", "1", "--switches", *on, "--json", str(found)])
    return {row["switch"]: row for row in json.loads(found.read_text())["results"]}


@pytest.mark.parametrize("switch", ["streams", "late stop", "network graphs"])
def test_a_switch_runs_the_same_waves(rows: dict[str, dict[str, object]], switch: str) -> None:
    row = rows[switch]
    assert row["why_not"] is None
    assert row["faster"] == pytest.approx(row["off"] / row["on"])
    assert row["engine"] == ("network graphs" if switch == "network graphs" else "loop graph")


@pytest.mark.skipif(importlib.util.find_spec("xformers") is not None, reason="xformers can be had here")
def test_what_cannot_be_had_says_why(rows: dict[str, dict[str, object]]) -> None:
    assert rows["xformers"]["faster"] is None
    assert "xformers" in rows["xformers"]["why_not"]


def test_arguments_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        switches.main(["--repeat", "0"])
    assert left.value.code == 2
    assert "nothing to time" in capsys.readouterr().err
