"""Methods that a user has replaced on a pipeline or on its scheduler: they are obeyed, with every way to write them."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from calls import assert_close, latents
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline

import srds_fast
from srds_fast import InvalidArgument, UnsupportedPipeline, UnsupportedScheduler

Wrap = Callable[[Any], Any]  # replaces a method of an object
holder: dict[str, Any] = {}


def euler() -> Any:
    return EulerDiscreteScheduler(**tiny.SD_BETAS, timestep_spacing="leading", steps_offset=1)


def clamped(scheduler: Any) -> None:
    plain = scheduler.step
    scheduler.step = lambda m, *args, **kwargs: plain(m.clamp(-0.5, 0.5), *args, **kwargs)


def weaker_input(scheduler: Any) -> None:
    plain = scheduler.scale_model_input
    scheduler.scale_model_input = lambda *args: 0.9 * plain(*args)


def brighter(scheduler: Any) -> None:
    plain = scheduler.set_timesteps

    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        plain(*args, **kwargs)
        scheduler.sigmas = scheduler.sigmas * 1.02

    scheduler.set_timesteps = set_timesteps


def bound(scheduler: Any) -> None:
    def step(self: Any, m: Any, *args: Any, **kwargs: Any) -> Any:
        return type(self).step(self, 0.9 * m, *args, **kwargs)

    scheduler.step = types.MethodType(step, scheduler)


def state(scheduler: Any) -> Any:
    return scheduler.num_inference_steps, scheduler.sigmas.tolist(), scheduler.timesteps.tolist()


SCHEDULERS = {"step": clamped, "scale_model_input": weaker_input, "set_timesteps": brighter, "a bound step": bound}


@pytest.mark.parametrize("replace", SCHEDULERS.values(), ids=list(SCHEDULERS))
def test_a_scheduler_with_a_replaced_method_runs_on_the_stock_loop(replace: Wrap) -> None:
    """Also where a scheduler of the same configuration has been used before, and compiling changes nothing in it."""
    plain = tiny.stable_diffusion(euler())
    latents(srds_fast.compile(plain, method="srds"), prompt="a cat")
    pipe = tiny.stable_diffusion(euler())
    replace(pipe.scheduler)
    before = state(pipe.scheduler)
    fast = srds_fast.compile(pipe, method="srds")
    assert state(pipe.scheduler) == before
    found = latents(fast, prompt="a cat")
    assert "of its scheduler was replaced on the object" in fast.report.fallback_reason
    assert torch.equal(found, latents(pipe, prompt="a cat"))
    with pytest.raises(InvalidArgument, match="was replaced on the object"):
        fast.plan_for(prompt="a cat")
    with pytest.raises(UnsupportedPipeline, match="was replaced on the object"):
        latents(srds_fast.compile(pipe, method="srds", strict=True), prompt="a cat")


def test_sample_refuses_a_scheduler_with_a_replaced_method() -> None:
    scheduler = DDIMScheduler()
    clamped(scheduler)
    with pytest.raises(UnsupportedScheduler, match="Put it into a subclass"):
        srds_fast.sample(lambda x, t: x, torch.zeros(1, 4), scheduler, 10)
    assert scheduler.num_inference_steps is None


def test_a_method_replaced_on_the_class_is_seen_by_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(EulerDiscreteScheduler):
        pass

    pipe = tiny.stable_diffusion(Own(**tiny.SD_BETAS, steps_offset=1))
    fast = srds_fast.compile(pipe, method="sequential")
    before = latents(fast, prompt="a cat")
    monkeypatch.setattr(
        Own, "step", lambda self, m, *args, **kwargs: EulerDiscreteScheduler.step(self, 0.9 * m, *args, **kwargs)
    )
    after = latents(fast, prompt="a cat")
    assert not torch.allclose(after, before, rtol=1e-2)
    assert_close(after, latents(pipe, prompt="a cat"))


def closure(pipe: Any) -> None:
    plain = pipe.prepare_latents
    pipe.prepare_latents = lambda *args, **kwargs: 0.9 * plain(*args, **kwargs)


def over_a_function(pipe: Any) -> None:
    closure(pipe)
    closure(pipe)


def method(pipe: Any) -> None:
    def prepare_latents(self: Any, *args: Any, **kwargs: Any) -> Any:
        return 0.9 * type(self).prepare_latents(self, *args, **kwargs)

    pipe.prepare_latents = types.MethodType(prepare_latents, pipe)


def partial(pipe: Any) -> None:
    def prepare_latents(pipe: Any, *args: Any, **kwargs: Any) -> Any:
        return 0.9 * type(pipe).prepare_latents(pipe, *args, **kwargs)

    pipe.prepare_latents = functools.partial(prepare_latents, pipe)


def without_the_pipe(pipe: Any) -> None:
    shape = (1, 4, 16, 16)
    pipe.prepare_latents = lambda *args, **kwargs: torch.randn(shape, generator=torch.Generator().manual_seed(3))


def over_a_global(pipe: Any) -> None:
    holder["plain"] = pipe.prepare_latents
    pipe.prepare_latents = lambda *args, **kwargs: 0.9 * holder["plain"](*args, **kwargs)


def with_the_scheduler(pipe: Any) -> None:
    plain, scheduler = pipe.prepare_latents, pipe.scheduler
    pipe.prepare_latents = lambda *args, **kwargs: 0.03 * scheduler.init_noise_sigma * plain(*args, **kwargs)


class Weaker:
    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return 0.9 * type(self.pipe).prepare_latents(self.pipe, *args, **kwargs)


def an_object(pipe: Any) -> None:
    pipe.prepare_latents = Weaker(pipe)


class Holder:
    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def weight(self) -> Any:
        return 0.9 * self.pipe.scheduler.init_noise_sigma / self.pipe.scheduler.init_noise_sigma


class Helped(StableDiffusionPipeline):
    """A class of the user's whose methods use what it has put on itself."""

    weigh: Any = None

    def prepare_latents(self, *args: Any, **kwargs: Any) -> Any:
        found: Any = super().prepare_latents(*args, **kwargs)
        return found if self.weigh is None else found * self.weigh()


