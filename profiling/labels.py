"""What a range, or what a GPU did, is part of: the lines of the report's table.

What a GPU did belongs to the ranges in which the host launched it. If it is a node of a graph, the host was in "replay"
then: which wave it belongs to is told by the ranges in which the node was recorded, if the profiler saw that. If it did
not, a wave of a replay is taken to end with its update, known by the name of the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .nsys import Range, Work

# of the kernel in kernels/wave_update/kernel.py
UPDATE = "wave_update"
# looked into no further: what networks do there is part of no wave
ASIDE = ("encode", "plan", "trace", "stock", "decode", "record")
ORDER = (
    "encode", "plan", "trace", "iteration", "replay", "wave, coarse", "wave, fine", "wave, mixed", "wave", "network",
    "coarse", "fine", "wave_update", "checkpoint", "stock", "decode", "record",
)  # fmt: skip
"""Of the lines."""

Labels = frozenset[str]


def of_wave(kind: str | None) -> str:
    """The label of a wave; kind: "coarse", "fine" or "mixed"; None: not known."""
    return "wave" if kind is None else f"wave, {kind}"


def of_range(each: Range) -> str:
    """The label of a range alone."""
    return of_wave(each.category) if each.kind == "wave" else each.kind


def aside(each: Range) -> str | None:
    """The part of the call that it lies in, if that is not looked into."""
    return next((around.kind for around in each.path() if around.kind in ASIDE), None)


def around(each: Range | None) -> Labels:
    """The labels of all that something in this range is part of. A checkpoint is no part of the wave before it."""
    if each is None:
        return frozenset()
    if (only := aside(each)) is not None:
        return frozenset((only,))
    kept = ("checkpoint", "iteration") if each.inside("checkpoint") else None
    return frozenset(of_range(at) for at in each.path() if at.kind != "call" and (kept is None or at.kind in kept))


@dataclass
class ReplayedWave:
    """A wave that a graph ran.

    Attributes:
        kind: "coarse", "fine" or "mixed"; None: not known.
        rows: of the network call; None: not known.
        works: what the GPU did.
    """

    kind: str | None
    rows: int | None
    works: list[Work] = field(default_factory=list)


@dataclass
class Replay:
    """One launch of a graph, taken apart.

    Attributes:
        waves: in order.
        labels: of the work that is part of them.
        by_name: told by the names of kernels.
    """

    waves: list[ReplayedWave]
    labels: dict[Work, Labels]
    by_name: bool


def replay_of(works: Sequence[Work], count: int) -> Replay:
    """Take a launch apart.

    Args:
        works: of its nodes, in order of their start.
        count: of the waves that the host says are in it.
    """
    if any(work.created is not None and work.created.inside("wave") for work in works):
        return _by_creation(works)
    return _by_name(works, count)


def _by_creation(works: Sequence[Work]) -> Replay:
    waves: dict[Range, ReplayedWave] = {}
    labels: dict[Work, Labels] = {}
    for work in works:
        created = work.created
        wave = None if created is None else created.inside("wave")
        if created is None or wave is None:
            continue
        labels[work] = frozenset(of_range(each) for each in created.path() if each.depth >= wave.depth)
        waves.setdefault(wave, ReplayedWave(wave.category, wave.payload)).works.append(work)
    return Replay(list(waves.values()), labels, by_name=False)


def _by_name(works: Sequence[Work], count: int) -> Replay:
    waves: list[ReplayedWave] = []
    ended = True
    for work in works:
        updates = UPDATE in work.name
        if ended and not updates:
            waves.append(ReplayedWave(None, None))
        if waves:
            waves[-1].works.append(work)
        ended = updates
    if waves and not ended:
        waves.pop()  # what follows the last update is part of no wave
    # what makes the first wave ready may end with an update too
    waves = waves[-count:] if count else []
    labels = {
        work: frozenset((of_wave(None), "wave_update" if UPDATE in work.name else "network"))
        for wave in waves
        for work in wave.works
    }
    return Replay(waves, labels, by_name=True)
