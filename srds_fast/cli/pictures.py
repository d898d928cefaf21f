"""The pictures of `demo` and `plan`. The contact sheet needs no matplotlib.

The plots do: without it, the extra `plot`, they raise ImportError.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..files import new_file
from ..planner.plan import Candidate
from .labels import place
from .measure import grey_levels
from .output import small

CONTACT_SHEET, CONVERGENCE = "contact-sheet.png", "convergence.png"
GAIN = 20
# pixels; readable where the sheet is shown at half its size
_TILE, _GAP, _TEXT, _LINE = 128, 12, 20, 26
_INK, _FAINT, _ACCENT = (30, 30, 30), (90, 90, 90), (0, 90, 170)
_RED, _BLUE = "#c2410c", "#0064b4"
# points, at 7.5 inches of width
_FONT = 13


class Column(NamedTuple):
    """A column of the contact sheet: two lines of text over images [n, channels, height, width] in [0, 1]."""

    heading: str
    note: str
    images: Tensor
    coloured: bool = False


class Point(NamedTuple):
    """A point of the convergence plot; difference: "mean" and "p95", in grey levels."""

    x: float
    difference: Mapping[str, float]
    label: str


def draw(out: Path, sheet: Image.Image, plot: Callable[[Path], None]) -> None:
    """Write the contact sheet and, if matplotlib is installed, the convergence plot into a folder; say where."""
    with new_file(out / CONTACT_SHEET) as unfinished:
        sheet.save(unfinished)
    print(f"\ncontact sheet     {out / CONTACT_SHEET}")
    try:
        plot(out / CONVERGENCE)
        print(f"convergence plot  {out / CONVERGENCE}")
    except ImportError:
        print("convergence plot  not drawn, matplotlib is not installed: pip install 'srds-fast[plot]'")


def contact_sheet(prompts: Sequence[str], columns: Sequence[Column], final: Tensor, reference: Tensor) -> Image.Image:
    """One row for each prompt: the columns, and the difference of the final images to the reference."""
    away = (GAIN * (final.float() - reference.float()).abs()).clamp(0, 1)
    off = Column(f"difference x {GAIN}", f"mean {small(grey_levels(final, reference)['mean'])}", away)
    columns = [*columns, off]
    font = ImageFont.load_default(size=_TEXT)
    height, width = reference.shape[-2:]
    scale = max(1, round(_TILE / width))  # every pixel of a small image becomes a square
    height, width = height * scale, width * scale
    labels = ["\n".join(textwrap.wrap(prompt, 16)[:4]) for prompt in prompts]
    margin = max(font.getlength(line) for label in labels for line in label.splitlines() or [""])
    left, top = int(margin) + 3 * _GAP, 2 * _LINE + 2 * _GAP
    # a column is as wide as its text, so that headings never touch
    texts = [max(font.getlength(each.heading), font.getlength(each.note)) for each in columns]
    widths = [max(width, int(text) + 1) for text in texts]
    size = left + sum(widths) + _GAP * (len(columns) + 1), top + len(labels) * (height + _GAP)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    for row, label in enumerate(labels):
        at = left - 2 * _GAP, top + row * (height + _GAP) + height // 2
        pen.multiline_text(at, label, _INK, font, anchor="rm", align="right")
    x = left
    for wide, (heading, note, images, coloured) in zip(widths, columns, strict=True):
        for y, text, colour in ((_GAP, heading, _INK), (_GAP + _LINE, note, _FAINT)):
            pen.text((x + wide // 2, y), text, _ACCENT if coloured else colour, font, anchor="mt")
        for row, image in enumerate(VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(images))):
            tile = image.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(tile, (x + (wide - width) // 2, top + row * (height + _GAP)))
        x += wide + _GAP
    return sheet


def convergence_plot(points: Sequence[Point], marks: Mapping[str, float], x: str, title: str, path: Path) -> None:
    """Write a PNG: the difference to sequential of each point, on the way.

    Args:
        marks: what is reached at an x.
        x: what x is.
    """
    figure, axes = _figure(6.0)
    places = [point.x for point in points]
    p95, mean = ([max(point.difference[name], 1e-4) for point in points] for name in ("p95", "mean"))
    if p95 != mean:  # there are several images
        axes.plot(places, p95, "o-", color=_RED, label="95th percentile of images")
    axes.plot(places, mean, "o-", color=_BLUE, label="mean of images" if p95 != mean else "the image")
    axes.axhline(0.5, color="0.35", linestyle="--", linewidth=1.2, label="half a grey level")
    lines = [
        axes.axvline(at, color="0.35", linestyle=style, linewidth=1.5, label=text, zorder=0)
        for (text, at), style in zip(marks.items(), (":", "-."), strict=False)
    ]
    axes.set_yscale("log")
    axes.set(xlim=(0, 1.04 * max([*marks.values(), *places])), xlabel=x)
    axes.set_ylabel("difference to sequential,\ngrey levels")
    axes.set_title(title, fontsize=_FONT)
    axes.margins(y=0.12)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=_FONT - 1)
    upper = list(zip(places, p95, strict=True))
    labels = [(point.label, at, "0.1") for point, at in zip(points, upper, strict=True)]
    place(axes, labels, [upper, list(zip(places, mean, strict=True))], avoid=lines, fontsize=_FONT - 2)
    _write(figure, path)


def prediction_plot(measured: Mapping[Candidate, float], path: Path) -> None:
    """Write a PNG: measured and predicted seconds of candidates, a line for each."""
    figure, axes = _figure(1.6 + 0.36 * len(measured))
    order = sorted(measured, key=lambda candidate: -measured[candidate])
    for row, candidate in enumerate(order):
        predicted, seconds = 1e3 * candidate.fixed_seconds, 1e3 * measured[candidate]
        axes.plot([predicted, seconds], [row, row], color="0.7", linewidth=2, zorder=1)
        axes.plot(predicted, row, "o", color=_RED, fillstyle="none", label="predicted" if not row else None)
        axes.plot(seconds, row, "o", color=_BLUE, label="measured" if not row else None)
    axes.set_yticks(range(len(order)), [candidate.name for candidate in order])
    axes.set(xlim=(0, None), xlabel="ms of the denoising loop")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=_FONT - 1)
    _write(figure, path)


def _write(figure: Any, path: Path) -> None:
    with new_file(path) as unfinished:
        figure.savefig(unfinished, format="png")


def _figure(height: float) -> tuple[Any, Any]:
    # not pyplot: it would choose a window system for the whole process
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"font.size": _FONT}):
        figure = Figure(figsize=(9, height), dpi=125, layout="constrained")
        axes = figure.add_subplot()
    axes.grid(True, which="major", color="0.9", linewidth=0.6)
    return figure, axes
