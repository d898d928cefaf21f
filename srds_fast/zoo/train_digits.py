"""Train the bundled text-to-image pipeline "digits" from nothing, on one processor core.

The data are the 1,797 handwritten digits that ship with scikit-learn (UCI "Optical Recognition of Handwritten
Digits", 8x8 pixels). They are upscaled to 32x32, encoded by a small KL autoencoder into 4x8x8 latents, and a
conditional UNet learns to denoise those latents, jointly with a small CLIP text encoder that reads the captions. The
result is an ordinary ``StableDiffusionPipeline``, saved in float16::

    python -m srds_fast.zoo.train_digits --out digits --sheet digits.png

Step counts, not minutes, are fixed, so that two runs on one machine do the same work.
"""

from __future__ import annotations

import argparse
import copy
import math
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

IMAGE_SIZE = 32
LATENT_SIZE = 8
TOKENS = 16
TEXT_WIDTH = 64
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = (
    "{}",
    "the digit {}",
    "a digit {}",
    "the number {}",
    "a number {}",
    "a handwritten {}",
    "the handwritten digit {}",
    "a drawing of the digit {}",
    "a drawing of a {}",
    "a picture of the number {}",
)
START, END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the outcome of a training run.

    The UNet's learning rate follows a cosine that would reach zero after ``unet_horizon`` steps; training ends at
    ``unet_steps``, where it is down to a fifteenth, since the averaged weights have settled by then.
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
    preview_every: int = 1500


def real_digits() -> tuple[Tensor, Tensor]:
    """Return the real digits, float32 ``[1797, 3, 32, 32]`` in -1..1, and their labels, int64 ``[1797]``."""
    data = load_digits()
    small = torch.from_numpy(data.images).float()[:, None] / 16
    large = F.interpolate(small, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", align_corners=False).clamp(0, 1)
    return (large * 2 - 1).expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(data.target)


def augment(images: Tensor) -> Tensor:
    """Return ``images`` (``[n, 3, 32, 32]``, -1..1), each slightly turned, scaled, shifted and re-inked."""
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
    """Return every caption of ``digit``: each phrasing with the word and with the numeral."""
    return [template.format(name) for template in TEMPLATES for name in (WORDS[digit], str(digit))]


def byte_pair_merges(words: list[str]) -> list[tuple[str, str]]:
    """Return merges, in order, that make each of ``words`` one token (the most frequent pair goes first)."""
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for piece in pieces for pair in pairwise(piece)):
        pair = min(pairs, key=lambda candidate: (-pairs[candidate], candidate))
        merges.append(pair)
        pieces = [merge_pair(piece, pair) for piece in pieces]
    return merges


def merge_pair(piece: list[str], pair: tuple[str, str]) -> list[str]:
    """Return ``piece`` with each occurrence of ``pair``, from the left, joined into one symbol."""
    joined: list[str] = []
    for symbol in piece:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return joined


