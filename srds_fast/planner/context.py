"""Where a plan was measured: it is valid where all of this is the same."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from .._version import __version__
from ..caches import Cache, cached, of_process
from ..errors import PlanMismatch
from ..schedulers.table import NoiseTable
from ..words import counted

KIND_OF_CALL = "another guidance, batch, or shape of the conditioning than those of this call"


@dataclass(frozen=True)
class Context:
    """What the costs and iterations of a plan depend on."""

    device: str  # its name
    torch: str  # version
    srds_fast: str  # version
    network: str | None  # hash of the networks' classes, parameters' names and shapes; None where they are not known
    scheduler: str  # hash of its steps
    call: str | None = None  # hash of guidance, batch and conditioning, on which the iterations of a calibration depend

    def check(self, here: Context) -> None:
        """Raise PlanMismatch naming what differs here; an unknown network differs from none."""
        for field in fields(self):
            then, now = getattr(self, field.name), getattr(here, field.name)
            if then != now and None not in (then, now):
                what = f"made for another {field.name}: {then}, and this is {now}. Its prediction was"
                if field.name == "call":
                    what = f"calibrated for {KIND_OF_CALL}. Its number of iterations was"
                raise PlanMismatch(
                    f"The plan was {what} measured there. Make a new one with calibrate or plan_for(measure=True), or "
                    "leave plan out."
                )


def context_of(
    device: torch.device, noise: NoiseTable, networks: Sequence[nn.Module] = (), conditions: object = None
) -> Context:
    """The context of calls with these steps and networks on a device.

    conditions: see `srds_fast.sampling.network.Network`, with the shape of the state; None: they do not count.
    """
    threads = torch.get_num_threads()
    name = f"{device.type}, {counted(threads, 'thread')}"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    digests = map(_digest_of_network, networks)
    call = None if conditions is None else _digest(conditions)
    return Context(name, torch.__version__, __version__, "-".join(digests) or None, _digest_of_steps(noise), call)


_digests: Cache[tuple[list[Any], str]] = of_process("digests of networks")


def _digest_of_network(network: nn.Module) -> str:
    """Of its class, and of the names, shapes and dtypes of its parameters."""
    # every call asks, and to name the parameters takes as long as a step of a small network
    held, key = _held_by(network), weakref.ref(network)
    known = _digests.get(key)
    if known is None or known[0] != held:
        named = [(name, tuple(each.shape), str(each.dtype)) for name, each in network.named_parameters()]
        known = _digests[key] = held, _digest((type(network).__name__, named))
    return known[1]


def _held_by(network: nn.Module) -> list[Any]:
    """What the digest is made of, without putting the names together."""
    found: list[Any] = []
    left: list[nn.Module | None] = [network]
    while left:
        if (module := left.pop()) is not None:
            parameters, modules = module.__dict__["_parameters"], module.__dict__["_modules"]
            found += (*parameters, *modules)
            found += [(id(each), each.shape, each.dtype) for each in parameters.values() if each is not None]
            left += modules.values()
    return found


@cached
def _digest_of_steps(noise: NoiseTable) -> str:
    found = [noise.timesteps.tolist(), sorted(noise.numbers.items()), noise.clip, noise.clip_epsilon]
    if noise.learned is not None:
        found += [noise.learned.low.tolist(), noise.learned.high.tolist(), noise.learned.clip]
    if noise.triangles is not None:
        found += [each.tolist() for each in (noise.triangles.of_x, noise.triangles.of_m, noise.triangles.of_z)]
    return _digest(found)


def _digest(found: object) -> str:
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]
