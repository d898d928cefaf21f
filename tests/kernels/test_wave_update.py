"""The kernel and its batched reference against the definition of an update, written out value by value."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from definitions import thinned
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from problems import GaussianMixture
from torch import Tensor

import srds_fast
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
from srds_fast.kernels.wave_update import buffers as buffers_module
from srds_fast.kernels.wave_update.instructions import chained, instructions
from srds_fast.kernels.wave_update.traffic import traffic
from srds_fast.schedulers.verify import noise_table
from srds_fast.solvers import program
from srds_fast.solvers.contract import Checkpoint
from srds_fast.solvers.srds import srds
from srds_fast.solvers.wave_table import wave_table


def by_definition(
    update: Update,
    memory: list[Tensor],
    m: Tensor | None,
    noises: Tensor | None,
    guidance: list[float],
    clip: float,
) -> tuple[list[Tensor], dict[int, Tensor], dict[int, Tensor]]:
    """The update, in float64: the memory after it, the change and whether a bit moved of each iteration compared."""
    memory = list(memory)
    made = {}
    for value in update.steps:
        assert m is not None
        rows = len(m) // len(guidance)
        x = memory[value.state]
        of_row = sum(weight * m[branch * rows + value.row] for branch, weight in enumerate(guidance))
        x0 = value.p * x + value.q * of_row
        result = value.a * x + value.b * of_row
        if value.c != 0.0:
            result = result + value.c * x0.clamp(-clip, clip)
        if value.before is not None:
            result = result + value.d * memory[value.before]
        if value.draw is not None:
            assert noises is not None
            result = result + value.s * noises[value.draw]
        made[value.keep] = result
    for slot, result in made.items():
        memory[slot] = result
    change, moved = {}, {}
    for each in update.corrections:
        if each.bracket is not None:
            new, old = each.bracket
            memory[each.slot] = memory[each.slot] + (memory[new] - memory[old])
        if each.compare is not None:
            distance = (memory[each.slot] - memory[each.compare]).abs().flatten(1)
            moved[each.iteration] = moved.get(each.iteration, torch.zeros(len(distance)) > 0) | (distance > 0).any(1)
            if each.whole:
                change[each.iteration] = distance.mean(1)
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
        seed: int = 0,
    ) -> None:
        draw = torch.Generator().manual_seed(seed)

        def number() -> float:
            return float(torch.randn((), dtype=torch.float64, generator=draw))

        def step(keep: int, row: int, term: int) -> Step:
            c = 0.0 if clip is None else number()
            before = 5 if looks_back and term != 1 else None
            noise = row % 2 if noisy and term != 0 else None
            coefficients = [number() for _ in range(6)]
            a, b, d, p, q, s = coefficients
            return Step(keep, row, row, a, b, c, d if before else 0.0, p, q, before, noise, s if noisy else 0.0)

        # slots: 0-2 states, 3-9 from earlier waves, 10-15 written now
        steps = [step(10 + 2 * row + term, row, term) for row in range(rows) for term in range(2)]
        corrections = []
        if corrected:
            corrections.append(Correction(3, (4, 6), compare=7, iteration=1))
            if rows:
                corrections.append(Correction(11, (10, 4)))
            if rows > 1:
                corrections.append(Correction(13, (12, 10), compare=8, iteration=2, whole=True))
                corrections.append(Correction(9, None, compare=13, iteration=3, whole=True))
        slots = [11, 3, 11, 0] if rows else [3, 0, 0]
        self.update = Update(
            tuple(steps), tuple(corrections), tuple(Gather(slot, number()) for slot in slots) if gathers else ()
        )
        self.guidance = [number() for _ in range(branches)] if branches > 1 else [1.0]
        self.memory = torch.randn(16, samples, *shape, dtype=torch.float64, generator=draw)
        self.memory[7, 0] = self.memory[3, 0] + self.memory[4, 0] - self.memory[6, 0] + 1.0
        self.noises = torch.randn(2, samples, *shape, dtype=torch.float64, generator=draw) if noisy else None
        self.m = torch.randn(branches * max(rows, 1), samples, *shape, dtype=torch.float64, generator=draw)
        self.m = self.m.to(network)
        self.clip = clip
        self.table = WaveTable([self.update], 16, 3, state, device, 1 + len(shape), clip, records_moved=True)
        self.network = NetworkInput(network, inputs, channels_last)
        self.state, self.device = state, device

    def buffers(self) -> Buffers:
        noises = None if self.noises is None else self.noises.to(self.device, self.state)
        x = self.memory[0].to(self.device, self.state)
        buffers = Buffers(self.table, x, noises, channels_last=self.network.channels_last)
        buffers.memory.copy_(self.memory)
        return buffers

    def check(
        self,
        run: Callable[..., Tensor | None] = wave_update,
        m_as: Callable[[Tensor], Tensor] = lambda m: m,
        number: Any = 0,
        out: Tensor | None = None,
    ) -> Tensor | None:
        """Run the update and hold all that it wrote against the definition; returns the network's input."""
        # what the kernel is given, rounded, is what the definition is given
        memory = [slot.double() for slot in self.memory.to(self.state)]
        noises = None if self.noises is None else self.noises.to(self.state).double()
        wanted, change, moved = by_definition(
            self.update, memory, self.m.double(), noises, self.guidance, self.clip or math.inf
        )
        buffers = self.buffers()
        guidance = torch.tensor(self.guidance, dtype=self.state, device=self.device) if len(self.guidance) > 1 else None
        m = m_as(self.m.to(self.device)) if self.update.steps else None
        found = run(self.table, number, buffers, m, guidance=guidance, network=self.network, out=out)
        close = {"rtol": 2e-5, "atol": 2e-5} if self.state == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
        torch.testing.assert_close(buffers.memory.cpu().double(), torch.stack(wanted), **close)
        for iteration in range(4):
            expected = change.get(iteration, torch.zeros(len(self.memory[0]), dtype=torch.float64))
            torch.testing.assert_close(buffers.change[iteration].cpu().double(), expected, **close)
            expected = moved.get(iteration, torch.zeros(len(self.memory[0])) > 0)
            assert torch.equal(buffers.moved[iteration].cpu(), expected)
        if not self.update.gathers:
            assert found is None
            return None
        assert found is not None
        given = torch.stack([each.scale * wanted[each.slot] for each in self.update.gathers])
        given = torch.cat([given] * self.network.branches)
        assert found.dtype == self.network.dtype
        eps = torch.finfo(found.dtype).eps
        torch.testing.assert_close(found.cpu().double(), given, rtol=max(eps, 2e-5), atol=max(eps, 2e-5))
        return found