def build_tokenizer() -> CLIPTokenizer:
    """Return a CLIP tokenizer whose vocabulary is all bytes and one token for each word of the captions."""
    words = sorted({word for digit in range(10) for caption in captions(digit) for word in caption.split()})
    merges = byte_pair_merges(words)
    alphabet = sorted(ByteLevel.alphabet())
    symbols = [*alphabet, *(byte + "</w>" for byte in alphabet), *(left + right for left, right in merges), START, END]
    vocabulary = {symbol: index for index, symbol in enumerate(dict.fromkeys(symbols))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def token_ids(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Return the ids of ``texts``, int64 ``[n, 16]``, padded as ``StableDiffusionPipeline`` pads them."""
    batch = tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    ids: Tensor = batch.input_ids
    return ids


def build_vae() -> AutoencoderKL:
    """Return an untrained autoencoder between images ``[n, 3, 32, 32]`` and latents ``[n, 4, 8, 8]``."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return an untrained text encoder from ids ``[n, 16]`` to states ``[n, 16, 64]``."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet() -> UNet2DConditionModel:
    """Return an untrained UNet that predicts the noise in latents ``[n, 4, 8, 8]`` from text states ``[n, 16, 64]``."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(48, 96),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Return the noise schedule of Stable Diffusion 1 and 2, with DDIM's step."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
        timestep_spacing="leading",
    )


def optimise(
    parameters: list[nn.Parameter],
    loss_of_step: Callable[[], Tensor],
    *,
    steps: int,
    horizon: int,
    rate: float,
    label: str,
    after_step: Callable[[int], None] = lambda step: None,
) -> float:
    """Minimise ``loss_of_step()`` by AdamW with a short warm-up and a cosine decay; return the running mean loss.

    The learning rate would reach zero after ``horizon`` steps, of which ``steps`` are taken.
    ``after_step`` is called with the number of steps done (1..``steps``), after each of them.
    """
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01, betas=(0.9, 0.99))
    warm_up = min(200, horizon // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * min(step / horizon, 1.0))),
    )
    started, mean = time.perf_counter(), math.nan
    for done in range(1, steps + 1):
        loss = loss_of_step()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        mean = loss.item() if math.isnan(mean) else 0.99 * mean + 0.01 * loss.item()
        if done % 100 == 0 or done == steps:
            print(f"{label} {done}/{steps}  loss {mean:.5f}  {time.perf_counter() - started:.0f} s", flush=True)
        after_step(done)
    return mean


def train_vae(recipe: Recipe, images: Tensor) -> tuple[AutoencoderKL, float]:
    """Return the autoencoder trained on augmented ``images`` and its final loss (pixel mean square plus KL term)."""
    vae = build_vae()

    def loss_of_step() -> Tensor:
        pixels = augment(images[torch.randint(len(images), (recipe.vae_batch,))])
        posterior = vae.encode(pixels).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        divergence: Tensor = posterior.kl().sum() / posterior.mean.numel()
        return F.mse_loss(decoded, pixels) + recipe.kl_weight * divergence

    loss = optimise(
        list(vae.parameters()),
        loss_of_step,
        steps=recipe.vae_steps,
        horizon=recipe.vae_steps,
        rate=recipe.vae_rate,
        label="autoencoder",
    )
    standardise_latents(vae.eval(), images)
    return vae, loss


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation, ``[n, 4, 8, 8]`` each, of the unscaled latents of augmented ``images``."""
    posteriors = [vae.encode(augment(part)).latent_dist for part in images.split(250)]
    return torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])


@torch.no_grad()
def standardise_latents(vae: AutoencoderKL, images: Tensor) -> None:
    """Give the latents of ``images`` channels of mean zero and of one variance, and set the matching scaling factor.

    Sampling starts from unit noise, and Stable Diffusion's schedule does not quite reach pure noise: latents of mean
    zero and unit variance are the ones that fit both. The change is folded into the 1x1 convolutions on either side of
    the latents, so that what ``vae`` makes of an image stays the same.
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


@torch.no_grad()
def average_weights(average: nn.Module, module: nn.Module, decay: float) -> None:
    """Move the weights of ``average`` towards those of ``module`` by ``1 - decay``."""
    for mean, value in zip(average.parameters(), module.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)


def train_unet(
    recipe: Recipe,
    vae: AutoencoderKL,
    images: Tensor,
    labels: Tensor,
    on_preview: Callable[[StableDiffusionPipeline], None],
) -> tuple[StableDiffusionPipeline, float]:
    """Return the pipeline with a UNet and text encoder trained jointly, and the final loss (mean square, noise).

    ``on_preview`` gets the pipeline, with averaged weights, each ``recipe.preview_every`` steps.
    """
    tokenizer, scheduler = build_tokenizer(), build_scheduler()
    unet, text_encoder = build_unet(), build_text_encoder(tokenizer)
    average = nn.ModuleList([copy.deepcopy(unet), copy.deepcopy(text_encoder)]).eval()
    pipeline = assemble(vae, average[1], tokenizer, average[0], scheduler)

    texts = [caption for digit in range(10) for caption in captions(digit)]
    phrasings = len(texts) // 10
    ids = token_ids(tokenizer, [*texts, ""])
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

    def after_step(done: int) -> None:
        decay = min(recipe.ema_decay, done / (done + 10))
        average_weights(average[0], unet, decay)
        average_weights(average[1], text_encoder, decay)
        if done % recipe.preview_every == 0:
            on_preview(pipeline)

    loss = optimise(
        [*unet.parameters(), *text_encoder.parameters()],
        loss_of_step,
        steps=recipe.unet_steps,
        horizon=recipe.unet_horizon,
        rate=recipe.unet_rate,
        label="denoiser",
        after_step=after_step,
    )
    return pipeline, loss


def assemble(
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
) -> StableDiffusionPipeline:
    """Return the text-to-image pipeline of these parts, without a safety checker."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Write ``pipeline`` in float16 to ``folder``, replacing what it holds; ``pipeline`` itself stays in float32."""
    half = assemble(
        copy.deepcopy(pipeline.vae).half(),
        copy.deepcopy(pipeline.text_encoder).half(),
        pipeline.tokenizer,
        copy.deepcopy(pipeline.unet).half(),
        pipeline.scheduler,
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        fresh = Path(scratch) / folder.name
        half.save_pretrained(fresh, safe_serialization=True)
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)


