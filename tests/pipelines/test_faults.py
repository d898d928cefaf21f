"""Networks that fail, and memory that is not enough: a typed error or one step after another, and all is put back."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import calls
import pytest
import torch
from calls import assert_close, drive, everything, instances, look, watched
from thinned import thinned_product
from torch import Tensor, nn

import srds_fast
from srds_fast import DivergenceError
from srds_fast.sampling import session as session_module
from srds_fast.solvers.collocation import solver as collocation

STEPS = 9
latents = partial(calls.latents, prompt="a cat")


@contextmanager
def fault(network: nn.Module, at: int | None, act: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Does something to the output of the network's call with a number, from 1 on; 0: to none; None: to all.

    A hook that may change an output brings a check of the network. `checked` has it made before, so that the numbers
    are those of waves.
    """
    calls = itertools.count(1)

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        return (act(output[0]), *output[1:]) if at is None or next(calls) == at else None

    handle = network.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def checked(sd: Any, at: int, **settings: Any) -> Any:
    """A compiled pipeline whose network is checked without a fault's hook and with it, and whose run has wave `at`."""
    fast = srds_fast.compile(sd, exact=True, method="srds", **settings)
    latents(fast)
    for _ in range(2):
        with fault(sd.unet, 0, lambda output: output):
            latents(fast)
    report = fast.report
    assert (report.method, report.fallback_reason, report.check_calls) == ("srds", None, 0)
    assert report.waves >= at
    return fast


def _raise(error: BaseException) -> Callable[[Tensor], Tensor]:
    def act(output: Tensor) -> Tensor:
        raise error

    return act


FAULTS: dict[str, tuple[Callable[[Tensor], Tensor], type[BaseException]]] = {
    "nan": (lambda output: output * float("nan"), DivergenceError),
    "one-sample-infinite": (lambda output: output.index_fill(0, torch.tensor([0]), float("inf")), DivergenceError),
    "runtime-error": (_raise(RuntimeError("broken")), RuntimeError),
    "keyboard-interrupt": (_raise(KeyboardInterrupt()), KeyboardInterrupt),
}


@pytest.mark.parametrize(("at", "kind"), thinned_product([1, 2, 5, 8], FAULTS))
def test_a_fault_at_any_wave_ends_in_its_error_and_the_next_call_works(sd: Any, kind: str, at: int) -> None:
    act, error = FAULTS[kind]
    fast, expected = checked(sd, at, strict=True), latents(sd)
    before = everything(sd)
    with fault(sd.unet, at, act), pytest.raises(error) as caught:
        latents(fast)
    assert everything(sd) == before
    if isinstance(caught.value, DivergenceError):
        assert caught.value.report.waves >= at
    assert_close(latents(fast), expected)


def test_without_strict_the_steps_follow_what_diverged(sd: Any) -> None:
    """Of a network that cannot take the wide waves, whenever it is asked."""

    def narrow(output: Tensor) -> Tensor:
        return output if len(output) <= 2 else output * float("nan")

    fast = checked(sd, 2)
    with fault(sd.unet, None, narrow):
        assert_close(latents(fast), latents(sd))
    assert "a sample is not finite. The steps were then taken one after another" in fast.report.fallback_reason


@pytest.mark.parametrize("at", [2, 5])
def test_what_was_not_finite_once_only_is_an_error(sd: Any, at: int) -> None:
    """The network gave two answers to one input: that steps come out finite afterwards proves nothing."""
    act, _ = FAULTS["nan"]
    fast = checked(sd, at)
    with fault(sd.unet, at, act), pytest.raises(DivergenceError, match="two answers to the same input"):
        latents(fast)


