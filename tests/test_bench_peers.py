"""Peers side by side at a tiny size: all are there or say why not, and what is written hangs together."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import engines, entrants, kernels, peers, peers_picture, reaching, rows, summary
from bench.contestants import CONTESTANTS, Contestant
from bench.workloads import WORKLOADS, Loop, PipelineWorkload, digits, policy

STEPS = 6


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
    others = {entrants.STOCK, *entrants.COMPILED.values(), *entrants.DIFFUSERS.values()}
    ours = {entrants.OWN_STOP, entrants.AUTO, *entrants.METHODS}
    assert others | ours <= set(found)
    # on a GPU it is there with either engine
    assert sum(peer.startswith(entrants.SEQUENTIAL) for peer in found) == len(entrants.ENGINES)
    assert (entrants.BY_HAND in found) == (workload == "policy")
    left_out = {peer: each["left_out"] for peer, each in found.items() if each["left_out"] is not None}
    assert all(len(why) > 20 for why in left_out.values())
    assert {entrants.STOCK, entrants.AUTO} <= set(found) - set(left_out)
    assert set(entrants.DIFFUSERS.values()) <= set(left_out) if workload == "policy" else True


@pytest.mark.parametrize("workload", ["digits", "policy"])
def test_figures_hang_together(written: tuple[Path, list[dict[str, Any]]], workload: str) -> None:
    ran = {peer: each for peer, each in of(written[1], workload).items() if each["left_out"] is None}
    sequential = min(each["seconds"] for peer, each in ran.items() if peer.startswith(entrants.SEQUENTIAL))
    for each in ran.values():
        assert each["over_stock"] == pytest.approx(ran[entrants.STOCK]["seconds"] / each["seconds"])
        assert each["over_sequential"] == pytest.approx(sequential / each["seconds"])
        assert each["lower"] <= each["seconds"] <= each["upper"]
        assert each["waves"] <= each["rows"] <= each["waves"] * each["peak_rows"]
        if each["within"]:
            assert each["difference"] <= entrants.BOUND
    times = [each["seconds"] for each in ran.values()]
    assert times == sorted(times)
    assert sum(each["within"] for each in ran.values()) >= 5
    assert ran[entrants.STOCK]["difference"] == 0.0
    assert ran[entrants.STOCK]["waves"] == 5


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
    reference = reaching.sequential(problem, STEPS)
    for name in ("srds, as published", "collocation (default)", "paradigms, window 10", "chords, 4 cores"):
        contestant = CONTESTANTS[name]
        for point in reaching.line(contestant, problem, STEPS, reference, (entrants.BOUND,)):
            loop = workload.ours(STEPS, {"plan": reaching.plan_of(contestant, STEPS, point)})
            again = torch.cat([loop.call(sample) for sample in range(2)])
            off = float(reaching.difference(again, reference).quantile(0.95))
            assert off == pytest.approx(point.difference, rel=1e-2, abs=1e-3), (name, point.setting)
            assert loop.ran().waves in [len(widths) for widths in point.widths], (name, point.setting)


def test_diffusers_paradigms_is_held_to_its_own_sequential_sample() -> None:
    workload = digits()
    found = list(entrants._of_diffusers(workload, STEPS, samples=2, points={}))
    assert [each.name for each in found] == list(entrants.DIFFUSERS.values())
    for each in found:
        assert each.loop is not None
        assert each.reference is not None
        # with a tolerance that nothing meets every step is exact
        exact = entrants._paradigms(workload, STEPS, window=4, tolerance=0.0)
        own, stock = each.reference.call(1), workload.stock(STEPS).call(1)
        assert float(reaching.difference(exact.call(1), own)) < 1e-3
        assert float(reaching.difference(own, stock)) > 1e-2
        assert exact.ran().rows == sum(exact.widths()) >= STEPS


def test_a_compiler_that_fails_is_told_of() -> None:
    def fails(*_: object) -> NoReturn:
        raise RuntimeError("no compiler here")

    workload = policy()
    network = torch.compile(workload.network.network, backend=fails)
    every = [
        entrants.Entrant(entrants.STOCK, workload.stock(STEPS)),
        entrants.Entrant("stock, torch.compile (default)", workload.stock(STEPS, network), compiles=True),
        entrants.Entrant(entrants.SEQUENTIAL, workload.ours(STEPS, {"method": "sequential"})),
    ]
    found = last(peers.measured("policy", workload, STEPS, 2, every))
    assert [each.peer for each in found if each.left_out is None] != []
    assert "no compiler here" in (found[-1].left_out or "")
    assert all(each.difference is None for each in found)  # its weights are random
    torch._dynamo.reset()


def last(found: Iterator[list[peers.Result]]) -> list[peers.Result]:
    return list(found)[-1]


def failing(loop: Loop, good: int) -> Loop:
    """It raises after so many calls, as a device does that has no memory left."""
    calls: list[int] = []

    def call(sample: int = 0) -> torch.Tensor:
        calls.append(sample)
        if len(calls) > good:
            raise torch.cuda.OutOfMemoryError(f"no memory in call {len(calls)}")
        return loop.call(sample)

    return replace(loop, call=call)


@pytest.mark.parametrize("good", [1, 3], ids=["first call", "second round"])
def test_one_that_fails_loses_only_itself(good: int) -> None:
    workload = policy()
    sequential = workload.ours(STEPS, {"method": "sequential"})
    every = [
        entrants.Entrant(entrants.STOCK, workload.stock(STEPS)),
        entrants.Entrant("fails", failing(sequential, good)),
        entrants.Entrant(entrants.SEQUENTIAL, sequential),
    ]
    before, *rounds = peers.measured("policy", workload, STEPS, 2, every)
    assert {each.left_out for each in before} <= {peers.NOT_TIMED, "OutOfMemoryError: no memory in call 2"}
    assert len(rounds) == 2
    ran = {each.peer: each for each in rounds[-1]}
    assert ran["fails"].left_out == f"OutOfMemoryError: no memory in call {good + 1}"
    for name in (entrants.STOCK, entrants.SEQUENTIAL):
        assert ran[name].left_out is None
        assert ran[name].over_stock is not None
    # nor does the table need the stock loop
    every[0] = entrants.Entrant(entrants.STOCK, failing(workload.stock(STEPS), good))
    found = last(peers.measured("policy", workload, STEPS, 2, every))
    (alone,) = (each for each in found if each.left_out is None)
    assert (alone.peer, alone.over_stock, alone.over_sequential) == (entrants.SEQUENTIAL, None, 1.0)
    assert any(entrants.SEQUENTIAL in row for row in peers.table(found))


def test_a_search_that_fails_loses_only_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    searched = entrants.line

    def fails_in_paradigms(contestant: Contestant, *arguments: Any) -> reaching.Line:
        if "paradigms" in contestant.name:
            raise torch.cuda.OutOfMemoryError("no memory")
        return searched(contestant, *arguments)

    monkeypatch.setattr(entrants, "line", fails_in_paradigms)
    every = list(entrants.entrants(digits(), STEPS, 2, {}, dict.fromkeys(entrants.COMPILED, "not compiled here")))
    found = {each.name: each for each in every}
    assert found["paradigms, window 10"].why_not == "OutOfMemoryError: no memory"
    assert (found[entrants.DIFFUSERS[10]].why_not or "").startswith("not tried: ")
    assert found["srds, as published"].loop is not None


def test_an_engine_that_fails_loses_only_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = policy()
    made = workload.ours

    def ours(steps: int, settings: dict[str, Any]) -> Loop:
        if settings["engine"] == "network-graphs":
            raise torch.cuda.OutOfMemoryError("no memory")
        loop = made(steps, settings)
        other = replace(loop, widths=lambda: [1])  # not what it runs
        return failing(loop, 2) if settings["engine"] == "graph" else other if settings["method"] == "srds" else loop

    monkeypatch.setattr(workload, "ours", ours)
    found = {(each["method"], each["asked"]): each for each in engines.measured("policy", workload, STEPS, 1)}
    assert len(found) == 1 + len(engines.METHODS) * len(engines.ENGINES)
    running = [key for key, each in found.items() if each["failed"] is None]
    assert running == [("stock", "stock"), ("sequential", "eager"), ("collocation", "eager")]
    assert found["srds", "network-graphs"]["failed"] == "OutOfMemoryError: no memory"
    assert found["srds", "graph"]["failed"] == "OutOfMemoryError: no memory in call 3"
    assert "planned were 1 of 1" in found["srds", "eager"]["failed"]
    (told,) = summary.SECTIONS["engines"]({"results": list(found.values())})[1:]
    assert told.endswith("7 loops failed")
    for each in found.values():
        assert ("failed: " in engines._line(each)) == (each["failed"] is not None)


def test_kernels_are_written_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is cut in the last row leaves the others."""
    measured = kernels.measured

    def cut(name: str, *arguments: Any) -> dict[str, Any]:
        if name == "fixed_point_wave":
            raise KeyboardInterrupt
        return measured(name, *arguments)

    monkeypatch.setattr(kernels, "measured", cut)
    monkeypatch.setattr(kernels, "DEVICE", torch.device("cpu"))
    with pytest.raises(KeyboardInterrupt):
        kernels.main(["--sizes", "SD latent", "--json", str(tmp_path / "kernels.json")])
    written = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert [row["operation"] for row in written] == ["wave_update"]


