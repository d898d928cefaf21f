"""What calls do on the host, in counts: times jitter, bench/speed/host_time.py reports them."""

from __future__ import annotations

import functools
import inspect
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import nn

from bench.regression.dispatched import Dispatched
from bench.speed import host_time
from bench.speed.host_time import BY_TURNS, CALLED_BACK, PIPELINES, Case
from bench.workloads.pipelines import network_of
from srds_fast import sample
from srds_fast.pipelines import hooks, network_checks
from srds_fast.pipelines.module_state import ModuleState
from srds_fast.planner.exploration import STOCK, Exploration
from srds_fast.schedulers.own_loop import copy_scheduler
from srds_fast.solvers.ahead import Tells

# functions of Python that look at every module, or take as long as some operations
LOOKS: dict[str, Callable[..., Any]] = {
    "hooks of a part": hooks.hooked,
    "device": DiffusionPipeline._execution_device.fget,
    "what modules hold": ModuleState._look_at,
    "parts that decide": network_checks.parts_that_decide,
    "signatures": inspect.signature,
    "copies of tensors": torch.Tensor.__deepcopy__,
    "copies of the scheduler": copy_scheduler,
}


def counts(case: Case, loop: str) -> list[Counter[str]]:
    """What each turn of a call dispatches but the first, in which a run begins."""
    with Dispatched() as dispatched:
        case.turns.clock = dispatched.counts.copy
        return [stop - start for start, stop in case.call(loop)[1:]]


@pytest.mark.parametrize("name", PIPELINES)
def test_a_wave_dispatches_little_and_never_waits(name: str) -> None:
    case = Case(name)
    most = max(turn["operations"] for turn in counts(case, "sequential"))
    # weights of guidance need not sum to one, as those of a pipeline's own formula do: their sum, and one product more
    assert most <= min(turn["operations"] for turn in counts(case, "stock")) + 3
    for method in ("srds", "srds plain"):
        waves = counts(case, method)
        program = case.loops[method].plan_for(**case.arguments).program()
        tells = Tells(program)
        assert len(waves) == len(program) - 2
        # the first two repeat the conditioning; the end of an iteration is judged by the host
        for turn, wave in list(zip(waves, program.waves[1:], strict=False))[2:]:
            if program.num_blocks not in [completed.boundary for completed in wave.boundaries]:
                jumps = sum(row.coarse for row in wave.rows)
                # whatever the number of rows; a boundary that tells of a sample is compared
                told = sum(each in tells for each in wave.boundaries)
                assert turn["operations"] <= most + 8 + jumps + 2 * len(wave.boundaries) + 4 * told
                assert not turn["host_waits"]


def test_a_callback_costs_few_operations() -> None:
    """Copies of the scheduler, and of what else the function may write into, are made once a call."""

    def more(steps: int) -> Counter[str]:
        case, found = Case("SD DDIM", steps), list[Counter[str]]()
        for loop in ("srds", CALLED_BACK):
            with Dispatched() as dispatched:
                case.call(loop)
            found.append(dispatched.counts)
        return found[1] - found[0]

    steps = 9
    few, many = more(steps), more(2 * steps)
    assert many["allocations"] - few["allocations"] <= 4 * steps, "states kept for it, and copies of the latents"
    assert many["operations"] - few["operations"] <= 12 * steps, "five tensors of the scheduler are compared"


def looks(run: Callable[[], object]) -> Counter[str]:
    """How often each of `LOOKS` is called."""
    codes = {each.__code__: name for name, each in LOOKS.items()}
    counts: Counter[str] = Counter()

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code in codes:
            counts[codes[frame.f_code]] += 1

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return counts


@pytest.mark.parametrize("name", PIPELINES)
def test_a_call_looks_at_everything_once(name: str) -> None:
    case = Case(name, steps=9)
    pipe = case.loops["stock"]
    network_of(pipe)._forward_hooks.clear()  # what a user's hook holds is looked at in every call
    network_of(pipe)._forward_pre_hooks.clear()
    stock = looks(lambda: case.call("stock"))
    for loop in case.first:
        case.call(loop)
        found = looks(functools.partial(case.call, loop))
        assert found["hooks of a part"] == sum(isinstance(part, nn.Module) for part in vars(pipe).values())
        assert not found["device"]
        assert not found["copies of tensors"]
        # a callback may change anything: what it leaves is looked at
        assert loop == BY_TURNS or not found["what modules hold"]
        assert found["parts that decide"] <= 1
        assert found["copies of the scheduler"] == 1
        assert found["signatures"] <= stock["signatures"]


@pytest.mark.parametrize("chosen", ["a plan", STOCK])
def test_sample_copies_its_scheduler_and_reads_its_signatures_once(
    chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, x, scheduler = nn.Linear(4, 4), torch.ones(1, 4), DDIMScheduler(clip_sample=False)

    def denoiser(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return network(x)

    def call() -> str:
        return sample(denoiser, x, scheduler, 9, method="auto").report.method

    with torch.no_grad():
        call()
        monkeypatch.setattr(Exploration, "chose_stock", property(lambda each: chosen == STOCK))
        monkeypatch.setattr(Exploration, "due", lambda each: None)  # a call that times other ways copies it for each
        assert (call() == STOCK) == (chosen == STOCK)
        found = looks(call)
    assert found["copies of the scheduler"] == (2 if chosen == STOCK else 1), "the stock loop steps a copy"
    assert found["signatures"] == 1, "of the denoiser, which may be another each time"
    assert not found["copies of tensors"]


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    host_time.main(["--repeat", "1", "--steps", "9", "--only", "SD DDIM", "DDIM pixels"])
    printed = capsys.readouterr().out.splitlines()
    loops = 2 * len(host_time.METHODS) + 2  # one of the two takes a callback: by recorded calls, and by turns
    assert len(printed) == 2 * 3 + loops, "an empty line, the pipeline, headings and loops"
    assert printed[1] == "SD DDIM"
    assert (printed[3].split()[0], printed[3].split()[-1]) == ("sequential", "1.00"), "rows a wave"
