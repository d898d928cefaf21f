"""What a loop does to its state between two steps, such as pasting the known part of an image back (inpainting).

Every element of a state must either be kept, or be replaced by a number that does not depend on the state. It is found
by handing the loop two states. Anything else, such as a soft mask, is refused: the solver applies the constraint to
every state as it arrives, and may do so twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .turns import refused

# of the numbers in a probe, between these powers of ten: a bound on the state would show
SMALLEST, LARGEST = -2, 3


@dataclass(frozen=True)
class Arrival:
    """What becomes of a state that arrives at a position of the grid: elements are kept, or replaced."""

    kept: Tensor  # bool, [batch, ...]
    values: Tensor  # [batch, ...]

    def apply(self, x: Tensor) -> Tensor:
        return torch.where(self.kept, x, self.values.to(x.dtype))


def arrival(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Arrival:
    """From two states as they were handed out, each with the state that arrived: [batch, ...]."""
    (u, of_u), (v, of_v) = first, second
    kept = (of_u == u) & (of_v == v)
    if not bool((kept | (of_u == of_v)).all()):
        raise refused(
            "between two steps it changes its latents in another way than by replacing a part of them with values "
            "that do not depend on them (a mask must be 0 or 1 everywhere)"
        )
    return Arrival(kept, of_u)


class Probes:
    """States of random numbers of very different sizes, shaped as the first state of a loop, [batch, ...].

    Entries of the batch that are equal in the first state are equal here too: a loop may keep a copy of its state for
    each guidance branch (DiT).
    """

    def __init__(self, x: Tensor) -> None:
        self._x = x.new_empty(()).expand(x.shape)
        equal = [next(first for first in range(len(x)) if torch.equal(x[first], x[other])) for other in range(len(x))]
        self._equal = None if equal == list(range(len(x))) else torch.tensor(equal, device="cpu")

    def __call__(self, number: int) -> Tensor:
        """The state with a number, always the same."""
        x, generator = self._x, torch.Generator().manual_seed(number)
        drawn = torch.randn(x.shape, generator=generator, dtype=torch.float32, device="cpu")
        sizes = 10.0 ** (
            SMALLEST
            + (LARGEST - SMALLEST) * torch.rand(x.shape, generator=generator, dtype=torch.float32, device="cpu")
        )
        found = drawn * sizes if self._equal is None else (drawn * sizes)[self._equal]
        return found.to(device=x.device, dtype=x.dtype)
