"""`python -m bench.compare`: what has become slower is found and named, what has not is let pass."""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.compare import chosen, interval, judge, main
from bench.layout import BadInput, commit, is_dirty, lay_out, revision

ROOT = Path(__file__).parents[1]
BENCH = "samplers/mixture/sequential"
# half of what is planted at least, and far above what a busy machine adds to every round of one side
THRESHOLD = "2"


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def compare(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.compare", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of this checkout as they are, in a repository of their own: "sound", and "slow" with a planted sleep.

    A third, "broken", has a library that cannot be imported; "before" it there is nothing.
    """
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    folder = tmp_path_factory.mktemp("compared") / "checkout"
    folder.mkdir()
    git(folder, "init", "--quiet")
    git(folder, "commit", "--quiet", "--allow-empty", "-m", "nothing yet")
    git(folder, "tag", "before")
    for part in ("srds_fast", "kernels", "bench", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "results"))
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "sound")
    git(folder, "tag", "sound")
    run = folder / "srds_fast" / "run.py"
    planted = "        if output is not None:\n            self.received()\n"
    sound = run.read_text()
    assert sound.count(planted) == 1
    run.write_text(sound.replace(planted, f"        time.sleep(1e-3)\n{planted}"))
    git(folder, "commit", "--quiet", "--all", "-m", "slow")
    git(folder, "tag", "slow")
    (folder / "srds_fast" / "sampler.py").write_text("raise RuntimeError('not to be had')\n")
    git(folder, "commit", "--quiet", "--all", "-m", "broken")
    git(folder, "tag", "broken")
    git(folder, "checkout", "--quiet", "sound")
    return folder


def test_a_planted_slowdown_is_caught_and_named(repository: Path, tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    options = ["--only", BENCH, "--threshold", THRESHOLD, "--json", str(found)]
    done = compare(repository, "sound", "slow", *options)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"slower: {BENCH}, " in done.stdout
    # to sleep is to dispatch nothing
    assert "counts: no difference" in done.stdout
    written = json.loads(found.read_text())
    assert (written["base"]["revision"], written["head"]["revision"]) == (
        git(repository, "rev-parse", "sound"),
        git(repository, "rev-parse", "slow"),
    )
    (verdict,) = written["verdicts"]
    assert verdict["verdict"] == "slower"
    assert len(verdict["base"]) == len(verdict["head"]) == 5
    assert float(THRESHOLD) < verdict["low"] <= verdict["ratio"] <= verdict["high"]
    # a hundred steps, each a millisecond longer
    assert min(verdict["head"]) > 0.1


def test_a_commit_against_itself_passes(repository: Path) -> None:
    done = compare(repository, "sound", "WORKTREE", "--only", BENCH, "--threshold", THRESHOLD, "--no-counts")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "head: the files as they are" in done.stdout
    assert [line.split()[-1] for line in done.stdout.splitlines() if line.startswith(BENCH)] == ["same"]


@pytest.mark.parametrize(
    ("sides", "status", "verdict"), [(("broken", "sound"), 0, "new"), (("sound", "broken"), 1, "fails")]
)
def test_a_bench_that_runs_on_one_side_only(
    sides: tuple[str, str], status: int, verdict: str, repository: Path
) -> None:
    done = compare(repository, *sides, "--only", BENCH, "--no-counts")
    assert done.returncode == status, done.stdout + done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith(BENCH))
    assert line.endswith(f"{verdict}: RuntimeError: not to be had")


def test_an_unknown_commit_is_an_error_of_its_own(repository: Path) -> None:
    done = compare(repository, "no-such-commit", "sound")
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("'no-such-commit' is no commit of")
    assert "Traceback" not in done.stderr


def test_head_is_refused_while_the_library_has_other_changes(repository: Path) -> None:
    assert commit("HEAD", repository).revision == commit("sound", repository).revision
    changed = repository / "srds_fast" / "run.py"
    sound = changed.read_text()
    changed.write_text(sound + "\n")
    try:
        with pytest.raises(BadInput, match="Pass WORKTREE to measure the files as they are, or commit them"):
            commit("HEAD", repository)
        assert commit("sound", repository).revision == revision(repository)
        assert is_dirty(repository)
        assert commit("WORKTREE", repository).revision is None
    finally:
        changed.write_text(sound)
    assert is_dirty(repository) is False


def test_a_commit_without_a_library(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="nothing yet has no srds_fast and kernels"):
        lay_out(commit("before", repository), tmp_path / "site", repository)


def test_outside_a_repository(tmp_path: Path) -> None:
    (tmp_path / ".git").write_text("gitdir: nowhere\n")  # a folder above might be one
    with pytest.raises(BadInput, match="Run this in a git repository of the project"):
        commit("HEAD", tmp_path)
    assert revision(tmp_path) is is_dirty(tmp_path) is None


def test_a_pattern_that_fits_no_bench() -> None:
    with pytest.raises(BadInput, match="No bench fits 'no-such-bench'"):
        chosen(["no-such-bench"])
    assert chosen(["planning"]) == [name for name in chosen(["*"]) if "planning" in name]


@pytest.mark.parametrize(
    ("option", "why"),
    [(["--rounds", "3"], "'3' is not 5 or more"), (["--threshold", "0.9"], "'0.9' is not a ratio of 1 or more")],
)
def test_options_are_checked(option: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["HEAD", "HEAD", *option])
    assert left.value.code == 2
    assert why in capsys.readouterr().err


def coverage(size: int, trials: int = 4000) -> float:
    """How often the interval of so many numbers holds their median, 0."""
    draw = random.Random(0)
    found = (interval([draw.gauss(0, 1) ** 3 for _ in range(size)]) for _ in range(trials))
    return sum(low <= 0 <= high for low, high in found) / trials


@pytest.mark.parametrize("size", [5, 8, 9, 20])
def test_the_interval_holds_the_median_as_often_as_it_says(size: int) -> None:
    error = 3 * math.sqrt(0.1 * 0.9 / 4000)
    assert 0.9 - error <= coverage(size) <= 0.97 + error


@pytest.mark.parametrize(
    ("head", "verdict"),
    [([1.3] * 5, "slower"), ([1.3, 1.3, 1.05, 1.3, 1.3], "same"), ([0.8] * 5, "faster"), ([1.0] * 5, "same")],
)
def test_one_round_that_disagrees_is_doubt(head: list[float], verdict: str) -> None:
    drift = [1.0, 2.0, 3.0, 2.5, 1.5]
    found: Any = judge("a", drift, [each * ratio for each, ratio in zip(drift, head, strict=True)], 1.1)
    assert found.verdict == verdict
