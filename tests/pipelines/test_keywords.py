"""Keywords that a pipeline does not know: an error that says what to write, whatever takes the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import modulars
import pytest
import tiny
from diffusers import DDIMPipeline, StableDiffusionPipeline

import srds_fast
from srds_fast import InvalidArgument, UnknownArgument

WORDS = {
    "tolerance": (0.01, r"tolerance is a setting of compile: write srds_fast\.compile\(pipe, tolerance=0\.01\)"),
    "method": ("srds", r"compile\(pipe, method='srds'\)"),
    "plan": (object(), r"compile\(pipe, plan=\.\.\.\)"),
    "num_inference_step": (9, r"Did you mean num_inference_steps\?"),
    "keep_trajectorie": (True, r"Did you mean keep_trajectory\?"),
    "zebra": (1, "It would have no effect. Leave it out"),
}
PIPES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "with **kwargs": lambda: (tiny.stable_diffusion(), {"prompt": "a cat"}),
    "with named arguments": lambda: (tiny.flux(), tiny.PIPELINES["flux"][1]),
    "modular": lambda: (modulars.PIPELINES["flux"][0](), modulars.PIPELINES["flux"][1]),
}


@pytest.mark.parametrize("make", PIPES.values(), ids=list(PIPES))
def test_an_unknown_keyword_is_an_error_that_says_what_to_write(make: Callable[[], tuple[Any, dict[str, Any]]]) -> None:
    pipe, call = make()
    fast = srds_fast.compile(pipe, method="srds")
    for name, (value, words) in WORDS.items():
        for act in (fast, fast.warmup, fast.plan_for, fast.stream):
            with pytest.raises(UnknownArgument, match=f"{type(pipe).__name__} takes no argument {name}. .*{words}"):
                act(**call, **{name: value})
    assert issubclass(UnknownArgument, TypeError)
    assert issubclass(UnknownArgument, InvalidArgument)


def test_a_keyword_that_the_pipeline_looks_for_is_taken() -> None:
    """`callback` is no parameter of this pipeline: it is popped from its **kwargs."""
    seen: list[int] = []
    fast = srds_fast.compile(tiny.stable_diffusion(), method="srds")
    fast("a cat", num_inference_steps=3, callback=lambda step, *others: seen.append(step), callback_steps=1)
    assert seen == [0, 1, 2]


class Passing(StableDiffusionPipeline):
    """It passes what it does not name to a pipeline that may know it."""

    def __call__(self, prompt: str, **rest: Any) -> Any:
        return super().__call__(prompt, **rest)


class Looking(DDIMPipeline):
    def __call__(self, *args: Any, **rest: Any) -> Any:
        steps = 4
        if "steps" in rest:
            steps = rest["steps"]
        for name in ("number", "count"):
            steps = rest.get(name, steps)
        return super().__call__(*args, num_inference_steps=steps)


def test_it_is_read_from_the_code_which_other_keywords_a_pipeline_knows() -> None:
    parts = tiny.stable_diffusion().components
    fast = srds_fast.compile(Passing(**parts, requires_safety_checker=False), method="sequential")
    fast("a cat", num_inference_steps=2, guidance_scale=2.0, output_type="latent")
    plain = tiny.ddim()
    looking = srds_fast.compile(Looking(plain.unet, plain.scheduler), method="sequential")
    for known in ("steps", "number", "count"):
        looking(**{known: 3})
    with pytest.raises(UnknownArgument, match="Did you mean steps"):
        looking(step=3)
