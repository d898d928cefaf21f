"""What a loop costs: host time per wave outside the network, against the stock loop's own host time per step.

    python -m bench.host_time                     # the table, ratios first
    pytest bench --benchmark-only -k host         # whole calls, see README.md

The pipelines are the tiny ones of the tests, their network returns zeros at once, and a latent is 4x4: what is left is
what a loop does on the host. A turn of a loop is the time from the return of one call of the network to the start of
the next. The stock loop turns once per step, with one row; a loop of ours turns once per wave, which under SRDS holds
several rows, the solver's jumps and corrections, and at the end of an iteration the decision to go on. A ratio sets one
wave against one step and says nothing of how many there are of each.

All loops of a pipeline are called in turn in one process. Of every turn the shortest of all repetitions counts, of a
call the mean of its turns. A loop that is driven begins the run (plan, tables, memory) in its first turn: what that
takes beyond the mean is shown on its own, in stock steps, as "set-up"; a loop that is taken over has begun before it.
Times are reported, not gated; what is gated, here and in tests/test_host_time.py, are counts.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

import srds_fast
from tests import tiny

STEPS = 100
WANTED = 1.3

_TEXT = {"prompt": "a cat", "output_type": "latent", "height": 8, "width": 8}
_EULER = {"steps_offset": 1, "timestep_spacing": "leading"}

# name: how the pipe is made, and the arguments of its call; all but Flux and DDIM run with guidance
PIPELINES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "SD DDIM": (lambda: tiny.stable_diffusion(DDIMScheduler(**tiny.SD_NOISE)), _TEXT),
    "SD Euler": (lambda: tiny.stable_diffusion(EulerDiscreteScheduler(**tiny.SD_BETAS, **_EULER)), _TEXT),
    "SDXL DDIM": (lambda: tiny.stable_diffusion_xl(DDIMScheduler(**tiny.SD_NOISE)), _TEXT),
    "SDXL Euler": (tiny.stable_diffusion_xl, _TEXT),
    "SD3 flow": (tiny.stable_diffusion_3, {**_TEXT, "max_sequence_length": 16}),
    "Flux flow": (tiny.flux, {**_TEXT, "max_sequence_length": 16}),
    "DDIM pixels": (tiny.ddim, {"output_type": "pt"}),
}
# no change falls below this tolerance: always two iterations
_TWO = {"method": "srds", "tolerance": 1e-30, "max_iterations": 2}
METHODS: dict[str, dict[str, Any]] = {
    "sequential": {"method": "sequential"},
    "srds": _TWO,
    "srds plain": {**_TWO, "pipelined": False},
}
Turns = list[tuple[float, float]]


class NullNetwork:
    """Makes a network return zeros at once, and notes when each turn of the loop around it begins and ends."""

    def __init__(self, network: Any) -> None:
        self.clock: Callable[[], float] = time.perf_counter
        self.turns: Turns = []
        self._returned: float | None = None
        outputs: dict[torch.Size, torch.Tensor] = {}

        @functools.wraps(network.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._returned is not None:
                self.turns.append((self._returned, self.clock()))
            states = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
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
    """A pipeline with a null network: its stock loop, and driven ones.

    Args:
        name: of `PIPELINES`.
        device: of the network and of all tensors.
        steps: of every call.

    Attributes:
        loops: the pipeline, and one compiled for each method.
        shortest: of each loop, every turn in seconds.
    """

    def __init__(self, name: str, device: str = "cpu", steps: int = STEPS) -> None:
        self.steps = steps
        make, self.arguments = PIPELINES[name]
        pipe = make()
        if name == "DDIM pixels":
            pipe.unet.register_to_config(sample_size=4)
        pipe.to(device)
        self.network = NullNetwork(pipe.unet if hasattr(pipe, "unet") else pipe.transformer)
        self.loops = {"stock": pipe} | {
            method: srds_fast.compile(pipe, **{"method": "srds", **how}) for method, how in METHODS.items()
        }
        self.shortest: dict[str, list[float]] = {}

    def call(self, loop: str) -> Turns:
        self.loops[loop](**self.arguments, num_inference_steps=self.steps, generator=torch.Generator().manual_seed(0))
        return self.network.take()

    def repeat(self, times: int) -> None:
        """Call every loop so many times, in turn."""
        for _ in range(times):
            for loop in self.loops:
                turns = [stop - start for start, stop in self.call(loop)]
                before = self.shortest.get(loop, turns)
                self.shortest[loop] = [min(pair) for pair in zip(turns, before, strict=True)]

    def per_turn(self, loop: str) -> float:
        """Mean of the turns but the first, in seconds."""
        later = self.shortest[loop][1:]
        return sum(later) / len(later)

    def ratio(self, loop: str) -> float:
        """A wave of the loop against a step of the stock one."""
        return self.per_turn(loop) / self.per_turn("stock")

    def set_up(self, loop: str) -> float:
        """What the first turn takes beyond a later one, in stock steps."""
        return (self.shortest[loop][0] - self.per_turn(loop)) / self.per_turn("stock")


@functools.cache
def measured(name: str, times: int, device: str = "cpu") -> Case:
    torch.set_num_threads(1)
    case = Case(name, device)
    case.repeat(times)
    return case


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.host_time", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=30, help="calls of every loop")
    parser.add_argument("--only", nargs="*", default=list(PIPELINES), choices=list(PIPELINES))
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    print(f"One wave against one stock step, {STEPS} steps; at most {WANTED} is wanted.\n")
    print(f"{'':14}{'loop':12}{'ratio':>7}{'us/wave':>9}{'us/step':>9}{'rows/wave':>11}{'set-up':>8}")
    for name in options.only:
        case = measured(name, options.repeat, options.device)
        for method in METHODS:
            case.call(method)
            report = case.loops[method].report
            print(
                f"{name:14}{method:12}{case.ratio(method):7.2f}{1e6 * case.per_turn(method):9.0f}"
                f"{1e6 * case.per_turn('stock'):9.0f}{report.rows / report.waves:11.1f}{case.set_up(method):8.1f}"
            )


if __name__ == "__main__":
    main()
