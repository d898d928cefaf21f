"""Reads the step of any linear scheduler by asking it, without knowing its class.

A loop over a scheduler's timesteps takes one turn per timestep: turn i has a sample x_i and the network's output m_i,
may draw standard normal noise z, and returns x_{i+1}. If all that the scheduler does to them is linear, then

    x_{i+1} = sum_{j <= i} of_x[i, j] * x_j + of_m[i, j] * m_j + sum_k of_z[i, k] * z_k

These numbers come out when the samples, the outputs and the draws are unit vectors. Predictors, correctors, histories
of any length and repeated timesteps are all in them.

A scheduler that clips, or that adds something of its own, is not linear. It is found in two ways: the same numbers must
come out of a very small and of a very large probe, and the scheduler's own loop on random vectors must be reproduced.

The loop runs on a deep copy. Draws are intercepted, so no random state moves. Vectors stay in float64, also where the
scheduler converts them to float32; its own coefficients keep the precision that it gives them.

Cost: two loops of T turns, one of them on vectors of 4 T + 2 * (number of draws) entries: on one CPU core 0.15 to
0.3 seconds for N = 200 and 0.8 to 1.7 for N = 1000, for UniPC, whose own steps are slow, 1 and 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..caches import Cache, of_process
from ..errors import UnsupportedScheduler
from .own_loop import OwnLoop, StepCall
from .refusal import refused

# powers of two: scaling by them is exact, so a linear scheduler returns the same bits
SMALL, LARGE = 2.0**-20, 2.0**20
# so small that no x0 reaches a bound, though steps divide by an alpha of 1e-5
TINY = 2.0**-60
# of the check on random vectors, relative to the largest entry of the loop; what remains is rounding in float64
TOLERANCE = 1e-10
_OTHER_DRAWS = {
    torch.rand, torch.rand_like, torch.randint, torch.randint_like, torch.randperm, torch.normal, torch.bernoulli,
    torch.multinomial, torch.poisson, Tensor.normal_, Tensor.uniform_, Tensor.bernoulli_, Tensor.exponential_,
    Tensor.random_,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Triangles:
    """The step of a linear scheduler in all T turns of its loop. All tensors are float64 on the CPU.

    Attributes:
        of_x, of_m: [T, T], lower triangles. Row i gives x_{i+1}.
        of_z: [T, draws], the weights of the draws in the order in which they are made.
        draw_turns: the turn that makes each draw.
        by_generator: all draws are made with the generator that the step is given.
        input_scale: [T], the network's input in a turn is input_scale * x.
        x0_of_x, x0_of_m: [T], the clean sample that the step itself reports is x0_of_x[i] * x_i + x0_of_m[i] * m_i;
            NaN where it reports none, or one that depends on other turns.
    """

    of_x: Tensor
    of_m: Tensor
    of_z: Tensor
    draw_turns: tuple[int, ...]
    by_generator: bool
    input_scale: Tensor
    x0_of_x: Tensor
    x0_of_m: Tensor

    @property
    def turns(self) -> int:
        return len(self.of_x)

    def part(self, start: int, stop: int) -> Triangles:
        """Turns start .. stop - 1, without what they take of those before."""
        draws = [number for number, turn in enumerate(self.draw_turns) if start <= turn < stop]
        return replace(
            self,
            of_x=self.of_x[start:stop, start:stop],
            of_m=self.of_m[start:stop, start:stop],
            of_z=self.of_z[start:stop, draws],
            draw_turns=tuple(self.draw_turns[number] - start for number in draws),
            input_scale=self.input_scale[start:stop],
            x0_of_x=self.x0_of_x[start:stop],
            x0_of_m=self.x0_of_m[start:stop],
        )

    @property
    def draws_once(self) -> bool:
        """Each turn draws at most once, with the generator that its step is given."""
        return not self.draw_turns or (self.by_generator and len(set(self.draw_turns)) == len(self.draw_turns))

    def with_one_draw(self) -> Triangles:
        """The same steps, where all noise that a turn adds is one draw, the weight of which is the size of it."""
        if self.draws_once:
            return self
        sizes = self.of_z.norm(dim=1)
        turns = sorted({*self.draw_turns, *(turn for turn, size in enumerate(sizes.tolist()) if size > 0)})
        return replace(self, of_z=sizes.diag()[:, turns], draw_turns=tuple(turns))

    def own_noise(self) -> tuple[Tensor, Tensor]:
        """Which turns draw noise, [T] bool, and how much of its own draw each adds at once, [T]."""
        draws, spread = (
            torch.zeros(self.turns, dtype=torch.bool, device="cpu"),
            torch.zeros(self.turns, dtype=torch.float64, device="cpu"),
        )
        for number, turn in enumerate(self.draw_turns):
            draws[turn], spread[turn] = True, self.of_z[turn, number]
        return draws, spread

    def walk(self, x: Tensor, outputs: Tensor, draws: Tensor | None = None) -> Tensor:
        """All samples [T + 1, ...] from the first one, [...], the outputs [T, ...] and the draws [draws, ...]."""
        samples = x.new_zeros(self.turns + 1, x.numel())
        samples[0] = x.flatten()
        added = self.of_m @ outputs.flatten(1)
        if draws is not None:
            added += self.of_z @ draws.flatten(1)
        for turn in range(self.turns):
            samples[turn + 1] = self.of_x[turn, : turn + 1] @ samples[: turn + 1] + added[turn]
        found: Tensor = samples.unflatten(1, x.shape)
        return found


def read(scheduler: Any, call: StepCall | None = None, start: int = 0, *, near_zero: bool = False) -> Triangles:
    """Read the step of a scheduler whose `set_timesteps` has run. The scheduler is not changed.

    What was read is cached by everything that it depends on.
    call: how a loop calls the step; None: as `StepCall.of` finds. start: the loop begins at this timestep, as those of
    img2img do. near_zero: only what it does to small numbers has to be linear, as of one that clips.
    Raises UnsupportedScheduler, with the reason in plain words, if it is not linear or cannot be called as others are.
    """
    key = state_key(scheduler), call, start, near_zero
    found = _read.get(key)
    if found is None:
        found = _read_now(scheduler, StepCall.of(scheduler) if call is None else call, start, near_zero)
        _read[key] = found
    return found


# three lower triangles of 1000 turns are 24 MB
MAX_READ = 8
_read: Cache[Triangles] = of_process("steps that were read", MAX_READ)


def state_key(scheduler: Any) -> Hashable:
    """Everything that a scheduler's steps depend on: class and methods, and by value config, arrays, numbers.

    Also torch's default dtype, which a step may make tensors in. Raises UnsupportedScheduler if an array holds nothing.
    """
    if any(isinstance(value, Tensor) and value.is_meta for value in vars(scheduler).values()):
        raise refused(scheduler, "it has tensors on the meta device, which hold no numbers")
    methods = methods_of(scheduler)
    state = sorted((name, value) for name, value in vars(scheduler).items() if value is not scheduler.config)
    values = [(name, _by_value(value)) for name, value in state]
    config = repr(sorted(scheduler.config.items()))
    return type(scheduler), tuple(methods), config, tuple(values), torch.get_default_dtype()


def _by_value(value: Any) -> Hashable:
    if isinstance(value, dict):
        return tuple((name, _by_value(each)) for name, each in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_by_value, value))
    if isinstance(value, Tensor):  # numpy has no bfloat16
        numbers = (value.float() if value.dtype == torch.bfloat16 else value).cpu().numpy()
        return str(value.dtype), numbers.shape, numbers.tobytes()
    if hasattr(value, "tobytes"):
        return str(value.dtype), value.shape, value.tobytes()
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    return value if callable(value) else str(type(value))


def methods_of(scheduler: Any) -> list[FunctionType]:
    """The functions of its class and of those that this is a subclass of."""
    return [each for cls in type(scheduler).__mro__ for each in vars(cls).values() if isinstance(each, FunctionType)]


def replaced_methods(scheduler: Any) -> list[str]:
    """The methods of its class that were replaced on the object. A copy has the same function, made for the object."""
    cls = type(scheduler)
    return [name for name, value in vars(scheduler).items() if callable(value) and callable(getattr(cls, name, None))]


def _read_now(scheduler: Any, call: StepCall, start: int, near_zero: bool) -> Triangles:
    turns = len(scheduler.timesteps) - start
    # large numbers beside the small ones would raise the threshold of all
    small, large, scale = (TINY, 0.0, TINY) if near_zero else (SMALL, LARGE, 1.0)
    try:
        checked, outputs, draws = _random_loop(scheduler, call, start, turns, scale)
    except _NoStep as last:
        if last.turn != turns - 1 or turns < 2:
            raise last.refused from last
        # the last timestep may be where the last step arrives, and have no step of its own
        turns -= 1
        checked, outputs, draws = _random_loop(scheduler, call, start, turns, scale)
    loop = _unit_loop(scheduler, call, start, turns, len(draws), small, large)
    size = 2 * turns + len(draws)
    of_each = torch.stack([each.flatten() for each in loop.samples])
    rows, of_large = of_each[:, :size] / small, of_each[:, size:]
    if not near_zero and not torch.equal(rows.nan_to_num(), (of_large / large).nan_to_num()):
        raise refused(
            scheduler,
            "its step is not linear: a larger sample is not treated as a smaller one is. It clips or thresholds, or "
            "adds something that depends on neither the sample nor the network",
        )
    if len(loop.draw_turns) != len(draws):
        raise refused(scheduler, "how often it draws noise depends on the sample")
    if not bool(rows.isfinite().all()):
        raise refused(scheduler, "its step divides by zero")
    at = torch.arange(turns, device="cpu")
    x0 = torch.stack([each.flatten()[:size] for each in loop.x0]) / small
    of_x0 = x0[at, at], x0[at, turns + at]
    alone = (x0 != 0).sum(1) <= (of_x0[0] != 0).int() + (of_x0[1] != 0).int()
    nothing = torch.full((turns,), torch.nan, dtype=torch.float64, device="cpu")
    found = Triangles(
        rows[:, :turns].clone(),
        rows[:, turns : 2 * turns].clone(),
        rows[:, 2 * turns :].clone(),
        tuple(loop.draw_turns),
        loop.by_generator,
        torch.stack([each.flatten()[turn] for turn, each in enumerate(loop.inputs)]) / small,
        torch.where(alone, of_x0[0], nothing),
        torch.where(alone, of_x0[1], nothing),
    )
    walked = found.walk(checked[0], outputs, draws)
    off = float((walked - checked).abs().max() / checked.abs().max())
    if not off <= TOLERANCE:
        raise refused(
            scheduler,
            f"its step is not linear: a loop on random vectors is off by {off:.2g}, relative to the largest",
        )
    return found


def draw_dtypes(scheduler: Any, call: StepCall, turns: int) -> dict[tuple[torch.dtype, torch.dtype], torch.dtype]:
    """In which dtype the scheduler draws noise, by the dtypes of the network's output and of the sample.

    Nothing if it draws none. A scheduler may draw in float32 whatever these are. The same seed then gives other
    numbers.
    """
    found = dict[tuple[torch.dtype, torch.dtype], torch.dtype]()
    dtypes = torch.float16, torch.bfloat16, torch.float32, torch.float64
    # loops convert outputs to float32 for guidance, and states back to the dtype of the network
    for output, sample in (*((each, each) for each in dtypes), *((torch.float32, each) for each in dtypes[:2])):
        loop = OwnLoop(scheduler, call, generator=torch.Generator().manual_seed(0))
        x = torch.zeros(1, 8, 1, 1, dtype=sample, device="cpu")
        try:
            with _FirstDraw():
                for _ in range(turns):
                    loop.scaled(x)
                    x = loop.step(torch.zeros(x.shape, dtype=output, device="cpu"), x).to(sample)
        except _FirstDraw.Drawn as draw:
            found[output, sample] = draw.args[0]
    return found


class _FirstDraw(TorchFunctionMode):
    """Ends a loop at its first normal draw, with the dtype of it."""

    class Drawn(Exception):
        pass

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.randn, torch.randn_like):
            given = args[0].dtype if func is torch.randn_like else torch.get_default_dtype()
            raise self.Drawn(kwargs.get("dtype") or given)
        return func(*args, **kwargs)


class InFloat64(TorchFunctionMode):
    """Vectors of one shape stay in float64 where a scheduler converts them to another floating-point type.

    A converted step rounds every vector to float32. The coefficients could then be read to seven digits only.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in (Tensor.to, Tensor.float, Tensor.type) and isinstance(found, Tensor):
            given = args[0]
            if given.shape == self.shape and given.dtype == torch.float64 and found.is_floating_point():
                return given
        return found


