"""What the command line measures and prints: differences, counts, seconds, tables."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

import srds_fast
from srds_fast.cli.compare import compare
from srds_fast.cli.convergence import TIMES_TOLD, Convergence, converge
from srds_fast.cli.demo_image import ImagePart
from srds_fast.cli.labels import spread
from srds_fast.cli.measure import Calls, Request, grey_levels, verdict
from srds_fast.cli.output import seconds_of, show_table, small, warn_if_busy
from srds_fast.telemetry.report import Report

REQUEST = Request(prompts=("a", "b"), steps=16, guidance=3.0, seed=5)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.stable_diffusion()


@pytest.fixture(scope="module")
def converged(pipe: Any) -> Convergence:
    told: list[str] = []
    found = converge(pipe, REQUEST, 6, {"method": "srds", "num_blocks": 4}, told.append)
    assert len(told) == TIMES_TOLD
    return found


def test_grey_levels_are_of_each_sample_and_then_over_the_samples() -> None:
    """And see what rounding to 8 bits would hide."""
    reference = torch.full((21, 3, 4, 4), 100 / 255)
    away = torch.arange(21.0)[:, None, None, None] / 10 * torch.tensor([1.0, -1.0, 1.0])[:, None, None]
    found = grey_levels(reference + away / 255, reference)
    assert found == pytest.approx({"mean": 1.0, "p95": 1.9, "max": 2.0}, abs=1e-4)


def test_a_request_names_only_what_was_asked_for() -> None:
    assert set(Request(("a",), 4, None).arguments()) == {"prompt", "num_inference_steps", "generator"}
    whole = Request(("a", "b"), 4, 2.0, 7, images_per_prompt=3, negative_prompt="").arguments()
    assert (whole["guidance_scale"], whole["num_images_per_prompt"], whole["negative_prompt"]) == (2.0, 3, ["", ""])
    # a sample starts from the same noise in any batch
    assert [generator.initial_seed() for generator in whole["generator"]] == [7, 8, 9, 10, 11, 12]


def test_stages_end_in_the_images_of_the_stock_pipeline(converged: Convergence) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    call = {"num_inference_steps": 16, "guidance_scale": 3.0, "generator": generators, "output_type": "pt"}
    images = tiny.stable_diffusion()(["a", "b"], **call).images
    torch.testing.assert_close(converged.stock.images, images, rtol=0, atol=1e-6)
    assert [stage.look.iteration for stage in converged.stages] == [0, 1, 2, 3, 4]  # four blocks: no fifth iteration
    assert [stage.spent.waves for stage in converged.stages] == [4, 7, 10, 13, 16]
    assert converged.difference(converged.stages[0].look.images)["mean"] > 1e-2
    assert converged.difference(converged.stages[-1].look.images)["max"] < 1e-3
    assert converged.difference(converged.sequential.images)["max"] < 1e-3


def test_a_stage_shows_what_a_call_of_so_many_iterations_returns(pipe: Any, converged: Convergence) -> None:
    for stage in converged.stages[:3]:
        options = {"num_blocks": 4, "tolerance": 0.0, "max_iterations": stage.look.iteration}
        capped = srds_fast.compile(pipe, method="srds", **options)
        torch.testing.assert_close(stage.look.images, Calls(capped).add(REQUEST).images, rtol=0, atol=1e-5)
    for sample, iteration in enumerate(converged.final.report.iterations_per_sample):
        shown = converged.stages[iteration].look.images[sample]
        torch.testing.assert_close(converged.final.images[sample], shown, rtol=0, atol=1e-5)


def test_the_sequential_method_is_measured_if_not_asked_for(pipe: Any) -> None:
    told: list[str] = []
    (entry,) = compare(pipe, Request(("a",), 4, 3.0), {"paper": {"method": "srds"}}, 2, told.append)
    assert (entry["method"], entry["ran"], entry["ratio"] > 0) == ("paper", "srds", True)
    # in turn: what disturbs the machine for a while disturbs them all
    in_turn = ["4 steps, sequential", "4 steps, paper"]
    assert told == ["4 steps, the pipeline itself", *in_turn, *in_turn]


def part(seconds: float, method: str = "srds") -> ImagePart:
    return ImagePart(seconds, 2.0, 2.0 / seconds, 0.01, 3.0, Report(method, "eager", "takeover", 50))


def test_the_warm_up_pays_back_when_it_is_saved() -> None:
    assert part(1.5).pays_back == 6
    assert "pays back after 6 calls" in str(part(1.5))
    assert "1.33 times faster" in str(part(1.5))
    # equal to the pipeline's own loop, or that loop itself: nothing is saved, whatever the clock says
    for found in (part(2.0), part(2.5), part(1.9, "stock")):
        assert found.pays_back is None
        assert str(found).startswith("Image: nothing is faster here than the pipeline's own call (2.00 s).")


@given(st.lists(st.floats(0, 1), max_size=12), st.floats(0.001, 0.2))
def test_labels_are_spread_in_order_and_no_farther_than_needed(wanted: list[float], gap: float) -> None:
    found = spread(wanted, gap, 0.0, 1.0)
    order = sorted(range(len(wanted)), key=lambda number: wanted[number])
    room = min(gap, 1.0 / max(1, len(wanted) - 1))
    for before, after in itertools.pairwise(order):
        assert found[after] - found[before] >= room - 1e-9
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in found)
    apart = [b - a for a, b in itertools.pairwise(sorted(wanted))]
    if all(distance >= gap for distance in apart):
        assert found == pytest.approx(wanted, abs=1e-6)


def test_no_verdict_where_times_overlap() -> None:
    assert verdict([1.0, 1.5], [2.0, 4.0]) == "2.00 times faster than"
    assert verdict([3.0, 5.0], [1.0, 2.0]) == "3.00 times slower than"
    assert verdict([1.0, 3.0], [2.0, 4.0]) == "neither clearly faster nor slower than"


def test_seconds_that_lie_too_far_apart_are_called_out(capsys: pytest.CaptureFixture[str]) -> None:
    warn_if_busy([[2.0, 2.5]])
    assert capsys.readouterr().out == ""
    warn_if_busy([[2.0, 2.5], [2.0, 2.5, 8.0]])
    assert "up to 4.0 times" in capsys.readouterr().out


def test_a_table_is_as_wide_as_its_content_and_plain_in_a_file(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    long = "[red]" + 120 * "x"
    show_table([{"count": 7, "name": long}, {"count": None, "name": ":smile:"}], text=["name"])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == ["", "count  name", f"    7  {long}", "    -  :smile:"]


def test_seconds_in_few_characters() -> None:
    assert [seconds_of(each) for each in (12.4, 9.94, 0.123, 0.0213)] == ["12 s", "9.94 s", "0.12 s", "21 ms"]


def test_small_numbers() -> None:
    shown = " ".join(small(each) for each in (0.0, 12.345, 0.6512, 0.0213, 2.14e-5))
    assert shown == "0 12.3 0.651 0.021 2.1e-05"
