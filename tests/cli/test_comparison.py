"""What the command line measures and draws: differences, counts, seconds, contact sheets, tables."""

from __future__ import annotations

import math
from typing import Any

import pytest
import tiny
import torch

import srds_fast
from srds_fast.cli.measure import (
    METHODS,
    Calls,
    Convergence,
    Request,
    compare,
    converge,
    generators,
    grey_levels,
    spread,
    verdict,
)
from srds_fast.cli.output import show_table, small, warn_if_busy
from srds_fast.cli.sheet import Column, amplified, contact_sheet
from srds_fast.cli.table import Table

REQUEST = Request(prompts=("a", "b"), steps=16, guidance=3.0, seed=5)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.stable_diffusion()


@pytest.fixture(scope="module")
def converged(pipe: Any) -> Convergence:
    return converge(pipe, REQUEST, 6, {"num_blocks": 4})


@pytest.fixture(scope="module")
def entries(pipe: Any) -> list[dict[str, Any]]:
    return compare(pipe, REQUEST, list(METHODS), rounds=1)


def test_grey_levels_are_of_each_sample_and_then_over_the_samples() -> None:
    reference = torch.full((21, 3, 4, 4), 0.5)
    images = reference + torch.arange(21.0)[:, None, None, None] / 255 * torch.tensor([1.0, -1.0, 1.0])[:, None, None]
    assert grey_levels(images, reference) == pytest.approx({"mean": 10, "p95": 19, "max": 20}, abs=1e-4)


def test_grey_levels_see_what_rounding_to_8_bits_would_hide() -> None:
    reference = torch.full((2, 3, 4, 4), 100 / 255)
    assert grey_levels(reference + 0.1 / 255, reference)["mean"] == pytest.approx(0.1, abs=1e-4)


@pytest.mark.parametrize("max_rows", [None, 3])
def test_what_was_spent_is_what_a_stopped_run_reports(pipe: Any, max_rows: int | None) -> None:
    fast = srds_fast.compile(pipe, method="srds", max_rows=max_rows)
    report = Calls(fast).add(REQUEST).report
    plan = fast.plan_for(num_inference_steps=REQUEST.steps)
    assert 0 < report.iterations < plan.num_blocks
    whole = plan.program()
    assert whole.spent(plan.num_blocks).rows == whole.num_rows
    assert whole.spent(plan.num_blocks).peak_rows == whole.peak_rows
    cost = whole.spent(report.iterations)
    assert (cost.waves, cost.rows, cost.peak_rows) == (report.waves, report.rows, report.peak_rows)


def test_a_sample_starts_from_the_same_noise_in_any_batch() -> None:
    alone = torch.randn(4, generator=generators(7, 1)[0])
    third = torch.randn(4, generator=generators(5, 3)[2])
    assert torch.equal(alone, third)


def test_a_request_names_only_what_was_asked_for() -> None:
    assert set(Request(("a",), 4, None).arguments()) == {"prompt", "num_inference_steps", "generator"}
    whole = Request(("a", "b"), 4, 2.0, images_per_prompt=3, negative_prompt="").arguments()
    assert len(whole["generator"]) == 6
    assert (whole["guidance_scale"], whole["num_images_per_prompt"], whole["negative_prompt"]) == (2.0, 3, ["", ""])


def test_the_reference_is_the_stock_pipeline(converged: Convergence) -> None:
    images = tiny.stable_diffusion()(
        ["a", "b"],
        num_inference_steps=16,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
        output_type="pt",
    ).images
    torch.testing.assert_close(converged.stock.images, images, rtol=0, atol=1e-6)
    assert converged.stock.report is None
    assert converged.stock.loop_seconds == []


def test_stages_end_in_the_sequential_images(converged: Convergence) -> None:
    assert [stage.iteration for stage in converged.stages] == [0, 1, 2, 3, 4]  # four blocks: no fifth iteration
    assert [stage.spent.waves for stage in converged.stages] == [4, 7, 10, 13, 16]
    assert converged.difference(converged.stages[0].images)["mean"] > 1e-2
    assert converged.difference(converged.stages[-1].images)["max"] < 1e-3
    assert converged.difference(converged.sequential.images)["max"] < 1e-3


def test_a_stage_shows_what_a_call_of_so_many_iterations_returns(pipe: Any, converged: Convergence) -> None:
    for stage in converged.stages[:3]:
        capped = srds_fast.compile(
            pipe, method="srds", num_blocks=4, tolerance=0.0, max_iterations=stage.iteration, coarse_solver="2m"
        )
        torch.testing.assert_close(stage.images, Calls(capped).add(REQUEST).images, rtol=0, atol=1e-5)


def test_the_final_images_are_those_of_the_stage_where_the_tolerance_stops(converged: Convergence) -> None:
    stops = converged.final.report.iterations_per_sample
    for sample, iteration in enumerate(stops):
        shown = converged.stages[iteration].images[sample]
        torch.testing.assert_close(converged.final.images[sample], shown, rtol=0, atol=1e-5)


