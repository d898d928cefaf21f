"""Methods at an equal difference, at a tiny size: what is written hangs together, what fails loses only itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from test_speed import failing

from bench.quality import entrants, methods, peers, pictures, policy, runner, search
from bench.quality.contestants import CONTESTANTS, DEFAULT, PAPER, Contestant
from bench.quality.search import Point
from bench.workloads import samplers
from bench.workloads.problems import difference
from bench.workloads.samplers import PipelineWorkload, digits

RESULTS = Path(__file__).parents[2] / "bench" / "results"
STEPS = 6


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """What `bench.quality.methods` wrote, and where."""
    path = tmp_path_factory.mktemp("methods") / "found.json"
    methods.main(["--smoke", "--json", str(path)])
    return json.loads(path.read_text()), str(path)


def test_every_method_runs_on_every_problem(compared: tuple[dict[str, Any], str]) -> None:
    found = compared[0]
    of_each = {(each["problem"], each["method"]) for each in found["found"]}
    assert {method for _, method in of_each} == set(CONTESTANTS)
    assert len(of_each) == len(found["found"]) == 2 * len(CONTESTANTS)
    assert (found["environment"]["torch"], found["samples"]) == (version("torch"), 2)


def test_points_are_of_whole_runs(compared: tuple[dict[str, Any], str]) -> None:
    for each in map(methods.Found.of_json, compared[0]["found"]):
        last = each.points[-1]
        # it came to the sequential sample, or was as long as the sequential run
        assert last.difference <= min(methods.BOUNDS) or last.waves >= each.steps or "tolerance" in last.setting
        for point in each.points:
            assert len(point.widths) in (1, 2)
            assert 1 <= point.waves <= point.rows <= point.peak_rows * point.waves
            assert all(width > 0 for widths in point.widths for width in widths)
        if "iteration" in last.setting:
            waves = [point.waves for point in each.points]
            assert waves == sorted(set(waves))


def test_the_table_is_sorted_and_told_again(
    compared: tuple[dict[str, Any], str], capsys: pytest.CaptureFixture[str]
) -> None:
    methods.main(["--from", compared[1]])
    blocks = capsys.readouterr().out.strip().split("\n\n")
    tables = [block.splitlines() for block in blocks if "percentile within" in block]
    assert len(tables) == 2 * len(methods.BOUNDS)
    for _, _, *lines in tables:
        ratios = [float(line.split()[0]) for line in lines if line.split()[0] != "-"]
        assert ratios == sorted(ratios, reverse=True)
        assert len(lines) == len(CONTESTANTS)


def test_committed_results_are_read_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    waves, latency = tmp_path / "waves.png", tmp_path / "latency.png"
    methods.main(["--from", str(RESULTS / "methods-digits.json"), "--picture", str(waves)])
    assert "against the paper's SRDS" in capsys.readouterr().out
    peers.main(["--from", str(RESULTS / "peers-cpu.json"), "--picture", str(latency)])
    assert "policy, N = 100" in capsys.readouterr().out
    for picture in (waves, latency):
        assert picture.read_bytes().startswith(b"\x89PNG")


def test_cheapest_needs_the_points_behind_it_within_the_bound() -> None:
    points = [Point(str(waves), off, ((1,) * waves,)) for waves, off in ((2, 0.4), (3, 0.6), (4, 0.3), (5, 0.2))]
    within = search.cheapest(points, 0.5)
    assert within is not None
    assert within.setting == "4"
    assert search.cheapest(points, 0.1) is None


def test_the_verdict_compares_default_and_paper() -> None:
    found = [
        methods.Found("p", 25, method, [Point("iteration 1", 0.1, ((1,) * waves,))])
        for method, waves in ((PAPER, 20), (DEFAULT, 10))
    ]
    assert "2.00 at N=25 (20/10.0)" in next(methods.verdict(found))


def test_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "policy.json"
    policy.main(["--smoke", "--json", str(written)])
    assert "383 thousand parameters" in capsys.readouterr().out
    results = {each["peer"]: each for each in json.loads(written.read_text())["results"]}
    assert {runner.BY_HAND, runner.SEQUENTIAL, runner.AUTO, "srds", "collocation, 24 nodes"} <= set(results)
    assert results[runner.SEQUENTIAL]["over_sequential"] == 1.0
    assert results[runner.BY_HAND]["difference"] < 1e-3


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("peers")
    found = folder / "found.json"
    peers.main(["--smoke", "--workloads", "digits", "policy", "--json", str(found)])
    whole = json.loads(found.read_text())
    assert whole["environment"]["torch"] == version("torch")
    assert whole["where"].endswith(", 2 samples")
    (run,) = whole["runs"]
    assert run["arguments"][:2] == ["--smoke", "--workloads"]
    assert len(run["commit"]) == 40
    return found, whole["results"]


def of(results: list[dict[str, Any]], workload: str) -> dict[str, dict[str, Any]]:
    return {each["peer"]: each for each in results if each["workload"] == workload}


@pytest.mark.parametrize("workload", ["digits", "policy"])
def test_everyone_is_there_or_says_why_not(written: tuple[Path, list[dict[str, Any]]], workload: str) -> None:
    found = of(written[1], workload)
    others = {runner.STOCK, *entrants.COMPILED.values(), *entrants.DIFFUSERS.values()}
    ours = {entrants.OWN_STOP, runner.AUTO, *entrants.METHODS}
    assert others | ours <= set(found)
    # on a GPU it is there with either engine
    assert sum(peer.startswith(runner.SEQUENTIAL) for peer in found) == len(entrants.ENGINES)
    assert (runner.BY_HAND in found) == (workload == "policy")
    left_out = {peer: each["left_out"] for peer, each in found.items() if each["left_out"] is not None}
    assert all(len(why) > 20 for why in left_out.values())
    assert {runner.STOCK, runner.AUTO} <= set(found) - set(left_out)
    assert set(entrants.DIFFUSERS.values()) <= set(left_out) if workload == "policy" else True


@pytest.mark.parametrize("workload", ["digits", "policy"])
def test_figures_hang_together(written: tuple[Path, list[dict[str, Any]]], workload: str) -> None:
    ran = {peer: each for peer, each in of(written[1], workload).items() if each["left_out"] is None}
    sequential = min(each["seconds"] for peer, each in ran.items() if peer.startswith(runner.SEQUENTIAL))
    for each in ran.values():
        assert each["over_stock"] == pytest.approx(ran[runner.STOCK]["seconds"] / each["seconds"])
        assert each["over_sequential"] == pytest.approx(sequential / each["seconds"])
        assert each["lower"] <= each["seconds"] <= each["upper"]
        assert each["waves"] <= each["rows"] <= each["waves"] * each["peak_rows"]
        if each["within"]:
            assert each["difference"] <= entrants.BOUND
    times = [each["seconds"] for each in ran.values()]
    assert times == sorted(times)
    assert sum(each["within"] for each in ran.values()) >= 5
    assert ran[runner.STOCK]["difference"] == 0.0
    assert ran[runner.STOCK]["waves"] == 5


def test_the_table_is_told_again_and_drawn(
    written: tuple[Path, list[dict[str, Any]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn, again = tmp_path / "picture.png", tmp_path / "again.json"
    peers.main(["--from", str(written[0]), "--picture", str(drawn), "--json", str(again)])
    for part in ("results", "runs"):
        assert json.loads(again.read_text())[part] == json.loads(written[0].read_text())[part]
    printed = capsys.readouterr().out
    assert drawn.read_bytes().startswith(b"\x89PNG")
    for each in written[1]:
        assert each["peer"] in printed
        assert each["left_out"] is None or each["left_out"] in printed


def test_what_is_found_is_run_again() -> None:
    """A point of the search, timed, is the run that the search saw: the same waves, the same difference."""
    workload = digits()
    assert workload.problem is not None
    problem = workload.problem.first(2)
    reference = problem.sequential(STEPS)
    for name in ("srds, as published", "collocation (default)", "paradigms, window 10", "chords, 4 cores"):
        contestant = CONTESTANTS[name]
        for point in search.line(contestant, problem, STEPS, reference, (entrants.BOUND,)):
            loop = workload.ours(STEPS, {"plan": search.plan_of(contestant, STEPS, point)})
            again = torch.cat([loop.call(sample) for sample in range(2)])
            off = float(difference(again, reference).quantile(0.95))
            assert off == pytest.approx(point.difference, rel=1e-2, abs=1e-3), (name, point.setting)
            assert loop.ran().waves in [len(widths) for widths in point.widths], (name, point.setting)


def test_diffusers_paradigms_is_held_to_its_own_sequential_sample() -> None:
    workload = digits()
    found = list(entrants.of_diffusers(workload, STEPS, samples=2, points={}))
    assert [each.name for each in found] == list(entrants.DIFFUSERS.values())
    for each in found:
        assert each.loop is not None
        assert each.reference is not None
        # with a tolerance that nothing meets every step is exact
        exact = entrants.diffusers_paradigms(workload, STEPS, window=4, tolerance=0.0)
        own, stock = each.reference.call(1), workload.stock(STEPS).call(1)
        assert float(difference(exact.call(1), own)) < 1e-3
        assert float(difference(own, stock)) > 1e-2
        assert exact.ran().rows >= STEPS


def test_a_compiler_that_fails_is_told_of() -> None:
    def fails(*_: object) -> NoReturn:
        raise RuntimeError("no compiler here")

    workload = samplers.policy()
    network = torch.compile(workload.network.module, backend=fails)
    every = [
        runner.Entrant(runner.STOCK, workload.stock(STEPS)),
        runner.Entrant("stock, torch.compile (default)", workload.stock(STEPS, network), compiles=True),
        runner.Entrant(runner.SEQUENTIAL, workload.ours(STEPS, {"method": "sequential"})),
    ]
    found = last(runner.measured("policy", workload, STEPS, 2, every))
    assert [each.peer for each in found if each.left_out is None] != []
    assert "no compiler here" in (found[-1].left_out or "")
    assert all(each.difference is None for each in found)  # its weights are random
    torch._dynamo.reset()


def last(found: Iterator[list[runner.Result]]) -> list[runner.Result]:
    return list(found)[-1]


@pytest.mark.parametrize("good", [1, 3], ids=["first call", "second round"])
def test_one_that_fails_loses_only_itself(good: int) -> None:
    workload = samplers.policy()
    sequential = workload.ours(STEPS, {"method": "sequential"})
    every = [
        runner.Entrant(runner.STOCK, workload.stock(STEPS)),
        runner.Entrant("fails", failing(sequential, good)),
        runner.Entrant(runner.SEQUENTIAL, sequential),
    ]
    before, *rounds = runner.measured("policy", workload, STEPS, 2, every)
    assert {each.left_out for each in before} <= {runner.NOT_TIMED, "OutOfMemoryError: no memory in call 2"}
    assert len(rounds) == 2
    ran = {each.peer: each for each in rounds[-1]}
    assert ran["fails"].left_out == f"OutOfMemoryError: no memory in call {good + 1}"
    for name in (runner.STOCK, runner.SEQUENTIAL):
        assert ran[name].left_out is None
        assert ran[name].over_stock is not None
    # nor does the table need the stock loop
    every[0] = runner.Entrant(runner.STOCK, failing(workload.stock(STEPS), good))
    found = last(runner.measured("policy", workload, STEPS, 2, every))
    (alone,) = (each for each in found if each.left_out is None)
    assert (alone.peer, alone.over_stock, alone.over_sequential) == (runner.SEQUENTIAL, None, 1.0)
    assert any(runner.SEQUENTIAL in row for row in runner.table(found))


def test_a_search_that_fails_loses_only_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    searched = entrants.line

    def fails_in_paradigms(contestant: Contestant, *arguments: Any) -> search.Line:
        if "paradigms" in contestant.name:
            raise torch.cuda.OutOfMemoryError("no memory")
        return searched(contestant, *arguments)

    monkeypatch.setattr(entrants, "line", fails_in_paradigms)
    every = list(entrants.entrants(digits(), STEPS, 2, {}, dict.fromkeys(entrants.COMPILED, "not compiled here")))
    found = {each.name: each for each in every}
    assert found["paradigms, window 10"].why_not == "OutOfMemoryError: no memory"
    assert (found[entrants.DIFFUSERS[10]].why_not or "").startswith("not tried: ")
    assert found["srds, as published"].loop is not None


def test_random_weights_run_fixed_numbers_of_iterations() -> None:
    workload = samplers.WORKLOADS["dit"]()
    assert isinstance(workload, PipelineWorkload)
    every = list(entrants.entrants(workload, STEPS, 2, {}, dict.fromkeys(entrants.COMPILED, "not compiled here")))
    found = {each.peer: each for each in last(runner.measured("dit", workload, STEPS, 2, every))}
    for name in (*entrants.ITERATIONS, entrants.WINDOW):
        assert found[name].left_out is None
        assert not found[name].within
        assert found[name].difference is None
    assert "StableDiffusionPipeline only" in (found[entrants.DIFFUSERS[10]].left_out or "")


def test_diffusers_runs_on_random_weights_too() -> None:
    workload = samplers.WORKLOADS["sd15"]()
    every = list(entrants.of_diffusers(workload, 3, samples=2, points={}))[:1]
    (found,) = last(runner.measured("sd15", workload, 3, 2, every))
    assert (found.left_out, found.peer) == (None, entrants.DIFFUSERS[10])
    assert (found.difference, found.within, found.over_stock) == (None, False, None)


def test_labels_are_moved_apart() -> None:
    spread = pictures.spread([0.1, 0.11, 0.5, 0.99, 0.995], gap=0.05)
    assert spread == pytest.approx([0.08, 0.13, 0.5, 0.95, 1.0])
    assert pictures.spread([0.0, 0.0, 1.0], gap=0.05) == pytest.approx([0.0, 0.05, 1.0])
    full = pictures.spread([0.4] * 5, gap=0.25)
    assert full == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--samples", "17"], "Pass 2 to"),
        (["--steps", "0"], "Pass 1 to 1000"),
        (["--steps", "50", "101"], "The scheduler of policy has 100"),
        (["--from", "no/such.json"], "there is no file no/such.json"),
        (["--json", "no/such/folder.json"], "name a file in a folder that exists"),
        (["--picture", "no/such/folder.png"], "name a file in a folder that exists"),
    ],
    ids=lambda each: each[0] if isinstance(each, list) else "",
)
def test_bad_arguments_are_refused(arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        peers.main(arguments)
    assert ended.value.code == 2
    assert why in capsys.readouterr().err
