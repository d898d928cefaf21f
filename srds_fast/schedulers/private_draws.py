"""Random numbers from generators of our own, where code of others would draw from torch's global ones.

What runs beside a user's calls (a warm-up, a rehearsal, a stock loop that is timed) must leave the global generators
alone. To put their state back afterwards would take back what other threads have drawn in the meantime.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional

# Torch has no public way to ask which modes a thread is in, or to put one below others: `with` enters a mode on top,
# and whatever is on top is left. A user's code may enter modes in our context and leave them after it, so their order
# has to be changed. `DeviceContext` is what `torch.set_default_device` enters: no mode may come below it.
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._device import DeviceContext, _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode

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


def _always(args: Any, kwargs: Any) -> bool:
    return True


def _asked(name: str, place: int) -> Callable[[Any, Any], bool]:
    """Whether this argument, at this place, is not zero; one that is left out counts as such."""
    return lambda args, kwargs: bool(args[place] if len(args) > place else kwargs.get(name, True))


# they draw inside of them and take no generator; when they do
_INSIDE: dict[Any, Callable[[Any, Any], bool]] = {
    **dict.fromkeys(
        (
            functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d,
            functional.alpha_dropout, functional.feature_alpha_dropout,
        ),
        _asked("training", 2),
    ),
    **dict.fromkeys(
        (
            torch.dropout, torch.dropout_, torch.feature_dropout, torch.feature_dropout_, torch.alpha_dropout,
            torch.alpha_dropout_, torch.feature_alpha_dropout, torch.feature_alpha_dropout_, torch.native_dropout,
        ),
        _asked("train", 2),
    ),
    functional.scaled_dot_product_attention: lambda args, kwargs: bool(
        args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)
    ),
    functional.multi_head_attention_forward: _asked("training", 14),
    functional.rrelu: _asked("training", 3),
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu, functional.gumbel_softmax), _always),
}  # fmt: skip


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
        if (draws := _INSIDE.get(func)) is not None and draws(args, kwargs):
            with _Below(self):
                return func(*args, **kwargs)
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

    @contextmanager
    def resumed(self) -> Iterator[None]:
        """A block within one of `paused`, in which functions are called as with this mode."""
        self._push()
        try:
            yield
        finally:
            _push_all(_without(self))

    def __enter__(self) -> Self:
        self._entered += 1
        self._push()
        return self

    def __exit__(self, *error: object) -> None:
        self._entered -= 1
        if not self._entered:
            _push_all(_without(self))

    def _push(self) -> None:
        """Come below modes of others, so that these can be left before this one; the default device stays below all.

        Of these contexts the one entered last comes first: what draws in it uses its generators.
        """
        modes = _without(self)
        below = [number for number, each in enumerate(modes, start=1) if isinstance(each, PrivateDraws)]
        at = max(below, default=int(bool(modes) and isinstance(modes[0], DeviceContext)))
        _push_all([*modes[:at], self, *modes[at:]])


@contextmanager
def paused(*modes: PrivateDraws | None) -> Iterator[None]:
    """In the block, functions are called as without these; the one that was entered last comes first."""
    with ExitStack() as stack:
        for mode in modes:
            if mode is not None:
                stack.enter_context(mode.paused())
        yield


class Seeded(PrivateDraws):
    """The same draws by every such context, whatever others it is in; tensors for which no device is named are on the
    CPU.

    The steps of schedulers run in it by the thousand: two modes for the two would take twice the time.

    placed: number of such tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.placed = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _device_constructors() and (kwargs is None or kwargs.get("device") is None):
            self.placed += 1
            kwargs = {**(kwargs or {}), "device": "cpu"}
        return super().__torch_function__(func, types, args, kwargs)

    def of(self, device: torch.device) -> torch.Generator:
        device = indexed(device)
        if device not in self._copies:
            self._copies[device] = torch.Generator(device).manual_seed(0)
        return self._copies[device]

    def _push(self) -> None:
        _push_all([*_without(self), self])


class _Below(TorchDispatchMode):
    """What functions of `_INSIDE` call: operators that take a generator. Fused attention on a GPU calls none."""

    def __init__(self, draws: PrivateDraws) -> None:
        super().__init__()
        self._draws = draws

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.native_dropout.default:
            return self._dropout(*args)
        takes = any(argument.name == "generator" for argument in func._schema.arguments)
        if takes and kwargs.get("generator") is None and (device := _device(args, kwargs)).type != "meta":
            self._draws.drawn += 1
            kwargs = {**kwargs, "generator": self._draws.of(device)}
        return func(*args, **kwargs)

    def _dropout(self, x: Tensor, share: float, train: bool | None) -> tuple[Tensor, Tensor]:
        keep = torch.ones_like(x)
        if train is not False:
            self._draws.drawn += 1
            keep = keep.bernoulli_(1 - share, generator=self._draws.of(x.device))
            x = x * keep / (1 - share if share < 1 else 1.0)
        return x.clone(), keep.bool()


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
