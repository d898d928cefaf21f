"""Labels of plots that do not overlap: spread apart along one axis, or placed one by one beside their points."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

# where a label may lie beside its point: directions, the best first, then the same farther away
DIRECTIONS = ((1, 1), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0))
DISTANCES = (6, 14, 22, 32, 44, 58)  # in points
PARTS = 40  # in which a line between two points is cut, to see what it runs through
FREE = 2.0  # pixels between a label and what is beside it


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places in the order of the wanted ones, at least a gap apart, within bounds, and near to where they are wanted.

    Places that are too close become one block, which is centred on the mean of what its members want; blocks that
    then touch are joined. This is the least-squares answer (isotonic regression by pooling adjacent violators).
    If there is no room for all gaps, the gaps shrink alike.
    """
    if not wanted:
        return []
    gap = min(gap, (high - low) / max(1, len(wanted) - 1))
    order = sorted(range(len(wanted)), key=lambda number: wanted[number])
    # without the gaps before each place, "at least a gap apart" becomes "not falling"
    most = high - gap * (len(wanted) - 1)
    blocks: list[tuple[float, int]] = []  # mean of what the members want, and how many they are
    for rank, number in enumerate(order):
        mean, count = wanted[number] - rank * gap, 1
        while blocks and blocks[-1][0] > mean:
            before, members = blocks.pop()
            mean, count = (before * members + mean * count) / (members + count), members + count
        blocks.append((mean, count))
    levels = [min(max(mean, low), most) for mean, count in blocks for _ in range(count)]
    found = [0.0] * len(wanted)
    for rank, (number, level) in enumerate(zip(order, levels, strict=True)):
        found[number] = level + rank * gap
    return found


Point = tuple[float, float]


def place(
    axes: Any,
    labels: Sequence[tuple[str, Point, str]],
    lines: Sequence[Sequence[Point]],
    avoid: Sequence[Any] = (),
    **style: Any,
) -> list[Any]:
    """Write each label beside its point, where it covers no other label, no line, and nothing to avoid.

    The first free place is taken, the nearest first; where there is none, the last one is. Call it when the axes have
    their limits, their size and all else that is in them.

    Args:
        labels: (text, point, colour).
        lines: the points that each line of the plot connects.
        avoid: artists of matplotlib.
        style: of all labels.

    Returns:
        the labels, matplotlib annotations.
    """
    axes.figure.draw_without_rendering()  # the layout decides where points lie
    taken = [each.get_window_extent() for each in avoid]
    covered = []
    for line in lines:
        points = [axes.transData.transform(point) for point in line]
        covered += points
        covered += [a + (b - a) * part / PARTS for a, b in itertools.pairwise(points) for part in range(PARTS)]
    written = []
    for text, point, colour in labels:
        label = axes.annotate(text, point, (0, 0), textcoords="offset points", color=colour, **style)
        for distance, (right, up) in itertools.product(DISTANCES, DIRECTIONS):
            label.set_ha(("right", "center", "left")[right + 1])
            label.set_va(("top", "center", "bottom")[up + 1])
            label.set_position((right * distance, up * distance))
            box = label.get_window_extent().padded(FREE)
            inside = axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1) and axes.bbox.containsy(box.y1)
            free = inside and not any(box.overlaps(each) for each in taken)
            if free and not any(box.contains(*each) for each in covered):
                break
        taken.append(label.get_window_extent().padded(FREE))
        written.append(label)
    return written
