"""The kernel and its batched reference against the definition of an update, written out value by value."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from problems import scheduler
from torch import Tensor

from srds_fast.errors import InvalidArgument
from srds_fast.kernels.common import dispatch
from srds_fast.kernels.common.layout import with_inner_layout
from srds_fast.kernels.wave_update import (
    Buffers,
    Correction,
    Gather,
    NetworkInput,
    Step,
    Update,
    WaveTable,
    kernel,
    reference,
    wave_update,
)
from srds_fast.kernels.wave_update.traffic import traffic
from srds_fast.schedulers.verify import noise_table
from srds_fast.solvers import program
from srds_fast.solvers.wave_table import wave_table

CPU = torch.device("cpu")


def by_definition(
    update: Update, memory: Tensor, m: Tensor, noises: Tensor, guidance: list[float], clip: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The update, in float64: the memory after it, the change and whether a bit moved of each iteration compared."""
    made = {}
    for value in update.steps:
        rows = len(m) // len(guidance)
        x = memory[value.state]
        of_row = sum(weight * m[branch * rows + value.row] for branch, weight in enumerate(guidance))
        result = value.a * x + value.b * of_row + value.c * (value.p * x + value.q * of_row).clamp(-clip, clip)
        for slot, weight in value.looks_back:
            result = result + weight * memory[slot]
        if value.draw is not None:
            result = result + value.s * noises[value.draw]
        made[value.keep] = result
    memory = memory.clone()
    for slot, result in made.items():
        memory[slot] = result
    change = torch.zeros(len(update.measured()), memory.shape[1], dtype=torch.float64)
    moved = torch.zeros(4, memory.shape[1], dtype=torch.bool)
    for each in update.corrections:
        if each.bracket is not None:
            new, old = each.bracket
            memory[each.slot] += memory[new] - memory[old]
        if each.compare is not None:
            distance = (memory[each.slot] - memory[each.compare]).abs().flatten(1)
            moved[each.iteration] |= (distance > 0).any(1)
            if each.change is not None:
                change[each.change] = distance.mean(1)
    return memory, change, moved


class Case:
    """A random update with everything in it, and tensors to run it on."""

    def __init__(
        self,
        device: torch.device,
        shape: tuple[int, ...] = (3, 5, 7),
        samples: int = 2,
        state: torch.dtype = torch.float32,
        network: torch.dtype = torch.float16,
        branches: int = 1,
        inputs: int = 1,
        clip: float | None = 0.8,
        looks_back: bool = True,
        noisy: bool = True,
        rows: int = 3,
        corrected: bool = True,
        gathers: bool = True,
        channels_last: bool = False,
    ) -> None:
        draw = torch.Generator().manual_seed(0)

        def number() -> float:
            return float(torch.randn((), dtype=torch.float64, generator=draw))

        def step(keep: int, row: int, term: int) -> Step:
            a, b, c, d, p, q, s = (number() for _ in range(7))
            # one vector, as the x0 of multistep schedulers, two and three
            before = [(slot, d + number()) for slot in (5, 9, 8)[: row + 1]] if looks_back and term != 1 else []
            noise = row % 2 if noisy and term != 0 else None
            c = 0.0 if clip is None else c
            return Step(keep, row, row, a, b, c, p, q, tuple(before), noise, s if noisy else 0.0)

        # slots: 0-2 states, 3-9 from earlier waves, 10-15 written now
        steps = [step(10 + 2 * row + term, row, term) for row in range(rows) for term in range(2)]
        corrections = []
        if corrected:
            corrections.append(Correction(3, (4, 6), compare=7, iteration=1, change=0 if rows > 1 else None))
            if rows:
                corrections.append(Correction(11, (10, 4)))
            if rows > 1:
                corrections.append(Correction(13, (12, 10), compare=8, iteration=2, change=1))
                corrections.append(Correction(9, None, compare=13, iteration=3, change=2))
            corrections.append(Correction(0, (1, 2)))  # a state: steps must read it before it is corrected
        slots = [11, 3, 11, 0] if rows else [3, 0, 0]
        self.update = Update(
            tuple(steps), tuple(corrections), tuple(Gather(slot, number()) for slot in slots) if gathers else ()
        )
        self.guidance = [number() for _ in range(branches)] if branches > 1 else [1.0]
        self.memory = torch.randn(16, samples, *shape, dtype=torch.float64, generator=draw)
        self.memory[7, 0] = self.memory[3, 0] + self.memory[4, 0] - self.memory[6, 0] + 1.0
        self.noises = torch.randn(2, samples, *shape, dtype=torch.float64, generator=draw)
        self.m = torch.randn(branches * max(rows, 1), samples, *shape, dtype=torch.float64, generator=draw).to(network)
        self.clip = clip
        self.table = WaveTable([self.update], 16, 3, state, device, 1 + len(shape), clip, records_moved=True)
        self.network = NetworkInput(network, inputs, channels_last)
        self.state, self.device = state, device

    def buffers(self) -> Buffers:
        x, noises = (each.to(self.device, self.state) for each in (self.memory[0], self.noises))
        given = noises if self.table.draws else None
        buffers = Buffers(self.table, x, given, channels_last=self.network.channels_last)
        buffers.memory.copy_(self.memory)
        return buffers

    def check(self, run: Callable[..., Tensor | None], m_as: Callable[[Tensor], Tensor] = lambda m: m) -> Any:
        """Run the update and hold all that it wrote against the definition; returns the network's input."""
        buffers = self.buffers()
        # what the kernel is given, rounded, is what the definition is given
        memory, noises = (self.memory.to(self.state).double(), self.noises.to(self.state).double())
        wanted, change, moved = by_definition(
            self.update, memory, self.m.double(), noises, self.guidance, self.clip or math.inf
        )
        guidance = torch.tensor(self.guidance, dtype=self.state, device=self.device) if len(self.guidance) > 1 else None
        m = m_as(self.m.to(self.device)) if self.update.steps else None
        found = run(self.table, 0, buffers, m, guidance=guidance, network=self.network)
        bound = 2e-5 if self.state == torch.float32 else 1e-12
        for ours, theirs in ((buffers.memory, wanted), (buffers.change, change)):
            torch.testing.assert_close(ours.cpu().double(), theirs, rtol=bound, atol=bound)
        assert torch.equal(buffers.moved.cpu(), moved)
        assert (found is not None) == bool(self.update.gathers)
        if found is not None:
            given = torch.stack([each.scale * wanted[each.slot] for each in self.update.gathers])
            eps = max(torch.finfo(found.dtype).eps, 2e-5)
            given = torch.cat([given] * self.network.branches).to(self.network.dtype)
            torch.testing.assert_close(found.cpu(), given, rtol=eps, atol=eps)
        return found


