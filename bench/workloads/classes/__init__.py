"""Popular pipeline classes of diffusers at a tiny size: `CASES` by name, each with a call; `VARIATIONS` of calls."""

from . import audio, diffusion_images, flow_images, stable_diffusion, videos
from .case import Case
from .variations import VARIATIONS, Variation

CASES: dict[str, Case] = {
    case.name: case
    for module in (stable_diffusion, flow_images, diffusion_images, videos, audio)
    for case in module.CASES
}

__all__ = ["CASES", "VARIATIONS", "Case", "Variation"]
