"""The steps of `sample`: of a scheduler, of a list of noise levels or of a table, and the noise that they add."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..caches import signature_of
from ..errors import InvalidArgument, shown
from ..planner.settings import MOST_STEPS
from ..schedulers.own_loop import copy_scheduler
from ..schedulers.refusal import refused
from ..schedulers.sigmas import checked_sigmas, table_of_sigmas
from ..schedulers.table import NoiseTable
from ..schedulers.verify import noise_table
from ..solvers.checks import check_switch, check_whole
from .arguments import check_scheduler
from .rows import Generators, draw_noise

NoiseSampler = Callable[[Tensor, Tensor], Tensor]
"""(sigma, sigma_next) -> noise of the shape of x, as the samplers of k-diffusion take one."""

# arguments that describe sigmas, and their defaults
_OF_SIGMAS = {"prediction": "x0", "sampler": "euler", "s_noise": 1.0, "noise_sampler": None}


@dataclass(frozen=True, eq=False)
class Steps:
    """What a caller has given of the steps of a call; see `sample`. Raises InvalidArgument."""

    scheduler: Any
    num_inference_steps: int | None
    sigmas: Tensor | Sequence[float] | None
    prediction: str
    sampler: str
    eta: float | None
    s_noise: float
    noise_sampler: NoiseSampler | None
    clip_epsilon: bool
    dummy_draws: Sequence[int]

    def __post_init__(self) -> None:
        check_switch("clip_epsilon", self.clip_epsilon)
        if not isinstance(self.dummy_draws, Sequence) or isinstance(self.dummy_draws, str):
            raise InvalidArgument(
                f"dummy_draws is {shown(self.dummy_draws)}. It lists the steps in which a loop draws noise that it "
                "does not use. Pass their numbers, from 0 on."
            )
        if self.sigmas is None and self.scheduler is None:
            raise InvalidArgument(
                "Neither a scheduler nor sigmas were given. They say which steps to take. Pass a scheduler of "
                "diffusers and num_inference_steps, or sigmas=, the noise levels of your steps."
            )
        if self.sigmas is None:
            self._check_scheduler()
        else:
            self._check_sigmas()

    def _check_scheduler(self) -> None:
        for name, default in _OF_SIGMAS.items():
            value = getattr(self, name)
            if value is not default and not (type(value) in (str, int, float) and value == default):
                raise InvalidArgument(
                    f"{name} is {shown(value)}, and a scheduler was given, which says itself what its steps are. Leave "
                    f"{name} out, or pass sigmas= instead of the scheduler."
                )
        if not isinstance(self.scheduler, NoiseTable):
            check_scheduler(self.scheduler, self.num_inference_steps, self.eta)
            return
        for name, default in (("eta", None), ("clip_epsilon", False)):
            if getattr(self, name) is not default:
                raise InvalidArgument(
                    f"{name} was given together with a noise table, which has all numbers. Leave it out."
                )
        steps = self.num_inference_steps
        if steps is not None and not (type(steps) is int and steps == self.scheduler.num_steps):
            raise InvalidArgument(
                f"num_inference_steps is {shown(self.num_inference_steps)}, and the noise table has "
                f"{self.scheduler.num_steps} steps. Leave it out."
            )

    def _check_sigmas(self) -> None:
        for name in ("scheduler", "num_inference_steps"):
            if (value := getattr(self, name)) is not None:
                raise InvalidArgument(
                    f"{name} is {shown(value)}, and sigmas were given, which say all steps. Leave one of the two out."
                )
        if self.clip_epsilon:
            raise InvalidArgument(
                "clip_epsilon was given together with sigmas. Such steps clip nothing: clip inside the model. Leave it "
                "out."
            )
        if self.noise_sampler is not None and not callable(self.noise_sampler):
            raise InvalidArgument(
                f"noise_sampler is {shown(self.noise_sampler)}. Pass a function (sigma, sigma_next) that returns noise "
                "of the shape of x, or None."
            )
        steps = len(checked_sigmas(self.sigmas, flow=self.prediction == "flow")) - 1
        check_whole("The number of steps in sigmas", steps, 1, MOST_STEPS)

    def prepared(self) -> Any:
        """A copy of the scheduler with its timesteps set; None if no scheduler was given."""
        if self.sigmas is not None or isinstance(self.scheduler, NoiseTable):
            return None
        scheduler = copy_scheduler(self.scheduler)
        with torch.device("cpu"):  # whatever the default device is
            scheduler.set_timesteps(self.num_inference_steps)
        return scheduler

    def table(self, scheduler: Any, dtype: torch.dtype) -> NoiseTable:
        """The noise table of the call. scheduler: as `prepared`. dtype: of x."""
        if self.sigmas is not None:
            sampler = self.prediction, self.sampler
            return table_of_sigmas(self.sigmas, *sampler, eta=self.eta, s_noise=self.s_noise, dtype=dtype)
        if scheduler is None:
            table: NoiseTable = self.scheduler
        else:
            table = noise_table(scheduler, clip_epsilon=self.clip_epsilon, eta=self.eta)
        if table.learned is not None:
            raise refused(self.scheduler, "its steps take the size of their noise from further channels of the network")
        if self.clip_epsilon and table.clip is not None and not table.clip_epsilon:
            raise refused(self.scheduler, "its steps do not make eps again of the clipped x0, as clip_epsilon asks")
        return table

    @property
    def step_options(self) -> dict[str, Any]:
        """Arguments of the scheduler's step that a loop of the user would give it."""
        takes = "use_clipped_model_output" in signature_of(self.scheduler.step).parameters
        return {"use_clipped_model_output": True} if self.clip_epsilon and takes else {}

    def draws(self, noise: NoiseTable, x: Tensor, dtype: torch.dtype, generator: Generators) -> Tensor | None:
        """The noise of all steps, [N, batch, ...] in a dtype, drawn as the sequential sampler draws it."""
        for step in (dummy := self.dummy_draws):
            check_whole("A step in dummy_draws", step, 0, noise.num_steps - 1)
        if self.noise_sampler is None:
            return draw_noise(noise, x, dtype, generator, dummy=frozenset(dummy))
        if generator is not None or dummy:
            raise InvalidArgument(
                "noise_sampler was given together with generator or dummy_draws. It draws by itself. Leave the others "
                "out."
            )
        if noise.draws is None:
            return None
        sigmas = torch.as_tensor(self.sigmas)
        draws = torch.zeros(noise.num_steps, *x.shape, dtype=dtype, device=x.device)
        for step, draws_noise in enumerate(noise.draws.tolist()):
            if draws_noise:
                drawn = self.noise_sampler(sigmas[step], sigmas[step + 1])
                if not isinstance(drawn, Tensor) or drawn.shape != x.shape:
                    found = tuple(drawn.shape) if isinstance(drawn, Tensor) else type(drawn).__name__
                    raise InvalidArgument(
                        f"noise_sampler returned {found}. It must return noise of the shape of x, {tuple(x.shape)}."
                    )
                draws[step] = drawn.to(draws)
        return draws
