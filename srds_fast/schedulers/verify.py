"""Makes the noise table of a scheduler, and checks it against the scheduler's own `step` before it is used.

What a builder does not know, or reading did not see, shows as a difference. The scheduler is then refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..caches import Cache, of_process, signature_of
from ..errors import InvalidArgument, UnsupportedScheduler, shown
from ..kernels.common.clamping import Clip, range_of
from .builders import builder_of, clip_of
from .own_loop import OwnLoop, StepCall, copy_scheduler
from .private_draws import PrivateDraws, Seeded
from .read_table import table_by_reading
from .reader import methods_of, replaced_methods, state_key
from .refusal import refused
from .table import NoiseTable


def noise_table(
    scheduler: Any,
    *,
    clip_epsilon: bool = False,
    eta: float | None = None,
    asked: frozenset[str] = frozenset(),
    dtype: torch.dtype | None = None,
) -> NoiseTable:
    """Table of a scheduler whose `set_timesteps` has run, checked against its own `step`.

    The scheduler is not changed: the check runs on a copy and draws from a separate generator. Tables are cached by
    everything they depend on, so the calls of a pipeline check its scheduler once per number of steps.
    clip_epsilon and eta are the options `use_clipped_model_output` and `eta` of DDIM's step; eta=None leaves the
    default of the step, which is 0 for DDIM and 0.3 for TCD. asked, dtype: see `StepCall`. Raises UnsupportedScheduler
    if the step cannot be said by a table, or differs from it, and InvalidArgument if eta is out of its range.
    """
    key = state_key(scheduler), clip_epsilon, eta, asked, dtype
    table = _checked.get(key)
    if table is None:
        table = _checked[key] = _build(scheduler, clip_epsilon, eta, asked, dtype)
    return table


# samples, channels, height, width of the states of a check
SHAPE = (2, 3, 4, 4)
# steps of a scheduler that are compared at a time
CHUNK = 256
# a check runs every step of the scheduler, which is too slow for every call
MAX_CHECKED = 64
_checked: Cache[NoiseTable] = of_process("tables of schedulers", MAX_CHECKED)


def _build(
    scheduler: Any, clip_epsilon: bool, eta: float | None, asked: frozenset[str], dtype: torch.dtype | None
) -> NoiseTable:
    name = type(scheduler).__name__
    if eta and not takes_eta(scheduler):
        raise UnsupportedScheduler(
            f"{name} takes no eta, but {eta} was given. This scheduler sets its noise itself. "
            "Leave eta out, or use DDIMScheduler."
        )
    if eta is not None and not (isinstance(eta, int | float) and 0.0 <= eta <= 1.0) and takes_eta(scheduler):
        raise InvalidArgument(
            f"eta is {shown(eta)}. It scales the noise that a step of {name} adds, and 1 adds as much as DDPM. Pass a "
            "number from 0 to 1."
        )
    builder, options = builder_of(scheduler), {"eta": eta} if eta else {}
    with torch.device("cpu"), PrivateDraws():  # a step may make tensors and draw where it is told nothing
        call = StepCall.of(scheduler, eta, asked, dtype)
        table = table_by_reading(scheduler, call) if builder is None else builder(scheduler, **options)
    columns = ("alpha_next", "sigma_next", "p", "q", "r", "s", "input_scale")
    if not all(math.isfinite(value) for name in columns for value in table.numbers[name]):
        raise UnsupportedScheduler(
            f"{name} divides by zero in one of its {table.num_steps} steps. The cause may be epsilon prediction with "
            "rescale_betas_zero_snr, or shift_terminal with one step. "
            "Use prediction_type='v_prediction', drop the option, or use more steps."
        )
    table = replace(table, clip_epsilon=clip_epsilon or table.clip_epsilon, call=call)
    candidates = [table] if builder is not None or table.clip is None else list(_clipping(scheduler, table))
    for candidate in candidates[:-1]:
        with suppress(UnsupportedScheduler):
            _check_against(scheduler, candidate, call)
            return candidate
    _check_against(scheduler, candidates[-1], call)
    return candidates[-1]


def _clipping(scheduler: Any, table: NoiseTable) -> Iterator[NoiseTable]:
    """What a step that clips may do: reading it does not tell whether its eps is that of the clipped x0.

    Nor does it tell a clamp from a threshold that depends on all elements.
    """
    clips: list[Clip | None] = [table.clip]
    if scheduler.config.get("thresholding", False):
        clips.append(clip_of(scheduler.config))
    for clip in clips:
        yield replace(table, clip=clip)
        yield replace(table, clip=clip, clip_epsilon=not table.clip_epsilon)


def check_scheduler(scheduler: Any) -> None:
    """Raise UnsupportedScheduler unless a table of ten steps can be built on a copy of this scheduler.

    One that cannot set ten timesteps without further arguments is checked in the first call.
    """
    trial_table(scheduler, None)


def adds_noise(scheduler: Any, eta: float | None = None) -> bool:
    """Whether the scheduler's steps add fresh noise. eta: of the call; has no effect if the step does not take it."""
    table = trial_table(scheduler, eta if takes_eta(scheduler) else None)
    return table is not None and table.spread is not None


