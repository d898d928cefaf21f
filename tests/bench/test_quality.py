"""Methods at an equal difference, at a tiny size: what is written hangs together, what fails loses only itself."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from test_speed import failing
from torch import Tensor

from bench import runner
from bench.quality import entrants, histories, intervals, methods, noise, peers, policy, recognised, search, tradeoff
from bench.quality.contestants import CONTESTANTS, Contestant
from bench.quality.search import Point
from bench.runner import Entrant, Row
from bench.workloads import samplers
from bench.workloads.problems import difference, policy_problem
from bench.workloads.samplers import Workload, digits

RESULTS = Path(__file__).parents[2] / "bench" / "results"
STEPS = 6


def test_every_method_runs_on_every_problem(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    methods.main(["--smoke", "--json", str(path)])
    found = json.loads(path.read_text())
    assert (found["environment"]["torch"], found["samples"]) == (version("torch"), 2)
    assert {each["method"] for each in found["found"]} == set(CONTESTANTS)
    assert len(found["found"]) == 2 * len(CONTESTANTS)
    for each in found["found"]:
        points = [Point(**point) for point in each["points"]]
        # it came to the sequential sample, or was as long as the sequential run
        last = points[-1]
        assert last.difference <= min(methods.BOUNDS) or last.waves >= each["steps"] or last.tolerance is not None
        assert all(1 <= point.waves <= point.rows <= point.peak_rows * point.waves for point in points)
        if last.iteration is not None:
            waves = [point.waves for point in points]
            assert waves == sorted(set(waves))


def test_methods_where_steps_add_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every sample is counted, and counted alike in a second run; only another sample has no difference."""
    paths = [tmp_path / "one.json", tmp_path / "two.json"]
    for path in paths:
        methods.main(["--noise", "--smoke", "--json", str(path)])
    capsys.readouterr()
    methods.main(["--noise", "--from", str(paths[0])])
    printed = capsys.readouterr().out
    assert all(f"{problem}, DDPM, N = 5" in printed for problem in ("digits, guidance 5", "policy"))
    one, two = ([{**each, "seconds": None} for each in json.loads(path.read_text())["found"]] for path in paths)
    assert one == two
    assert len(one) == 3 * len(noise.METHODS)
    for each in one:
        assert each["left_out"] is None
        assert len(each["waves"]) == len(each["rows"]) == 2
        assert (each["differences"] == []) == (each["method"] == "speculative")
        assert max(each["differences"], default=0) < 0.5
        if each["method"] == runner.SEQUENTIAL:
            assert each["waves"] == each["rows"] == [5, 5]
            assert each["differences"] == [0, 0]
    with pytest.raises(SystemExit):
        methods.main(["--noise", "--methods", "chords"])
    assert "there is no method chords: use sequential, speculative" in capsys.readouterr().err


def test_finer_levels_of_a_policy_are_those_that_it_knows() -> None:
    """With ten times as many levels, every tenth is one of the policy's own, and the network is told its time."""
    asked: list[Tensor] = []

    def denoiser(x: Tensor, t: Tensor, observation: Tensor) -> Tensor:
        asked.append(t)
        return 0 * x

    posed = policy_problem(1)._replace(denoiser=denoiser)
    finer = noise.with_noise(posed, 1000)
    known, levels = posed.scheduler.alphas_cumprod, finer.scheduler.alphas_cumprod
    torch.testing.assert_close(levels[9:-1:10], known[:-1], rtol=1e-3, atol=0)  # the last one is bounded
    finer.denoiser(posed.x, torch.arange(9, 1000, 10), **posed.cond)
    torch.testing.assert_close(asked[0], torch.arange(100.0))
    assert noise.with_noise(posed, 100).denoiser is denoiser


def test_recognised_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "digits.json"
    recognised.main(["--steps", "6", "--images", "20", "--at-once", "1", "--json", str(path)])
    assert "digits, DDPM, N = 6, guidance 1" in capsys.readouterr().out
    rows = json.loads(path.read_text())["results"]
    assert [each["method"] for each in rows] == [runner.SEQUENTIAL, "speculative"]
    for each in rows:
        assert each["images"] == 20
        assert len(each["waves"]) == 2
        assert 0 <= each["lower"] <= each["recognised"] / 20 <= each["upper"] + 1e-9
        assert each["recognised"] > 10, "far more than the two that chance gives"