def batched(*args: Any, guidance: Tensor | None, network: NetworkInput) -> Tensor | None:
    """The reference, called as the public function is."""
    return reference.wave_update(*args, guidance, network)


RUNS = pytest.mark.parametrize("run", [wave_update, batched], ids=["kernel", "reference"])
CASES: list[Any] = [
    {"shape": (1,), "samples": 3},
    {"shape": (513,), "samples": 1},
    {"shape": (2, 3, 5, 4), "samples": 3},
    {"network": torch.float32},
    {"network": torch.bfloat16, "branches": 3, "inputs": 3},
    {"network": torch.float16, "branches": 2, "inputs": 2},
    {"state": torch.float64, "network": torch.float64, "branches": 2},
    {"clip": None},
    {"looks_back": False},
    {"noisy": False},
    # the first update only gathers states, the last only corrects; nothing at all is an update too
    *({"rows": rows, "corrected": c, "gathers": g} for rows, c, g in product((0, 1, 3), (True, False), (True, False))),
]


@RUNS
@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_update_is_what_its_definition_says(device: torch.device, run: Any, case: dict[str, Any]) -> None:
    Case(device, **case).check(run)


def test_large_states_are_taken_in_larger_blocks(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "LARGE_STATE", 2**11)
    Case(device, (3, 30, 31), samples=1, rows=2).check(wave_update)


