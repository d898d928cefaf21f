"""One step and one jump as four coefficients, so that every kind of row is the same elementwise formula.

    x' = a * x + b * m + c * x0 + d * x0_prev (+ s * z),    x0 = clamp(p * x + q * m)

with x the state, m the network output at x, x0 the predicted clean sample and x0_prev the one at the previous step, or
at the previous boundary for a jump. First-order steps and jumps use a and b, and c if x0 is clipped; DPM-Solver++(2M)
also uses c and d. Steps of schedulers that carry more than one x0 look back at several vectors, see `Vector`.
Coefficients are float64 here; `kernels.wave_update` does the arithmetic.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..caches import cached
from .table import NoiseTable

CoarseSolver = Literal["ddim", "2m"]
COARSE_SOLVERS: tuple[CoarseSolver, ...] = ("ddim", "2m")


class Coefficients(NamedTuple):
    a: float
    b: float
    c: float
    d: float


class Vector(NamedTuple):
    """A vector that a step makes: a * x + b * m + c * x0 + sum_k d[k] * (the k-th vector carried to it) + s * z."""

    a: float
    b: float
    c: float
    d: tuple[float, ...] = ()
    s: float = 0.0

    @property
    def carries_on(self) -> int | None:
        """The number of the carried vector that this one is, unchanged; None: it is another one."""
        kept = [number for number, weight in enumerate(self.d) if weight != 0.0]
        alone = len(kept) == 1 and self._replace(d=()) == Vector(0.0, 0.0, 0.0) and self.d[kept[0]] == 1.0
        return kept[0] if alone else None


ITS_X0 = Vector(0.0, 0.0, 1.0)


def made_by_step(noise: NoiseTable, index: int) -> list[Vector]:
    """The scheduler's own step: the next state, and what is carried beside it. With momentum that is x0."""
    if noise.memory is None:
        a, b, c, d = fine_step(noise, index)
        spread = 0.0 if noise.spread is None else noise.numbers["spread"][index]
        if noise.momentum is None:
            return [Vector(a, b, c, (), spread)]
        return [Vector(a, b, c, (d,), spread), ITS_X0._replace(d=(0.0,))]
    memory = noise.memory
    rows = zip(memory.keep[index].tolist(), memory.of_m[index].tolist(), memory.of_z[index].tolist(), strict=True)
    return [Vector(a, b, 0.0, tuple(d), *z) for (a, *d), b, z in rows]


def fine_step(noise: NoiseTable, index: int) -> Coefficients:
    """The scheduler's own step, without fresh noise and without what `NoiseTable.memory` adds of earlier steps."""
    if noise.triangles is not None:
        return Coefficients(
            float(noise.triangles.of_x[index, index]), float(noise.triangles.of_m[index, index]), 0.0, 0.0
        )
    a, b, c, d = first_order(noise, index, index + 1)
    momentum = 0.0 if noise.momentum is None else noise.numbers["momentum"][index]
    return Coefficients(a, b, c + momentum, d - momentum)


def first_order(noise: NoiseTable, start: int, stop: int) -> Coefficients:
    """From grid position `start` to `stop` in one step: DDIM, or Euler in the variance-exploding and flow cases.

    With stop = start + 1 this is the first-order part of the scheduler's own step. A jump ends at the noise level where
    step `stop - 1` ends.
    """
    column = noise.numbers
    alpha, sigma = column["alpha"][start], column["sigma"][start]
    alpha_next, sigma_next = column["alpha_next"][stop - 1], column["sigma_next"][stop - 1]
    if noise.clip is not None and noise.clip_epsilon:
        return Coefficients(sigma_next / sigma, 0.0, alpha_next - sigma_next * alpha / sigma, 0.0)
    a, b = sigma_next * column["r"][start], sigma_next * column["s"][start]
    if noise.clip is not None:
        return Coefficients(a, b, alpha_next, 0.0)
    return Coefficients(a + alpha_next * column["p"][start], b + alpha_next * column["q"][start], 0.0, 0.0)


# Longest extrapolation of x0 in a 2M jump, in units of the previous jump. The last jumps are several times longer in
# log-SNR than those before them, so the full extrapolation overshoots. On the digits pipeline (25 to 100 steps,
# guidance 3 and 7.5) the limit reduces the difference to sequential after one iteration 4 to 23 times.
LONGEST_EXTRAPOLATION = 0.5
# an alpha or sigma that is zero but for float32 rounding in the scheduler
NOTHING = 1e-7


def second_order(noise: NoiseTable, previous: int | None, start: int, stop: int) -> Coefficients:
    """DPM-Solver++(2M) jump (Lu et al. 2022, algorithm 2), from `start` to `stop`, with the x0 kept at `previous`.

    It extrapolates along the line through the last two x0, no further than LONGEST_EXTRAPOLATION. It is first order if
    there is no history (previous is None) or a log-SNR is infinite (start at pure noise, end at sigma = 0): the
    multistep formula then has no finite weights.
    """
    if previous is None:
        return first_order(noise, start, stop)
    column = noise.numbers
    alpha, sigma = column["alpha"][start], column["sigma"][start]
    alpha_next, sigma_next = column["alpha_next"][stop - 1], column["sigma_next"][stop - 1]
    if min(column["alpha"][previous], alpha, alpha_next, sigma_next) <= NOTHING:
        return first_order(noise, start, stop)
    here = math.log(alpha / sigma)
    width = math.log(alpha_next / sigma_next) - here
    width_before = here - math.log(column["alpha"][previous] / column["sigma"][previous])
    if width_before <= 0:  # two steps at one level
        return first_order(noise, start, stop)
    half_inverse_ratio = 0.5 * min(width / width_before, LONGEST_EXTRAPOLATION)
    weight = -alpha_next * math.expm1(-width)
    return Coefficients(sigma_next / sigma, 0.0, weight * (1 + half_inverse_ratio), -weight * half_inverse_ratio)


