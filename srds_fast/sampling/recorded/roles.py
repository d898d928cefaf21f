"""What the arguments of a loop's network calls are, so that the calls of one turn can be repeated for rows.

A loop is described by variants. All steps of a variant make the same calls: of the same networks, with the same
arguments but for the state, numbers and tensors that the step decides, and the outputs of earlier calls of the turn.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


class Joined(NamedTuple):
    """Where an argument holds the state and, beside it, what is the same in every step."""

    dim: int
    state_first: bool


@dataclass(frozen=True)
class State:
    """The state for each guidance branch, [branches * batch, ...]."""

    joined: Joined | None = None  # where something is joined to it; None: it is the state alone


@dataclass(frozen=True)
class Shared:
    """The same for all rows."""


@dataclass(frozen=True)
class PerSample:
    """A tensor with one entry for each branch and sample, repeated for the rows."""


@dataclass(frozen=True)
class Column:
    """A number that the step decides."""

    numbers: tuple[float, ...]  # [N]
    dtype: torch.dtype | None  # None: that of a tensor made from Python's numbers

    @cached_property
    def tensor(self) -> Tensor:
        return torch.tensor(self.numbers, dtype=self.dtype, device="cpu")


@dataclass(frozen=True)
class ByStep:
    """A tensor that the step decides, with one entry for each branch and sample."""

    like: tuple[int, ...]  # for each step, a step that has the same tensor


@dataclass(frozen=True)
class Answer:
    """A part of what an earlier call of the turn returned."""

    call: int
    leaf: int


Role = State | Shared | PerSample | Column | ByStep | Answer


@dataclass(frozen=True, eq=False)
class Pattern:
    """A network call of a turn. roles: as the arguments, by position or name, with a role in the place of each leaf."""

    roles: dict[int | str, Any]
    branches: int
    output: int | None  # the leaf of what it returns that guidance uses; None: other calls use what it returns

    @cached_property
    def leaves(self) -> tuple[Role, ...]:
        return tuple(tree_leaves(list(self.roles.values())))

    @property
    def signature(self) -> Hashable:
        """Equal for calls that treat their arguments alike."""
        return tuple(self.roles), self.leaves, self.output

    def columns(self) -> Iterator[Column]:
        return (leaf for leaf in self.leaves if isinstance(leaf, Column))


@dataclass(frozen=True, eq=False)
class Variant:
    """Steps whose turns make the same calls. kinds: of these. weights: [N, branches], of the guided sum of outputs."""

    kinds: tuple[Hashable, ...]
    steps: tuple[int, ...]
    calls: tuple[Pattern, ...]
    weights: Tensor

    @property
    def shown_by(self) -> set[int]:
        """The steps whose turns show all tensors of the calls."""
        tables = [leaf for call in self.calls for leaf in call.leaves if isinstance(leaf, ByStep)]
        by_step = {leaf.like[step] for leaf in tables for step in self.steps}
        return {self.steps[0], *by_step}


@dataclass(frozen=True, eq=False)
class Inferred:
    """A loop that can be taken over. It is valid for all calls of a kind.

    scaled: its networks are given the state times the scheduler's input scale. copies: of the batch in its state.
    """

    variants: tuple[Variant, ...]
    scaled: bool
    copies: int = 1

    @cached_property
    def of_step(self) -> dict[int, Variant]:
        return {step: variant for variant in self.variants for step in variant.steps}

    @cached_property
    def shown_by(self) -> list[int]:
        return sorted(set().union(*(variant.shown_by for variant in self.variants)))

    @cached_property
    def guidance(self) -> Tensor | None:
        """The weights, [branches], where they are the same in all steps."""
        weights = self.variants[0].weights
        constant = len(self.variants) == 1 and bool((weights == weights[0]).all())
        return weights[0] if constant else None
