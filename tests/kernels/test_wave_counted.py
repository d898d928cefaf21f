"""The update in plain PyTorch with a counter on the device: the bits of the one with a number, and it can be replayed.

What an update does not use holds NaN and infinities throughout: slot 0, the first entry of the noise, rows of m.
"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from srds_fast.kernels.wave_update import (
    Buffers,
    Correction,
    Gather,
    NetworkInput,
    Step,
    Update,
    WaveTable,
    wave_update,
)
from srds_fast.kernels.wave_update import buffers as buffers_module

SLOTS, ITERATIONS, DRAWS, ROWS = 14, 6, 4, 5
POISON = (math.nan, math.inf, -math.inf)
LEFT_ALONE = 7.0


@pytest.fixture(autouse=True)
def _in_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers_module, "implementation", lambda device: "torch")


def random_update(draw: random.Random, clips: bool, looks_back: bool, noisy: bool, scaled: bool) -> Update:
    """Stages of any width, of none too, over all slots but slot 0."""

    def number() -> float:
        return draw.choice([draw.gauss(0, 1), draw.gauss(0, 1), 0.0, 1.0])

    slots = draw.sample(range(1, SLOTS), SLOTS - 1)
    kept, others = slots[: draw.choice([0, 1, 1, 2, 4])], slots[4:]
    steps = []
    for keep in kept:
        before = draw.choice(others) if looks_back and draw.random() < 0.5 else None
        entry = draw.randrange(1, DRAWS) if noisy and draw.random() < 0.5 else None
        a, b, c, d, p, q, s = (number() for _ in range(7))
        c = c if clips else 0.0
        steps.append(Step(keep, draw.choice(others), draw.randrange(ROWS), a, b, c, d, p, q, before, entry, s))
    corrections: list[Correction] = []
    draw.shuffle(slots)
    count, first_whole = draw.choice([0, 1, 2, 4]), draw.randrange(ITERATIONS - 4)
    for slot in slots[:count]:
        # none reads what a later one writes
        readable = [each for each in slots if each not in slots[len(corrections) : count]]
        bracket = (draw.choice(readable), draw.choice(readable)) if draw.random() < 0.7 else None
        compare, whole = draw.choice(readable) if draw.random() < 0.7 else None, draw.random() < 0.5
        wholes = sum(each.whole and each.compare is not None for each in corrections)
        iteration = first_whole + wholes if whole else draw.randrange(ITERATIONS + 1)
        corrections.append(Correction(slot, bracket, compare, iteration, whole))
    gathers = [
        Gather(draw.choice(slots), number() if scaled else 1.0) for _ in range(draw.choice([0, 1, len(kept), 5]))
    ]
    return Update(tuple(steps), tuple(corrections), tuple(gathers))


class Case:
    """A random program, and two runs of it: by number, and with a counter on the same tensors at every call."""

    def __init__(
        self,
        device: torch.device,
        shape: tuple[int, ...] = (3, 5, 3),
        samples: int = 2,
        state: torch.dtype = torch.float32,
        network: torch.dtype = torch.float16,
        branches: int = 1,
        inputs: int = 1,
        clip: float | None = 0.8,
        looks_back: bool = True,
        noisy: bool = True,
        watches: bool = True,
        scaled: bool = True,
        channels_last: bool = False,
        room: int = 0,
        updates: int = 12,
        seed: int = 0,
    ) -> None:
        draw = random.Random(seed)
        program = [random_update(draw, clip is not None, looks_back, noisy, scaled) for _ in range(updates - 1)]
        program.insert(updates // 2, Update())
        self.table = WaveTable(program, SLOTS, ITERATIONS, state, device, 1 + len(shape), clip, watches)
        self.network = NetworkInput(network, inputs, channels_last)
        self._numbers = torch.Generator().manual_seed(seed)
        self.device, self.state, self.shape = device, state, (samples, *shape)
        memory, noises = self.values(SLOTS).to(state), self.values(DRAWS).to(state)
        memory[0], noises[0] = self.poison(), self.poison()
        self.by_number, self.counted = (
            Buffers(self.table, memory[0], noises if noisy else None, channels_last=channels_last) for _ in range(2)
        )
        for buffers in (self.by_number, self.counted):
            buffers.memory.copy_(memory)
            buffers.change.fill_(-1.0)
        self.guidance = None
        if branches > 1:
            self.guidance = torch.randn(branches, generator=self._numbers, dtype=torch.float64).to(device, state)
        self.counter = torch.zeros(1, dtype=torch.int32, device=device)
        rows, entering = self.table.most_rows + room, self.table.most_gathers + room
        self.m = torch.empty(branches, rows, *self.shape, dtype=network, device=device)
        self.out = torch.empty(inputs, entering, *self.shape, dtype=network, device=device)

    def values(self, *leading: int) -> Tensor:
        """Numbers with zeros of either sign among them."""
        drawn = torch.randn(*leading, *self.shape, generator=self._numbers, dtype=torch.float64)
        zeros = torch.rand(drawn.shape, generator=self._numbers)
        drawn[zeros < 0.1], drawn[zeros < 0.05] = 0.0, -0.0
        return drawn.to(self.device)

    def poison(self) -> Tensor:
        """One state of it."""
        numbers = torch.tensor(POISON, device=self.device).repeat(math.prod(self.shape))
        return numbers[: math.prod(self.shape)].reshape(self.shape)

    def prepare(self, number: int) -> None:
        """What the network gives for an update, and room for its next input."""
        self.out.fill_(LEFT_ALONE)
        self.m.copy_(self.poison())
        used = {value.row for value in self.table.updates[number].steps} if number < len(self.table.updates) else set()
        for row in sorted(used):
            self.m[:, row] = self.values(len(self.m)).to(self.m.dtype)

    def call(self) -> None:
        """One update by the counter."""
        given = {"m": self.m.flatten(0, 1), "guidance": self.guidance, "network": self.network}
        found = wave_update(self.table, self.counter, self.counted, out=self.out.flatten(0, 1), **given)
        assert found is not None
        assert found.data_ptr() == self.out.data_ptr()

    def check(self, number: int) -> None:
        """Hold all that the counter's update has written against the one by number."""
        update = self.table.updates[number]
        m = self.m[:, : self.table.num_rows[number]].flatten(0, 1)
        given = {"guidance": self.guidance, "network": self.network}
        wanted = wave_update(self.table, number, self.by_number, m, **given)
        assert int(self.counter) == number + 1
        assert_same(self.counted, self.by_number)
        entering = len(update.gathers)
        if wanted is not None:
            assert same_bits(self.out[:, :entering].flatten(0, 1), wanted)
        assert bool((self.out[:, entering:] == LEFT_ALONE).all()), "narrower updates leave the rest alone"

    def check_beyond(self) -> None:
        """After the last update."""
        assert_same(self.counted, self.by_number)
        assert bool((self.out == LEFT_ALONE).all())


