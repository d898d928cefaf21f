"""torch.compile of a network; the network itself is not changed.

No code here restores process-wide flags of torch: torch.compile restores them itself, and a test checks that.
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
        InvalidArgument: it is not in `MODES`.
    """
    if mode not in (None, *MODES):
        raise InvalidArgument(
            f"torch_compile is {mode!r}. The mode of torch.compile must not capture CUDA graphs itself. "
            f"Pass None or one of {', '.join(map(repr, MODES))}."
        )


class Compiled:
    """A network called through torch.compile; called directly if compilation fails (for example: no C++ compiler).

    It holds only a weak reference: the caller keeps the network alive.

    Attributes:
        failure: why the network is called directly, or None.
    """

    def __init__(self, network: nn.Module, mode: str) -> None:
        self.failure: str | None = None
        self._mode = mode
        self._network = weakref.ref(network)

        # the network is an argument, because a closure would keep it alive
        def call(network: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return network(*args, **kwargs)

        # torch counts recompilations and caches shapes by file, line and name: each network needs its own name
        call.__code__ = call.__code__.replace(co_name=f"call_{name_of(network)}_{next(_numbers)}")
        # torch accepts a mode or options, not both; the user may have enabled graphs for all compilations
        options = {**torch._inductor.list_mode_options(mode), "triton.cudagraphs": False}
        self._call = torch.compile(call, options=options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        network: Any = self._network()
        if self.failure is not None:
            return network(*args, **kwargs)
        try:
            return self._call(network, *args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as why:
            reason = first_sentence(getattr(why, "inner_exception", why))
        # torch also wraps errors of the network itself; this call raises such an error, and no failure is recorded
        output = network(*args, **kwargs)
        self.failure = f"torch_compile={self._mode!r} failed on {name_of(network)}: {reason}"
        return output


_numbers = itertools.count()
_compiled: weakref.WeakKeyDictionary[nn.Module, dict[str, Compiled]] = weakref.WeakKeyDictionary()


def compiled(network: nn.Module, mode: str) -> Compiled:
    """The compiled version of the network. Always the same object: captured graphs are valid for one object only."""
    by_mode = _compiled.setdefault(network, {})
    return by_mode.get(mode) or by_mode.setdefault(mode, Compiled(network, mode))
