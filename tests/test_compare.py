"""`python -m bench.compare`: what has become slower is found and named, what has not is let pass."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.compare import chosen, compared, concluded, count_differences, interval, judge, line, main, runnable
from bench.layout import BadInput, commit, is_dirty, lay_out, revision
from bench.registry import REGISTRY
from bench.worker import Failed, Worker

ROOT = Path(__file__).parents[1]
BENCH = "samplers/mixture/sequential"
# half of what is planted at least, and far above what a busy machine adds to every round of one side
THRESHOLD = 2.0


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def compare(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.compare", *arguments]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )


def replaced(file: Path, *changes: tuple[str, str]) -> None:
    text = file.read_text()
    for before, after in changes:
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    file.write_text(text)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of this checkout in a repository of their own: "sound", and "slow" with a planted sleep.

    A third, "broken", has a library that cannot be imported; "before" it there is nothing. Samplers take a tenth of
    their steps, and counts are of one pipeline.
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
    replaced(
        folder / "bench" / "registry.py", ("_everywhere(steps=100, samples=1)", "_everywhere(steps=10, samples=1)")
    )
    replaced(folder / "bench" / "counts.py", ("in PIPELINES.items():", "in [*PIPELINES.items()][-1:]:"))
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "sound")
    git(folder, "tag", "sound")
    planted = "        if output is not None:\n            self.received()\n"
    replaced(folder / "srds_fast" / "run.py", (planted, f"        time.sleep(2e-3)\n{planted}"))
    git(folder, "commit", "--quiet", "--all", "-m", "slow")
    git(folder, "tag", "slow")
    (folder / "srds_fast" / "run.py").write_text("raise RuntimeError('not to be had')\n")
    git(folder, "commit", "--quiet", "--all", "-m", "broken")
    git(folder, "tag", "broken")
    git(folder, "checkout", "--quiet", "sound")
    return folder


@pytest.fixture(scope="module")
def side(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Worker]]:
    """A side of a comparison by the name of a commit, started when it is first asked for."""
    sites, workers = tmp_path_factory.mktemp("sites"), {}

    with ExitStack() as stack:

        def of(name: str) -> Worker:
            if name not in workers:
                lay_out(commit(name, repository), sites / name, repository)
                workers[name] = stack.enter_context(Worker(sites / name))
            return workers[name]

        yield of


def test_a_planted_slowdown_is_caught_and_named(repository: Path, tmp_path: Path) -> None:
    found, carried = tmp_path / "found.json", tmp_path / "carried"
    carried.mkdir()
    (carried / "sitecustomize.py").write_text(f"open({str(tmp_path / 'started')!r}, 'a').write('.')\n")
    options = ["--only", BENCH, "--threshold", str(THRESHOLD), "--json", str(found)]
    done = compare(repository, "sound", "slow", *options, PYTHONPATH=os.path.relpath(carried, repository))
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"slower: {BENCH}, " in done.stdout
    assert (tmp_path / "started").read_text() == "...", "what PYTHONPATH carries reaches both sides"
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
    assert THRESHOLD < verdict["low"] <= verdict["ratio"] <= verdict["high"]
    # ten steps, each two milliseconds longer
    assert min(verdict["head"]) > 0.02


def test_a_commit_against_itself_passes(side: Callable[[str], Worker]) -> None:
    found = compared(BENCH, side("sound"), side("WORKTREE"), 5, THRESHOLD)
    assert found.verdict == "same", found
    assert concluded([found], pytest.fail) == 0


@pytest.mark.parametrize(
    ("base", "head", "status", "verdict"), [("broken", "sound", 0, "new"), ("sound", "broken", 1, "fails")]
)
def test_a_bench_that_runs_on_one_side_only(
    base: str, head: str, status: int, verdict: str, side: Callable[[str], Worker]
) -> None:
    found = compared(BENCH, side(base), side(head), 5, THRESHOLD)
    assert line(found).startswith(BENCH)
    assert line(found).endswith(f"{verdict}: RuntimeError: not to be had")
    said: list[str] = []
    assert concluded([found], said.append) == status
    assert said == ["fails: samplers/mixture/sequential, RuntimeError: not to be had"] * status


def test_counts_that_cannot_be_taken_are_no_difference(side: Callable[[str], Worker]) -> None:
    why = "RuntimeError: not to be had"
    assert count_differences(side("broken"), side("broken")) == [
        f"They cannot be taken at base: {why}",
        f"They cannot be taken at head: {why}",
    ]


def test_a_side_that_has_ended_says_what_it_printed_last(tmp_path: Path) -> None:
    with Worker(tmp_path) as empty, pytest.raises(Failed, match=r"the process has ended: .*No module named"):
        empty.prepare(BENCH)


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="signals are sent as POSIX has it")
def test_an_interruption_is_one_line_and_leaves_nothing_running(repository: Path) -> None:
    command = [sys.executable, "-m", "bench.compare", "sound", "slow", "--only", BENCH]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}

    def heed() -> None:
        """Who was begun in the background of a shell is told to ignore interruptions, and hands that on."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(command, cwd=repository, start_new_session=True, preexec_fn=heed, **pipes) as running:
        while "base ms" not in running.stdout.readline():
            assert running.poll() is None
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=60)
    assert running.returncode == 130, errors
    assert errors == "Interrupted: no verdict, and nothing is written.\n"
    with pytest.raises(ProcessLookupError):
        os.killpg(running.pid, 0)


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is no GPU")
def test_benches_that_need_a_gpu_are_left_out_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    both = chosen(["kernels/wave_update/"])
    assert runnable(both) == ["kernels/wave_update/kernel", "kernels/wave_update/eager"]
    assert len(both) == 3
    with pytest.raises(SystemExit):  # no such commit, which is found out next
        main(["no-such-commit", "HEAD", "--only", "kernels/wave_update/"])
    assert capsys.readouterr().out == "1 of 3 benches are left out: they need a CUDA device.\n"
    with pytest.raises(BadInput, match=r"^kernels/wave_update/compiled needs a CUDA device\. Torch finds none here"):
        runnable(["kernels/wave_update/compiled"])
    assert not any("gpu" in REGISTRY[name].marks for name in chosen([]))


