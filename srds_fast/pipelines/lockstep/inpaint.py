"""Inpainting with a network without a mask input: the known part of the image is pasted back after every step.

The stock loop blends by step number. A lockstep turn has no single step number, so the solver blends instead, at the
grid position of each state. The loop gets a mask of ones and an image of zeros, which do not change the latents.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...schedulers.table import NoiseTable


class Inpainting:
    """Takes mask, image and noise from the pipeline as it prepares them, and blends them into states."""

    def __init__(self, pipe: Any) -> None:
        self.mask: Tensor | None = None  # [branches * batch or batch, 1, ...], as in the stock loop
        self._branches = 1
        self._image, self._noise = torch.empty(0), torch.empty(0)
        self._known: dict[int, Tensor] = {}
        cls = type(pipe)

        def prepare_latents(*args: Any, **kwargs: Any) -> Any:
            latents, self._noise, self._image = cls.prepare_latents(pipe, *args, **kwargs)
            return latents, torch.zeros_like(self._noise[:1]), torch.zeros_like(self._image[:1])

        def prepare_mask_latents(*args: Any, **kwargs: Any) -> Any:
            self.mask, masked_image_latents = cls.prepare_mask_latents(pipe, *args, **kwargs)
            self._branches = 2 if pipe.do_classifier_free_guidance else 1
            return torch.ones_like(self.mask[: self._branches]), masked_image_latents

        pipe.__dict__.update(prepare_latents=prepare_latents, prepare_mask_latents=prepare_mask_latents)

    def blend(self, x: Tensor, position: int, samples: tuple[int, ...], noise: NoiseTable, last: int) -> Tensor:
        """The states [samples, ...] at a position of the scheduler's grid, with the known part pasted in.

        samples: their indices in the batch. last: the final position, where the known part has no noise.
        """
        assert self.mask is not None
        if position not in self._known:
            known = self._image.to(x.dtype)
            if position < last:
                known = float(noise.alpha[position]) * known + float(noise.sigma[position]) * self._noise.to(x.dtype)
            self._known[position] = known
        known = self._known[position]
        mask = self.mask[: len(self.mask) // self._branches].to(x.dtype)
        if len(samples) < len(known):
            known = known[list(samples)]
            mask = mask[list(samples)] if len(mask) > 1 else mask
        return (1 - mask) * known + mask * x
