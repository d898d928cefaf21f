"""Caches: bounded by bytes over all of them, and emptied by `reset`, whoever has added one."""

from __future__ import annotations

import functools
import gc
import inspect
import logging
import sys
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FunctionType
from typing import Any

import pytest
import tiny
import torch
from diffusers import DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, UniPCMultistepScheduler
from problems import GaussianMixture, noise
from promises import call_of, stock_of

import srds_fast
from srds_fast import InvalidArgument, caches
from srds_fast.caches import Cache, size_of
from srds_fast.solvers import program
from srds_fast.solvers.registry import DEFAULT, METHODS

CONTAINERS = (dict, list, set, frozenset, tuple, deque, Cache, weakref.WeakKeyDictionary)
# what stays by design: one object for each class, device or network, which must always be the same
BY_DESIGN = {
    "srds_fast.pipelines.compile._fast_class": "the class of a compiled pipeline",
    "srds_fast.pipelines.acceleration._shared": "attention processors",
    "srds_fast.pipelines.known_classes.digests": "a file of the package",
    "srds_fast.engine.compiled._compiled": "compiled networks, as long as the network lives",
    "srds_fast.engine.compiled._if_faster": "the same",
    "srds_fast.pipelines.call._lora_locks": "locks, as long as the network lives",
    "srds_fast.engine.graphs.recorder.recorder": "recorders by device",
    "srds_fast.engine.graphs.device_lock._lock_of": "locks by device",
    "srds_fast.telemetry.watch._profile_until_exit": "whether the environment was read",
    "srds_fast.engine.distributed.ranks._ranks": "process groups",
    "srds_fast.engine.distributed.digests._weights": "digests of weights, as long as the network lives",
    "srds_fast.caches._caches": "the caches themselves",
}
DENOISER = GaussianMixture.random(dimensions=8)


@pytest.fixture(autouse=True)
def _default_limit() -> Iterator[None]:
    yield
    caches.limit(caches.DEFAULT_LIMIT)


def total() -> int:
    return sum(caches.sizes().values())


def held_for_good() -> int:
    """Bytes of what pipelines of other tests must keep: all that a bound of 0 leaves."""
    caches.limit(0)
    return total()


def sample(steps: int, **settings: Any) -> Any:
    method = settings.pop("method", DEFAULT)
    return srds_fast.sample(DENOISER, noise(1, 8), stock_of(method), steps, **call_of(method, **settings))


def lengths(name: str, found: Any, seen: set[int], depth: int = 0) -> Iterator[tuple[str, int]]:
    """Name and length of every container that an object of ours holds, by attribute, closure or entry."""
    if isinstance(found, type | logging.Logger) or id(found) in seen or depth > 8 or name in BY_DESIGN:
        return
    seen.add(id(found))
    if hasattr(found, "cache_info"):
        yield name, found.cache_info().currsize
    if isinstance(found, CONTAINERS):
        yield name, len(found)
        entries = found.values() if hasattr(found, "values") else found
        for entry in list(entries):
            yield from lengths(f"{name}[]", entry, seen, depth + 1)
    elif isinstance(found, FunctionType):
        for cell in inspect.getclosurevars(found).nonlocals.values():
            yield from lengths(f"{name}()", cell, seen, depth + 1)
    elif type(found).__module__.startswith("srds_fast"):
        for attribute in [*getattr(found, "__dict__", {}), *getattr(type(found), "__slots__", ())]:
            yield from lengths(f"{name}.{attribute}", getattr(found, attribute, None), seen, depth + 1)


def held(fast: Any) -> dict[str, int]:
    """Entries of all containers of the package's modules and of a compiled pipeline, added up by name."""
    seen = {id(fast._srds.last), id(fast._srds.original)}
    found: dict[str, int] = {}
    modules = [each for name, each in sorted(sys.modules.items()) if name.split(".")[0] == "srds_fast"]
    roots = [(f"{each.__name__}.{name}", value) for each in modules for name, value in vars(each).items()]
    for name, value in [*roots, ("state", fast._srds)]:
        ours = getattr(value, "__module__", "srds_fast") or ""
        if name.rpartition(".")[2].startswith("__") or not ours.startswith(("srds_fast", "builtins", "collections")):
            continue
        for place, length in lengths(name, value, seen):
            found[place] = found.get(place, 0) + length
    return found


