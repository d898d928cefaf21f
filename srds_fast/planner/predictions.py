"""What was predicted for a plan, what runs tell of it, and how much of a loop must run to tell its time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from .plan import Plan, Prediction

# all turns of a loop cost the same: this share of them, and no fewer than so many, tell what all of them take
SHARE_OF_TURNS, FEWEST_TURNS = 0.25, 5
# where plans are compared with each other, a prediction counts as so much of a run: other work may have slowed one run
TRUST = 0.5


def prediction_of(plan: Plan) -> Prediction:
    """The prediction of a plan that has one."""
    assert plan.prediction is not None
    return plan.prediction


def predicted_seconds(plan: Plan) -> float:
    """Seconds of a call, as predicted; never 0."""
    return max(prediction_of(plan).chosen.seconds, 1e-9)


def width_of(plan: Plan) -> float:
    """Rows of a wave, the mean."""
    chosen = prediction_of(plan).chosen
    return max(1.0, chosen.rows / max(chosen.waves, 1))


def correction(width: float, missed: Mapping[float, Sequence[float]]) -> float:
    """What plans with waves of so many rows take over their predictions: between what runs of others took.

    The costs of wide calls are what may be wrong, so plans whose waves are as wide tell most.
    missed: time over prediction of each run, by the width of its waves.
    """
    at = {each: statistics.median(ratios) for each, ratios in missed.items()}
    below = max((each for each in at if each <= width), default=min(at))
    above = min((each for each in at if each >= width), default=max(at))
    if below >= above:
        return at[above]
    share = math.log(width / below) / math.log(above / below)
    return at[below] + share * (at[above] - at[below])


def usual_seconds(seconds: Sequence[float], work: Sequence[float]) -> float:
    """What runs of a plan take: the lower median for the same work, times the mean work.

    An interruption only makes a run longer. Where every other input takes twice the iterations, half of all calls do.
    """
    return statistics.median_low([each / its for each, its in zip(seconds, work, strict=True)]) * statistics.mean(work)


def turns_to_time(turns: int) -> int:
    """How many turns of a loop are run to time it; the first of them is not counted, as it may warm something up."""
    return min(turns, max(FEWEST_TURNS, math.ceil(SHARE_OF_TURNS * turns)))
