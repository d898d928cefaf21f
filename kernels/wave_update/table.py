"""The updates of a program, and the forms of them that the implementations read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

from ..common.by_field import fields_of
from ..common.clamping import Clip, Threshold
from .columns import Columns, columns
from .instructions import Chains, chains
from .update import Step, Update, check


class WaveTable:
    """The updates of a program, and the tensors made from them. Made once and shared by all runs.

    num_iterations: the largest iteration of a correction; dtype: of the memory, float32 or float64, which coefficients
    are cast to once; ndim: of a state [samples, ...]; clip: what bounds p x + q m; records_moved: for each compared
    correction, record whether any bit has changed. num_changes: entries of the changes that corrections measure. Raises
    InvalidArgument if an update breaks a rule of `update`.
    """

    def __init__(
        self,
        updates: Sequence[Update],
        num_slots: int,
        num_iterations: int,
        dtype: torch.dtype,
        device: torch.device,
        ndim: int,
        clip: Clip | None = None,
        records_moved: bool = False,
    ) -> None:
        for number, update in enumerate(updates):
            check(number, update, num_slots, num_iterations, clip is not None)
        self.updates, self.num_slots, self.num_iterations = tuple(updates), num_slots, num_iterations
        self.dtype, self.ndim, self.clip, self.records_moved = dtype, ndim, clip, records_moved
        # no tensor has device "cuda", only "cuda:0": ask one
        self.device = torch.empty(0, device=device).device
        fields = [fields_of(Step, update.steps) for update in updates]
        rows, looks_back, draws = (
            [each[Step._fields.index(name)] for each in fields] for name in ("row", "looks_back", "draw")
        )
        self.looks_back = any(map(any, looks_back))
        self.draws = max((draw + 1 for found in draws for draw in found if draw is not None), default=0)
        self.num_changes = 1 + max((entry for update in updates for entry in update.measured()), default=-1)
        self.num_rows = [1 + max(found, default=-1) for found in rows]

    @cached_property
    def columns(self) -> list[Columns]:
        """For the reference: each stage of an update as a few batched operations."""
        return columns(self.updates, self.ndim, self.dtype, self.device, self.clip)

    @cached_property
    def chains(self) -> Chains:
        """For the kernel: chains of instructions, one program for each."""
        assert not isinstance(self.clip, Threshold), "the reference runs"
        return chains(self.updates, self.dtype, self.device, self.clip)
