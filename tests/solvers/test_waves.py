"""A program's updates, value by value: the kernel's chains give what the stages say, in whatever order chains run."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from cores import table
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given
from hypothesis import strategies as st

from srds_fast.kernels.wave_update import Update
from srds_fast.kernels.wave_update.instructions import Instruction, chained, instructions
from srds_fast.schedulers.steps import TensorSpec
from srds_fast.solvers import program
from srds_fast.solvers.compiled import Form
from srds_fast.solvers.wave_table import compiled, wave_table

SCHEDULERS = {
    "ddim": DDIMScheduler(clip_sample=False),
    "ddim, clipped": DDIMScheduler(clip_sample=True),
    "dpm++ 2m": DPMSolverMultistepScheduler(),
    "euler ancestral": EulerAncestralDiscreteScheduler(),
    "pndm": PNDMScheduler(skip_prk_steps=True),
    "unipc": UniPCMultistepScheduler(solver_order=3),
    "lms": LMSDiscreteScheduler(),
    "sa": SASolverScheduler(),
}
ROUNDING = 1e-9


def clamp(value: float, clip: float) -> float:
    return min(max(value, -clip), clip)


class Numbers:
    """A memory of plain numbers, and what an update leaves beside it."""

    def __init__(self, slots: list[float]) -> None:
        self.slots = list(slots)
        self.inputs: dict[int, float] = {}
        self.distances: dict[tuple[int, int], list[float]] = {}

    def compare(self, iteration: int, change: int, slot: float, before: float) -> None:
        self.distances.setdefault((iteration, change), []).append(abs(slot - before))

    def in_stages(self, update: Update, m: list[float], noise: list[float], clip: float) -> None:
        """As `kernels.wave_update.update` says."""
        slots, made = self.slots, {}
        for value in update.steps:
            x, output = slots[value.state], m[value.row]
            result = value.a * x + value.b * output + value.c * clamp(value.p * x + value.q * output, clip)
            result += sum(weight * slots[slot] for slot, weight in value.looks_back)
            made[value.keep] = result + (0.0 if value.draw is None else value.s * noise[value.draw])
        assert len(made) == len(update.steps)
        for slot, result in made.items():
            slots[slot] = result
        for each in update.corrections:
            if each.bracket is not None:
                new, old = each.bracket
                slots[each.slot] += slots[new] - slots[old]
            if each.compare is not None:
                self.compare(
                    each.iteration, -1 if each.change is None else each.change, slots[each.slot], slots[each.compare]
                )
        for row, gather in enumerate(update.gathers):
            self.inputs[row] = gather.scale * slots[gather.slot]

    def instruction(self, each: Instruction, m: list[float], noise: list[float]) -> None:
        """As the kernel does it."""
        slots = self.slots
        x = slots[each.state]
        output = m[each.row] if each.row >= 0 else 0.0
        value = each.a * x + each.b * output + each.c * clamp(each.p * x + each.q * output, each.clip)
        value += each.d * slots[each.before] if each.before >= 0 else 0.0
        value += each.s * noise[each.draw] if each.draw >= 0 else 0.0
        value += slots[each.new] - slots[each.old] if each.new >= 0 else 0.0
        if each.keep >= 0:
            slots[each.keep] = value
        if each.input_row >= 0:
            assert each.input_row not in self.inputs
            self.inputs[each.input_row] = each.scale * value
        if each.compare >= 0:
            self.compare(each.iteration, each.change, value, slots[each.compare])


@given(st.sampled_from(list(SCHEDULERS)), st.integers(1, 16), st.data())
def test_chains_give_what_the_stages_say(name: str, num_steps: int, data: st.DataObject) -> None:
    noise = table(num_steps, SCHEDULERS[name])
    num_steps = noise.num_steps
    num_blocks = data.draw(st.integers(1, num_steps))
    iterations = data.draw(st.integers(0, num_blocks))
    pipelined, bitwise, constrained, given_x0 = (data.draw(st.booleans()) for _ in range(4))
    in_flight = data.draw(st.sampled_from([None, 1, 2])) if pipelined else None
    waves = program.srds(num_steps, num_blocks, iterations, pipelined, in_flight=in_flight)
    if data.draw(st.booleans()):
        waves = program.sequential(num_steps)
    waves = waves.limited_to(data.draw(st.sampled_from([None, 1, 3])))
    spec = TensorSpec(torch.float64, torch.device("cpu"), 2)
    form = Form(spec, history=given_x0, scaled=True, constrained=constrained, bitwise=bitwise)
    found: Any = compiled(noise, waves, data.draw(st.sampled_from(["2m", "ddim"])), form)
    draw = random.Random(data.draw(st.integers(0, 99)))
    clip = math.inf if found.table.clip is None else found.table.clip
    # nothing but the starting noise, and the x0 given with it, is there before it is written
    memory = [draw.gauss(0, 1)] + [math.nan] * (found.table.num_slots - 1)
    if given_x0 and noise.momentum is not None:
        memory[1] = draw.gauss(0, 1)
    draws = [draw.gauss(0, 1) for _ in range(found.table.draws)]
    for update in found.table.updates:
        m = [draw.gauss(0, 1) for _ in range(1 + max((value.row for value in update.steps), default=-1))]
        expected, numbers = Numbers(memory), Numbers(memory)
        expected.in_stages(update, m, draws, clip)
        chains = chained(instructions(update, found.table.clip))
        for chain in draw.sample(chains, len(chains)):
            for instruction in chain:
                numbers.instruction(instruction, m, draws)
        assert all(map(math.isfinite, numbers.inputs.values()))
        assert same(numbers.slots, expected.slots)
        assert numbers.inputs.keys() == expected.inputs.keys() == set(range(len(update.gathers)))
        assert all(same([numbers.inputs[row]], [expected.inputs[row]]) for row in numbers.inputs)
        assert numbers.distances.keys() == expected.distances.keys()
        for key, distances in expected.distances.items():
            assert same(sorted(numbers.distances[key]), sorted(distances))
        memory = expected.slots


def same(found: list[float], expected: list[float]) -> bool:
    """But for rounding; a slot that nobody has written is not a number in both."""
    return all(
        abs(one - other) <= ROUNDING * (1 + abs(other)) or (math.isnan(one) and math.isnan(other))
        for one, other in zip(found, expected, strict=True)
    )


def test_the_memory_does_not_grow_with_the_iterations() -> None:
    def slots(num_iterations: int) -> int:
        waves = program.srds(100, 20, num_iterations)
        return wave_table(table(100), waves, "2m", torch.zeros(1, 2, dtype=torch.float64)).num_slots

    # 20 rows in the widest wave, and what they, the corrections and the comparisons read later
    assert slots(20) <= 3.6 * 20
    assert slots(20) <= slots(10) + 5
