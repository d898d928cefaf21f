"""Samplers with the signature of those of k-diffusion, which run parallel in time.

    x = sample_srds(model, x, sigmas, extra_args={"cond": cond}, sampler="dpmpp_2m")

`model(x, sigma, **extra_args)` returns the denoised x, and sigma is a vector with an entry for each row, as k-diffusion
has it. Nothing of k-diffusion is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..engine.cancellation import OnWave
from ..errors import InvalidArgument, UnknownArgument, shown
from ..sampling.arguments import check_noise
from ..sampling.sample import DEFAULTS, Inside, sampled
from ..schedulers.sigmas import checked_sigmas, table_of_sigmas
from ..schedulers.table import NoiseTable
from ..solvers.contract import Evaluated
from ..solvers.srds import SRDS
from ..telemetry.report import Report
from .rows import Rows

Model = Callable[..., Tensor]
Callback = Callable[[dict[str, Any]], object]

# samplers of k-diffusion that draw noise in every step, though they use it for churn alone
DRAW_UNUSED = ("euler", "ddim", "heun")
# what `sample_parallel` gives to `sample` itself
_FIXED = {"denoiser", "x", "scheduler", "num_inference_steps", "sigmas", "prediction", "cond", "dummy_draws"}
OPTIONS = tuple(name for name in DEFAULTS if name not in _FIXED)


def sample_srds(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    **options: Any,
) -> Tensor:
    """`sample_parallel` by SRDS. options: as there, without method."""
    return sample_parallel(model, x, sigmas, extra_args, callback, disable, **{"method": SRDS.name, **options})


def sample_parallel(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    *,
    unused_noise: bool = True,
    on_report: Callable[[Report], object] | None = None,
    **options: Any,
) -> Tensor:
    """A sampler of k-diffusion, parallel in time: the same sample within a tolerance.

    Args:
        model: `model(x, sigma, **extra_args)` returns the denoised x, [rows, ...]. It must treat rows independently.
        x: starting noise, times sigmas[0] as usual, [batch, ...].
        sigmas: [N + 1], descending.
        extra_args: given to the model. Tensors in it, also within lists and dicts, whose first dimension is the batch
            belong to the samples: each row gets the entry of its sample. All else is passed as it is.
        callback: called with {"x", "i", "sigma", "sigma_hat", "denoised"}, in the order of the steps, once for each:
            before each wave for the steps that are final by then, and for one more if the network was called there. So
            every wave calls it, as long as steps are left; x and denoised of a step that is not final yet are the
            newest estimates. An exception that it raises ends the call at that wave.
        disable: hide the progress bar; None: it is shown on terminals.
        unused_noise: draw from torch's global generator what k-diffusion's samplers of the same name draw and do not
            use (`randn_like(x)` in each step of euler and heun). False: as ComfyUI's.
        on_report: called with the report of the call.
        options: `sampler` ("euler", "ddim", "dpmpp_2m", "euler_ancestral" or "heun"), `eta`, `s_noise`,
            `noise_sampler`, `method`, `tolerance`, `exact` and the other arguments of `srds_fast.sample`. method is
            "auto" by default.

    Returns:
        the sample, as x.

    Raises:
        UnknownArgument: `sample` has no such option.
        InvalidArgument, DivergenceError, Cancelled: as `srds_fast.sample`.
    """
    _check_options(options)
    check_noise(x)
    if extra_args is not None and not isinstance(extra_args, Mapping):
        raise InvalidArgument(f"extra_args is {shown(extra_args)}. It names arguments of the model. Pass a dict.")
    if not callable(model):
        raise InvalidArgument(f"model is {shown(model)}. Pass a function (x, sigma) that returns the denoised x.")
    sampler = options.get("sampler", "euler")
    steps = len(checked_sigmas(sigmas)) - 1
    rows = Rows(model, x, {} if extra_args is None else extra_args)
    if unused_noise and sampler in DRAW_UNUSED:
        for _ in range(steps):
            torch.randn_like(x)
    return run(rows, x, sigmas, callback, disable, on_report, options)


def run(
    rows: Rows,
    x: Tensor,
    sigmas: Tensor,
    callback: Callback | None,
    disable: bool | None,
    on_report: Callable[[Report], object] | None,
    options: Mapping[str, Any],
    *,
    prediction: str = "x0",
    together: bool = False,
) -> Tensor:
    """`sample_parallel` of a model that takes rows. prediction: what that returns. together: see `Inside`."""
    given = {**DEFAULTS, "method": "auto", **options, "prediction": prediction, "cond": rows.cond}
    chosen = {name: given[name] for name in ("sampler", "eta", "s_noise")}
    table = table_of_sigmas(sigmas, prediction, **chosen, dtype=x.dtype)
    evaluated = None if callback is None else Evaluated()
    inside = Inside(together=together, known=rows.known, modules=rows.modules, evaluated=evaluated)
    with tqdm(total=len(sigmas) - 1, disable=disable) as bar:
        events = _Events(table, torch.as_tensor(sigmas), evaluated, callback, bar, given["on_wave"])
        result = sampled(**{**given, "denoiser": rows, "x": x, "sigmas": sigmas, "on_wave": events}, inside=inside)
        events.finish()
    if on_report is not None:
        on_report(result.report)
    return result.sample


def _check_options(options: Mapping[str, Any]) -> None:
    for name in options:
        if name not in OPTIONS:
            more = " It adds noise before each step. Use sampler='euler_ancestral'." if name == "s_churn" else ""
            raise UnknownArgument(f"{name} is no option here.{more} Known are {', '.join(OPTIONS)}.")


class _Events:
    """Tells the callback of the steps, before each wave and at the end. Calls `on_wave` of the user first."""

    def __init__(
        self,
        table: NoiseTable,
        sigmas: Tensor,
        evaluated: Evaluated | None,
        callback: Callback | None,
        bar: Any,
        on_wave: OnWave | None,
    ) -> None:
        self._table, self._sigmas, self._evaluated = table, sigmas, evaluated
        self._callback, self._bar, self._on_wave = callback, bar, on_wave
        # the calls of the network that begin a step: Heun's second ones do not
        levels = zip(table.numbers["sigma"], table.numbers["sigma_next"], strict=True)
        self._calls = [call for call, (here, after) in enumerate(levels) if after != here]
        self._told = 0
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, wave: int, rows: int, settled: int) -> None:
        if self._on_wave is not None:
            self._on_wave(wave, rows, settled)
        final = sum(call < settled for call in self._calls)
        self._tell(final if self._callback is None else max(final, self._told + 1))

    def finish(self) -> None:
        """The run has ended."""
        while self._told < len(self._calls):
            self._told_one()

    def _tell(self, until: int) -> None:
        """Of the steps before this one, as far as the network was called at them."""
        while self._told < min(until, len(self._calls)):
            if self._evaluated is not None and self._calls[self._told] not in self._evaluated.x:
                return
            self._told_one()

    def _told_one(self) -> None:
        step = self._told
        self._told += 1
        self._bar.update()
        if self._callback is None or self._evaluated is None:
            return
        call, evaluated = self._calls[step], self._evaluated
        if call in evaluated.x:
            x = evaluated.x[call]
            self._last = x, self._table.predict_x0(call, x, evaluated.m[call])
        assert self._last is not None, "the first step is always evaluated"
        x, denoised = self._last
        sigma = self._sigmas[step]
        self._callback({"x": x, "i": step, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
