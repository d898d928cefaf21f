"""torch.compile of a network, which itself is not changed.

Nothing puts process-wide flags of torch back here: torch.compile does so itself, as a test shows.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import nn

from ...errors import InvalidArgument
from .hold import first_sentence, name_of

MODES = ("default", "max-autotune-no-cudagraphs")


def check_torch_compile(mode: str | None) -> None:
    """Check the mode.

    Raises:
        InvalidArgument: it is none of `MODES`.
    """
    if mode not in (None, *MODES):
        raise InvalidArgument(
            f"torch_compile is {mode!r}. A mode of torch.compile is needed that captures no CUDA graphs of its own. "
            f"Pass None or one of {', '.join(map(repr, MODES))}."
        )


class Compiled:
    """A network called through torch.compile, or as it is where it cannot be compiled: without a C++ compiler, say.

    The network is referred to weakly: whoever calls this holds it.

    Attributes:
        failure: why it is called as it is, or None.
    """

    def __init__(self, network: nn.Module, mode: str) -> None:
        self.failure: str | None = None
        self._mode = mode
        self._network = weakref.ref(network)

        # the network is an argument: a closure would keep it alive
        def call(network: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return network(*args, **kwargs)

        # torch counts recompilations and remembers shapes by file, line and name: each network needs its own name
        call.__code__ = call.__code__.replace(co_name=f"call_{name_of(network)}_{next(_numbers)}")
        # torch takes a mode or options, not both; the user may have turned graphs on for all compilations
        options = {**torch._inductor.list_mode_options(mode), "triton.cudagraphs": False}
        self._call = torch.compile(call, options=options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        network: Any = self._network()
        if self.failure is not None:
            return network(*args, **kwargs)
        try:
            return self._call(network, *args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as why:
            said = first_sentence(getattr(why, "inner_exception", why))
        # torch wraps the network's own errors too: then this call raises them, and compilation has not failed
        output = network(*args, **kwargs)
        self.failure = f"torch_compile={self._mode!r} failed on {name_of(network)}: {said}"
        return output


_numbers = itertools.count()
_compiled: weakref.WeakKeyDictionary[nn.Module, dict[str, Compiled]] = weakref.WeakKeyDictionary()


def compiled(network: nn.Module, mode: str) -> Compiled:
    """The compiled version of the network: the same object every time, as captured graphs are valid for it only."""
    by_mode = _compiled.setdefault(network, {})
    return by_mode.get(mode) or by_mode.setdefault(mode, Compiled(network, mode))
