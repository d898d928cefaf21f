"""Plans on disk: what was saved comes back, and a file that holds anything else is refused by a typed error."""

from __future__ import annotations

import copy
import json
import math
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srds_fast import Plan, PlanMismatch
from srds_fast.planner import json_files
from srds_fast.planner.choose import choose, fixed_at
from srds_fast.planner.context import Context
from srds_fast.planner.cost_curve import CostCurve
from srds_fast.planner.search import Known, Pricing, compare
from srds_fast.planner.settings import Settings
from srds_fast.solvers.chords import Chords
from srds_fast.solvers.fixed_point.options import ParaTAA
from srds_fast.solvers.registry import REGISTERED

HERE = Context("a device", "2.0", "0.1", None, "steps")
PRICED = Pricing(Known(CostCurve((1, 1000), (1e-3, 1e-3))), lambda plan: 0.0, HERE)
MEASURED = compare(20, Settings(), False, PRICED)[0]
LINEAR = ParaTAA(data_std=math.inf)
PLANS = [
    MEASURED,
    fixed_at(choose(20, Settings(method="srds")), 2),
    *(choose(20, Settings(method=method, max_rows=7)) for method in (Chords(2, (0, 5)), LINEAR)),
    *(choose(20, Settings(method=method.name)) for method in REGISTERED),
]


@pytest.mark.parametrize("plan", PLANS, ids=Plan.short)
def test_plans_come_back(plan: Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    found = Plan.load(tmp_path / "plan.json")
    assert (found, found.prediction, found.context) == (plan, plan.prediction, plan.context)
    assert str(found) == str(plan)
    assert found.program() == plan.program()
    assert [each.name for each in tmp_path.iterdir()] == ["plan.json"]


def paths(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of all values in a JSON tree."""
    yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from paths(value, (*path, key))


def edited(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return value
    tree = copy.copy(tree)
    tree[path[0]] = edited(tree[path[0]], path[1:], value)
    return tree


def written(plan: Plan, place: Path) -> Any:
    plan.save(place)
    return json.loads(place.read_text())


numbers = st.integers() | st.floats() | st.sampled_from([-1, 0, 1, 2, 10**7, 10**30])
values = st.recursive(
    numbers | st.none() | st.booleans() | st.text(max_size=3) | st.sampled_from(["10", "auto", "inf", "srds", "ddim"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(st.data())
@settings(max_examples=200)
def test_an_edited_plan_is_refused_or_is_a_plan(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """No other error comes out, and what is accepted can be printed, run and saved."""
    place = tmp_path_factory.getbasetemp() / "edited.json"
    tree = written(data.draw(st.sampled_from(PLANS)), place)
    for _ in range(data.draw(st.integers(1, 2))):
        tree = edited(tree, data.draw(st.sampled_from(list(paths(tree)))), data.draw(values))
    place.write_text(json.dumps(tree))
    try:
        found = Plan.load(place)
    except PlanMismatch as error:
        assert "holds no plan of this version" in str(error)  # noqa: PT017 - an accepted plan is no failure
        return
    assert str(found)
    assert found.program().num_rows > 0
    found.save(place)
    assert Plan.load(place) == found


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("exact", "false"),
        ("calibrated", 1),
        ("engine", "tensorrt"),
        ("max_rows", "3"),
        ("max_rows", 0),
        ("max_iterations", [10]),
        ("max_iterations", 21),
        ("num_inference_steps", 2.5),
        ("num_inference_steps", 10**5),
        ("tolerance", True),
        ("tolerance", -3),
        ("method", "magic"),
        ("options", None),
        ("options", {"num_nodes": 3}),
        ("prediction", {"why": 1}),
        ("more", 1),
    ],
)
def test_a_wrong_field_is_named(field: str, value: Any, tmp_path: Path) -> None:
    place = tmp_path / "plan.json"
    place.write_text(json.dumps(written(choose(20, Settings(method="parataa")), place) | {field: value}))
    named = {"options": "ParaTAA", "prediction": "Prediction"}.get(field, field)
    with pytest.raises(PlanMismatch, match=f"holds no plan of this version.*{named}"):
        Plan.load(place)


@pytest.mark.parametrize("field", ["num_blocks", "coarse_solver"])
def test_options_that_leave_something_open_are_no_plan(field: str, tmp_path: Path) -> None:
    place = tmp_path / "plan.json"
    tree = written(choose(20, Settings(method="srds")), place)
    place.write_text(json.dumps(edited(tree, ("options", field), {"coarse_solver": "auto"}.get(field))))
    with pytest.raises(PlanMismatch, match="Those of a plan are complete"):
        Plan.load(place)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("no JSON", "Expecting value"),
        ("[" * 10**5, "too deep"),
        ("1" * (json_files.MOST_BYTES + 1), "more than"),
        ("[1]", "it holds a list"),
    ],
    ids=["text", "deep", "long", "list"],
)
def test_a_file_of_another_kind_is_refused(text: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(PlanMismatch, match=why):
        Plan.load(tmp_path / "plan.json")


def test_the_older_file_stays_where_a_new_one_cannot_be_written(tmp_path: Path) -> None:
    """The disk is full: files may have 50 bytes."""
    place = tmp_path / "plan.json"
    before = written(MEASURED, place)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            PLANS[1].save(place)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert json.loads(place.read_text()) == before
    assert list(tmp_path.iterdir()) == [place]