def load(folder: Path) -> StableDiffusionPipeline:
    """Return the pipeline saved in ``folder``, in float32 and ready to sample."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, low_cpu_mem_usage=False)
    for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        # diffusers' own `to` warns of modules to keep in float32, of which there are none
        nn.Module.to(part, dtype=torch.float32)
        part.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline: StableDiffusionPipeline, per_digit: int, seed: int, steps: int = 50) -> np.ndarray:
    """Return ``per_digit`` images of each digit, prompted at guidance 3: ``[10, per_digit, 32, 32, 3]``, 0..1."""
    prompts = [f"the digit {word}" for word in WORDS for _ in range(per_digit)]
    noise = torch.Generator().manual_seed(seed)
    images: np.ndarray = pipeline(
        prompts, num_inference_steps=steps, guidance_scale=3.0, generator=noise, output_type="np", return_dict=False
    )[0]
    return images.reshape(10, per_digit, IMAGE_SIZE, IMAGE_SIZE, 3)


def recognised(images: np.ndarray) -> float:
    """Return the share of prompted ``images`` (``[10, n, 32, 32, 3]``) in which an SVC finds the digit asked for.

    The classifier learns from the real 8x8 digits alone; the images reach it averaged over 4x4 pixels.
    """
    data = load_digits()
    classifier = SVC(C=10.0, gamma="scale").fit(data.data / 16, data.target)
    pooled = images.mean(axis=-1).reshape(-1, 8, IMAGE_SIZE // 8, 8, IMAGE_SIZE // 8).mean(axis=(2, 4))
    asked = np.repeat(np.arange(10), images.shape[1])
    return float(np.mean(classifier.predict(pooled.reshape(-1, 64)) == asked))


def save_sheet(images: np.ndarray, path: Path) -> None:
    """Write ``images`` (``[10, n, 32, 32, 3]``, 0..1) as one PNG: a row for each digit, doubled in size."""
    rows, columns, height, width, _ = images.shape
    sheet = images.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3)
    picture = Image.fromarray((sheet * 255).round().astype(np.uint8))
    picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST).save(path)


def card(recipe: Recipe, measured: dict[str, str]) -> str:
    """Return the README of the trained pipeline."""
    settings = "\n".join(f"| {name} | {value} |" for name, value in asdict(recipe).items())
    results = "\n".join(f"| {name} | {value} |" for name, value in measured.items())
    return f"""# digits

