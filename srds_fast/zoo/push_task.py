"""The push task: a round pusher moves a disc to a goal, on a plane seen from above. Plain Python, deterministic.

The motion is quasi-static: everything is so slow that nothing slides on by itself. There is no friction between pusher
and disc, so the disc moves along the line between the two centres, and only while it is pressed. Let the pusher go
straight, let R be the distance of the centres in contact, and theta the angle between the way of the pusher and the
line to the disc. After a way s

    d theta / d s = sin(theta) / R,   so   tan(theta(s) / 2) = tan(theta(0) / 2) exp(s / R),

until theta is a right angle, where the pusher leaves the disc behind. `push` is this solution, not an integration: a
way in two halves ends where the whole way ends. The equation also says what makes the task hard: pushing is unstable,
a small angle grows e-fold on every R.

Lengths have no unit; the plane that the pusher may be moved over is [-1, 1] x [-1, 1].
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence

Point = tuple[float, float]

PUSHER, DISC = 0.1, 0.28
"""Radii."""
CONTACT = PUSHER + DISC
"""R, the distance of the centres in contact."""
REACH = 0.08
"""The pusher moves so far in a step, at most."""
SUCCESS = 0.05
"""The disc has arrived if its centre is within this distance of the goal."""
LIMIT = 96
"""Steps of an episode, at most."""
HISTORY = 2
"""Steps that an observation shows: the last one and the one before."""


def push(pusher: Point, disc: Point, target: Point) -> Point:
    """Where the disc is after the pusher has gone straight from `pusher` to `target`.

    The two must not overlap before: their centres are `CONTACT` apart or more.
    """
    way = math.dist(pusher, target)
    if way == 0:
        return disc
    ux, uy = (target[0] - pusher[0]) / way, (target[1] - pusher[1]) / way
    rx, ry = disc[0] - pusher[0], disc[1] - pusher[1]
    along, across = rx * ux + ry * uy, ux * ry - uy * rx
    if along <= 0 or abs(across) >= CONTACT:
        return disc
    depth = math.sqrt(CONTACT**2 - across**2)
    free = max(0.0, along - depth)  # the way to the contact
    if free >= way:
        return disc
    half = across / (CONTACT + depth)  # tan(theta / 2)
    leaves = math.inf if half == 0 else -CONTACT * math.log(abs(half))
    pressed = min(way - free, leaves)
    half *= math.exp(pressed / CONTACT)
    cos, sin = (1 - half**2) / (1 + half**2), 2 * half / (1 + half**2)
    along, across = free + pressed + CONTACT * cos, CONTACT * sin
    return pusher[0] + along * ux - across * uy, pusher[1] + along * uy + across * ux


class PushTask:
    """One episode. The goal is to the right of the disc, and so is the pusher: it must go round the disc to get behind
    it, and either side is as good.

    Args:
        seed: decides the start and the goal.

    Attributes:
        pusher, disc, goal: their centres.
        steps: taken until now.
    """

    def __init__(self, seed: int) -> None:
        chance = random.Random(seed)
        angle, distance = chance.uniform(-0.8, 0.8), chance.uniform(0.5, 0.8)
        middle = chance.uniform(-0.1, 0.1), chance.uniform(-0.2, 0.2)
        self.goal = from_there(middle, angle, distance / 2)
        self.disc = from_there(middle, angle, -distance / 2)
        self.pusher = from_there(self.disc, angle + chance.uniform(-0.9, 0.9), chance.uniform(0.42, 0.65))
        self.steps = 0
        self._before = self._seen()

    @property
    def distance(self) -> float:
        """From the disc to the goal."""
        return math.dist(self.disc, self.goal)

    @property
    def succeeded(self) -> bool:
        """Whether the disc is within `SUCCESS` of the goal."""
        return self.distance <= SUCCESS

    @property
    def done(self) -> bool:
        """The episode is over: the disc has arrived, or `LIMIT` steps were taken."""
        return self.succeeded or self.steps >= LIMIT

    def observation(self) -> tuple[tuple[float, ...], ...]:
        """The step before and the last one, 2 x 6 numbers.

        They are x and y of the pusher, of the way from it to the disc, and of the way from the disc to the goal.
        """
        return self._before, self._seen()

    def run(self, actions: Iterable[Sequence[float]]) -> None:
        """Take a step for each action, until the episode is over.

        Args:
            actions: x and y of the ways from where the pusher is now, before the first of them, to where each step is
                to bring it. A step goes only as far as `REACH` and the edge of the plane allow.
        """
        a, b = self.pusher
        for x, y in actions:
            if self.done:
                return
            self.move((a + float(x), b + float(y)))

    def move(self, target: Point) -> None:
        """Take a step towards this point, whether or not the episode is over."""
        x, y = (min(1.0, max(-1.0, each)) for each in target)
        way = math.dist(self.pusher, (x, y))
        share = 1.0 if way <= REACH else REACH / way
        reached = self.pusher[0] + share * (x - self.pusher[0]), self.pusher[1] + share * (y - self.pusher[1])
        self._before = self._seen()
        self.disc = push(self.pusher, self.disc, reached)
        self.pusher = reached
        self.steps += 1

    def _seen(self) -> tuple[float, ...]:
        (a, b), (x, y), (u, v) = self.pusher, self.disc, self.goal
        return a, b, x - a, y - b, u - x, v - y


def from_there(point: Point, angle: float, distance: float) -> Point:
    """The point at this distance, in the direction of this angle."""
    return point[0] + distance * math.cos(angle), point[1] + distance * math.sin(angle)
