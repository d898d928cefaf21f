"""Latency of whole calls: the engines side by side, with the stock loop and with what the network alone takes.

    python bench/engines.py                              # every case, 25 and 50 steps
    python bench/engines.py --cases digits policy --steps 25
    python bench/engines.py --json engines.json

Each row is a loop: stock diffusers; ours, sequential and SRDS with a fixed number of iterations, run eagerly and
replayed from a graph of the loop or of each width of a wave. All loops of a case are called in turn in one process,
after calls that warm up and record. First comes how many times faster than stock the median call is, then its overhead:
its seconds over the sum, for all its waves, of c(rows), the time of one network call of so many rows replayed from a
graph, measured in the same run. An overhead of 1 leaves nothing to gain around the network.

No text is encoded and no image decoded. Weights are random but for the bundled digits pipeline; how well SRDS converges
is not looked at here. On the CPU networks are small, graphs are tapes, c(rows) is of eager calls, and what is measured
means nothing but that it runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

import srds_fast
from srds_fast import zoo
from srds_fast.cli.environment import environment
from srds_fast.methods import Collocation
from srds_fast.plan import Plan, Settings, choose

sys.path.insert(0, str(Path(__file__).parent))
import rows
import timing

DEVICE, SMALL = rows.DEVICE, rows.SMALL
STEPS = (25, 50)
ENGINES = ("eager", "graph", "wave-graphs")
# no change falls below this tolerance: every engine runs the same waves
METHODS: dict[str, dict[str, Any]] = {
    "sequential": {"method": "sequential"},
    "srds": {"method": "srds", "tolerance": 1e-30, "max_iterations": 2},
    "collocation": {"method": Collocation(num_nodes=24), "tolerance": 1e-30, "max_iterations": 8},
}
SD_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}


class Ran(NamedTuple):
    """What a loop reports of its last call.

    Attributes:
        engine: that ran its waves.
        reason: why it was no faster one, or None.
        waves, rows: it ran.
    """

    engine: str
    reason: str | None
    waves: int
    rows: int


class Loop(NamedTuple):
    """One way to make the call.

    Attributes:
        call: makes it.
        ran: what the last one was.
        widths: rows of each of its waves.
    """

    call: Callable[[], object]
    ran: Callable[[], Ran]
    widths: list[int]


class Case(NamedTuple):
    """A sampler, ready to be called.

    Attributes:
        network: what it calls.
        stock: number of steps -> the stock loop.
        ours: number of steps, settings -> a loop of ours.
    """

    network: rows.Case
    stock: Callable[[int], Loop]
    ours: Callable[[int, dict[str, Any]], Loop]


def _widths(plan: Plan) -> list[int]:
    return [len(positions) for positions in plan.program().positions]


def _stock(call: Callable[[], object], steps: int) -> Loop:
    return Loop(call, lambda: Ran("stock", None, steps, steps), [1] * steps)


def _ran(report: Any) -> Ran:
    return Ran(report.engine, report.engine_reason, report.waves, report.rows)


def _pipeline(network: rows.Case, pipe: Any, text_length: int) -> Case:
    """A pipeline with guidance, given its text embedded and asked for latents."""
    pipe.to(DEVICE)
    pipe.set_progress_bar_config(disable=True)
    text = torch.randn(2, text_length, pipe.unet.config.cross_attention_dim).to(DEVICE, network.dtype)
    size = 8 * pipe.unet.config.sample_size if pipe.vae is None else None
    arguments = {
        "prompt_embeds": text[:1],
        "negative_prompt_embeds": text[1:],
        "guidance_scale": 5.0,
        "height": size,
        "width": size,
        "output_type": "latent",
    }

    def called(each: Any, steps: int) -> Callable[[], object]:
        return lambda: each(**arguments, num_inference_steps=steps, generator=torch.Generator(DEVICE).manual_seed(0))

    def ours(steps: int, settings: dict[str, Any]) -> Loop:
        fast = srds_fast.compile(pipe, **{"method": "srds", **settings})
        plan = fast.plan_for(**arguments, num_inference_steps=steps)
        return Loop(called(fast, steps), lambda: _ran(fast.report), _widths(plan))

    return Case(network, lambda steps: _stock(called(pipe, steps), steps), ours)


def digits() -> Case:
    """The bundled pipeline, latents of 4 x 8 x 8, float32."""
    network, pipe = rows.digits(), zoo.load("digits")
    pipe.unet = network.network
    return _pipeline(network, pipe, pipe.tokenizer.model_max_length)


def stable_diffusion() -> Case:
    """A pipeline of Stable Diffusion 1.5's size at 512 x 512, float16; its networks but for the UNet are left out."""
    network = rows.stable_diffusion()
    unet: Any = network.network
    if SMALL:
        unet.register_to_config(sample_size=16)
    pipe = StableDiffusionPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=DDIMScheduler(**SD_BETAS, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _pipeline(network, pipe, 77)


def policy() -> Case:
    """A robot policy's 1-D network, 16 actions of 7 dimensions, through `sample`; stock is the scheduler's own loop."""
    network = rows.policy()
    x, observation = torch.randn(1, 7, 16).to(DEVICE), torch.randn(1, 64).to(DEVICE)
    scheduler = DDIMScheduler(clip_sample=False)

    @torch.no_grad()
    def denoiser_loop(steps: int) -> Tensor:
        scheduler.set_timesteps(steps, device=DEVICE)
        state = x
        for t in scheduler.timesteps:
            state = scheduler.step(network.network(state, t[None], observation), t, state).prev_sample
        return state

    def ours(steps: int, settings: dict[str, Any]) -> Loop:
        engine = settings["engine"]
        kept = {} if engine == "eager" else {"graphs": srds_fast.Graphs()}
        reports: list[Any] = []

        @torch.no_grad()
        def call() -> None:
            found = srds_fast.sample(
                network.network, x, scheduler, steps, cond={"observation": observation}, **settings, **kept
            )
            reports[:] = [found.report]

        return Loop(call, lambda: _ran(reports[0]), _widths(choose(steps, Settings(**settings))))

    return Case(network, lambda steps: _stock(lambda: denoiser_loop(steps), steps), ours)


CASES: dict[str, Callable[[], Case]] = {"digits": digits, "policy": policy, "sd15": stable_diffusion}


def _seconds(call: Callable[[], object]) -> float:
    if not SMALL:
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if not SMALL:
        torch.cuda.synchronize()
    return time.perf_counter() - started


@torch.no_grad()
def _network_seconds(network: rows.Case, widths: list[int]) -> dict[int, float]:
    """c(rows) for these widths."""
    if SMALL:
        return {width: timing.called_seconds(network.call(width), DEVICE, calls=1) for width in widths}
    return {width: timing.gpu_seconds(network.call(width), replays=10, calls=1) for width in widths}


def measured(name: str, case: Case, steps: int, repeat: int) -> list[dict[str, Any]]:
    """What every loop of a case takes; stock comes first."""
    loops = {("stock", "stock"): case.stock(steps)}
    for method, settings in METHODS.items():
        for engine in ENGINES:
            loops[method, engine] = case.ours(steps, {**settings, "engine": engine})
    for loop in loops.values():
        loop.call()  # records
        loop.call()
    times: dict[tuple[str, str], list[float]] = {key: [] for key in loops}
    for _ in range(repeat):
        for key, loop in loops.items():
            times[key].append(_seconds(loop.call))
    alone = _network_seconds(case.network, sorted({width for loop in loops.values() for width in loop.widths}))
    found: list[dict[str, Any]] = []
    for (method, engine), loop in loops.items():
        seconds, network = statistics.median(times[method, engine]), sum(alone[width] for width in loop.widths)
        ran = loop.ran()
        assert (ran.waves, ran.rows) == (len(loop.widths), sum(loop.widths)), "it ran other waves than planned"
        found.append(
            {
                "case": name,
                "steps": steps,
                "method": method,
                "asked": engine,
                **ran._asdict(),
                "seconds": seconds,
                "fastest": min(times[method, engine]),
                "slowest": max(times[method, engine]),
                "over_stock": statistics.median(times["stock", "stock"]) / seconds,
                "network_seconds": network,
                "overhead": seconds / network,
            }
        )
    return found


def main(arguments: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--steps", nargs="*", type=int, default=[6] if SMALL else list(STEPS))
    parser.add_argument("--repeat", type=int, default=1 if SMALL else 7, help="calls of every loop that are timed")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    results: list[dict[str, Any]] = []
    print(f"{'':23}{'x stock':>8}{'overhead':>10}{'ms':>9}{'fastest, slowest':>20}{'waves':>7}{'rows':>6}  engine")
    for name in options.cases:
        torch.manual_seed(0)
        case = CASES[name]()
        for steps in options.steps:
            rows_of_case = measured(name, case, steps, options.repeat)
            results += rows_of_case
            print(f"{name}, {steps} steps")
            for row in rows_of_case:
                label = "stock" if row["method"] == "stock" else f"{row['method']} {row['asked']}"
                spread = f"{1e3 * row['fastest']:.1f}, {1e3 * row['slowest']:.1f}"
                print(
                    f"{label:>23}{row['over_stock']:7.2f}x{row['overhead']:10.2f}{1e3 * row['seconds']:9.1f}"
                    f"{spread:>20}{row['waves']:7}{row['rows']:6}  {row['engine']}"
                )
            for reason in dict.fromkeys(row["reason"] for row in rows_of_case if row["reason"]):
                print(f"  not the engine asked for: {reason}")
            sys.stdout.flush()
            if options.json is not None:  # after each, so that a run cut short leaves what it has
                options.json.write_text(json.dumps({"environment": environment(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
