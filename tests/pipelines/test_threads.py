"""Calls from several threads at once: each gets what it would get alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import calls
import pytest
import tiny
import torch
from diffusers import DDIMScheduler
from torch import Tensor

import srds_fast
from srds_fast.pipelines.tokenizers import TokenizerPool

latents = partial(calls.latents, prompt="a cat")


def together(*functions: Callable[[], Any]) -> list[Any]:
    """Runs functions in threads that switch as often as they can; returns what they return, raises what they raise."""
    gate = threading.Barrier(len(functions))

    def work(function: Callable[[], Any]) -> Any:
        gate.wait()
        return function()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(len(functions)) as pool:
            return list(pool.map(work, functions))
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.parametrize("name", ["stable_diffusion", "flux"])
def test_threads_on_one_compiled_pipe_and_on_the_original_get_what_they_would_get_alone(name: str) -> None:
    build, base = tiny.PIPELINES[name]
    pipe = build(DDIMScheduler(**tiny.SD_NOISE)) if name == "stable_diffusion" else build()
    fast = srds_fast.compile(pipe, exact=True, method="srds")
    calls = [
        {"prompt": "a cat", "num_inference_steps": 5},
        {"prompt": "a rather longer prompt about a dog", "num_inference_steps": 8},
        {"prompt": "ships", "num_inference_steps": 6},
    ]
    if name == "stable_diffusion":
        calls[1] |= {"guidance_scale": 1.0, "height": 24, "width": 40}

    def job(each: Any, number: int) -> Callable[[], Any]:
        def run() -> Any:
            results = [latents(each, number, **{**base, **calls[number]}) for _ in range(3)]
            return results, fast.report

        return run

    # the original is called in one thread only: two stock calls at once do get into each other's way
    jobs = [(fast, 0), (fast, 1), (pipe, 2)]
    alone = [job(*each)()[0][0] for each in jobs]
    results = together(*(job(*each) for each in jobs))
    for expected, (found, _) in zip(alone, results, strict=True):
        assert all(torch.equal(result, expected) for result in found)
    assert [report and report.num_inference_steps for _, report in results] == [5, 8, None]


def test_threads_do_not_get_each_others_padding() -> None:
    """What a call on the original does to its tokenizer, over and over, beside calls on the compiled pipe."""
    pipe = tiny.stable_diffusion()
    fast = srds_fast.compile(pipe, method="sequential")
    call = {"prompt": ["a cat", "dogs", "a rather longer one"] * 8, "num_inference_steps": 1, "height": 8, "width": 8}
    expected = latents(fast, **call)
    stop = threading.Event()

    def tokenize() -> None:
        while not stop.is_set():
            pipe.tokenizer("a cat", padding="longest", return_tensors="pt")
            pipe.tokenizer("a cat", padding="max_length", max_length=40, truncation=True, return_tensors="pt")

    def sample() -> list[Tensor]:
        try:
            return [latents(fast, **call) for _ in range(15)]
        finally:
            stop.set()

    assert all(torch.equal(found, expected) for found in together(sample, tokenize)[0])


def test_threads_that_scale_a_lora_wait_for_each_other() -> None:
    pipe = tiny.stable_diffusion()
    tiny.add_lora(pipe.unet)
    fast = srds_fast.compile(pipe, exact=True, method="srds")

    def job(scale: float) -> Callable[[], Any]:
        return lambda: [latents(fast, cross_attention_kwargs={"scale": scale}, num_inference_steps=4) for _ in range(3)]

    alone = [job(scale)()[0] for scale in (0.3, 0.8)]
    for expected, found in zip(alone, together(job(0.3), job(0.8)), strict=True):
        assert all(torch.equal(result, expected) for result in found)


def test_tokenizers_are_copied_once_and_again_when_tokens_are_added() -> None:
    pipe = tiny.stable_diffusion()
    pool = TokenizerPool()
    with pool.borrow(pipe) as first, pool.borrow(pipe) as second:
        assert first["tokenizer"] is not second["tokenizer"]
        assert first["tokenizer"] is not pipe.tokenizer
        assert first["tokenizer"]("cat").input_ids == pipe.tokenizer("cat").input_ids
    kept = {id(first["tokenizer"]), id(second["tokenizer"])}
    with pool.borrow(pipe) as again:
        assert id(again["tokenizer"]) in kept
    pipe.tokenizer.add_tokens(["<thing>"])
    with pool.borrow(pipe) as renewed:
        assert id(renewed["tokenizer"]) not in kept
        assert "<thing>" in renewed["tokenizer"].get_vocab()
