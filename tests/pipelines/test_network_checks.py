"""Networks that are no functions of their rows run on the pipeline's own loop, with the reason, and as if unchecked."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import tiny
import torch
from calls import assert_close, latents
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import AttnProcessor2_0
from thinned import thinned_product
from torch import Tensor, nn

import srds_fast
from srds_fast.pipelines.network_checks import foreign_code

STEPS = 16  # a period of the counters below
CALL: dict[str, Any] = {"prompt": ["a cat", "a dog"], "num_inference_steps": STEPS, "guidance_scale": 5.0}


class LookAtFirst:
    """In self-attention, every image of a batch also looks at the first one."""

    def __init__(self) -> None:
        self.plain = AttnProcessor2_0()

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, **others: Any) -> Tensor:
        if encoder_hidden_states is None:
            halves = hidden_states.unflatten(0, (2, -1))
            encoder_hidden_states = torch.cat([halves, halves[:, :1].expand_as(halves)], dim=2).flatten(0, 1)
        found: Tensor = self.plain(attn, hidden_states, encoder_hidden_states=encoder_hidden_states, **others)
        return found


def across_images(unet: nn.Module) -> None:
    unet.set_attn_processor(LookAtFirst())


def across_frames(unet: nn.Module) -> None:
    module: Any = inspect.getmodule(diffusers.TextToVideoZeroPipeline)
    unet.set_attn_processor(module.CrossFrameAttnProcessor2_0(batch_size=2))


def counter_in_a_closure(unet: nn.Module) -> None:
    """As of patches that work differently in the first half of the steps."""
    block, calls = unet.mid_block, 0
    plain = block.forward

    def counted(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return plain(hidden * 3 if (calls - 1) % STEPS < STEPS // 2 else hidden, *args, **kwargs)

    block.forward = counted


def counter_in_an_attribute(unet: nn.Module) -> None:
    block = unet.mid_block
    plain, block.info = block.forward, {"step": 0}

    def counted(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        block.info["step"] += 1
        return plain(hidden * 3 if (block.info["step"] - 1) % STEPS < STEPS // 2 else hidden, *args, **kwargs)

    block.forward = counted


def cache_between_steps(unet: nn.Module) -> None:
    """Every other call adds what the last one has changed, instead of computing it."""
    plain = type(unet).forward

    class Caching(type(unet)):  # type: ignore[misc]
        def forward(self, sample: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls % 2 == 0 and self.residual is not None and len(self.residual) == len(sample):
                return (sample + self.residual,)
            out = plain(self, sample, timestep, *args, **{**kwargs, "return_dict": False})[0]
            self.residual = out - sample
            return (out,)

    unet.__class__ = Caching
    unet.calls, unet.residual = 0, None


REASONS: dict[Callable[[nn.Module], None], str] = {
    across_images: "depends on the other rows",
    across_frames: "depends on the other rows",
    counter_in_a_closure: "answers calls in another order differently",
    counter_in_an_attribute: "changes what a part of it holds",
    cache_between_steps: "changes what a part of it holds|depends on the other rows",
}


@pytest.mark.parametrize(("change", "method"), thinned_product(REASONS, ["srds", "auto"]))
def test_such_a_network_runs_on_the_pipelines_own_loop(change: Callable[[nn.Module], None], method: str) -> None:
    def changed() -> Any:
        pipe = tiny.stable_diffusion(**tiny.BLOCKS)
        change(pipe.unet)
        return pipe

    fast = srds_fast.compile(changed(), method=method)
    assert torch.equal(latents(fast, **CALL), latents(changed(), **CALL))
    assert fast.report.method == "stock"
    assert fast.report.check_calls > 0
    with pytest.raises(srds_fast.UnsupportedPipeline, match=REASONS[change]):
        latents(srds_fast.compile(changed(), method=method, strict=True), **CALL)


def drawing(unet: nn.Module, begun: bool) -> None:
    """As random token merging: from a generator of its own, for batches of an even size. begun: it exists already."""
    block = unet.mid_block
    plain, block.info = block.forward, {"args": {"generator": torch.Generator().manual_seed(4) if begun else None}}

    def drawn(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        options = block.info["args"]
        if options["generator"] is None:
            options["generator"] = torch.Generator().set_state(torch.get_rng_state())
        if len(hidden) % 2 == 0:
            kept = torch.rand(hidden.shape[1:], generator=options["generator"]) > 0.3
            hidden = hidden * kept
        return plain(hidden, *args, **kwargs)

    block.forward = drawn


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(
    ("settings", "guidance", "path"),
    [
        ({}, 5.0, "stock"),
        ({"method": "srds"}, 5.0, "stock"),
        ({"method": "srds"}, 1.0, "stock"),
        ({"method": "sequential"}, 5.0, "drive"),
    ],
)
def test_a_network_that_draws_from_a_generator_of_its_own_draws_what_it_would_unchecked(
    settings: dict[str, Any], guidance: float, path: str, begun: bool
) -> None:
    found = []
    for compiled in (False, True):
        pipe: Any = tiny.stable_diffusion()
        drawing(pipe.unet, begun)
        pipe = srds_fast.compile(pipe, **settings) if compiled else pipe
        torch.manual_seed(7)
        call = {"prompt": "a cat", "num_inference_steps": 8, "guidance_scale": guidance}
        found.append([latents(pipe, **call) for _ in range(2)])
    for ours, expected in zip(found[1], found[0], strict=True):
        assert_close(ours, expected)
    assert pipe.report.path == path


def test_a_forward_replaced_by_one_that_only_watches_is_checked_and_run_in_waves() -> None:
    pipe, seen = tiny.stable_diffusion(), list[int]()
    expected = latents(pipe, **CALL)
    plain = pipe.unet.forward

    def watching(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        return plain(*args, **kwargs)

    pipe.unet.forward = watching
    fast = srds_fast.compile(pipe, method="srds", exact=True)
    assert_close(latents(fast, **CALL), expected)
    assert fast.report.fallback_reason is None
    assert fast.report.check_calls == 3 + 2 * STEPS
    assert len(seen) == fast.report.waves, "the list is as if the check had not been"
    assert "checking" in str(fast.report)


def test_a_kind_of_call_is_checked_once_and_again_when_the_network_changes() -> None:
    pipe = tiny.stable_diffusion(**tiny.BLOCKS)
    fast = srds_fast.compile(pipe, method="srds")
    found = []
    for change in (None, None, across_images, None):
        if change is not None:
            change(pipe.unet)
        latents(fast, **CALL)
        found.append((fast.report.check_calls, fast.report.method))
    assert found == [(3, "srds"), (0, "srds"), (5, "stock"), (0, "stock")]


@pytest.mark.parametrize("settings", [{"method": "sequential"}, {"method": "srds", "max_rows": 1}])
def test_rows_that_are_never_merged_are_not_compared_merged(settings: dict[str, Any]) -> None:
    pipe = tiny.stable_diffusion()
    across_images(pipe.unet)
    fast = srds_fast.compile(pipe, exact=True, **settings)
    assert_close(latents(fast, **CALL), latents(pipe, **CALL))
    assert fast.report.fallback_reason is None


def test_networks_of_diffusers_hold_no_foreign_code() -> None:
    pipe = tiny.stable_diffusion(DDIMScheduler(**tiny.SD_BETAS))
    assert foreign_code([pipe.unet]) is None
    across_images(pipe.unet)
    assert "attention processor" in str(foreign_code([pipe.unet]))
