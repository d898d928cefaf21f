"""How many vectors a scheduler carries from turn to turn, and the turns as a recursion on no more than these.

The triangles of a corrector reach back to turn 0 (UniPC), though it keeps three vectors only. What a cut between two
turns has to pass on is the space that all later turns need of what came before: x_i itself, and what they add to it.
Its dimension is the rank of the coefficients, and a basis of it is a memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .reader import Triangles

# turns after a cut that show what it must pass on; PNDM waits 12 turns to use what it keeps of the first one
AHEAD = 16
# singular values and residuals below this, relative to the largest, are rounding
RANK_TOLERANCE = 1e-9


@dataclass(frozen=True, eq=False)
class Memory:
    """A loop of T turns as s_{i+1} = keep[i] @ s_i + of_m[i] * m_i + of_z[i] @ (the draws of turn i).

    s_i holds K_i vectors; the first one is x_i. keep[i]: [K_{i+1}, K_i], of_m[i]: [K_{i+1}], of_z[i]: [K_{i+1}, draws
    of the turn]. All float64 on the CPU. s_0 is x_0 alone, s_T the sample alone.
    """

    keep: tuple[Tensor, ...]
    of_m: tuple[Tensor, ...]
    of_z: tuple[Tensor, ...]

    @property
    def carried(self) -> int:
        """The largest number of vectors that are passed on from one turn to the next."""
        return max(len(column) for column in self.of_m)


def minimal_memory(triangles: Triangles) -> Memory:
    """The recursion with the fewest vectors. Takes 0.15 seconds for 200 turns, 0.9 for 500.

    Raises ValueError if a scheduler uses what it keeps only after more than AHEAD turns.
    """
    turns, draw_turns = triangles.turns, torch.tensor(triangles.draw_turns, dtype=torch.long)
    samples = _in_inputs(triangles)
    before = _basis(triangles, samples, 0)
    keep, of_m, of_z = list[Tensor](), list[Tensor](), list[Tensor]()
    for turn in range(turns):
        after = _basis(triangles, samples, turn + 1)
        drawn = 1 + turns + (draw_turns == turn).nonzero()[:, 0]
        new = torch.eye(samples.shape[1], dtype=torch.float64)[[1 + turn, *drawn.tolist()]]
        known = torch.cat((before, new))
        weights = torch.linalg.lstsq(known.T, after.T, driver="gelsd").solution.T
        if float((weights @ known - after).norm() / after.norm()) > RANK_TOLERANCE:
            raise ValueError(f"turn {turn} uses what was not passed on to it")
        keep.append(weights[:, : len(before)])
        of_m.append(weights[:, len(before)])
        of_z.append(weights[:, len(before) + 1 :])
        before = after
    return Memory(tuple(keep), tuple(of_m), tuple(of_z))


def _in_inputs(triangles: Triangles) -> Tensor:
    """x_0 ... x_T, [T + 1, 1 + T + draws], as sums of what comes from outside: x_0, the outputs, the draws."""
    turns = triangles.turns
    samples = torch.zeros(turns + 1, 1 + turns + triangles.of_z.shape[1], dtype=torch.float64)
    samples[0, 0] = 1
    for turn in range(turns):
        samples[turn + 1] = triangles.of_x[turn, : turn + 1] @ samples[: turn + 1]
        samples[turn + 1, 1 : 1 + turns] += triangles.of_m[turn]
        samples[turn + 1, 1 + turns :] += triangles.of_z[turn]
    return samples


def _basis(triangles: Triangles, samples: Tensor, cut: int) -> Tensor:
    """x_cut, and orthonormal vectors that span with it what the turns from `cut` on need of those before it."""
    turns, stop = triangles.turns, min(triangles.turns, cut + AHEAD)
    first = samples[cut : cut + 1]
    needs = triangles.of_x[cut:stop, :cut] @ samples[:cut]
    needs[:, 1 : 1 + cut] += triangles.of_m[cut:stop, :cut]
    drawn = [number for number, turn in enumerate(triangles.draw_turns) if turn < cut]
    needs[:, [1 + turns + number for number in drawn]] += triangles.of_z[cut:stop][:, drawn]
    direction = first / first.norm()
    # each turn's needs in units of their own, as coefficients grow and shrink along a schedule
    scale = needs.norm(dim=1, keepdim=True)
    needs = (needs / scale)[scale[:, 0] > 0]
    rest = needs - needs @ direction.T @ direction
    _, values, vectors = torch.linalg.svd(rest, full_matrices=False)
    return torch.cat((first, vectors[values > RANK_TOLERANCE]))
