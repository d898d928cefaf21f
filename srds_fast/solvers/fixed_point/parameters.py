"""What can be chosen of a fixed-point method: numbers for the solver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ...errors import InvalidArgument
from ..checks import check_positive, check_whole

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
        order: steps that the correction reaches along, the k of ParaTAA; None: to the end of the window.
        window: steps that are refined at a time. None: all, of which the sample's own change decides when to stop.
        step_tolerance: bound on the error of every step, by which a window slides, see the methods; with a window only.
            None: bounds that keep the sample within `tolerance`.
        tolerance: bound on the mean absolute error of a sample; with a window only. None: the tolerance of the call.
    """

    # a window slides by the residuals of its steps, not by what its points moved by
    slides_by_residuals: ClassVar[bool] = False
    data_std: float | Literal["auto"] | None = "auto"
    history: int = 2
    regularisation: float = 1e-3
    order: int | None = None
    window: int | None = None
    step_tolerance: float | None = None
    tolerance: float | None = None

    def __post_init__(self) -> None:
        check_whole("history", self.history, 0, MOST_HISTORY)
        check_whole("order", self.order, 1, optional=True)
        check_whole("window", self.window, 1, optional=True)
        check_positive("regularisation", self.regularisation)
        check_positive("step_tolerance", self.step_tolerance, optional=True)
        check_positive("tolerance", self.tolerance, optional=True)
        check_positive("data_std", self.data_std, optional=True, infinite=True, word="auto")
        for name in ("step_tolerance", "tolerance"):
            if self.window is None and getattr(self, name) is not None:
                raise InvalidArgument(
                    f"{name} is {getattr(self, name)}, and there is no window. It bounds the errors of the steps that "
                    "a window slides over. Pass a window too, or leave it out."
                )
