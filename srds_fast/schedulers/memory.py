"""What a scheduler carries from turn to turn, and its turns as a recursion on no more than that.

A turn of a loop is given x_i and the network's output m_i. All else that it needs comes from earlier turns: sums of
their samples, outputs and draws. The space of these sums at a cut between two turns is what the scheduler must carry
across it; its dimension is the rank of the coefficients. The samples count as given from outside here, not as made by
the turns before: a pipeline may change them between two turns, as inpainting does.

The basis of the space is, where possible, what each turn alone adds to it, such as its predicted x0. Such a vector is
then carried unchanged from cut to cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .reader import Triangles

# turns after a cut that show what must be carried across it; PNDM waits 12 turns to use what it keeps of the first one
AHEAD = 16
# singular values and residuals below this, relative to the largest, are rounding
RANK_TOLERANCE = 1e-9


@dataclass(frozen=True, eq=False)
class Memory:
    """A loop of T turns as s_{i+1} = keep[i] @ s_i + of_m[i] * m_i + of_z[i] @ (the draws of turn i).

    s_i holds K_i vectors: x_i, and behind it those that are carried. keep[i]: [K_{i+1}, K_i], of_m[i]: [K_{i+1}],
    of_z[i]: [K_{i+1}, draws of the turn]. All float64 on the CPU. s_0 is x_0 alone, s_T the sample alone.
    """

    keep: tuple[Tensor, ...]
    of_m: tuple[Tensor, ...]
    of_z: tuple[Tensor, ...]

    @property
    def vectors(self) -> int:
        """The largest number of vectors that are passed on from one turn to the next, x_i included."""
        return max(len(column) for column in self.of_m)

    def carried(self, cut: int) -> int:
        """Vectors that are carried beside x across the cut before turn `cut`, 0 to T."""
        return (self.keep[cut].shape[1] if cut < len(self.keep) else len(self.of_m[-1])) - 1

    def part(self, start: int, stop: int) -> Memory:
        """Turns start .. stop - 1, to which the vectors are carried that the first of them is given."""
        return Memory(self.keep[start:stop], self.of_m[start:stop], self.of_z[start:stop])

    def of_given(self) -> Tensor | None:
        """[T, vectors], what x_{i+1} takes of each vector that is carried to the first turn; None: there is none."""
        count = self.carried(0)
        if not count:
            return None
        carried, rows = torch.eye(count, dtype=torch.float64, device="cpu"), []
        for keep in self.keep:
            after = keep[:, 1:] @ carried
            rows.append(after[0])
            carried = after[1:]
        return torch.stack(rows)

    def carried_by(self, x: Tensor, m: Tensor, draws: Tensor | None, given: Tensor | None) -> list[Tensor]:
        """What each turn carries on, [vectors, ...], if these are its sample and its output.

        x, m, draws: [turns, ...], of the first turns; given: [vectors, ...], what is carried to the first of them.
        """
        carried, found = x[:0] if given is None else given, []
        for turn in range(len(m)):
            keep, of_m, of_z = (each[turn][1:].to(x) for each in (self.keep, self.of_m, self.of_z))
            carried = torch.tensordot(keep, torch.cat((x[turn : turn + 1], carried)), dims=1)
            carried = carried + torch.tensordot(of_m, m[turn], dims=0)
            if draws is not None:
                carried = carried + torch.tensordot(of_z.sum(1), draws[turn], dims=0)  # of one draw at most
            found.append(carried)
        return found


def minimal_memory(triangles: Triangles) -> Memory:
    """The recursion with the fewest vectors. Takes 0.1 seconds for 200 turns.

    Raises ValueError if a scheduler uses what it keeps only after more than AHEAD turns.
    """
    turns = triangles.turns
    rows = torch.cat((triangles.of_x, triangles.of_m, triangles.of_z), 1)
    # the turn that each column comes from: samples, outputs, draws
    source = torch.tensor([*range(turns), *range(turns), *triangles.draw_turns], device="cpu")
    unit = torch.eye(rows.shape[1], dtype=torch.float64, device="cpu")
    before = rows[:0]
    keep, of_m, of_z = list[Tensor](), list[Tensor](), list[Tensor]()
    for turn in range(turns):
        kept, after = _basis(rows, source, turn + 1, before)
        own = (source == turn).nonzero()[:, 0]  # x, m and the draws of this turn
        known, wanted = torch.cat((unit[own], before)), torch.cat((rows[turn : turn + 1], after))
        used = known.abs().sum(0) + wanted.abs().sum(0) > 0
        weights = torch.linalg.lstsq(known[:, used].T, wanted[:, used].T, driver="gelsd").solution.T
        if float((weights @ known - wanted).norm() / wanted.norm()) > RANK_TOLERANCE:
            raise ValueError(f"turn {turn} uses what was not passed on to it")
        for number, of_before in kept:  # exactly, without rounding
            weights[1 + number] = 0.0
            weights[1 + number, len(own) + of_before] = 1.0
        weights = torch.where(weights.abs() < torch.finfo(weights.dtype).eps, 0.0, weights)
        keep.append(torch.cat((weights[:, :1], weights[:, len(own) :]), 1))
        of_m.append(weights[:, 1])
        of_z.append(weights[:, 2 : len(own)])
        before = after
    return Memory(tuple(keep), tuple(of_m), tuple(of_z))


def _basis(rows: Tensor, source: Tensor, cut: int, before: Tensor) -> tuple[list[tuple[int, int]], Tensor]:
    """What the turns from `cut` on need of those before, [vectors, columns]; before: the same at the last cut.

    Also returns which of them were there at the last cut: (number here, number there).
    """
    needs = torch.where(source < cut, rows[cut : cut + AHEAD], 0.0)
    # each turn's needs in units of their own, as coefficients grow and shrink along a schedule
    scale = needs.norm(dim=1, keepdim=True)
    needs = (needs / scale)[scale[:, 0] > 0]
    _, values, vectors = torch.linalg.svd(needs, full_matrices=False)
    space = vectors[values > RANK_TOLERANCE]
    if not len(space):
        return [], space
    # what the newest turn alone gives: combinations of the space that are zero in all other columns
    newest = source == cut - 1
    left, values, _ = torch.linalg.svd(space[:, ~newest])
    values = torch.cat((values, values.new_zeros(len(space) - len(values))))
    alone = torch.where(newest, left[:, values <= RANK_TOLERANCE].T @ space, 0.0)
    found, kept = list(alone), list[tuple[int, int]]()
    for number, vector in enumerate(before):
        inside = float((vector - vector @ space.T @ space).norm()) <= RANK_TOLERANCE
        if inside and len(found) < len(space) and _adds(vector, found):
            kept.append((len(found), number))
            found.append(vector)
    basis = torch.stack(found) if found else space[:0]
    if len(basis) < len(space):
        orthonormal = torch.linalg.qr(basis.T)[0].T
        _, values, vectors = torch.linalg.svd(space - space @ orthonormal.T @ orthonormal, full_matrices=False)
        basis = torch.cat((basis, vectors[: len(space) - len(basis)]))
    return kept, basis


def _adds(vector: Tensor, found: list[Tensor]) -> bool:
    """Whether a vector is not a sum of those found."""
    if not found:
        return True
    orthonormal = torch.linalg.qr(torch.stack(found).T)[0].T
    return float((vector - vector @ orthonormal.T @ orthonormal).norm()) > 0.1 * float(vector.norm())
