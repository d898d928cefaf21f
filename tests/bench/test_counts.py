"""What the methods do, in counts, is what the committed file says. Times are nowhere gated."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.regression import counts
from srds_fast.engine.run import Run
from srds_fast.solvers import waves

FLUX = "Flux, flow"


@pytest.fixture(scope="module")
def found() -> counts.Found:
    return counts.measured()


def test_no_count_differs_from_the_committed_file(found: counts.Found) -> None:
    before, compared = counts.read()
    lines = counts.differences(before, found, compared)
    if lines:
        pytest.fail(counts.explained(lines), pytrace=False)
    if compared is not None:
        pytest.skip(f"the file is of another torch: only {', '.join(compared)} could be compared")


def test_a_steady_wave_is_few_launches(found: counts.Found) -> None:
    for methods in found.values():
        # the host waits to look at the change, and the sample of the checkpoint is one of three
        for method, launches, waits in (("sequential", 1, 0), ("srds", 1, 0), ("chords", 1, 0), ("parataa", 3, 1)):
            assert methods[method]["launches_a_wave"] == methods[method]["allocations_a_wave"] == launches
            assert methods[method]["host_waits_a_wave"] == waits
            assert methods[method]["operations"] > methods[method]["launches"] >= methods[method]["waves"] - 1


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
    found: counts.Found,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(where, name, change(getattr(where, name)))
    after = counts.measured((FLUX,))
    before = {FLUX: found[FLUX]}
    lines = counts.differences(before, after)
    for each in (*more, "operations"):
        was, now = (of[FLUX]["srds"][f"{each}_a_wave"] for of in (before, after))
        assert was < now
        assert f"Flux, flow, srds: {each}_a_wave was {was}, is {now}" in lines
    assert not any(
        each in line for line in lines for each in ("bytes_moved", "waves", "rows", "host_waits") if each not in more
    )
    assert "python -m bench.regression.counts --write" in counts.explained(lines)


def test_the_command(
    found: counts.Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(counts, "measured", lambda: {FLUX: found[FLUX]})
    path = tmp_path / "counts.json"
    with pytest.raises(SystemExit, match=r"cannot be read.*--write"):
        counts.main(["--check", "--file", str(path)])
    counts.main(["--write", "--file", str(path)])
    counts.main(["--check", "--file", str(path)])
    assert "No count differs" in capsys.readouterr().out
    counts.main([])
    assert "Flux, flow, collocation" in capsys.readouterr().out
    written = json.loads(path.read_text())
    for name in ("rows", "operations"):
        changed = copy.deepcopy(written)
        changed["counts"][FLUX]["srds"][name] += 1
        path.write_text(json.dumps(changed))
        with pytest.raises(SystemExit, match=rf"Flux, flow, srds: {name} was \d+, is \d+\n.*--write"):
            counts.main(["--check", "--file", str(path)])
    # what torch makes of an operation, another torch may make otherwise
    path.write_text(json.dumps({**changed, "torch": "2.0"}))
    counts.main(["--check", "--file", str(path)])
    assert f"of another torch than {torch.__version__}" in capsys.readouterr().out
