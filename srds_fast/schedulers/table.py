"""The noise table: every supported scheduler as alphas, sigmas and step coefficients in float64."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class NoiseTable:
    """Alphas, sigmas and prediction of N steps. All tensors are float64 on the CPU, of shape [N], except `timesteps`.

    Step i starts at (alpha[i], sigma[i]), where the network is evaluated, and ends at (alpha_next[i], sigma_next[i]).
    The table has both because some schedulers do not end where the next step starts: DDIM with "trailing" spacing ends
    at t - T // N, and the next step starts at a rounded timestep.

    From the network output m at x: x0 = p * x + q * m (then clamped to +-clip, if set), eps = r * x + s * m, and the
    sampler's step is

        x' = alpha_next * x0 + sigma_next * eps + momentum * (x0 - x0_prev) + spread * z

    with x0_prev the x0 of the previous step (multistep solvers) and z fresh noise (stochastic ones). A stochastic step
    ends at the noise level sqrt(sigma_next^2 + spread^2).

    Attributes:
        timesteps: [N], the network's time input, in the scheduler's own dtype and unit.
        input_scale: [N], the network's input is input_scale * x (EulerDiscrete's scale_model_input).
        clip: bound on the predicted x0, or None.
        clip_epsilon: compute eps again from the clamped x0 (DDIM's use_clipped_model_output).
        init_noise_sigma: standard deviation of the starting noise.
        momentum: [N]; None if no step uses x0_prev.
        spread: [N]; None if no step adds noise.
        draws: [N] bool, the steps that draw noise from the generator (even if their spread is 0); None without spread.
    """

    timesteps: Tensor
    alpha: Tensor
    sigma: Tensor
    alpha_next: Tensor
    sigma_next: Tensor
    p: Tensor
    q: Tensor
    r: Tensor
    s: Tensor
    input_scale: Tensor
    clip: float | None
    init_noise_sigma: float
    clip_epsilon: bool = False
    momentum: Tensor | None = None
    spread: Tensor | None = None
    draws: Tensor | None = None

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    @cached_property
    def numbers(self) -> dict[str, list[float]]:
        """The float64 columns as lists, because reading a number from a list is much faster."""
        columns = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "timesteps"}
        return {name: column.tolist() for name, column in columns.items() if isinstance(column, Tensor)}

    def part(self, start: int, stop: int, *, afresh: bool = True) -> NoiseTable:
        """Steps start .. stop - 1 as a table, for img2img and `denoising_end`.

        afresh: the first step has no x0_prev, as in a multistep scheduler that starts there.
        """
        if (start, stop) == (0, self.num_steps):
            return self
        key = start, stop, afresh
        if key not in self._parts:
            self._parts[key] = self._part(*key)
        return self._parts[key]

    @cached_property
    def _parts(self) -> dict[tuple[int, int, bool], NoiseTable]:
        """Cache of parts. Each part must stay the same object, because solvers cache by the identity of a table."""
        return {}

    def _part(self, start: int, stop: int, afresh: bool) -> NoiseTable:
        columns: dict[str, Any] = {
            field.name: value[start:stop]
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        if "momentum" in columns and afresh:
            columns["momentum"] = columns["momentum"].clone()
            columns["momentum"][:1] = 0.0
        return replace(self, **columns)

    def step(
        self, index: int, x: Tensor, m: Tensor, x0_prev: Tensor | None = None, z: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The sampler's step `index` and its x0, written as in the definition. All tensors have the same shape.

        This is the reference for tests of the coefficients in `steps`; the solvers do not call it.
        """
        alpha, sigma, arrive_alpha, arrive_sigma, p, q, r, s = (
            float(column[index])
            for column in (
                self.alpha, self.sigma, self.alpha_next, self.sigma_next, self.p, self.q, self.r, self.s,
            )
        )  # fmt: skip
        x0, eps = p * x + q * m, r * x + s * m
        if self.clip is not None:
            x0 = x0.clamp(-self.clip, self.clip)
            if self.clip_epsilon:
                eps = (x - alpha * x0) / sigma
        x = arrive_alpha * x0 + arrive_sigma * eps
        if self.momentum is not None and x0_prev is not None:
            x = x + float(self.momentum[index]) * (x0 - x0_prev)
        if self.spread is not None and z is not None:
            x = x + float(self.spread[index]) * z
        return x, x0
