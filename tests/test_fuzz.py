"""Arguments at random, wherever they come from: a typed error that names them, or the right result.

By default each test tries a few dozen. All of them, over ten thousand:

    pytest tests/test_fuzz.py --hypothesis-profile full
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from odd_values import CALLABLE, ODD, changed
from problems import scheduler

import srds_fast
from srds_fast import Plan, PlanMismatch, SrdsFastError, caches, zoo
from srds_fast.cli import main
from srds_fast.methods import ParaTAA
from srds_fast.planner.choose import choose
from srds_fast.planner.settings import Settings
from srds_fast.schedulers import PREDICTIONS, SAMPLERS
from srds_fast.solvers import program
from srds_fast.solvers.method import Method
from srds_fast.solvers.registry import METHODS, REGISTERED

STEPS = 6
TOLERANCE = 4e-3


@pytest.fixture(autouse=True)
def _quiet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Files go to a folder of their own, and what libraries say is no part of the test."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("fuzz"))
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        os.chdir(before)


def examples(share: int) -> Callable[[Any], Any]:
    """So many times the examples of the profile."""
    return settings(max_examples=share * settings.default.max_examples)


def denoiser(x: torch.Tensor, t: torch.Tensor, **cond: Any) -> torch.Tensor:
    return 0.1 * x


SETTINGS: dict[str, Any] = {
    "method": st.sampled_from([*METHODS, *(each() for each in REGISTERED)]),
    "tolerance": st.floats(0, 1),
    "exact": st.booleans(),
    "num_blocks": st.integers(1, STEPS),
    "max_iterations": st.integers(0, 5),
    "coarse_solver": st.sampled_from(["auto", "2m", "ddim"]),
    "pipelined": st.booleans(),
    "in_flight": st.integers(1, 3),
    "max_rows": st.integers(1, 8),
    "engine": st.sampled_from(["auto", "eager"]),
    "explore": st.floats(0, 3),
    "latency": st.sampled_from(["adaptive", "constant"]),
    "same": st.sampled_from(["sample", "law"]),
    "strict": st.booleans(),
}
SAMPLE = tuple(inspect.signature(srds_fast.sample).parameters)
COMPILE = tuple(each for each in inspect.signature(srds_fast.compile).parameters if each != "pipe")
SCHEDULERS = [
    scheduler(),
    diffusers.DDPMScheduler(),
    diffusers.DPMSolverMultistepScheduler(),
    diffusers.FlowMatchEulerDiscreteScheduler(),
    diffusers.HeunDiscreteScheduler(),
    diffusers.DDIMScheduler(rescale_betas_zero_snr=True),
]


def fields_of(method: type[Method]) -> tuple[str, ...]:
    return tuple(each.name for each in dataclasses.fields(method))


@examples(4)
@given(
    changed(
        {"denoiser": denoiser, "x": torch.ones(2, 8), "scheduler": scheduler(), "num_inference_steps": STEPS},
        SAMPLE,
        {
            **SETTINGS,
            "num_inference_steps": st.integers(1, 12),
            "scheduler": st.sampled_from(SCHEDULERS),
            "cond": st.sampled_from([{"labels": torch.zeros(2)}, {"labels": torch.zeros(3)}, {"x": torch.zeros(2)}]),
            "eta": st.floats(0, 1),
            "warm_start": st.just(torch.zeros(STEPS + 1, 2, 8)),
            "keep_trajectory": st.booleans(),
            "observer": st.just(lambda checkpoint: None),
            "graphs": st.builds(srds_fast.Graphs),
            "generator": st.builds(torch.Generator),
            "clip_epsilon": st.booleans(),
            "dummy_draws": st.lists(st.integers(0, STEPS - 1)),
        },
    )
)
def test_sample(arguments: dict[str, Any]) -> None:
    theirs = [arguments.get(name) for name in ("denoiser", "observer", "on_wave")]
    try:
        result = srds_fast.sample(**arguments)
    except SrdsFastError:
        return
    except Exception:
        if any(each is known for each in theirs for known in CALLABLE):  # an error of their own
            return
        raise
    x = arguments["x"]
    assert result.sample.shape == x.shape
    assert result.sample.dtype == x.dtype
    assert bool(result.sample.isfinite().all())
    assert str(result.report)


@examples(1)
@given(
    changed(
        {"sigmas": [9.0, 3.0, 1.0, 0.0]},
        ("sigmas", "prediction", "sampler", "eta", "s_noise", "noise_sampler", "scheduler", "dummy_draws"),
        {
            "sigmas": st.lists(st.floats(0, 1), min_size=2, max_size=6).map(lambda found: sorted(found, reverse=True)),
            "prediction": st.sampled_from(PREDICTIONS),
            "sampler": st.sampled_from(SAMPLERS),
            "eta": st.floats(0, 1),
            "s_noise": st.floats(0, 2),
        },
    )
)
def test_noise_levels(arguments: dict[str, Any]) -> None:
    theirs = arguments.get("noise_sampler")
    try:
        result = srds_fast.sample(denoiser, torch.ones(2, 8), **arguments)
    except SrdsFastError:
        return
    except Exception:
        if any(theirs is known for known in CALLABLE):  # an error of its own
            return
        raise
    assert result.sample.shape == (2, 8)
    assert bool(result.sample.isfinite().all())


PROGRAM: dict[str, dict[str, Any]] = {
    "srds": {"num_steps": STEPS, "num_blocks": 3, "num_iterations": 2},
    "sequential": {"num_steps": STEPS},
}


@cache
def pipeline() -> Any:
    return tiny.stable_diffusion()


CALL: dict[str, Any] = {
    "prompt": "a cat", "height": 16, "width": 16, "num_inference_steps": STEPS, "output_type": "latent",
}  # fmt: skip


@examples(4)
@given(changed({}, COMPILE, {**SETTINGS, "torch_compile": st.none(), "attention": st.just("sdpa")}))
def test_compile(arguments: dict[str, Any]) -> None:
    """And the plan that follows from the settings, which runs nothing."""
    try:
        fast = srds_fast.compile(pipeline(), **arguments)
        plan = fast.plan_for(num_inference_steps=STEPS)
    except SrdsFastError:
        return
    assert plan.num_inference_steps == STEPS
    assert str(plan)


@examples(1)
@given(
    st.sampled_from([each for each in REGISTERED if fields_of(each)]).flatmap(
        lambda each: st.tuples(st.just(each), changed({}, fields_of(each), {}))
    )
)
@example((ParaTAA, {"window": 1_000_000}))
@example((ParaTAA, {"data_std": np.zeros((2, 8))}))
def test_options_of_methods(found: tuple[type[Method], dict[str, Any]]) -> None:
    method, arguments = found
    try:
        plan = choose(STEPS, Settings(method=method(**arguments)))
    except SrdsFastError:
        return
    assert str(plan)


@examples(1)
@given(st.sampled_from(ODD))
def test_places_for_graphs(found: Any) -> None:
    try:
        graphs = srds_fast.Graphs(found)
    except SrdsFastError:
        return
    assert graphs.max_graphs >= 1


@examples(1)
@given(
    st.sampled_from([program.srds, program.sequential]).flatmap(
        lambda each: st.tuples(
            st.just(each), changed(PROGRAM[each.__name__], tuple(inspect.signature(each).parameters), {})
        )
    )
)
def test_programs(found: tuple[Callable[..., program.Program], dict[str, Any]]) -> None:
    make, arguments = found
    try:
        assert make(**arguments).num_waves
    except SrdsFastError:
        return


@examples(1)
@given(st.sampled_from(ODD))
def test_compile_of_what_is_no_pipeline(found: Any) -> None:
    with pytest.raises(SrdsFastError):
        srds_fast.compile(found)


@cache
def compiled() -> Any:
    return srds_fast.compile(pipeline(), exact=True, method="srds")


def ran(pipe: Any, arguments: dict[str, Any]) -> torch.Tensor | Exception:
    """Latents, or the error. A generator that was given begins where it did."""
    generator = arguments.get("generator")
    begins = generator.get_state() if isinstance(generator, torch.Generator) else None
    torch.manual_seed(0)
    try:
        return pipe(**arguments)[0]
    except Exception as error:
        return error
    finally:
        if begins is not None:
            generator.set_state(begins)


PIPELINE = tuple(inspect.signature(diffusers.StableDiffusionPipeline.__call__).parameters)[1:-1]


@examples(1)
@given(
    changed(
        CALL,
        (*PIPELINE, "warm_start", "keep_trajectory", "no_such_keyword"),
        {
            "prompt": st.sampled_from(["a dog", ["a cat", "a dog"], [], [""]]),
            "num_inference_steps": st.integers(1, 8),
            "guidance_scale": st.floats(0, 9),
            "eta": st.floats(0, 1),
            "generator": st.builds(torch.Generator),
            "num_images_per_prompt": st.integers(1, 2),
            "height": st.sampled_from([8, 12, 24]),
            "timesteps": st.sampled_from([[900, 500, 100], [1, 2], []]),
            "callback_on_step_end": st.just(lambda pipe, step, t, tensors: tensors),
            "callback_on_step_end_tensor_inputs": st.sampled_from([["latents"], ["nothing"]]),
            "clip_skip": st.integers(0, 2),
            "output_type": st.sampled_from(["pil", "np", "pt"]),
        },
    )
)
def test_call(arguments: dict[str, Any]) -> None:
    """Of a pipeline: the result of the stock one, its own error, or a typed one."""
    found = ran(compiled(), arguments)
    if isinstance(found, SrdsFastError):
        return
    own = {name: value for name, value in arguments.items() if name not in ("warm_start", "keep_trajectory")}
    expected = ran(pipeline(), own)
    if isinstance(found, Exception):
        assert type(found) is type(expected), f"{found!r} where the stock pipeline has {expected!r}"
        return
    assert not isinstance(expected, Exception), f"a result where the stock pipeline raises {expected!r}"
    if isinstance(expected, torch.Tensor) and isinstance(found, torch.Tensor):
        # a huge guidance amplifies rounding
        size = expected.abs().nan_to_num(0.0, 0.0).max().clamp(min=1.0)
        assert torch.allclose(found / size, expected / size, rtol=1e-3, atol=1e-3, equal_nan=True)


def paths(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Of all values in a JSON tree."""
    yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from paths(value, (*path, key))