def batched(*args: Any, guidance: Tensor | None, network: NetworkInput, out: Tensor | None) -> Tensor | None:
    """The reference, called as the public function is."""
    return reference.wave_update(*args, guidance, network, out)


RUNS = pytest.mark.parametrize("run", [wave_update, batched], ids=["kernel", "reference"])


@RUNS
@pytest.mark.parametrize(
    ("shape", "samples"),
    thinned(
        list(product([(1,), (7,), (3, 5, 7), (4, 16, 16), (513,), (2, 3, 5, 4)], (1, 3))),
        ((1,), 3),
        ((513,), 1),
        ((2, 3, 5, 4), 3),
    ),
    ids=str,
)
def test_shapes(device: torch.device, run: Any, shape: tuple[int, ...], samples: int) -> None:
    Case(device, shape, samples).check(run)


@RUNS
def test_more_elements_than_a_small_state(device: torch.device, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "LARGE_STATE", 2**11)
    case = Case(device, (3, 30, 31), samples=1, rows=2)
    case.check(run)
    if run is wave_update:
        buffers = case.buffers()
        wave_update(case.table, 0, buffers, case.m.to(device), network=case.network)
        assert buffers.scratch is not None
        assert buffers.scratch.block == kernel.LARGE_BLOCK


@RUNS
@pytest.mark.parametrize(
    ("network", "branches"),
    thinned(
        list(product((torch.float32, torch.bfloat16, torch.float16), (1, 2, 3))),
        (torch.float32, 1),
        (torch.bfloat16, 3),
        (torch.float16, 2),
    ),
    ids=str,
)
def test_dtypes_and_branches(device: torch.device, run: Any, network: torch.dtype, branches: int) -> None:
    Case(device, network=network, branches=branches, inputs=branches).check(run)


