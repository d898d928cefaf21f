"""Tables of a list of noise levels, as k-diffusion and ComfyUI have them: no scheduler is needed.

The state is x = x0 + sigma * eps (EDM, Karras et al. 2022, section 2), or x = (1 - sigma) * x0 + sigma * eps of a
rectified flow. Each sampler is that of the same name in k-diffusion, without churn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..caches import Cache, of_process
from ..errors import InvalidArgument, shown
from .table import NoiseTable

PREDICTIONS = ("x0", "eps", "v", "flow")
MAX_TABLES = 64
_tables: Cache[NoiseTable] = of_process("tables of sigmas", MAX_TABLES)


class _Steps(NamedTuple):
    """Columns of a table, a number for each network call."""

    sigma: list[float]  # where the network is called
    alpha_next: list[float]
    sigma_next: list[float]
    momentum: list[float]
    spread: list[float]
    draws: list[bool]


def table_of_sigmas(
    sigmas: Tensor | Sequence[float],
    prediction: str = "x0",
    sampler: str = "euler",
    *,
    eta: float | None = None,
    s_noise: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> NoiseTable:
    """The noise table of a sampler of k-diffusion on these noise levels.

    Args:
        sigmas: [N + 1], descending: step i goes from sigmas[i] to sigmas[i + 1]. The last may be 0, as it mostly is.
        prediction: what the network returns at (x, sigma). "x0": the clean sample, as the models of k-diffusion and
            ComfyUI do. "eps": the noise, x0 = x - sigma * eps. "v": x0 = (x / c - sigma * v) / c with
            c = sqrt(sigma^2 + 1). "flow": the velocity eps - x0 of a rectified flow, x0 = x - sigma * v, whose sigmas
            are at most 1.
        sampler: one of `SAMPLERS`. "euler" and "ddim" are the same step. "dpmpp_2m" is DPM-Solver++(2M).
            "euler_ancestral" adds noise. "heun", the sampler of EDM, calls the network twice in each step but one that
            ends at 0, so its table has up to 2 N - 1 steps.
        eta: of euler_ancestral, 0 to 1: how much noise its steps add; None: 1.
        s_noise: of euler_ancestral: the noise is multiplied by this.
        dtype: of the sigmas that the network is given.

    Returns:
        The table. Equal arguments give the same object.

    Raises:
        InvalidArgument: an argument is not as described.
    """
    for name, value, known in (("prediction", prediction, PREDICTIONS), ("sampler", sampler, SAMPLERS)):
        if not isinstance(value, str) or value not in known:
            raise InvalidArgument(f"{name} is {shown(value)}. Known are {', '.join(known)}. Pass one of these.")
    levels = checked_sigmas(sigmas, flow=prediction == "flow")
    if eta is not None and sampler != ANCESTRAL:
        raise InvalidArgument(
            f"eta was given together with sampler={sampler!r}, whose steps add no noise. Leave it out, or pass "
            f"sampler={ANCESTRAL!r}."
        )
    if not _is_number(1.0 if eta is None else eta, 0.0, 1.0):
        raise InvalidArgument(f"eta is {shown(eta)}. It scales the noise of a step. Pass a number from 0 to 1.")
    if not _is_number(s_noise, 0.0, math.inf):
        raise InvalidArgument(
            f"s_noise is {shown(s_noise)}. It multiplies the noise of a step. Pass a number, 0 or more."
        )
    key = levels, prediction, sampler, eta, s_noise, dtype
    table = _tables.get(key)
    if table is None:
        table = _tables[key] = _table(levels, prediction, sampler, 1.0 if eta is None else float(eta), s_noise, dtype)
    return table


def checked_sigmas(sigmas: Any, *, flow: bool = False) -> tuple[float, ...]:
    """The noise levels as numbers; InvalidArgument if they are none. flow: of a rectified flow."""
    try:
        given = isinstance(sigmas, Tensor)
        found = sigmas.detach() if given else torch.tensor(sigmas, dtype=torch.float64, device="cpu")
        levels = tuple(map(float, found.tolist())) if found.ndim == 1 else ()
    except Exception:  # whatever it is, it is no list of numbers
        raise InvalidArgument(f"sigmas is {shown(sigmas)}. {_FORM}") from None
    if len(levels) < 2 or found.dtype == torch.bool:
        raise InvalidArgument(f"sigmas has {found.dtype} and shape {tuple(found.shape)}. {_FORM}")
    for index, level in enumerate(levels):
        if not math.isfinite(level) or level < 0:
            raise InvalidArgument(f"sigmas[{index}] is {level}. A noise level is a finite number, 0 or more. {_FORM}")
        if index and level >= levels[index - 1]:
            raise InvalidArgument(
                f"sigmas[{index}] is {level:g}, and sigmas[{index - 1}] is {levels[index - 1]:g}: they do not descend. "
                "Sampling goes from much noise to none. Pass sigmas.flip(0) if they ascend, and each level once."
            )
    if flow and levels[0] > 1:
        raise InvalidArgument(
            f"sigmas[0] is {levels[0]:g}, and prediction is 'flow'. A rectified flow has levels from 1 down to 0. Pass "
            "such levels, or another prediction."
        )
    return levels


_FORM = "Pass the N + 1 noise levels of N steps, descending, as k-diffusion's get_sigmas_karras returns them."


def _is_number(value: object, low: float, high: float) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return low <= value <= high and abs(value) < 1e300


def _table(
    levels: tuple[float, ...], prediction: str, sampler: str, eta: float, s_noise: float, dtype: torch.dtype
) -> NoiseTable:
    flow = prediction == "flow"
    steps = _SAMPLERS[sampler](levels, flow, eta)
    columns = [torch.tensor(each, dtype=torch.float64, device="cpu") for each in steps[:-1]]
    sigma, alpha_next, sigma_next, momentum, spread = columns
    alpha, zero, one = 1 - sigma if flow else torch.ones_like(sigma), torch.zeros_like(sigma), torch.ones_like(sigma)
    scale = (sigma**2 + 1).sqrt()
    p, q = {
        "x0": (zero, one),
        "eps": (one, -sigma),
        "v": (1 / scale**2, -sigma / scale),
        "flow": (one, -sigma),
    }[prediction]
    spread = spread * s_noise
    return NoiseTable(
        sigma.to(dtype), alpha, sigma, alpha_next, sigma_next, p, q, (1 - alpha * p) / sigma, -alpha * q / sigma,
        input_scale=one,
        init_noise_sigma=levels[0],
        momentum=momentum if bool(momentum.any()) else None,
        spread=spread if bool(spread.any()) else None,
        draws=torch.tensor(steps.draws, device="cpu") if any(steps.draws) else None,
    )  # fmt: skip


def _ends(levels: tuple[float, ...], flow: bool) -> tuple[list[float], list[float]]:
    """alpha and sigma where steps without noise end."""
    sigma_next = list(levels[1:])
    return [1 - each if flow else 1.0 for each in sigma_next], sigma_next


def _euler(levels: tuple[float, ...], flow: bool, eta: float) -> _Steps:
    """x' = x + (sigma' - sigma) * (x - x0) / sigma, which is DDIM: x' = alpha' * x0 + sigma' * eps."""
    count = len(levels) - 1
    return _Steps(list(levels[:-1]), *_ends(levels, flow), [0.0] * count, [0.0] * count, [False] * count)


