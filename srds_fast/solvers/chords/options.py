"""Options of CHORDS."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from ...errors import InvalidArgument


@dataclass(frozen=True)
class Chords:
    """CHORDS (Han et al., ICCV 2025): cores that start further and further along, the slower rectify the faster.

    Attributes:
        num_cores: rows of a wave, at most. 1 is the sequential sampler.
        starts: steps at which the cores begin, ascending from 0; None: as the paper spaces them.
    """

    name: ClassVar[str] = "chords"
    num_cores: int = 4
    starts: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        cores = self.num_cores
        if isinstance(cores, bool) or not isinstance(cores, int) or cores < 1:
            raise InvalidArgument(f"Chords: num_cores is {cores!r}. It must be a whole number, 1 or more. Pass one.")
        if self.starts is not None:
            starts = tuple(self.starts)
            object.__setattr__(self, "starts", starts)
            if len(starts) != cores or starts[0] != 0 or any(a >= b for a, b in pairwise(starts)):
                raise InvalidArgument(
                    f"Chords: starts is {starts}. It must be {cores} steps, ascending, the first 0. Pass such steps."
                )
