"""The push task: its motion against the equation that it solves, and the expert that does the task."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srds_fast.zoo.push_expert import Expert, demonstration
from srds_fast.zoo.push_task import CONTACT, LIMIT, REACH, SUCCESS, Point, PushTask, from_there, push

angles = st.floats(-math.pi, math.pi)
ways = st.floats(0.01, 1.5)
starts = st.floats(CONTACT, CONTACT + 0.5)


def pressed_bit_by_bit(pusher: Point, disc: Point, target: Point, bits: int) -> Point:
    """The same motion by its definition: after every small bit of the way the disc is moved out of the pusher."""
    for bit in range(1, bits + 1):
        x, y = (a + (b - a) * bit / bits for a, b in zip(pusher, target, strict=True))
        away = math.dist((x, y), disc)
        if away < CONTACT:
            disc = x + (disc[0] - x) * CONTACT / away, y + (disc[1] - y) * CONTACT / away
    return disc


@given(away=starts, at=angles, heading=angles, way=ways)
def test_the_disc_moves_along_the_line_of_centres_while_it_is_pressed(
    away: float, at: float, heading: float, way: float
) -> None:
    disc, target = from_there((0.0, 0.0), at, away), from_there((0.0, 0.0), heading, way)
    found = push((0.0, 0.0), disc, target)
    assert math.dist(found, pressed_bit_by_bit((0.0, 0.0), disc, target, 400)) < 0.02
    assert math.dist(found, target) >= CONTACT - 1e-9, "they do not overlap"


@given(away=starts, at=angles, heading=angles, way=ways, share=st.floats(0, 1), turn=angles)
def test_a_way_in_two_parts_ends_where_the_whole_way_ends_and_directions_do_not_matter(
    away: float, at: float, heading: float, way: float, share: float, turn: float
) -> None:
    start = (0.3, -0.2)
    disc, target = from_there(start, at, away), from_there(start, heading, way)
    whole, middle = push(start, disc, target), from_there(start, heading, share * way)
    assert push(middle, push(start, disc, middle), target) == pytest.approx(whole, abs=1e-6)
    turned = push(start, from_there(start, at + turn, away), from_there(start, heading + turn, way))
    assert math.dist(turned, start) == pytest.approx(math.dist(whole, start), abs=1e-6)


def test_known_answers() -> None:
    assert push((0, 0), (CONTACT + 0.1, 0), (0.5, 0)) == pytest.approx((0.5 + CONTACT, 0)), "head on"
    assert push((0, 0), (0, CONTACT), (0.5, 0)) == (0, CONTACT), "it slides past"
    assert push((0, 0), (CONTACT, 0), (-0.5, 0)) == (CONTACT, 0), "it goes away"
    # tan(theta / 2) = 1/3 at the contact; 1/2 after the way R log(3/2)
    disc = CONTACT * 0.8, CONTACT * 0.6
    way = CONTACT * math.log(1.5)
    assert push((0, 0), disc, (way, 0)) == pytest.approx((way + CONTACT * 0.6, CONTACT * 0.8))


def test_an_episode_is_decided_by_its_seed_and_ends() -> None:
    task, again = PushTask(3), PushTask(3)
    before, now = task.observation()
    assert before == now
    assert (task.observation(), PushTask(4).observation() != task.observation()) == (again.observation(), True)
    start = task.pusher
    task.run([(0.0, 0.02), (0.0, 0.05)])
    assert task.pusher == pytest.approx((start[0], start[1] + 0.05)), "ways from where the chunk began"
    before = task.pusher
    task.move((50.0, before[1]))
    assert math.dist(before, task.pusher) == pytest.approx(REACH), "no farther in a step"
    assert task.observation()[0][:2] == before
    task.run([(50.0, 0.0)] * 200)
    assert (task.steps, task.done, task.succeeded) == (LIMIT, True, False)
    assert task.pusher[0] == 1.0, "not beyond the edge"
    task.disc = from_there(task.goal, 1.0, SUCCESS * 0.99)
    assert (task.done, task.succeeded) == (True, True)


def direction(task: PushTask) -> float:
    """Of the pusher, seen from the disc."""
    return math.atan2(task.pusher[1] - task.disc[1], task.pusher[0] - task.disc[0])


@pytest.mark.parametrize("side", [1, -1], ids=["anticlockwise", "clockwise"])
def test_the_expert_arrives_on_either_side(side: int) -> None:
    expert = Expert(side, speed=0.055, clearance=0.08)
    for seed in range(20):
        task, turned = PushTask(seed), 0.0
        while not task.done:
            before = direction(task)
            task.run([expert.action(task)])
            if task.steps <= 10:
                turned += math.remainder(direction(task) - before, 2 * math.pi)
        assert task.succeeded
        assert turned * side > 0.5


def test_demonstrations_are_decided_by_their_seeds() -> None:
    states, targets = demonstration(5)
    assert (states, targets) == demonstration(5)
    assert states[0] == PushTask(5).observation()[1]
    assert len(states) == len(targets) < LIMIT
    assert math.hypot(*states[-1][4:]) < SUCCESS, "the way from the disc to the goal"
    assert all(abs(each) < 1 for target in targets for each in target)
    above = {targets[12][1] > states[12][1] + states[12][3] for states, targets in map(demonstration, range(8))}
    assert above == {True, False}, "of the disc"
