"""The page of support, made from what `bench.quality.support` has measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from srds_fast.solvers.method import SAME_LAW
from srds_fast.solvers.registry import BY_NAME, SEQUENTIAL

from .rounding import TIMES
from .verdicts import BEYOND, DIFFUSION, EXACT, FAILED, MATCHING, REFUSED, ROUNDED, STOCK, WITHIN, WRONG, Cell

PAGE = Path(__file__).parents[2] / "srds_fast" / "pipelines" / "SUPPORT.md"
PATHS = {"takeover": "taken over", "drive": "its own loop", "stock": "stock"}
# from the best to the worst
ORDER = (EXACT, ROUNDED, WITHIN, BEYOND, STOCK, REFUSED, FAILED, WRONG)

HEAD = """\
# What runs

This page is written by `python -m bench.quality.support --write` from what it measures, and not by hand. Every
pipeline is a real class of diffusers with random weights at a tiny size, in float32 on a CPU, with the scheduler that
its popular checkpoints have. Its result is compared with that of the stock pipeline, which made the same call.

| word | meaning |
| --- | --- |
| exact | equal but for rounding: no difference above 1e-5 of the largest value |
| exact to rounding | a larger difference, which was measured to be rounding too, see [Rounding](#rounding) |
| within | the mean absolute difference is within the tolerance of the call, 4e-3 |
| beyond | the error was estimated to be within the tolerance, and is larger: so many tolerances |
| stock: reason | the call ran on the stock loop |
| refused: reason | `compile` raised an error, which says what to do |
| - | the stock pipeline does not run with this scheduler |
| * | measured in an earlier run than the rest |

"""


def page(found: dict[str, Any]) -> str:
    """The whole page, Markdown. found: the content of the committed file."""
    cells = [Cell.from_dict(each) for each in found["cells"]]
    versions = ", ".join(f"{name} {found['environment'][name]}" for name in ("diffusers", "torch"))
    parts = [f"{HEAD}Measured with {versions}.\n", _pipelines(cells), _methods(cells), _schedulers(cells)]
    parts += [_variations(cells), _rounding(cells), _classes_of_schedulers(found["schedulers"])]
    return "\n".join(parts)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines) + "\n"


def _word(cell: Cell, method: str) -> str:
    """The verdict of one run, with what it needs to be understood."""
    run = cell.runs.get(method)
    if run is None:
        return "-"
    if run.verdict in (STOCK, REFUSED, FAILED):
        return f"{run.verdict}: {run.reason}"
    return f"{run.verdict} {run.error:g}" if run.verdict == BEYOND else run.verdict


def _marked(text: str, cell: Cell) -> str:
    return f"{text} *" if cell.earlier else text


def _own(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Cells with the case's own scheduler and call, by case: that of few steps, then that of many."""
    found = dict[str, list[Cell]]()
    for each in cells:
        if each.as_shipped:
            found.setdefault(each.case, []).append(each)
    return {case: sorted(group, key=lambda each: each.steps) for case, group in found.items()}


def is_accelerated(cell: Cell) -> bool:
    """Whether a method needs fewer waves than the stock loop has turns."""
    return any(
        run.verdict in (EXACT, ROUNDED, WITHIN, BEYOND) and cell.turns and run.waves and run.waves < cell.turns
        for run in cell.runs.values()
    )


def counts(cells: Sequence[Cell]) -> dict[str, int]:
    """Of the classes: how many there are, and how many take fewer waves at many steps. Of all calls: the verdicts.

    A class with several cases counts once, by the best of them.
    """
    best = dict[str, bool]()
    for case, group in _own(cells).items():
        name = case.partition(",")[0]
        best[name] = best.get(name, False) or is_accelerated(group[-1])
    verdicts = [run.verdict for each in cells for run in each.runs.values()]
    return {
        "classes": len(best),
        "accelerated": sum(best.values()),
        "calls": len(verdicts),
        **{verdict: verdicts.count(verdict) for verdict in ORDER},
    }


def _pipelines(cells: Sequence[Cell]) -> str:
    number = counts(cells)
    told = ", ".join(f"{number[verdict]} {verdict}" for verdict in ORDER if verdict not in (FAILED, WRONG))
    text = (
        f"## Pipelines\n\nOf {number['classes']} classes {number['accelerated']} take fewer waves than the stock loop "
        f"has turns, with one of two methods at their defaults; the others run on the stock loop or are "
        f"refused. All {number['calls']} calls of this page: {told}, {number[WRONG]} wrong, "
        f"{number[FAILED]} failed.\n\n"
        "How: *taken over*: our own loop makes the network calls that a rehearsal of the pipeline's loop showed; *its "
        "own loop*: that makes the turns for the rows of each wave. Waves: at N = 50. Difference: the largest of "
        "`exact=True` over all methods at N = 9, relative to the largest value.\n"
    )
    rows = []
    for case, group in _own(cells).items():
        short, long = group[0], group[-1]
        run = next(iter(short.runs.values()), None)
        if run is None:
            continue
        refused = run.verdict in (REFUSED, FAILED)
        exact = [
            each.difference for name, each in short.runs.items() if "exact" in name and each.difference is not None
        ]
        waves = [_waves(long, method) for method in ("srds", "collocation")]
        how = run.verdict if refused else PATHS[run.path or "stock"]
        cells_of = [
            _marked(case, short),
            short.scheduler,
            how,
            *waves,
            _share(max(exact, default=None)),
            run.reason or "",
        ]
        rows.append(cells_of)
    header = ["pipeline", "scheduler", "how", "waves, srds", "waves, collocation", "difference", "reason"]
    return f"{text}\n{_table(header, rows)}"


def _waves(cell: Cell, method: str) -> str:
    run = cell.runs.get(method)
    if run is None or run.waves is None or run.path == "stock":
        return "-"
    return f"{run.waves} of {cell.turns}"


def _methods(cells: Sequence[Cell]) -> str:
    text = (
        "## Methods\n\nWith the pipeline's own scheduler at N = 9: first with `exact=True`, then with the default "
        "tolerance.\n"
    )
    others = [name for name, each in BY_NAME.items() if name != SEQUENTIAL and each.promise != SAME_LAW]
    rows = []
    for case, group in _own(cells).items():
        if not group[0].runs:
            continue
        pairs = [[_brief(group[0], f"{name}, exact"), _brief(group[0], name)] for name in others]
        rows.append([_marked(case, group[0]), _brief(group[0], SEQUENTIAL), *(_both(*pair) for pair in pairs)])
    return f"{text}\n{_table(['pipeline', SEQUENTIAL, *others], rows)}"


def _brief(cell: Cell, method: str) -> str:
    return _word(cell, method).partition(":")[0]


def _both(exact: str, default: str) -> str:
    return exact if exact == default else f"{exact}, {default}"


def _schedulers(cells: Sequence[Cell]) -> str:
    """Pipelines by scheduler, one table for each kind."""
    text = (
        "## Pipelines by scheduler\n\nAt N = 9: srds with `exact=True`, then collocation with the default tolerance.\n"
    )
    parts = [text]
    for title, known in (("Noise, velocity or sample prediction", DIFFUSION), ("Flow matching", MATCHING)):
        of_case = dict[str, dict[str, str]]()
        for each in cells:
            if not each.change and each.scheduler in known and "srds, exact" in each.runs:
                verdict = _both(_brief(each, "srds, exact"), _brief(each, "collocation"))
                of_case.setdefault(each.case, {})[each.scheduler] = _marked(verdict, each)
        rows = [[case, *(found.get(name, "-") for name in known)] for case, found in of_case.items()]
        parts.append(f"### {title}\n\n{_table(['pipeline', *known], rows)}")
    return "\n".join(parts)


def _variations(cells: Sequence[Cell]) -> str:
    text = (
        "## Other grids, parts of a grid, other sizes\n\nSteps given by the user, a part of the steps, other numbers "
        "of images and frames, other guidance; N = 9 where the call does not say it. Collocation has the default "
        "tolerance.\n"
    )
    methods = (SEQUENTIAL, "srds, exact", "collocation")
    rows = [
        [
            _marked(each.case, each),
            each.change,
            each.scheduler,
            str(each.turns or "-"),
            *(_word(each, name) for name in methods),
        ]
        for each in cells
        if each.change and each.runs
    ]
    header = ["pipeline", "call", "scheduler", "turns", *methods]
    return f"{text}\n{_table(header, rows)}"


def _rounding(cells: Sequence[Cell]) -> str:
    text = (
        "## Rounding\n\nCalls that had to be exact, with a difference above 1e-5: their networks, of random weights, "
        "enlarge the rounding of each step. Three more calls of each were made. Where all is in float64, no more than "
        "1e-6 is left of the difference. Stock: the stock pipeline in float32 against itself in float64, from the same "
        "random numbers. Width: the stock pipeline with each network call made for as many rows as the widest wave, "
        "against itself: the network's own rounding of merged calls. The verdict asks for a difference of at most "
        f"{TIMES} times the larger of these two.\n"
    )
    rows = [
        [
            *(each.case, each.change, each.scheduler, name),
            *map(_share, (run.difference, run.in_float64, run.of_stock, run.of_width)),
        ]
        for each in cells
        for name, run in each.runs.items()
        if run.verdict == ROUNDED
    ]
    header = ["pipeline", "call", "scheduler", "method", "difference", "in float64", "stock", "width"]
    return f"{text}\n{_table(header, rows)}"


def _share(number: float | None) -> str:
    return "-" if number is None else f"{number:.0e}"


def _classes_of_schedulers(rows: Sequence[dict[str, Any]]) -> str:
    text = (
        "## Schedulers\n\nEvery class of `diffusers.schedulers`, by srds and collocation with `exact=True` on a "
        "smooth function, against its own loop. Vectors: states that it passes on from step to step. A class that "
        "clips is also shown without that where clipping is not supported.\n"
    )
    shown = []
    for row in rows:
        options = ", ".join(f"{name}={value}" for name, value in row["config"].items())
        verdict = row["verdict"] if row["verdict"] == EXACT else f"{row['verdict']}: {row.get('reason', '')}"
        about = [str(row.get("turns", "-")), str(row.get("vectors", "-")), "yes" if row.get("noise") else ""]
        shown.append([row["scheduler"], options, verdict, *about])
    return f"{text}\n{_table(['class', 'options', 'verdict', 'turns', 'vectors', 'draws noise'], shown)}"
