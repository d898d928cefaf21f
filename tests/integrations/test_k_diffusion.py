"""Samplers with the signature of k-diffusion: equal to those of k-diffusion, and their callbacks."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from promises import SAME_SAMPLE
from published_samplers import SAMPLERS, SCHEDULES, denoised, karras, starting_noise
from torch import Tensor

from srds_fast import InvalidArgument, Report, UnknownArgument
from srds_fast.integrations.k_diffusion import sample_parallel, sample_srds
from srds_fast.solvers.contract import Evaluate, Evaluated

SIGMAS = karras(20)
X = starting_noise(SIGMAS)
SHIFT = 0.3 * starting_noise(torch.ones(1))


def difference(a: Tensor, b: Tensor) -> float:
    """The worst mean absolute difference of a sample."""
    return float((a - b).abs().flatten(1).mean(1).max())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "euler_ancestral"])
def test_the_sample_is_that_of_the_original(sampler: str, schedule: str) -> None:
    sigmas = SCHEDULES[schedule](30)
    x = starting_noise(sigmas)
    torch.manual_seed(0)
    expected = SAMPLERS[sampler](denoised, x, sigmas, shift=SHIFT)
    for sample, options, bound in ((sample_srds, {}, 4e-3), (sample_srds, {"exact": True}, 2e-5)):
        torch.manual_seed(0)
        if sampler == "euler":
            options["unused_noise"] = False
        found = sample(denoised, x, sigmas, {"shift": SHIFT}, sampler=sampler, disable=True, **options)
        assert difference(found, expected) <= bound


@pytest.fixture(scope="module")
def original() -> ModuleType:
    """k_diffusion.sampling, without the rest of that package, which imports wandb, clip and more."""
    try:
        spec = importlib.util.find_spec("k_diffusion")
        assert spec is not None and spec.origin is not None  # noqa: PT018
        if "k_diffusion" not in sys.modules:
            package = ModuleType("k_diffusion")
            package.__path__ = [str(Path(spec.origin).parent)]
            sys.modules["k_diffusion"] = package
        return importlib.import_module("k_diffusion.sampling")
    except (AssertionError, ImportError) as why:
        pytest.skip(f"k-diffusion is not installed here, or what its samplers import: {why}")


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "euler_ancestral", "heun"])
def test_against_k_diffusion_itself(original: ModuleType, sampler: str) -> None:
    events: dict[str, list[dict[str, Any]]] = {"theirs": [], "ours": []}
    torch.manual_seed(0)
    stock = getattr(original, f"sample_{sampler}")
    expected = stock(denoised, X, SIGMAS, {"shift": SHIFT}, events["theirs"].append, True)
    state = torch.get_rng_state()
    for options in ({"exact": True}, {}):
        torch.manual_seed(0)
        events["ours"].clear()
        found = sample_srds(
            denoised, X, SIGMAS, {"shift": SHIFT}, events["ours"].append, True, sampler=sampler, **options
        )
        assert difference(found, expected) <= (2e-5 if options else 4e-3)
        assert torch.equal(torch.get_rng_state(), state)
    for theirs, ours in zip(events["theirs"], events["ours"], strict=True):
        assert theirs.keys() == ours.keys()
        for name in ("i", "sigma", "sigma_hat"):
            assert theirs[name] == ours[name]
        assert theirs["x"].shape == ours["x"].shape == ours["denoised"].shape


@pytest.mark.parametrize("method", SAME_SAMPLE)
def test_every_step_is_told_once_in_order(method: str) -> None:
    seen = list[dict[str, Any]]()
    waves = list[int]()

    def on_wave(wave: int, rows: int, settled: int) -> None:
        waves.append(len(seen))

    reports = list[Report]()
    found = sample_parallel(
        denoised, X, SIGMAS, None, seen.append, True, method=method, on_wave=on_wave, on_report=reports.append
    )
    assert [each["i"] for each in seen] == list(range(20))
    assert reports[0].waves == len(waves)
    if method == "sequential":
        assert waves == [0, *range(19)], "told before the wave that follows"
    else:
        assert sorted(set(waves))[:3] == [0, 1, 2] or len(waves) < 4, "each wave tells at least one step"
    assert difference(seen[-1]["denoised"], found) < 1e-2, "the last step ends at x0"
    assert torch.equal(seen[0]["x"], X)


def test_values_of_steps_that_are_final_are_those_of_the_sampler() -> None:
    truth, seen = list[Tensor](), list[dict[str, Any]]()

    def recording(x: Tensor, sigma: Tensor) -> Tensor:
        truth.append(denoised(x, sigma))
        return truth[-1]

    SAMPLERS["euler"](recording, X, SIGMAS)
    sample_parallel(denoised, X, SIGMAS, None, seen.append, True, method="sequential")
    for known, told in zip(truth, seen, strict=True):
        torch.testing.assert_close(told["denoised"], known, rtol=0, atol=2e-5)


@pytest.mark.parametrize("method", ["sequential", "srds", "collocation"])
@pytest.mark.parametrize("step", [0, 2])
def test_a_callback_ends_the_call_at_its_wave(method: str, step: int) -> None:
    calls = 0

    def counting(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return denoised(x, sigma)

    def callback(told: dict[str, Any]) -> None:
        if told["i"] == step:
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        sample_parallel(counting, X, SIGMAS, None, callback, True, method=method)
    assert calls <= step + 1
    assert sample_parallel(counting, X, SIGMAS, None, None, True, method=method).shape == X.shape


def test_arguments_follow_their_samples() -> None:
    """Of a batch of three: tensors of the batch, also in containers, go with the rows; all else is passed on."""
    shift, weights = 0.3 * starting_noise(torch.ones(1), 3), torch.tensor([0.0, 1.0])
    given = {"conds": {"parts": [shift, "text"]}, "weights": weights, "flag": True}

    def model(x: Tensor, sigma: Tensor, conds: Any, weights: Tensor, flag: bool) -> Tensor:
        assert (conds["parts"][1], flag, len(weights)) == ("text", True, 2)
        return denoised(x, sigma, conds["parts"][0] * weights[1])

    x = starting_noise(SIGMAS, 3)
    expected = SAMPLERS["euler"](denoised, x, SIGMAS, shift=shift)
    assert difference(sample_srds(model, x, SIGMAS, given, disable=True, unused_noise=False), expected) <= 4e-3


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(UnknownArgument, match="s_churn is no option here"):
        sample_srds(denoised, X, SIGMAS, s_churn=1.0)
    with pytest.raises(UnknownArgument, match="Known are sampler"):
        sample_srds(denoised, X, SIGMAS, blocks=3)
    with pytest.raises(InvalidArgument, match="extra_args is"):
        sample_srds(denoised, X, SIGMAS, [1])
    with pytest.raises(InvalidArgument, match="model is 3"):
        sample_srds(3, X, SIGMAS)
    with pytest.raises(InvalidArgument, match="do not descend"):
        sample_srds(denoised, X, SIGMAS.flip(0))


def test_samples_that_are_at_different_steps_are_told_by_their_own_steps() -> None:
    """Windows of speculative sampling slide by sample."""
    evaluated, x = Evaluated(), torch.arange(8.0).view(2, 2, 2)  # [rows, samples, elements]
    evaluated.record(Evaluate(x, (3, 4), (0, 1), 0), x + 10)
    evaluated.record(Evaluate(x + 100, (4, 5), (0, 1), 1, shifts=(0, 1)), x + 110)
    assert sorted(evaluated.x) == [3, 4, 5, 6]
    assert torch.equal(evaluated.x[3], x[0])
    assert torch.equal(evaluated.x[4], torch.stack([x[0, 0] + 100, x[1, 1]])), "the second sample is a step further on"
    assert torch.equal(evaluated.x[5], torch.stack([x[1, 0], x[0, 1]]) + 100)
    assert torch.equal(evaluated.m[5], evaluated.x[5] + 10)


def test_speculative_sampling_tells_every_step_once() -> None:
    seen = list[dict[str, Any]]()
    found = sample_parallel(
        denoised, X, SIGMAS, None, seen.append, True, method="speculative", sampler="euler_ancestral"
    )
    assert [each["i"] for each in seen] == list(range(20))
    assert difference(seen[-1]["denoised"], found) < 1e-2, "the last step ends at x0"
