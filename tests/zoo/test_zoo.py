"""The bundled pipelines: they load offline, are small, and draw what the prompt asks for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

import srds_fast.zoo as zoo
from srds_fast.zoo.train_digits import recognised, sample

ASSETS = Path(zoo.__file__).parent


@pytest.fixture(scope="module")
def digits() -> StableDiffusionPipeline:
    pipeline = zoo.load("digits")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_it_is_a_stable_diffusion_pipeline_that_is_ready_to_sample(digits: StableDiffusionPipeline) -> None:
    assert type(digits) is StableDiffusionPipeline
    kinds = (type(digits.unet), type(digits.vae), type(digits.text_encoder), type(digits.scheduler))
    assert kinds == (UNet2DConditionModel, AutoencoderKL, CLIPTextModel, DDIMScheduler)
    assert isinstance(digits.tokenizer, CLIPTokenizer)
    assert digits.safety_checker is None
    for part in (digits.unet, digits.vae, digits.text_encoder):
        assert not any(module.training for module in part.modules())
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}
        assert all(torch.isfinite(parameter).all() for parameter in part.parameters())


def test_float64_reaches_every_network() -> None:
    pipeline = zoo.load("digits", dtype=torch.float64)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float64}
    latents = torch.zeros(1, 4, 8, 8, dtype=torch.float64)
    image = pipeline("the digit one", num_inference_steps=1, latents=latents, output_type="pt").images
    assert image.dtype == torch.float64


def test_importing_the_zoo_imports_no_diffusers_and_loading_asks_no_network() -> None:
    script = (
        "import socket, sys\n"
        "def refuse(*args, **kwargs): raise AssertionError('a socket was asked for')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "import srds_fast.zoo as zoo\n"
        "assert 'diffusers' not in sys.modules\n"
        "zoo.load('digits'), zoo.load('policy')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_folder_has_a_card_and_at_most_eight_megabytes() -> None:
    sizes = [path.stat().st_size for path in (ASSETS / "digits").rglob("*") if path.is_file()]
    assert sum(sizes) <= 8_000_000
    text = (ASSETS / "digits" / "README.md").read_text()
    assert all(heading in text for heading in ("## Recipe", "## Measured", "## Licence"))


def test_each_word_is_one_token_and_each_digit_its_own(digits: StableDiffusionPipeline) -> None:
    tokenizer, prompts = digits.tokenizer, zoo.prompts("digits")
    for prompt in [*prompts, "a handwritten 7", "a drawing of the digit 7", "the number three"]:
        ids = tokenizer(prompt).input_ids
        assert len(ids) == len(prompt.split()) + 2
        assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    words = {tokenizer(prompt).input_ids[-2] for prompt in prompts}
    assert len(words) == 10
    assert tokenizer.unk_token_id not in words


@pytest.mark.parametrize("call", [zoo.load, zoo.prompts])
def test_names_are_known_and_others_refused_with_what_exists(call: Callable[[Any], object]) -> None:
    assert zoo.names() == ["digits"]
    assert zoo.prompts("digits")[7] == "the digit seven"
    for name in ("letters", ["digits"]):
        with pytest.raises(ValueError, match="digits"):
            call(name)


def test_the_prompted_digits_are_recognised(digits: StableDiffusionPipeline) -> None:
    """By a classifier of real digits, which takes no other digit for the one that was asked for."""
    images = sample(digits, per_digit=2, seed=0, steps=25)
    assert recognised(images) >= 0.9
    assert recognised(np.roll(images, 1, axis=0)) <= 0.1
