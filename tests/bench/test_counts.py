"""What the methods do, in counts, is what the committed file says. Times are nowhere gated."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.regression import counts
from srds_fast.engine.run import Run

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


def test_what_a_wave_does_more_is_seen_and_named(found: counts.Found, monkeypatch: pytest.MonkeyPatch) -> None:
    advance = Run._advance

    def looks_at_a_tensor(self: Run, answer: Any) -> Any:
        wave = advance(self, answer)
        wave.x.sum().item()
        return wave

    monkeypatch.setattr(Run, "_advance", looks_at_a_tensor)
    lines = counts.differences({FLUX: found[FLUX]}, counts.measured((FLUX,)))
    srds = "\n".join(line for line in lines if line.startswith("Flux, flow, srds: "))
    for name in ("launches", "allocations", "bytes_allocated", "host_waits", "operations"):
        ((was, now),) = re.findall(rf": {name}_a_wave was (\d+), is (\d+)", srds)
        assert int(was) < int(now)
    assert not re.search("bytes_moved|waves |rows", srds)
    assert "python -m bench.regression.counts --write" in counts.explained(lines)


def test_the_command(
    found: counts.Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(counts, "measured", lambda: {FLUX: found[FLUX]})
    path = tmp_path / "counts.json"
    monkeypatch.setattr(counts, "FILE", path)
    with pytest.raises(SystemExit, match=r"cannot be read.*--write"):
        counts.main(["--check"])
    counts.main(["--write"])
    counts.main(["--check"])
    assert "No count differs" in capsys.readouterr().out
    counts.main([])
    printed = capsys.readouterr().out
    assert printed.startswith("\nFlux, flow\n")
    assert "\ncollocation " in printed
    written = json.loads(path.read_text())
    for name in ("rows", "operations"):
        changed = copy.deepcopy(written)
        changed["counts"][FLUX]["srds"][name] += 1
        path.write_text(json.dumps(changed))
        with pytest.raises(SystemExit, match=rf"Flux, flow, srds: {name} was \d+, is \d+\n.*--write"):
            counts.main(["--check"])
    # what torch makes of an operation, another torch may make otherwise
    path.write_text(json.dumps({**changed, "torch": "2.0"}))
    counts.main(["--check"])
    assert f"of another torch than {torch.__version__}" in capsys.readouterr().out