def test_schedulers_that_carry_more_are_exact_and_within_the_tolerance(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    histories.main(["--smoke", "--json", str(path)])
    found = json.loads(path.read_text())["results"]
    assert [each["scheduler"] for each in found] == ["PNDM", "UniPC 2", "SASolver"]
    assert [each["state_vectors"] for each in found] == [4, 3, 3]
    for each in found:
        assert max(each["sequential"], each["exact"]) < 1e-5
        assert all(each[method]["waves"] <= each[method]["rows"] for method in histories.METHODS)
        assert all(each[method]["grey_levels"] < 0.5 for method in histories.METHODS)


def test_committed_results_are_read_sorted_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = [tmp_path / name for name in ("waves.png", "latency.png", "tradeoff.png")]
    methods.main(["--from", str(RESULTS / "methods-digits.json"), "--picture", str(pictures[0])])
    printed = capsys.readouterr().out
    assert "digits, guidance 5, N = 100" in printed
    tables = [block.splitlines()[2:] for block in printed.split("\n\n") if "percentile within" in block]
    for lines in tables:
        ratios = [float(line.split()[0]) for line in lines if line.split()[0] != "-"]
        assert len(ratios) > 1
        assert ratios == sorted(ratios, reverse=True)
    peers.main(["--from", str(RESULTS / "peers-cpu.json"), "--picture", str(pictures[1])])
    assert "policy, N = 100" in capsys.readouterr().out
    tradeoff.main(["--from", str(RESULTS / "tradeoff-cpu.json"), "--picture", str(pictures[2])])
    assert "srds_fast, auto" in capsys.readouterr().out
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)


def test_ways_to_make_an_image_sooner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"STEPS": 6, "FEWER": (3,), "FEWER_2M": (4,), "ITERATIONS": (0, 1)}.items():
        monkeypatch.setattr(tradeoff, name, value)
    path = tmp_path / "tradeoff.json"
    tradeoff.main(["--smoke", "--json", str(path), "--picture", str(tmp_path / "tradeoff.png")])
    document = json.loads(path.read_text())
    assert (document["steps"], document["samples"]) == (6, 2)
    found = {(row["line"], row["setting"]): row for row in document["results"]}
    assert all(row["left_out"] is None and row["lower"] <= row["seconds"] <= row["upper"] for row in found.values())
    off = {key: row["grey_levels"]["mean"] for key, row in found.items()}
    assert off[tradeoff.DDIM, "6 steps"] == 0.0
    assert off[tradeoff.FIXED, "iteration 1"] < off[tradeoff.FIXED, "iteration 0"]
    assert min(off[tradeoff.DDIM, "3 steps"], off[tradeoff.SECOND, "4 steps"]) > 0.5
    assert off[tradeoff.AUTO, "auto"] < 0.5
    assert (tmp_path / "tradeoff.png").read_bytes().startswith(b"\x89PNG")


def test_cheapest_needs_the_points_behind_it_within_the_bound() -> None:
    points = [Point(str(waves), off, waves, waves, 1) for waves, off in ((2, 0.4), (3, 0.6), (4, 0.3), (5, 0.2))]
    within = search.cheapest(points, 0.5)
    assert within is not None
    assert within.setting == "4"
    assert search.cheapest(points, 0.1) is None


