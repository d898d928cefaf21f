"""What driving costs: host time per wave outside the network, against the stock loop's own host time per step.

    python bench/host_time.py                    # the table, ratios first
    pytest bench/host_time.py --benchmark-only   # the same, one benchmark per row

The pipelines are the tiny ones of the tests, their network returns zeros at once, and a latent is 4x4: what is left is
what a loop does on the host. A turn of a loop is the time from the return of one call of the network to the start of
the next. The stock loop turns once per step with one row, the driven one once per wave, which under SRDS holds up to 20
rows; so a ratio sets one wave against one step, and says nothing of how many there are.

Both loops run in turn in one process. Of every turn the shortest of all repetitions counts, of a call the mean of its
turns. The first turn of a driven call also begins the run (tables, plan); what it takes beyond a later turn is shown on
its own, in stock steps, as "set-up". Times are reported; what is gated here and in tests/test_host_time.py are counts.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

import srds_fast

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import tiny

STEPS = 100
LEDGER = 1.3

_TEXT = {"prompt": "a cat", "output_type": "latent", "height": 8, "width": 8}

# name: how the pipe is made, and the arguments of its call
PIPELINES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "SD DDIM": (lambda: tiny.stable_diffusion(DDIMScheduler(**tiny.SD_NOISE)), _TEXT),
    "SD Euler": (lambda: tiny.stable_diffusion(EulerDiscreteScheduler(**tiny.SD_BETAS)), _TEXT),
    "SDXL Euler": (tiny.stable_diffusion_xl, _TEXT),
    "SD3 flow": (tiny.stable_diffusion_3, {**_TEXT, "max_sequence_length": 16}),
    "Flux flow": (tiny.flux, {**_TEXT, "max_sequence_length": 16}),
    "DDIM pixels": (tiny.ddim, {"output_type": "pt"}),
}
# a bound that no change falls below: always two iterations, so the waves are known beforehand
_TWO = {"method": "srds", "tolerance": 1e-30, "max_iterations": 2}
METHODS: dict[str, dict[str, Any]] = {
    "sequential": {"method": "sequential"},
    "srds": _TWO,
    "srds plain": {**_TWO, "pipelined": False},
}


class Calls:
    """Calls of a network that computes nothing: when each began and when it returned, in seconds."""

    def __init__(self, network: Any) -> None:
        self.began: list[float] = []
        self.returned: list[float] = []
        outputs: dict[torch.Size, torch.Tensor] = {}

        @functools.wraps(network.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            self.began.append(time.perf_counter())
            states = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
            out = outputs.get(states.shape)
            if out is None:
                out = outputs[states.shape] = torch.zeros(states.shape)
            result = (out,) if kwargs.get("return_dict") is False else Output(out)
            self.returned.append(time.perf_counter())
            return result

        network.forward = forward

    def turns(self) -> list[float]:
        """Time between each call and the next; forgets them."""
        turns = [began - returned for returned, began in zip(self.returned, self.began[1:], strict=False)]
        self.began.clear()
        self.returned.clear()
        return turns


class Output:
    def __init__(self, sample: torch.Tensor) -> None:
        self.sample = sample


class Case:
    """One pipeline with a null network; `turns` of a call are measured side by side."""

    def __init__(self, name: str) -> None:
        make, self._call = PIPELINES[name]
        self.pipe = make()
        network = self.pipe.unet if hasattr(self.pipe, "unet") else self.pipe.transformer
        if name == "DDIM pixels":
            network.register_to_config(sample_size=4)
        self.calls = Calls(network)
        self.loops = {"stock": self.pipe} | {name: srds_fast.compile(self.pipe, **how) for name, how in METHODS.items()}
        self.shortest: dict[str, list[float]] = {}

    def call(self, loop: str) -> list[float]:
        """One call of a loop; its turns."""
        self.loops[loop](**self._call, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0))
        return self.calls.turns()

    def repeat(self, times: int) -> None:
        """Call every loop so many times, in turn."""
        for _ in range(times):
            for loop in self.loops:
                turns = self.call(loop)
                before = self.shortest.get(loop, turns)
                assert len(turns) == len(before), "a call takes as many waves as the one before"
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
def case(name: str) -> Case:
    torch.set_num_threads(1)
    return Case(name)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", PIPELINES)
def test_host_time_per_wave(name: str, method: str, benchmark: Any) -> None:
    measured = case(name)
    if not measured.shortest:
        measured.repeat(10)
    benchmark.extra_info |= {
        "ratio": measured.ratio(method),
        "microseconds": 1e6 * measured.per_turn(method),
        "stock_microseconds": 1e6 * measured.per_turn("stock"),
        "set_up_in_stock_steps": measured.set_up(method),
    }
    benchmark.pedantic(measured.call, (method,), rounds=3)
    waves = measured.loops[method].plan_for(**measured._call, num_inference_steps=STEPS).program().num_waves
    assert len(measured.shortest["stock"]) == STEPS - 1
    assert len(measured.shortest[method]) == measured.loops[method].report.waves - 1 == waves - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=30)
    parser.add_argument("--only", nargs="*", default=list(PIPELINES), choices=list(PIPELINES))
    options = parser.parse_args()
    print(f"one wave / one stock step, {STEPS} steps; at most {LEDGER} is wanted\n")
    print(f"{'':14}{'loop':14}{'ratio':>7}{'us/turn':>9}{'stock':>8}{'rows/wave':>11}{'set-up':>8}")
    for name in options.only:
        measured = case(name)
        measured.repeat(options.repeat)
        for method in METHODS:
            report = measured.loops[method].report
            measured.call(method)
            report = measured.loops[method].report
            print(
                f"{name:14}{method:14}{measured.ratio(method):7.2f}{1e6 * measured.per_turn(method):9.0f}"
                f"{1e6 * measured.per_turn('stock'):8.0f}{report.rows / report.waves:11.1f}"
                f"{measured.set_up(method):8.1f}"
            )


if __name__ == "__main__":
    main()
