"""The constants of a grid, and the rows of each sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.clamping import Clip
from ..common.look_back import LookBack

# nodes that a local polynomial goes through: it is cubic
LOCAL = 4


class Interpolation(NamedTuple):
    """How the surprises of a wave are carried from its nodes to other points. Tensors are on the device.

    Attributes:
        first: position of the first of the points, which is the first of the nodes.
        nodes: [K], rows of the wave that are nodes: those that an earlier wave has asked already. In the first one all
            are.
        weights: [N - first, K], cubic through the four nodes around each point.
        doubt: [N - first, K], what these weights differ by from those of a piecewise linear curve.
    """

    first: int
    nodes: Tensor
    weights: Tensor
    doubt: Tensor


class Around(NamedTuple):
    """What the kernel reads of a wave: for each point from its first row on, the nodes that surprises come from.

    Attributes:
        places: [N - first, 2 + 2 * LOCAL] int32. Of each point: its row, -1 for none; 1 if this wave is the first to
            ask it; the rows of the LOCAL nodes around it, and their positions. Where there are fewer, and where none
            count, the remaining ones are row 0 with weight 0.
        weights: [N - first, 2 * LOCAL], of these nodes: `Interpolation.weights`, then `Interpolation.doubt`.
    """

    places: Tensor
    weights: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> Around:
        return Around(self.places.to(device), self.weights.to(device, dtype))


class SecantWave(NamedTuple):
    """The rows of a sweep. Tensors are on the device, of positions int64.

    Attributes:
        first: position of the first row.
        positions: [rows], of all rows.
        interpolation: None where no row is a node, or all points are rows.
        new, new_positions: rows that no wave before has asked, and where they are; empty in the first one.
        full: all points from `first` on are rows.
        around: the same for the kernel.
        next_positions: of the rows of the next wave; None: there is none.
        next_rows: [N + 1] int32, each point's row in the next wave, -1 for none.
    """

    first: int
    positions: Tensor
    interpolation: Interpolation | None
    new: Tensor
    new_positions: Tensor
    full: bool
    around: Around
    next_positions: Tensor | None
    next_rows: Tensor


@dataclass(frozen=True, eq=False)
class SecantTable:
    """The constants of a grid, on the device, in the dtype of the state.

    The step from point i is f_i(x, m) = a_i x + b_i m + e_i clamp(p_i x + q_i m) + momentum and noise. Columns,
    [N, 1, 1], broadcast over states [N, samples, elements].

    Attributes:
        a, b, e, p, q: of the steps.
        clip: what bounds x0; None: e is zero.
        momentum, spread: of multistep and stochastic steps, as in `NoiseTable`; None: they have none.
        response: r, the expected derivative of the network's output with respect to the state: (J - p) / q, where x0
            responds with J = alpha s^2 / (alpha^2 s^2 + sigma^2) to x for Gaussian data of standard deviation s.
        largest: bound of the response that secants add, as a factor of norms.
        smallest: squared norm of an element's movement that teaches nothing.
        input_scale: [N, 1, ...] the network's input is input_scale * x; None: it is x.
        growth: [N + 1, 1, ...], of the first guess, from the starting noise on.
        weight: [N + 1, 1], 1 for the last point, less for points whose states have a larger standard deviation.
        reach: [N, 1], by how much an error of the output at each point moves the last point, expected.
        rows: for each wave, the positions of its rows.
        waves: by the number of a sweep's last wave.
        history: most differences that secants go through.
        regularisation: lambda, relative to the largest squared movement.
        numbers: [N, 11], what the kernel reads of each step, see `step_numbers`.
        look_back: what steps take of the points before theirs; None: nothing, or momentum.
    """

    a: Tensor
    b: Tensor
    e: Tensor
    p: Tensor
    q: Tensor
    clip: Clip | None
    momentum: Tensor | None
    spread: Tensor | None
    response: Tensor
    largest: Tensor
    smallest: Tensor
    input_scale: Tensor | None
    growth: Tensor
    weight: Tensor
    reach: Tensor
    rows: Sequence[Tensor]
    waves: Mapping[int, SecantWave] | Sequence[SecantWave]
    history: int
    regularisation: float
    numbers: Tensor
    look_back: LookBack | None = None

    @property
    def num_steps(self) -> int:
        return len(self.a)

    def differences(self, sweeps: int) -> int:
        """How many earlier waves the secants go through after so many sweeps."""
        return min(sweeps, self.history)


def step_numbers(table_columns: Sequence[Tensor | None]) -> Tensor:
    """`SecantTable.numbers`.

    table_columns: a, b, e, p, q, response, largest, smallest, momentum, spread and reach, of N numbers each; None: 0.
    """
    columns = [None if each is None else each.flatten() for each in table_columns]
    (some, *_) = (each for each in columns if each is not None)
    return torch.stack([torch.zeros_like(some) if each is None else each for each in columns], 1)


def around(
    positions: Sequence[int], new: Sequence[int], nodes: Sequence[int], weights: Tensor, doubt: Tensor, num_steps: int
) -> Around:
    """For the kernel what a wave knows of its nodes, on the CPU.

    positions: of all rows. new: rows that no wave before has asked. nodes: rows that are nodes. weights, doubt: as in
    `Interpolation`, [points, nodes]; of no nodes: nothing is interpolated.
    """
    first = positions[0]
    places = torch.zeros(num_steps - first, 2 + 2 * LOCAL, dtype=torch.int32, device="cpu")
    places[:, 0] = -1
    at = torch.tensor(positions, device="cpu") - first
    places[at, 0] = torch.arange(len(positions), dtype=torch.int32, device="cpu")
    places[at[list(new)], 1] = 1
    places[:, 2 + LOCAL :] = first
    local = torch.zeros(num_steps - first, 2, LOCAL, dtype=weights.dtype, device="cpu")
    if len(nodes):
        where, rows = torch.tensor([positions[row] for row in nodes], device="cpu"), torch.tensor(nodes, device="cpu")
        points = torch.arange(int(where[0]), num_steps, device="cpu")
        # as many nodes behind a point as before it, where there are as many
        size = min(LOCAL, len(nodes))
        begin = (torch.searchsorted(where, points, right=True) - size // 2).clamp(0, len(nodes) - size)
        index = begin[:, None] + torch.arange(size, device="cpu")
        behind = points - first
        places[behind, 2 : 2 + size] = rows[index].int()
        places[behind, 2 + LOCAL : 2 + LOCAL + size] = where[index].int()
        for number, each in enumerate((weights, doubt)):
            local[behind, number, :size] = each.gather(1, index)
    return Around(places, local.flatten(1))
