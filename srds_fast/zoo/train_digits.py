"""Train the bundled text-to-image pipeline "digits" from nothing, on one processor core.

    python -m srds_fast.zoo.train_digits --out digits

digits/README.md describes data, networks and training, and has the two tables that are printed at the end. The result
is an ordinary ``StableDiffusionPipeline``, saved in float16. Step counts, not minutes, are fixed, so that two runs on
one machine do the same work.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, HfArgumentParser

from . import WORDS, load_from, prompts
from .training import averaged, optimise

IMAGE_SIZE = 32
TOKENS = 16
TEXT_WIDTH = 64
TEMPLATES = (
    "{}", "the digit {}", "a digit {}", "the number {}", "a number {}", "a handwritten {}",
    "the handwritten digit {}", "a drawing of the digit {}", "a drawing of a {}", "a picture of the number {}",
)  # fmt: skip
START, END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the outcome of a training run.

    The UNet's learning rate would reach zero after ``unet_horizon`` steps. Training ends at ``unet_steps``, where it is
    down to a fifteenth: the averaged weights have settled by then.
    """

    seed: int = 0
    vae_steps: int = 2000
    vae_batch: int = 32
    vae_rate: float = 2e-3
    kl_weight: float = 3e-4
    images: int = 24_000
    unet_steps: int = 7500
    unet_horizon: int = 9000
    unet_batch: int = 64
    unet_rate: float = 1e-3
    caption_dropout: float = 0.15
    ema_decay: float = 0.999


def real_digits() -> tuple[Tensor, Tensor]:
    """The real digits, float32 ``[1797, 3, 32, 32]`` in -1..1, and their labels, int64 ``[1797]``."""
    data = load_digits()
    small = torch.from_numpy(data.images).float()[:, None] / 16
    large = F.interpolate(small, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", align_corners=False).clamp(0, 1)
    return (large * 2 - 1).expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(data.target)


def augment(images: Tensor) -> Tensor:
    """Images ``[n, 3, 32, 32]`` in -1..1, each slightly turned, scaled, shifted and its stroke contrast changed."""
    n = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(n).uniform_(low, high)

    angle, scale = torch.deg2rad(uniform(-8, 8)), uniform(0.97, 1.08)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    shift_x, shift_y = uniform(-0.06, 0.06), uniform(-0.04, 0.04)
    theta = torch.stack([torch.stack([cos, -sin, shift_x], 1), torch.stack([sin, cos, shift_y], 1)], 1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    ink = F.grid_sample((images + 1) / 2, grid, mode="bicubic", align_corners=False).clamp(0, 1)
    return ink.pow(uniform(0.8, 1.25)[:, None, None, None]) * 2 - 1


def captions(digit: int) -> list[str]:
    """Every caption of a digit: each phrasing with the word and with the numeral."""
    return [template.format(name) for template in TEMPLATES for name in (WORDS[digit], str(digit))]


def byte_pair_merges(words: list[str]) -> list[tuple[str, str]]:
    """Merges, in order, that make each word one token; the most frequent pair is merged first."""
    pieces = [" ".join([*word[:-1], word[-1] + "</w>"]) for word in words]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for piece in pieces for pair in pairwise(piece.split())):
        pair = min(pairs, key=lambda candidate: (-pairs[candidate], candidate))
        merges.append(pair)
        whole_symbols = re.compile(rf"(?<!\S){re.escape(' '.join(pair))}(?!\S)")
        pieces = [whole_symbols.sub("".join(pair), piece) for piece in pieces]
    return merges


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose vocabulary is all bytes and one token for each word of the captions."""
    words = sorted({word for digit in range(10) for caption in captions(digit) for word in caption.split()})
    merges = byte_pair_merges(words)
    alphabet = sorted(ByteLevel.alphabet())
    symbols = [*alphabet, *(byte + "</w>" for byte in alphabet), *(left + right for left, right in merges), START, END]
    vocabulary = {symbol: index for index, symbol in enumerate(dict.fromkeys(symbols))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def build_vae() -> AutoencoderKL:
    """An untrained autoencoder between images ``[n, 3, 32, 32]`` and latents ``[n, 4, 8, 8]``."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    sizes = {"block_out_channels": (16, 32, 32), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 8}
    return AutoencoderKL(**blocks, **sizes, sample_size=IMAGE_SIZE)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """An untrained text encoder from ids ``[n, 16]`` to states ``[n, 16, 64]``."""
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    widths = {"hidden_size": TEXT_WIDTH, "projection_dim": TEXT_WIDTH, "intermediate_size": 4 * TEXT_WIDTH}
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": TOKENS}
    return CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **tokens, **widths, **sizes))


