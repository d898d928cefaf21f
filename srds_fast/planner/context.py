"""Where a plan was made for: a measured plan is as good as this is the same."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import nn

from .._version import __version__
from ..errors import PlanMismatch
from ..schedulers.table import NoiseTable


@dataclass(frozen=True)
class Context:
    """What the costs and iterations of a plan depend on.

    Attributes:
        device: its name.
        torch, srds_fast: versions.
        network: hash of the networks' classes, parameters' names and shapes; None where they are not known.
        scheduler: hash of its steps.
    """

    device: str
    torch: str
    srds_fast: str
    network: str | None
    scheduler: str

    def check(self, here: Context) -> None:
        """Raise PlanMismatch naming what differs here; an unknown network differs from none."""
        for field in fields(self):
            then, now = getattr(self, field.name), getattr(here, field.name)
            if then != now and None not in (then, now):
                raise PlanMismatch(
                    f"The plan was made for another {field.name}: {then}, and this is {now}. What it promises was "
                    "measured there. Make a new one with calibrate or plan_for(measure=True), or leave plan out."
                )


def context_of(device: torch.device, noise: NoiseTable, networks: Sequence[nn.Module] = ()) -> Context:
    """The context of calls with these steps and networks on a device."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {threads()}"
    network = "-".join(map(_digest_of, networks)) or None
    return Context(name, torch.__version__, __version__, network, _digest_of_steps(noise))


def threads() -> str:
    """How many threads of the CPU torch uses, in words."""
    number = torch.get_num_threads()
    return f"{number} thread{'' if number == 1 else 's'}"


@lru_cache(maxsize=64)
def _digest_of_steps(noise: NoiseTable) -> str:
    return _digest(repr([noise.timesteps.tolist(), sorted(noise.numbers.items()), noise.clip, noise.clip_epsilon]))


def _digest_of(network: nn.Module) -> str:
    # adapters come and go, dtypes change
    quick = hash(tuple((name, each.dtype) for name, each in network.named_parameters()))
    known = _digests.get(network)
    if known is None or known[0] != quick:
        shapes = [(name, tuple(each.shape), str(each.dtype)) for name, each in network.named_parameters()]
        known = _digests[network] = quick, _digest(repr((type(network).__name__, shapes)))
    return known[1]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


_digests: weakref.WeakKeyDictionary[nn.Module, tuple[int, str]] = weakref.WeakKeyDictionary()
