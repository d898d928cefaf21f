"""The contract of a solver core.

A core is a generator that owns the mathematics and the state and does no I/O: it never calls a network, asks for a
device or waits for one. It yields

- `Evaluate`, and is sent the network output at those rows, [branches * rows, samples, ...], in the network's dtype;
- `Checkpoint`, a whole sample that has just been computed, and is sent None to continue, or the positions (into the
  samples still running) that continue. The others keep this checkpoint as their result and cost no more rows.

It returns the final samples, [batch, ...]. A plain loop, the loop of a pipeline or a captured graph feeds it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.wave_update import AS_THE_STATE, NetworkInput
from .ahead import Told
from .convergence import Signs


class Evaluate(NamedTuple):
    """One wave: evaluate the network at these rows."""

    x: Tensor  # [branches * rows, samples, ...], the network's input, in the format of `SolverInputs.network`
    # grid position of each row; selects timestep and input scale. A wave may leave out the last rows of its program's
    positions: tuple[int, ...]
    samples: tuple[int, ...]  # which samples of the original batch these are, in order
    number: int  # of the wave in its program
    # by how many steps the rows of each sample are further on than `positions`, the last step at most; None: by none
    shifts: tuple[int, ...] | None = None

    def steps(self, num_steps: int) -> Tensor:
        """Grid position of each row of each sample, [rows, samples], on the CPU. num_steps: N."""
        positions = torch.tensor(self.positions, device="cpu")[:, None]
        shifts = self.shifts or (0,) * len(self.samples)
        return (positions + torch.tensor(shifts, device="cpu")).clamp(max=num_steps - 1)


# what an observer is shown
ITERATION, X0_PREVIEW = "iteration", "x0 preview"


@dataclass(frozen=True)
class Checkpoint:
    """A whole sample after an iteration; streams are also shown x0 that were predicted in the middle of a run."""

    iteration: int  # 0 is the coarse sweep; of a predicted x0: steps that are done
    sample: Tensor  # [samples, ...]
    samples: tuple[int, ...]  # which samples of the original batch these are, in order
    # [samples], mean |x^p - x^(p-1)| of the final point; where all points are refined at once, of the one that moved
    # most, in units of its standard deviation for Gaussian data of deviation 1; None at iteration 0
    change: Tensor | None
    exact: bool  # the sample is the sequential one by construction
    # [samples] bool, no boundary moved by a bit, so none will in later iterations; None if the core was not asked
    stationary: Tensor | None = None
    # [samples], expected mean absolute error of the sample that no change shows; None: there is none
    doubt: Tensor | None = None
    # what changes at boundaries say of the sample, and these, [entries, samples]; None: nothing
    told: Told | None = None
    changes: Tensor | None = None
    # [samples], estimated mean absolute error, where the method itself ended the run; None: `change` decides
    error: Tensor | None = None
    final: bool = False  # of what observers are shown: the run ends with this sample
    kind: str = ITERATION  # or X0_PREVIEW, which no core yields

    def copied(self, *, final: bool) -> Checkpoint:
        """The same with tensors of its own: who looks at it may write into it."""
        return replace(self.mapped(Tensor.clone, *vars(self)), final=final)

    def signs(self) -> list[Signs]:
        """Of each sample. Waits once for the device."""
        assert self.change is not None
        if self.told is not None and self.changes is not None:
            return [self.told.signs(each) for each in zip(*self.changes.tolist(), strict=True)]
        if self.doubt is None:
            return list(map(Signs, self.change.tolist()))
        return list(map(Signs, *torch.stack([self.change, self.doubt]).tolist()))

    def measured(self, take: Callable[[Tensor], Tensor]) -> Checkpoint:
        """The same with another tensor in the place of each that was measured; samples are its last dimension."""
        return self.mapped(take, "change", "stationary", "doubt", "changes", "error")

    def mapped(self, take: Callable[[Tensor], Tensor], *names: str) -> Checkpoint:
        """The same with another tensor in the place of each of these fields that is one."""
        found: dict[str, Any] = {name: take(each) for name in names if isinstance(each := getattr(self, name), Tensor)}
        return replace(self, **found)


def merged(whole: Tensor | None, newest: Tensor, samples: tuple[int, ...]) -> Tensor:
    """The values of the batch, [batch, ...]: the newest, [samples, ...], and what finished samples had before."""
    if whole is None or len(whole) == len(newest):
        return newest
    whole = whole.clone()
    whole[list(samples)] = newest
    return whole


class Trajectory:
    """The states on the grid as they were last computed, [batch, ...] each; None before that."""

    def __init__(self, num_steps: int) -> None:
        # entry i is the state at which step i departs, entry N the sample
        self.x: list[Tensor | None] = [None] * (num_steps + 1)
        # what steps carry to entry i beside x, [batch, vectors, ...]; kept for multistep schedulers only
        self.carried: list[Tensor | None] = [None] * (num_steps + 1)

    def stacked(self, start: Tensor, sample: Tensor) -> Tensor | None:
        """The states of a run, [N + 1, batch, ...], from the starting noise to the sample; None if it left some out."""
        states = [state for state in (start, *self.x[1:-1], sample) if state is not None]
        return torch.stack(states) if len(states) == len(self.x) else None

    def record(self, position: int, x: Tensor, samples: tuple[int, ...]) -> None:
        self.x[position] = merged(self.x[position], x, samples)

    def record_carried(self, position: int, carried: Tensor, samples: tuple[int, ...]) -> None:
        """carried: [vectors, samples, ...]."""
        self.carried[position] = merged(self.carried[position], carried.transpose(0, 1), samples)


class Evaluated:
    """What the network was given at each step of the grid and what it returned, as of its last call there.

    Attributes:
        x, m: by step: the state as the network was given it, and its output, [batch, ...] each.
    """

    def __init__(self) -> None:
        self.x: dict[int, Tensor] = {}
        self.m: dict[int, Tensor] = {}

    def record(self, wave: Evaluate, output: Tensor) -> None:
        """Of a wave, with one branch. Networks and cores may write into their tensors again, so these are copied."""
        shifts = wave.shifts or (0,) * len(wave.samples)
        for shift in sorted(set(shifts)):  # samples that are at the same steps
            columns = [column for column, each in enumerate(shifts) if each == shift]
            samples = tuple(wave.samples[column] for column in columns)
            for row, position in enumerate(wave.positions):
                for kept, newest in ((self.x, wave.x[row]), (self.m, output[row])):
                    whole = kept.get(position + shift)
                    if whole is None and len(columns) < len(shifts):
                        whole = newest  # of the others there is nothing nearer yet
                    kept[position + shift] = merged(whole, newest[columns].clone(), samples)


Constrain = Callable[[Tensor, int, tuple[int, ...]], Tensor]
"""(x [samples, ...], the grid position it has arrived at, which samples) -> x: what holds for every state on the grid.