A `StableDiffusionPipeline` that draws handwritten digits (32x32 pixels, 4x8x8 latents) from captions such as
"the digit seven" or "a handwritten 7". It is small enough to travel with the package and to run on a processor, and
it is what the solvers of this library are tested and measured on. It knows nothing but digits.

Load it with `srds_fast.zoo.load("digits")`, or with `StableDiffusionPipeline.from_pretrained` on this folder. The
weights are stored in float16; run them in float32 or float64.

## Recipe

Written by `python -m srds_fast.zoo.train_digits`, on one processor core:

1. data: the {len(load_digits().images):,} digits of scikit-learn's `load_digits`, upscaled (bicubic) from 8x8 to 32x32,
   each slightly turned, scaled, shifted, and its stroke contrast changed, at random;
2. tokenizer: CLIP byte-pair encoding with one token for each word of the captions;
3. autoencoder: trained on pixel mean square and a small KL term, then its latents standardised;
4. UNet and text encoder: trained jointly to predict the noise (uniform timesteps, scaled-linear betas 0.00085 to
   0.012), captions dropped at random for classifier-free guidance, AdamW with cosine decay, averaged weights kept.

| setting | value |
| --- | --- |
{settings}

## Measured

| what | value |
| --- | --- |
{results}

"Recognised" is the share of 200 samples ("the digit zero" to "the digit nine", 20 each, 50 DDIM steps, guidance 3) in
which a support vector classifier, trained on the real digits alone, finds the digit that the prompt asked for.

## Licence

The weights come under the licence of this package. The data are the UCI "Optical Recognition of Handwritten Digits"
test set (E. Alpaydin and C. Kaynak, 1998, https://doi.org/10.24432/C50P49, CC BY 4.0), as distributed with
scikit-learn (BSD 3-clause).
"""


def parse_arguments() -> argparse.Namespace:
    """Return the command line's settings; those of ``Recipe`` carry its field names."""
    parser = argparse.ArgumentParser(
        description='Train the text-to-image pipeline "digits" on one processor core and save it in float16.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write the pipeline to (it is replaced)")
    parser.add_argument("--sheet", type=Path, help="PNG to write a contact sheet of samples to")
    parser.add_argument("--threads", type=int, default=1, help="processor threads")
    for field in fields(Recipe):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=type(field.default), default=field.default, help="of the recipe")
    return parser.parse_args()


def main() -> None:
    """Train, save, sample from what was saved, and write down what was measured."""
    arguments = parse_arguments()
    recipe = Recipe(**{field.name: getattr(arguments, field.name) for field in fields(Recipe)})
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(recipe.seed)
    started = time.perf_counter()
    images, labels = real_digits()
    vae, vae_loss = train_vae(recipe, images)
    vae_seconds = time.perf_counter() - started
    pipeline, unet_loss = train_unet(recipe, vae, images, labels, lambda preview: save(preview, arguments.out))
    seconds, processor_seconds = time.perf_counter() - started, time.process_time()
    save(pipeline, arguments.out)

    pipeline = load(arguments.out)
    samples = sample(pipeline, per_digit=20, seed=recipe.seed)
    if arguments.sheet:
        save_sheet(samples, arguments.sheet)
    parts = {"autoencoder": pipeline.vae, "text encoder": pipeline.text_encoder, "UNet": pipeline.unet}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    measured = {
        "parameters": f"{sum(counts.values()):,} (" + ", ".join(f"{n} {c:,}" for n, c in counts.items()) + ")",
        "training time": f"{seconds:.0f} s, {vae_seconds:.0f} s of it for the autoencoder",
        "processor time": f"{processor_seconds:.0f} s",
        "final loss, autoencoder": f"{vae_loss:.5f}",
        "final loss, noise prediction": f"{unet_loss:.4f}",
        "latent scaling factor": f"{pipeline.vae.config.scaling_factor}",
        "recognised": f"{recognised(samples):.1%}",
    }
    (arguments.out / "README.md").write_text(card(recipe, measured))
    for name, value in measured.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    main()