@RUNS
@pytest.mark.parametrize("channels_last", [False, True])
def test_memory_formats(device: torch.device, run: Any, channels_last: bool) -> None:
    """Contiguous and channels-last outputs, and half of the channels of either, beside a memory of either kind.

    An output that the kernel cannot address is copied, no other.
    """
    case = Case(device, (4, 6, 5), channels_last=channels_last, branches=2, inputs=2)

    def as_channels_last(m: Tensor) -> Tensor:
        return m.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, m.shape[:2])

    def half(m: Tensor) -> Tensor:
        return torch.cat([m, m + 1], dim=2)[:, :, :4]

    def half_channels_last(m: Tensor) -> Tensor:
        return as_channels_last(torch.cat([m, m], 2))[:, :, :4]

    def mixed(m: Tensor) -> Tensor:
        return m.transpose(2, 4).contiguous().transpose(2, 4)

    memory = case.buffers().memory
    for m_as in (lambda m: m, as_channels_last, half, half_channels_last, mixed):
        wanted = torch.channels_last if channels_last else torch.contiguous_format
        assert case.check(run, m_as).flatten(0, 1).is_contiguous(memory_format=wanted)
        m = m_as(case.m.to(device))
        assert (with_inner_layout(m, memory)[0] is m) == (m_as is not mixed)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_so_and_stays_where_it_is(device: torch.device, value: float) -> None:
    """NaN and infinity from the network are not clamped away, and no other sample sees them."""
    case = Case(device, samples=3, noisy=False, looks_back=False)
    buffers, clean = case.buffers(), case.buffers()
    m = case.m.to(device)
    wave_update(case.table, 0, clean, m, network=case.network)
    m = m.clone()
    m[1, 1] = value
    wave_update(case.table, 0, buffers, m, network=case.network)
    assert bool(buffers.memory[12:14, 1].isnan().all())
    assert bool(buffers.change[2, 1].isnan())
    for other in (0, 2):
        assert torch.equal(buffers.memory[:, other], clean.memory[:, other])
        assert torch.equal(buffers.change[:, other], clean.change[:, other])


def test_an_exact_bracket_leaves_f_untouched(device: torch.device) -> None:
    """F + (G - G) is F to the bit, however large G is."""
    table = WaveTable([Update((), (Correction(0, (1, 2)),))], 3, 0, torch.float32, device, 2)
    f = torch.rand(2, 300, device=device) * 1e-6
    buffers = Buffers(table, f)
    buffers.memory[1:] = torch.randn(300, device=device) * 1e6
    wave_update(table, 0, buffers)
    assert torch.equal(buffers.slots[0], f)