def takes_eta(scheduler: Any) -> bool:
    return "eta" in signature_of(scheduler.step).parameters


def trial_table(scheduler: Any, eta: float | None) -> NoiseTable | None:
    """The table of ten steps of a copy of this scheduler; None if it cannot set them without further arguments."""
    trial = copy_scheduler(scheduler)
    steps = min(10, int(trial.config.get("num_train_timesteps", 10)))
    # dynamic shifting needs a number that depends on the image; any one shows what its steps are
    shift = {"mu": 1.0} if trial.config.get("use_dynamic_shifting", False) else {}
    try:
        with torch.device("cpu"):
            trial.set_timesteps(steps, **shift)
    except Exception:
        return None
    return noise_table(trial, eta=eta)


def _check_against(scheduler: Any, table: NoiseTable, call: StepCall) -> None:
    """Compare every step of a loop with the scheduler's own; each must draw noise where the table says."""
    options, taken = dict[str, Any](), signature_of(scheduler.step).parameters
    if "use_clipped_model_output" in taken and builder_of(scheduler) is not None:
        options["use_clipped_model_output"] = table.clip_epsilon
    trusted = _is_of_diffusers(scheduler)
    if "return_dict" in taken and trusted and not call.asked:  # to make the object takes a sixth of the time of a step
        options["return_dict"] = False
    draw, noise = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    asked: list[Tensor] | None = None
    if table.step_noise is not None:  # the draws of all steps first, of which the loop repeats the numbers
        with Seeded():
            zeros = torch.zeros(SHAPE, dtype=torch.float64, device="cpu")
            asked = list(table.step_noise.of(table.spreads, zeros, zeros.dtype, zeros.dtype, noise.clone_state()))
    x = table.init_noise_sigma * torch.randn(SHAPE, dtype=torch.float64, generator=draw, device="cpu")
    carried: Tensor | None = None
    steps = Seeded()
    with steps:
        loop = OwnLoop(scheduler, call, generator=noise, options=options)
    for begin in range(0, table.num_steps, CHUNK):
        stop, expected_noise = min(begin + CHUNK, table.num_steps), noise.clone_state()
        free, of_x = _outputs(table, begin, stop, draw)
        # what a network that predicts the size of the noise returns beside that
        predicted = free if table.learned is None else torch.randn(free.shape, generator=draw, device="cpu").to(free)
        seen: list[tuple[Tensor, ...]] = []
        # whether these steps draw by themselves, or make tensors anywhere, was seen in the first chunk
        watches = begin == 0 or steps.drawn or steps.placed or not trusted
        around: AbstractContextManager[object] = steps if watches else nullcontext()
        try:
            with around:  # and nothing else in it: every operation takes several times longer there
                for of_m, share in zip(free, of_x, strict=True):
                    m = torch.add(of_m, x, alpha=share)
                    if table.learned is not None:
                        m = torch.cat((m, predicted[len(seen)]), 1)
                    scaled, after = loop.scaled(x), loop.step(m, x).to(torch.float64, copy=True)
                    seen.append((x, m, scaled, after))
                    x = after
        except Exception:  # a step before it that differs says more
            if seen:
                _compare(scheduler, table, begin, seen, carried, asked, expected_noise, noise=None)
            raise
        carried = _compare(scheduler, table, begin, seen, carried, asked, expected_noise, noise)