@RUNS
def test_float64(device: torch.device, run: Any) -> None:
    Case(device, state=torch.float64, network=torch.float64, branches=2).check(run)


@RUNS
@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("gathers", [True, False])
def test_parts_of_an_update(device: torch.device, run: Any, rows: int, corrected: bool, gathers: bool) -> None:
    """The first update only gathers states, the last only corrects; nothing at all is an update too."""
    Case(device, rows=rows, corrected=corrected, gathers=gathers).check(run)


@RUNS
@pytest.mark.parametrize("terms", [{"clip": None}, {"looks_back": False}, {"noisy": False}], ids=str)
def test_terms_left_out(device: torch.device, run: Any, terms: dict[str, Any]) -> None:
    Case(device, **terms).check(run)


@RUNS
@pytest.mark.parametrize("channels_last", [False, True])
def test_memory_formats(device: torch.device, run: Any, channels_last: bool) -> None:
    """Contiguous and channels-last outputs, and half of the channels of either, beside a memory of either kind."""
    case = Case(device, (4, 6, 5), channels_last=channels_last, branches=2, inputs=2)

    def as_channels_last(m: Tensor) -> Tensor:
        return m.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, m.shape[:2])

    def half(m: Tensor) -> Tensor:
        return torch.cat([m, m + 1], dim=2)[:, :, :4]

    for m_as in (lambda m: m, as_channels_last, half, lambda m: as_channels_last(torch.cat([m, m], 2))[:, :, :4]):
        found = case.check(run, m_as)
        assert found is not None
        assert found.flatten(0, 1).is_contiguous(
            memory_format=torch.channels_last if channels_last else torch.contiguous_format
        )


@RUNS
def test_written_where_it_is_told(device: torch.device, run: Any) -> None:
    case = Case(device, inputs=2, network=torch.bfloat16)
    room = torch.full((9, 2, 3, 5, 7), 7.0, dtype=torch.bfloat16, device=device)
    case.check(run, out=room[:8])
    assert bool((room[8] == 7).all())


def test_nan_stays_one_and_stays_where_it_is(device: torch.device) -> None:
    """A NaN from the network is not clamped away, and no other sample sees it."""
    case = Case(device, samples=3, noisy=False, looks_back=False)
    buffers, clean = case.buffers(), case.buffers()
    m = case.m.to(device)
    wave_update(case.table, 0, clean, m, network=case.network)
    m = m.clone()
    m[1, 1] = math.nan
    given = wave_update(case.table, 0, buffers, m, network=case.network)
    assert given is not None
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


