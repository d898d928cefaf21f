"""Random numbers from generators of our own, where code of others would draw from torch's global ones.

What runs beside a user's calls (a warm-up, a rehearsal, a stock loop that is timed) must leave the global generators
alone. To put their state back afterwards would take back what other threads have drawn in the meantime.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._device import DeviceContext

# they take a generator by keyword
_DRAWS = {
    torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal, torch.bernoulli, torch.multinomial,
    torch.poisson, Tensor.bernoulli, Tensor.multinomial, Tensor.normal_, Tensor.uniform_, Tensor.bernoulli_,
    Tensor.exponential_, Tensor.random_, Tensor.cauchy_, Tensor.geometric_, Tensor.log_normal_,
}  # fmt: skip
# they fill a tensor like their argument; not all versions of torch let them take a generator
_LIKE: dict[Any, Callable[..., Tensor]] = {
    torch.randn_like: Tensor.normal_,
    torch.rand_like: Tensor.uniform_,
    torch.randint_like: Tensor.random_,
}


def global_generator(device: torch.device) -> torch.Generator | None:
    """The generator that functions draw from on a device if they are given none; None: of this kind it is not known."""
    if device.type == "cpu":
        return torch.default_generator
    if device.type == "cuda":
        torch.cuda.init()
        return torch.cuda.default_generators[indexed(device).index or 0]
    return None


def indexed(device: torch.device) -> torch.device:
    """A device as tensors tell it: "cuda" is the current one."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


class PrivateDraws(TorchFunctionMode):
    """In this thread, draws that name no generator are made from copies of the global ones, made at the first draw.

    A context that may be entered again within itself. Other modes may be entered and left meanwhile.

    states: by device, the states that copies begin with. drawn: number of such draws.
    """

    def __init__(self, states: Mapping[torch.device, Tensor] | None = None) -> None:
        super().__init__()
        self.drawn = self._entered = 0
        self._states = {indexed(device): state for device, state in (states or {}).items()}
        self._copies: dict[torch.device, torch.Generator] = {}

    def of(self, device: torch.device) -> torch.Generator:
        """The generator for draws on a device."""
        device = indexed(device)
        if device not in self._copies:
            shared, state = global_generator(device), self._states.get(device)
            self._copies[device] = torch.Generator(device) if shared is None else shared.clone_state()
            if state is not None:
                self._copies[device].set_state(state)
        return self._copies[device]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _LIKE:
            return self._like(func, args, kwargs)
        if func in _DRAWS and kwargs.get("generator") is None and (device := _device(args, kwargs)).type != "meta":
            self.drawn += 1
            kwargs = {**kwargs, "generator": self.of(device)}
        return func(*args, **kwargs)

    def _like(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        like, *bounds = args
        bounds += [kwargs.pop(name) for name in ("low", "high") if name in (kwargs := dict(kwargs))]
        generator = kwargs.pop("generator", None)
        found = torch.empty_like(like, **kwargs)
        if found.is_meta:
            return found
        if func is torch.randint_like and len(bounds) == 1:
            bounds = [0, *bounds]
        if generator is None:
            self.drawn += 1
            generator = self.of(found.device)
        return _LIKE[func](found, *bounds, generator=generator)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """In the block, functions are called as without this mode: what is timed or compiled must not see it."""
        _push_all(_without(self))
        try:
            yield
        finally:
            if self._entered:
                self._push()

    def __enter__(self) -> Self:
        self._entered += 1
        self._push()
        return self

    def __exit__(self, *error: object) -> None:
        self._entered -= 1
        _push_all(_without(self))

    def _push(self) -> None:
        """Come below other modes, so that these can be left before this one; the default device stays below all."""
        modes = _without(self)
        at = int(bool(modes) and isinstance(modes[0], DeviceContext))
        _push_all([*modes[:at], self, *modes[at:]])


class Seeded(PrivateDraws):
    """The same draws each time that such a context is entered, also inside others of these contexts."""

    def of(self, device: torch.device) -> torch.Generator:
        if device not in self._copies:
            self._copies[device] = torch.Generator(device).manual_seed(0)
        return self._copies[device]

    def _push(self) -> None:
        _push_all([*_without(self), self])


class Replayed(PrivateDraws):
    """For code that runs again: it draws the numbers of before again, and then goes on with the global generators.

    states: by device, of the global generators as that code first began. Where another thread has drawn since, the
    global generators stay where they are, and what it has drawn is not taken back.
    """

    def __init__(self, states: Mapping[torch.device, Tensor]) -> None:
        super().__init__(states)
        shared = {device: global_generator(device) for device in self._states}
        self._reached = {device: each.get_state() for device, each in shared.items() if each is not None}

    def of(self, device: torch.device) -> torch.Generator:
        device = indexed(device)
        generator = super().of(device)
        reached, shared = self._reached.get(device), global_generator(device)
        if reached is not None and shared is not None and torch.equal(generator.get_state(), reached):
            self._copies[device] = generator = shared
            del self._reached[device]
        return generator


def _push_all(modes: Iterable[TorchFunctionMode]) -> None:
    for mode in modes:
        _push_mode(mode)


def _without(mode: TorchFunctionMode) -> list[Any]:
    """Take all modes of this thread off their stack; returns them from the bottom up, but for one."""
    found = [_pop_mode() for _ in _get_current_function_mode_stack()]
    return [each for each in reversed(found) if each is not mode]


def _device(args: Any, kwargs: Any) -> torch.device:
    """Where a function draws."""
    if kwargs.get("device") is not None:
        return torch.empty(0, device=kwargs["device"]).device
    tensors = [each for each in (*args, kwargs.get("out")) if isinstance(each, Tensor)]
    return tensors[0].device if tensors else torch.empty(0).device