def _is_of_diffusers(scheduler: Any) -> bool:
    """Whether no code of its class or of the object is somebody else's: a step of diffusers draws by its generator."""
    own = [each.__globals__["__name__"].partition(".")[0] == "diffusers" for each in methods_of(scheduler)]
    return all(own) and not replaced_methods(scheduler)


def _outputs(table: NoiseTable, begin: int, stop: int, draw: torch.Generator) -> tuple[Tensor, list[float]]:
    """Outputs with which x0 has the size of data: this plus these times x, for steps begin .. stop - 1.

    If x0 is clipped, it has the size of its bound, and in every second step it is far beyond: a threshold is no clamp
    where most elements are beyond 1.
    """
    clip = table.clip if table.learned is None else table.learned.clip
    far, rows = 1.0 if clip is None else 8.0 * max(1.0, range_of(clip)), slice(begin, stop)
    far_and_near = [far if index % 2 == 0 else max(1.0, far / 8.0) for index in range(begin, stop)]
    sizes = torch.tensor(far_and_near, dtype=torch.float64, device="cpu")
    x0 = torch.randn((stop - begin, *SHAPE), dtype=torch.float64, generator=draw, device="cpu")
    of_x0 = (sizes / table.q[rows]).view(-1, *[1] * len(SHAPE))
    return of_x0 * x0, (-table.p[rows] / table.q[rows]).tolist()


def _compare(
    scheduler: Any,
    table: NoiseTable,
    begin: int,
    seen: list[tuple[Tensor, ...]],
    carried: Tensor | None,
    asked: list[Tensor] | None,
    expected_noise: torch.Generator,
    noise: torch.Generator | None,
) -> Tensor:
    """Raise UnsupportedScheduler where steps from `begin` on differ from the table; returns what they carry on.

    seen: x, the network's output, the scaled x and the next x of each. noise: the generator that they drew from;
    expected_noise: the same before them. None: not all steps were made, so how often they drew is not known.
    """
    x, m, scaled, expected = (torch.stack(each) for each in zip(*seen, strict=True))
    count, z = len(x), None
    if asked is not None:
        z = torch.stack(asked[begin : begin + count])
    elif table.draws is not None:
        drawn_in = table.draw_dtypes.get((m.dtype, x.dtype), m.dtype)
        z = torch.zeros_like(x)
        for index in table.draws[begin : begin + count].nonzero()[:, 0].tolist():
            z[index] = torch.randn(SHAPE, dtype=drawn_in, generator=expected_noise, device="cpu")
    if table.learned is not None:
        draws = [None] * count if z is None else z
        m = torch.stack([table.folded(begin + turn, x[turn], m[turn], draws[turn]) for turn in range(count)])
    found, carried = table.steps(begin, x, m, carried, z)
    columns = {name: getattr(table, name)[begin : begin + count] for name in ("alpha_next", "p", "input_scale")}
    # x0 is a small difference of large numbers where there is much noise
    at_x0 = (columns["alpha_next"] * columns["p"]).abs().clamp(min=1.0) * _largest(x)
    size = torch.maximum(_largest(expected), at_x0)
    scale = columns["input_scale"].view(-1, *[1] * len(SHAPE))
    difference = torch.maximum(_largest(found - expected), _largest(scaled - scale * x))
    # float32 rounding inside the scheduler is allowed for; an unknown option gives far larger differences
    close = size.isfinite() & (difference <= 4e-6 * size.clamp(min=1.0))
    drew = asked is None and noise is not None and not torch.equal(noise.get_state(), expected_noise.get_state())
    if drew or not bool(close.all()):
        first = int((~close).int().argmax())
        raise refused(
            scheduler,
            f"it steps differently from its table: step {begin + first} of {table.num_steps} is off by "
            f"{float(difference[first]):.2g}. "
            "An option in its config, or a changed step(), is not supported",
        )
    return carried


def _largest(values: Tensor) -> Tensor:
    """Of each step, [steps]; NaN where there is one."""
    return values.abs().flatten(1).amax(1)
