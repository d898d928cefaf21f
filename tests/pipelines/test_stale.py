"""What a compiled pipeline remembers of earlier calls is true of the next one: else it is looked up anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny
import tokenizers
import torch
from calls import assert_close, latents
from diffusers import DDIMPipeline, StableDiffusionPipeline

import srds_fast

GUIDANCE: dict[str, Callable[[float], Any]] = {
    "a number": float,
    "no dimension": torch.tensor,
    "one element": lambda value: torch.tensor([value]),
    "a number of numpy": np.float32,
    "one element of many dimensions": lambda value: torch.tensor(value).reshape(1, 1, 1, 1),
}


@pytest.mark.parametrize("given", GUIDANCE.values(), ids=list(GUIDANCE))
def test_every_call_is_guided_by_its_own_scale(sd: Any, given: Callable[[float], Any]) -> None:
    fast = srds_fast.compile(sd, method="sequential")
    for scale in (2.0, 9.0, 2.0):
        call = {"prompt": "a cat", "guidance_scale": given(scale), "num_inference_steps": 5}
        assert_close(latents(fast, **call), latents(sd, **call))
        assert fast.report.path == "takeover"


class Weighted(DDIMPipeline):
    """A user's loop that reads an attribute of its own."""

    @torch.no_grad()
    def __call__(self, num_inference_steps: int = 9, generator: Any = None, output_type: str = "pt") -> Any:
        x = torch.randn(1, 3, 16, 16, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for number, t in enumerate(self.scheduler.timesteps):
            weight = self._weight if number < 5 else 1.0
            x = self.scheduler.step(weight * self.unet(x, t).sample, t, x).prev_sample
        return (x,)


def test_a_loop_reads_its_own_attributes_as_they_are_now() -> None:
    plain = tiny.ddim()
    pipe = Weighted(plain.unet, plain.scheduler)
    fast = srds_fast.compile(pipe, method="sequential")
    for weight in (0.9, 0.5, 0.9):
        pipe._weight = weight
        assert_close(latents(fast), latents(pipe), relative=1e-4)
        assert fast.report.path == "takeover"


class Called(StableDiffusionPipeline):
    """Its call is the one that it inherits."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


@pytest.mark.parametrize("cls", [StableDiffusionPipeline, Called])
def test_what_a_stock_call_leaves_on_the_pipeline_makes_no_new_kind(sd: Any, cls: type) -> None:
    """Such as the guidance scale, which a loop sets before it reads it."""
    pipe = cls(**sd.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    fast = srds_fast.compile(pipe, method="srds")
    latents(fast, prompt="a cat")
    assert fast.report.check_calls > 0
    latents(pipe, prompt="a cat", guidance_scale=2.5)
    latents(fast, prompt="a cat")
    assert fast.report.check_calls == 0
    assert (fast.guidance_scale, pipe.guidance_scale) == (7.5, 2.5)


def shorter(pipe: Any) -> None:
    pipe.tokenizer.model_max_length = 40


def from_the_left(pipe: Any) -> None:
    pipe.tokenizer.padding_side = "left"


def padded_with_another_token(pipe: Any) -> None:
    pipe.tokenizer.pad_token = "a"


def spelt_in_another_way(pipe: Any) -> None:
    pipe.tokenizer._tokenizer.normalizer = tokenizers.normalizers.Replace("b", "d")


def another_token(pipe: Any) -> None:
    """As many tokens as before."""
    for token in ("<hat>", "<bat>"):
        pipe.unload_textual_inversion()
        vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(5))
        pipe.load_textual_inversion({token: vectors}, token=token)


@pytest.mark.parametrize(
    "change", [shorter, from_the_left, padded_with_another_token, spelt_in_another_way, another_token]
)
def test_a_prompt_is_read_with_the_tokenizer_as_it_is_now(change: Callable[[Any], None]) -> None:
    pipe = tiny.stable_diffusion()
    fast = srds_fast.compile(pipe, method="sequential")
    call = {"prompt": "A B <bat> c", "num_inference_steps": 3}
    if change is another_token:
        pipe.load_textual_inversion({"<hat>": torch.ones(3, 32)}, token="<hat>")
    before = latents(fast, **call)
    change(pipe)
    after = latents(fast, **call)
    assert not torch.allclose(after, before, rtol=1e-3)
    assert_close(after, latents(pipe, **call))


def test_a_tokenizer_that_has_not_changed_is_copied_once() -> None:
    pipe = tiny.stable_diffusion()
    fast = srds_fast.compile(pipe, method="sequential")
    seen = []
    for prompt in ("a cat", "a rather longer prompt"):
        latents(fast, prompt=prompt, num_inference_steps=2)
        ((_, copies),) = fast._srds.tokenizers._free.values()
        seen.append(copies["tokenizer"])
    assert seen[0] is seen[1] is not pipe.tokenizer
