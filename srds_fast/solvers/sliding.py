"""What the methods with a sliding window share: ParaDiGMS, ParaTAA and ParaSolver.

After every wave the host waits for what it has measured, in one transfer. What only the report needs is measured of
many waves at a time. From there on all is numbers on the host.

A state that the window has passed keeps an error. If the state where step j departs still moved by d_j, the step was
taken from the state before. The update assumed that the step answers with k_j d_j (1 for ParaDiGMS). It would have
answered with c_j d_j, so the state behind it is off by (c_j - k_j) d_j. From there the error grows by c of every
further step. `shared_bounds` takes c_j of Gaussian data, before a run; `CarriedError` what the rows of waves show.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..schedulers.table import NoiseTable
from .convergence import LOOSEST
from .fixed_point.grid import responses, usual_std

Array = NDArray[Any]

# Networks answer a movement with several times what Gaussian data do: bounds are such that for these the error would be
# so many times less than the tolerance.
CAUTION = 20.0
# The error may be so many times what the rows have shown.
CAUTION_OF_SEEN = 4.0
# no state has less than this share of the largest effect, so that bounds stay finite
LEAST_EFFECT = 1e-3
# bytes of states that are kept before the waves that they are of are looked at
MOST_KEPT = 2**20
# of a state's root mean square: a smaller movement may be rounding, and tells nothing of a step
SMALLEST_MOVEMENT = 1e-5


def expected_responses(noise: NoiseTable, bounds: tuple[int, ...], data_std: float | None = None) -> Tensor:
    """c for Gaussian data, from each of these grid positions to the next; [len(bounds) - 1] float64.

    data_std: None: the usual one; infinite: x0 follows the state wholly.
    """
    _, c = responses(noise, usual_std(noise) if data_std is None else data_std)
    if len(bounds) > len(c):  # single steps
        return c
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


class _Asked(NamedTuple):
    """A wave: its first step, where its rows departed and arrived, [rows, samples, ...] each.

    passed: the arguments of `CarriedError.slide`; None: the window has not moved on.
    """

    first: int
    departed: Tensor
    arrived: Tensor
    passed: tuple[Array, Array | None] | None = None


class CarriedError:
    """The error of the state where a window begins, estimated as the window slides.

    A row that two waves have asked tells how its step answers: |change of what it arrives at| / |change of what it
    departs from|. The error need not go the way of the newest movement, so the largest answer of all waves counts:
    where a scheduler clips x0, the elements that moved last may be those that the clamp holds. There all waves may have
    shown such elements alone, so an error is not taken to grow less than for Gaussian data. Rows asked once are taken
    to answer as the nearest that was asked twice, and no less than for Gaussian data; if there is none at all, as if x0
    followed the state.

    Args:
        noise, bounds: steps go from each of these grid positions to the next.
        assumed: [steps] float64, k.
        x: [samples, ...], for dtype and device.
    """

    def __init__(self, noise: NoiseTable, bounds: tuple[int, ...], assumed: Tensor, x: Tensor) -> None:
        self._device, self._samples = x.device, len(x)

        def column(values: Tensor) -> Array:
            return values.to(x.dtype).numpy()[:, None]

        self._least = column(expected_responses(noise, bounds))
        self._least_shown = self._least if noise.clip is not None else np.zeros_like(self._least)
        self._follows = column(expected_responses(noise, bounds, math.inf))
        self._assumed = column(assumed)
        # None: all are 1
        self._factors = assumed.to(x).view(-1, *[1] * x.ndim) if bool((assumed != 1).any()) else None
        zeros = np.zeros((2, len(assumed), len(x)), self._least.dtype)
        self._error = zeros[0, 0].copy()
        # waves to be looked at, behind the one that was last; how many rows of them may be kept
        self._waves = [_Asked(0, x.new_empty(0, *x.shape), x.new_empty(0, *x.shape))]
        self._kept, self._most = 0, MOST_KEPT // (2 * x.element_size() * x.numel())
        # the largest that any wave has shown of a step, [steps, samples] each; 0: none has
        self._shown_growth, self._shown_missed = zeros
        self._nearest: Array | None = None  # c of the last row that was asked twice, [samples]
        # what was passed before any row was asked twice: first step, and the arguments of `slide`
        self._waiting: list[tuple[int, Array, Array | None]] = []

    def see(self, first: int, departed: Tensor, arrived: Tensor) -> None:
        """Take a wave, of steps `first` and on: where rows departed and arrived, [rows, samples, ...] each.

        The second is kept and must not be written to later.
        """
        self._waves.append(_Asked(first, departed.clone(), arrived))
        self._kept += len(departed)

    def slide(self, moved: Array, residual: Array | None = None) -> None:
        """The window passes the first steps of the newest wave.

        Args:
            moved: [steps, samples], by how much the state where each departs has moved since it was asked.
            residual: [steps, samples], of states that were left as they are; None: they have moved.
        """
        self._waves[-1] = self._waves[-1]._replace(passed=(moved, residual))
        if self._kept > self._most:
            self._look()

    @np.errstate(all="ignore")
    def _look(self) -> None:
        """Look at the waves that were kept, at all in a few operations."""
        offsets = accumulate((len(wave.departed) for wave in self._waves), initial=0)
        newer, older, steps, counts = list[int](), list[int](), list[int](), list[int]()
        for (one, at), (following, then) in pairwise(zip(self._waves, offsets, strict=False)):
            start = following.first - one.first
            both = max(0, min(len(one.departed) - start, len(following.departed)))  # rows that the wave before had, too
            newer += range(then, then + both)
            older += range(at + start, at + start + both)
            steps += range(following.first, following.first + both)
            counts.append(both)
        shown: Sequence[Array] = ()
        if newer:
            departed, arrived = (torch.cat(each) for each in list(zip(*self._waves, strict=True))[1:3])
            new, old, index = (torch.tensor(each, device=self._device) for each in (newer, older, steps))
            here = departed[new]
            moved, answer = here - departed[old], arrived[new] - arrived[old]
            shown = rms(
                [moved, here, answer, answer - (moved if self._factors is None else self._factors[index] * moved)]
            )
        stop = 0
        for wave, both in zip(self._waves[1:], counts, strict=True):
            begin, stop = stop, stop + both
            self._answered(wave, [each[begin:stop] for each in shown] if both else ())
        self._waves, self._kept = self._waves[-1:], 0

    def _answered(self, wave: _Asked, shown: Sequence[Array]) -> None:
        """shown: of rows asked twice, how far they moved and where they departed, their answer, and that beyond k."""
        rows = slice(wave.first, wave.first + len(wave.departed))
        growth = self._like(self._nearest, rows)
        missed = np.abs(growth - self._assumed[rows])
        if shown:
            size, departed, *answers = shown
            both = len(size)
            enough = size > SMALLEST_MOVEMENT * departed
            largest = [each[rows.start : rows.start + both] for each in (self._shown_growth, self._shown_missed)]
            for most, answered in zip(largest, answers, strict=True):
                np.copyto(most, np.maximum(most, answered / size), where=enough)
            known = largest[0] + largest[1] > 0
            np.copyto(growth[:both], np.maximum(largest[0], self._least_shown[rows][:both]), where=known)
            np.copyto(missed[:both], largest[1], where=known)
            self._catch_up(growth[0])
            self._nearest = growth[both - 1]
        if wave.passed is not None and self._nearest is None:
            self._waiting.append((wave.first, *wave.passed))
        elif wave.passed is not None:
            self._pass(growth, missed, *wave.passed)

    @property
    def bound(self) -> Tensor:
        """[samples], to compare with a tolerance."""
        self._look()
        self._catch_up(None)
        return torch.from_numpy(CAUTION_OF_SEEN * self._error).to(self._device)

    def _like(self, nearest: Array | None, rows: slice) -> Array:
        """c of rows that were asked once, [rows, samples]."""
        if nearest is None:
            return self._follows[rows].repeat(self._samples, 1)
        return np.maximum(self._least[rows], nearest)

    def _catch_up(self, nearest: Array | None) -> None:
        for first, moved, residual in self._waiting:
            rows = slice(first, first + len(moved))
            growth = self._like(nearest, rows)
            self._pass(growth, np.abs(growth - self._assumed[rows]), moved, residual)
        self._waiting.clear()

    def _pass(self, growth: Array, missed: Array, moved: Array, residual: Array | None) -> None:
        left = missed[: len(moved)] * moved if residual is None else residual
        for each, more in zip(growth, left, strict=False):
            self._error = each * self._error + more


def rms(values: Sequence[Tensor]) -> list[Array]:
    """Root mean squares over the elements, on the host; [states, samples, ...] -> [states, samples] each."""
    found = torch.cat(tuple(values)).flatten(2).square_().mean(2).sqrt_().detach().cpu().numpy()
    stops = accumulate(map(len, values), initial=0)
    return [found[start:stop] for start, stop in pairwise(stops)]


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


def num_within(error: Array, bounds: Sequence[float]) -> int:
    """How many states, from the first on, are within their bound in all samples. error: [states, samples]."""
    # NaN is within no bound
    largest = error.max(1).tolist()
    beyond = (index for index, most in enumerate(bounds) if not largest[index] <= most)
    return next(beyond, len(bounds))
