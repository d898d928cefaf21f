"""Options of the fixed-point methods: collocation, ParaTAA and ParaDiGMS."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from ...errors import InvalidArgument
from .program import FEWEST_NODES

MOST_HISTORY = 5
HALF_A_GREY_LEVEL = 4e-3
# of collocation at this tolerance
NODES = 24
FEWEST_BY_TOLERANCE = 12


@dataclass(frozen=True)
class FixedPoint:
    """Options of the methods that refine all points of the grid at once.

        x_{i+1}^new = f_i(x_i^old) + c_i (x_i^new - x_i^old)

    with f_i the scheduler's step and c_i its response to x_i, the same number for all elements. The methods differ in
    c_i, in the points that a wave moves, and in what mixes the iterates afterwards.

    Attributes:
        data_std: standard deviation of the data that c_i is exact for, if they are Gaussian: 1 is the rotation
            cos(theta_i - theta_{i+1}) of variance-preserving schedules, math.inf the exact linear part
            sqrt(abar_{i+1} / abar_i) of ParaTAA. "auto": 1, as latents are scaled; half the bound where the scheduler
            clips x0. None: c_i = 1, Picard iteration.
        history: differences to earlier iterates that triangular Anderson acceleration mixes, 0 to 5; 0: none. What has
            not settled in the first sweeps goes on with the newest alone.
        regularisation: lambda of the mixing, absolute.
        num_nodes: rows of a wave; the network's output at the points between them is interpolated. None: all points,
            or, of collocation, as many as the tolerance asks for.
        order: steps that the correction reaches along, the k of ParaTAA; None: to the end of the window.
        window: steps that are refined at a time. None: all, of which the sample's own change decides when to stop.
        step_tolerance: bound on the error of every step, by which a window slides, see the methods; with a window only.
    """

    name: ClassVar[str] = "fixed-point"
    data_std: float | Literal["auto"] | None = "auto"
    history: int = 2
    regularisation: float = 1e-3
    num_nodes: int | None = None
    order: int | None = None
    window: int | None = None
    step_tolerance: float | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("history", 0, MOST_HISTORY),
            ("num_nodes", FEWEST_NODES, None),
            ("order", 1, None),
            ("window", 1, None),
        ):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if value is None and name != "history":
                continue
            if not whole or value < low or (high is not None and value > high):
                allowed = f"{low} or more" if high is None else f"{low} to {high}"
                self._refuse(f"{name} is {value!r}. It must be a whole number, {allowed}.")
        for name in ("data_std", "regularisation", "step_tolerance"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if (value is None and name != "regularisation") or (name == "data_std" and value == "auto"):
                continue
            if not number or not value > 0 or (math.isinf(value) and name != "data_std"):
                self._refuse(f"{name} is {value!r}. It must be a positive number.")
        if (self.window is None) != (self.step_tolerance is None):
            self._refuse("window and step_tolerance belong together: a window slides by the errors of its steps.")
        nodes = self.num_nodes is not None or isinstance(self, Collocation)
        if nodes and (self.window is not None or self.order is not None):
            self._refuse("num_nodes goes with neither window nor order: nodes are spread over the whole grid.")

    def _refuse(self, what: str) -> None:
        raise InvalidArgument(f"{type(self).__name__}: {what} See srds_fast.methods for what each option means.")


@dataclass(frozen=True)
class Collocation(FixedPoint):
    """Fixed-point sweeps that evaluate few nodes of the grid a wave and interpolate the network's output between them.

    Along a sampler of many steps the output is a smooth curve: a few of its points tell the others, whatever N. Every
    wave takes other nodes than the one before, and what was evaluated earlier is corrected by what is learnt at the
    nodes: so the limit is the N-step sampler, not an interpolation of it.
    """

    name: ClassVar[str] = "collocation"

    def with_nodes(self, tolerance: float) -> Collocation:
        """The same with as many nodes as a tolerance asks for, where none are given.

        What is interpolated wrongly falls with the square of their number: on the digits pipeline 24 leave about a
        quarter of the default tolerance at most.
        """
        if self.num_nodes is not None or tolerance == 0:
            return self
        asked = round(NODES * math.sqrt(HALF_A_GREY_LEVEL / tolerance))
        return replace(self, num_nodes=max(FEWEST_BY_TOLERANCE, asked))


@dataclass(frozen=True)
class ParaTAA(FixedPoint):
    """ParaTAA (Tang et al., ICML 2024): every point a row, triangular Anderson acceleration.

    By default c_i is a rotation or less instead of the paper's exact linear part, which amplifies errors; `published`
    has it.
    With a window, a step is finished if the root mean square of its residual is within step_tolerance or within
    step_tolerance * sigma, sigma the standard deviation of DDPM's posterior at the step; the window begins at the first
    step that is not.
    """

    name: ClassVar[str] = "parataa"

    @classmethod
    def published(cls, window: int = 100, order: int | None = None, step_tolerance: float = 1e-3) -> ParaTAA:
        """The authors' form, with the defaults of their command line. order: 20 for Stable Diffusion, full for DiT."""
        return cls(data_std=math.inf, history=1, order=order, window=window, step_tolerance=step_tolerance)


@dataclass(frozen=True)
class ParaDiGMS(FixedPoint):
    """ParaDiGMS (Shih et al., NeurIPS 2023): Picard iteration on a sliding window.

    A step is finished if the mean square of what its point moved by is within step_tolerance^2 times the variance of
    DDPM's posterior there; the window slides to the point after the last that is, as long as all before it are.
    """

    name: ClassVar[str] = "paradigms"
    data_std: float | Literal["auto"] | None = None
    history: int = 0
    window: int | None = 10
    step_tolerance: float | None = 0.1
