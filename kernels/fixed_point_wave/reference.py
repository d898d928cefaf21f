"""A sweep in plain PyTorch: the definition that the kernels must equal."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.network_input import NetworkInput, guided, network_input
from .memory import Memory, SweepResult
from .operations import additions, mixed
from .table import Sweep, Table


def sweep(table: Table, wave: Sweep, memory: Memory, m: Tensor, guidance: Tensor | None) -> None:
    """Take the network's output, and write the points behind the first row into `memory.after`."""
    first = wave.first
    memory.m[first : wave.last + 1] = guided(m, guidance, memory.m.dtype)
    added = additions(table, memory, first, table.num_steps)
    points = table.scan.points(memory.x[first:], memory.m[first:], first, added)
    torch.cat([memory.x[: first + 1], points], out=memory.after)


def mix(table: Table, wave: Sweep, memory: Memory, network: NetworkInput, check_stationary: bool) -> SweepResult:
    """Mix the points in `memory.after`, which become the newest iterate."""
    first, x, after = wave.first, memory.x, memory.after
    if table.history:
        after[first + 1 :] = mixed(table, memory, after[first + 1 :], first, table.num_steps)
    moved = after - x
    stationary = None
    if check_stationary:
        stationary = (moved == 0).flatten(2).all(2).all(0)
    change = (table.weight * moved.abs().flatten(2).mean(2)).amax(0)
    memory.advance(table.num_steps)
    following = wave.next_positions
    next_input = None if following is None else network_input(memory.x, following, table.input_scale, network)
    return SweepResult(after[-1].clone(), change, stationary, next_input)
