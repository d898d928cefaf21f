"""ParaDiGMS: wave for wave what diffusers' own pipeline of that name does, but for its last step."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import tiny
import torch
from calls import assert_close, drive
from diffusers import DDIMParallelScheduler, DDIMScheduler, StableDiffusionParadigmsPipeline, StableDiffusionPipeline
from thinned import thinned_product
from torch import Tensor

import srds_fast
from srds_fast import zoo
from srds_fast.solvers.fixed_point.options import ParaDiGMS

STEPS = 20
PROMPTS = {"tiny": ["a cat", "two dogs"], "digits": ["the digit three", "the digit eight"]}


@cache
def stock(name: str) -> StableDiffusionPipeline:
    pipe = tiny.stable_diffusion() if name == "tiny" else zoo.load("digits")
    pipe.set_progress_bar_config(disable=True)
    # the others' batched step always ends at an alpha of one
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=True)
    return pipe


def others(pipe: StableDiffusionPipeline) -> StableDiffusionParadigmsPipeline:
    """The pipeline of diffusers with the same parts."""
    parts = {part: each for part, each in pipe.components.items() if part != "image_encoder"}
    parts["scheduler"] = DDIMParallelScheduler.from_config(pipe.scheduler.config)
    theirs = StableDiffusionParadigmsPipeline(**parts, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    return theirs


class Watched:
    """Calls a pipeline and looks at the timesteps that its network is given.

    Attributes:
        windows: of each network call since the last sample, the steps it was given, without repetitions.
    """

    def __init__(self, name: str, pipe: Any, guidance: float, **call: Any) -> None:
        self.name, self.pipe, self.guidance, self.call = name, pipe, guidance, call
        self.windows: list[tuple[int, ...]] = []

    def __call__(self) -> Tensor:
        self.windows = []
        size = {"height": 32, "width": 32} if self.name == "tiny" else {}
        watch = self.pipe.unet.register_forward_pre_hook(self._see, with_kwargs=True)
        try:
            found = self.pipe(
                PROMPTS[self.name],
                num_inference_steps=STEPS,
                guidance_scale=self.guidance,
                generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)],
                output_type="latent",
                **size,
                **self.call,
            ).images
        finally:
            watch.remove()
        assert isinstance(found, Tensor)
        return found

    def _see(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timesteps = args[1] if len(args) > 1 else kwargs["timestep"]
        self.windows.append(tuple(sorted(set(timesteps.flatten().tolist()), reverse=True)))


@pytest.mark.parametrize(
    ("how", "name", "guidance"), thinned_product([(4, 0.1), (10, 0.5), (10, 0.02), (100, 0.1)], PROMPTS, [1.0, 5.0])
)
def test_wave_for_wave_as_in_diffusers(how: tuple[int, float], name: str, guidance: float) -> None:
    (window, tolerance), pipe = how, stock(name)
    theirs = Watched(name, others(pipe), guidance, parallel=window, tolerance=tolerance)
    method = ParaDiGMS(window=window, step_tolerance=tolerance)
    fast = srds_fast.compile(pipe, method=method, engine="eager", strict=True)
    ours = Watched(name, fast, guidance)
    expected, found = theirs(), ours()
    assert ours.windows[fast.report.check_calls :] == theirs.windows
    assert fast.report.waves == len(theirs.windows) < STEPS
    assert fast.report.rows == sum(map(len, theirs.windows))
    assert fast.report.peak_rows == min(window, STEPS)
    assert_close(found, expected)
    # it is not one answer that all share
    off = (found - Watched(name, pipe, guidance)()).abs()
    assert float(off.max()) > 1e-4 * float(expected.abs().max())
    for error, said in zip(off.flatten(1).mean(1), fast.report.converged, strict=True):
        assert not said or float(error) <= fast.report.tolerance


def test_driven_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    drive(monkeypatch)
    pipe = stock("tiny")
    theirs = Watched("tiny", others(pipe), 5.0, parallel=6, tolerance=0.1)
    fast = srds_fast.compile(pipe, method=ParaDiGMS.published(window=6), engine="eager", strict=True)
    driven = Watched("tiny", fast, 5.0)
    driven()  # finds out how the loop runs
    expected, found = theirs(), driven()
    assert fast.report.path == "drive"
    # the loop's first turn is made before there is a plan, and is not made again
    first, second, *windows = driven.windows
    assert [first + second, *windows] == theirs.windows
    assert fast.report.waves == len(theirs.windows)
    assert_close(found, expected)