def use_everything(fast: Any) -> None:
    """Calls of many kinds, of shapes and numbers of steps that no other test has."""
    call = {"prompt": "a cat", "output_type": "latent", "height": 48, "width": 32, "num_inference_steps": 13}
    for method in METHODS:
        sample(13, method=method)
    sample(13, exact=True, cond=None, graphs=srds_fast.Graphs())
    for kind in (DPMSolverMultistepScheduler, UniPCMultistepScheduler, EulerAncestralDiscreteScheduler):
        for method in ("srds", "parataa", "collocation", "parasolver", "chords"):
            srds_fast.sample(lambda x, t: 0.1 * x, noise(1, 8), kind(), 13, method=method)
    fast.warmup(**call)
    fast(**call)
    fast(**call, guidance_scale=3.0, eta=0.3)
    list(fast.stream(**call))
    fast(**call, callback_on_step_end=lambda pipe, step, t, tensors: tensors)
    fast.calibrate("a cat", num_samples=1, num_inference_steps=13, height=48, width=32)


def test_reset_empties_every_cache() -> None:
    fast = srds_fast.compile(tiny.stable_diffusion(), learn_stop=True)
    sample(12)
    fast.reset()
    before = held(fast)
    use_everything(fast)
    full = {name for name, length in held(fast).items() if length > before.get(name, 0)}
    assert len(full) > 20, f"the walk finds what calls leave: {full}"
    assert total() > 0
    fast.reset()
    after = held(fast)
    assert {name: length for name, length in after.items() if length > before.get(name, 0)} == {}


def test_no_cache_is_left_outside() -> None:
    """functools' own caches have no bound in bytes: only those that are there by design."""
    found = {
        f"{module.__name__}.{attribute}"
        for name, module in list(sys.modules.items())
        if name.split(".")[0] == "srds_fast"
        for attribute, value in vars(module).items()
        if isinstance(value, functools._lru_cache_wrapper) and (value.__module__ or "").startswith("srds_fast")
    }
    by_design = {name.rpartition(".")[2] for name in BY_DESIGN} | {"interpreted", "_has_triton"}  # without arguments
    assert {name for name in found if name.rpartition(".")[2] not in by_design} == set()


@pytest.mark.parametrize("method", METHODS)
def test_what_calls_leave_stays_below_the_bound(method: str) -> None:
    bound = held_for_good() + 200_000
    caches.limit(bound)
    for steps in range(8, 30):
        sample(steps, method=method)
        assert total() <= bound


@pytest.mark.parametrize("method", METHODS)
def test_without_any_cache_samples_are_the_same(method: str) -> None:
    expected = sample(11, method=method, explore=0.0)
    before = held_for_good()
    found = sample(11, method=method, explore=0.0)
    assert total() == before
    if method != "auto":
        assert torch.equal(found.sample, expected.sample)


def test_the_least_recently_used_goes_first_whichever_cache_it_is_in() -> None:
    caches.clear()
    one, other = Cache[Any]("one"), Cache[Any]("other")
    held_before = total()
    for number in range(3):
        one[number], other[number] = bytes(10_000), bytes(10_000)
    assert one[0]  # used again
    caches.limit(held_before + 45_000)
    assert (list(one), list(other)) == ([0, 2], [1, 2])
    caches.limit(held_before + 15_000)
    assert (list(one), list(other)) == ([0], [])


def test_what_must_stay_stays_and_what_is_too_large_is_not_kept() -> None:
    caches.clear()
    promised, others = Cache[Any]("promised", stays=lambda value: True), Cache[Any]("others")
    caches.limit(total() + 30_000)
    promised["a"] = bytes(20_000)
    others["b"] = bytes(50_000)
    assert (list(promised), list(others)) == (["a"], [])
    promised.clear()
    others["c"] = bytes(20_000)
    assert list(others) == ["c"]


def test_a_cache_that_goes_is_not_counted_any_more() -> None:
    before = caches._total
    cache = Cache[Any]("passing")
    cache["a"] = bytes(10_000)
    cache["a"] = bytes(20_000)
    assert caches._total - before == pytest.approx(20_000, rel=0.05)
    del cache
    assert caches._total == before


def test_entries_that_grow_are_measured_again() -> None:
    cache = Cache[Any]("growing")
    cache["a"] = found = []
    found += [bytes(1000) for _ in range(50)]
    assert cache["a"] is found
    assert cache.nbytes > 50_000


