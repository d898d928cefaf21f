"""The contract of a solver core.

A core is a generator that owns the maths and the state and does no I/O: it never calls a network, looks at a device or
waits for one. It yields

- `Evaluate`, and is sent the network output at those rows, [rows, samples, ...];
- `Checkpoint`, a whole sample that has just come into being, and is sent None to go on, or the positions (into the
  samples still running) that go on; the others keep this checkpoint as their result and cost no more rows.

It returns the final samples, [batch, ...]. Sequential loops, the drive of a pipeline and captured graphs are different
ways to feed the same core.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Evaluate:
    """One wave: evaluate the network at these rows.

    Attributes:
        x: [rows, samples, ...], states in the solver's dtype (before input_scale).
        positions: grid position of each row; selects timestep and input scale.
        samples: which samples of the original batch these are, in order.
    """

    x: Tensor
    positions: tuple[int, ...]
    samples: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A whole sample after an iteration.

    Attributes:
        iteration: 0 is the coarse sweep.
        sample: [samples, ...].
        samples: which samples of the original batch these are, in order.
        change: [samples], mean |x^p - x^(p-1)| of the final point; None at iteration 0.
        exact: the sample is the sequential one by construction (iteration = number of blocks).
        still: [samples] bool, no boundary moved by a bit in this iteration, so no later one can; None when the core
            was not asked to look.
    """

    iteration: int
    sample: Tensor
    samples: tuple[int, ...]
    change: Tensor | None
    exact: bool
    still: Tensor | None = None


Answer = Tensor | tuple[int, ...] | None
Core = Generator[Evaluate | Checkpoint, Answer, Tensor]


def output_of(answer: Answer, request: Tensor) -> Tensor:
    """The network output that answers an Evaluate, in the dtype of the state."""
    assert isinstance(answer, Tensor), "an Evaluate is answered with the network output"
    return answer.to(request.dtype)


def samples_of(answer: Answer, samples: tuple[int, ...]) -> tuple[int, ...]:
    """The positions that go on, from the answer to a Checkpoint."""
    assert not isinstance(answer, Tensor), "a Checkpoint is answered with None or positions"
    return tuple(range(len(samples))) if answer is None else answer