def own_sigma(pipe: Any) -> Any:
    return 0.5 + 0.01 * pipe.scheduler.num_inference_steps


def test_functions_and_objects_beside_the_methods_see_the_call_too() -> None:
    pipe = Helped(**tiny.stable_diffusion(euler()).components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    fast = srds_fast.compile(pipe, method="sequential")
    for weigh, path in (
        (lambda: 0.9, "takeover"),
        (functools.partial(own_sigma, pipe), "takeover"),
        (types.MethodType(own_sigma, pipe), "takeover"),
        (Holder(pipe).weight, "stock"),
    ):
        pipe.weigh = weigh
        assert_close(latents(fast, prompt="a cat"), latents(pipe, prompt="a cat"))
        assert fast.report.path == path


FOLLOWED = (closure, over_a_function, method, partial, without_the_pipe)


@pytest.mark.parametrize("replace", [*FOLLOWED, over_a_global, with_the_scheduler, an_object])
@pytest.mark.parametrize("on", ["original", "compiled"])
def test_a_replaced_method_of_a_pipeline_is_obeyed(replace: Wrap, on: str) -> None:
    """Where it can be bound to the copy that a call runs on, the call is taken over; otherwise it runs on stock."""
    pipe = tiny.stable_diffusion(euler())
    fast = srds_fast.compile(pipe, method="sequential")
    before = latents(fast, prompt="a cat")
    replace(pipe if on == "original" else fast)
    found, reason = latents(fast, prompt="a cat"), fast.report.fallback_reason
    assert not torch.allclose(found, before, rtol=1e-2)
    assert_close(found, latents(pipe, prompt="a cat"))
    if replace in FOLLOWED:
        assert fast.report.path == "takeover"
    else:
        assert "prepare_latents was put on the pipeline object, and uses the pipeline itself" in reason


def test_a_counter_of_a_replaced_method_counts() -> None:
    pipe, count = tiny.stable_diffusion(), 0
    plain = pipe.encode_prompt

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return plain(*args, **kwargs)

    pipe.encode_prompt = counted
    for number, settings in enumerate(({"method": "sequential"}, {}), start=1):
        latents(srds_fast.compile(pipe, **settings), prompt="a cat")
        assert count == number


class Bar:
    """A progress bar of the user's: it writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def __call__(self, iterable: Any = None, total: int | None = None) -> Bar:
        self.told.append(total)
        return self

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *error: object) -> None:
        self.told.append("end")

    def update(self, steps: int = 1) -> None:
        self.told.append(steps)


@pytest.mark.parametrize("method", ["sequential", "srds"])
def test_a_progress_bar_of_the_users_is_told_of_every_step(method: str) -> None:
    pipe = tiny.stable_diffusion()
    fast = srds_fast.compile(pipe, method=method)
    pipe.progress_bar = stock = Bar()
    latents(pipe, prompt="a cat")
    fast.progress_bar = ours = Bar()
    fast.plan_for(prompt="a cat", num_inference_steps=9, measure=True)
    assert not ours.told
    latents(fast, prompt="a cat")
    assert ours.told == stock.told == [9, *[1] * 9, "end"]


def test_a_class_that_finds_its_device_itself_is_asked_for_it() -> None:
    """Of other classes a call finds the device once, and tells its copy of the pipeline."""
    asked: list[Any] = []

    pipe = tiny.stable_diffusion()

    class Asked(StableDiffusionPipeline):
        @property
        def _execution_device(self) -> torch.device:
            asked.append(self)
            return torch.device("cpu")

    own = Asked(**pipe.components, requires_safety_checker=False)
    own.set_progress_bar_config(disable=True)
    found = latents(srds_fast.compile(own, method="sequential"), prompt="a cat", num_inference_steps=3)
    assert asked
    assert torch.equal(
        found, latents(srds_fast.compile(pipe, method="sequential"), prompt="a cat", num_inference_steps=3)
    )


def test_the_copy_for_a_call_passes_for_its_class() -> None:
    seen, pipe = list[type](), tiny.stable_diffusion()

    class Told(StableDiffusionPipeline):
        def prepare_extra_step_kwargs(self, *args: Any, **kwargs: Any) -> Any:
            seen.append(type(self))
            return super().prepare_extra_step_kwargs(*args, **kwargs)

    own = Told(**pipe.components, requires_safety_checker=False)
    own.set_progress_bar_config(disable=True)
    latents(srds_fast.compile(own, method="sequential"), prompt="a cat", num_inference_steps=3)
    assert [(cls.__name__, cls.__qualname__, cls.__module__, issubclass(cls, Told)) for cls in seen] == [
        (Told.__name__, Told.__qualname__, Told.__module__, True)
    ]