def test_sizes() -> None:
    x = torch.zeros(1000)
    assert size_of(x) - size_of(torch.zeros(0)) == 4000
    assert size_of([x, x[:10], {"a": x}]) < 5000, "one storage counts once"
    assert size_of(torch.nn.Linear(100, 100)) < 1000, "networks are the user's"
    assert size_of(torch.zeros(1000, device="meta")) < 1000
    whole = program.srds(100, 20, 20)
    assert 1_000_000 > size_of(whole) > 100 * sum(len(wave.rows) for wave in whole)


@pytest.mark.parametrize("given", [-1, 1.5, "1", True, None])
def test_a_bound_that_is_none_is_refused(given: Any) -> None:
    with pytest.raises(InvalidArgument, match="The bound of the caches is"):
        caches.limit(given)


@pytest.mark.parametrize(
    ("text", "expected"), [("", caches.DEFAULT_LIMIT), ("1000", 1000), ("a lot", None), ("-1", None)]
)
def test_the_bound_can_be_set_by_the_environment(
    text: str, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(caches.VARIABLE, text)
    if expected is None:
        with pytest.raises(InvalidArgument, match=caches.VARIABLE):
            caches._limit_asked_for()
    else:
        assert caches._limit_asked_for() == expected


def test_arguments_are_told_apart_by_their_types() -> None:
    @caches.cached
    def kind(given: object) -> str:
        return type(given).__name__

    assert [kind(1), kind(True), kind(1.0), kind(1)] == ["int", "bool", "float", "int"]


class Owner:
    """A value that keeps something in a cache of its own."""

    def __init__(self) -> None:
        self.kept: caches.Cache[bytes] = caches.Cache("of a value")
        self.kept["key"] = bytes(1000)


def test_what_a_value_has_kept_is_not_counted_after_it() -> None:
    gc.collect()
    before = caches._total
    values: caches.Cache[Owner] = caches.Cache("values with caches", most=2)
    for number in range(10):
        values[number] = Owner()
    gc.collect()
    assert caches._total == sum(caches.sizes().values())
    values.clear()
    del values
    gc.collect()
    assert caches._total == before


def test_a_key_that_is_gone_has_a_default() -> None:
    values: caches.Cache[int] = caches.Cache("numbers")
    assert values.pop("key", None) is None
    values["key"] = 1
    assert values.pop("key") == 1
    assert len(values) == 0


def test_signatures_are_those_of_functions_and_methods_and_hold_neither() -> None:
    class Steps:
        def step(self, m: int, x: int = 1, **options: int) -> None: ...

    one, two = Steps(), Steps()
    for each in (Steps.step, one.step, two.step, total):
        for _ in range(2):
            assert caches.signature_of(each) == inspect.signature(each)
    gone = weakref.ref(Steps), weakref.ref(one)
    del Steps, one, two, each
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_what_functions_close_over_counts() -> None:
    large = bytes(50_000)

    def closes(given: Any = None) -> Any:
        return large if given is None else given

    class Owner:
        held = large

        def method(self) -> None: ...

    owner = Owner()
    owner.kept = large  # type: ignore[attr-defined]
    for found in (closes, functools.partial(closes), functools.partial(print, large), owner.method):
        assert 50_000 < size_of(found) < 60_000
    assert size_of(lambda given=large: given) > 50_000
    assert size_of(lambda: later) < 1000, "a cell that is empty"
    later = large


def test_what_a_block_uses_stays_until_its_end() -> None:
    caches.clear()
    kept, others = Cache[Any]("kept", most=1), Cache[Any]("others")
    caches.limit(total())
    with caches.keeping():
        kept["a"] = bytes(20_000)
        with caches.keeping():
            kept["b"] = bytes(20_000)
        assert kept["a"]
        with ThreadPoolExecutor(1) as thread:
            thread.submit(others.__setitem__, "c", bytes(20_000)).result()
        assert (list(kept), list(others)) == (["a"], [])
    assert list(kept) == []


def test_a_frozen_plan_stays_where_the_caches_are_full() -> None:
    fast = srds_fast.compile(tiny.ddim(), explore=1)
    held_for_good()
    fast.warmup(batch_size=1, num_inference_steps=9, output_type="pt")
    frozen = fast._srds.last.exploration
    assert frozen is not None
    assert frozen.held
    found = [each for known in fast._srds.planner.costs._kept.values() for each in known.explorations.values()]
    assert any(each is frozen for each in found)
