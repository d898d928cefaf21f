"""Classes whose loops are known to have no counter: their rehearsals are short where all is as diffusers has it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import tiny
from calls import assert_close, latents
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion as module
from support import needs_diffusers

import srds_fast
from bench.workloads.classes import CASES
from srds_fast.pipelines import known_classes
from srds_fast.pipelines.known_classes import digest_of, digests
from srds_fast.pipelines.lockstep.rehearsal import FEW_TURNS, FEWEST_TURNS, ORDER, Rehearsal

STEPS = 9


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The digest of one class, whichever version of diffusers is installed."""
    found = {"StableDiffusionPipeline": digest_of(StableDiffusionPipeline)}
    monkeypatch.setattr(known_classes, "digests", lambda: found)
    return found


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each rehearsal: how many turns it makes once more, in another order."""
    found, order = list[int](), Rehearsal._other_order

    def kept(self: Rehearsal, again: bool) -> list[int]:
        steps = list(order(self, again))
        found.append(len(steps))
        return steps

    monkeypatch.setattr(Rehearsal, "_other_order", kept)
    return found


def rehearsed(pipe: Any) -> None:
    fast = srds_fast.compile(pipe, method="srds", exact=True)
    assert_close(latents(fast, prompt="a cat"), latents(pipe, prompt="a cat"))
    assert fast.report.fallback_reason is None


def test_a_class_of_the_file_makes_few_turns_again(repeated: list[int], known: dict[str, str]) -> None:
    rehearsed(tiny.stable_diffusion())
    assert repeated == [FEW_TURNS]
    known["StableDiffusionPipeline"] = digest_of(DDIMScheduler)
    rehearsed(tiny.stable_diffusion())
    known.clear()
    rehearsed(tiny.stable_diffusion())
    assert repeated[1:] == [2 * STEPS] * 2
    assert 2 * STEPS >= FEWEST_TURNS


def own_class(pipe: Any, patch: pytest.MonkeyPatch) -> Any:
    class Own(StableDiffusionPipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    Own.__name__ = "StableDiffusionPipeline"
    return Own(**pipe.components, requires_safety_checker=False)


def own_function_on_the_class(pipe: Any, patch: pytest.MonkeyPatch) -> None:
    prepare = StableDiffusionPipeline.prepare_latents
    patch.setattr(StableDiffusionPipeline, "prepare_latents", lambda self, *given: prepare(self, *given))


def own_function_in_the_module(pipe: Any, patch: pytest.MonkeyPatch) -> None:
    rescale = module.rescale_noise_cfg
    patch.setattr(module, "rescale_noise_cfg", lambda *given, **options: rescale(*given, **options))


def own_property(pipe: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(StableDiffusionPipeline, "guidance_scale", property(lambda self: self._guidance_scale))


def own_function_on_the_object(pipe: Any, patch: pytest.MonkeyPatch) -> None:
    pipe.numpy_to_pil = lambda images: images


def own_scheduler(pipe: Any, patch: pytest.MonkeyPatch) -> None:
    class Own(DDIMScheduler):
        def scale_model_input(self, sample: Any, timestep: Any = None) -> Any:
            return sample

    pipe.scheduler = Own.from_config(pipe.scheduler.config)


def own_hook(pipe: Any, patch: pytest.MonkeyPatch) -> None:
    pipe.unet.mid_block.register_forward_hook(lambda module, given, found: found * 1)


def own_processor(pipe: Any, patch: pytest.MonkeyPatch) -> None:
    class Own(AttnProcessor2_0):
        pass

    pipe.unet.set_attn_processor(Own())


OWN: list[Callable[[Any, pytest.MonkeyPatch], Any]] = [
    own_class,
    own_function_on_the_class,
    own_function_in_the_module,
    own_property,
    own_function_on_the_object,
    own_scheduler,
    own_hook,
    own_processor,
]


@pytest.mark.parametrize("change", OWN, ids=lambda change: change.__name__)
def test_what_a_user_has_put_there_is_rehearsed_in_full(
    change: Callable[[Any, pytest.MonkeyPatch], Any], repeated: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny.stable_diffusion()
    rehearsed(change(pipe, monkeypatch) or pipe)
    assert repeated == [2 * STEPS]


def test_momentum_shows_in_a_short_rehearsal_too(known: dict[str, str]) -> None:
    """A setting of the guider brings it into a loop that has none otherwise."""
    needs_diffusers("0.40", "the class is not in earlier ones")
    known["HunyuanVideo15Pipeline"] = digest_of(diffusers.HunyuanVideo15Pipeline)
    case = CASES["HunyuanVideo15Pipeline, guidance with momentum"]
    fast = srds_fast.compile(case.build(), method="srds")
    fast(**case.call, num_inference_steps=STEPS)
    assert ORDER in fast.report.fallback_reason


def test_the_file_is_of_the_installed_classes() -> None:
    for name, digest in digests().items():
        assert digest_of(getattr(diffusers, name)) == digest, "python -m bench.quality.support --page"


def test_another_version_of_diffusers_has_no_known_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version, expected in ((diffusers.__version__, {"A": "1"}), ("0.1.0", {})):
        (tmp_path / "known.json").write_text(json.dumps({"diffusers": version, "classes": {"A": "1"}}))
        monkeypatch.setattr(known_classes, "FILE", tmp_path / "known.json")
        assert digests.__wrapped__() == expected
