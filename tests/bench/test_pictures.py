"""Pictures of the committed results, and those of the command: no text covers another, and all of it can be read."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import pictures
from srds_fast.cli.pictures import Point, convergence_plot, prediction_plot
from srds_fast.planner.plan import Candidate

figure = pytest.importorskip("matplotlib.figure")
from matplotlib.text import Text  # noqa: E402

RESULTS = Path(__file__).parents[2] / "bench" / "results"
# pixels of the height of a line at half the size of a picture, below which it cannot be read
READABLE = 6.0


def saved(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def peers(path: Path) -> None:
    found = saved("peers-cpu.json")
    pictures.latency_picture(found["where"], found["results"], found["bound"], path)


def waves(path: Path) -> None:
    found = [each for each in saved("methods-digits.json")["found"] if each["steps"] == 100]
    lines = {each["method"]: [(point["difference"], point["waves"]) for point in each["points"]] for each in found}
    pictures.waves_picture("digits", 100, lines, path)


def tradeoff(path: Path) -> None:
    pictures.tradeoff_picture(saved("tradeoff-cpu.json"), path)


def rows(path: Path) -> None:
    curves = [
        {"network": f"network {n}", "rows": [1, 2, 4, 8], "eager": [1.0, 1.1, 1.3, 2.0 + n / 50], "replayed": None}
        for n in range(6)
    ]
    pictures.rows_picture("a device", curves, path)


def scaling(path: Path) -> None:
    pictures.scaling_picture("predicted", saved("scaling-predicted.json")["predicted"], path)


def load(path: Path) -> None:
    pictures.load_picture("requests", saved("serving-load.json")["results"], path)


def convergence(path: Path) -> None:
    """Points that nearly coincide, as where a stream gives its images at once."""
    near = [Point(1.0 + n / 100, {"p95": 0.3 - n / 100, "mean": 0.2}, f"iteration {n}") for n in range(6)]
    convergence_plot(near, {"default tolerance stops": 1.01, "sequential": 1.02}, "seconds", "a title", path)


def prediction(path: Path) -> None:
    plans = {Candidate(f"a plan, {n} blocks, 2m jumps", 1, 1, 1, 1, 1.0, 1.0 + n / 100): 1.0 for n in range(8)}
    prediction_plot(plans, path)


@pytest.mark.parametrize("draw", [peers, waves, tradeoff, rows, scaling, load, convergence, prediction])
def test_no_text_covers_another(draw: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[Any, None] = {}
    write, save, figures = Text.draw, figure.Figure.savefig, []

    def noted(self: Any, renderer: Any, *args: Any, **options: Any) -> None:
        drawn[self] = None
        write(self, renderer, *args, **options)

    def kept(self: Any, *args: Any, **options: Any) -> None:
        drawn.clear()
        save(self, *args, **options)
        figures.append(self)

    monkeypatch.setattr(Text, "draw", noted)  # ticks outside of the axes are texts too, which nobody draws
    monkeypatch.setattr(figure.Figure, "savefig", kept)
    draw(tmp_path / "picture.png")
    (one,) = figures
    boxes = {}
    for text in drawn:
        if text.get_visible() and text.get_text().strip():
            boxes[text] = box = Text.get_window_extent(text)  # of an annotation the text alone, without its line
            for end in (box.x0 + 1, box.x1 - 1):
                assert one.bbox.containsx(end), text.get_text()
            assert text.get_fontsize() * one.dpi / 72 / 2 >= READABLE, text.get_text()
    assert len(boxes) > 8
    for (one_text, box), (other_text, other) in itertools.combinations(boxes.items(), 2):
        assert not box.padded(-1).overlaps(other.padded(-1)), (one_text.get_text(), other_text.get_text())