def test_a_pattern_that_fits_no_bench() -> None:
    with pytest.raises(BadInput, match="No bench fits 'no-such-bench'"):
        chosen(["no-such-bench"])
    assert chosen(["planning"]) == [name for name in chosen(["*"]) if "planning" in name]


@pytest.mark.parametrize(
    ("option", "why"),
    [
        (["--rounds", "3"], "'3' is not 5 or more"),
        (["--threshold", "0.9"], "'0.9' is not a ratio of 1 or more"),
        (["--json", "no/such/folder.json"], "there is no folder no/such. Make it first"),
        (["--json", "."], "'.' is a folder. Name a file in it"),
    ],
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
    [
        ([1.3] * 5, "slower"),
        ([1.3, 1.3, 1.05, 1.3, 1.3], "unclear"),
        ([1.0, 1.0, 1.0, 1.0, 1.2], "unclear"),
        ([0.8] * 5, "faster"),
        ([0.8, 0.8, 0.8, 0.8, 1.0], "same"),
        ([1.0] * 5, "same"),
    ],
)
def test_one_round_that_disagrees_is_doubt(head: list[float], verdict: str) -> None:
    drift = [1.0, 2.0, 3.0, 2.5, 1.5]
    found: Any = judge("a", drift, [each * ratio for each, ratio in zip(drift, head, strict=True)], 1.1)
    assert found.verdict == verdict


class Scripted(Worker):
    """A side whose times are given: those of a process are never twice the same."""

    def __init__(self, times: list[float]) -> None:
        self.times = iter(times)

    def prepare(self, bench: str) -> int:
        return 1

    def sample(self, calls: int) -> float:
        return next(self.times)


@pytest.mark.parametrize(
    ("head", "verdict", "rounds"),
    [
        ([1.0] * 15, "same", 5),
        # the outliers of one moment: of ten rounds the second highest counts
        ([1.2, *[1.0] * 14], "same", 10),
        ([1.0, *[1.2] * 14], "slower", 10),
        ([1.2, 1.0, 1.0, 1.2, 1.0, *[1.2] * 10], "slower", 15),
        ([1.0, 1.2] * 8, "unclear", 15),
    ],
)
def test_what_is_unclear_gets_more_rounds(head: list[float], verdict: str, rounds: int) -> None:
    found = compared(BENCH, Scripted([1.0] * 15), Scripted(head), 5, 1.1)
    assert (found.verdict, len(found.base), len(found.head)) == (verdict, rounds, rounds)
    said: list[str] = []
    assert concluded([found], said.append) == (1 if verdict == "slower" else 0)
    if verdict == "unclear":
        assert said == [
            "unclear: samplers/mixture/sequential, 1.00 to 1.20 after 15 rounds",
            "More --rounds would tell whether they are slower. The exit status, 0, says nothing of them.",
        ]
