"""The logger "srds_fast" and progress bars: as loud as the user has asked, of diffusers or of the logger itself."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
from diffusers.utils import logging as of_diffusers

import srds_fast
from srds_fast import progress
from srds_fast.planner.exploration import Exploration

LOGGER = logging.getLogger("srds_fast")


@pytest.fixture
def verbosity() -> Iterator[None]:
    before = of_diffusers.get_verbosity()
    yield
    of_diffusers.set_verbosity(before)
    LOGGER.setLevel(logging.NOTSET)


@pytest.mark.usefixtures("verbosity")
def test_the_logger_is_as_loud_as_diffusers_unless_it_has_a_level_of_its_own() -> None:
    levels = {each: getattr(logging, each.upper()) for each in ("debug", "info", "warning", "error")}
    for name, level in levels.items():
        getattr(of_diffusers, f"set_verbosity_{name}")()
        assert LOGGER.getEffectiveLevel() == level
        assert [LOGGER.isEnabledFor(each) for each in levels.values()] == [each >= level for each in levels.values()]
    LOGGER.setLevel(logging.INFO)
    assert LOGGER.isEnabledFor(logging.INFO), "although diffusers shows errors alone"
    LOGGER.setLevel(logging.ERROR)
    of_diffusers.set_verbosity_debug()
    assert not LOGGER.isEnabledFor(logging.WARNING)


@pytest.mark.usefixtures("verbosity")
def test_records_go_to_the_handlers_of_diffusers_where_nobody_else_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    of_diffusers.add_handler(handler)
    of_diffusers.set_verbosity_info()
    try:
        LOGGER.info("with a handler of the root logger")  # pytest's
        monkeypatch.setattr(logging.getLogger(), "handlers", [])
        LOGGER.info("with none")
        LOGGER.debug("a number")
    finally:
        of_diffusers.remove_handler(handler)
    assert text.getvalue().splitlines() == ["with none"]


@pytest.mark.usefixtures("verbosity")
def test_what_is_chosen_recorded_and_dropped_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    LOGGER.setLevel(logging.INFO)
    fast = srds_fast.compile(tiny.stable_diffusion(), explore=0.0)
    for _ in range(3):
        fast("a cat", num_inference_steps=4, output_type="latent")
    assert caplog.text.count("Plan chosen for calls of 4 steps") == 1
    assert caplog.text.count("Measured how long a network call takes") == 1
    fast.warmup("a cat", num_inference_steps=4, output_type="latent")
    assert caplog.text.count("Plan chosen for calls of 4 steps") == 2, "now for good"
    assert not [each for each in caplog.records if each.levelno > logging.INFO]
    (exploration,) = {id(each): each for each in fast._srds.explorations.values()}.values()
    assert isinstance(exploration, Exploration)


class Bars:
    """Stands for tqdm, and notes how bars were asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[dict[str, Any]] = []
        original = progress.tqdm

        def noted(**options: Any) -> Any:
            self.made.append(options)
            return original(**{**options, "file": io.StringIO()})

        monkeypatch.setattr(progress, "tqdm", noted)

    @property
    def shown(self) -> list[str]:
        return [each["desc"] for each in self.made if not each["disable"]]


def test_calibration_has_one_bar_which_the_pipelines_settings_hide(monkeypatch: pytest.MonkeyPatch) -> None:
    bars, pipe = Bars(monkeypatch), tiny.stable_diffusion()
    fast = srds_fast.compile(pipe, explore=0.0)
    call: dict[str, Any] = {"num_inference_steps": 4, "num_samples": 1}
    pipe.set_progress_bar_config(disable=False, colour="green")
    fast.calibrate(["a cat"], **call)
    assert bars.shown == ["Measuring the network", "Calibrating"], "one after the other"
    assert all(each["colour"] == "green" for each in bars.made)
    pipe.set_progress_bar_config(disable=True)
    bars.made.clear()
    fast.reset()
    fast.calibrate(["a cat"], **call)
    assert bars.made
    assert bars.shown == []


def test_within_a_bar_no_other_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    bars = Bars(monkeypatch)
    with progress.bar("whole", 2) as whole:
        with progress.bar("part", 1):
            pass
        whole.update()
    with progress.bar("next"):
        pass
    assert [(each["desc"], each["disable"]) for each in bars.made] == [("whole", None), ("part", True), ("next", None)]
