"""Steps whose noise has a size that the network predicts for each element, as in improved DDPM.

The network returns twice as many channels as the state has: m and v. With the bounds of the variance of a step,

    x' = of_x0 * clamp(p * x + q * m) + of_x * x + exp((low + (v + 1) / 2 * (high - low)) / 2) * z

(Nichol and Dhariwal 2021, eq. 15). z is drawn before the first wave, so this is a function of x. What is not linear in
it is put into the output: the solvers are given the one with which a step of a fixed size of noise, without a clamp,
arrives at the same x'.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ..kernels.common.clamping import Clip


@dataclass(frozen=True, eq=False)
class LearnedVariance:
    """low, high: [N], float64, logarithms of the variance between which v chooses. clip: what bounds x0."""

    low: Tensor
    high: Tensor
    clip: Clip | None

    @property
    def middle(self) -> Tensor:
        """The size of the noise, [N], halfway: that of v = 0."""
        return (0.25 * (self.low + self.high)).exp()

    def part(self, start: int, stop: int) -> LearnedVariance:
        """Steps start .. stop - 1."""
        return replace(self, low=self.low[start:stop], high=self.high[start:stop])

    def size(self, index: int, v: Tensor) -> Tensor:
        """The size of the noise of a step, of the shape of v."""
        low, high = float(self.low[index]), float(self.high[index])
        return (0.5 * (low + (v + 1) * (0.5 * (high - low)))).exp()
