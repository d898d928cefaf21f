from __future__ import annotations

import copy
import sys
from types import SimpleNamespace
from typing import Any

import diffusers.schedulers
import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, UniPCMultistepScheduler
from every_scheduler import BROWNIAN, NOT_MADE, READ, UNCLIPPED, VERDICTS, is_there, made
from thinned import thinned

import srds_fast.schedulers.reader as reader_module
from srds_fast.errors import UnsupportedScheduler
from srds_fast.schedulers.own_loop import OwnLoop, StepCall
from srds_fast.schedulers.reader import InFloat64, read

# schedulers that list one timestep more than they have steps: where the last step arrives
LISTS_ITS_END = {"DDPMWuerstchen", "SCM"}


def own_loop(scheduler: Any, eta: float | None = None, in_float64: bool = True) -> tuple[torch.Tensor, ...]:
    """Samples, outputs and draws of the scheduler's own loop on random vectors."""
    loop, generator = OwnLoop(scheduler, StepCall.of(scheduler, eta)), torch.Generator().manual_seed(3)
    draws, turns = list[torch.Tensor](), read(scheduler).turns

    def randn_tensor(shape: Any, **options: Any) -> torch.Tensor:
        draws.append(torch.randn(tuple(shape), dtype=torch.float64, generator=generator))
        return draws[-1].clone()

    module = sys.modules[type(scheduler).__module__]
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=generator)
    samples, outputs = [x], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "randn_tensor", randn_tensor, raising=False)
        patch.setattr(torch, "randn_like", lambda like: randn_tensor(like.shape))
        for _ in range(turns):
            outputs.append(torch.tanh(torch.randn(x.shape, dtype=torch.float64, generator=generator)))
            with InFloat64(tuple(x.shape) if in_float64 else ()):
                loop.scaled(samples[-1])
                samples.append(loop.step(outputs[-1].clone(), samples[-1].clone()))
    return torch.stack(samples), torch.stack(outputs), torch.stack(draws) if draws else torch.zeros(0, *x.shape)