def _dpmpp_2m(levels: tuple[float, ...], flow: bool, eta: float) -> _Steps:
    """Lu et al. 2022, algorithm 2, with log(1 / sigma) in the place of half the log-SNR, as k-diffusion has it.

    The first step and one that ends at 0 are of first order.
    """
    momentum = [0.0]
    for before, here, after in zip(levels, levels[1:], levels[2:], strict=False):
        ratio = math.log(here / after) / math.log(before / here) if after else 0.0
        momentum.append((1 - after / here) * ratio / 2)
    return _euler(levels, flow, eta)._replace(momentum=momentum)


def _euler_ancestral(levels: tuple[float, ...], flow: bool, eta: float) -> _Steps:
    """A step down to less noise than that of the next level, and fresh noise up to it.

    In a rectified flow the state is scaled in between, so that its part of x0 is that of the next level.
    """
    alpha_next, down, up = [], [], []
    for here, after in pairwise(levels):
        if flow:
            low = after * (1 + (after / here - 1) * eta)
            low *= (1 - after) / (1 - low)
        else:
            low = math.sqrt(after**2 - min(after, eta * after * math.sqrt(1 - (after / here) ** 2)) ** 2)
        alpha_next.append(1 - after if flow else 1.0)
        down.append(low)
        up.append(math.sqrt(max(0.0, after**2 - low**2)))
    draws = [after > 0 for after in levels[1:]]
    return _Steps(list(levels[:-1]), alpha_next, down, [0.0] * len(draws), up, draws)


def _heun(levels: tuple[float, ...], flow: bool, eta: float) -> _Steps:
    """Karras et al. 2022, algorithm 1: an Euler step, and where it does not end at 0 a second network call at its end.

    The second call moves the state by (1 - r) / (2 r) * (x0 - x0 of the first call), r = sigma' / sigma: so it is a
    step that stays at its noise level.
    """
    sigma, ends, momentum = list[float](), list[float](), list[float]()
    for here, after in pairwise(levels):
        sigma.append(here)
        ends.append(after)
        momentum.append(0.0)
        if after:
            sigma.append(after)
            ends.append(after)
            momentum.append((here / after - 1) / 2)
    count = len(sigma)
    return _Steps(sigma, [1 - each if flow else 1.0 for each in ends], ends, momentum, [0.0] * count, [False] * count)


ANCESTRAL = "euler_ancestral"
_SAMPLERS: dict[str, Callable[[tuple[float, ...], bool, float], _Steps]] = {
    "euler": _euler,
    "ddim": _euler,
    "dpmpp_2m": _dpmpp_2m,
    ANCESTRAL: _euler_ancestral,
    "heun": _heun,
}
SAMPLERS = tuple(_SAMPLERS)
