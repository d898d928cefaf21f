"""The noise table: every supported scheduler as alphas, sigmas and step coefficients in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..kernels.common.clamping import Clip, clamped
from .learned_variance import LearnedVariance
from .memory import Memory, minimal_memory
from .own_loop import StepCall
from .reader import Triangles
from .step_noise import StepNoise


@dataclass(frozen=True, eq=False)
class NoiseTable:
    """Alphas, sigmas and prediction of N steps. All tensors are float64 on the CPU, of shape [N], except `timesteps`.

    Step i starts at (alpha[i], sigma[i]), where the network is evaluated, and ends at (alpha_next[i], sigma_next[i]).
    Some schedulers do not end where the next step starts, as DDIM with "trailing" spacing.

    From the network output m at x: x0 = p * x + q * m (then clamped to +-clip, or thresholded, if set), eps = r * x +
    s * m, and the sampler's step is

        x' = alpha_next * x0 + sigma_next * eps + momentum * (x0 - x0_prev) + spread * z

    with x0_prev the x0 of the previous step (multistep solvers) and z fresh noise (stochastic ones). A stochastic step
    ends at the noise level sqrt(sigma_next^2 + spread^2).

    A scheduler with two network calls a step (Heun, DPM-Solver singlestep) has a step here for each of them. What its
    second call keeps of the first one is the first one's x0, so it is a step with momentum.
    """

    timesteps: Tensor  # the network's time input, in the scheduler's own dtype and unit
    alpha: Tensor
    sigma: Tensor
    alpha_next: Tensor
    sigma_next: Tensor
    p: Tensor
    q: Tensor
    r: Tensor
    s: Tensor
    input_scale: Tensor  # the network's input is input_scale * x (EulerDiscrete's scale_model_input)
    clip: Clip | None = None  # what bounds the predicted x0
    init_noise_sigma: float = 1.0  # standard deviation of the starting noise
    clip_epsilon: bool = False  # compute eps again from the clamped x0 (DDIM's use_clipped_model_output)
    momentum: Tensor | None = None  # None if no step uses x0_prev
    # share of x in a step that stands for the x of the step before (Heun); None: no step has one
    recovered: Tensor | None = None
    spread: Tensor | None = None  # None if no step adds noise
    draws: Tensor | None = None  # bool, steps that draw from the generator (even if their spread is 0)
    # of the draws, by the dtypes of the network's output and of the sample; else that of the output
    draw_dtypes: Mapping[tuple[torch.dtype, torch.dtype], torch.dtype] = field(default_factory=dict)
    call: StepCall = field(default_factory=StepCall)  # how a loop calls the step
    learned: LearnedVariance | None = None  # the network also predicts how large the noise is, see `folded`
    step_noise: StepNoise | None = None  # asks the steps for their noise; None: a step draws once, from the generator
    triangles: Triangles | None = None  # the steps; None: x0_prev is all that they need of earlier ones
    memory: Memory | None = None  # the same as a recursion: what is carried from step to step
    # the steps of a loop that begins at this one: its first steps know of no earlier ones
    read_from: Callable[[int], Triangles] | None = None

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    @cached_property
    def numbers(self) -> dict[str, list[float]]:
        """The float64 columns as lists, because reading a number from a list is much faster."""
        return {name: column.tolist() for name, column in self._columns().items() if name != "timesteps"}

    @cached_property
    def log_snr(self) -> list[float]:
        """log(alpha / sigma) where each step departs."""
        found: list[float] = (self.alpha / self.sigma).log().tolist()
        return found

    @property
    def spreads(self) -> list[float]:
        """The size of the noise that each step adds."""
        return self.numbers.get("spread", [0.0] * self.num_steps)

    def _columns(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def part(self, start: int, stop: int, *, afresh: bool = True) -> NoiseTable:
        """Steps start .. stop - 1, for img2img and `denoising_end`; afresh: nothing is carried to the first step.

        Raises UnsupportedScheduler if a scheduler with `memory` cannot be read from there on.
        """
        if (start, stop) == (0, self.num_steps):
            return self
        key = start, stop, afresh
        if key not in self._parts:
            columns: dict[str, Any] = {name: column[start:stop] for name, column in self._columns().items()}
            if "momentum" in columns and afresh:
                columns["momentum"] = columns["momentum"].clone()
                columns["momentum"][:1] = 0.0
            if self.triangles is not None and self.memory is not None:
                columns |= self._turns(start, stop, afresh=afresh or start == 0)
            if self.learned is not None:
                columns["learned"] = self.learned.part(start, stop)
            if self.step_noise is not None and start > 0:
                columns["step_noise"] = self.step_noise.begun_at(start)
            self._parts[key] = replace(self, **columns)
        return self._parts[key]

    def _turns(self, start: int, stop: int, *, afresh: bool) -> dict[str, Any]:
        """What of a part of a table with memory is not a part of its columns."""
        assert self.triangles is not None
        assert self.memory is not None
        if not afresh:
            return {"triangles": self.triangles.part(start, stop), "memory": self.memory.part(start, stop)}
        triangles = self.triangles
        if start > 0:
            assert self.read_from is not None
            triangles = self.read_from(start)
        triangles = triangles.part(0, stop - start)
        found: dict[str, Any] = {"triangles": triangles, "memory": minimal_memory(triangles)}
        if self.draws is not None:
            found["draws"], found["spread"] = triangles.own_noise()
        return found

    @cached_property
    def _parts(self) -> dict[tuple[int, int, bool], NoiseTable]:
        """Parts made so far. Each must stay the same object, because solvers cache by the identity of a table."""
        return {}

    @property
    def state_vectors(self) -> int:
        """The most vectors that are passed on from one step to the next, x included."""
        return int(self.momentum is not None) + 1 if self.memory is None else self.memory.vectors

    def carried(self, cut: int) -> int:
        """Vectors that the steps from `cut` on, 0 to N, are given beside x."""
        if self.memory is not None:
            return self.memory.carried(cut)
        return int(self.momentum is not None and cut > 0)

    def predict_x0(self, index: int, x: Tensor, m: Tensor) -> Tensor:
        """The clean sample that the network predicts at x, [batch, channels, ...], where step `index` departs.

        m: what the network returned, with the variance that it predicts if there is one; not what `folded` makes of it.
        """
        x0 = self.numbers["p"][index] * x + self.numbers["q"][index] * self.prediction_of(m, x)
        found: Tensor = clamped(x0, self.clip if self.learned is None else self.learned.clip, leading=1)
        return found

    def prediction_of(self, m: Tensor, x: Tensor) -> Tensor:
        """What a network returns, [batch, channels, ...], without the variance that it predicts."""
        return m if self.learned is None else m.narrow(1, 0, x.shape[1])

    def folded(self, index: int, x: Tensor, m: Tensor, z: Tensor | None) -> Tensor:
        """The output with which `step` and the solvers make of x what step `index` makes of m, which holds a variance.

        x, z: [batch, channels, ...], as `step` takes them. m: [batch, 2 * channels, ...], or as x without `learned`.
        """
        if self.learned is None:
            return m
        at = {name: column[index] for name, column in self.numbers.items()}
        m, v = m.to(x.dtype).chunk(2, dim=1)
        x0 = at["p"] * x + at["q"] * m
        # what is changed of x0 is added to m: m made of x0 again would be rounded with the size of p * x
        change: Tensor = clamped(x0, self.learned.clip, leading=1) - x0
        if z is not None and self.spread is not None and at["spread"]:
            of_x0 = at["alpha_next"] - at["sigma_next"] * at["alpha"] / at["sigma"]
            change = change + (self.learned.size(index, v) - at["spread"]) * z / of_x0
        return m + change / at["q"]

    def step(
        self, index: int, x: Tensor, m: Tensor, carried: Tensor | None = None, z: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The sampler's step `index`: `steps` of a single one, without its first dimension."""
        after, carried = self.steps(index, x[None], m[None], carried, None if z is None else z[None])
        return after[0], carried

    def steps(
        self, first: int, x: Tensor, m: Tensor, carried: Tensor | None = None, z: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The sampler's steps from `first` on, written as in the definition; to check schedulers and coefficients.

        x, m, z: what each is given, [steps, samples, ...]. carried: what the step before the first has returned with
        its state, which for steps with momentum is its x0. Returns the next states, [steps, samples, ...], and what is
        carried beside the last one.
        """
        if self.memory is not None:
            after = []
            for turn, (state, output) in enumerate(zip(x, m, strict=True)):
                draw = None if z is None else z[turn]
                found, carried = self._turn(self.memory, first + turn, state, output, carried, draw)
                after.append(found)
            assert carried is not None
            return torch.stack(after), carried
        shape = -1, *[1] * (x.ndim - 1)
        at = {name: each[first : first + len(x)].to(x).view(shape) for name, each in self._columns().items()}
        x0, eps = clamped(at["p"] * x + at["q"] * m, self.clip), at["r"] * x + at["s"] * m
        if self.clip is not None and self.clip_epsilon:
            eps = (x - at["alpha"] * x0) / at["sigma"]
        x = at["alpha_next"] * x0 + at["sigma_next"] * eps
        if self.momentum is not None:
            x = x + at["momentum"] * (x0 - torch.cat([x0[:1] if carried is None else carried[None], x0[:-1]]))
        if self.spread is not None and z is not None:
            x = x + at["spread"] * z
        return x, x0[-1]

    @staticmethod
    def _turn(
        memory: Memory, index: int, x: Tensor, m: Tensor, carried: Tensor | None, z: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        state = x[None] if carried is None else torch.cat((x[None], carried))
        after = torch.tensordot(memory.keep[index].to(x.dtype), state, dims=1)
        after = after + torch.tensordot(memory.of_m[index].to(x.dtype), m, dims=0)
        if z is not None:
            after = after + torch.tensordot(memory.of_z[index].sum(1).to(x.dtype), z, dims=0)
        return after[0], after[1:]
