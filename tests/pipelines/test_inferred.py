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
from srds_fast.pipelines import call as call_module
from srds_fast.pipelines.families import Family, _unlisted_loop
from srds_fast.pipelines.lockstep.placeholders import Placeholders
from srds_fast.pipelines.lockstep.turns import Ran, Turn
from srds_fast.pipelines.merging.rule import Call
from srds_fast.pipelines.networks import Joined
from srds_fast.pipelines.takeover.inferred import Inference, Inferred

# pipelines of the default command
SOME = ("stable_diffusion", "stable_diffusion_controlnet", "flux_guidance", "pixart", "dit", "ddpm")
# why the loops of some of the tests' pipelines make their own turns
OWN_TURNS = {
    "stable_diffusion_controlnet": "a network of it returns more than one tensor",
    "stable_diffusion_controlnet_2": "a network of it returns more than one tensor",
    # its loop keeps the state once for each branch
    "dit": "its guidance is not one weighted sum of its network's outputs",
}


@pytest.fixture
def _unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known of any loop."""
    monkeypatch.setattr(call_module, "family_of", lambda pipe: Family(_unlisted_loop, None))


@pytest.mark.usefixtures("_unread")
@pytest.mark.parametrize(
    "name", [name if name in SOME else pytest.param(name, marks=pytest.mark.exhaustive) for name in tiny.PIPELINES]
)
def test_a_loop_that_nobody_has_read_gives_the_stock_sample(name: str) -> None:
    build, call = tiny.PIPELINES[name]
    pipe = build()
    fast = srds_fast.compile(pipe, method="srds", exact=True)
    expected = latents(pipe, **call)
    for known in (False, True):
        with watched(denoiser(pipe)) as seen:
            assert_close(latents(fast, **call), expected, 2e-5)
        report = fast.report
        assert (report.rehearsal_calls == 0) is known
        assert report.fallback_reason is None
        if name in OWN_TURNS:
            assert (report.path, report.drive_reason) == ("drive", OWN_TURNS[name])
            continue
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
    for number in range(STEPS + 1):
        step = number % STEPS
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(number))
        call = Call(network, (), {name: make(x, step) for name, make in (given | changed).items()})
        again = None if number < STEPS else 0  # the call has another answer
        output = placeholders.of(call, 0, changed=again == 0)
        inference.look(Ran(Turn(step, x, changed=again), [call], guide(output, x, step), x))
    return inference.found()


def guided(output: Tensor, x: Tensor, step: int) -> Tensor:
    one, two = output.chunk(2)
    return one + 4.5 * (two - one)


def test_states_times_and_weights_are_found() -> None:
    found = inferred(guided)
    assert isinstance(found, Inferred)
    (family,) = found.families
    assert (family.state, family.per_sample, family.joined, found.scaled) == ("x", {"condition"}, None, True)
    assert torch.equal(family.columns["t"], torch.tensor([900, 800, 700, 600]))
    assert torch.equal(found.weights, torch.tensor([-3.5, 4.5], dtype=torch.float64))


@pytest.mark.parametrize("first", [True, False])
def test_what_is_joined_to_the_state_is_found(first: bool) -> None:
    image = torch.randn(SHAPE[0], 2, SHAPE[2])

    def joined(x: Tensor, step: int) -> Tensor:
        return torch.cat([torch.cat((x, image) if first else (image, x), 1)] * BRANCHES)

    # its loop cuts off what the network returns for the image
    found = inferred(lambda m, x, step: guided(m, x, step)[:, : SHAPE[1]], x=joined)
    assert isinstance(found, Inferred)
    assert (found.families[0].joined, found.scaled) == (Joined(1, first), False)


@pytest.mark.parametrize(
    ("guide", "changed", "reason"),
    [
        (lambda m, x, step: (1 + 0.1 * step) * guided(m, x, step), {}, "not the same in every step"),
        (lambda m, x, step: guided(m, x, step) * guided(m, x, step).std(), {}, "not the same in every step"),
        (lambda m, x, step: guided(m, x, step) + 0.01 * x, {}, "not one weighted sum"),
        (lambda m, x, step: guided(m, x, step).tanh(), {}, "not one weighted sum"),
        (guided, {"x": lambda x, step: torch.cat([x, x]) ** 2}, "neither the state, nor a number"),
        (guided, {"condition": lambda x, step: torch.full((4, 7), 1.0) * torch.arange(7) * step}, "neither the state"),
        (guided, {"t": lambda x, step: torch.tensor(float(step)) if step else 0}, "a number in some steps only"),
        (guided, {"scale": lambda x, step: torch.cat([x, x])}, "and some times a scale|in one argument"),
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