@pytest.mark.parametrize(
    "most_programs", [2, *(pytest.param(each, marks=pytest.mark.exhaustive) for each in (1, 1024))]
)
def test_the_same_bits_every_time(device: torch.device, most_programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The change is summed in one order: over the blocks of one program, and over programs."""
    monkeypatch.setattr(kernel, "MOST_PROGRAMS", most_programs)
    case = Case(device, (1500,), samples=1, rows=2)
    case.check()
    m = case.m.to(device)
    first, again = case.buffers(), case.buffers()
    for buffers in (first, again, again):
        buffers.memory.copy_(case.memory)
        wave_update(case.table, 0, buffers, m, network=case.network)
    assert torch.equal(first.change, again.change)
    assert torch.equal(first.memory, again.memory)


SCHEDULERS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "ddim": (lambda: DDIMScheduler(clip_sample=False), {}),
    "ddim clipped": (lambda: DDIMScheduler(clip_sample=True), {}),
    "ddim v": (lambda: DDIMScheduler(clip_sample=False, prediction_type="v_prediction"), {}),
    "ddim sample, clipped": (lambda: DDIMScheduler(prediction_type="sample"), {}),
    "ddim eta": (lambda: DDIMScheduler(clip_sample=False), {"eta": 1.0}),
    "dpm++ 2m": (lambda: DPMSolverMultistepScheduler(), {}),
    "euler": (lambda: EulerDiscreteScheduler(), {}),
    "euler ancestral": (lambda: EulerAncestralDiscreteScheduler(), {}),
    "flow": (lambda: FlowMatchEulerDiscreteScheduler(), {}),
}


@pytest.mark.parametrize(
    ("name", "method"),
    thinned(
        list(product(SCHEDULERS, ("sequential", "exact", "srds"))),
        ("ddim clipped", "sequential"),
        ("dpm++ 2m", "exact"),
        ("dpm++ 2m", "srds"),
        ("ddim eta", "srds"),
        ("euler", "srds"),
    ),
)
def test_samplers_are_the_same_through_either(
    name: str, method: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The programs that the solver cores run: one launch a wave and one before the first, and the same sample."""
    make, options = SCHEDULERS[name]
    mixture = GaussianMixture.random(dimensions=6)
    steps = 9

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        # any smooth function will do: the timesteps of all schedulers lie in 0 .. 1000
        return mixture(x.cpu(), t.cpu().long().clamp(0, 999)).to(x)

    x = torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
    settings: dict[str, Any] = {"method": "srds" if method == "exact" else method, "exact": method == "exact"}
    launches = []

    class Counted:
        def __getitem__(self, grid: Any) -> Any:
            launches.append(grid)
            return wave_update_kernel[grid]

    wave_update_kernel = kernel.wave_update_kernel
    monkeypatch.setattr(kernel, "wave_update_kernel", Counted())

    def sample() -> srds_fast.SampleResult:
        generator = torch.Generator().manual_seed(1)
        return srds_fast.sample(denoiser, x, make(), steps, generator=generator, tolerance=1e-4, **settings, **options)

    found = sample()
    assert len(launches) == found.report.waves + 1
    monkeypatch.setattr(buffers_module, "implementation", lambda device: "torch")
    expected = sample()
    assert len(launches) == found.report.waves + 1
    assert found.report.waves == expected.report.waves
    torch.testing.assert_close(found.sample, expected.sample, rtol=1e-9, atol=1e-9)
    change, wanted = ([each for all_samples in run.report.change for each in all_samples] for run in (found, expected))
    assert [each is None for each in change] == [each is None for each in wanted]
    assert [each or 0.0 for each in change] == pytest.approx([each or 0.0 for each in wanted], rel=1e-6, abs=1e-12)


def test_samples_leave_and_the_rest_goes_on(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = GaussianMixture.random(dimensions=6)
    x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(8)
    table = noise_table(scheduler)

    def sample() -> Tensor:
        core = srds(x, table, program.srds(8, 4, 4))
        answer: Tensor | tuple[int, ...] | None = None
        while True:
            try:
                event = core.send(answer)
            except StopIteration as stop:
                result: Tensor = stop.value
                return result
            if isinstance(event, Checkpoint):
                # sample 1 leaves after iteration 1, two of the others after iteration 2
                answer = {1: (0, 2, 3), 2: (1,)}.get(event.iteration)
            else:
                t = table.timesteps[list(event.positions)].repeat_interleave(len(event.samples))
                answer = mixture(event.x.flatten(0, 1).cpu(), t).to(device).view_as(event.x)

    found = sample()
    monkeypatch.setattr(buffers_module, "implementation", lambda device: "torch")
    torch.testing.assert_close(found, sample(), rtol=1e-9, atol=1e-9)


def default_table(num_steps: int = 100) -> WaveTable:
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(num_steps)
    table: WaveTable = wave_table(
        noise_table(scheduler), program.srds(num_steps, 20, 2), "2m", torch.zeros(1, 4, 64, 64)
    )
    return table


def test_bytes_moved_are_near_the_fewest() -> None:
    """Over a whole run in half precision under guidance; what is more are rows that make several values."""
    table = default_table()
    counts = [traffic(table, number, 2, branches=2, inputs=2) for number in range(len(table.updates))]
    moved, fewest = (sum(count) for count in zip(*counts, strict=True))
    assert fewest < moved <= 1.25 * fewest
    # steady waves: a state read, a row of two branches read, a value kept, two rows written, 24 bytes each
    rows = sum(table.num_rows)
    assert fewest <= 1.35 * 24 * rows


@pytest.mark.skipif(not dispatch.interpreted(), reason="counts the interpreter's accesses")
def test_bytes_moved_are_those_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every access of the interpreted kernel to states, network outputs and inputs, against the table's count."""
    from triton.runtime import interpreter

    moved = 0
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def count(pointers: Any, mask: Any) -> None:
        nonlocal moved
        if pointers.data.size == kernel.SMALL_BLOCK:
            moved += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8

    def counted_load(self: Any, pointers: Any, mask: Any, *args: Any) -> Any:
        count(pointers, mask)
        return load(self, pointers, mask, *args)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
        count(pointers, mask)
        return store(self, pointers, value, mask, *args)

    monkeypatch.setattr(builder, "create_masked_load", counted_load)
    monkeypatch.setattr(builder, "create_masked_store", counted_store)
    case = Case(torch.device("cpu"), (4, 8, 5), samples=1, branches=2, inputs=2)
    case.check()
    assert moved == 160 * traffic(case.table, 0, 2, branches=2, inputs=2).moved


def test_what_does_not_fit_is_named(device: torch.device) -> None:
    case = Case(device, branches=2)
    m, buffers = case.m.to(device), case.buffers()
    guidance = torch.ones(2, device=device)

    def error(**changed: Any) -> str:
        given = {"number": 0, "buffers": buffers, "m": m, "guidance": guidance, "network": case.network, **changed}
        with pytest.raises(InvalidArgument) as caught:
            wave_update(case.table, **given)
        return str(caught.value)

    assert error(number=1).startswith("number is 1")
    assert error(m=None).startswith("m is None")
    assert error(out=m[:4]).startswith("out overlaps m")
    assert error(m=m[1:]).startswith("m has shape")
    assert error(m=m[..., :-1]).startswith("m has shape")
    assert error(m=m.long()).startswith("m is torch.int64")
    assert error(m=m.to("meta")).startswith("m is on meta")
    assert error(m=m.transpose(2, 4).contiguous().transpose(2, 4)).startswith("m has strides")
    assert error(guidance=guidance.half()).startswith("guidance is torch.float16")
    assert error(guidance=torch.ones(4, device=device)[::2]).startswith("guidance has strides")
    assert error(guidance=torch.ones(2, 1, device=device)).startswith("guidance has shape")
    assert error(out=m[:1]).startswith("out has shape")
    assert error(out=torch.empty(4, 2, 3, 5, 7, device=device)).startswith("out is torch.float32")
    other = Case(device, state=torch.float64)
    assert error(buffers=other.buffers()).startswith("buffers were made for another table")
    case.check()

    x, noises = case.memory[0].to(device).float(), torch.zeros(2, 2, 3, 5, 7, device=device)
    for given, start in {
        (x.double(), noises): "x is torch.float64",
        (x.to("meta"), noises): "x is on meta",
        (x[0], noises): "x has shape",
        (x[:0], noises[:, :0]): "x has shape",
        (x, None): "noises has 0 entries",
        (x, noises[:1]): "noises has 1 entries",
        (x, noises[:, :1]): "noises has shape",
        (x, noises.half()): "noises is torch.float16",
        (x, noises.to("meta")): "noises is on meta",
    }.items():
        with pytest.raises(InvalidArgument, match=start):
            Buffers(case.table, *given)


@pytest.mark.parametrize("channels_last", [False, True])
def test_an_output_in_no_order_is_copied(device: torch.device, channels_last: bool) -> None:
    """Cores pass on what networks return: what the kernel cannot address becomes contiguous, the rest stays."""
    memory = Case(device, (4, 6, 5), channels_last=channels_last).buffers().memory
    m = torch.randn(3, 2, 8, 6, 5, device=device)
    for kept in (m, m[:, :, :4], m.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (3, 2))):
        assert with_inner_layout(kept[:, :, :4], memory).data_ptr() == kept.data_ptr()
    mixed = torch.randn(3, 2, 5, 6, 4, device=device).transpose(2, 4)
    found = with_inner_layout(mixed, memory)
    assert found.is_contiguous()
    assert torch.equal(found, mixed)


def test_the_device_of_a_table_is_that_of_tensors(device: torch.device) -> None:
    """ "cuda" is the device of no tensor."""
    table = WaveTable([Update()], 1, 0, torch.float32, torch.device(device.type), 2)
    assert table.device == torch.empty(1, device=device).device
    Buffers(table, torch.zeros(1, 4, device=device))


STEP = Step(5, 0, 0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("update", "why"),
    [
        (Update((STEP, STEP)), "two steps to one slot"),
        (Update((STEP, Step(6, 5, 0, 1.0, 1.0))), "a slot that another step reads"),
        (Update((STEP, Step(6, 0, 0, 1.0, 1.0, before=5, d=1.0))), "a slot that another step reads"),
        (Update((), (Correction(3, (1, 2)), Correction(3, None, compare=4))), "two corrections in one slot"),
        (Update((STEP,), (Correction(3, (5, 2)), Correction(5, None, compare=4))), "reads what a later one writes"),
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
        WaveTable([Update(), update], 8, 3, torch.float32, torch.device("cpu"), 2)


def test_what_a_correction_overwrites_was_read_before(device: torch.device) -> None:
    """A value made from a state, and that state corrected, in one update: one chain, in this order."""
    update = Update((STEP,), (Correction(0, (1, 2)),))
    table = WaveTable([update], 6, 0, torch.float32, device, 2)
    buffers = Buffers(table, torch.ones(1, 3, device=device))
    buffers.memory.copy_(torch.arange(1.0, 7.0, device=device)[:, None, None].expand(6, 1, 3))
    wave_update(table, 0, buffers, torch.full((1, 1, 3), 10.0, device=device))
    assert buffers.memory[5].tolist() == [[11.0] * 3]
    assert buffers.memory[0].tolist() == [[0.0] * 3]
    assert [len(chain) for chain in chained(instructions(update))] == [2]


def test_noise_after_samples_have_left(device: torch.device) -> None:
    table = WaveTable([Update((Step(0, 1, 0, 0.0, 0.0, draw=1, s=1.0),))], 2, 0, torch.float32, device, 2)
    noises = torch.arange(24.0, device=device).view(2, 4, 3)
    buffers = Buffers(table, torch.zeros(4, 3, device=device), noises)
    buffers.memory.zero_()
    buffers.keep((1, 2))
    wave_update(table, 0, buffers, torch.zeros(1, 2, 3, device=device))
    assert torch.equal(buffers.memory[0], noises[1, 1:3])


def test_the_reference_can_be_asked_for_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_has_triton", lambda: True)
    assert dispatch.implementation(torch.device("cuda")) == "triton"
    monkeypatch.setenv("SRDS_FAST_KERNELS", "torch")
    assert dispatch.implementation(torch.device("cuda")) == "torch"
    monkeypatch.setenv("SRDS_FAST_KERNELS", "TORCH")
    with pytest.raises(InvalidArgument, match="SRDS_FAST_KERNELS is 'TORCH'"):
        dispatch.implementation(torch.device("cuda"))
    monkeypatch.delenv("SRDS_FAST_KERNELS")
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    assert dispatch.implementation(torch.device("cuda")) == "torch"