class _Probe(InFloat64):
    """Also makes the normal draws itself, by `draw(number of the draw)`, and refuses all others."""

    def __init__(self, shape: tuple[int, ...], draw: Callable[[int], Tensor], generator: torch.Generator) -> None:
        super().__init__(shape)
        self._draw, self._generator = draw, generator
        self._seeds = torch.Generator().manual_seed(0)
        self._seen: dict[bytes, int] = {}  # draws by states of other generators
        self.drawn = 0
        self.by_generator = True

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.randn, torch.randn_like):
            shape = _size(args, kwargs or {})
            if shape != self.shape:
                raise _Reason(f"it draws noise of shape {shape} for a sample of shape {self.shape}")
            generator = (kwargs or {}).get("generator")
            self.by_generator &= generator is self._generator
            if generator is not None and generator is not self._generator:
                state = generator.get_state().numpy().tobytes()
                func(*args, **(kwargs or {}))  # it goes on
                if state in self._seen:  # the same numbers, drawn once more
                    return self._draw(self._seen[state])
                self._seen[state] = self.drawn
            self.drawn += 1
            return self._draw(self.drawn - 1)
        if func is torch.randint and math.prod((kwargs or {}).get("size", args[-1])) == 1:
            return func(*args, **{**(kwargs or {}), "generator": self._seeds})  # a seed for other draws
        if func in _OTHER_DRAWS:
            raise _Reason("it draws random numbers that are not standard normal")
        return super().__torch_function__(func, types, args, kwargs)


