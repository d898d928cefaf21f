"""A diffusion policy for the push task: observations in, a chunk of actions out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InvalidArgument
from ..files import new_file
from .push_task import PushTask
from .unet1d import ConditionalUnet1d, PolicyConfig

WEIGHTS, SETTINGS = "model.safetensors", "config.json"
Observation = Tensor | Sequence[Sequence[float]] | Sequence[Sequence[Sequence[float]]]
Generators = torch.Generator | list[torch.Generator] | None
Sampler = Callable[[Tensor, Tensor, list[torch.Generator]], Tensor]
"""(noise [n, horizon, action_dim], observation [n, n_obs_steps, state_dim], n generators) -> trajectory as noise."""


class PushPolicy(nn.Module):
    """Diffusion Policy (Chi et al. 2023) with states instead of images.

    Sampling it as its authors do is `policy(observation)`. The same with this package::

        found = srds_fast.sample(policy.denoiser, noise, policy.noise_scheduler, 100, cond={"observation": observation})
        actions = policy.chunk(found.sample)

    with noise [n, horizon, action_dim] and observation [n, n_obs_steps, state_dim]. Parts have the names they have in
    LeRobot's `DiffusionModel`.

    Attributes:
        config: the settings.
        unet: the network.
        noise_scheduler: a scheduler of diffusers, DDPM at first. Another, as DDIM, may take its place.
        num_inference_steps: steps of the loop.
    """

    def __init__(self, config: PolicyConfig) -> None:
        from diffusers import DDPMScheduler

        super().__init__()
        self.config = config
        self.unet = ConditionalUnet1d(config)
        self.noise_scheduler: Any = DDPMScheduler(
            num_train_timesteps=config.num_train_timesteps,
            beta_schedule=config.beta_schedule,
            prediction_type=config.prediction_type,
            clip_sample=config.clip_sample,
            clip_sample_range=config.clip_sample_range,
        )
        self.num_inference_steps = config.num_train_timesteps

    @property
    def denoiser(self) -> Any:
        """A denoiser for `srds_fast.sample`, with the condition "observation"."""
        return self.unet.denoise

    def forward(self, observation: Observation, generator: Generators = None, noise: Tensor | None = None) -> Tensor:
        """The next actions, by the loop of the scheduler, one network call after another.

        Args:
            observation: [n, n_obs_steps, state_dim], or [n_obs_steps, state_dim] of one robot; numbers or a tensor.
            generator: draws the noise; a list has one for each robot, None is torch's global generator.
            noise: the noise to start from, [n, horizon, action_dim]; None: it is drawn.

        Returns:
            [n, n_action_steps, action_dim], or [n_action_steps, action_dim] of one robot.

        Raises:
            InvalidArgument: (a ValueError) the observation has another shape.
        """
        like, shape = next(self.parameters()), (self.config.n_obs_steps, self.config.state_dim)
        observed = torch.as_tensor(observation, dtype=like.dtype, device=like.device)
        if observed.shape[-2:] != shape or observed.dim() not in (2, 3):
            raise InvalidArgument(
                f"The observation has the shape {tuple(observed.shape)}. This policy sees {shape[0]} steps of "
                f"{shape[1]} numbers. Pass [{shape[0]}, {shape[1]}], or [n, {shape[0]}, {shape[1]}] for n robots."
            )
        single = observed.dim() == 2
        condition = observed.reshape(-1, shape[0] * shape[1])
        actions = self.chunk(self.conditional_sample(len(condition), condition, generator, noise))
        return actions[0] if single else actions

    @torch.no_grad()
    def conditional_sample(
        self,
        batch_size: int,
        global_cond: Tensor,
        generator: Generators = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """A trajectory [batch_size, horizon, action_dim] for each condition [batch_size, n_obs_steps * state_dim]."""
        from diffusers.utils.torch_utils import randn_tensor

        like = global_cond
        shape = (batch_size, self.config.horizon, self.config.action_dim)
        x: Tensor = randn_tensor(shape, generator, like.device, like.dtype) if noise is None else noise
        self.noise_scheduler.set_timesteps(self.num_inference_steps)
        for t in self.noise_scheduler.timesteps:
            m = self.unet(x, t.to(x.device).expand(batch_size), global_cond)
            x = self.noise_scheduler.step(m, t, x, generator=generator).prev_sample
        return x

    def chunk(self, trajectory: Tensor) -> Tensor:
        """Of a predicted trajectory [n, horizon, action_dim] the actions to carry out, [n, n_action_steps, action_dim].

        Those of the bundled policy are ways from where the pusher is, as `PushTask.run` takes them.
        """
        start = self.config.n_obs_steps - 1
        return trajectory[:, start : start + self.config.n_action_steps]

    def task(self, seed: int = 0) -> PushTask:
        """An episode of the task that the policy was trained for."""
        return PushTask(seed)

    def episodes(self, seeds: Iterable[int], sampler: Sampler | None = None) -> list[PushTask]:
        """Run an episode of each seed to its end, all of them at once.

        Each draws its noise from a CPU generator of its own, seeded by its seed: no episode depends on the others
        beyond rounding.

        Args:
            sampler: takes the place of the policy's own loop.
        """
        like = next(self.parameters())

        def own(noise: Tensor, observation: Tensor, generators: list[torch.Generator]) -> Tensor:
            return self.conditional_sample(len(noise), observation.flatten(1), generators, noise)

        tasks = {seed: self.task(seed) for seed in seeds}
        chances = {seed: torch.Generator().manual_seed(seed) for seed in tasks}
        shape = self.config.horizon, self.config.action_dim
        while running := [seed for seed, task in tasks.items() if not task.done]:
            generators = [chances[seed] for seed in running]
            noise = torch.stack([torch.randn(shape, generator=each) for each in generators]).to(like)
            observation = torch.tensor([tasks[seed].observation() for seed in running]).to(like)
            found = self.chunk((sampler or own)(noise, observation, generators))
            for seed, actions in zip(running, found.tolist(), strict=True):
                tasks[seed].run(actions)
        return list(tasks.values())

    def save_pretrained(self, folder: Path) -> None:
        """Write settings and weights into a folder."""
        from safetensors.torch import save_model

        folder.mkdir(parents=True, exist_ok=True)
        with new_file(folder / SETTINGS) as unfinished:
            unfinished.write_text(json.dumps(asdict(self.config), indent=2) + "\n")
        save_model(self, str(folder / WEIGHTS))

    @classmethod
    def from_pretrained(cls, folder: Path, dtype: torch.dtype = torch.float32) -> PushPolicy:
        """The policy saved in a folder, on the CPU, in evaluation mode."""
        from safetensors.torch import load_model

        known = {each.name for each in fields(PolicyConfig)}
        settings = {name: value for name, value in json.loads((folder / SETTINGS).read_text()).items() if name in known}
        policy = cls(PolicyConfig(**settings | {"down_dims": tuple(settings["down_dims"])}))
        load_model(policy, str(folder / WEIGHTS))
        return policy.to(dtype).eval()