def chained(noise: NoiseTable, previous: int | None, start: int, stop: int) -> tuple[Coefficients, list[float]]:
    """The fine steps from `start` to `stop` composed into one jump, with one network output.

    If a scheduler's steps add noise or use earlier outputs, there is no single formula for a jump. But its steps can be
    composed if x0 is known at each. Here x0 is constant from `start`, or it follows the line through the x0 at
    `previous`, as in `second_order`. Returns the coefficients of the jump, and the weights of z at start .. stop - 1.
    """
    column, log_snr = noise.numbers, noise.log_snr
    width_before = 0.0 if previous is None else log_snr[start] - log_snr[previous]

    def ahead(index: int) -> float:
        """How far x0 has moved along the line at a step, in units of the previous jump."""
        distance = log_snr[index] - log_snr[start]
        known = 0.0 < width_before < math.inf and math.isfinite(distance)
        return min(distance / width_before, LONGEST_EXTRAPOLATION) if known else 0.0

    a, c, d, weights = 1.0, 0.0, 0.0, list[float]()
    for index in range(start, stop):
        keep = column["sigma_next"][index] / column["sigma"][index]
        gain = column["alpha_next"][index] - keep * column["alpha"][index]
        slope = gain * ahead(index)
        if noise.momentum is not None and index > 0:
            slope += column["momentum"][index] * (ahead(index) - ahead(index - 1))
        a, c, d = keep * a, keep * c + gain + slope, keep * d - slope
        spread = 0.0 if noise.spread is None else column["spread"][index]
        weights = [*(keep * weight for weight in weights), spread]
    return Coefficients(a, 0.0, c, d), weights


class Guess(NamedTuple):
    """A carried vector where earlier steps are not known: x0 * (their x0) + eps * (their eps) + drift * change."""

    x0: float
    eps: float
    drift: float


def guessed_history(noise: NoiseTable, cut: int, far: int | None = None) -> list[Guess]:
    """What is carried across the cut before step `cut`, as if eps had been the same in all earlier steps, and x0 too.

    far: x0 may have been another one at this step. Between the two it goes along a line in log-SNR. drift is the weight
    of how much the earlier x0 is more than the later one.
    """
    log_snr = noise.log_snr

    def share(index: int) -> float:
        """Of the drift, at a step before the cut."""
        if far is None or cut == noise.num_steps:
            return 0.0
        if log_snr[cut] == log_snr[far]:  # two steps at one level
            return 1.0
        way = (log_snr[cut] - log_snr[index]) / (log_snr[cut] - log_snr[far])
        return min(way, 1.0) if math.isfinite(way) else 0.0

    if noise.memory is None:
        return [Guess(1.0, 0.0, share(cut - 1))] * noise.carried(cut)
    if far is None:
        return [Guess(x0, eps, 0.0) for x0, eps in _constant_histories(noise)[cut].tolist()]
    # the steps from `far` on, each a column of weights of the later x0, of the eps at `far`, and of the drift
    column, carried = noise.numbers, _constant_histories(noise)[far]
    carried = torch.cat((carried, carried[:, :1]), 1)
    x = torch.tensor(
        [column["alpha"][far], column["sigma"][far], column["alpha"][far]], dtype=torch.float64, device="cpu"
    )
    for index in range(far, cut):
        x, carried = _led_on(noise, index, x, carried, x.new_tensor([1.0, 0.0, share(index)]))
    # that eps is the one with which they lead to where the state is
    here = x.new_tensor([column["alpha"][cut], column["sigma"][cut], 0.0])
    of_eps = carried[:, 1:2] / x[1]
    carried = carried + of_eps * (here - x)
    return [Guess(*row) for row in carried.tolist()]


@cached
def _constant_histories(noise: NoiseTable) -> list[Tensor]:
    """For every cut what is carried, [vectors, 2], as weights of an x0 and an eps that all steps before share."""
    found = [torch.zeros(noise.carried(0), 2, dtype=torch.float64, device="cpu")]
    for index, level in enumerate(torch.stack((noise.alpha, noise.sigma), 1)):
        found.append(_led_on(noise, index, level, found[-1], level.new_tensor([1.0, 0.0]))[1])
    return found


def _led_on(noise: NoiseTable, index: int, x: Tensor, carried: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
    """The state behind step `index` and what it carries on. x, carried, clean: its own, and its x0, all as weights."""
    assert noise.memory is not None
    m = (clean - noise.numbers["p"][index] * x) / noise.numbers["q"][index]
    after = noise.memory.keep[index] @ torch.cat((x[None], carried)) + noise.memory.of_m[index][:, None] * m
    return after[0], after[1:]


class TensorSpec(NamedTuple):
    """Dtype, device and number of dimensions of states [samples, ...], to make columns that broadcast over them."""

    dtype: torch.dtype
    device: torch.device
    ndim: int

    @classmethod
    def of(cls, x: Tensor) -> TensorSpec:
        return cls(x.dtype, x.device, x.ndim)

    def column(self, values: Tensor) -> Tensor:
        """Numbers [values] as a column [values, 1, ...]."""
        return values.to(self.device, self.dtype).reshape(-1, *[1] * self.ndim)
