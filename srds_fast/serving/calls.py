"""Calls of a pipeline for the images of requests: their PNG files, and what they have taken."""

from __future__ import annotations

import io
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..telemetry.report import Report
from .contract import Usage
from .kinds import Image, Kind

# calls whose times tell what the next one of the kind takes, and the share of them that took no longer
LAST, SHARE = 20, 0.9
# the fastest level: higher ones make files a little smaller, and take several times as long
COMPRESSION = 1


@dataclass
class Prepared:
    """Calls of one kind that were warmed up.

    Attributes:
        fast: the compiled pipeline that makes them.
        fallback: why they run on the pipeline's own loop; None if they do not.
    """

    fast: Any
    kind: Kind
    fallback: str | None
    _seconds: deque[float] = field(default_factory=lambda: deque(maxlen=LAST))

    @property
    def expected(self) -> float:
        """Seconds that most of the last calls took at most."""
        ordered = sorted(self._seconds)
        return ordered[min(len(ordered) - 1, int(SHARE * len(ordered)))]

    def call(self, images: Sequence[Image]) -> tuple[list[bytes], Usage]:
        """PNG files of the images, by one call."""
        begun = time.perf_counter()
        files = [png(image) for image in self.fast(**self.kind.arguments(images)).images]
        self._seconds.append(time.perf_counter() - begun)
        return files, usage_of(self.fast.report)


def png(image: Any) -> bytes:
    """The PNG file of a PIL image."""
    in_memory = io.BytesIO()
    image.save(in_memory, format="PNG", compress_level=COMPRESSION)
    return in_memory.getvalue()


def usage_of(report: Report | None) -> Usage:
    """What one call has cost; the times of the request are filled in by who knows when it came."""
    if report is None:
        return Usage(0.0, 0.0, 0, 0, "unknown")
    return Usage(
        seconds=report.seconds,
        queued_seconds=0.0,
        waves=report.waves,
        rows=report.rows,
        plan=report.plan or report.method,
        fallback=report.fallback_reason,
        missed=report.missed,
    )


def sum_of(used: Sequence[Usage]) -> Usage:
    """Of the calls that made the images of a request. used: of each image the usage of its call."""
    calls = list({id(each): each for each in used}.values())
    return replace(
        calls[-1],
        waves=sum(each.waves for each in calls),
        rows=sum(each.rows for each in calls),
        missed=sum(each.missed for each in calls),
        fallback=next((each.fallback for each in calls if each.fallback is not None), None),
    )
