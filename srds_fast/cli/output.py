"""What people read: tables, numbers, and warnings about times."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
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


def about(args: argparse.Namespace, pipe: Any, prompts: Sequence[str]) -> str:
    """What is sampled, on what, and how differences are measured."""
    images, where = counted(len(prompts), "image"), f"{pipe.device}, {counted(torch.get_num_threads(), 'thread')}"
    if pipe.device.type == "cuda":
        where = torch.cuda.get_device_name(pipe.device)
    return (
        f"{images}, guidance {args.guidance:g}, seed {args.seed} for the first, {args.dtype} on {where}.\n"
        "mean, p95, max: difference to the stock pipeline with the same seeds, in grey levels. Each image gives one\n"
        "value, its mean absolute difference before rounding to 8 bits; the columns are mean, 95th percentile and\n"
        f"maximum over {images}."
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
