"""The command and the scripts of the guide in several processes: rank 0 alone prints and writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ENVIRONMENT, script

from srds_fast.cli.arguments import USER_MISTAKE

Said = list[dict[str, tuple[int, str, str]]]


@pytest.fixture
def folder(two_ranks: Path) -> Path:
    """What two processes have left."""
    return two_ranks / "commands"


@pytest.fixture
def said(folder: Path) -> Said:
    """By rank and command: exit code, stdout, stderr."""
    return [json.loads((folder / f"said-{rank}.json").read_text()) for rank in range(2)]


def test_rank_0_alone_prints(said: Said) -> None:
    first, second = said
    assert {name: code for name, (code, _, _) in first.items()} == {name: code for name, (code, _, _) in second.items()}
    assert all(out == "" for name, (_, out, _) in second.items())
    for name in ("generate", "plan", "compare", "script"):
        code, out, _ = first[name]
        assert code == 0
        assert out


def test_a_mistake_is_told_once(said: Said) -> None:
    (code, _, told), (other, _, silent) = (of_rank["mistake"] for of_rank in said)
    assert code == other == USER_MISTAKE
    assert len(told.splitlines()) == 1
    assert silent == ""


def test_files_are_written_once_and_the_report_names_the_ranks(folder: Path) -> None:
    document = json.loads((folder / "generated.json").read_text())
    assert [Path(each["path"]).name for each in document["images"]] == ["the-digit-seven-seed0.png"]
    assert document["report"]["ranks"] == 2
    assert len(list((folder / "generated").iterdir())) == 1
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["prediction"]["curve"]["ranks"] == 2
    assert (folder / "seven.png").stat().st_size > 0


def test_the_script_of_the_guide_starts_its_own_processes(tmp_path: Path) -> None:
    text = script("spawn").replace("num_inference_steps=50", "num_inference_steps=8")
    (tmp_path / "spawned.py").write_text(text.replace('"tcp://127.0.0.1:29517"', f'"file://{tmp_path}/store"'))
    command = [sys.executable, str(tmp_path / "spawned.py")]
    ran = subprocess.run(command, env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stderr[-4000:]
    # `auto` may find that sharing rows takes longer: that is for a clock to say, the two ranks are not
    assert "\nranks          2" in ran.stdout
    assert (tmp_path / "seven.png").stat().st_size > 0
