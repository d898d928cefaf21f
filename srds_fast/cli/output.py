"""What people read: tables, numbers, and warnings about times."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..words import counted

# the first call's warm-up and the usual jitter do not explain a larger spread of equal calls
BELIEVABLE_SPREAD = 1.5


def show_table(rows: Sequence[Mapping[str, object]], text: Collection[str] = (), title: str = "") -> None:
    """Print rows under their headings; no cell is cut or wrapped.

    Args:
        rows: cells by heading, the same headings in each row. None is printed as a dash, a float with two decimals.
        text: headings of the columns that are aligned to the left; numbers are aligned to the right.
        title: the line above the table.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in next(iter(rows), {}):
        table.add_column(heading, justify="left" if heading in text else "right", no_wrap=True)
    for row in rows:
        cells = (f"{cell:.2f}" if isinstance(cell, float) else cell for cell in row.values())
        table.add_row(*("-" if cell is None else str(cell) for cell in cells))
    print(title)
    # wider than any table: the content decides how wide a table is, also where the output is a file
    Console(width=10_000, markup=False, emoji=False).print(table)


@contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr with the time left, on a terminal only. Gives a function that is told what begins next.

    Print nothing in the block, as it would run into the bar.

    The bar is drawn when it is told, and not by a thread, which would disturb what is measured.

    Args:
        total: how often it is told.
    """
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    bar = Progress(
        *columns,
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
        auto_refresh=False,
        redirect_stdout=False,  # else rich would send to stderr what is printed meanwhile
        redirect_stderr=False,
    )
    with bar:
        task, begun = bar.add_task("", total=total, visible=False), 0

        def told(text: str) -> None:
            nonlocal begun
            bar.update(task, description=text, completed=begun, visible=True, refresh=True)
            begun += 1

        yield told


def about(args: argparse.Namespace, pipe: Any, prompts: Sequence[str], guidance: float | None) -> str:
    """What is sampled, and on what."""
    images, where = counted(len(prompts), "image"), f"{pipe.device}, {counted(torch.get_num_threads(), 'thread')}"
    if pipe.device.type == "cuda":
        where = torch.cuda.get_device_name(pipe.device)
    scale = "the pipeline's own guidance" if guidance is None else f"guidance {guidance:g}"
    return f"{images}, {scale}, seed {args.seed} for the first, {args.dtype} on {where}"


def about_differences(prompts: Sequence[str]) -> str:
    """How differences are measured."""
    return (
        "mean, p95, max: difference to the pipeline's own call with the same seeds, in grey levels. Each image gives\n"
        "one value, its mean absolute difference before rounding to 8 bits; the columns are mean, 95th percentile and\n"
        f"maximum over {counted(len(prompts), 'image')}."
    )


def warn_if_busy(calls: Iterable[Sequence[float]]) -> None:
    """Warn if the seconds of equal calls lie too far apart: the slowest of some took too many times the fastest."""
    spread = max(max(seconds) / min(seconds) for seconds in calls)
    if spread > BELIEVABLE_SPREAD:
        print(
            f"\nWarning: equal calls differ by up to {spread:.1f} times in their seconds. Something else kept this "
            "machine busy.\nMeasure again when it is idle."
        )


def small(number: float) -> str:
    """A number of any size in few characters: 12.3, 0.651, 2.1e-05."""
    return f"{number:.3g}" if number == 0 or number >= 0.0995 else f"{number:.2g}"


def seconds_of(seconds: float) -> str:
    """Seconds in few characters: 12 s, 0.65 s, 21 ms."""
    if seconds < 0.1:
        return f"{1e3 * seconds:.2g} ms"
    return f"{seconds:.2f} s" if seconds < 9.95 else f"{seconds:.0f} s"
