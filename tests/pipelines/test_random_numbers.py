"""Random numbers: what runs beside a user's calls advances no generator of theirs, and takes back no draw of others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import tiny
import torch
from calls import latents
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from unseeded import DrawsInItsLoop, Unseeded, unseeded

import srds_fast

CALL: dict[str, Any] = {"num_inference_steps": 6, "output_type": "latent"}
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "deterministic": lambda: DDIMScheduler(**tiny.SD_NOISE),
    "noisy": lambda: DDPMScheduler(**tiny.SD_BETAS),
    "ancestral": lambda: EulerAncestralDiscreteScheduler(**tiny.SD_BETAS, steps_offset=1),
}
BESIDE: dict[str, Callable[..., Any]] = {
    "warmup": lambda fast, **call: fast.warmup("a cat", **call),
    "audits": lambda fast, **call: fast.warmup("a cat", audit=1, **call),
    "plan": lambda fast, **call: fast.plan_for("a cat", measure=True, **call),
}


def in_a_thread(function: Callable[[], None]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


@contextmanager
def others_draw(network: nn.Module, drawn: list[Tensor]) -> Iterator[None]:
    """In the block another thread draws from the global generator in each of the network's calls."""

    def draw(module: nn.Module, args: Any) -> None:
        in_a_thread(lambda: drawn.append(torch.randn(4)))

    with_hook = network.register_forward_pre_hook(draw)
    try:
        yield
    finally:
        with_hook.remove()


@pytest.mark.parametrize(
    ("beside", "scheduler"),
    [("warmup", "deterministic"), ("warmup", "noisy"), ("audits", "ancestral"), ("plan", "ancestral")],
)
def test_what_prepares_calls_advances_no_generator_and_rewinds_none(beside: str, scheduler: str) -> None:
    pipe = tiny.stable_diffusion(SCHEDULERS[scheduler]())
    for given in (False, True):
        fast = srds_fast.compile(pipe)
        generator = torch.Generator().manual_seed(3)
        more = {"generator": generator} if given else {}
        before, state = torch.get_rng_state(), generator.get_state()
        BESIDE[beside](fast, **CALL, **more)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(generator.get_state(), state)
        drawn: list[Tensor] = []
        with others_draw(pipe.unet, drawn):
            BESIDE[beside](srds_fast.compile(pipe), **CALL, **more)
        torch.set_rng_state(before)
        assert len(drawn) > 0
        assert all(torch.equal(each, torch.randn(4)) for each in drawn), "as if nobody else had drawn"


def dropping_out() -> Any:
    pipe = tiny.stable_diffusion()
    for module in pipe.unet.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
            module.train()
    return pipe


@pytest.mark.parametrize("beside", BESIDE)
def test_networks_that_drop_out_advance_no_generator_beside_a_call(beside: str) -> None:
    fast, before = srds_fast.compile(dropping_out()), torch.get_rng_state()
    with suppress(srds_fast.SrdsFastError):  # it has no plan
        BESIDE[beside](fast, **CALL)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", ["auto", "srds"])
def test_a_network_that_drops_out_gives_the_bits_of_stock(method: str) -> None:
    pipe = dropping_out()
    torch.manual_seed(5)
    expected, after = pipe("a cat", **CALL)[0], torch.get_rng_state()
    fast = srds_fast.compile(pipe, method=method)
    for _ in range(2):
        torch.manual_seed(5)
        assert torch.equal(fast("a cat", **CALL)[0], expected)
        assert torch.equal(torch.get_rng_state(), after)
        assert "draws random numbers" in fast.report.fallback_reason


@pytest.mark.parametrize("cls", [Unseeded, DrawsInItsLoop])
def test_a_pipeline_that_takes_no_generator_is_prepared_beside_the_global_one(cls: type[Unseeded]) -> None:
    fast, before = srds_fast.compile(unseeded(cls)), torch.get_rng_state()
    fast.warmup(num_inference_steps=6)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_call_that_times_other_plans_draws_what_the_stock_call_draws() -> None:
    for make in SCHEDULERS.values():
        pipe = tiny.stable_diffusion(make())
        torch.manual_seed(1)
        pipe("a cat", **CALL)
        expected = torch.get_rng_state()
        fast = srds_fast.compile(pipe)
        for _ in range(3):
            torch.manual_seed(1)
            fast("a cat", **CALL)
            assert fast.report.exploring_seconds > 0 or fast.report.plan_state == "frozen"
            assert torch.equal(torch.get_rng_state(), expected)


def test_a_loop_that_draws_gives_the_bits_of_stock_and_leaves_the_generator_where_stock_does() -> None:
    torch.manual_seed(5)
    pipe = unseeded(DrawsInItsLoop)
    fast = srds_fast.compile(pipe)
    torch.manual_seed(5)
    expected, after = pipe()[0], torch.get_rng_state()
    for _ in range(3):
        torch.manual_seed(5)
        assert torch.equal(fast()[0], expected)
        assert torch.equal(torch.get_rng_state(), after)
        assert "draws random numbers" in fast.report.fallback_reason
    assert not torch.equal(fast()[0], fast()[0]), "unseeded calls differ"


def test_a_call_that_begins_again_takes_back_no_draws_of_other_threads() -> None:
    pipe, drawn = unseeded(DrawsInItsLoop), list[Tensor]()
    fast = srds_fast.compile(pipe)
    with others_draw(pipe.unet, drawn):
        first, second = fast()[0], fast()[0]
    assert not torch.equal(first, second)
    firsts = {float(each[0]) for each in drawn}
    assert len(firsts) == len(drawn), "no number was handed out twice"
    assert float(torch.randn(4)[0]) not in firsts


def test_draws_of_other_threads_do_not_make_a_loop_look_random() -> None:
    pipe = tiny.stable_diffusion()
    with others_draw(pipe.text_encoder, []):
        fast = srds_fast.compile(pipe, method="srds", exact=True)
        stop = threading.Event()

        def draw() -> None:
            while not stop.is_set():
                torch.randn(4)

        thread = threading.Thread(target=draw)
        thread.start()
        try:
            latents(fast, prompt="a cat")
        finally:
            stop.set()
            thread.join()
    assert fast.report.fallback_reason is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
        lambda: LCMScheduler(**tiny.SD_BETAS),
        *SCHEDULERS.values(),
    ],
)
def test_reading_a_scheduler_draws_nothing(make: Callable[[], Any]) -> None:
    pipe = tiny.ddim(make())
    before = torch.get_rng_state()
    with suppress(srds_fast.UnsupportedScheduler):
        srds_fast.compile(pipe)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_warm_up_leaves_code_warm_that_the_user_has_compiled() -> None:
    """Torch compiles code anew in a context that looks at its functions."""
    pipe, counter = tiny.stable_diffusion(), CompileCounter()
    pipe.vae.decoder.compile(backend=counter)
    call = {"num_inference_steps": 6, "output_type": "pt"}
    fast, before = srds_fast.compile(pipe, method="srds"), torch.get_rng_state()
    fast.warmup("a cat", **call)
    assert torch.equal(torch.get_rng_state(), before)
    warm = counter.frame_count
    assert warm > 0
    fast("a cat", **call)
    assert counter.frame_count == warm