def test_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    written = tmp_path / "policy.json"
    monkeypatch.setattr(policy, "revision", lambda root: "0123")
    few = ["--steps", "6", "--episodes", "2", "--calls", "2", "--schedulers", "DDIM", "--json", str(written)]
    policy.main([*few, "--methods", runner.SEQUENTIAL, "srds"])
    before = json.loads(written.read_text())["results"]
    policy.main([*few, "--methods", runner.SEQUENTIAL, runner.AUTO, "srds", "--resume"])
    assert json.loads(written.read_text())["results"][:3] == before, "an interrupted run goes on"
    assert "push task, DDIM, N = 6" in capsys.readouterr().out
    results = {each["method"]: each for each in json.loads(written.read_text())["results"]}
    assert set(results) == {policy.STOCK, runner.SEQUENTIAL, runner.AUTO, "srds"}
    sequential = results[runner.SEQUENTIAL]
    assert (sequential["other_end"], sequential["episodes"], sequential["waves"]) == (0, 2, 6)
    assert sequential["max_difference"] < 1e-4
    assert all(0 <= each["waves"] <= each["rows"] for each in results.values())
    assert all(each["mean_difference"] < 4e-3 for each in results.values())


def test_wilson_intervals() -> None:
    assert intervals.wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert intervals.wilson(100, 100) == pytest.approx((0.9630, 1.0), abs=1e-4)


def test_intervals_of_a_difference_are_those_that_newcombe_lists() -> None:
    """Newcombe 1998, table II, examples (a) and (c)."""
    assert intervals.apart((56, 48), (70, 80)) == pytest.approx((0.0524, 0.3339), abs=1e-4)
    assert intervals.apart((9, 3), (10, 10)) == pytest.approx((0.1705, 0.8090), abs=1e-4)
    assert intervals.percent(intervals.apart((56, 48), (70, 80)), signed=True) == "+5.2 to +33.4"


