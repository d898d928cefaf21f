"""A scripted expert for the push task: it goes round the disc, left or right, and pushes from behind.

Which side it takes, how wide it goes round and how fast are drawn for each demonstration. So one observation has
several good continuations and their average is none: it would run into the disc.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from .push_task import CONTACT, Point, PushTask, from_there

ALIGNED, NEAR = 0.3, 0.2
"""Up to this angle and this distance behind the disc the expert pushes, and corrects the angle while it does."""
EITHER_SIDE = 1.0
"""Up to this angle it takes the short way round, whatever its side."""
ARRIVED = 0.01
"""So near to the goal it rests."""
LONGEST = 120
"""Steps of a demonstration, at most."""


@dataclass(frozen=True)
class Expert:
    """One way to do it.

    Attributes:
        side: 1 goes round the disc anticlockwise, -1 clockwise.
        speed: way of a step.
        clearance: between pusher and disc on the way round.
    """

    side: int
    speed: float
    clearance: float

    @classmethod
    def drawn(cls, chance: random.Random) -> Expert:
        """Any of them."""
        return cls(chance.choice((-1, 1)), chance.uniform(0.045, 0.065), chance.uniform(0.05, 0.12))

    def action(self, task: PushTask) -> Point:
        """The way that the pusher is to go now, x and y."""
        if task.distance < ARRIVED:
            return 0.0, 0.0
        to_goal = math.atan2(task.goal[1] - task.disc[1], task.goal[0] - task.disc[0])
        here = math.atan2(task.pusher[1] - task.disc[1], task.pusher[0] - task.disc[0])
        away = math.dist(task.pusher, task.disc)
        # the angle at the disc, from the place behind it to the pusher, -pi to pi
        off = math.remainder(here - to_goal - math.pi, 2 * math.pi)
        if abs(off) < ALIGNED and away < CONTACT + NEAR:
            # towards the place behind the disc, and beyond it by what is left of a step
            ahead = min(self.speed, task.distance, max(0.0, self.speed - abs(off) * CONTACT))
            return self._towards(task.pusher, from_there(task.disc, to_goal, ahead - CONTACT))
        radius = CONTACT + self.clearance
        side = self.side if abs(off) > EITHER_SIDE else -int(math.copysign(1, off))
        turned = here + side * min(self.speed / radius, abs(off))
        return self._towards(task.pusher, from_there(task.disc, turned, max(radius, away - self.speed / 2)))

    def _towards(self, start: Point, target: Point) -> Point:
        """Of the way to the target, as much as a step may be long."""
        way = math.dist(start, target)
        share = min(1.0, self.speed / way) if way else 0.0
        return share * (target[0] - start[0]), share * (target[1] - start[1])


Demonstration = tuple[list[tuple[float, ...]], list[Point]]


def demonstration(seed: int, stumble: float = 0.015, rest: int = 4) -> Demonstration:
    """An episode of an expert that is drawn by the seed.

    Args:
        stumble: deviation of the noise that is added to what is done, but not to what is recorded. So states beside
            the expert's own way are seen too, with what it does there.
        rest: steps after the disc has arrived.

    Returns:
        The state before each step, as the task shows it, and where the step was to bring the pusher, x and y.
    """
    task, chance = PushTask(seed), random.Random(f"expert {seed}")
    expert = Expert.drawn(chance)
    states: list[tuple[float, ...]] = []
    targets: list[Point] = []
    while len(states) < LONGEST and rest:
        states.append(task.observation()[-1])
        dx, dy = expert.action(task)
        x, y = task.pusher[0] + dx, task.pusher[1] + dy
        targets.append((x, y))
        rest -= task.distance < 3 * ARRIVED
        task.move((x + chance.gauss(0, stumble), y + chance.gauss(0, stumble)))
    return states, targets
