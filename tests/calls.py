"""What tests of pipelines ask of every call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from srds_fast.pipelines.takeover.inferred import Inference


def latents(pipe: Any, seed: int | list[int] = 0, **call: Any) -> torch.Tensor:
    """What a call makes of nine steps and a fresh generator, or one for each of several seeds; latents if it can."""
    seeds = seed if isinstance(seed, list) else [seed]
    generators = [torch.Generator().manual_seed(each) for each in seeds]
    call = {"num_inference_steps": 9, "output_type": "latent", **call}
    return torch.as_tensor(pipe(**call, generator=generators if isinstance(seed, list) else generators[0])[0])


def look(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """A callback that changes nothing."""
    return tensors


def assert_close(found: torch.Tensor, expected: torch.Tensor, relative: float = 1e-5) -> None:
    """Equal but for rounding, relative to the largest value."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert float((found - expected).abs().max()) <= relative * float(expected.abs().max())


def denoiser(pipe: Any) -> Any:
    """The network that the pipeline's loop calls."""
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def drive(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on no call is taken over: the pipelines' own loops make the turns."""
    monkeypatch.setattr(Inference, "found", lambda inference: "this test drives it")


def by_turns(pipe: Any) -> dict[str, Any]:
    """Arguments of a call whose loop makes its own turns: a callback is shown what each step makes anew."""
    pipe._callback_tensor_inputs = [*pipe._callback_tensor_inputs, "noise_pred"]
    return {"callback_on_step_end": lambda *_: {}, "callback_on_step_end_tensor_inputs": ["latents", "noise_pred"]}


@contextmanager
def watched(network: Any, look: Callable[[torch.Tensor], Any] = lambda states: None) -> Iterator[list[torch.Tensor]]:
    """The states that the network is given in the block, one tensor for each call; `look` sees them before it does."""
    seen: list[torch.Tensor] = []

    def before(module: Any, args: Any, kwargs: Any) -> None:
        states = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
        seen.append(states)
        look(states)

    handle = network.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def of_waves(seen: list[torch.Tensor], report: Any, per_wave: int = 1, others: int = 0) -> list[torch.Tensor]:
    """Of all that a network was `watched` to be given, what came after it was compared with turns of the loop.

    per_wave: its calls in a turn. others: those of other networks, such as a ControlNet.
    """
    return seen[report.check_calls * per_wave // (per_wave + others) :]


def instances(monkeypatch: pytest.MonkeyPatch, cls: type, keep: Callable[[Any], Any] = lambda made: made) -> list[Any]:
    """The objects of a class that are made from here on, or what `keep` makes of them."""
    made: list[Any] = []
    begin = cls.__init__

    def watched(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **kwargs)
        made.append(keep(self))

    monkeypatch.setattr(cls, "__init__", watched)
    return made


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