def test_the_same_bits_every_time(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The change is summed in one order: over the blocks of one program, and over programs."""
    monkeypatch.setattr(kernel, "MOST_PROGRAMS", 2)
    case = Case(device, (1500,), samples=1, rows=2)
    case.check(wave_update)
    first, again = case.buffers(), case.buffers()
    for buffers in (first, again, again):
        buffers.memory.copy_(case.memory)
        wave_update(case.table, 0, buffers, case.m.to(device), network=case.network)
    assert torch.equal(first.change, again.change)
    assert torch.equal(first.memory, again.memory)


def test_bytes_moved_are_near_the_fewest() -> None:
    """Over a whole run in half precision under guidance; what is more are rows that make several values."""
    stock = scheduler()
    stock.set_timesteps(100)
    table = wave_table(noise_table(stock), program.srds(100, 20, 2), "2m", torch.zeros(1, 4, 64, 64))
    counts = [traffic(table, number, 2, branches=2, inputs=2) for number in range(len(table.updates))]
    moved, fewest = (sum(count) for count in zip(*counts, strict=True))
    assert fewest < moved <= 1.25 * fewest
    # steady waves: a state read, a row of two branches read, a value kept, two rows written, 24 bytes each
    assert fewest <= 1.35 * 24 * sum(table.num_rows)


@pytest.mark.skipif(not dispatch.interpreted(), reason="counts the interpreter's accesses")
def test_bytes_moved_are_those_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every access of the interpreted kernel to states, network outputs and inputs, against the table's count."""
    from triton.runtime import interpreter

    moved = 0
    builder = interpreter.InterpreterBuilder

    def counted(name: str, mask_at: int) -> None:
        access = getattr(builder, name)

        def count(self: Any, pointers: Any, *args: Any) -> Any:
            nonlocal moved
            if pointers.data.size == kernel.SMALL_BLOCK:
                moved += int(args[mask_at].data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
            return access(self, pointers, *args)

        monkeypatch.setattr(builder, name, count)

    counted("create_masked_load", 0)  # pointers, mask, ...
    counted("create_masked_store", 1)  # pointers, value, mask, ...
    case = Case(CPU, (4, 8, 5), samples=1, branches=2, inputs=2)
    case.check(wave_update)
    assert moved == 160 * traffic(case.table, 0, 2, branches=2, inputs=2).moved


def test_what_does_not_fit_is_named(device: torch.device) -> None:
    case = Case(device, branches=2)
    m, guidance = case.m.to(device), torch.ones(2, device=device)
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("number is 1", {"number": 1}),
        ("m is None", {"m": None}),
        ("m has shape", {"m": m[1:]}),
        ("m is torch.int64", {"m": m.long()}),
        ("m is on meta", {"m": m.to("meta")}),
        ("guidance is torch.float16", {"guidance": guidance.half()}),
        ("guidance has shape", {"guidance": torch.ones(4, device=device)[::2]}),
        ("guidance has shape", {"guidance": torch.ones(2, 1, device=device)}),
        ("buffers were made for another table", {"buffers": Case(device, state=torch.float64).buffers()}),
    ]
    right = {"number": 0, "buffers": case.buffers(), "m": m, "guidance": guidance, "network": case.network}
    for start, changed in wrong:
        with pytest.raises(InvalidArgument, match=f"^{start}"):
            wave_update(case.table, **{**right, **changed})

    x, noises = case.memory[0].to(device).float(), torch.zeros(2, 2, 3, 5, 7, device=device)
    for start, given in (
        ("x is torch.float64", (x.double(), noises)),
        ("x is on meta", (x.to("meta"), noises)),
        ("x has shape", (x[0], noises)),
        ("x has shape", (x[:0], noises[:, :0])),
        (r"noises has 1 entry", (x, noises[:1])),
        ("noises has shape", (x, noises[:, :1])),
        ("noises is torch.float16", (x, noises.half())),
        ("noises is on meta", (x, noises.to("meta"))),
    ):
        with pytest.raises(InvalidArgument, match=f"^{start}"):
            Buffers(case.table, *given)


def test_the_device_of_a_table_is_that_of_tensors(device: torch.device) -> None:
    """ "cuda" is the device of no tensor."""
    table = WaveTable([Update()], 1, 0, torch.float32, torch.device(device.type), 2)
    Buffers(table, torch.zeros(1, 4, device=device))


STEP = Step(5, 0, 0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("update", "why"),
    [
        (Update((STEP, STEP)), "two steps to one slot"),
        (Update((STEP, Step(6, 5, 0, 1.0, 1.0))), "a slot that another step reads"),
        (Update((STEP, Step(6, 0, 0, 1.0, 1.0, looks_back=((4, 1.0), (5, 1.0))))), "a slot that another step reads"),
        (Update((), (Correction(3, (1, 2)), Correction(3, None, compare=4))), "two corrections in one slot"),
        (Update((STEP,), (Correction(3, (5, 2)), Correction(5, None, compare=4))), "reads what a later one writes"),
        (Update((STEP,), (Correction(0, (1, 2)), Correction(5, (3, 4)))), "state of a step that a later one corrects"),
        (Update((), (Correction(3, None, 5, 1, True), Correction(4, None, 3, 3, True))), "are not consecutive"),
        (Update((Step(8, 0, 0, 1.0, 1.0),)), "names 8"),
        (Update((Step(5, 0, -1, 1.0, 1.0),)), "names -1"),
        (Update((), (Correction(3, None, 5, 4),)), "names 4"),
        (Update(gathers=(Gather(9),)), "names 9"),
        (Update((Step(5, 0, 0, 1.0, 1.0, c=0.5),)), "has no clip"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_update_whose_entries_conflict_is_refused(update: Update, why: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"updates\[1\] .*{why}"):
        WaveTable([Update(), update], 8, 3, torch.float32, CPU, 2)


def test_noise_after_samples_have_left(device: torch.device) -> None:
    table = WaveTable([Update((Step(0, 1, 0, 0.0, 0.0, draw=1, s=1.0),))], 2, 0, torch.float32, device, 2)
    noises = torch.arange(24.0, device=device).view(2, 4, 3)
    buffers = Buffers(table, torch.zeros(4, 3, device=device), noises)
    buffers.memory.zero_()
    buffers.keep((1, 2))
    wave_update(table, 0, buffers, torch.zeros(1, 2, 3, device=device))
    assert torch.equal(buffers.memory[0], noises[1, 1:3])


def test_the_reference_can_be_asked_for_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
    assert dispatch.implementation(cuda) == "triton"
    monkeypatch.setenv("SRDS_FAST_KERNELS", "torch")
    assert dispatch.implementation(cuda) == "torch"
    monkeypatch.setenv("SRDS_FAST_KERNELS", "TORCH")
    with pytest.raises(InvalidArgument, match="SRDS_FAST_KERNELS is 'TORCH'"):
        dispatch.implementation(cuda)
    monkeypatch.delenv("SRDS_FAST_KERNELS")
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    assert dispatch.implementation(cuda) == "torch"