@cache
def written_plans() -> list[Any]:
    found = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "plan.json")
        for method in REGISTERED:
            choose(STEPS, Settings(method=method.name)).save(place)
            found.append(json.loads(place.read_text()))
    return found


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400) | st.just("inf"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@examples(4)
@given(st.data())
def test_plan_files(data: st.DataObject) -> None:
    """A field of any value; what is read can be run."""
    tree = json.loads(json.dumps(data.draw(st.sampled_from(written_plans()))))
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(list(paths(tree))))
        value = data.draw(JSON)
        if not path:
            tree = value
            break
        place = tree
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
    file = Path("plan.json")
    file.write_text(json.dumps(tree))
    try:
        plan = Plan.load(file)
    except PlanMismatch:
        return
    assert str(plan)
    try:
        result = srds_fast.sample(denoiser, torch.ones(1, 8), scheduler(), STEPS, plan=plan)
    except SrdsFastError:
        return
    assert bool(result.sample.isfinite().all())


@examples(1)
@given(st.binary(max_size=300) | st.text(max_size=300).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_files_that_hold_anything(content: bytes) -> None:
    Path("plan.json").write_bytes(content)
    with pytest.raises(PlanMismatch):
        Plan.load("plan.json")


@examples(1)
@given(st.sampled_from(ODD))
def test_paths_that_are_none(path: Any) -> None:
    for use in (choose(STEPS, Settings(method="srds")).save, Plan.load, caches.limit):
        try:
            use(path)
        except (SrdsFastError, OSError):
            continue
        finally:
            caches.limit(caches.DEFAULT_LIMIT)


WORDS = ["", "0", "1", "-1", "2", "nan", "inf", "1e999", "é", "cpu", "cuda:9", "meta", "srds", "2m", "1,2", ",", "a b"]
SWITCHES = ["--ddim", "--exact", "--show-report", "--unmeasured", "--verbose", "--version", "--help"]
FLAGS = [
    *("--steps", "--prompt", "--guidance", "--blocks", "--coarse-solver", "--in-flight", "--max-rows", "--iterations"),
    *("--out", "--seed", "--model", "--device", "--dtype", "--profile", "--method", "--tolerance", "--save", "--plot"),
    *("--negative-prompt", "--images-per-prompt", "--prompts", "--plan", "--batch", "--calls", "--json", "--calibrate"),
    *("--same", "--nonsense"),
]
VALUES = st.sampled_from([*WORDS, "9" * 40]) | st.text(max_size=4)
load = zoo.load
COMMANDS = {
    "demo": ["--steps", "2", "--prompt", "the digit one", "--iterations", "1"],
    "generate": ["--prompt", "the digit one", "--steps", "2"],
    "compare": ["--steps", "2", "--prompt", "the digit one", "--calls", "1", "--method", "sequential"],
    "plan": ["--steps", "5", "--unmeasured"],
    "env": [],
}


@cache
def loaded(name: str) -> Any:
    return load(name)


@examples(2)
@given(
    st.sampled_from(list(COMMANDS)),
    st.lists(st.tuples(st.sampled_from(FLAGS + SWITCHES), VALUES), min_size=1, max_size=3),
)
def test_command_line(command: str, options: list[tuple[str, str]]) -> None:
    """An exit code, and one line that says why; never a traceback, for `--verbose` alone shows one."""
    words = [command, *COMMANDS[command]]
    for flag, value in options:
        words += (
            [flag] if flag in ("--ddim", "--exact", "--show-report", "--unmeasured", "--verbose") else [flag, value]
        )
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(shown), contextlib.redirect_stdout(shown):
        patch.setattr(zoo, "load", loaded)
        try:
            code: Any = main(words)
        except SystemExit as left:  # argparse
            code = left.code
    assert code in (0, 1, 2)
    assert "--verbose" in words or "Traceback" not in shown.getvalue()
