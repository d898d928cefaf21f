"""Where a plan was measured: it is valid where all of this is the same."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import nn

from .._version import __version__
from ..caches import cached
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
    parameters = [[(name, tuple(p.shape), str(p.dtype)) for name, p in each.named_parameters()] for each in networks]
    digests = [_digest((type(each).__name__, of)) for each, of in zip(networks, parameters, strict=True)]
    call = None if conditions is None else _digest(conditions)
    return Context(name, torch.__version__, __version__, "-".join(digests) or None, _digest_of_steps(noise), call)


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