Inpainting keeps the known part of the image at the noise level of the position. A jump arrives like a step.
"""


@dataclass(frozen=True)
class SolverInputs:
    """What some calls need beyond a program and a noise table."""

    # [N, batch, ...] in the dtype of the state: the fresh noise of every step, drawn before the first wave in the order
    # of the sequential sampler; None for deterministic schedulers
    draws: Tensor | None = None
    constrain: Constrain | None = None  # applied to every state as it arrives
    trajectory: Trajectory | None = None  # filled as the states are computed
    # [vectors, batch, ...], what a multistep scheduler has carried to where the grid begins; None: it begins afresh
    carried: Tensor | None = None
    network: NetworkInput = AS_THE_STATE
    scaled: bool = False  # multiply the network's input with the scheduler's input scale
    guidance: Tensor | None = None  # [branches], weights of the network's outputs; None: one branch, or done elsewhere
    # [N + 1, batch, ...], states of a related sample: methods that refine all points begin with them
    initial_guess: Tensor | None = None
    evaluated: Evaluated | None = None  # filled as the waves are run
    together: bool = False  # the rows of a wave are at the same steps for all samples: `Evaluate.shifts` is None

    @property
    def branches(self) -> int:
        """Of the guidance that the solver adds up."""
        return 1 if self.guidance is None else len(self.guidance)

    def constrained(self, states: Tensor, positions: Iterable[int], samples: tuple[int, ...]) -> Tensor:
        """The states that have arrived at these grid positions, [positions, samples, ...], with the constraint."""
        constrain = self.constrain
        if constrain is None:
            return states
        return torch.stack([constrain(x, position, samples) for x, position in zip(states, positions, strict=True)])

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that a graph of the run reads, by name."""
        known = {"draws": self.draws, "guidance": self.guidance, "initial_guess": self.initial_guess}
        return {name: tensor for name, tensor in known.items() if tensor is not None}

    def unseen(self) -> SolverInputs:
        """The same for a run beside that of the call, which nobody looks at."""
        return replace(self, trajectory=None, evaluated=None)

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> SolverInputs:
        """The same inputs with these tensors in the place of those of `tensors`."""
        draws, guidance, initial_guess = (tensors.get(name) for name in ("draws", "guidance", "initial_guess"))
        return replace(self, draws=draws, guidance=guidance, initial_guess=initial_guess)


NO_INPUTS = SolverInputs()

Answer = Tensor | tuple[int, ...] | None
Core = Generator[Evaluate | Checkpoint, Answer, Tensor]


def output_of(answer: Answer) -> Tensor:
    assert isinstance(answer, Tensor), "an Evaluate is answered with the network output"
    return answer


class Parts:
    """The network's outputs at the parts of a wave, which was too wide for one call."""

    def __init__(self) -> None:
        self._outputs: list[Tensor] = []

    def take(self, answer: Answer, *, last: bool) -> None:
        """Take the next part. It is copied unless it is the last: a network may return one buffer in every call."""
        m = output_of(answer)
        self._outputs.append(m if last else m.clone())

    def joined(self, branches: int) -> Tensor:
        """The output at the whole wave, [branches * rows, samples, ...]; a new wave begins."""
        outputs, self._outputs = self._outputs, []
        if len(outputs) == 1:
            return outputs[0]
        return torch.cat([each.unflatten(0, (branches, -1)) for each in outputs], 1).flatten(0, 1)


def samples_of(answer: Answer, samples: tuple[int, ...]) -> tuple[int, ...]:
    """The positions that continue, from the answer to a Checkpoint."""
    assert not isinstance(answer, Tensor), "a Checkpoint is answered with None or positions"
    return tuple(range(len(samples))) if answer is None else answer
