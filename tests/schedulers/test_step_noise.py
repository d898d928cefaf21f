"""Steps that draw noise otherwise than once from the generator that they are given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import CogVideoXDPMScheduler, EulerDiscreteScheduler
from promises import SAME_SAMPLE
from torch import Tensor

from srds_fast import sample
from srds_fast.sampling.rows import draw_noise
from srds_fast.schedulers.own_loop import OwnLoop
from srds_fast.schedulers.verify import noise_table

STEPS = 12


class Path:
    """Sums of steps that are drawn in its own order, from a seed; asked for what lies between two levels."""

    def __init__(self, like: Tensor, count: int) -> None:
        seed = int(torch.randint(0, 2**31, []))
        generator = torch.Generator().manual_seed(seed)
        self._steps = [torch.randn(like.shape, generator=generator, dtype=like.dtype) for _ in range(count)]

    def between(self, first: int, last: int) -> Tensor:
        return torch.stack(self._steps[first:last]).sum(0)


class Noisy(EulerDiscreteScheduler):
    """Euler steps with noise; how is set by subclasses."""

    def step(
        self, model_output: Any, timestep: Any, sample: Any, generator: Any = None, return_dict: bool = True
    ) -> Any:
        index = 0 if self.step_index is None else self.step_index
        found = super().step(model_output, timestep, sample)
        found.prev_sample = found.prev_sample + 0.1 * self.sigmas[index + 1] * self.noise(sample, generator, index)
        return found


class FollowsAPath(Noisy):
    path: Path | None = None

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        super().set_timesteps(*args, **kwargs)
        self.path = None

    def noise(self, sample: Tensor, generator: Any, index: int) -> Tensor:
        self.path = self.path or Path(sample, 2 * STEPS)
        return self.path.between(index, index + 3)  # in part that of the step before


class DrawsThrice(Noisy):
    def noise(self, sample: Tensor, generator: Any, index: int) -> Tensor:
        first, second, third = (torch.randn(sample.shape, generator=generator, dtype=sample.dtype) for _ in range(3))
        return first - 0.5 * third + 0.0 * second


class DrawsBeside(Noisy):
    """Once from the generator, once from torch's global one."""

    def noise(self, sample: Tensor, generator: Any, index: int) -> Tensor:
        return torch.randn(sample.shape, generator=generator, dtype=sample.dtype) + torch.randn_like(sample)


def network(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(x) * (0.5 + torch.sigmoid(t.to(x) / 1000)[:, None] / 4)


def seeded() -> torch.Generator:
    torch.manual_seed(5)
    return torch.Generator().manual_seed(6)


@pytest.mark.parametrize("method", SAME_SAMPLE)
@pytest.mark.parametrize("cls", [FollowsAPath, DrawsThrice, DrawsBeside, CogVideoXDPMScheduler])
def test_every_method_gives_the_sample_of_the_own_loop_and_uses_generators_as_it_does(cls: Any, method: str) -> None:
    scheduler = cls()
    scheduler.set_timesteps(STEPS)
    table = noise_table(scheduler)
    assert table.step_noise is not None
    start = torch.randn(2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = start = start * table.init_noise_sigma
    own, ours = seeded(), torch.Generator()
    loop = OwnLoop(scheduler, table.call, generator=own)
    for t in table.timesteps:
        x = loop.step(network(loop.scaled(x), t.expand(2)), x)
    state = torch.get_rng_state()
    ours.set_state(seeded().get_state())
    found = sample(network, start, scheduler, STEPS, method=method, exact=method != "sequential", generator=ours)
    torch.testing.assert_close(found.sample, x, rtol=0, atol=1e-5 * float(x.abs().max()))
    assert torch.equal(ours.get_state(), own.get_state())
    assert torch.equal(torch.get_rng_state(), state)


def test_reading_such_steps_draws_nothing() -> None:
    state = torch.get_rng_state()
    for cls in (FollowsAPath, DrawsThrice, DrawsBeside):
        scheduler = cls(beta_end=0.021)  # not read before
        scheduler.set_timesteps(STEPS)
        noise_table(scheduler)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("start", [0, 1, 5])
def test_the_noise_of_a_part_is_that_of_a_loop_that_begins_there(start: int) -> None:
    """CogVideoX DPM draws once in the first step of a loop, and twice in the others."""
    scheduler = CogVideoXDPMScheduler()
    scheduler.set_timesteps(STEPS)
    part = noise_table(scheduler).part(start, STEPS)
    like = torch.zeros(2, 3)
    generator, other = (torch.Generator().manual_seed(3) for _ in range(2))
    found = draw_noise(part, like, torch.float32, generator)
    assert found is not None
    for number, z in enumerate(found):
        drawn = [torch.randn(2, 3, generator=other) for _ in range(1 if number in (0, STEPS - start - 1) else 2)]
        if part.spreads[number]:
            torch.testing.assert_close(z, drawn[-1])
    assert torch.equal(generator.get_state(), other.get_state())


@pytest.mark.parametrize("output", [torch.float32, torch.bfloat16])
def test_noise_is_drawn_in_the_dtype_of_the_sample_where_outputs_are_converted(output: torch.dtype) -> None:
    """Loops convert outputs to float32 for guidance; the step then draws in the dtype of the sample."""
    scheduler = CogVideoXDPMScheduler()
    scheduler.set_timesteps(4)
    found = draw_noise(
        noise_table(scheduler),
        torch.zeros(2, 3, dtype=output),
        torch.float32,
        torch.Generator().manual_seed(0),
        sample_dtype=torch.bfloat16,
    )
    assert found is not None
    drawn = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    torch.testing.assert_close(found[0], drawn.float(), rtol=0.02, atol=0.02)