def test_seconds_of_the_loop_lie_within_those_of_the_call(converged: Convergence) -> None:
    for calls in (converged.final, converged.sequential):
        assert len(calls.seconds) == len(calls.loop_seconds) == 2
        for loop, whole in zip(calls.loop_seconds, calls.seconds, strict=True):
            assert 0 < loop < whole


def test_compare_measures_the_methods_asked_for(entries: list[dict[str, Any]]) -> None:
    assert [entry["method"] for entry in entries] == list(METHODS)
    by_name = {entry["method"]: entry for entry in entries}
    sequential, paper, srds, exact = (by_name[name] for name in ("sequential", "paper", "srds", "exact"))
    for name in ("collocation", "parataa"):
        assert by_name[name]["waves"] == by_name[name]["iterations"]
        assert (by_name[name]["blocks"], by_name[name]["coarse_solver"]) == (0, None)
    assert [sequential[key] for key in ("blocks", "coarse_solver", "waves", "rows")] == [0, None, 16, 16]
    assert (paper["blocks"], paper["coarse_solver"]) == (4, "ddim")
    assert paper["waves"] == paper["iterations"] * 4 + 4 - paper["iterations"]
    assert srds["coarse_solver"] == exact["coarse_solver"] == "2m"
    assert srds["iterations"] < exact["iterations"]
    assert srds["waves"] < exact["waves"]
    assert exact["difference"]["max"] < 1e-3
    for entry in entries:
        assert entry["ratio"] == pytest.approx(entry["seconds"] / sequential["seconds"])


def test_the_sequential_method_is_measured_even_if_it_is_not_asked_for(pipe: Any) -> None:
    announced: list[str] = []
    request = Request(("a",), 4, 3.0)
    (entry,) = compare(pipe, request, ["paper"], rounds=2, announce=announced.append)
    assert entry["method"] == "paper"
    assert math.isfinite(entry["ratio"])
    assert entry["seconds"] <= entry["slowest"]
    # in turn: what disturbs the machine for a while disturbs them all
    in_turn = ["4 steps, sequential", "4 steps, paper"]
    assert announced == ["4 steps, stock pipeline", *in_turn, *in_turn]


@pytest.mark.parametrize(
    ("times", "other", "words"),
    [
        ([1.0, 1.5], [2.0, 4.0], "2.00 times faster than"),
        ([3.0, 5.0], [1.0, 2.0], "3.00 times slower than"),
        ([1.0, 3.0], [2.0, 4.0], "neither clearly faster nor slower than"),
    ],
)
def test_no_verdict_where_times_overlap(times: list[float], other: list[float], words: str) -> None:
    assert verdict(times, other) == words


@pytest.mark.parametrize(("times", "warned"), [([2.0, 2.5], False), ([2.0, 2.5, 8.0], True)])
def test_seconds_that_lie_too_far_apart_are_called_out(
    times: list[float], warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    warn_if_busy(spread(times))
    assert ("up to 4.0 times" in capsys.readouterr().out) is warned


def test_amplified_differences_are_clipped() -> None:
    black, grey = torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.01)
    assert amplified(grey, black, gain=20).mean().item() == pytest.approx(0.2)
    assert amplified(black, grey, gain=200).max().item() == 1.0


def test_every_pixel_of_a_sheet_is_a_square_of_the_image() -> None:
    images = torch.rand(2, 3, 32, 32)
    sheet = contact_sheet(["one", "two"], [Column("left", "", images), Column("right", "", 1 - images)])
    tile = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8).view(sheet.height, sheet.width, 3)
    right = tile[50 + 104 : 50 + 104 + 96, sheet.width - 8 - 104 : sheet.width - 16][::3, ::3]
    expected = (255 * (1 - images[1])).round().to(torch.uint8).permute(1, 2, 0)
    assert torch.equal(right, expected)


def test_a_long_label_widens_the_margin_and_a_wide_image_is_not_enlarged() -> None:
    images = torch.rand(1, 1, 100, 100)
    short = contact_sheet(["x"], [Column("a", "b", images)])
    long = contact_sheet(["a long prompt " * 20], [Column("a", "b", images)])
    assert short.width < long.width < short.width + 250
    assert short.height == long.height == 50 + 100 + 8


def test_a_table_is_as_wide_as_its_content_and_plain_in_a_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    long = "[red]" + 120 * "x"
    show_table([{"count": 7, "name": long}, {"count": None, "name": ":smile:"}], text=["name"])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == ["", "count  name", f"    7  {long}", "    -  :smile:"]


def test_table_lines_stand_under_their_headings() -> None:
    table = Table([("name", -8), ("count", 3)])
    assert table.heading() == "name      count"
    assert table.line("ab", 7) == "ab            7"
    assert table.line(None, None) == "-             -"


@pytest.mark.parametrize(
    ("number", "text"), [(0.0, "0"), (12.345, "12.3"), (0.6512, "0.651"), (0.0213, "0.021"), (2.14e-5, "2.1e-05")]
)
def test_small_numbers(number: float, text: str) -> None:
    assert small(number) == text