def test_everyone_ran_or_says_why_not(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    peers.main(["--smoke", "--workloads", "digits", "policy", "--json", str(path)])
    whole = json.loads(path.read_text())
    assert whole["runs"][0]["arguments"][:2] == ["--smoke", "--workloads"]
    others = {runner.STOCK, *entrants.COMPILED.values(), *entrants.DIFFUSERS.values()}
    for workload in ("digits", "policy"):
        found = {each["peer"]: each for each in whole["results"] if each["workload"] == workload}
        assert others | {runner.AUTO, *entrants.METHODS} <= set(found)
        assert (runner.BY_HAND in found) == (workload == "policy")
        left_out = {peer: each["left_out"] for peer, each in found.items() if each["left_out"] is not None}
        assert all(len(why) > 20 for why in left_out.values())
        assert not {runner.STOCK, runner.AUTO} & set(left_out)
        assert set(entrants.DIFFUSERS.values()) <= set(left_out) or workload == "digits"
        ran = {peer: each for peer, each in found.items() if peer not in left_out}
        sequential = min(each["seconds"] for peer, each in ran.items() if peer.startswith(runner.SEQUENTIAL))
        for each in ran.values():
            assert each["over_stock"] == pytest.approx(ran[runner.STOCK]["seconds"] / each["seconds"])
            assert each["over_sequential"] == pytest.approx(sequential / each["seconds"])
            assert each["lower"] <= each["seconds"] <= each["upper"]
            assert each["waves"] <= each["rows"] <= each["waves"] * each["peak_rows"]
            assert not each["within"] or each["difference"] <= entrants.BOUND
        times = [each["seconds"] for each in ran.values()]
        assert times == sorted(times)
        assert sum(each["within"] for each in ran.values()) >= 5
        assert (ran[runner.STOCK]["difference"], ran[runner.STOCK]["waves"]) == (0.0, 5)


def test_what_is_found_is_run_again() -> None:
    """A point of the search, timed, is the run that the search saw: the same waves, the same difference."""
    workload = digits()
    assert workload.problem is not None
    problem = workload.problem.only(slice(2))
    reference = problem.sequential(STEPS)
    for name in ("srds, as published", "collocation (default)", "paradigms, window 10", "chords, 4 cores"):
        contestant = CONTESTANTS[name]
        for point in search.line(contestant, problem, STEPS, reference, (entrants.BOUND,)):
            loop = workload.ours(STEPS, {"plan": contestant.plan(STEPS, point.tolerance, point.iteration)})
            again, waves = [], []
            for sample in range(2):
                again.append(loop.call(sample))
                waves.append(loop.report().waves)
            off = float(difference(torch.cat(again), reference).quantile(0.95))
            assert off == pytest.approx(point.difference, rel=1e-2, abs=1e-3), (name, point.setting)
            assert sum(waves) / 2 == point.waves, (name, point.setting)


def test_diffusers_paradigms_is_held_to_its_own_sequential_sample() -> None:
    workload = digits()
    found = list(entrants.of_diffusers(workload, STEPS, {}))
    assert [each.name for each in found] == list(entrants.DIFFUSERS.values())
    for each in found:
        assert each.reference is not None
        # with a tolerance that nothing meets every step is exact
        exact = entrants.diffusers_paradigms(workload, STEPS, window=4, tolerance=0.0)
        own, stock = each.reference(1), workload.stock(STEPS).call(1)
        assert float(difference(exact.call(1), own)) < 1e-3
        assert float(difference(own, stock)) > 1e-2
        assert exact.report().rows >= STEPS


def measured(workload: Workload, every: list[Entrant], steps: int = STEPS) -> dict[str, Row]:
    *_, rows = runner.measured("of a test", workload, steps, 2, every)
    return {row["peer"]: row for row in rows}


@pytest.mark.parametrize("good", [1, 3], ids=["first call", "second round"])
@pytest.mark.parametrize("fails", [runner.STOCK, "other", "compiled"])
def test_one_that_fails_loses_only_itself(good: int, fails: str, capsys: pytest.CaptureFixture[str]) -> None:
    workload = samplers.policy()
    every = [
        Entrant(runner.STOCK, lambda: workload.stock(STEPS)),
        runner.told(workload, STEPS, "other", method="srds"),
        runner.told(workload, STEPS, runner.SEQUENTIAL, method="sequential"),
        Entrant("compiled", lambda: workload.stock(STEPS), compiles=True),
    ]
    for each in every:
        if each.name == fails:
            each.make = lambda make=each.make: failing(make(), good)
    found = measured(workload, every)
    assert found[fails]["left_out"] == f"OutOfMemoryError: no memory in call {good + 1}"
    assert [peer for peer, row in found.items() if row["left_out"] is not None] == [fails]
    ran = found[runner.SEQUENTIAL]
    assert (ran["over_sequential"], ran["over_stock"] is None) == (1.0, fails == runner.STOCK)
    assert ran["difference"] is None, "weights are random"
    runner.show(list(found.values()))
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"left out: {fails}: {found[fails]['left_out']}"
    assert len(printed) == 3 + len(every), "an empty line, the workload, headings and entrants"


def test_a_search_that_fails_loses_only_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    searched = entrants.line

    def fails_in_paradigms(contestant: Contestant, *arguments: Any) -> list[Point]:
        if "paradigms" in contestant.name:
            raise torch.cuda.OutOfMemoryError("no memory")
        return searched(contestant, *arguments)

    monkeypatch.setattr(entrants, "line", fails_in_paradigms)
    every = entrants.entrants(digits(), STEPS, 2, compiles=False)
    found = {each.name: each.failed for each in every}
    assert found["paradigms, window 10"] == "OutOfMemoryError: no memory"
    assert found[entrants.DIFFUSERS[10]].startswith("not tried: ")
    assert found["srds, as published"] is None


def test_random_weights_run_fixed_numbers_of_iterations() -> None:
    workload = samplers.WORKLOADS["sd15"]()
    every = entrants.entrants(workload, STEPS, 2, compiles=False)
    found = measured(workload, list(every))
    for name in (*entrants.ITERATIONS, entrants.WINDOW, entrants.DIFFUSERS[10]):
        assert (found[name]["left_out"], found[name]["within"], found[name]["difference"]) == (None, False, None)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--samples", "17"], "Pass 2 to"),
        (["--steps", "0"], "Pass 1 to 1000"),
        (["--steps", "50", "101"], "The scheduler of policy has 100"),
        (["--from", "no/such.json"], "there is no file no/such.json"),
        (["--picture", "no/such/folder.png"], "name a file in a folder that exists"),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        peers.main(arguments)
    assert ended.value.code == 2
    assert why in capsys.readouterr().err
