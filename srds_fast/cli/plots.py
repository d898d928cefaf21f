"""The plots of `demo` and `plan`. They need matplotlib, the extra `plot`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..solvers.registry import SEQUENTIAL

if TYPE_CHECKING:
    from ..planner.plan import Candidate
    from .measure import Convergence

HALF_A_GREY_LEVEL = 0.5
_RED, _BLUE = "#c2410c", "#0064b4"


def convergence_plot(result: Convergence, path: Path) -> None:
    """Draw the difference to sequential over waves, with the iterations along the line, and write it as PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, axes = _figure(4.5)
    stages, steps, stop = result.stages, result.request.steps, result.final.report.waves
    waves = [stage.spent.waves for stage in stages]
    differences = [result.difference(stage.images) for stage in stages]
    p95 = [difference["p95"] for difference in differences]
    axes.plot(waves, p95, "o-", color=_RED, label=f"95th percentile of {len(result.request.prompts)} images")
    axes.plot(waves, [difference["mean"] for difference in differences], "o-", color=_BLUE, label="mean")
    axes.axhline(HALF_A_GREY_LEVEL, color="0.4", linestyle="--", linewidth=1)
    note = {"textcoords": "offset points", "ha": "right", "fontsize": 8, "color": "0.3"}
    right_edge = {"xy": (1, HALF_A_GREY_LEVEL), "xycoords": ("axes fraction", "data")}
    axes.annotate("half a grey level", xytext=(-4, 3), **right_edge, **note)
    for stage, point in zip(stages, zip(waves, p95, strict=True), strict=True):
        axes.annotate(f"{stage.iteration}", point, xytext=(5, 5), textcoords="offset points", fontsize=9)
    for x, text in ((stop, "default tolerance stops"), (steps, SEQUENTIAL)):
        axes.axvline(x, color="0.7", linewidth=1, zorder=0)
        axes.annotate(text, (x, 0), xycoords=("data", "axes fraction"), xytext=(-3, 6), rotation=90, **note)
    axes.set_yscale("log")
    axes.set_xlim(0, 1.02 * max(steps, *waves))
    axes.set_xlabel("waves (network calls one after another); numbers at the points: iteration")
    axes.set_ylabel("difference to sequential, grey levels")
    axes.set_title(f"{steps} steps, {result.plan.num_blocks} blocks, coarse solver {result.plan.coarse_solver}")
    axes.legend(frameon=False)
    figure.savefig(path)


def prediction_plot(measured: Mapping[Candidate, float], path: Path) -> None:
    """Draw measured over predicted seconds of candidates and write it as PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, axes = _figure(5)
    most = 1.1e3 * max(max(candidate.fixed_seconds, seconds) for candidate, seconds in measured.items())
    axes.plot([0, most], [0, most], color="0.7", linewidth=1, zorder=0)
    for candidate, seconds in measured.items():
        point = 1e3 * candidate.fixed_seconds, 1e3 * seconds
        marker, colour = ("s", _RED) if candidate.name == SEQUENTIAL else ("o", _BLUE)
        axes.plot(*point, marker, color=colour)
        axes.annotate(candidate.name, point, xytext=(6, -3), textcoords="offset points", fontsize=8)
    axes.set(xlim=(0, most), ylim=(0, most), xlabel="predicted, ms", ylabel="measured, ms")
    figure.savefig(path)


def _figure(height: float) -> tuple[Any, Any]:
    # not pyplot: it would choose a window system for the whole process
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, height), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.grid(True, which="major", color="0.9", linewidth=0.6)
    return figure, axes
