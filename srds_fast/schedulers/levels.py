"""The noise levels at which a scheduler calls the network, and what the network may predict there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .own_loop import copy_scheduler
from .reader import Triangles
from .refusal import refused

# relative difference at which two descriptions of x0 are the same. Those that are told apart differ by a multiple of
# x0, while float32 coefficients of short steps determine x0 to two or three digits only
SAME_X0 = 0.02
# relative difference at which a parametrization describes something else, as the eps that DEIS keeps
FAR = 0.3


def levels_of(scheduler: Any, triangles: Triangles) -> Tensor:
    """alpha and sigma at which each turn calls the network, [T, 2], asked in float32 as schedulers compute them."""
    levels = _asked(scheduler, triangles)
    # Mochi's sigmas are the share of the data, which `scale_noise` does not know
    return levels.flip(1) if scheduler.config.get("invert_sigmas", False) else levels


def _asked(scheduler: Any, triangles: Triangles) -> Tensor:
    trial = copy_scheduler(scheduler)
    trial.timesteps = trial.timesteps.cpu()
    timesteps = trial.timesteps[: triangles.turns]
    data, noise = (
        torch.tensor([[1.0, 0.0]], dtype=torch.float32, device="cpu"),
        torch.tensor([[0.0, 1.0]], dtype=torch.float32, device="cpu"),
    )

    def ask(at: Tensor) -> Tensor:
        rows = data.expand(len(at), 2), noise.expand(len(at), 2)
        if hasattr(trial, "add_noise"):
            return trial.add_noise(rows[0], rows[1], at)  # type: ignore[no-any-return]
        return trial.scale_noise(rows[0], at, rows[1])  # type: ignore[no-any-return]

    if not hasattr(trial, "add_noise") and not hasattr(trial, "scale_noise"):
        alphas, betas, sigmas = (getattr(trial, name, None) for name in ("alphas", "betas", "sigmas"))
        if isinstance(alphas, Tensor) and isinstance(betas, Tensor) and len(alphas) == len(betas) == len(timesteps) + 1:
            levels = torch.stack((alphas, betas), 1)[:-1].cpu().double()
            if bool((levels.norm(dim=1) - 1).abs().max() < 1e-6):  # those of each turn (IPNDM)
                return levels
        if (of_velocity := _of_velocity(scheduler, triangles)) is not None:
            return of_velocity
        if not isinstance(sigmas, Tensor) or len(sigmas) != len(timesteps) + 1 or float(sigmas.max()) > 1:
            raise refused(scheduler, "its noise levels are not known, as it has no `add_noise` and no `scale_noise`")
        return _between_data_and_noise(torch.stack((1 - sigmas[:-1], sigmas[:-1]), 1).cpu().double())
    if not hasattr(trial, "set_begin_index"):
        return _between_data_and_noise(ask(timesteps).double())
    rows = []
    for turn in range(len(timesteps)):  # by number, because several turns may have the same timestep
        trial.set_begin_index(turn)
        trial._step_index = None
        rows.append(ask(timesteps[turn : turn + 1]))
    levels = _between_data_and_noise(torch.cat(rows).double())
    scale = triangles.input_scale
    if bool((levels[:, 0] == 1).all()) and bool((scale != 1).all()):
        # the network's input has unit variance. Where add_noise knows whole steps only (KDPM2), the scale knows more
        last = int(scale.argmax())
        sigma = (scale**-2 - scale[last] ** -2 + levels[last, 1] ** 2).clamp(min=0).sqrt()
        other = (sigma - levels[:, 1]).abs() > SAME_X0 * (sigma + levels[last, 1])
        levels[:, 1] = torch.where(other, sigma, levels[:, 1])
    return levels


def _of_velocity(scheduler: Any, triangles: Triangles) -> Tensor | None:
    """Levels on a circle, where the step reports x0 = cos(t) * x - sin(t) * m (TrigFlow, Lu and Song 2024, eq. 6).

    There x = cos(t) * x0 + sin(t) * noise, with noise of the standard deviation `sigma_data`. None: it does not.
    """
    levels = torch.stack((triangles.x0_of_x, -triangles.x0_of_m), 1)
    # not so with NaN, where none is reported. A rounded angle may begin beyond pure noise
    if not bool((levels.norm(dim=1) - 1).abs().max() < 1e-6) or bool((levels < -1e-5).any()):
        return None
    levels[:, 1] *= float(scheduler.config.get("sigma_data", 1.0))
    return levels.clamp(min=0)


def _between_data_and_noise(levels: Tensor) -> Tensor:
    """Levels of a rectified flow with alpha = 1 - sigma exactly, where float32 has rounded it; others as they are."""
    sigma = levels[:, 1]
    if bool((levels.sum(1) - 1).abs().max() < 1e-6):
        return torch.stack(((1 - sigma).clamp(min=0), sigma), 1)
    return levels


def parametrizations(levels: Tensor) -> Iterator[Tensor]:
    """Weights [T, 2] of x and m in x0, for what networks predict."""
    alpha, sigma = levels.T
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    yield torch.stack((1 / alpha, -sigma / alpha), 1)  # eps
    yield torch.stack((one, -sigma), 1)  # the velocity of rectified flow, or eps if alpha is 1
    yield torch.stack((zero, one), 1)  # x0
    yield torch.stack((alpha, -sigma), 1)  # v
    variance = sigma**2 + 1
    yield torch.stack((1 / variance, -sigma / variance.sqrt()), 1)  # v if alpha is 1
    yield torch.stack((one, sigma), 1)  # the negative velocity
