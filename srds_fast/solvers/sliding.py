"""What the methods with a sliding window share: ParaDiGMS, ParaTAA and ParaSolver.

A state that the window has passed keeps an error. If the state where step j departs still moved by d_j, the step was
taken from the state before. The update assumed that the step answers with k_j d_j (1 for ParaDiGMS). It would have
answered with c_j d_j, so the state behind it is off by (c_j - k_j) d_j. From there the error grows by c of every
further step. `shared_bounds` takes c_j of Gaussian data, before a run; `CarriedError` what the rows of waves show.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from ..schedulers.table import NoiseTable
from .fixed_point.grid import responses, usual_std

# Networks answer a movement with several times what Gaussian data do: bounds are such that for these the error would be
# so many times less than the tolerance.
CAUTION = 20.0
# No tolerance gives looser bounds than this one. Where a trained policy turns late, an error of an early state grows a
# thousand times, in a direction in which nothing has moved, so no row shows it.
LOOSEST = 1e-2
# The error may be so many times what the rows have shown.
CAUTION_OF_SEEN = 4.0
# no state has less than this share of the largest effect, so that bounds stay finite
LEAST_EFFECT = 1e-3
# of a state's root mean square: a smaller movement may be rounding, and tells nothing of a step
SMALLEST_MOVEMENT = 1e-5


def expected_responses(noise: NoiseTable, bounds: tuple[int, ...], data_std: float | None = None) -> Tensor:
    """c for Gaussian data, from each of these grid positions to the next; [len(bounds) - 1] float64.

    data_std: None: the usual one; infinite: x0 follows the state wholly.
    """
    _, c = responses(noise, usual_std(noise) if data_std is None else data_std)
    return torch.stack([c[start:stop].prod() for start, stop in pairwise(bounds)])


def effect_of_errors(response: Tensor) -> Tensor:
    """By how much an error of the state behind each step moves the sample, [steps] float64. response: c."""
    return torch.cat([response.flip(0).cumprod(0).flip(0)[1:], response.new_ones(1)])


def effect_of_movements(response: Tensor, assumed: Tensor) -> Tensor:
    """The same for a last movement of that state. response, assumed: c and k, [steps] float64."""
    # the state behind a step departs on the next one; a movement of the sample itself leaves no error
    left = effect_of_errors(response) * (response - assumed)
    return torch.cat([left[1:].abs(), left.new_zeros(1)])


def shared_bounds(effect: Tensor, tolerance: float) -> Tensor:
    """Bounds of what is left of the steps when a window passes them, [steps] float64, of root mean squares.

    They go with 1 / sqrt(effect). With 1 / effect, an equal share for each step, early errors would be larger, which
    networks may amplify; with bounds as of the posterior's standard deviation, runs took one wave more for as small
    errors. tolerance: of the mean absolute error of the sample.
    """
    tolerance = min(tolerance, LOOSEST)
    root = effect.clamp(min=max(LEAST_EFFECT * float(effect.max()), torch.finfo(effect.dtype).tiny)).sqrt()
    return tolerance / (CAUTION * root.sum() * root)


class CarriedError:
    """The error of the state where a window begins, estimated as the window slides.

    A row that two waves have asked tells how its step answers: |change of what it arrives at| / |change of what it
    departs from|. The error need not go the way of the newest movement, so the largest answer of all waves counts:
    where a scheduler clips x0, the elements that moved last may be those that the clamp holds. Rows asked once are
    taken to answer as the nearest that was asked twice, and no less than for Gaussian data; if there is none at all,
    as if x0 followed the state.

    Args:
        noise, bounds: steps go from each of these grid positions to the next.
        assumed: [steps] float64, k.
        x: [samples, ...], for dtype and device.
    """

    def __init__(self, noise: NoiseTable, bounds: tuple[int, ...], assumed: Tensor, x: Tensor) -> None:
        self._error = x.new_zeros(len(x))
        self._least = expected_responses(noise, bounds).to(x)[:, None]
        self._most = expected_responses(noise, bounds, math.inf).to(x)[:, None]
        self._assumed = assumed.to(x)[:, None]
        self._first, self._departed, self._arrived = 0, x[:0, None], x[:0, None]
        self._growth = self._missed = x.new_zeros(0, len(x))  # of the rows of the newest wave: c, and |c - k|
        # the largest that any wave has shown of a step, [steps, samples] each; 0: none has
        self._shown_growth, self._shown_missed = x.new_zeros(2, len(assumed), len(x))
        self._nearest: Tensor | None = None  # c of the last row that was asked twice, [samples]
        # what was passed before any row was asked twice: first step, and the arguments of `slide`
        self._waiting: list[tuple[int, Tensor, Tensor | None]] = []

    def see(self, first: int, departed: Tensor, arrived: Tensor) -> None:
        """Take a wave. departed, arrived: [rows, samples, ...], of steps `first` and on."""
        rows = slice(first, first + len(departed))
        assumed = self._assumed[rows]
        both = min(self._first + len(self._departed), rows.stop) - first  # rows that the wave before had, too
        growth = self._like(self._nearest, rows)
        missed = (growth - assumed).abs()
        if both > 0:
            before = slice(first - self._first, first - self._first + both)
            moved = departed[:both] - self._departed[before]
            answer = arrived[:both] - self._arrived[before]
            beyond = answer - assumed[:both].view(-1, *[1] * (moved.dim() - 1)) * moved
            size, least = rms(moved), SMALLEST_MOVEMENT * rms(departed[:both])
            shown_growth, shown_missed = (
                each[first : first + both] for each in (self._shown_growth, self._shown_missed)
            )
            for shown, answered in (shown_growth, answer), (shown_missed, beyond):
                shown.copy_(torch.where(size > least, torch.maximum(shown, rms(answered) / size), shown))
            known = shown_growth + shown_missed > 0
            growth[:both] = torch.where(known, shown_growth, growth[:both])
            missed[:both] = torch.where(known, shown_missed, missed[:both])
            self._catch_up(growth[0])
            self._nearest = growth[both - 1]
        self._growth, self._missed = growth, missed
        self._first, self._departed, self._arrived = first, departed.clone(), arrived.clone()

    def slide(self, moved: Tensor, residual: Tensor | None = None) -> None:
        """The window passes the first steps of the newest wave.

        Args:
            moved: [steps, samples], by how much the state where each departs has moved since it was asked.
            residual: [steps, samples], of states that were left as they are; None: they have moved.
        """
        if self._nearest is None:
            self._waiting.append((self._first, moved, residual))
        else:
            self._pass(self._growth, self._missed, moved, residual)

    @property
    def bound(self) -> Tensor:
        """[samples], to compare with a tolerance."""
        self._catch_up(None)
        return CAUTION_OF_SEEN * self._error

    def _like(self, nearest: Tensor | None, rows: slice) -> Tensor:
        """c of rows that were asked once, [rows, samples]."""
        growth = self._most[rows] if nearest is None else torch.maximum(self._least[rows], nearest)
        return growth.expand(-1, len(self._error)).clone()

    def _catch_up(self, nearest: Tensor | None) -> None:
        for first, moved, residual in self._waiting:
            rows = slice(first, first + len(moved))
            growth = self._like(nearest, rows)
            self._pass(growth, (growth - self._assumed[rows]).abs(), moved, residual)
        self._waiting.clear()

    def _pass(self, growth: Tensor, missed: Tensor, moved: Tensor, residual: Tensor | None) -> None:
        left = missed[: len(moved)] * moved if residual is None else residual
        for each, more in zip(growth, left, strict=False):
            self._error = each * self._error + more


def rms(values: Tensor) -> Tensor:
    """Root mean squares over the elements; [states, samples, ...] -> [states, samples]."""
    return values.flatten(2).square().mean(2).sqrt()


def posterior_std(noise: NoiseTable, bounds: tuple[int, ...]) -> Tensor:
    """[len(bounds) - 1] float64: standard deviation of DDPM's posterior from each of these grid positions to the next.

    Its variance is (sigma' / sigma)^2 (sigma^2 - (alpha / alpha')^2 sigma'^2), which for alpha^2 + sigma^2 = 1 is
    (1 - abar') / (1 - abar) (1 - abar / abar').
    """
    starts, stops = list(bounds[:-1]), [bound - 1 for bound in bounds[1:]]
    alpha, sigma, alpha_next = noise.alpha[starts], noise.sigma[starts], noise.alpha_next[stops]
    arrives = noise.sigma_next**2 if noise.spread is None else noise.sigma_next**2 + noise.spread**2
    variance = arrives[stops] / sigma**2 * (sigma**2 - (alpha / alpha_next) ** 2 * arrives[stops])
    return variance.clamp(min=0).sqrt()


def num_within(error: Tensor, bound: Tensor) -> int:
    """How many states, from the first on, are within their bound [states] in all samples. Waits for the device."""
    largest, bounds = error.amax(1).tolist(), bound.tolist()
    # NaN is within no bound
    beyond = (index for index, most in enumerate(bounds) if not largest[index] <= most)
    return next(beyond, len(bounds))
