"""What tests of pipelines ask of every call."""

from __future__ import annotations

from typing import Any

import torch


def latents(pipe: Any, seed: int | list[int] = 0, **call: Any) -> torch.Tensor:
    """What a call makes of nine steps and a fresh generator, or one for each of several seeds; latents if it can."""
    seeds = seed if isinstance(seed, list) else [seed]
    generators = [torch.Generator().manual_seed(each) for each in seeds]
    call = {"num_inference_steps": 9, "output_type": "latent", **call}
    return torch.as_tensor(pipe(**call, generator=generators if isinstance(seed, list) else generators[0])[0])


def assert_close(found: torch.Tensor, expected: torch.Tensor, relative: float = 1e-5) -> None:
    """Equal but for rounding, relative to the largest value."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert float((found - expected).abs().max()) <= relative * float(expected.abs().max())


def everything(pipe: Any) -> dict[str, Any]:
    """What a call must not touch: components by identity, weights by version, hooks, scheduler state."""
    network = pipe.unet
    return {
        "parts": {name: id(part) for name, part in pipe.components.items()},
        "weights": [(id(each), each._version) for each in network.parameters()],
        "hooks": [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in network.modules()],
        "forwards": ["forward" in vars(module) for module in network.modules()],
        "scheduler": {name: str(value) for name, value in vars(pipe.scheduler).items()},
        "config": str(pipe.config),
        "keys": set(vars(pipe)),
    }
