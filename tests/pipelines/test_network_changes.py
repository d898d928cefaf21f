"""A network that is changed in the middle of a call: later steps are computed by what it holds then, as in stock."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from calls import drive, latents
from diffusers.models.attention_processor import AttnProcessor2_0
from thinned import thinned_product
from torch import Tensor, nn

import srds_fast
from srds_fast.engine.run import Run
from srds_fast.pipelines.hooks import only_watches
from srds_fast.pipelines.lockstep.memory import LoopMemory

STEPS, WHEN = 12, 5
CALL: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": STEPS, "guidance_scale": 4.0}
MODES: dict[str, dict[str, Any]] = {
    "sequential": {"method": "sequential"},
    "srds": {"method": "srds"},
    "exact": {"method": "srds", "exact": True},
    "collocation": {"method": "collocation"},
}
Act = Callable[[Any], None]


class Halved(AttnProcessor2_0):
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        found: Tensor = 0.5 * super().__call__(*args, **kwargs)
        return found


def with_loras() -> Any:
    pipe = tiny.stable_diffusion()
    for seed, name in enumerate(("first", "second")):
        tiny.add_lora(pipe.unet, name, seed)
    for module in pipe.unet.modules():
        if hasattr(module, "scale_layer"):
            module.scaling = dict.fromkeys(module.scaling, 8.0)
    return pipe


def with_ip_adapter() -> Any:
    pipe = tiny.stable_diffusion()
    pipe.embeds = tiny.add_ip_adapter(pipe)
    pipe.set_ip_adapter_scale(4.0)
    return pipe


def with_hook() -> Any:
    """Its hook reads a number that no module holds."""
    pipe = tiny.stable_diffusion()
    pipe.strength = strength = {"now": 3.0}
    pipe.unet.mid_block.register_forward_hook(lambda module, given, found: found * strength["now"])
    return pipe


def hook(pipe: Any) -> None:
    pipe.unet.mid_block.register_forward_hook(lambda module, given, found: 3 * found)


def zero_controlnet(pipe: Any) -> None:
    for block in pipe.controlnet.controlnet_down_blocks:
        nn.init.zeros_(block.weight)


def another_weight(pipe: Any) -> None:
    pipe.unet.conv_out.weight.data = 0.5 * pipe.unet.conv_out.weight.data


def another_unet(pipe: Any) -> None:
    pipe.unet = tiny.stable_diffusion(seed=1).unet


# by what changes: how the pipeline is built, and what a callback does to it
CHANGES: dict[str, tuple[Callable[[], Any], Act]] = {
    "scale of a LoRA": (with_loras, lambda pipe: pipe.unet.set_adapters(["second"], [0.0])),
    "another LoRA": (with_loras, lambda pipe: pipe.unet.set_adapter("first")),
    "LoRAs switched off": (with_loras, lambda pipe: pipe.unet.disable_adapters()),
    "LoRAs unloaded": (with_loras, lambda pipe: pipe.unet.delete_adapters("second")),
    "scale of an IP-Adapter": (with_ip_adapter, lambda pipe: pipe.set_ip_adapter_scale(0.0)),
    # half the attention in one place would hardly show
    "attention processors": (
        lambda: tiny.stable_diffusion(**tiny.BLOCKS),
        lambda pipe: pipe.unet.set_attn_processor(Halved()),
    ),
    "FreeU": (tiny.stable_diffusion, lambda pipe: pipe.enable_freeu(s1=0.2, s2=0.1, b1=2.0, b2=2.5)),
    "a hook": (tiny.stable_diffusion, hook),
    "what a hook reads": (with_hook, lambda pipe: pipe.strength.update(now=0.2)),
    "weights in place": (tiny.stable_diffusion_controlnet, zero_controlnet),
    "weights exchanged": (tiny.stable_diffusion, another_weight),
    "the network": (tiny.stable_diffusion, another_unet),
}


def changed_at(
    build: Callable[[], Any], act: Act, step: int | None = WHEN, *, own: bool = False, **settings: Any
) -> tuple[Any, Tensor]:
    """The pipeline, and latents of a call in which a callback acts at a step: on what it is given, or on its own."""
    pipe = build()
    if settings:
        pipe = srds_fast.compile(pipe, **settings)
    call = CALL | ({"image": tiny.image()} if hasattr(pipe, "controlnet") else {})
    call |= {"ip_adapter_image_embeds": pipe.embeds} if hasattr(pipe, "embeds") else {}

    def callback(given: Any, now: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if now == step:
            act(pipe if own else given)
        return tensors

    return pipe, latents(pipe, **call, callback_on_step_end=callback)


@pytest.mark.parametrize(("what", "mode"), thinned_product(CHANGES, MODES))
def test_a_change_by_a_callback_acts_on_all_later_steps(what: str, mode: str) -> None:
    build, act = CHANGES[what]
    _, expected = changed_at(build, act)
    fast, found = changed_at(build, act, **MODES[mode])
    assert float((found - expected).abs().mean()) < 1e-4
    assert float((expected - changed_at(build, act, None)[1]).abs().mean()) > 4e-3, "the change shows"
    if mode != "sequential":
        assert "the callback changed" in fast.report.fallback_reason
        assert f"at step {WHEN}" in fast.report.fallback_reason


@pytest.mark.parametrize("what", ["FreeU", "the network"])
def test_a_callback_may_change_the_users_own_pipeline_instead_of_the_one_it_is_given(what: str) -> None:
    build, act = CHANGES[what]
    _, expected = changed_at(build, act, own=True)
    _, found = changed_at(build, act, own=True, method="srds")
    assert float((found - expected).abs().mean()) < 1e-4


def test_a_network_that_a_callback_exchanged_stays_exchanged() -> None:
    fast, _ = changed_at(*CHANGES["the network"], method="srds")
    other = tiny.stable_diffusion(seed=1).unet.conv_in.weight
    assert torch.equal(fast.unet.conv_in.weight, other)
    assert fast.unet is fast.original.unet


def test_attention_processors_that_a_callback_sets_stay_where_compile_was_given_others() -> None:
    fast, _ = changed_at(*CHANGES["attention processors"], method="srds", attention="sdpa")
    assert {type(each) for each in fast.unet.attn_processors.values()} == {Halved}


def test_an_interrupt_beside_a_change_ends_the_call() -> None:
    def act(pipe: Any) -> None:
        CHANGES["FreeU"][1](pipe)
        pipe._interrupt = True

    fast, found = changed_at(tiny.stable_diffusion, act, method="srds")
    assert fast.report.interrupted
    assert found.isfinite().all()


def test_a_schedule_of_scales_is_followed_step_by_step() -> None:
    """Every step has a scale of its own, as with a LoRA that fades in."""

    def faded(**settings: Any) -> Tensor:
        pipe = with_loras()
        fast = srds_fast.compile(pipe, **settings) if settings else pipe

        def callback(given: Any, now: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            given.unet.set_adapters(["second"], [0.1 * now])
            return tensors

        return latents(fast, **CALL, callback_on_step_end=callback)

    assert float((faded(method="srds") - faded()).abs().mean()) < 1e-4


@pytest.mark.parametrize("path", ["takeover", "drive"])
def test_a_change_by_another_thread_takes_the_steps_anew(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "drive":
        drive(monkeypatch)
    fast = srds_fast.compile(with_loras(), method="srds")
    latents(fast, **CALL)
    received, waves = Run.received, list[Run]()

    def switch(run: Run) -> None:
        waves.append(run)
        if len(waves) == 4:
            thread = threading.Thread(target=fast.unet.set_adapters, args=(["second"], [0.0]))
            thread.start()
            thread.join()
        received(run)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "received", switch)
        found = latents(fast, **CALL)
    assert fast.report.path == path
    assert "was changed in the middle of the call" in fast.report.fallback_reason
    assert "The steps were then taken one after another" in fast.report.fallback_reason
    scale = {id(scaling): scaling["second"] for module in fast.unet.modules() if (scaling := scalings(module))}
    assert set(scale.values()) == {0.0}, "what the thread has set stays"
    # turns of the loop keep the output of the first step, which may have come before the change
    _, expected = changed_at(with_loras, CHANGES["scale of a LoRA"][1], 0 if path == "drive" else None)
    if path == "takeover":
        expected = latents(fast.original, **CALL)
    assert float((found - expected).abs().mean()) < 1e-4
    latents(fast, **CALL)
    assert fast.report.fallback_reason is None


def scalings(module: nn.Module) -> dict[str, float] | None:
    return getattr(module, "scaling", None)


def switches() -> Any:
    """In its sixth call, a hook switches the LoRA off, and on after the last one."""
    pipe, made = with_loras(), 0

    def switch(module: Any, args: Any) -> None:
        nonlocal made
        made += 1
        if made % STEPS in (0, 6):
            module.set_adapters(["second"], [8.0 if made % STEPS == 0 else 0.0])

    pipe.unet.register_forward_pre_hook(switch)
    return pipe


def switches_by_time() -> Any:
    pipe = with_loras()

    def switch(module: Any, args: Any) -> None:
        module.set_adapters(["second"], [8.0 if float(args[1].max()) > 500 else 0.0])

    pipe.unet.register_forward_pre_hook(switch)
    return pipe


def scales() -> Any:
    """A hook counts its calls, and gives back something else after the sixth one."""
    pipe, made = tiny.stable_diffusion(), 0

    def scale(module: Any, given: Any, found: Tensor) -> Tensor:
        nonlocal made
        made += 1
        return found * (3 if (made - 1) % STEPS < 6 else 1)

    pipe.unet.mid_block.register_forward_hook(scale)
    return pipe


def test_a_callback_sees_what_a_hook_does_by_the_time_of_the_step() -> None:
    """What the callback was told stands; the steps after that are made one after another."""

    def told(fast: Any) -> tuple[Tensor, list[Tensor]]:
        seen: list[Tensor] = []

        def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            seen.append(tensors["latents"].clone())
            return tensors

        return latents(fast, **CALL, callback_on_step_end=callback), seen

    pipe, fast = switches_by_time(), srds_fast.compile(switches_by_time(), method="srds")
    for _ in range(2):
        (expected, stock_seen), (found, seen) = told(pipe), told(fast)
        assert float((found - expected).abs().mean()) < 4e-3
        assert len(seen) == len(stock_seen)


@pytest.mark.parametrize("path", ["takeover", "drive"])
@pytest.mark.parametrize(("build", "method"), thinned_product([switches, switches_by_time, scales], MODES))
def test_a_hook_that_changes_its_network_is_called_as_in_stock(
    build: Callable[[], Any], method: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this call and in the next one: the calls that looked at the loop are as if they had not been.

    A hook that switches by the time of its rows alone does the same for a row whichever came before.
    """
    if path == "drive":
        drive(monkeypatch)
    pipe, fast = build(), srds_fast.compile(build(), **MODES[method])
    for _ in range(2):
        expected, found = latents(pipe, **CALL), latents(fast, **CALL)
        alone = build is switches_by_time and "the network is called for one row at a time" in "".join(
            fast.report.left_out
        )
        assert float((found - expected).abs().mean()) < (4e-3 if alone else 1e-4)
        assert alone or fast.report.method in ("stock", "sequential")


