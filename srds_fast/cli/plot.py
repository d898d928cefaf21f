"""The convergence plot. Needs matplotlib, the extra `plot`."""

from __future__ import annotations

from pathlib import Path

from .refining import Convergence

HALF_A_GREY_LEVEL = 0.5


def convergence_plot(result: Convergence, path: Path) -> None:
    """Draw the difference to sequential over waves, with the iterations along the line, and write it as PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    # not pyplot: it would pick a window system for the whole process
    from matplotlib.figure import Figure

    stages, steps = result.stages, result.request.steps
    waves = [stage.spent.waves for stage in stages]
    mean = [stage.difference.mean for stage in stages]
    p95 = [stage.difference.p95 for stage in stages]

    figure = Figure(figsize=(7.5, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(waves, p95, "o-", color="#c2410c", label=f"95th percentile of {len(result.request.prompts)} images")
    axes.plot(waves, mean, "o-", color="#0064b4", label="mean")
    axes.axhline(HALF_A_GREY_LEVEL, color="0.4", linestyle="--", linewidth=1)
    axes.annotate(
        "half a grey level",
        (1, HALF_A_GREY_LEVEL),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color="0.3",
    )
    for stage in stages:
        axes.annotate(
            f"{stage.iteration}",
            (stage.spent.waves, stage.difference.p95),
            xytext=(5, 5),
            textcoords="offset points",
            fontsize=9,
        )
    axes.axvline(result.final.report.waves, color="0.7", linewidth=1, zorder=0)
    axes.axvline(steps, color="0.7", linewidth=1, zorder=0)
    for x, text in ((result.final.report.waves, "default tolerance stops"), (steps, "sequential")):
        axes.annotate(
            text,
            (x, 0),
            xycoords=("data", "axes fraction"),
            xytext=(-3, 6),
            textcoords="offset points",
            rotation=90,
            ha="right",
            fontsize=8,
            color="0.3",
        )
    axes.set_yscale("log")
    axes.set_xlim(0, 1.02 * max(steps, *waves))
    axes.set_xlabel("waves (network calls one after another); numbers at the points: iteration")
    axes.set_ylabel("difference to sequential, grey levels")
    axes.set_title(f"{steps} steps, {result.plan.num_blocks} blocks, coarse solver {result.plan.coarse_solver}")
    axes.grid(True, which="major", color="0.9", linewidth=0.6)
    axes.legend(frameon=False)
    figure.savefig(path)
