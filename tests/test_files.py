"""Files that are written: whole or not at all, and no symbolic link is followed, whoever writes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import srds_fast
from srds_fast import InvalidArgument
from srds_fast.cli import main, pictures
from srds_fast.files import check_file, new_file
from srds_fast.planner.choose import choose
from srds_fast.planner.cost_curve import CostCurve
from srds_fast.planner.curve_cache import CurveCache
from srds_fast.planner.plan import Candidate
from srds_fast.planner.settings import Settings

CANDIDATE = Candidate("sequential", 1, 1, 1, 1, 1.0, 1.0)
PACKAGE = Path(srds_fast.__file__).parent


def _trace(path: Path) -> None:
    with srds_fast.profile(path):
        torch.ones(1)


WRITERS: dict[str, Callable[[Path], object]] = {
    "plan": lambda path: choose(20, Settings(method="srds")).save(path),
    "trace": _trace,
    "plot": lambda path: pictures.prediction_plot({CANDIDATE: 1.0}, path),
    "text": lambda path: _text(path, "new"),
}


def _text(path: Path, text: str) -> None:
    with new_file(path) as unfinished:
        unfinished.write_text(text)


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("dangling", [False, True], ids=["link", "dangling"])
def test_a_link_is_refused_and_what_it_names_stays(
    write: Callable[[Path], object], dangling: bool, tmp_path: Path
) -> None:
    secret, place = tmp_path / "secret", tmp_path / "file.png"
    if not dangling:
        secret.write_text("as it was")
    place.symlink_to(secret)
    with pytest.raises(InvalidArgument, match="it is a symbolic link, which is not followed"):
        write(place)
    assert place.is_symlink()
    assert secret.exists() != dangling
    assert dangling or secret.read_text() == "as it was"


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_link_that_comes_while_a_file_is_written_is_replaced(
    write: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever may write to the folder can set one between the check and the end; it is no way out of the folder."""
    secret, place, replace = tmp_path / "secret", tmp_path / "file.png", os.replace
    secret.write_text("as it was")

    def late(source: Path, target: Path) -> None:
        target.symlink_to(secret)
        replace(source, target)

    monkeypatch.setattr(os, "replace", late)
    write(place)
    assert secret.read_text() == "as it was"
    assert not place.is_symlink()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file.png", "secret"]


def test_kept_costs_follow_no_link_either(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from srds_fast.planner.context import Context

    cache, context = CurveCache(tmp_path), Context("a device", "2.0", "0.1", "network", "steps")
    curve = CostCurve((1,), (1e-3,))
    cache.save("kind", context, curve)
    (kept,) = tmp_path.iterdir()
    secret = tmp_path / "secret"
    kept.rename(secret)
    before = secret.read_text()
    kept.symlink_to(secret)
    cache.save("kind", context, CostCurve((1,), (2e-3,)))
    assert secret.read_text() == before
    assert "Costs could not be written" in caplog.text


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("missing/file", "there is no folder"),
        (".", "it is a folder"),
        ("pipe", "it is no file"),
        ("x" * 300, "too long"),
        ("a\0b", "null"),
    ],
    ids=["no-folder", "folder", "pipe", "long", "zero"],
)
def test_what_is_no_place_for_a_file_is_named(name: str, why: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidArgument, match=why):
        check_file(tmp_path / name)


def test_the_older_file_stays_where_writing_fails(tmp_path: Path) -> None:
    place = tmp_path / "file"
    _text(place, "old")
    mask = os.umask(0o027)
    try:
        with pytest.raises(UnicodeEncodeError):
            _text(place, "half\ud800")
        assert place.read_text() == "old"
        _text(place, "new")
    finally:
        os.umask(mask)
    assert (place.read_text(), place.stat().st_mode & 0o777) == ("new", 0o640)
    assert list(tmp_path.iterdir()) == [place]


def test_nothing_is_written_in_another_way() -> None:
    """A new writer must use `new_file` too."""
    ways = r"write_text\(|write_bytes\(|savefig\(|export_chrome_trace\(|\.save\(|open\([^)]*[\"'][wxa]"
    found = {
        (path.relative_to(PACKAGE).as_posix(), line.strip())
        for path in PACKAGE.rglob("*.py")
        for line in path.read_text().splitlines()
        if re.search(ways, line) and "unfinished" not in line
    }
    # these call `json_files.write`, or write no file
    assert not [each for each in found if not re.search(r"(cache|found|Plan)\.save\(|\.save\(in_memory", each[1])]


@pytest.mark.parametrize("name", ["meta", "xla", "cuda:-1", "cuda:99999999999999999999", "cpu:0x", "gpu", "cuda:", ""])
def test_a_device_that_is_none_is_named(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompt", "a prompt", "--device", name]) == 2
    assert f"There is no device {name!r}." in capsys.readouterr().err


def test_a_plot_that_is_no_png_and_a_link_are_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--steps", "5", "--plot", "plan.xyz"])
    assert "does not end in .png" in capsys.readouterr().err
    link = tmp_path / "plan.json"
    link.symlink_to(tmp_path / "elsewhere")
    for option in ("--save", "--plot"):
        place = link if option == "--save" else link.rename(tmp_path / "plan.png")
        assert main(["plan", "--steps", "5", option, str(place)]) == 2
        assert "symbolic link" in capsys.readouterr().err
    assert main(["compare", "--json", str(place)]) == 2
    assert "symbolic link" in capsys.readouterr().err