@pytest.mark.parametrize("late", [False, True], ids=["before the first call", "after it"])
@pytest.mark.parametrize("path", ["takeover", "drive"])
def test_a_hook_whose_count_no_variable_shows_is_found_by_calls_in_another_order(
    path: str, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "drive":
        drive(monkeypatch)
    pipe, strengths = tiny.stable_diffusion(), itertools.cycle([3.0] * 6 + [1.0] * (STEPS - 6))
    fast = srds_fast.compile(pipe, method="srds", strict=True)
    if late:
        latents(fast, **CALL)
    pipe.unet.mid_block.register_forward_hook(lambda module, given, found: found * next(strengths))
    with pytest.raises(srds_fast.UnsupportedPipeline, match=r"in another order differently \(a hook of mid_block"):
        latents(fast, **CALL)


def test_a_hook_that_is_hung_up_anew_for_every_call_brings_no_new_check() -> None:
    pipe = tiny.stable_diffusion()
    fast, checks = srds_fast.compile(pipe, method="srds"), []
    for _ in range(3):
        hook = pipe.unet.mid_block.register_forward_hook(lambda module, given, found: found * 0.5)
        latents(fast, **CALL)
        hook.remove()
        checks.append(fast.report.check_calls)
    assert checks[0] > 0
    assert checks[1:] == [0, 0]


def _nothing(module: Any, given: Any) -> None:
    if given:
        return


@pytest.mark.parametrize(
    ("hook", "watches"),
    [
        (_nothing, True),
        (lambda *given: [].append(given), True),
        (lambda module, given: module.seen.append(str(given)), True),
        (lambda module, given: setattr(module, "seen", 1), True),
        (lambda module, given, found: found.mul([].append(1) or 2), False),
        (lambda module, given, found: [].append(1) or 2 * found, False),
        (lambda module, given, found: found if module.training else None, False),
        (lambda module, given, found: torch.add(found, 1), False),
    ],
)
def test_hooks_that_only_watch_are_told_from_those_that_take_part(hook: Any, watches: bool) -> None:
    assert only_watches(hook) == watches


def test_a_hook_that_counts_calls_changes_nothing_of_how_a_call_runs() -> None:
    pipe, seen = tiny.stable_diffusion(), list[int]()
    pipe.unet.register_forward_pre_hook(lambda *given: seen.append(1))
    fast = srds_fast.compile(pipe, method="srds")
    latents(fast, **CALL)
    assert fast.report.fallback_reason is None
    assert len(seen) == fast.report.waves + fast.report.check_calls


def test_a_hook_that_writes_to_weights_is_an_error() -> None:
    """What they held before is not known, so the stock loop cannot follow."""
    pipe, made = tiny.stable_diffusion(), 0

    def write(module: Any, args: Any) -> None:
        nonlocal made
        made += 1
        if made == 9:
            nn.init.zeros_(module.conv_out.weight)

    fast = srds_fast.compile(pipe, method="srds")
    latents(fast, **CALL)
    pipe.unet.register_forward_pre_hook(write)
    with pytest.raises(srds_fast.UnsupportedPipeline, match=r"conv_out\.weight was written to in the call"):
        latents(fast, **CALL)


BETWEEN: dict[str, Callable[[nn.Sequential], Any]] = {
    "an equal attribute": lambda network: setattr(network, "sizes", [1, 2]),
    "a list": lambda network: network.sizes.append(3),
    "a hook": lambda network: network[1].register_forward_hook(lambda *given: None),
    "a weight": lambda network: network[0].weight.add_(1),
    "a submodule": lambda network: network.append(nn.ReLU()),
}


@pytest.mark.parametrize("change", BETWEEN.values(), ids=list(BETWEEN))
@torch.no_grad()
def test_what_networks_hold_is_looked_at_anew_where_a_call_finds_something_else(change: Callable[[Any], Any]) -> None:
    network, memory = nn.Sequential(nn.Linear(2, 2), nn.Dropout()), LoopMemory()
    network.sizes = [1, 2]
    held = memory.held_by([network])
    assert memory.held_by([network]) is held
    change(network)
    other = memory.held_by([network])
    assert other is not held
    assert memory.held_by([network]) is other
    assert memory.held_by([network, nn.ReLU()]) is not other
    memory.held_by([network])
    weight = weakref.ref(network[0].weight)
    del network, held, other
    gc.collect()
    assert weight() is None, "weights live no longer than their network"