@pytest.mark.parametrize("rows", [2, 3])
def test_m_has_rows_for_the_updates_it_is_called_for(device: torch.device, rows: int) -> None:
    """Not for the widest; and a table without a correction."""
    wide = Update(tuple(Step(3 + row, row, row, 0.5, 2.0) for row in range(3)), (), (Gather(3),))
    narrow = Update(wide.steps[:rows], (), (Gather(4),))
    table = WaveTable([wide, narrow], 6, 0, torch.float32, device, 2)
    buffers = Buffers(table, torch.zeros(1, 4, device=device))
    memory = torch.arange(24.0, device=device).reshape(6, 1, 4)
    buffers.memory.copy_(memory)
    m, out = torch.ones(rows, 1, 4, device=device), torch.empty(1, 1, 4, device=device)
    wave_update(table, torch.ones(1, dtype=torch.int32, device=device), buffers, m, out=out)
    assert torch.equal(buffers.memory[3 : 3 + rows], 0.5 * memory[:rows] + 2.0)
    assert torch.equal(buffers.memory[3 + rows :], memory[3 + rows :])
    assert torch.equal(out[0], buffers.memory[4])


def assert_same(found: Buffers, wanted: Buffers) -> None:
    assert same_bits(found.memory, wanted.memory)
    assert same_bits(found.change, wanted.change)
    assert torch.equal(found.moved, wanted.moved)


