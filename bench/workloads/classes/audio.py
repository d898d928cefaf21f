"""Sound: AudioLDM 2, MusicLDM and Stable Audio."""

from __future__ import annotations

from typing import Any

import diffusers
from transformers import (
    ClapTextConfig,
    ClapTextModelWithProjection,
    GPT2Config,
    GPT2Model,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
)

from .case import Case
from .parts import BLOCKS, SD_BETAS, SD_NOISE, SMALL_UNET, TEXT, guided, heard, numbers, ones, t5, t5_tokenizer


def music_ldm() -> dict[str, Any]:
    """The text is the class label of every step."""
    network = diffusers.UNet2DConditionModel(
        **{**SMALL_UNET, **BLOCKS, "cross_attention_dim": (8, 16)},
        norm_num_groups=4,
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=32,
        class_embeddings_concat=True,
    )
    sizes = {"hidden_size": 32, "projection_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text_encoder = ClapTextModelWithProjection(ClapTextConfig(**sizes, intermediate_size=37, vocab_size=99))
    return {"unet": heard(network), "text_encoder": text_encoder, **_spectrograms()}


def audio_ldm_2() -> dict[str, Any]:
    """Two sequences of text: each block attends to itself and to both of them."""
    network = diffusers.AudioLDM2UNet2DConditionModel(
        **{**SMALL_UNET, **BLOCKS, "cross_attention_dim": ((None, 8, 16),) * 2}, norm_num_groups=4
    )
    language_model = GPT2Model(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=99, n_positions=32))
    return {"unet": heard(network), "text_encoder_2": t5(16), "language_model": language_model, **_spectrograms()}


def _spectrograms() -> dict[str, Any]:
    autoencoder = diffusers.AutoencoderKL(
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )
    vocoder = SpeechT5HifiGanConfig(
        model_in_dim=8,
        sampling_rate=16000,
        upsample_initial_channel=16,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3, 7],
        resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
        normalize_before=False,
    )
    scheduler = diffusers.DDIMScheduler(**SD_NOISE)
    return {"vae": autoencoder, "vocoder": SpeechT5HifiGan(vocoder), "scheduler": scheduler}


def stable_audio() -> dict[str, Any]:
    network = diffusers.StableAudioDiTModel(
        sample_size=4,
        in_channels=3,
        num_layers=2,
        attention_head_dim=4,
        num_key_value_attention_heads=2,
        out_channels=3,
        cross_attention_dim=4,
        time_proj_dim=8,
        global_states_input_dim=8,
        cross_attention_input_dim=4,
    )
    autoencoder = diffusers.AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=3,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    tokenizer = t5_tokenizer()
    tokenizer.model_max_length = 25
    projection = diffusers.StableAudioProjectionModel(
        text_encoder_dim=32, conditioning_dim=4, min_value=0, max_value=32
    )
    # its own, CosineDPMSolverMultistepScheduler, draws its noise by a package of its own
    scheduler = diffusers.EulerDiscreteScheduler(**SD_BETAS, prediction_type="v_prediction")
    parts = {"text_encoder": t5(), "tokenizer": tokenizer, "projection_model": projection}
    return {"transformer": heard(network), "vae": autoencoder, "scheduler": scheduler, **parts}


_SECONDS = {"audio_length_in_s": 0.032}
_LABEL = {"prompt_embeds": numbers(1, 32), "negative_prompt_embeds": numbers(1, 32, seed=2), "output_type": "latent"}
_AUDIO_LDM_2 = {
    **guided(3.5, 16),
    "generated_prompt_embeds": numbers(1, 8, 8),
    "negative_generated_prompt_embeds": numbers(1, 8, 8, seed=2),
    "attention_mask": ones(1, 16),
    "negative_attention_mask": ones(1, 16),
    **_SECONDS,
}

CASES = [
    Case("MusicLDMPipeline", music_ldm, {**_LABEL, **_SECONDS}),
    Case("AudioLDM2Pipeline", audio_ldm_2, _AUDIO_LDM_2),
    Case("StableAudioPipeline", stable_audio, {**TEXT, "negative_prompt": "noise", "guidance_scale": 6.0}),
]