def build_unet() -> UNet2DConditionModel:
    """An untrained UNet that predicts the noise in latents ``[n, 4, 8, 8]`` from text states ``[n, 16, 64]``."""
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    latents = {"sample_size": 8, "in_channels": 4, "out_channels": 4}
    sizes = {"block_out_channels": (48, 96), "layers_per_block": 1, "attention_head_dim": 4, "norm_num_groups": 16}
    return UNet2DConditionModel(
        **latents, **sizes, down_block_types=down, up_block_types=up, cross_attention_dim=TEXT_WIDTH
    )


def train_vae(recipe: Recipe, images: Tensor) -> tuple[AutoencoderKL, float]:
    """The autoencoder, trained on augmented images, and its final loss (pixel mean square plus KL term)."""
    vae = build_vae()

    def loss_of_step() -> Tensor:
        pixels = augment(images[torch.randint(len(images), (recipe.vae_batch,))])
        posterior = vae.encode(pixels).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        divergence: Tensor = posterior.kl().sum() / posterior.mean.numel()
        return F.mse_loss(decoded, pixels) + recipe.kl_weight * divergence

    loss = optimise(vae, loss_of_step, recipe.vae_steps, recipe.vae_steps, recipe.vae_rate, "autoencoder")
    standardise_latents(vae.eval(), images)
    return vae, loss


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, ``[n, 4, 8, 8]`` each, of the unscaled latents of augmented images."""
    posteriors = [vae.encode(augment(part)).latent_dist for part in images.split(250)]
    return torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])


@torch.no_grad()
def standardise_latents(vae: AutoencoderKL, images: Tensor) -> None:
    """Give the latents channels of mean zero and equal variance, and set the matching scaling factor.

    Sampling starts from unit noise, and Stable Diffusion's schedule does not quite reach pure noise: both fit latents
    of mean zero and unit variance. The change is folded into the 1x1 convolutions on either side of the latents, so
    the autoencoder maps images as before.
    """
    means, deviations = encode_images(vae, images)
    latents = means + deviations * torch.randn_like(means)
    shift, spread, overall = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3)), latents.std()
    gain, channels = overall / spread, len(spread)
    encoder, decoder = vae.quant_conv, vae.post_quant_conv
    decoder.bias += decoder.weight[:, :, 0, 0] @ shift
    decoder.weight /= gain[:, None, None]
    encoder.bias[:channels] = (encoder.bias[:channels] - shift) * gain
    encoder.bias[channels:] += 2 * gain.log()
    encoder.weight[:channels] *= gain[:, None, None, None]
    vae.register_to_config(scaling_factor=round(1 / overall.item(), 4))


def train_unet(
    recipe: Recipe, vae: AutoencoderKL, images: Tensor, labels: Tensor
) -> tuple[StableDiffusionPipeline, float]:
    """The pipeline with a UNet and text encoder trained jointly, and the final loss (mean square of the noise)."""
    tokenizer = build_tokenizer()
    # the noise schedule of Stable Diffusion 1 and 2, with DDIM's step
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type="epsilon", timestep_spacing="leading",
    )  # fmt: skip
    unet, text_encoder = build_unet(), build_text_encoder(tokenizer)
    trained = nn.ModuleList([unet, text_encoder])

    average = averaged(trained, recipe.ema_decay)
    texts = [caption for digit in range(10) for caption in captions(digit)]
    phrasings = len(texts) // 10
    # padded as StableDiffusionPipeline pads them; the last is the empty caption
    batch = tokenizer([*texts, ""], padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    ids: Tensor = batch.input_ids
    order = torch.arange(recipe.images) % len(images)
    means, deviations = encode_images(vae, images[order])

    def loss_of_step() -> Tensor:
        chosen = torch.randint(recipe.images, (recipe.unet_batch,))
        latents = means[chosen] + deviations[chosen] * torch.randn_like(means[chosen])
        caption = labels[order[chosen]] * phrasings + torch.randint(phrasings, (recipe.unet_batch,))
        caption[torch.rand(recipe.unet_batch) < recipe.caption_dropout] = len(texts)
        times = torch.randint(scheduler.config.num_train_timesteps, (recipe.unet_batch,))
        noise = torch.randn_like(latents)
        noisy = scheduler.add_noise(latents * vae.config.scaling_factor, noise, times)
        states = text_encoder(ids[caption])[0]
        return F.mse_loss(unet(noisy, times, states).sample, noise)

    steps = recipe.unet_steps, recipe.unet_horizon
    loss = optimise(trained, loss_of_step, *steps, recipe.unet_rate, "denoiser", average)
    averages = dict(zip(("unet", "text_encoder"), average.module.eval().children(), strict=True))
    without: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(vae=vae, **averages, tokenizer=tokenizer, scheduler=scheduler, **without), loss


def sample(
    pipeline: StableDiffusionPipeline, per_digit: int, seed: int, steps: int = 50, guidance: float = 3.0
) -> np.ndarray:
    """So many images of each digit, prompted: ``[10, per_digit, 32, 32, 3]`` in 0..1."""
    texts = [prompt for prompt in prompts("digits") for _ in range(per_digit)]
    noise = torch.Generator().manual_seed(seed)
    images: np.ndarray = pipeline(
        texts, num_inference_steps=steps, guidance_scale=guidance, generator=noise, output_type="np", return_dict=False
    )[0]
    return images.reshape(10, per_digit, IMAGE_SIZE, IMAGE_SIZE, 3)


def recognised(images: np.ndarray) -> float:
    """The share of prompted images, ``[10, n, 32, 32, 3]``, in which an SVC of real digits finds the one asked for."""
    data = load_digits()
    classifier = SVC(C=10.0, gamma="scale").fit(data.data / 16, data.target)
    pooled = images.mean(axis=-1).reshape(-1, 8, IMAGE_SIZE // 8, 8, IMAGE_SIZE // 8).mean(axis=(2, 4))
    asked = np.repeat(np.arange(10), images.shape[1])
    return float(np.mean(classifier.predict(pooled.reshape(-1, 64)) == asked))


def main() -> None:
    """Train, save, sample from what was saved, and print what was measured."""
    parser = HfArgumentParser(Recipe, description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the pipeline to")
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    recipe, arguments = parser.parse_args_into_dataclasses()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(recipe.seed)
    started = time.perf_counter()
    images, labels = real_digits()
    vae, vae_loss = train_vae(recipe, images)
    pipeline, unet_loss = train_unet(recipe, vae, images, labels)
    seconds = time.perf_counter() - started
    parts = {"autoencoder": pipeline.vae, "text encoder": pipeline.text_encoder, "UNet": pipeline.unet}
    for part in parts.values():
        part.half()
    pipeline.save_pretrained(arguments.out)

    pipeline = load_from(arguments.out, torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    samples = sample(pipeline, per_digit=20, seed=recipe.seed)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    measured = {
        "parameters": f"{sum(counts.values()):,} (" + ", ".join(f"{n} {c:,}" for n, c in counts.items()) + ")",
        "training time": f"{seconds:.0f} s",
        "processor time": f"{time.process_time():.0f} s",
        "final loss, autoencoder": f"{vae_loss:.5f}",
        "final loss, noise prediction": f"{unet_loss:.4f}",
        "latent scaling factor": f"{pipeline.vae.config.scaling_factor}",
        "recognised": f"{recognised(samples):.1%}",
    }
    for table in (asdict(recipe), measured):
        print("", *(f"| {name} | {value} |" for name, value in table.items()), sep="\n")


if __name__ == "__main__":
    main()
