"""The updates of a program and what is made of them: chains that the kernel walks, columns that the references read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

from ..dispatch import implementation
from .batched import Batch, batches
from .chains import Chains, chains
from .padded import Padded, padded
from .update import Update, check


class WaveTable:
    """The updates of a program, and the tensors made from them. Made once, shared by all runs.

    Args:
        updates: in the order they run.
        num_slots: slots of the memory they refer to.
        num_iterations: the largest iteration of a sum.
        dtype: of the memory, float32 or float64; coefficients are cast to it once.
        device: of the memory.
        ndim: dimensions of a state with its samples, [samples, ...].
        clip: bound of p x + q m, or None.
        watches: note for every sum that is compared whether a bit has moved.

    Raises:
        InvalidArgument: an update breaks a rule of `update`.
    """

    def __init__(
        self,
        updates: Sequence[Update],
        num_slots: int,
        num_iterations: int,
        dtype: torch.dtype,
        device: torch.device,
        ndim: int,
        clip: float | None = None,
        watches: bool = False,
    ) -> None:
        for number, update in enumerate(updates):
            check(number, update, num_slots, num_iterations, clip is not None)
        self.updates = tuple(updates)
        self.num_slots = num_slots
        self.num_iterations = num_iterations
        self.dtype = dtype
        # "cuda" is the device of no tensor, "cuda:0" is
        self.device = torch.empty(0, device=device).device
        self.ndim = ndim
        self.clip = clip
        made = [value for update in updates for value in update.made]
        self.looks_back = any(value.before is not None for value in made)
        self.draws = max((value.draw + 1 for value in made if value.draw is not None), default=0)
        self.watches = watches
        self.num_rows = [1 + max((value.row for value in update.made), default=-1) for update in updates]
        self.most_rows = max(self.num_rows)
        self.most_entering = max(len(update.entering) for update in updates)

    def prepare(self) -> None:
        """Make now what updates read: with the first of them it would be copied to the device."""
        made = (self.batches, self.padded) if implementation(self.device) == "torch" else self.chains
        assert made

    @cached_property
    def batches(self) -> list[Batch]:
        """For the reference: each stage of an update as a few batched operations."""
        return batches(self.updates, self.ndim, self.dtype, self.device, self.clip)

    @cached_property
    def padded(self) -> Padded:
        """For the reference with a counter: columns of all updates, as wide as the widest."""
        return padded(self.updates, self.ndim, self.dtype, self.device)

    @cached_property
    def chains(self) -> Chains:
        """For the kernel: instructions in chains that one program each can walk."""
        return chains(self.updates, self.dtype, self.device, self.clip)
