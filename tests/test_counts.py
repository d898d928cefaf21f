"""What the methods do, in counts, is what the committed file says. Times are nowhere gated."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from srds_fast.engine.run import Run
from srds_fast.solvers import waves

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import committed, counts


@pytest.fixture(scope="module")
def found() -> committed.Found:
    return counts.measured()


def only(monkeypatch: pytest.MonkeyPatch, pipeline: str) -> None:
    monkeypatch.setattr(counts, "PIPELINES", {pipeline: counts.PIPELINES[pipeline]})


def test_no_count_differs_from_the_committed_file(found: committed.Found) -> None:
    version, before = committed.read()
    compared = committed.comparable(version)
    lines = committed.differences(before, found, compared)
    if lines:
        pytest.fail(committed.explained(lines), pytrace=False)
    if compared is not None:
        pytest.skip(f"the file is of torch {version}: of this one only {', '.join(compared)} could be compared")


def test_they_are_the_same_every_time(found: committed.Found, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every process too: the file was written by another one."""
    only(monkeypatch, "Flux, flow")
    assert counts.measured()["Flux, flow"] == found["Flux, flow"]


def test_a_steady_wave_of_srds_is_one_launch_that_nothing_waits_for(found: committed.Found) -> None:
    for methods in found.values():
        for method in ("sequential", "srds, as published", "srds", "chords"):
            assert methods[method]["launches_a_wave"] == methods[method]["allocations_a_wave"] == 1
            assert methods[method]["host_waits_a_wave"] == 0
            assert methods[method]["operations"] > methods[method]["launches"] >= methods[method]["waves"] - 1


def test_a_steady_wave_that_moves_all_points_is_three(found: committed.Found) -> None:
    """The sample of its checkpoint among them; the host waits to look at the change."""
    for methods in found.values():
        for method in ("collocation", "parataa"):
            assert methods[method]["launches_a_wave"] == methods[method]["allocations_a_wave"] == 3
            assert methods[method]["host_waits_a_wave"] == 1


def with_a_copy(update: Callable[..., Any]) -> Callable[..., Any]:
    def copied(*args: Any, **kwargs: Any) -> Any:
        entering = update(*args, **kwargs)
        return None if entering is None else entering.clone()

    return copied


def with_a_look(advance: Callable[..., Any]) -> Callable[..., Any]:
    def looked(self: Run, answer: Any) -> Any:
        wave = advance(self, answer)
        wave.x.sum().item()
        return wave

    return looked


@pytest.mark.parametrize(
    ("where", "name", "change", "more"),
    [
        (waves, "wave_update", with_a_copy, {"launches", "allocations", "bytes_allocated"}),
        (Run, "_advance", with_a_look, {"launches", "allocations", "bytes_allocated", "host_waits"}),
    ],
    ids=["a copy of the rows", "a look at a tensor"],
)
def test_what_a_wave_does_more_is_seen_and_named(
    where: Any,
    name: str,
    change: Callable[..., Any],
    more: set[str],
    found: committed.Found,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    only(monkeypatch, "Flux, flow")
    monkeypatch.setattr(where, name, change(getattr(where, name)))
    after = counts.measured()
    before = {"Flux, flow": found["Flux, flow"]}
    lines = committed.differences(before, after)
    for each in (*more, "operations"):
        was, now = (of["Flux, flow"]["srds"][f"{each}_a_wave"] for of in (before, after))
        assert was < now
        assert f"Flux, flow, srds: {each}_a_wave was {was}, is {now}" in lines
    assert not any(
        each in line for line in lines for each in ("bytes_moved", "waves", "rows", "host_waits") if each not in more
    )
    assert "python -m bench.counts --write" in committed.explained(lines)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    only(monkeypatch, "Flux, flow")
    file = ["--file", str(tmp_path / "counts.json")]
    with pytest.raises(SystemExit, match=r"cannot be read.*--write"):
        counts.main(["--check", *file])
    counts.main(["--write", *file])
    counts.main(["--check", *file])
    assert "No count differs" in capsys.readouterr().out
    written = json.loads(Path(file[1]).read_text())
    for name in ("rows", "operations"):
        changed = copy.deepcopy(written)
        changed["counts"]["Flux, flow"]["srds"][name] += 1
        Path(file[1]).write_text(json.dumps(changed))
        with pytest.raises(SystemExit, match=rf"Flux, flow, srds: {name} was \d+, is \d+\n.*--write"):
            counts.main(["--check", *file])
        # what torch makes of an operation, another torch may make otherwise
        Path(file[1]).write_text(json.dumps({**changed, "torch": "2.0"}))
        if name == "rows":
            with pytest.raises(SystemExit, match=r"rows was \d+"):
                counts.main(["--check", *file])
        else:
            counts.main(["--check", *file])
            assert f"of torch 2.0, this is {torch.__version__}" in capsys.readouterr().out
