"""The stop after iteration 1 that calls learn: the share it covers, what it needs, how it is told."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import tiny
import torch

import srds_fast
from srds_fast.planner.first_stop import COVERED, FEWEST, MOST_KEPT, REFRESHED_EVERY, FirstStop
from srds_fast.solvers.convergence import BLOCKS, estimated_error


@pytest.mark.parametrize("samples", [FEWEST, 40, 200])
def test_the_share_of_new_samples_is_covered(samples: int) -> None:
    generator, covered, total = random.Random(samples), 0, 0
    for _ in range(150):
        learnt = FirstStop()
        for _ in range(samples):
            learnt.record([[1.0], [math.exp(generator.gauss(-2, 1))]])
        assert learnt.quantile is not None
        covered += sum(math.exp(generator.gauss(-2, 1)) <= learnt.quantile for _ in range(40))
        total += 40
    assert COVERED - 3 * math.sqrt(0.05 / total) - 0.01 <= covered / total < 0.99


def test_runs_of_one_iteration_teach_nothing_and_too_few_change_nothing() -> None:
    learnt = FirstStop()
    learnt.record([])
    learnt.record([[1.0, 2.0]])
    learnt.record([[0.0, 1.0], [0.0, None]])
    for number in range(FEWEST):
        contraction, rule = learnt.next_call(BLOCKS)
        assert contraction == BLOCKS
        assert f"{number} of {FEWEST}" in rule
        learnt.record([[1.0], [0.1], [0.05]])
    assert learnt.quantile == pytest.approx(0.1)


def test_iteration_1_stops_where_the_quantile_says_so_and_some_calls_go_on() -> None:
    learnt = FirstStop()
    for number in range(2 * MOST_KEPT):
        learnt.record([[1.0], [0.2 if number < MOST_KEPT else 0.1]])
    assert learnt.quantile == pytest.approx(0.1), "old samples are forgotten"
    found = [learnt.next_call(BLOCKS) for _ in range(2 * REFRESHED_EVERY)]
    for number, (contraction, rule) in enumerate(found, start=1):
        if number % REFRESHED_EVERY:
            assert estimated_error([0.04], contraction) == pytest.approx(0.004)
            assert f"holds for 95% of {MOST_KEPT} earlier samples" in rule
        else:
            assert math.isinf(estimated_error([1e-9], contraction))
        # later iterations are judged as before
        assert estimated_error([1.0, 0.1], contraction) == estimated_error([1.0, 0.1], BLOCKS)


def test_another_guidance_learns_anew() -> None:
    learning = srds_fast.compile(tiny.stable_diffusion(), method="srds", tolerance=1e-6, learn_stop=True)
    for number, scale in enumerate((2.0, 2.0, 8.0, 2.0)):
        learning(**{**CALL, "guidance_scale": scale}, generator=torch.Generator().manual_seed(number))
        assert f"{(0, 1, 0, 2)[number]} of {FEWEST}" in learning.report.stop_rule


CALL: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 12, "guidance_scale": 1.0, "output_type": "latent"}


def test_calls_of_a_pipeline_learn_and_stay_within_the_tolerance() -> None:
    pipe = tiny.stable_diffusion()
    first = srds_fast.compile(pipe, method="srds")
    first(**CALL, generator=torch.Generator().manual_seed(0))
    (change,) = first.report.change[0]
    # every first change is beyond it, and the error behind it within
    tolerance = 0.4 * change
    fast = srds_fast.compile(pipe, method="srds", tolerance=tolerance, learn_stop=True)
    iterations = []
    for seed in range(FEWEST + 3):
        generator = torch.Generator().manual_seed(seed)
        found = fast(**CALL, generator=generator).images
        expected = pipe(**CALL, generator=generator.manual_seed(seed)).images
        assert float((found - expected).abs().mean()) <= tolerance
        iterations.append(fast.report.iterations)
        # the twentieth call takes a second iteration
        assert ("95%" in fast.report.stop_rule) == (seed >= FEWEST and seed + 1 != REFRESHED_EVERY)
    assert 1 not in iterations[:FEWEST]
    assert 1 in iterations[FEWEST:]
    fast.reset()
    fast(**CALL)
    assert f"0 of {FEWEST}" in fast.report.stop_rule


def test_the_same_seed_gives_the_same_bits_unless_it_is_asked_for() -> None:
    fast = srds_fast.compile(tiny.stable_diffusion(), method="srds")
    first = fast(**CALL, generator=torch.Generator().manual_seed(0)).images
    for seed in range(1, FEWEST + 2):
        fast(**CALL, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(fast(**CALL, generator=torch.Generator().manual_seed(0)).images, first)
    assert fast.report.stop_rule is None


def test_others_do_not_learn_it() -> None:
    pipe = tiny.stable_diffusion()
    for how in (
        {"method": "collocation"},
        {"method": "srds", "exact": True},
        {"method": "srds", "latency": "constant"},
    ):
        fast = srds_fast.compile(pipe, learn_stop=True, **how)
        fast(**CALL)
        assert fast.report.stop_rule is None
    with pytest.raises(srds_fast.InvalidArgument, match="learn_stop"):
        srds_fast.compile(pipe, learn_stop=1)
