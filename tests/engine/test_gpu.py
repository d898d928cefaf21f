"""The same promises on a CUDA device."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
from diffusers import EulerAncestralDiscreteScheduler
from problems import GaussianMixture, noise, scheduler

import srds_fast

pytestmark = pytest.mark.gpu


def test_sample_stays_on_the_device_and_is_exact() -> None:
    mixture = GaussianMixture.random()

    def denoiser(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert x.is_cuda
        assert t.is_cuda
        return mixture(x.cpu(), t.cpu()).cuda()  # the closed form reads its noise levels from a table on the CPU

    x = noise(3, 64).cuda()
    expected = srds_fast.sample(denoiser, x, scheduler(), 30, method="sequential").sample
    found = srds_fast.sample(denoiser, x, scheduler(), 30, exact=True).sample
    assert found.is_cuda
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 1e-3), (torch.float16, 3e-2)])
def test_a_compiled_pipeline_equals_stock(dtype: torch.dtype, relative: float) -> None:
    """float32 convolutions may run in TF32, so the bound is looser than on the CPU."""
    pipe = tiny.stable_diffusion().to("cuda", dtype)
    call = {"prompt": ["a", "b"], "num_inference_steps": 12, "output_type": "latent"}
    expected = pipe(**call, generator=torch.Generator("cuda").manual_seed(0)).images
    for settings in ({"method": "sequential"}, {"exact": True}):
        found = srds_fast.compile(pipe, **{"method": "srds", **settings})(
            **call, generator=torch.Generator("cuda").manual_seed(0)
        ).images
        assert found.is_cuda
        assert float((found - expected).abs().max()) <= relative * float(expected.abs().max())


@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_every_pipeline_equals_stock(name: str) -> None:
    build, call = tiny.PIPELINES[name]
    pipe = build().to("cuda")
    results = []
    for each in (
        pipe,
        srds_fast.compile(pipe, method="sequential"),
        srds_fast.compile(pipe, exact=True, method="srds"),
    ):
        torch.manual_seed(7)
        output = each(**call, num_inference_steps=9, generator=torch.Generator("cuda").manual_seed(0))
        results.append(torch.as_tensor(output[0]).float().cpu())
    for found in results[1:]:
        assert float((found - results[0]).abs().max()) <= 1e-2 * float(results[0].abs().max())


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_noise_is_drawn_as_stock_draws_it_whatever_the_device_of_the_generator(device: str) -> None:
    pipe = tiny.stable_diffusion(EulerAncestralDiscreteScheduler(**tiny.SD_BETAS, steps_offset=1)).to("cuda")
    call = {"prompt": "a cat", "num_inference_steps": 9, "output_type": "latent"}
    states, images = [], []
    for each in (pipe, srds_fast.compile(pipe, exact=True, method="srds")):
        generator = torch.Generator(device).manual_seed(0)
        images.append(each(**call, generator=generator).images)
        states.append(generator.get_state())
    assert torch.equal(*states)
    assert float((images[1] - images[0]).abs().max()) <= 1e-2 * float(images[0].abs().max())


def test_threads_on_one_device() -> None:
    """What each gets is what it would get alone."""
    pipe = tiny.stable_diffusion().to("cuda")
    fast = srds_fast.compile(pipe, exact=True, method="srds")

    def job(seed: int) -> torch.Tensor:
        generator = torch.Generator("cuda").manual_seed(seed)
        return fast("a cat", num_inference_steps=9, output_type="latent", generator=generator).images

    alone = [job(seed) for seed in range(3)]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(job, range(3)))
    for found, expected in zip(together, alone, strict=True):
        assert float((found - expected).abs().max()) <= 1e-3 * float(expected.abs().max())


@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl", "flux", "pixart", "ddpm"])
def test_kernels_and_their_references_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And two runs through the kernels the same bits."""
    build, call = tiny.PIPELINES[name]
    fast = srds_fast.compile(build().to("cuda"), exact=True, method="srds")
    found = []
    for implementation in ("triton", "triton", "torch"):
        if implementation == "torch":
            monkeypatch.setenv("SRDS_FAST_KERNELS", "torch")
        output = fast(**call, num_inference_steps=9, generator=torch.Generator("cuda").manual_seed(0))
        assert fast.report.kernels == implementation
        found.append(torch.as_tensor(output[0]).float().cpu())
    assert torch.equal(found[0], found[1])
    assert float((found[2] - found[0]).abs().max()) <= 1e-3 * float(found[2].abs().max())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_another_device_than_the_current_one() -> None:
    """Triton launches on the current device, whatever the tensors' is."""
    pipe = tiny.stable_diffusion().to("cuda:1")
    call = {"prompt": "a cat", "num_inference_steps": 9, "output_type": "latent"}
    expected = pipe(**call, generator=torch.Generator("cuda:1").manual_seed(0)).images
    fast = srds_fast.compile(pipe, exact=True, method="srds")
    found = fast(**call, generator=torch.Generator("cuda:1").manual_seed(0)).images
    assert fast.report.kernels == "triton"
    assert found.device == expected.device
    assert float((found - expected).abs().max()) <= 1e-3 * float(expected.abs().max())
