"""The bundled pipelines: they load offline, are small, and draw what the prompt asks for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import digit_classifier
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

import srds_fast.zoo as zoo

ASSETS = Path(zoo.__file__).parent


@pytest.fixture(scope="module")
def digits() -> StableDiffusionPipeline:
    pipeline = zoo.load("digits")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: StableDiffusionPipeline, prompts: list[str], steps: int, latents: torch.Tensor) -> np.ndarray:
    """Return one image a prompt, ``[n, 32, 32, 3]`` in 0..1, at guidance 3, from the noise ``latents``."""
    return pipeline(
        prompts, num_inference_steps=steps, guidance_scale=3.0, latents=latents, output_type="np", return_dict=False
    )[0]


def test_the_parts_are_those_of_a_stable_diffusion_pipeline(digits: StableDiffusionPipeline) -> None:
    assert type(digits) is StableDiffusionPipeline
    assert type(digits.unet) is UNet2DConditionModel
    assert type(digits.vae) is AutoencoderKL
    assert type(digits.text_encoder) is CLIPTextModel
    assert type(digits.scheduler) is DDIMScheduler
    assert isinstance(digits.tokenizer, CLIPTokenizer)
    assert digits.safety_checker is None


def test_it_is_ready_to_sample(digits: StableDiffusionPipeline) -> None:
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
        "zoo.load('digits')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_folder_is_at_most_eight_megabytes() -> None:
    sizes = [path.stat().st_size for path in (ASSETS / "digits").rglob("*") if path.is_file()]
    assert sum(sizes) <= 8_000_000


def test_the_card_travels_along() -> None:
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


def test_names_and_prompts() -> None:
    assert zoo.names() == ["digits"]
    assert len(zoo.prompts("digits")) == 10
    assert zoo.prompts("digits")[7] == "the digit seven"


@pytest.mark.parametrize("call", [zoo.load, zoo.prompts])
def test_an_unknown_name_is_refused_with_what_exists(call: Callable[[str], object]) -> None:
    with pytest.raises(ValueError, match="digits"):
        call("letters")


def test_the_prompt_changes_the_image(digits: StableDiffusionPipeline) -> None:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).expand(10, -1, -1, -1).contiguous()
    images = draw(digits, zoo.prompts("digits"), steps=10, latents=noise)
    apart = [np.abs(one - other).mean() for i, one in enumerate(images) for other in images[:i]]
    assert min(apart) > 0.03


def test_the_classifier_reads_held_out_real_digits() -> None:
    assert digit_classifier.held_out_accuracy() >= 0.97


def test_the_classifier_reads_the_prompted_digits(digits: StableDiffusionPipeline) -> None:
    noise = torch.randn(20, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    asked = np.tile(np.arange(10), 2)
    prompts = [zoo.prompts("digits")[digit] for digit in asked]
    drawn = draw(digits, prompts, steps=25, latents=noise)
    assert np.mean(digit_classifier.read(drawn) == asked) >= 0.9
