"""What programs do with a pipeline object beside calling it: copies, pickles, pipelines of its class, own classes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from calls import assert_close, latents
from diffusers import DiffusionPipeline, EulerDiscreteScheduler
from torch import Tensor

import srds_fast

SETTINGS: dict[str, Any] = {"method": "srds", "num_blocks": 3, "exact": True, "strict": True, "max_graphs": 3}
CALL: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 6}

AGAIN: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda fast: pickle.loads(pickle.dumps(fast)),
}


@pytest.mark.parametrize("again", AGAIN.values(), ids=list(AGAIN))
@pytest.mark.parametrize("called", [False, True])
def test_a_copy_has_the_settings_and_gives_the_same_bits(again: Callable[[Any], Any], called: bool) -> None:
    fast = srds_fast.compile(tiny.stable_diffusion(), **SETTINGS)
    expected = latents(fast, **CALL) if called else None
    twin = again(fast)
    assert type(twin) is type(fast)
    assert twin.original is not fast.original
    assert (twin.unet is fast.unet) == (again is copy.copy)
    assert twin._srds.options == fast._srds.options
    assert torch.equal(latents(twin, **CALL), latents(fast, **CALL) if expected is None else expected)
    assert (twin.report.num_blocks, twin.report.exact) == (3, True)
    twin.scheduler = EulerDiscreteScheduler(**tiny.SD_BETAS)
    assert type(fast.scheduler) is not type(twin.scheduler)


def saved(fast: Any, folder: Path) -> Any:
    fast.save_pretrained(folder)
    return type(fast).from_pretrained(folder, safety_checker=None)


def test_errors_can_be_pickled_too() -> None:
    error = srds_fast.DivergenceError("It diverged.", srds_fast.Report("srds", "eager", "sample", 10))
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.report) == (str(error), error.report)


FROM_CLASS: dict[str, Callable[[Any, Path], Any]] = {
    "components": lambda fast, folder: fast.__class__(**fast.components),
    "from_pipe": lambda fast, folder: type(fast).from_pipe(fast),
    "from_pretrained": saved,
}


@pytest.mark.parametrize("make", FROM_CLASS.values(), ids=list(FROM_CLASS))
def test_its_class_makes_pipelines_as_the_class_of_diffusers_does(
    make: Callable[[Any, Path], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = tiny.stable_diffusion()
    expected = latents(pipe, **CALL)
    made = make(srds_fast.compile(pipe, method="srds"), tmp_path)
    assert type(made) is type(pipe)
    assert_close(latents(made, **CALL), expected)
    assert "makes pipelines that are not compiled: write srds_fast.compile(pipe)" in caplog.text
    compiled = srds_fast.compile(made, method="srds", exact=True)
    assert_close(latents(compiled, **CALL), expected)


class Own(DiffusionPipeline):
    """A plain loop of a user's, with its own names for everything."""

    def __init__(self, unet: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, text: Tensor, steps: int = 9, seed: int = 0) -> Tensor:
        self.scheduler.set_timesteps(steps)
        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) * self.scheduler.init_noise_sigma
        for t in self.progress_bar(self.scheduler.timesteps):
            m = self.unet(self.scheduler.scale_model_input(x, t), t, encoder_hidden_states=text).sample
            x = self.scheduler.step(m, t, x).prev_sample
        return x


def test_a_pipeline_class_of_the_users_is_read_as_any_other() -> None:
    parts = tiny.stable_diffusion(EulerDiscreteScheduler(**tiny.SD_BETAS))
    pipe = Own(parts.unet, parts.scheduler)
    text = torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(1))
    expected = pipe(text)
    fast = srds_fast.compile(pipe, method="srds", exact=True)
    assert_close(fast(text), expected)
    assert fast.report.path == "takeover"
    assert fast.plan_for(text).num_inference_steps == 9
    scheduler = type(pipe.scheduler)
    pipe.scheduler.step = lambda *args, **kwargs: scheduler.step(pipe.scheduler, *args, **kwargs)
    assert_close(fast(text, steps=5), pipe(text, steps=5))
    assert (fast.report.method, fast.report.num_inference_steps) == ("stock", 5)
