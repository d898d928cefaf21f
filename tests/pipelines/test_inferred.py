"""Takeovers inferred from the turns of a rehearsal: the sample is stock's, or the reason why there is none is told."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from calls import assert_close, denoiser, latents, of_waves, watched
from diffusers import EulerDiscreteScheduler
from thinned import thinned_product
from torch import Tensor, nn

import srds_fast
from srds_fast.engine.merging.rule import Call
from srds_fast.kernels.common import network_input
from srds_fast.pipelines.lockstep.placeholders import Placeholders
from srds_fast.pipelines.lockstep.turns import Ran, Turn
from srds_fast.pipelines.takeover.calls import in_dtype
from srds_fast.pipelines.takeover.inferred import Inference
from srds_fast.sampling.recorded.roles import ByStep, Column, Inferred, Joined, PerSample, Shared, State

# pipelines of the default command
SOME = ("stable_diffusion", "stable_diffusion_controlnet", "flux_guidance", "pixart", "dit", "ddpm")


@pytest.mark.parametrize(
    "name", [name if name in SOME else pytest.param(name, marks=pytest.mark.exhaustive) for name in tiny.PIPELINES]
)
def test_the_first_call_of_a_kind_and_a_later_one_give_the_stock_sample(name: str) -> None:
    build, call = tiny.PIPELINES[name]
    pipe = build()
    fast = srds_fast.compile(pipe, method="srds", exact=True)
    expected = latents(pipe, **call)
    for known in (False, True):
        with watched(denoiser(pipe)) as seen:
            assert_close(latents(fast, **call), expected, 2e-5)
        report = fast.report
        assert (report.check_calls == 0) is known
        assert report.rehearsal_calls == 0
        assert report.fallback_reason is None
        assert (report.path, report.drive_reason) == ("takeover", None)
        if known:
            assert len(of_waves(seen, report)) == report.waves


JOINED: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    # guidance of three branches, an image joined to the states along the channels
    "instruct": (tiny.stable_diffusion_instruct, {"image": tiny.image(), "guidance_scale": 5.0}),
    "instruct, scaled": (
        lambda: tiny.stable_diffusion_instruct(EulerDiscreteScheduler(**tiny.SD_BETAS)),
        {"image": tiny.image()},
    ),
    # the known part of the image is put back between the steps
    "inpaint": (tiny.stable_diffusion_inpaint, tiny.PIPELINES["stable_diffusion_inpaint"][1]),
    "inpaint, 9 channels": (
        lambda: tiny.stable_diffusion_inpaint(unet_channels=9),
        tiny.PIPELINES["stable_diffusion_inpaint_9"][1],
    ),
}
SETTINGS: list[dict[str, Any]] = [{"method": "collocation"}, {"method": "auto"}, {"max_rows": 2, "method": "srds"}]


@pytest.mark.parametrize(("name", "settings"), thinned_product(JOINED, SETTINGS))
def test_methods_run_on_an_inferred_takeover(name: str, settings: dict[str, Any]) -> None:
    build, call = JOINED[name]
    pipe = build()
    fast = srds_fast.compile(pipe, tolerance=1e-3, **settings)
    expected = latents(pipe, **{"prompt": "a cat", **call})
    for _ in range(2):
        found = latents(fast, **{"prompt": "a cat", **call})
        assert float((found - expected).abs().mean()) < 2e-3
        assert fast.report.path in ("takeover", "stock")
        assert fast.report.fallback_reason is None


class Network(nn.Module):
    """Takes a state, a time, conditioning and options."""

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, scale: float = 1.0) -> Tensor:
        return x


STEPS, SHAPE, BRANCHES = 4, (2, 3, 5), 2
SCALE = [0.5, 0.25, 1.0, 2.0]


def inferred(guide: Callable[[Tensor, Tensor, int], Tensor], **changed: Callable[[Tensor, int], Any]) -> Inferred | str:
    """What is inferred of a loop with two branches. guide: (output, state, step) -> m. changed: other arguments."""
    network, condition = Network(), torch.randn(BRANCHES * SHAPE[0], 7)
    given: dict[str, Callable[[Tensor, int], Any]] = {
        "x": lambda x, step: torch.cat([SCALE[step] * x] * BRANCHES),
        "t": lambda x, step: torch.tensor(900 - 100 * step),
        "condition": lambda x, step: condition,
    }
    placeholders = Placeholders({}, lambda call: call())
    inference = Inference(SCALE, placeholders)

    def look(step: int, seed: int, again: int | None = None) -> None:
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
        call = Call(network, (), {name: make(x, step) for name, make in (given | changed).items()})
        output = placeholders.of(call, 0, changed=again == 0)
        inference.look(Ran(Turn(step, x, changed=again), [call], guide(output, x, step), x))

    for step in range(STEPS):
        look(step, step)
    for step, number in inference.to_repeat():
        look(step, STEPS + step, number)
    return inference.found()


def guided(output: Tensor, x: Tensor, step: int) -> Tensor:
    one, two = output.chunk(2)
    return one + 4.5 * (two - one)


def test_states_times_and_weights_are_found() -> None:
    found = inferred(guided)
    assert isinstance(found, Inferred)
    ((call,),) = (variant.calls for variant in found.variants)
    times = Column((900, 800, 700, 600), torch.int64)
    assert call.roles == {"x": State(), "t": times, "condition": PerSample()}
    assert (call.branches, found.scaled) == (BRANCHES, True)
    assert torch.equal(found.guidance, torch.tensor([-3.5, 4.5], dtype=torch.float64))


@pytest.mark.parametrize("scale", [7.3, 12.7])
def test_large_weights_round_no_more_than_the_loops_own_guidance(scale: float) -> None:
    """Branches are nearly equal, and the sum of their weights is 1."""
    draw = torch.Generator().manual_seed(0)
    one = torch.randn(1, 4, 1000, generator=draw)
    two = one + 1e-2 * torch.randn(1, 4, 1000, generator=draw)
    weights = in_dtype(torch.tensor([[1 - scale, scale]], dtype=torch.float64), torch.float32)[0]
    assert weights.sum() == 1
    exact = one.double() + scale * (two.double() - one.double())
    found = network_input.guided(torch.cat((one, two)), weights, torch.float32)
    own = one + scale * (two - one)
    assert (found - exact).abs().max() <= 2 * (own - exact).abs().max()


@pytest.mark.parametrize("first", [True, False])
def test_what_is_joined_to_the_state_is_found(first: bool) -> None:
    image = torch.randn(SHAPE[0], 2, SHAPE[2])

    def joined(x: Tensor, step: int) -> Tensor:
        return torch.cat([torch.cat((x, image) if first else (image, x), 1)] * BRANCHES)

    # its loop cuts off what the network returns for the image
    found = inferred(lambda m, x, step: guided(m, x, step)[:, : SHAPE[1]], x=joined)
    assert isinstance(found, Inferred)
    assert (found.variants[0].calls[0].roles["x"], found.scaled) == (State(Joined(1, first)), False)


def test_what_the_step_decides_is_found() -> None:
    """Weights, a tensor for each sample, and a number of Python that makes variants of the loop."""

    def by_step(m: Tensor, x: Tensor, step: int) -> Tensor:
        return (1 + 0.5 * step) * guided(m, x, step)

    found = inferred(
        by_step,
        condition=lambda x, step: torch.arange(28.0).reshape(4, 7) * (step // 2),
        scale=lambda x, step: 1.0 if step < 3 else 0.0,
    )
    assert isinstance(found, Inferred)
    assert [variant.steps for variant in found.variants] == [(0, 1, 2), (3,)]
    assert found.guidance is None
    weights = torch.tensor([[-3.5, 4.5]], dtype=torch.float64) * torch.tensor([[1.0], [1.5], [2.0], [2.5]])
    assert torch.allclose(found.variants[0].weights, weights)
    roles = found.variants[0].calls[0].roles
    assert (roles["condition"], roles["scale"]) == (ByStep((0, 0, 2, 2)), Shared())
    assert found.shown_by == [0, 2, 3]


@pytest.mark.parametrize(
    ("guide", "changed", "reason"),
    [
        (lambda m, x, step: guided(m, x, step) * guided(m, x, step).std(), {}, "not one weighted sum"),
        (lambda m, x, step: guided(m, x, step) * (m.std() if step == 2 else 1), {}, "not one weighted sum"),
        (lambda m, x, step: guided(m, x, step) + 0.01 * x, {}, "not one weighted sum"),
        (lambda m, x, step: guided(m, x, step).tanh(), {}, "not one weighted sum"),
        (guided, {"x": lambda x, step: torch.cat([x, x]) ** 2}, "depends on more than the step"),
        (guided, {"t": lambda x, step: x.mean()}, "depends on more than the step"),
        (guided, {"condition": lambda x, step: torch.ones(7, 4) * torch.arange(4) * step}, "not one for each sample"),
        (guided, {"scale": lambda x, step: torch.cat([x, x])}, "with different scales"),
    ],
)
def test_what_cannot_be_repeated_has_its_reason(
    guide: Callable[[Tensor, Tensor, int], Tensor], changed: dict[str, Callable[[Tensor, int], Any]], reason: str
) -> None:
    found = inferred(guide, **changed)
    assert isinstance(found, str)
    assert re.search(reason, found)


def test_float64_is_exact_to_ten_digits_and_half_precision_as_good_as_stock() -> None:
    call: dict[str, Any] = {"prompt": "a cat", "image": tiny.image(), "guidance_scale": 5.0}
    pipe = tiny.stable_diffusion_instruct().to(torch.float64)
    fast = srds_fast.compile(pipe, method="srds", exact=True)
    reference = latents(pipe, **call)
    assert_close(latents(fast, **call), reference, 1e-10)
    assert fast.report.path == "takeover"
    pipe.to(torch.bfloat16)
    stock = latents(pipe, **call)
    found = latents(srds_fast.compile(pipe, method="srds", exact=True), **call)
    error, own = (float((each.double() - reference.double()).abs().mean()) for each in (stock, found))
    assert own < 2 * error


def test_a_call_that_does_something_else_than_an_earlier_one_of_its_kind_is_noticed() -> None:
    """What a mask holds is not part of the kind: with an empty one, nothing is put back between the steps."""
    pipe = tiny.stable_diffusion_inpaint()
    call = {**tiny.PIPELINES["stable_diffusion_inpaint"][1], "prompt": "a cat"}
    masks = torch.ones_like(call["mask_image"]), call["mask_image"]
    fast = srds_fast.compile(pipe, method="srds", exact=True)
    paths = []
    for mask in (masks[0], masks[1], masks[1], masks[0]):
        call["mask_image"] = mask
        assert_close(latents(fast, **call), latents(pipe, **call))
        paths.append(fast.report.path)
    assert paths == ["takeover", "stock", "takeover", "takeover"]
