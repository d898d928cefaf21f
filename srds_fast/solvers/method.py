"""The Method protocol: everything that the rest of the package must know of a method, told by its options.

A method is a frozen dataclass in a file or folder of its own; its fields are what a user can choose. It must give a
name, the bound of its iterations, its program and its core. Everything else has a default here. `registry` makes it
known to `sample`, `compile`, the command and the generic tests.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple, Self

from torch import Tensor

from ..errors import InvalidArgument, UnsupportedScheduler
from ..schedulers.table import NoiseTable
from .contract import Core, SolverInputs
from .convergence import BLOCKS, Contraction
from .program import Program

# what a method promises of its samples: that of the sequential sampler for the same noise, within the tolerance; or
# another one, which has the same law
SAME_SAMPLE, SAME_LAW = "same sample", "same law"


@dataclass(frozen=True)
class Target:
    """What a call asks for, whatever its method; see `compile`.

    stochastic: whether steps add noise. ranks: that share the rows of a wave. same_law: whether samples need only have
    the law of the sequential sampler's.
    """

    num_steps: int
    tolerance: float
    exact: bool = False
    max_iterations: int | None = None
    stochastic: bool = False
    ranks: int = 1
    same_law: bool = False

    @property
    def bitwise(self) -> bool:
        """Stop only if nothing moves by a bit."""
        return self.exact or self.tolerance == 0.0

    @property
    def rows_of_ranks(self) -> tuple[int, ...]:
        """Numbers of rows, of one or two guidance branches each, that leave no rank idle; none for a single rank."""
        return tuple(rows for rows in dict.fromkeys((self.ranks // 2, self.ranks)) if 1 < rows <= self.num_steps)

    @property
    def leaves_choice(self) -> bool:
        """Whether the planner considers other methods than the default one: a bound on iterations is meant for that."""
        return self.max_iterations is None and not self.bitwise


class Stopping(NamedTuple):
    """When a run of N steps stops: the bound of its estimated error, and what the estimate assumes."""

    num_steps: int
    max_iterations: int
    tolerance: float
    contraction: Contraction
    stochastic: bool = False  # whether steps add noise

    @classmethod
    def of(
        cls, options: Method, num_steps: int, max_iterations: int, tolerance: float, *, stochastic: bool
    ) -> Stopping:
        """When a run with these options stops."""
        contraction = options.contraction_of(stochastic=stochastic)
        return cls(num_steps, max_iterations, min(tolerance, contraction.loosest), contraction, stochastic)


class Seen(NamedTuple):
    """A run of N steps that has ended; `changes` of each sample, iteration by iteration, infinite if it diverged.

    stochastic: whether its steps added noise.
    """

    options: Method
    num_steps: int
    stochastic: bool
    changes: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Method(ABC):
    """Base of the options of a method. They check themselves in `__post_init__` and raise InvalidArgument."""

    name: ClassVar[str]  # by which users ask for it
    about: ClassVar[str]  # one line for lists of methods
    advice: ClassVar[str] = "pass another method"  # what to try if the method does not settle
    promise: ClassVar[str] = SAME_SAMPLE  # or SAME_LAW
    takes_warm_start: ClassVar[bool] = False  # it can begin with a trajectory, `SolverInputs.initial_guess`
    contraction: ClassVar[Contraction] = BLOCKS  # how the error of a run is estimated
    first_iteration: ClassVar[int] = 0  # number of its first iteration; 0 if that is a coarse sweep
    # the fewest and the most iterations that calibration considers: fewer are never enough, more take as many waves as
    # the sequential sampler
    tried: ClassVar[tuple[int, int]] = (1, 5)
    weight: ClassVar[int] = 4  # its `expected_iterations` count as much as so many observed runs
    # its first change tells the second one about as well in every run of a kind, see `planner.first_stop`
    learns_first_stop: ClassVar[bool] = False
    seconds_of_a_row: ClassVar[float] = 2e-5  # to make a row of its program and the update behind it, once, about
    scales: ClassVar[bool] = False  # a run tells of runs with other options, see `iterations_from`

    def contraction_of(self, *, stochastic: bool) -> Contraction:
        """How the error of a run is estimated; stochastic: whether its steps add noise."""
        return self.contraction.where_noise_is_added() if stochastic else self.contraction

    @abstractmethod
    def most_iterations(self, target: Target) -> int:
        """Iterations at most, of options that `with_defaults` has filled."""

    @abstractmethod
    def program(self, num_steps: int, max_iterations: int, *, max_rows: int | None, bitwise: bool) -> Program:
        """The waves, which the caller cuts at max_rows; bitwise: the run ends only if nothing moves by a bit."""

    @abstractmethod
    def core(self, x: Tensor, noise: NoiseTable, program: Program, inputs: SolverInputs, *, bitwise: bool) -> Core:
        """The generator that runs the program, not begun; see `contract`. bitwise: fill `Checkpoint.stationary`."""

    def check(self, target: Target) -> None:
        """Raise InvalidArgument if a call asks for what the method cannot do. `num_steps` is not known yet."""
        if self.slides and target.max_iterations is not None:
            raise InvalidArgument(
                f"max_iterations was given together with a window of {self.name}. Its window slides until the last "
                "step has settled. Leave it out, or give the method no window."
            )

    def why_not(self, noise: NoiseTable) -> str | None:
        """Why the method cannot run the steps of a scheduler, as a clause about it; None: it can."""
        return None

    def check_steps(self, noise: NoiseTable) -> None:
        """Raise UnsupportedScheduler if the method cannot run the steps of a scheduler."""
        if (why := self.why_not(noise)) is not None:
            raise UnsupportedScheduler(
                f"method={self.name!r} cannot run this scheduler: {why}. Pass method='auto', or a method that runs all "
                "schedulers, such as 'collocation' or 'srds'."
            )

    def widths(
        self, num_steps: int, iteration: int, max_iterations: int, *, max_rows: int | None, bitwise: bool
    ) -> list[int]:
        """Rows of each wave of a run that stops after `iteration`; the caller cuts waves as those of the program."""
        return self.program(num_steps, max_iterations, max_rows=max_rows, bitwise=bitwise).widths(iteration)

    def rows(self, num_steps: int, max_iterations: int) -> int:
        """Rows of the program, at most: told without making it."""
        return num_steps * max_iterations

    def with_defaults(self, target: Target) -> Self:
        """The options with everything filled in that was left open; raises InvalidArgument if N does not allow them."""
        return self

    @property
    def slides(self) -> bool:
        """Whether what a wave evaluates depends on the values found before: such waves are not recorded as one loop."""
        return False

    @property
    def shows_iterations(self) -> bool:
        """Whether a run has whole samples before its end."""
        return not self.slides

    def fused(self, noise: NoiseTable, *, constrained: bool) -> bool:
        """Whether fused kernels do the arithmetic of its waves on a CUDA device. Otherwise PyTorch does.

        constrained: states are constrained as they arrive, see `SolverInputs.constrain`.
        """
        return not self.slides

    def num_checkpoints(self, max_iterations: int) -> int:
        """Whole samples of a run, at most."""
        return 1 if self.slides else max_iterations + 1 - self.first_iteration

    def reported(self) -> dict[str, Any]:
        """The fields of the Report that describe the method."""
        return {"options": self.to_dict()}

    def candidates(self, target: Target, *, calibrated: bool) -> Iterator[Method]:
        """What the planner compares; calibrated: by measured iterations, so options without a reliable stop are too.

        For several ranks also what fits so many, besides all that is compared for one.
        """
        yield from ()

    def iterations_begun(self, num_steps: int, iteration: int, max_iterations: int) -> int:
        """`max_iterations` of a shorter program with the same waves up to the sample of an iteration."""
        return max_iterations

    def expected_iterations(self, stopping: Stopping) -> tuple[int, ...]:
        """Iterations that runs take with any network, each as likely; empty if a run always takes all of them."""
        return ()

    def iterations_from(self, seen: Seen, stopping: Stopping) -> int | None:
        """Iterations that a run like one seen would take with these options; None if the run tells nothing of them."""
        return None

    def same_iterations(self) -> Self:
        """These options without those that do not change how many iterations a run takes."""
        return self

    def words(self) -> list[str]:
        """What distinguishes these options from others of the method, for the short name of a plan."""
        return []

    def details(self) -> list[str]:
        """The same for the description of a plan."""
        return []

    def notes(self, max_iterations: int) -> list[str]:
        """Lines below the description of a plan."""
        return []

    def to_dict(self) -> dict[str, Any]:
        """The options as plain JSON types; infinite numbers by name."""
        return {name: str(value) if value == math.inf else value for name, value in asdict(self).items()}
