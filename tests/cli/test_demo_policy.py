"""The policy's part of the demo: what it measures, and what it says of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from srds_fast.cli.demo_policy import PAIRS, PolicyDemo, policy_demo


@pytest.fixture(scope="module")
def found() -> PolicyDemo:
    return policy_demo(steps=6)


def test_pairs_are_timed_and_compared(found: PolicyDemo) -> None:
    assert len(found.stock_seconds) == len(found.auto_seconds) == PAIRS
    assert found.ratio in [a / b for a, b in zip(found.stock_seconds, found.auto_seconds, strict=True)]
    assert 0 <= found.max_difference < 0.05
    assert (found.report.num_inference_steps, found.warm_up_seconds >= 0) == (6, True)


def test_it_says_when_it_pays_back_or_that_nothing_is_gained(found: PolicyDemo) -> None:
    ran = replace(found.report, method="collocation", waves=7)
    won = replace(found, report=ran, stock_seconds=[0.4] * 3, auto_seconds=[0.1] * 3, ratio=4.0, warm_up_seconds=0.7)
    assert str(replace(won, pays_back_after=3)).endswith(
        "4.0 times faster; choosing the plan took 0.70 s more and pays back after 3 calls"
    )
    lost = replace(found, report=ran, ratio=0.8, pays_back_after=None)
    same = replace(found, report=replace(ran, method="stock"))
    assert (won.wins, lost.wins) == (True, False)
    assert str(lost).endswith("nothing gained here: auto takes 1.25 times as long as the own loop")
    assert str(same).endswith("auto runs the own loop, as it found nothing faster")
    assert "(collocation, 7 waves)" in str(won)
