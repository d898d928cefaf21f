"""What each rank of a test does, under torchrun: it runs checks and writes what they found as JSON.

torchrun --nproc-per-node 2 tests/distributed/worker.py FOLDER [CHECK ...]
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import diffusers
import tiny
import torch
import torch.distributed as dist
from cancelling import Network
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler
from torch import Tensor, nn

import srds_fast
from srds_fast.solvers.registry import BY_NAME

STEPS = 12
FULL = os.environ.get("WORLD_SIZE") != "2"  # the exhaustive tests have more ranks
CHECKS: dict[str, Callable[[], Any]] = {}
# checks after which the group is of no use
LAST: dict[str, Callable[[], Any]] = {}


def check(function: Callable[[], Any]) -> Callable[[], Any]:
    CHECKS[function.__name__] = function
    return function


def last(function: Callable[[], Any]) -> Callable[[], Any]:
    LAST[function.__name__] = function
    return function


def rank() -> int:
    return dist.get_rank()


def ended(call: Callable[[], Any]) -> list[str]:
    """The class and the message of what a call ends in; empty if it returns."""
    try:
        call()
    except BaseException as error:
        return [type(error).__name__, str(error)]
    return []


def noise(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 8, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def sampled(network: Any = None, x: Tensor | None = None, **settings: Any) -> Any:
    settings.setdefault("scheduler", DDIMScheduler(clip_sample=False))
    scheduler, steps = settings.pop("scheduler"), settings.pop("steps", STEPS)
    network = Network() if network is None else network
    return srds_fast.sample(network, noise() if x is None else x, scheduler, steps, **settings)


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


# ---- the same answer


@check
def every_method() -> Any:
    """Difference to one process, in float64; waves; units."""
    found = {}
    for name in BY_NAME:
        alone, together = (sampled(method=name, parallel=parallel) for parallel in (None, "auto"))
        report = together.report
        found[name] = {
            "apart": apart(together.sample, alone.sample),
            "waves": [report.waves, alone.report.waves],
            "ranks": report.ranks,
            "units": report.rank_units,
        }
    return found


@check
def noisy_steps() -> Any:
    found = {}
    for scheduler in (DDPMScheduler(clip_sample=False), EulerAncestralDiscreteScheduler()):
        x = noise() * scheduler.init_noise_sigma
        results, states = [], []
        for parallel in (None, "auto"):
            generator = torch.Generator().manual_seed(5)
            results.append(sampled(x=x, scheduler=scheduler, generator=generator, parallel=parallel).sample)
            states.append(generator.get_state())
        found[type(scheduler).__name__] = [apart(results[1], results[0]), torch.equal(*states)]
    return found


@check
def conditions() -> Any:
    network = nn.Linear(8, 8, dtype=torch.float64).requires_grad_(False)
    for each in network.parameters():
        nn.init.constant_(each, 0.1)

    def denoiser(x: Tensor, t: Tensor, goal: Tensor) -> Tensor:
        return torch.tanh(network(x) - goal) * (t[:, None] / 1000)

    cond = {"goal": noise(3)}
    alone, together = (
        srds_fast.sample(denoiser, noise(), DDIMScheduler(), STEPS, cond=cond, parallel=parallel)
        for parallel in (None, "auto")
    )
    return apart(together.sample, alone.sample)


@check
def the_planner() -> Any:
    """Calls of "auto": the same plan on all ranks, whatever their clocks say."""
    network = Network(seen=lambda: time.sleep(0.001 * (1 + 3 * rank())))
    reports = [sampled(network, method="auto", parallel="auto").report for _ in range(4)]
    return [[each.method, each.plan_state, each.waves, each.rows, each.plan_reason] for each in reports]


def pipeline(name: str) -> tuple[Any, dict[str, Any]]:
    make, call = tiny.PIPELINES[name]
    pipe = make()
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.double()
    pipe.set_progress_bar_config(disable=True)
    return pipe, {**call, "num_inference_steps": STEPS, "output_type": "latent"}


def latents(pipe: Any, call: dict[str, Any], seed: int | None = 3) -> Tensor:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    found: Tensor = pipe(**call, **({} if generator is None else {"generator": generator})).images
    return found


@check
def pipelines() -> Any:
    """Difference to the stock call; the path; units of this rank, of all, of the busiest."""
    found = {}
    for name, guided in PIPELINES.items():
        pipe, call = pipeline(name)
        call |= guided
        stock = latents(pipe, call)
        for label, settings in SETTINGS.items():
            fast = srds_fast.compile(pipe, parallel="auto", **settings)
            given = {**call, "callback_on_step_end": lambda *_: {}} if label == "driven" else call
            difference = apart(latents(fast, given), stock)
            found[f"{name}, {label}"] = [difference, fast.report.path, fast.report.rank_units, fast.report.waves]
    return found


PIPELINES: dict[str, dict[str, Any]] = {
    "stable_diffusion": {},
    "stable_diffusion_controlnet": {},
    "flux": {"true_cfg_scale": 2.0, "negative_prompt": "a dog"},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "sequential": {"method": "sequential"},
    "srds, exact": {"method": "srds", "exact": True},
    "driven": {"method": "collocation", "exact": True},
}


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


# ---- different on a rank


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


# ---- failures


class Failing(Network):
    """Does something to the output of a network call with a number, on one rank."""

    def __init__(self, act: Callable[[Tensor], Any], at: int, on: int) -> None:
        super().__init__()
        self.act, self.at, self.on, self.calls = act, at, on, 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        m = super().forward(x, t)
        return self.act(m) if (self.calls, rank()) == (self.at, self.on) else m


def _raised(error: BaseException) -> Callable[[Tensor], Any]:
    def act(m: Tensor) -> Any:
        raise error

    return act


FAULTS: dict[str, Callable[[Tensor], Any]] = {
    "exception": _raised(ValueError("broken")),
    "interrupt": _raised(KeyboardInterrupt()),
    "nan": lambda m: m * float("nan"),
    "shape": lambda m: m[:, :-1],
    "none": lambda m: None,
    "dtype": lambda m: m.float(),
    "memory": _raised(torch.OutOfMemoryError("out of memory")),
}


@check
def faults() -> Any:
    """Of each fault, at some waves and on each rank: how the call ended, if the sample was right, the next call."""
    found: dict[str, list[Any]] = {}
    expected = {method: sampled(method=method).sample for method in ("srds", "sequential")}
    for name, act in FAULTS.items():
        for method in METHODS:
            for at in PLACES:
                for on in range(dist.get_world_size()):
                    network = Failing(act, at, on)
                    results: list[Any] = []
                    ends = ended(lambda: results.append(sampled(network, method=method, parallel="auto")))  # noqa: B023
                    # one that fell back is the sequential sample
                    right = [min(apart(each.sample, one) for one in expected.values()) for each in results]
                    after = apart(sampled(network, method=method, parallel="auto").sample, expected[method])
                    found.setdefault(name, []).append([ends, right, after])
    return found


METHODS = ("srds", "sequential") if FULL else ("srds",)
PLACES = (1, 4)


class FailsOnce:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, *_: Any) -> Any:
        if rank() == 1:
            raise self.error
        return {}


@check
def callbacks() -> Any:
    """An error in an observer, in `on_wave` and in a callback of one rank alone; a stream that one rank leaves."""
    pipe, call = pipeline("stable_diffusion")
    fast = srds_fast.compile(pipe, method="srds", parallel="auto")
    broken = FailsOnce(ValueError("broken"))

    def left() -> None:
        for _ in fast.stream(**{**call, "generator": torch.Generator().manual_seed(3)}):
            if rank() == 1:
                break

    def watched() -> None:
        with srds_fast.using(on_wave=broken):
            latents(fast, call)

    return {
        "observer": ended(lambda: sampled(observer=broken, parallel="auto")),
        "on_wave": ended(watched),
        "callback": ended(lambda: latents(fast, {**call, "callback_on_step_end": broken})),
        "stream": ended(left),
        "after them": ended(lambda: latents(fast, call)),
    }


@check
def cancelled() -> Any:
    """`cancel` set on one rank in the middle; `_interrupt` on one rank."""
    event = threading.Event()
    network = Failing(lambda m: (event.set(), m)[1], 4, 1)
    ends = ended(lambda: sampled(network, parallel="auto", cancel=event))
    after = network.calls
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
    return [ends, after, fast.report.interrupted, fast.report.waves, found.flatten()[:4].tolist()]


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


@check
def groups() -> Any:
    """Ways to name the ranks."""
    mesh = dist.init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("ring", "time"))
    return {
        "group": sampled(parallel=dist.group.WORLD).report.ranks,
        "mesh": sampled(parallel=mesh).report.ranks,
        "none": sampled(parallel=None).report.ranks,
        "other": ended(lambda: sampled(parallel="all")),
        "unnamed": ended(lambda: sampled(parallel=dist.init_device_mesh("cpu", (1, dist.get_world_size())))),
    }


@last
def every_method_on_gpus() -> Any:
    """Difference to one process, over nccl, a device for each rank."""
    device = torch.device("cuda", rank())
    torch.cuda.set_device(device)
    dist.destroy_process_group()
    dist.init_process_group("nccl", device_id=device)
    network = nn.Linear(8, 8).requires_grad_(False).to(device)
    for each in network.parameters():
        nn.init.constant_(each, 0.1)
    x = noise(dtype=torch.float32).to(device)
    found = {}
    for name in BY_NAME:
        alone, together = (sampled(lambda x, t: network(x), x, method=name, parallel=each) for each in (None, "auto"))
        found[name] = apart(together.sample, alone.sample)
    return found


# ---- a rank is lost


@last
def killed() -> Any:
    """The other ranks; the one that is killed writes nothing."""

    def die(m: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        return m

    found = ended(lambda: sampled(Failing(die, 4, 1), parallel="auto"))
    return [found, ended(lambda: sampled(parallel="auto"))]


@last
def asleep() -> Any:
    """One rank takes longer than the group's timeout."""
    found = ended(lambda: sampled(Failing(lambda m: (time.sleep(6), m)[1], 4, 1), parallel="auto"))
    return [found, ended(lambda: sampled(parallel="auto"))]


@contextmanager
def group(timeout: float) -> Iterator[None]:
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
    try:
        yield
    finally:
        dist.destroy_process_group()


def main(folder: str, *names: str) -> None:
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    with group(3 if set(names) & LAST.keys() else 120):
        found = {}
        for name in names or CHECKS:
            try:
                found[name] = {**CHECKS, **LAST}[name]()
            except Exception:
                found[name] = traceback.format_exc()
        (Path(folder) / f"{rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
