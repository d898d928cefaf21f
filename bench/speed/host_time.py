"""What a loop costs: host time per wave outside the network, against the stock loop's own host time per step.

    python -m bench.speed.host_time                     # every pipeline; "call": a whole call over a stock one

The network returns zeros at once, a latent is 4 x 4, text is given embedded: what is left is what a loop does on the
host. A turn of a loop is the time from the return of one network call to the start of the next. The stock loop turns
once a step, with one row; ours turns once a wave, which under SRDS holds several rows, jumps and corrections. A ratio
compares one wave with one step; it does not say how many there are of each.

All loops of a pipeline are called in turn in one process. Of every turn, and of every call, the shortest of all
repetitions counts, of a call the mean of its turns. The first turn is left out: a loop that is driven begins the run in
it. Times are reported, never gated; operations are counted by tests/bench/test_host_time.py.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

import srds_fast
from bench.command import Table, parser
from bench.workloads import pipelines
from bench.workloads.methods import NEVER
from bench.workloads.pipelines import SD_DDIM, SD_EULER

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
_TWO = {"method": "srds", "tolerance": NEVER, "max_iterations": 2}
METHODS: dict[str, dict[str, Any]] = {
    "sequential": {"method": "sequential"},
    "srds": _TWO,
    "srds plain": {**_TWO, "pipelined": False},
}
LOOPS = ("stock", *METHODS)
Turns = list[tuple[float, float]]


class NullNetwork:
    """Makes a network return zeros at once, and notes when each turn of the loop around it begins and ends.

    Attributes:
        clock: what is noted, seconds if not replaced.
        turns: since the last `take`.
    """

    def __init__(self, network: Any) -> None:
        self.clock: Callable[[], float] = time.perf_counter
        self.turns: Turns = []
        self._returned: float | None = None
        outputs: dict[torch.Size, torch.Tensor] = {}

        @functools.wraps(network.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._returned is not None:
                self.turns.append((self._returned, self.clock()))
            states = args[0] if args else kwargs["sample" if "sample" in kwargs else "hidden_states"]
            if states.shape not in outputs:
                outputs[states.shape] = torch.zeros_like(states)
            output = outputs[states.shape]
            result = (output,) if kwargs.get("return_dict") is False else _Output(output)
            self._returned = self.clock()
            return result

        network.forward = forward

    def take(self) -> Turns:
        """The turns so far, which are then forgotten."""
        turns, self.turns, self._returned = self.turns, [], None
        return turns


class _Output:
    def __init__(self, sample: torch.Tensor) -> None:
        self.sample = sample


class Case:
    """A pipeline with a null network: its stock loop and ours.

    Args:
        name: of `PIPELINES`.
        device: of the network and of all tensors.
        steps: of every call.

    Attributes:
        arguments: of every call.
        loops: the pipeline, and one compiled for each method.
        network: of the pipeline.
    """

    def __init__(self, name: str, device: str = "cpu", steps: int = STEPS) -> None:
        make, size = PIPELINES[name]
        pipe = make()
        pipe.to(device)
        pipe.set_progress_bar_config(disable=True)
        text = {} if name == "DDIM pixels" else pipelines.embedded_text(pipe)
        text = {name: each.to(device) for name, each in text.items()}
        output = "pt" if name == "DDIM pixels" else "latent"
        self.arguments = {**text, **size, "output_type": output, "num_inference_steps": steps}
        self.network = NullNetwork(pipe.unet if hasattr(pipe, "unet") else pipe.transformer)
        self.loops = {"stock": pipe} | {method: srds_fast.compile(pipe, **how) for method, how in METHODS.items()}
        self._turns: dict[str, list[float]] = {}
        self._calls: dict[str, float] = {}

    def call(self, loop: str) -> Turns:
        """Call a loop, and return its turns."""
        self.loops[loop](**self.arguments, generator=torch.Generator().manual_seed(0))
        return self.network.take()

    def repeat(self, times: int) -> None:
        """Call every loop so many times, in turn."""
        for _ in range(times):
            for loop in self.loops:
                started = time.perf_counter()
                turns = [stop - start for start, stop in self.call(loop)]
                taken = time.perf_counter() - started
                self._calls[loop] = min(taken, self._calls.get(loop, taken))
                self._turns[loop] = [*map(min, turns, self._turns.get(loop, turns))]

    def per_turn(self, loop: str) -> float:
        """Mean of the turns but the first, in seconds."""
        later = self._turns[loop][1:]
        return sum(later) / len(later)

    def per_call(self, loop: str) -> float:
        """Seconds of a whole call."""
        return self._calls[loop]


def main(arguments: list[str] | None = None) -> None:
    torch.set_num_threads(1)
    found = parser("bench.speed.host_time", __doc__)
    found.add_argument("--repeat", type=int, default=30, help="calls of every loop")
    found.add_argument("--only", nargs="*", default=list(PIPELINES), choices=list(PIPELINES))
    found.add_argument("--steps", type=int, default=STEPS)
    found.add_argument("--device", default="cpu")
    options = found.parse_args(arguments)
    table = Table(
        ("pipeline", -12), ("loop", -11), ("wave/step", 0), ("call", 0), ("us a wave", 0), ("us a step", 0), ("rows", 0)
    )
    print(table.heading)
    for name in options.only:
        case = Case(name, options.device, options.steps)
        case.repeat(options.repeat)
        for method in METHODS:
            wave, step = case.per_turn(method), case.per_turn("stock")
            ratios = wave / step, case.per_call(method) / case.per_call("stock")
            report = case.loops[method].report
            times = f"{1e6 * wave:.0f}", f"{1e6 * step:.0f}"
            print(table.line(name, method, *ratios, *times, report.rows / report.waves), flush=True)


if __name__ == "__main__":
    main()
