"""The pictures of `demo` and `plan`. The contact sheet needs no matplotlib.

The plots do: without it, the extra `plot`, they raise ImportError.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageDraw, ImageFont

from ..files import new_file
from ..planner.plan import Candidate
from ..solvers.registry import SEQUENTIAL
from .measure import Convergence
from .output import small

GAIN = 20
_TILE, _GAP, _TEXT, _LINE = 96, 8, 13, 17
_INK, _FAINT, _ACCENT = (30, 30, 30), (120, 120, 120), (0, 100, 180)
_RED, _BLUE = "#c2410c", "#0064b4"


def contact_sheet(result: Convergence) -> Image.Image:
    """One row per prompt: the image after every iteration, the final one, the sequential one, and their difference."""
    final, reference, stop = result.final, result.stock.images, result.final.report.iterations
    columns = [
        (f"iteration {stage.iteration}", f"{stage.spent.waves} waves", stage.images, stage.iteration == stop)
        for stage in result.stages
    ]
    away = (GAIN * (final.images.float() - reference.float()).abs()).clamp(0, 1)
    columns += [
        ("final", f"{final.report.waves} waves", final.images, True),
        (SEQUENTIAL, f"{result.request.steps} waves", reference, False),
        (f"difference x {GAIN}", f"mean {small(result.difference(final.images)['mean'])}", away, False),
    ]
    font = ImageFont.load_default(size=_TEXT)
    height, width = reference.shape[-2:]
    scale = max(1, round(_TILE / width))  # every pixel of a small image becomes a square
    height, width = height * scale, width * scale
    labels = ["\n".join(textwrap.wrap(prompt, 24)[:4]) for prompt in result.request.prompts]
    margin = max(font.getlength(line) for label in labels for line in label.splitlines())
    left, top = int(margin) + 3 * _GAP, 2 * _LINE + 2 * _GAP
    size = left + len(columns) * (width + _GAP) + _GAP, top + len(labels) * (height + _GAP)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for row, label in enumerate(labels):
        place = left - 2 * _GAP, top + row * (height + _GAP) + height // 2
        draw.multiline_text(place, label, _INK, font, anchor="rm", align="right")
    for number, (heading, note, images, coloured) in enumerate(columns):
        x = left + number * (width + _GAP)
        for y, text, colour in ((_GAP, heading, _INK), (_GAP + _LINE, note, _FAINT)):
            draw.text((x + width // 2, y), text, _ACCENT if coloured else colour, font, anchor="mt")
        for row, image in enumerate(VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(images))):
            tile = image.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(tile, (x, top + row * (height + _GAP)))
    return sheet


def convergence_plot(result: Convergence, path: Path) -> None:
    """Write a PNG: the difference to sequential over waves, with the iterations along the line."""
    figure, axes = _figure(4.5)
    stages, steps, stop = result.stages, result.request.steps, result.final.report.waves
    waves = [stage.spent.waves for stage in stages]
    differences = [result.difference(stage.images) for stage in stages]
    mean, p95 = ([difference[name] for difference in differences] for name in ("mean", "p95"))
    axes.plot(waves, p95, "o-", color=_RED, label=f"95th percentile of {len(result.request.prompts)} images")
    axes.plot(waves, mean, "o-", color=_BLUE, label="mean")
    axes.axhline(0.5, color="0.4", linestyle="--", linewidth=1, label="half a grey level")
    for stage, *point in zip(stages, waves, p95, strict=True):
        axes.annotate(f"{stage.iteration}", point, xytext=(5, 5), textcoords="offset points", fontsize=9)
    where = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "rotation": 90, "ha": "right"}
    for x, text in ((stop, "default tolerance stops"), (steps, SEQUENTIAL)):
        axes.axvline(x, color="0.7", linewidth=1, zorder=0)
        axes.annotate(text, (x, 0), xytext=(-3, 6), fontsize=8, color="0.3", **where)
    axes.set_yscale("log")
    axes.set(xlim=(0, 1.02 * max(steps, *waves)), ylabel="difference to sequential, grey levels")
    axes.set_xlabel("waves (network calls one after another); numbers at the points: iteration")
    axes.set_title(f"{steps} steps, {result.plan.num_blocks} blocks, coarse solver {result.plan.coarse_solver}")
    axes.legend(frameon=False)
    _write(figure, path)


def prediction_plot(measured: Mapping[Candidate, float], path: Path) -> None:
    """Write a PNG: measured over predicted seconds of candidates."""
    figure, axes = _figure(5)
    most = 1.1e3 * max(max(candidate.fixed_seconds, seconds) for candidate, seconds in measured.items())
    axes.plot([0, most], [0, most], color="0.7", linewidth=1, zorder=0)
    for candidate, seconds in measured.items():
        point = 1e3 * candidate.fixed_seconds, 1e3 * seconds
        style = {"marker": "s", "color": _RED} if candidate.name == SEQUENTIAL else {"marker": "o", "color": _BLUE}
        axes.plot(*point, **style)
        axes.annotate(candidate.name, point, xytext=(6, -3), textcoords="offset points", fontsize=8)
    axes.set(xlim=(0, most), ylim=(0, most), xlabel="predicted, ms", ylabel="measured, ms")
    _write(figure, path)


def _write(figure: Any, path: Path) -> None:
    with new_file(path) as unfinished:
        figure.savefig(unfinished, format="png")


def _figure(height: float) -> tuple[Any, Any]:
    # not pyplot: it would choose a window system for the whole process
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, height), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.grid(True, which="major", color="0.9", linewidth=0.6)
    return figure, axes