def _size(args: Any, kwargs: Any) -> tuple[int, ...]:
    """The shape that `randn` or `randn_like` is asked for."""
    given = args[0] if args else kwargs["size"]
    return tuple(given.shape if isinstance(given, Tensor) else args if isinstance(given, int) else given)


class _Reason(Exception):
    """Why a scheduler cannot be read, raised from inside its step."""


class _NoStep(Exception):
    """The step of a turn has failed."""

    def __init__(self, turn: int, refused: UnsupportedScheduler) -> None:
        self.turn, self.refused = turn, refused


def _random_loop(scheduler: Any, call: StepCall, start: int, turns: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """A loop on random vectors of this scale: its samples [T + 1, ...], outputs [T, ...] and draws [draws, ...]."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, 8, 1, 1)  # many channels: a step that leaves some out fails
    samples, outputs, draws = list[Tensor](), list[Tensor](), list[Tensor]()

    def normal() -> Tensor:
        return scale * torch.empty(shape, dtype=torch.float64, device="cpu").normal_(generator=generator)

    def feed(turn: int, before: Tensor | None) -> tuple[Tensor, Tensor]:
        x = normal() * float(getattr(scheduler, "init_noise_sigma", 1.0)) if before is None else before
        m = normal()
        samples.append(x.clone())
        outputs.append(m.clone())
        return x, m

    def draw(number: int) -> Tensor:
        if number == len(draws):
            draws.append(normal())
        return draws[number].clone()

    samples.append(_loop(scheduler, call, start, turns, shape, feed, draw).samples[-1])
    return (
        torch.stack(samples),
        torch.stack(outputs),
        torch.stack(draws) if draws else torch.zeros(0, *shape, device="cpu").double(),
    )


class _Loop(NamedTuple):
    """What each turn of a loop gave."""

    samples: list[Tensor]  # returned by the step
    x0: list[Tensor]  # reported by the step, NaN if it reports none
    inputs: list[Tensor]  # of the network
    draw_turns: list[int]  # the turn of each draw
    by_generator: bool


def _unit_loop(scheduler: Any, call: StepCall, start: int, turns: int, draws: int, small: float, large: float) -> _Loop:
    """A loop on unit vectors, times a small and a large number side by side: vectors of 2 * (2 T + draws) entries."""
    size = 2 * turns + draws

    def unit(number: int) -> Tensor:
        vector = torch.zeros(1, 2 * size, 1, 1, dtype=torch.float64, device="cpu")
        if number < size:  # otherwise it draws more often than on random vectors, which shows in the check
            vector[:, number], vector[:, size + number] = small, large
        return vector

    return _loop(
        scheduler,
        call,
        start,
        turns,
        (1, 2 * size, 1, 1),
        lambda turn, before: (unit(turn), unit(turns + turn)),
        lambda number: unit(2 * turns + number),
    )


def _loop(
    scheduler: Any,
    call: StepCall,
    start: int,
    turns: int,
    shape: tuple[int, ...],
    feed: Callable[[int, Tensor | None], tuple[Tensor, Tensor]],
    draw: Callable[[int], Tensor],
) -> _Loop:
    """The loop on a copy of the scheduler, fed with the sample and the output of each turn."""
    generator = torch.Generator().manual_seed(0)
    loop = OwnLoop(scheduler, call, start, generator=generator)
    nothing = torch.full(shape, torch.nan, dtype=torch.float64, device="cpu")
    found, x0, inputs, draw_turns = list[Tensor](), list[Tensor](), list[Tensor](), list[int]()
    probe = _Probe(shape, draw, generator)
    for turn in range(turns):
        x, m = feed(turn, found[-1] if found else None)
        drawn = probe.drawn
        try:
            with probe:
                scaled = loop.scaled(x.clone())
                after = loop.step(m, x)
        except _Reason as reason:
            raise refused(scheduler, str(reason)) from None
        except Exception as error:
            why = (
                "its step was tried from each of its timesteps with one sample of random numbers, and failed at number "
                f"{turn} ({type(error).__name__}: {error})"
            )
            raise _NoStep(turn, refused(scheduler, why)) from error
        if not isinstance(after, Tensor) or after.shape != shape or after.dtype != torch.float64:
            raise refused(scheduler, "its step does not return a sample of the given shape and type")
        found.append(after)
        x0.append(loop.clean if isinstance(loop.clean, Tensor) and loop.clean.shape == shape else nothing)
        inputs.append(scaled)
        draw_turns += [turn] * (probe.drawn - drawn)
    return _Loop(found, x0, inputs, draw_turns, probe.by_generator)
