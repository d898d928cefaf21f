"""The nodes: a sampler for SamplerCustomAdvanced, and its report as text."""

from __future__ import annotations

from typing import Any

from ...schedulers.sigmas import SAMPLERS
from ...solvers.registry import METHODS
from ...telemetry.report import Report
from .sampler import SampleByWaves

CATEGORY = "sampling/custom_sampling/samplers"
NOT_RUN = "The sampler has not run yet."


class SamplerSRDS:
    """A sampler that runs parallel in time, for the input `sampler` of SamplerCustomAdvanced."""

    RETURN_TYPES = ("SAMPLER",)
    FUNCTION = "get_sampler"
    CATEGORY = CATEGORY
    DESCRIPTION = "The sample of a stock sampler, within a tolerance, in fewer batched network calls."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The inputs, as ComfyUI asks for them."""
        number = {"min": 0.0, "step": 1e-4, "round": False}
        return {
            "required": {
                "sampler_name": (list(SAMPLERS), {"tooltip": "the stock sampler whose sample is made"}),
                "method": (list(METHODS), {"tooltip": "auto measures what is fastest here, in its first runs"}),
                "tolerance": ("FLOAT", {"default": 4e-3, "max": 1.0, **number, "tooltip": "mean error of a latent"}),
            },
            "optional": {
                "eta": ("FLOAT", {"default": 1.0, "max": 1.0, **number, "tooltip": "of euler_ancestral"}),
                "s_noise": ("FLOAT", {"default": 1.0, "max": 100.0, **number, "tooltip": "of euler_ancestral"}),
                "max_rows": ("INT", {"default": 0, "min": 0, "max": 10000, "tooltip": "widest batch; 0: no bound"}),
                "trust_patches": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "tooltip": "other nodes' functions in the model treat each latent of a batch by its own sigma",
                    },
                ),
            },
        }

    def get_sampler(
        self,
        sampler_name: str,
        method: str,
        tolerance: float,
        eta: float = 1.0,
        s_noise: float = 1.0,
        max_rows: int = 0,
        trust_patches: bool = False,
    ) -> tuple[Any]:
        """The sampler, an object of ComfyUI's class KSAMPLER."""
        from comfy.samplers import KSAMPLER

        options: dict[str, Any] = {"sampler": sampler_name, "method": method, "tolerance": tolerance}
        if max_rows:
            options["max_rows"] = max_rows
        if sampler_name == "euler_ancestral":
            options |= {"eta": eta, "s_noise": s_noise}
        # as ComfyUI's own "ddim": inpainting draws noise of its own
        inpaint = {"random": True} if sampler_name == "ddim" else {}
        return (KSAMPLER(SampleByWaves(options, trust_patches), {}, inpaint),)


class SRDSReport:
    """The report of the last run of a sampler, as text."""

    RETURN_TYPES = ("STRING", "LATENT")
    RETURN_NAMES = ("report", "latent")
    FUNCTION = "read"
    CATEGORY = CATEGORY
    OUTPUT_NODE = True
    DESCRIPTION = (
        "What the sampler did. Give it the latent that the sampler has made, so that it is read after the run."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """The inputs, as ComfyUI asks for them."""
        return {"required": {"sampler": ("SAMPLER",), "latent": ("LATENT",)}}

    def read(self, sampler: Any, latent: Any) -> dict[str, Any]:
        """The text for the node, and its outputs."""
        report: Report | None = getattr(getattr(sampler, "sampler_function", None), "report", None)
        text = NOT_RUN if report is None else str(report)
        return {"ui": {"text": [text]}, "result": (text, latent)}


NODE_CLASS_MAPPINGS: dict[str, type] = {"SamplerSRDS": SamplerSRDS, "SRDSReport": SRDSReport}
NODE_DISPLAY_NAME_MAPPINGS = {"SamplerSRDS": "SamplerSRDS (parallel in time)", "SRDSReport": "SRDS report"}
