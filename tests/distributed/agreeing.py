"""Checks: what ranks were given, draw, decide and are asked is the same on all of them."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import torch
from calls import by_turns
from cancelling import Network
from diffusers import DDPMScheduler
from failing import Failing
from ranked import STEPS, apart, check, ended, latents, noise, pipeline, rank, sampled
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from unseeded import DrawsInItsLoop
from unseeded import unseeded as without_generator

import srds_fast
from srds_fast import clock
from srds_fast.engine import compiled
from srds_fast.engine.distributed.call import sharing
from srds_fast.engine.distributed.ranks import ranks_of
from srds_fast.planner.choose import choose
from srds_fast.planner.settings import Settings
from srds_fast.schedulers.private_draws import PrivateDraws


@check
def unseeded() -> Any:
    """Without a generator ranks draw what rank 0 draws; if their random state is the same, it goes on as in stock."""
    pipe, call = pipeline("stable_diffusion")
    fast = srds_fast.compile(pipe, method="srds", parallel="auto")
    torch.manual_seed(rank())
    different = latents(fast, call, None)
    torch.manual_seed(7)
    alike = latents(fast, call, None)
    after = torch.randn(1)
    torch.manual_seed(7)
    stock = latents(pipe, call, None)
    return [different.flatten()[:8].tolist(), apart(alike, stock), bool(after == torch.randn(1))]


@check
def draws_around_networks() -> Any:
    """Whether the last network call of each kind of call is made as without contexts for draws."""
    pipe, call = pipeline("stable_diffusion")
    under: list[bool] = []

    def look(*_: Any) -> None:
        under.append(any(isinstance(each, PrivateDraws) for each in _get_current_function_mode_stack()))

    found = {}
    handle = pipe.unet.register_forward_pre_hook(look)
    try:
        for path, how in {"takeover": {}, "drive": by_turns(pipe)}.items():
            fast = srds_fast.compile(pipe, method="srds", parallel="auto")
            with torch.random.fork_rng():
                torch.manual_seed(100 + rank())
                before = torch.get_rng_state()
                latents(fast, {**call, **how}, seed=None)
                stays = torch.equal(torch.get_rng_state(), before)
            found[path] = [fast.report.path, under[-1], stays or rank() == 0]
            under.clear()
    finally:
        handle.remove()
    return found


@check
def unseeded_loops() -> Any:
    """A loop that draws, and so goes over to its own way in the middle of a call."""
    pipe, found = without_generator(DrawsInItsLoop), []
    for seed in (rank(), 7):
        fast = srds_fast.compile(pipe, parallel="auto")
        torch.manual_seed(seed)
        sample, after = fast()[0], torch.get_rng_state()
        torch.manual_seed(seed if seed == 7 else 0)
        stock = pipe()[0]
        found.append([apart(sample, stock), bool(torch.equal(after, torch.get_rng_state()))])
        assert "draws random numbers" in fast.report.fallback_reason
        found[-1].append(fast.report.ranks)
    return found


@check
def draws_of_callbacks() -> Any:
    """A callback that adds noise without a generator, on ranks whose global generators stand elsewhere."""
    pipe, call = pipeline("stable_diffusion")
    call["num_inference_steps"] = 6

    def disturb(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
        return {"latents": tensors["latents"] + 0.1 * torch.randn(tensors["latents"].shape)} if step == 2 else {}

    found = []
    for method in ("sequential", "srds"):
        fast = srds_fast.compile(pipe, method=method, exact=True, parallel="auto")
        torch.manual_seed(rank())
        sample = latents(fast, {**call, "callback_on_step_end": disturb})
        torch.manual_seed(0)
        found.append(apart(sample, latents(pipe, {**call, "callback_on_step_end": disturb})))
    return found


@check
def interrupted() -> Any:
    """`_interrupt` set on rank 1 alone, in callbacks of each kind of loop."""
    pipe, call = pipeline("stable_diffusion")
    call["num_inference_steps"] = 6

    def stock(pipe: Any, step: int, *_: Any) -> Any:
        pipe._interrupt = step == 3
        return {}

    expected, found = latents(pipe, {**call, "callback_on_step_end": stock}), {}
    for name in ("recorded calls", "recorded calls in order", "own turns", "own turns in order", "own loop"):
        method = "sequential" if name.endswith("in order") else "srds"
        fast = srds_fast.compile(pipe, method=method, parallel="auto")
        steps = []

        def stop(step: int, target: Any) -> Any:
            steps.append(step)  # noqa: B023
            if step == 3 and rank() == 1:
                target._interrupt = True
            return {}

        on_step = {"callback_on_step_end": lambda pipe, step, *_: stop(step, pipe)}
        if name.startswith("own turns"):
            on_step = by_turns(fast) | on_step
        if name == "own loop":
            on_step = {"callback": lambda step, *_: stop(step, fast), "callback_steps": 1}  # noqa: B023
        sample = latents(fast, {**call, **on_step})
        found[name] = [steps, apart(sample, expected), sample.flatten()[:4].tolist(), fast.report.ranks]
        after = latents(fast, call)
        found[name].append(apart(after, latents(pipe, call)))
    return found


@check
def compiled_code() -> Any:
    """Compiled code is faster on rank 0, and slower on the others: calls of it in each call of the pipeline."""
    pipe, call = pipeline("stable_diffusion")

    class Compiled:
        failure, calls = None, 0

        def __init__(self, network: nn.Module, mode: str) -> None:
            self.network = network

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            Compiled.calls += 1
            if rank() > 0:
                time.sleep(0.02)
            return self.network.forward(*args, **kwargs)

    make, compiled.compiled = compiled.compiled, Compiled
    forward_hook = pipe.unet.register_forward_pre_hook(lambda *_: time.sleep(0.02) if rank() == 0 else None)
    fast, counts = srds_fast.compile(pipe, method="srds", torch_compile="auto", parallel="auto"), []
    for _ in range(2):
        Compiled.calls = 0
        latents(fast, call)
        counts.append(Compiled.calls)
    forward_hook.remove()
    compiled.compiled = make
    return counts


@check
def at_another_place() -> Any:
    """Ranks that agree on different things at the same time; and on the same ones after that."""
    with sharing(ranks_of("auto")) as call:
        assert call is not None
        same = clock.agreed(float(rank()), "a number")

    def differ() -> None:
        with sharing(ranks_of("auto")):
            clock.agreed(1.0, f"number {min(rank(), 1)}")

    return [same, ended(differ), ended(lambda: sampled(parallel="auto"))]


@check
def mismatches() -> Any:
    found = {
        "starting noise": ended(lambda: sampled(x=noise(rank()), parallel="auto")),
        "number of steps": ended(lambda: sampled(steps=STEPS + rank(), parallel="auto")),
        "setting": ended(lambda: sampled(method=("srds", "collocation")[rank() % 2], parallel="auto")),
        "generator": ended(
            lambda: sampled(scheduler=DDPMScheduler(), generator=torch.Generator().manual_seed(rank()), parallel="auto")
        ),
    }
    network = nn.Linear(8, 8, dtype=torch.float64).requires_grad_(False)
    for each in network.parameters():
        nn.init.constant_(each, 0.1 if rank() == 0 else 0.1000001)
    found["network"] = ended(lambda: sampled(lambda x, t: network(x), parallel="auto"))
    pipe, call = pipeline("stable_diffusion")
    fast = srds_fast.compile(pipe, method="srds", parallel="auto")
    found["prompt"] = ended(lambda: latents(fast, {**call, "prompt": ["a fox", "a dog"][rank() % 2]}))
    found["generator of a pipeline"] = ended(lambda: latents(fast, call, seed=rank()))
    found["after it"] = ended(lambda: latents(fast, call))
    return found


@check
def cancelled() -> Any:
    """`cancel` set on one rank in the middle; `_interrupt` on one rank."""
    event = threading.Event()
    network = Failing(lambda m: (event.set(), m)[1], 4, 1)
    waves: list[int] = []

    def watched() -> None:
        try:
            sampled(network, parallel="auto", cancel=event)
        except srds_fast.Cancelled as error:
            waves.append(error.waves)
            raise

    ends = ended(watched)
    pipe, call = pipeline("stable_diffusion")
    fast = srds_fast.compile(pipe, method="srds", parallel="auto")
    latents(fast, call)
    calls = 0

    def interrupt(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3 and rank() == 1:
            fast._interrupt = True

    handle = pipe.unet.register_forward_pre_hook(interrupt)
    found = latents(fast, call)
    handle.remove()
    return [ends, *waves, fast.report.interrupted, fast.report.waves, found.flatten()[:4].tolist()]


@check
def cancelled_where_no_rows_are_shared() -> Any:
    """`cancel` set on rank 1 at its fourth step of forty: how the call ends, network calls, and the next call."""
    event, steps = threading.Event(), 40
    plan = replace(choose(steps, Settings(method="sequential")), replicated=True)
    network = Failing(lambda m: (event.set(), m)[1], 4, 1)
    ends = ended(lambda: sampled(network, plan=plan, steps=steps, parallel="auto", cancel=event))
    expected = sampled(method="sequential", steps=steps).sample
    return [ends, network.calls, apart(sampled(plan=plan, steps=steps, parallel="auto").sample, expected)]


@check
def cancelled_before() -> Any:
    """`cancel` set on one rank before the call; the next call of all."""
    event = threading.Event()
    if rank() == 1:
        event.set()
    first = ended(lambda: sampled(parallel="auto", cancel=event))
    alone = sampled(parallel=None, observer=lambda seen: None)
    return [first, apart(sampled(parallel="auto").sample, alone.sample)]


@check
def one_call_at_a_time() -> Any:
    """A second thread that makes a call with the same ranks is told so, and the first call is right."""
    begun, may_end = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        may_end.wait()

    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(sampled(Network(seen=wait), parallel="auto").sample))
    thread.start()
    begun.wait()
    second = ended(lambda: sampled(parallel="auto"))
    may_end.set()
    thread.join()
    return [second, apart(found[0], sampled().sample)]
