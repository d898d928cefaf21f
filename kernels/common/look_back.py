"""What steps take of all points before them, where a scheduler carries more from step to step than one x0."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LookBack(NamedTuple):
    """Weights [N, N], strictly lower triangles: of the points and outputs before the one where a step departs.

    They may be of a longer type than the points: sums of large terms are then small.
    of_z: of the draws, its own included; None: no step draws noise. of_given: [N, vectors], of what is carried to the
    first point; None: nothing.
    """

    of_x: Tensor
    of_m: Tensor
    of_z: Tensor | None
    of_given: Tensor | None

    def added(self, x: Tensor, m: Tensor, draws: Tensor | None, given: Tensor | None, last: int) -> Tensor:
        """What the steps before `last` add to that of their own point, [last, samples, ...].

        x: points [>= last, samples, ...]; m, draws: the outputs there, and the noise of the steps; given: what is
        carried to the first point, [vectors, samples, ...]. A step's row of the products has the same length in every
        sweep over the whole grid, so that equal points give equal bits.
        """
        dtype = self.of_x.dtype
        found = self.of_x[:last, :last] @ x[:last].flatten(1).to(dtype)
        found.addmm_(self.of_m[:last, :last], m[:last].flatten(1).to(dtype))
        if self.of_z is not None:
            assert draws is not None
            found.addmm_(self.of_z[:last, :last], draws[:last].flatten(1).to(dtype))
        if self.of_given is not None:
            assert given is not None
            found.addmm_(self.of_given[:last], given.flatten(1).to(dtype))
        return found.to(x.dtype).view(last, *x.shape[1:])
