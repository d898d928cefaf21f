"""What can be chosen of a fixed-point method: numbers for the solver."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from ...errors import InvalidArgument
from .program import FEWEST_NODES

MOST_HISTORY = 5


@dataclass(frozen=True)
class Parameters:
    """Numbers of the methods that refine all points of the grid at once.

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

    # the network's output is interpolated between nodes
    interpolates: ClassVar[bool] = False
    # a window slides by the residuals of its steps, not by what its points moved by
    slides_by_residuals: ClassVar[bool] = False
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
        nodes = self.num_nodes is not None or self.interpolates
        if nodes and (self.window is not None or self.order is not None):
            self._refuse("num_nodes goes with neither window nor order: nodes are spread over the whole grid.")

    def _refuse(self, what: str) -> None:
        raise InvalidArgument(f"{type(self).__name__}: {what} See srds_fast.methods for what each option means.")
