"""The same seed gives the same bits after a warm-up; before, the report says when the plan has changed."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from calls import latents

import srds_fast
from srds_fast.engine import costs
from srds_fast.pipelines import state
from srds_fast.planner.exploration import STOCK, Exploration

CALL: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 10}


@pytest.fixture(scope="module")
def sd() -> Any:
    return tiny.stable_diffusion()


def exploration_of(fast: Any) -> Exploration:
    found: Exploration = fast._srds.last.exploration
    return found


def slow_calls(exploration: Exploration) -> None:
    """As if later calls of the plan took very long: without a warm-up it is doubted, and then dropped."""
    for _ in range(6):
        plan = exploration.plan
        explores = exploration.begin()
        exploration.end(plan, 1e3 if not plan.is_sequential else 1e-3, explored=explores)


def take(exploration: Exploration, method: str) -> None:
    """Let the next call take the plan of a method."""
    exploration._choice = next(
        key for key, plan in exploration._ways.items() if plan is not None and plan.method == method
    )


@pytest.mark.parametrize("choice", ["collocation", "sequential", STOCK])
def test_calls_after_a_warm_up_give_the_same_bits_whatever_they_take(sd: Any, choice: str) -> None:
    fast = srds_fast.compile(sd)
    fast.warmup(**CALL)
    exploration = exploration_of(fast)
    assert exploration.held
    if choice == STOCK:
        exploration._choice = STOCK
    else:
        exploration._choice = next(
            (key for key, plan in exploration._ways.items() if plan is not None and plan.method == choice),
            exploration._sequential,
        )
    first = latents(fast, **CALL)
    method = fast.report.method
    slow_calls(exploration)
    for _ in range(3):
        assert torch.equal(latents(fast, **CALL), first)
        assert fast.report.method == method
        assert fast.report.plan_state == "frozen"
        assert fast.report.plan_changed is None


def test_a_warm_up_freezes_its_own_kind_alone_and_only_if_asked(sd: Any) -> None:
    fast = srds_fast.compile(sd)
    latents(fast, **CALL)
    exploring = exploration_of(fast)
    fast.warmup(**{**CALL, "num_inference_steps": 12})
    assert exploration_of(fast).held
    assert not exploring.held
    assert exploring.state == "exploring", "of another number of steps one call was made"
    fast.warmup(**{**CALL, "num_inference_steps": 8}, freeze=False)
    assert not exploration_of(fast).held
    with pytest.raises(srds_fast.InvalidArgument, match="freeze is 1"):
        fast.warmup(**CALL, freeze=1)


def test_a_changed_plan_is_told(sd: Any) -> None:
    fast = srds_fast.compile(sd)
    fast.warmup(**CALL, freeze=False)
    exploration = exploration_of(fast)
    exploration.freeze()
    take(exploration, "sequential")
    latents(fast, **CALL)
    latents(fast, **CALL)
    assert fast.report.plan_changed is None
    assert "plan changed" not in str(fast.report)
    exploration._choice = STOCK
    latents(fast, **CALL)
    assert (fast.report.method, fast.report.plan_changed) == ("stock", "sequential")
    assert "plan changed  the call before this one ran sequential" in str(fast.report)
    take(exploration, "sequential")
    latents(fast, **CALL)
    assert fast.report.plan_changed == STOCK


def test_the_plan_of_a_warm_kind_is_kept_when_others_are_given_up(sd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "MOST_KEPT", 2)
    monkeypatch.setattr(state, "MOST_KINDS", 2)
    fast = srds_fast.compile(sd, explore=0.0)
    fast.warmup(**CALL)
    kept = exploration_of(fast)
    others = []
    for batch in (2, 3, 4):
        latents(fast, **CALL, num_images_per_prompt=batch)
        others.append(exploration_of(fast))
    latents(fast, **CALL)
    assert exploration_of(fast) is kept
    latents(fast, **CALL, num_images_per_prompt=2)
    assert exploration_of(fast) is not others[0], "the least recently used is given up"
    assert kept in fast._srds.explorations.values()
    fast.reset()
    latents(fast, **CALL)
    assert exploration_of(fast) is not kept


@pytest.mark.parametrize("choice", ["sequential", STOCK])
def test_a_stream_runs_what_a_call_runs_and_shows_predicted_images(sd: Any, choice: str) -> None:
    fast = srds_fast.compile(sd)
    fast.warmup(**CALL)
    if choice == STOCK:
        exploration_of(fast)._choice = STOCK
    else:
        take(exploration_of(fast), choice)
    *previews, last = fast.stream(**CALL, generator=torch.Generator().manual_seed(0))
    assert fast.report.method == choice
    assert [each.kind for each in previews] == ["x0 preview"] * 4, "of ten steps after each second, but the last"
    assert [each.iteration for each in previews] == [2, 4, 6, 8]
    assert (last.kind, last.final) == ("iteration", True)
    assert torch.equal(last.latents, latents(fast, **CALL))
    assert fast.report.method == choice
    expected = fast(**CALL, generator=torch.Generator().manual_seed(0)).images
    assert last.images == expected
    assert previews[-1].images[0].size == expected[0].size
    assert previews[-1].images != expected
    # the last of them is nearly there, the first is not
    distances = [float((each.latents - last.latents).abs().mean()) for each in previews]
    assert distances[-1] < distances[0]


def test_a_stream_of_the_stock_loop_can_be_left(sd: Any) -> None:
    fast = srds_fast.compile(sd)
    fast.warmup(**CALL)
    exploration_of(fast)._choice = STOCK
    calls = list[int]()
    handle = sd.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with fast.stream(**CALL, generator=torch.Generator().manual_seed(0)) as stream:
            next(stream)
    finally:
        handle.remove()
    assert len(calls) < 10


def test_a_window_that_slides_is_shown_by_what_it_has_left_behind(sd: Any) -> None:
    fast = srds_fast.compile(sd, method="paradigms")
    *previews, last = fast.stream(**CALL, generator=torch.Generator().manual_seed(0))
    assert {each.kind for each in previews} <= {"x0 preview"}
    assert torch.equal(last.latents, latents(fast, **CALL))