@pytest.mark.parametrize("at", [1, 2, 5])
@pytest.mark.parametrize("path", ["takeover", "drive"])
def test_the_same_holds_where_a_callback_is_told(sd: Any, at: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """States that are not finite are handed on: neither the loop nor the callback has changed them."""
    if path == "drive":
        drive(monkeypatch)
    act, _ = FAULTS["nan"]
    fast = srds_fast.compile(sd, exact=True, method="srds")
    for _ in range(2):
        with fault(sd.unet, 0, lambda output: output):
            expected = latents(fast, callback_on_step_end=look)
    assert (fast.report.path, fast.report.fallback_reason) == (path, None)
    with fault(sd.unet, at, act), pytest.raises(DivergenceError):
        latents(fast, callback_on_step_end=look)
    assert torch.equal(latents(fast, callback_on_step_end=look), expected)


@pytest.mark.parametrize("at", [1, 2, 8])
def test_out_of_memory_at_any_wide_wave_ends_in_steps_of_one_row(sd: Any, at: int) -> None:
    fast = checked(sd, at)
    expected, before = latents(sd), everything(sd)
    with fault(sd.unet, at, _raise(torch.OutOfMemoryError("no more"))):
        if at == 1:  # one row: the stock loop has no more room
            with pytest.raises(torch.OutOfMemoryError):
                latents(fast)
        else:
            assert_close(latents(fast), expected)
            assert fast.report.method == "sequential"
    assert everything(sd) == before
    assert_close(latents(fast), expected)
    assert fast.report.fallback_reason is None


def room(network: nn.Module, rows: int) -> Any:
    """In the block, memory for so many rows: wider calls of the network end as a full device ends them."""

    def look(states: Tensor) -> None:
        if len(states) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    return watched(network, look)


@pytest.mark.parametrize("settings", [{"method": "srds"}, {"method": "collocation"}, {"method": "auto"}])
@pytest.mark.parametrize("path", ["takeover", "drive"])
def test_waves_that_do_not_fit_into_memory_are_taken_one_row_at_a_time(
    sd: Any, settings: dict[str, Any], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "drive":
        drive(monkeypatch)
    expected, before = latents(sd), everything(sd)
    fast = srds_fast.compile(sd, **settings)
    with room(sd.unet, 2):  # a row with guidance
        assert_close(latents(fast), expected)
        report = fast.report
        if settings["method"] == "auto" and path == "takeover":  # it has seen that when it measured
            assert report.method == "sequential"
            assert report.fallback_reason is None
        else:
            assert report.method == ("stock" if path == "drive" else "sequential")
            assert "did not fit" in report.fallback_reason
            assert "max_rows" in report.fallback_reason
            with pytest.raises(srds_fast.UnsupportedPipeline, match="did not fit"):
                latents(srds_fast.compile(sd, strict=True, **settings))
        narrow = srds_fast.compile(sd, method="srds", exact=True, max_rows=1)
        assert_close(latents(narrow), expected)
        assert narrow.report.fallback_reason is None
    assert everything(sd) == before


@pytest.mark.parametrize("method", ["srds", "collocation"])
@pytest.mark.parametrize("path", ["takeover", "drive"])
def test_a_call_with_a_callback_goes_on_where_waves_do_not_fit(
    sd: Any, method: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It tells each step once: turns of the loop are evaluated in parts, of other waves the steps are taken anew."""
    if path == "drive":
        drive(monkeypatch)
    told: list[int] = []

    def tell(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        told.append(step)
        return tensors

    fast, expected = srds_fast.compile(sd, method=method, exact=True), latents(sd)
    for rows in (3, STEPS):  # with guidance, two of the network's batch each
        told.clear()
        with room(sd.unet, 2 * rows):
            assert_close(latents(fast, callback_on_step_end=tell), expected)
        assert told == list(range(STEPS))
        if path == "drive" or rows == STEPS:
            assert (fast.report.method, fast.report.fallback_reason) == (method, None)
            assert ("evaluated in parts" in "".join(fast.report.left_out)) == (rows < STEPS)
        else:
            assert "did not fit into the device's memory" in fast.report.fallback_reason


def test_what_the_waves_had_in_memory_is_let_go_before_the_steps_are_taken(
    sd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[int] = []
    steps = session_module.Session.take_steps
    made = instances(monkeypatch, collocation.Points, weakref.ref)

    def looking(session: session_module.Session, why: str) -> None:
        steps(session, why)
        alive.append(sum(each() is not None for each in made))

    monkeypatch.setattr(session_module.Session, "take_steps", looking)
    fast = srds_fast.compile(sd, method="collocation")
    with room(sd.unet, 2):
        latents(fast)
    assert (len(made), alive) == (1, [0])


def test_a_stream_that_runs_out_of_memory_goes_on_step_by_step(sd: Any) -> None:
    expected = latents(sd)
    fast = srds_fast.compile(sd, method="srds", exact=True)
    with room(sd.unet, 2):
        *_, last = fast.stream("a cat", num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0))
    assert_close(torch.as_tensor(last.latents), expected)
    assert "did not fit" in fast.report.fallback_reason


def test_memory_that_decoding_lacks_is_not_blamed_on_the_waves(sd: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*arguments: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(sd.vae, "decode", decode)
    fast = srds_fast.compile(sd, method="srds")
    with pytest.raises(torch.OutOfMemoryError):
        fast("a cat", num_inference_steps=STEPS)
    assert fast.report.fallback_reason is None
