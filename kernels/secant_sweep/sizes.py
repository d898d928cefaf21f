"""How the elements of a sample are shared among programs, and what a sweep costs."""

from __future__ import annotations

from typing import NamedTuple

import torch

# of a program that holds a whole sample: more of them wait for each other in every sum
MOST_WARPS = 8
# most registers of a thread: left to itself the assembler takes fewer than it needs
REGISTERS = 224
# most programs that share a sample, where it is larger: every one adds up what all of them have summed
MOST_PARTS = 256


class Sharing(NamedTuple):
    """How programs share a sample. It depends on the sample's size alone, so no other sample changes a bit of it.

    Attributes:
        block: elements that a program holds at once.
        warps: of a program.
        parts: programs of a sample.
        tiles: blocks that each of them takes, one after another.
    """

    block: int
    warps: int
    parts: int
    tiles: int

    @property
    def whole(self) -> bool:
        """Whether one program holds all elements."""
        return self.parts == 1


def sharing(elements: int, dtype: torch.dtype, history: int) -> Sharing:
    """How samples of so many elements are shared; dtype: of the state."""
    # of a thread: it holds the values, and the differences of points and outputs, of all its elements
    a_warp = 32 * (8 if history <= 2 else 4) * 4 // dtype.itemsize
    if elements <= MOST_WARPS * a_warp:
        warps = 1
        while warps * a_warp < elements:
            warps *= 2
        return Sharing(warps * a_warp, warps, 1, 1)
    blocks = -(-elements // a_warp)
    tiles = -(-blocks // MOST_PARTS)
    return Sharing(a_warp, 1, -(-blocks // tiles), tiles)


def launches(steps: int, elements: int, dtype: torch.dtype, history: int) -> int:
    """Of a sweep that takes so many steps; elements: of a sample."""
    return 2 if sharing(elements, dtype, history).whole else steps + 3


def bytes_per_element(state: torch.dtype, network: torch.dtype, history: int, *, branches: int = 1) -> int:
    """Bytes that a sweep moves per element and point, if all points are rows of this wave and of the next.

    The learning launch reads the H + 1 newest points, the outputs at H of them, what the last output was expected to
    change by, and the row; it writes the output. The walk reads the same points and H + 1 outputs; it writes the point,
    what its output is expected to change by, and the network's input. Without history the last output is read instead
    of the points.

    Not counted: a first visit writes the outputs of H waves again; at points that are no rows the surprises of four
    nodes come from the cache; noise; where programs share a sample, H + 2 states more that each step reads.
    """
    return (4 * history + 7) * state.itemsize + 2 * branches * network.itemsize