def test_random_weights_run_fixed_numbers_of_iterations() -> None:
    workload = WORKLOADS["dit"]()
    assert isinstance(workload, PipelineWorkload)
    every = list(entrants.entrants(workload, STEPS, 2, {}, dict.fromkeys(entrants.COMPILED, "not compiled here")))
    found = {each.peer: each for each in last(peers.measured("dit", workload, STEPS, 2, every))}
    for name in (*entrants.ITERATIONS, entrants.WINDOW):
        assert found[name].left_out is None
        assert not found[name].within
        assert found[name].difference is None
    assert "StableDiffusionPipeline only" in (found[entrants.DIFFUSERS[10]].left_out or "")


def test_diffusers_runs_on_random_weights_too() -> None:
    workload = WORKLOADS["sd15"]()
    every = list(entrants._of_diffusers(workload, 3, samples=2, points={}))[:1]
    (found,) = last(peers.measured("sd15", workload, 3, 2, every))
    assert (found.left_out, found.peer) == (None, entrants.DIFFUSERS[10])
    assert (found.difference, found.within, found.over_stock) == (None, False, None)


def test_labels_are_moved_apart() -> None:
    spread = peers_picture.spread([0.1, 0.11, 0.5, 0.99, 0.995], gap=0.05)
    assert spread == pytest.approx([0.08, 0.13, 0.5, 0.95, 1.0])
    assert peers_picture.spread([0.0, 0.0, 1.0], gap=0.05) == pytest.approx([0.0, 0.05, 1.0])
    full = peers_picture.spread([0.4] * 5, gap=0.25)
    assert full == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--samples", "17"], "Pass 2 to"),
        (["--steps", "0"], "Pass 1 to 1000"),
        (["--steps", "50", "101"], "The scheduler of policy has 100"),
        (["--from", "no/such.json"], "there is no file no/such.json"),
        (["--json", "no/such/folder.json"], "name a file in a folder that is there"),
        (["--picture", "no/such/folder.png"], "name a file in a folder that is there"),
    ],
    ids=lambda each: each[0] if isinstance(each, list) else "",
)
def test_bad_arguments_are_refused(arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        peers.main(arguments)
    assert ended.value.code == 2
    assert why in capsys.readouterr().err


def test_a_curve_has_rows(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        rows.main(["--rows", "1", "0"])
    assert "Pass 1 or more" in capsys.readouterr().err


def test_schedulers_have_the_training_steps_that_are_told() -> None:
    for name in ("digits", "sd15", "dit"):
        workload = WORKLOADS[name]()
        assert isinstance(workload, PipelineWorkload)
        assert workload.pipe.scheduler.config.num_train_timesteps == peers.MOST_STEPS