def same_bits(found: Tensor, wanted: Tensor) -> bool:
    """Zeros of one sign; any NaN is as good as another."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[wanted.element_size()]
    one, other = (each.contiguous().view(bits).masked_fill(each.isnan(), -1) for each in (found, wanted))
    return torch.equal(one, other)


CASES: list[dict[str, Any]] = [
    {},
    {"state": torch.float64, "network": torch.float64, "branches": 2, "inputs": 2},
    {"network": torch.float32, "branches": 3, "inputs": 3, "room": 3},
    {"network": torch.bfloat16, "branches": 2, "inputs": 1, "room": 1, "samples": 1},
    {"samples": 1, "shape": (7,)},
    {"samples": 3, "shape": (4, 16, 17), "channels_last": True, "branches": 2, "inputs": 2, "room": 2},
    {"clip": None},
    {"looks_back": False},
    {"noisy": False},
    {"watches": False, "scaled": False},
    {"clip": None, "looks_back": False, "noisy": False, "scaled": False, "network": torch.float32},
]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("options", CASES, ids=str)
def test_the_bits_are_those_of_the_number(device: torch.device, options: dict[str, Any], seed: int) -> None:
    case = Case(device, **options, seed=seed)
    for number in range(len(case.table.updates)):
        case.prepare(number)
        case.call()
        case.check(number)
    for beyond in range(1, 3):
        case.prepare(len(case.table.updates))
        case.call()
        case.check_beyond()
        assert int(case.counter) == len(case.table.updates) + beyond


def test_programs_hold_everything(device: torch.device) -> None:
    """Finite values come out, and every stage has something that differs from update to update."""
    case = Case(device)
    for number in range(len(case.table.updates)):
        case.prepare(number)
        case.call()
    assert bool(case.counted.memory[1:].isfinite().all())
    made = [value for update in case.table.updates for value in update.steps]
    assert len({len(update.steps) for update in case.table.updates}) > 2
    assert {value.before is None for value in made} == {value.draw is None for value in made} == {True, False}
    sums = [each for update in case.table.updates for each in update.corrections]
    assert {(each.bracket is None, each.compare is None, each.whole) for each in sums} >= {
        (False, False, True),
        (False, False, False),
        (True, False, True),
        (False, True, False),
    }
    assert bool((case.counted.change >= 0).any())
    assert bool(case.counted.moved.any())


class Recorder(TorchDispatchMode):
    """Keeps every operation with its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """Run them again on the same tensors."""
        for function, args, kwargs, result in self.operations:
            if function.is_view:
                continue
            again = function(*args, **kwargs)
            if again is not result:
                result.copy_(again)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_a_recorded_call_does_all_updates(device: torch.device, options: dict[str, Any]) -> None:
    """The host reads nothing, copies nothing to the device and knows every shape: one call stands for all of them."""
    case = Case(device, **options, seed=5)
    case.prepare(0)
    case.call()
    case.check(0)
    recorder = Recorder()
    case.prepare(1)
    with recorder:
        case.call()
    case.check(1)
    names = {function.name() for function, *_ in recorder.operations}
    assert not names & {"aten::_local_scalar_dense", "aten::lift_fresh", "aten::lift_fresh_copy"}
    for function, args, *_ in recorder.operations:
        assert all(each.device == case.table.device for each in args if isinstance(each, Tensor)), function
        assert torch.Tag.dynamic_output_shape not in function.tags, function
        assert torch.Tag.data_dependent_output not in function.tags, function
    for number in range(2, len(case.table.updates)):
        case.prepare(number)
        recorder.replay()
        case.check(number)
    case.prepare(len(case.table.updates))
    recorder.replay()
    case.check_beyond()


def test_stages_that_no_update_has(device: torch.device) -> None:
    """Only corrections; and nothing at all, where the kernel is not launched and does not count."""
    for updates, counts in (([Update((), (Correction(1, (2, 1)),))], 1), ([Update()], 0)):
        table = WaveTable(updates, 3, 0, torch.float32, device, 2)
        buffers = Buffers(table, torch.zeros(1, 4, device=device))
        buffers.memory.copy_(torch.arange(3.0, device=device)[:, None, None].expand(3, 1, 4))
        counter = torch.zeros(1, dtype=torch.int32, device=device)
        assert wave_update(table, counter, buffers) is None
        assert int(counter) == counts
        assert buffers.memory[:, 0, 0].tolist() == [0.0, 1.0 + counts, 2.0]