@pytest.mark.parametrize(("name", "config"), thinned([each for each in READ if each[0] not in BROWNIAN]), ids=str)
def test_the_triangles_walk_as_the_scheduler_does(name: str, config: dict[str, Any]) -> None:
    scheduler = made(name, config)
    samples, outputs, draws = own_loop(scheduler)
    triangles = read(scheduler)
    assert triangles.turns == len(scheduler.timesteps) - (name in LISTS_ITS_END)
    assert len(triangles.draw_turns) == len(draws)
    assert bool((triangles.of_x.triu(1) == 0).all()), "a step depends on samples that come after it"
    assert bool((triangles.of_m.triu(1) == 0).all()), "a step depends on outputs that come after it"
    walked = triangles.walk(samples[0], outputs, draws.double())
    assert float((walked - samples).abs().max() / samples.abs().max()) < 1e-10
    rounded, *_ = own_loop(scheduler, in_float64=False)
    assert float((walked - rounded).abs().max() / rounded.abs().max()) < 1e-5


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", ["DDIM", "TCD"])
def test_eta_is_read(name: str, eta: float) -> None:
    scheduler = made(name, UNCLIPPED)
    samples, outputs, draws = own_loop(scheduler, eta)
    triangles = read(scheduler, StepCall.of(scheduler, eta))
    assert bool(triangles.of_z.any()) == (eta > 0)
    torch.testing.assert_close(triangles.walk(samples[0], outputs, draws.double()), samples, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", sorted(VERDICTS))
def test_what_cannot_be_read_is_refused_with_the_reason(name: str) -> None:
    if not is_there(name):
        pytest.skip("this version of diffusers does not have it, or its package is not installed")
    for config, reason in VERDICTS[name]:
        if reason is not None:
            scheduler = made(name, config)
            with pytest.raises(UnsupportedScheduler, match=reason) as caught:
                read(scheduler)
            assert str(caught.value).startswith(f"{name}Scheduler is not supported: ")


def test_every_class_of_diffusers_has_a_verdict() -> None:
    """A class that a new version brings is read exactly or refused; nothing else may come out."""
    for name in (name.removesuffix("Scheduler") for name in dir(diffusers.schedulers) if name.endswith("Scheduler")):
        if name in VERDICTS:
            continue
        try:
            scheduler = made(name, {})
        except ImportError:
            continue  # it needs a library that is not installed
        except (TypeError, ValueError, KeyError):
            assert name in NOT_MADE
            continue
        with pytest.raises(UnsupportedScheduler):
            read(scheduler)


def test_reading_changes_nothing() -> None:
    for scheduler in (made("EulerAncestralDiscrete", {}), made("UniPCMultistep", {})):
        before, state = copy.deepcopy(scheduler.__dict__), torch.get_rng_state()
        reader_module._read.clear()
        read(scheduler)
        assert torch.equal(torch.get_rng_state(), state)
        assert scheduler.__dict__.keys() == before.keys()
        for key, value in before.items():
            after = getattr(scheduler, key)
            assert torch.equal(value, after) if isinstance(value, torch.Tensor) else value == after, key


def test_what_was_read_is_kept_until_anything_changes() -> None:
    reader_module._read.clear()
    scheduler = made("DDIM", UNCLIPPED)
    first = read(scheduler)
    assert read(copy.deepcopy(scheduler)) is first
    assert read(scheduler, StepCall(eta=0.5)) is not first
    scheduler.alphas_cumprod = scheduler.alphas_cumprod**2
    assert read(scheduler) is not first
    for num_steps in range(1, 20):
        scheduler.set_timesteps(num_steps)
        read(scheduler)
    assert len(reader_module._read) == reader_module.MAX_READ


class Custom(DDIMScheduler):
    """DDIM with something else in its step; `change` is set by the tests."""

    change: Any = None

    def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> Any:  # type: ignore
        found = super().step(model_output, timestep, sample)
        found.prev_sample = type(self).change(found.prev_sample, timestep)
        return found


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x, t: x + 1e-6, "not linear"),
        (lambda x, t: x + 1e-9 * x**2, "not linear"),
        (lambda x, t: x.roll(1, 1), "not linear"),
        (lambda x, t: x * torch.nan, "divides by zero"),
        (lambda x, t: x + torch.rand(x.shape), "not standard normal"),
        (lambda x, t: x + torch.randn(1), "noise of shape"),
        (lambda x, t: x.float(), None),
        (lambda x, t: x[:, :1], "a sample of the given shape"),
        (lambda x, t: 1.5 * x, None),
    ],
)
def test_what_a_step_does_is_found(change: Any, reason: str | None) -> None:
    cls = type("Changed", (Custom,), {"change": staticmethod(change)})
    scheduler = cls(clip_sample=False)
    scheduler.set_timesteps(5)
    if reason is None:
        assert read(scheduler).turns == 5
        return
    with pytest.raises(UnsupportedScheduler, match=reason):
        read(scheduler)


def test_a_step_of_another_signature_is_refused() -> None:
    scheduler = SimpleNamespace(timesteps=torch.arange(3), config={}, step=lambda m, t, x, mask, generator=None: None)
    with pytest.raises(UnsupportedScheduler, match=r"takes \(m, t, x, mask\)"):
        read(scheduler)


def test_a_corrector_reaches_back_to_the_first_turn_and_noise_is_of_its_own_turn() -> None:
    """Known answers: UniPC predicts from the corrected sample, which is no sample that it returned."""
    unipc = UniPCMultistepScheduler()
    unipc.set_timesteps(6)
    assert read(unipc).of_x[3].count_nonzero() == 4
    ancestral = EulerAncestralDiscreteScheduler()
    ancestral.set_timesteps(6)
    triangles = read(ancestral)
    start, stop = ancestral.sigmas[:-1], ancestral.sigmas[1:]
    up = (stop**2 * (start**2 - stop**2) / start**2) ** 0.5
    assert torch.equal(triangles.of_z, torch.diag(up.double()))
