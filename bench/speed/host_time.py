"""What a loop costs: host time per wave outside the network, against the stock loop's own host time per step.

    python -m bench.speed.host_time                     # every pipeline; "call": a whole call over a stock one

The network returns zeros at once, a latent is 4 x 4, text is given embedded: what is left is what a loop does on the
host. A turn of a loop is the time from the return of one network call to the start of the next. The stock loop turns
once a step, ours once a wave, which under SRDS holds several rows, jumps and corrections. "called back": the call has
a callback. "by turns": the callback is shown what each step makes anew, so the pipeline's own loop makes a turn or two
for each row; the other waves are generated. The last columns are of the first call, which finds out how the loop works.

All loops are called in turn in one process. Of every turn and of every call the shortest of all repetitions counts, and
of turns the mean; the first turn, in which a driven loop begins the run, is left out. Times are reported, never gated;
operations are counted by tests/bench/test_host_time.py.
"""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable
from statistics import mean
from typing import Any

import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from diffusers.models.unets.unet_2d import UNet2DOutput

import srds_fast
from bench.command import parser
from bench.workloads import pipelines
from bench.workloads.methods import SRDS_TWICE
from bench.workloads.pipelines import SD_DDIM, SD_EULER, network_of
from srds_fast.cli.output import show_table
from srds_fast.telemetry.report import Report

STEPS = 100
# all but Flux and DDIM run with guidance; latents of 4 x 4
_SIZE, _FLUX_SIZE = {"height": 32, "width": 32}, {"height": 64, "width": 64}
PIPELINES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "SD DDIM": (pipelines.stable_diffusion, _SIZE),
    "SD Euler": (lambda: pipelines.stable_diffusion(scheduler=EulerDiscreteScheduler(**SD_EULER)), _SIZE),
    "SDXL DDIM": (lambda: pipelines.stable_diffusion_xl(scheduler=DDIMScheduler(**SD_DDIM)), _SIZE),
    "SDXL Euler": (pipelines.stable_diffusion_xl, _SIZE),
    "SD3 flow": (pipelines.stable_diffusion_3, _SIZE),
    "Flux flow": (pipelines.flux, _FLUX_SIZE),
    "DDIM pixels": (pipelines.ddim_pixels, {}),
}
METHODS: dict[str, dict[str, Any]] = {
    "sequential": {"method": "sequential"},
    "srds": SRDS_TWICE,
    "srds plain": {**SRDS_TWICE, "pipelined": False},
}
CALLED_BACK, BY_TURNS = "srds called back", "srds by turns"
LOOPS = ("stock", *METHODS)


class Turns:
    """Notes what a clock says when each turn of the loop around a network begins and ends."""

    def __init__(self, network: torch.nn.Module, clock: Callable[[], Any]) -> None:
        self.clock = clock
        self._noted: list[Any] = []

        def note(*_: Any) -> None:
            self._noted.append(self.clock())

        network.register_forward_pre_hook(note)
        network.register_forward_hook(note)

    def take(self) -> list[tuple[Any, Any]]:
        """The turns so far, which are then forgotten: each from the end of a network call to the start of the next."""
        noted, self._noted = self._noted, []
        return list(zip(noted[1:-1:2], noted[2::2], strict=True))


def return_zeros(network: Any) -> None:
    """Make a network return zeros at once."""
    zeros = functools.cache(torch.zeros)

    @functools.wraps(network.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        states = args[0] if args else kwargs["sample" if "sample" in kwargs else "hidden_states"]
        output = zeros(states.shape, dtype=states.dtype, device=states.device)
        return (output,) if kwargs.get("return_dict") is False else UNet2DOutput(sample=output)

    network.forward = forward


def _look(_pipe: Any, _step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
    """A callback that changes nothing."""
    return {}


class Case:
    """A pipeline of `PIPELINES` whose network returns zeros.

    Attributes:
        arguments: of every call.
        loops: "stock", the pipeline itself, one compiled for each method; CALLED_BACK and BY_TURNS if it takes a
            callback.
        turns: of the loops.
        first: the reports of their first calls.
    """

    def __init__(self, name: str, steps: int = STEPS) -> None:
        make, size = PIPELINES[name]
        pipe = make()
        pipe.set_progress_bar_config(disable=True)
        self.arguments = {**size, "output_type": "pt", "num_inference_steps": steps}
        if name != "DDIM pixels":
            text = {key: each.cpu() for key, each in pipelines.embedded_text(pipe).items()}
            self.arguments |= {**text, "output_type": "latent"}
        return_zeros(network_of(pipe))
        self.turns = Turns(network_of(pipe), time.perf_counter)
        self.loops = {"stock": pipe} | {method: srds_fast.compile(pipe, **how) for method, how in METHODS.items()}
        if "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters:
            self.loops |= {loop: srds_fast.compile(pipe, **SRDS_TWICE) for loop in (CALLED_BACK, BY_TURNS)}
            self.loops[BY_TURNS]._callback_tensor_inputs = ["latents", "noise_pred"]
        self.first: dict[str, Report] = {}
        for loop in list(self.loops)[1:]:
            self.call(loop)  # a first call also checks the network
            self.first[loop] = self.loops[loop].report

    def call(self, loop: str) -> list[tuple[Any, Any]]:
        """Call a loop, and return its turns."""
        more: dict[str, Any] = {"callback_on_step_end": _look} if loop in (CALLED_BACK, BY_TURNS) else {}
        if loop == BY_TURNS:
            more["callback_on_step_end_tensor_inputs"] = ["latents", "noise_pred"]
        self.loops[loop](**self.arguments, **more, generator=torch.Generator().manual_seed(0))
        return self.turns.take()

    def measured(self, times: int) -> dict[str, tuple[float, float]]:
        """Loop -> seconds of a turn and of a whole call, of so many calls of every loop, in turn."""
        shortest: dict[str, list[float]] = {}
        for _ in range(times):
            for loop in self.loops:
                started = time.perf_counter()
                turns = [stop - start for start, stop in self.call(loop)]
                found = [time.perf_counter() - started, *turns]
                shortest[loop] = [*map(min, found, shortest.get(loop, found))]
        return {loop: (mean(turns), call) for loop, (call, _, *turns) in shortest.items()}


def main(arguments: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    found = parser("bench.speed.host_time", __doc__, json=False)
    found.add_argument("--repeat", type=int, default=30, help="calls of every loop")
    found.add_argument("--only", nargs="*", default=list(PIPELINES), choices=list(PIPELINES))
    found.add_argument("--steps", type=int, default=STEPS)
    options = found.parse_args(arguments)
    for name in options.only:
        case = Case(name, options.steps)
        times = case.measured(options.repeat)
        step, stock = times["stock"]
        rows: list[dict[str, object]] = []
        for method, first in case.first.items():
            (wave, call), report = times[method], case.loops[method].report
            over = {"loop": method, "wave/step": wave / step, "call": call / stock}
            seconds = {"us a wave": f"{1e6 * wave:.0f}", "us a step": f"{1e6 * step:.0f}"}
            found = first.rehearsal_calls + first.check_calls, first.rehearsal_seconds + first.check_seconds
            rehearsed = {"first calls": found[0], "first ms": f"{1e3 * found[1]:.0f}"}
            rows.append({**over, **seconds, **rehearsed, "rows": report.rows / report.waves})
        show_table(rows, text=["loop"], title=f"\n{name}")


if __name__ == "__main__":
    main()
