"""Whether an inferred takeover gives what turns of the loop give: before it is trusted, and in every later call."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ...engine import cancellation
from ...engine.merging.rounding import distance
from ...sampling.recorded.network import RecordedNetwork
from ...sampling.recorded.roles import Answer, ByStep, Column, Inferred, Role, State, Variant
from ..lockstep.placeholders import Placeholders
from ..lockstep.rehearsal import Passes
from ..lockstep.turns import Ran, Turn
from ..module_state import ModuleState
from ..network_checks import CHANGES, TWO_ANSWERS, Checked, why_order_matters
from .calls import parts, parts_of
from .inferred import EXACT, cut, is_scaled, residual

# why a loop makes its own turns
DIFFERS = "its network calls, repeated for rows, give something else"
LEAKS = "the output of its network for a row depends on the other rows of the call"
NOT_ROWS = "its network cannot be called for two rows at once"
OWN_TURNS = DIFFERS, LEAKS, NOT_ROWS


class Agreement:
    """Whether turns of another call of a kind do what is known of it: the kind does not tell what tensors hold.

    placeholders: the answers in the turns. scale: the scheduler's input scale of each step.
    """

    def __init__(self, known: Inferred, placeholders: Placeholders, scale: Sequence[float]) -> None:
        self._known, self._placeholders, self._scale = known, placeholders, scale
        self._first: dict[Variant, list[list[Any]]] = {}
        self._found: list[Tensor] = []  # on the device
        self._holds = True

    def look(self, ran: Ran) -> None:
        """Take a turn into account."""
        variant = self._known.of_step[ran.turn.step]
        batch, odd = divmod(len(ran.x), self._known.copies)
        if odd or variant.kinds != ran.kinds:
            self._holds = False
            return
        if self._known.copies > 1:
            copied = [each.unflatten(0, (self._known.copies, -1)) == each[:batch] for each in (ran.x, ran.m)]
            self._found += [each.all() for each in copied]
        outputs = [self._placeholders.leaves_of(call, number) for number, call in enumerate(ran.calls)]
        self._look_at_guidance(variant, outputs, ran, batch)
        given = list(map(parts_of, ran.calls))
        first = self._first.setdefault(variant, given)
        for leaves, before, pattern in zip(given, first, variant.calls, strict=True):
            for value, other, role in zip(leaves, before, pattern.leaves, strict=True):
                self._look_at(role, value, other, ran, outputs, batch)

    def holds(self) -> bool:
        """All that the turns showed is read from the device at once."""
        return self._holds and bool(torch.stack([each.to(self._found[0].device) for each in self._found]).all())

    def _look_at_guidance(self, variant: Variant, outputs: Sequence[Sequence[Any]], ran: Ran, batch: int) -> None:
        used = [
            leaves[call.output] for leaves, call in zip(outputs, variant.calls, strict=True) if call.output is not None
        ]
        branches = [each for leaf in used for each in cut(leaf, ran.x).chunk(len(leaf) // batch)]
        bound, _ = EXACT.get(branches[0].dtype, EXACT[torch.float32])
        self._found.append(residual(branches, variant.weights[ran.turn.step], ran.m[:batch]) <= bound)

    def _look_at(
        self, role: Role, value: Any, other: Any, ran: Ran, outputs: Sequence[Sequence[Any]], batch: int
    ) -> None:
        step, x = ran.turn.step, ran.x[:batch]
        if isinstance(role, State):
            scale = self._scale[step] if self._known.scaled else 1.0
            fitting = [part for joined, part, _ in parts(value, x) if joined == role.joined]
            self._found += [is_scaled(part.reshape(-1, *x.shape), x, scale) for part in fitting]
            self._holds = self._holds and bool(fitting)
        elif isinstance(role, Answer):
            self._found.append((value == outputs[role.call][role.leaf]).all())
        elif isinstance(role, Column):
            self._equal(value, role.numbers[step])
        elif not isinstance(role, ByStep) and value is not other:
            self._equal(value, other)

    def _equal(self, value: Any, other: Any) -> None:
        if isinstance(value, Tensor):
            self._found.append((value == other).all())
        else:
            self._holds = self._holds and bool(value == other)


def verified(
    network: RecordedNetwork, passes: Passes, first: Ran, *, merged: bool, in_order: bool
) -> Generator[Turn, Ran, Checked | None]:
    """Compare rows with turns of the loop, which call the network: each row alone, and merged in one wave.

    So a takeover is known to be right, and the networks to be functions of their rows. Where foreign code stands in
    one, its answers to rows of all steps, one by one, are also compared with those in another order: 2 N more calls.

    Args:
        first: the loop's first turn. If it was live, its answers count.
        merged: whether waves of several rows are made at all. in_order: rows are made as the loop makes its steps.

    Returns:
        what was found. None: the network gave NaN or Inf, or two rows did not fit into memory, as the run will find.
    """
    begun, last = time.perf_counter(), network.noise.num_steps - 1
    draw = torch.Generator().manual_seed(0)
    inferred = network.inferred
    steps = sorted({0, last, *(variant.steps[-1] for variant in inferred.variants)}) if merged else [0]
    batch = len(network.state)
    # companions are unlike the row, and larger: what leaks from them then exceeds the rounding of half precision
    other = 3 * torch.randn(network.state.shape, generator=draw, dtype=torch.float32, device="cpu").to(first.x)
    rows, expected, calls = list[Tensor](), list[Tensor](), len(first.calls) * first.turn.live
    for step in steps:
        ran = first
        if step != 0 or not first.turn.live:
            given = first.x if step == 0 else torch.cat([other] * inferred.copies)
            cancellation.look()
            ran = yield from passes.turn(Turn(step, given, live=True))
            calls += len(ran.calls)
        rows.append(ran.x[:batch].clone())
        expected.append(ran.m[:batch].clone())
    if not all(bool(each.isfinite().all()) for each in expected):
        return None
    checks = _Checks(network, steps, rows, expected)
    held = ModuleState(network.modules)
    try:
        found = checks.reason(held, in_order=in_order)
    except torch.OutOfMemoryError:
        return None
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AssertionError) as why:
        found = f"{NOT_ROWS} ({type(why).__name__}: {why})"
    return Checked(found, calls + checks.calls, time.perf_counter() - begun)


@dataclass
class _Checks:
    """Makes network calls for rows, and compares them with what turns of the loop gave."""

    network: RecordedNetwork
    steps: Sequence[int]
    rows: Sequence[Tensor]
    expected: Sequence[Tensor]
    calls: int = 0

    def reason(self, held: ModuleState, *, in_order: bool) -> str | None:
        found = self._guided(self.steps, self.rows)
        if (changed := held.changed(in_order=in_order)) is not None:
            return CHANGES.format(changed)
        if self._apart(found, self.expected):
            alone = [self._guided([step], [row]) for step, row in zip(self.steps, self.rows, strict=True)]
            if not self._apart(torch.cat(alone), self.expected):
                return LEAKS
            return TWO_ANSWERS if self._apart(self._guided(self.steps[:1], self.rows[:1]), alone[0]) else DIFFERS
        if in_order:
            return None
        calls = [partial(self._guided, [step], self.rows[:1]) for step in range(self.network.noise.num_steps)]
        return why_order_matters(calls, self.network.modules, self._apart)

    def _guided(self, steps: Sequence[int], rows: Sequence[Tensor]) -> Tensor:
        cancellation.wave(len(steps))
        variants = self.network.inferred.variants
        self.calls += sum(len(each.calls) for each in variants if set(each.steps) & set(steps))
        return self.network.guided(steps, rows)

    def _apart(self, found: Tensor, expected: Sequence[Tensor] | Tensor) -> bool:
        wanted = torch.cat(list(expected))
        return distance(found.flatten(0, 1).to(wanted.dtype), wanted) > self._bound

    @cached_property
    def _bound(self) -> float:
        """A weighted sum also adds up the rounding of its terms."""
        return max(1.0, *(float(each.weights.abs().sum(1).max()) for each in self.network.inferred.variants))
