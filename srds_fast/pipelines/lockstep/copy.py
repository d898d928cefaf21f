"""The shallow copy of a pipe that one call runs on."""

from __future__ import annotations

import functools
from typing import Any

from ..loop import Loop
from ..networks import network_family
from .inpaint import Inpainting
from .loop import LockstepLoop
from .proxies import NetworkProxy, progress_proxy


def copy_with_proxies(pipe: Any, cls: Any, loop: Loop, lockstep: LockstepLoop, parts: dict[str, Any]) -> Any:
    """A shallow copy of the pipe, of class `cls`, with proxies for its scheduler and its networks.

    Args:
        pipe: the user's pipeline; not changed.
        cls: the pipeline's own class.
        loop: description of its loop.
        lockstep: the loop that the proxies report to.
        parts: components that replace those of the pipe.
    """
    twin = object.__new__(cls)
    networks = {}
    for name in loop.networks:
        network = getattr(pipe, name)
        family = network_family(network)
        assert family is not None, "compile() checks the family of every network"
        networks[name] = NetworkProxy(network, family, lockstep)
    twin.__dict__.update(
        {
            **pipe.__dict__,
            **parts,
            **networks,
            "scheduler": lockstep.scheduler,
            "progress_bar": functools.partial(progress_proxy, functools.partial(cls.progress_bar, twin), lockstep),
            # offloading hooks belong to the networks, not to their proxies
            "maybe_free_model_hooks": functools.partial(cls.maybe_free_model_hooks, pipe),
        }
    )
    if loop.blends:
        lockstep.inpainting = Inpainting(twin)
    return twin
