"""The same promises on a CUDA device."""

from __future__ import annotations

import pytest
import tiny
import torch
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
        found = srds_fast.compile(pipe, **settings)(**call, generator=torch.Generator("cuda").manual_seed(0)).images
        assert found.is_cuda
        assert float((found - expected).abs().max()) <= relative * float(expected.abs().max())
