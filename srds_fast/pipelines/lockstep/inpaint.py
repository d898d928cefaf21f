"""Inpainting with a network that knows no mask: after every step the known part of the image is put back in.

The stock loop blends by its step number, which a loop that turns once per wave does not have. So the solver blends, at
the position each state has arrived at, and the loop is given a mask of ones and an image of zeros, which changes no bit
of the latents.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...schedulers.table import NoiseTable


class Inpainting:
    """Takes mask, image and noise from the pipeline as it prepares them, and blends them into states.

    Args:
        pipe: the driven copy; its two preparing methods are replaced on this instance.
    """

    def __init__(self, pipe: Any) -> None:
        self.mask: Tensor | None = None  # [branches * batch or batch, 1, ...], as the loop would have it
        self._branches = 1
        self._image: Tensor | None = None
        self._noise: Tensor | None = None
        self._known: dict[int, Tensor] = {}
        cls = type(pipe)

        def prepare_latents(*args: Any, **kwargs: Any) -> Any:
            outputs = cls.prepare_latents(pipe, *args, **kwargs)
            latents, self._noise, self._image = outputs
            return latents, torch.zeros_like(self._noise[:1]), torch.zeros_like(self._image[:1])

        def prepare_mask_latents(*args: Any, **kwargs: Any) -> Any:
            self.mask, masked_image_latents = cls.prepare_mask_latents(pipe, *args, **kwargs)
            self._branches = 2 if pipe.do_classifier_free_guidance else 1
            return torch.ones_like(self.mask[: self._branches]), masked_image_latents

        pipe.__dict__.update(prepare_latents=prepare_latents, prepare_mask_latents=prepare_mask_latents)

    def replace_mask(self, mask: Tensor) -> None:
        """Go on with another mask, of the shape of `mask`."""
        self.mask = mask

    def blend(self, x: Tensor, position: int, samples: tuple[int, ...], noise: NoiseTable, last: int) -> Tensor:
        """The states with the known part put in.

        Args:
            x: [samples, ...], states that have arrived at `position` of the scheduler's grid.
            position: of the grid.
            samples: which samples of the batch these are.
            noise: table of the whole grid.
            last: position of the end, where the known part carries no noise.
        """
        assert self.mask is not None
        assert self._image is not None
        assert self._noise is not None
        known = self._known.get(position)
        if known is None:
            known = image = self._image.to(x.dtype)
            if position < last:
                alpha, sigma = float(noise.alpha[position]), float(noise.sigma[position])
                known = alpha * image + sigma * self._noise.to(x.dtype)
            self._known[position] = known
        mask = self.mask[: len(self.mask) // self._branches].to(x.dtype)
        if len(samples) < len(known):
            known = known[list(samples)]
            mask = mask[list(samples)] if len(mask) > 1 else mask
        return (1 - mask) * known + mask * x
