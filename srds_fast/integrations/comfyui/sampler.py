"""A sampler function of ComfyUI: (model, x, sigmas, extra_args, callback, disable) -> the sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ...telemetry.report import Report
from ..k_diffusion import run
from .conditioning import ComfyRows


class SampleByWaves:
    """What KSAMPLER calls. `report` is that of the last call.

    options: of `sample_parallel`. trust_patches: functions that other nodes have put into the model are taken to treat
    each latent of a batch by its own sigma.
    """

    def __init__(self, options: Mapping[str, Any], trust_patches: bool) -> None:
        self.options, self.trust_patches = dict(options), trust_patches
        self.report: Report | None = None

    def __call__(
        self,
        model: Any,
        x: Tensor,
        sigmas: Tensor,
        extra_args: Mapping[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], object] | None = None,
        disable: bool | None = None,
    ) -> Tensor:
        """Sample. Interrupts of ComfyUI are looked for before every wave.

        Raises:
            UnsupportedPipeline: something in the model or its conditioning may read the sigma of the first latent of a
                batch for all of them, and cannot be split.
        """
        from comfy.k_diffusion.sampling import default_noise_sampler
        from comfy.model_management import throw_exception_if_processing_interrupted
        from comfy.model_sampling import CONST

        self.report = None
        extra_args = dict(extra_args or {})
        options = dict(self.options)
        ancestral = options["sampler"] == "euler_ancestral"
        # the levels of a rectified flow matter where noise is added; other steps are the same formula in sigma
        flow = ancestral and isinstance(model.inner_model.inner_model.model_sampling, CONST)
        rows = ComfyRows(model, x, extra_args, velocity=flow, trust_patches=self.trust_patches)
        if ancestral:
            options["noise_sampler"] = default_noise_sampler(x, seed=extra_args.get("seed"))

        def look(wave: int, rows: int, settled: int) -> None:
            throw_exception_if_processing_interrupted()

        options["on_wave"] = look
        prediction = "flow" if flow else "x0"
        # conditioning is repeated over the batch in the order of its latents, so all of them stay in it to the end
        return run(rows, x, sigmas, callback, disable, self._keep, options, prediction=prediction, together=True)

    def _keep(self, report: Report) -> None:
        self.report = report
