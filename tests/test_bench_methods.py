"""The commands that compare methods, at a tiny size: what they write hangs together."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import curves, methods, policy, reaching
from bench.contestants import CONTESTANTS, DEFAULT, PAPER
from bench.reaching import Point


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    """JSON, picture and, by a second call that only reads, the lines that were printed."""
    folder = tmp_path_factory.mktemp("methods")
    found, picture, rows = folder / "found.json", folder / "picture.png", folder / "rows.json"
    rows.write_text(json.dumps({"curves": [{"network": "net", "rows": [1, 2], "eager": [1.0, 1.5], "replayed": None}]}))
    methods.main(["--smoke", "--curves", str(rows), "--json", str(found), "--picture", str(picture)])
    return json.loads(found.read_text()), picture, str(found)


def test_every_method_runs_on_every_problem(written: tuple[dict[str, Any], Path, str]) -> None:
    found, picture, _ = written
    of_each = {(each["problem"], each["method"]) for each in found["found"]}
    assert {method for _, method in of_each} == set(CONTESTANTS)
    assert len(of_each) == len(found["found"]) == 2 * len(CONTESTANTS)
    assert found["environment"]["torch"]
    assert found["samples"] == 2
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_points_are_of_whole_runs(written: tuple[dict[str, Any], Path, str]) -> None:
    for each in map(methods.Found.of_json, written[0]["found"]):
        assert each.points, each.method
        last = each.points[-1]
        # it came to the sequential sample, or was as long as the sequential run
        assert last.difference <= min(methods.BOUNDS) or last.waves >= each.steps or "tolerance" in last.setting
        for point in each.points:
            assert len(point.widths) in (1, 2)
            assert 1 <= point.waves <= point.rows
            assert point.rows <= point.peak_rows * point.waves
            assert all(width > 0 for widths in point.widths for width in widths)
        if "iteration" in last.setting:
            waves = [point.waves for point in each.points]
            assert waves == sorted(set(waves))


def test_the_table_is_sorted_and_told_again(
    written: tuple[dict[str, Any], Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    methods.main(["--from", written[2]])
    printed = capsys.readouterr().out
    blocks = printed.strip().split("\n\n")
    tables = [block.splitlines() for block in blocks if "percentile within" in block]
    assert len(tables) == 2 * len(methods.BOUNDS)
    for _, heading, *lines in tables:
        assert "net" in heading
        ratios = [float(line.split()[0]) for line in lines if line.split()[0] != "-"]
        assert ratios == sorted(ratios, reverse=True)
        assert len(lines) == len(CONTESTANTS)


def test_cheapest_needs_the_points_behind_it_within_the_bound() -> None:
    points = [Point(str(waves), off, ((1,) * waves,)) for waves, off in ((2, 0.4), (3, 0.6), (4, 0.3), (5, 0.2))]
    within = reaching.cheapest(points, 0.5)
    assert within is not None
    assert within.setting == "4"
    assert reaching.cheapest(points, 0.1) is None


def test_curves() -> None:
    curve = curves.Curve.from_dict({"name": "", "rows": [1, 4], "seconds": [1.0, 2.5]})
    assert curve.speed_up(10, [(1,) * 5, (1,) * 15]) == 1.0
    assert curve.speed_up(10, [(4, 4)]) == 2.0


def test_the_verdict_compares_default_and_paper() -> None:
    found = [
        methods.Found("p", 25, method, [Point("iteration 1", 0.1, ((1,) * waves,))])
        for method, waves in ((PAPER, 20), (DEFAULT, 10))
    ]
    assert "2.00 at N=25 (20/10.0)" in next(methods.verdict(found))


def test_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, written = tmp_path / "weights.pt", tmp_path / "policy.json"
    policy.main(["--smoke", "--weights", str(weights), "--json", str(written)])
    policy.trained(weights, training_steps=1)
    assert capsys.readouterr().out.count("trained") == 1
    found = json.loads(written.read_text())
    results = {each["loop"]: each for each in found["results"]}
    assert {policy.BY_HAND, policy.SEQUENTIAL, "srds"} <= set(results)
    assert results[policy.SEQUENTIAL]["over_sequential"] == 1.0
    assert results[policy.BY_HAND]["largest_difference"] < 1e-3
    for each in results.values():
        assert each["waves"] <= each["rows"] <= each["waves"] * each["peak_rows"]
        assert each["fastest"] <= each["seconds"] <= each["slowest"]
        assert each["overhead"] == pytest.approx(each["fastest"] / each["network_seconds"])
