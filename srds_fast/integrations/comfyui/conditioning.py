"""ComfyUI's model on rows of several noise levels.

ComfyUI is made for batches of one sigma: some of it reads that of the first latent for the whole batch. Conditioning
with `start_percent` and `end_percent`, and ControlNets with a range, are the same for all sigmas between two bounds: a
wave is split there. What cannot be split is refused.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedPipeline
from ..rows import Rows

# guiders whose code was read: they treat each latent by itself
_GUIDERS = ("comfy.samplers.CFGGuider", "comfy_extras.nodes_custom_sampler.Guider_Basic",
            "comfy_extras.nodes_custom_sampler.Guider_DualCFG")  # fmt: skip
# options of a model that hold functions of other nodes, which may read the sigma of the first latent
_FUNCTIONS = (
    "sampler_cfg_function",
    "sampler_pre_cfg_function",
    "sampler_post_cfg_function",
    "sampler_calc_cond_batch_function",
    "model_function_wrapper",
    "denoise_mask_function",
    "context_handler",
    "wrappers",
    "callbacks",
)
_IN_TRANSFORMER = ("patches", "patches_replace", "wrappers", "callbacks")


class ComfyRows(Rows):
    """Calls KSamplerX0Inpaint with rows of several sigmas; all latents of the batch are in every wave, in order.

    velocity: return (x - x0) / sigma, the velocity of a rectified flow, in the place of x0.
    """

    def __init__(
        self, model: Any, x: Tensor, extra_args: Mapping[str, Any], *, velocity: bool, trust_patches: bool
    ) -> None:
        guider = model.inner_model
        options = extra_args.get("model_options", {})
        _check_guider(guider, trust_patches)
        _check_options(options, trust_patches)
        super().__init__(guider.inner_model, x, {})  # costs are those of the network
        self._bounds = sorted(set(_bounds(guider.conds)))
        self._inpaint, self._extra, self._velocity = model, dict(extra_args), velocity

    def __call__(self, x: Tensor, sigma: Tensor, **cond: Tensor) -> Tensor:
        """x0 of each row, [rows * batch, ...]."""
        if not self._bounds:
            found = self._part(x, sigma)
        else:
            found = torch.empty_like(x)
            for rows in self._groups(sigma):
                found[rows] = self._part(x[rows], sigma[rows])
        if self._velocity:
            found = (x - found) / sigma.view(-1, *[1] * (x.ndim - 1))
        return found

    def _groups(self, sigma: Tensor) -> Iterator[Tensor]:
        """Rows between the same bounds."""
        groups: dict[Hashable, list[int]] = {}
        for row, level in enumerate(sigma.tolist()):
            key: Hashable = tuple((level > bound, level < bound) for bound in self._bounds)
            groups.setdefault(key, []).append(row)
        for each in groups.values():
            yield torch.tensor(each, device=sigma.device)

    def _part(self, x: Tensor, sigma: Tensor) -> Tensor:
        """The model on rows that all of its code may take for rows of one sigma."""
        model, extra = self._inpaint, self._extra
        mask = extra.get("denoise_mask")
        kept = model.latent_image, model.noise
        try:
            if mask is not None:
                extra = {**extra, "denoise_mask": _tiled(mask, len(x))}
                model.latent_image, model.noise = (_tiled(each, len(x)) for each in kept)
            found: Tensor = model(x, sigma, **extra)
        finally:
            model.latent_image, model.noise = kept
        return found


def _tiled(value: Any, rows: int) -> Any:
    """A tensor of the batch, repeated for the rows; one that all latents share stays as it is."""
    if not isinstance(value, Tensor) or len(value) in (1, rows):
        return value
    return value.repeat(rows // len(value), *[1] * (value.ndim - 1))


def _check_guider(guider: Any, trusted: bool) -> None:
    name = f"{type(guider).__module__}.{type(guider).__qualname__}"
    if name not in _GUIDERS and not trusted:
        raise UnsupportedPipeline(
            f"The guider {type(guider).__name__} is not known. It may take a batch for latents of one sigma, and a "
            "wave holds several. Use CFGGuider, BasicGuider or DualCFGGuider; or set trust_patches, if it treats each "
            "latent by its own sigma."
        )
    for cond in _each(guider.conds):
        if cond.get("hooks") is not None:
            raise UnsupportedPipeline(
                "Conditioning has hooks, which change the weights of the model by the sigma of the first latent. A "
                "wave holds several sigmas. Remove the hooks, or use a stock sampler."
            )


def _check_options(options: Mapping[str, Any], trusted: bool) -> None:
    inner = options.get("transformer_options", {})
    found = [name for name in _FUNCTIONS if _holds(options.get(name))]
    found += [name for name in _IN_TRANSFORMER if _holds(inner.get(name))]
    # the mask function of differential diffusion reads the first sigma, and nothing but the first
    if "denoise_mask_function" in found or (found and not trusted):
        raise UnsupportedPipeline(
            f"Another node has put functions into the model ({', '.join(found)}). They may read the sigma of the first "
            "latent of a batch for all, and a wave holds several sigmas. Remove that node or use a stock sampler; or "
            "set trust_patches, if they treat each latent by its own sigma (denoise_mask_function does not)."
        )


def _holds(value: Any) -> bool:
    """Whether there is anything in it."""
    if isinstance(value, Mapping):
        return any(map(_holds, value.values()))
    return bool(value) if isinstance(value, list | tuple | None) else True


def _each(conds: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for some in conds.values():
        yield from some or ()


def _bounds(conds: Mapping[str, Any]) -> Iterator[float]:
    """The sigmas where conditioning begins or ends: as they are, and rounded as they are to be compared."""
    found = list[float]()
    for cond in _each(conds):
        found += [float(cond[name]) for name in ("timestep_start", "timestep_end") if cond.get(name) is not None]
        control = cond.get("control")
        while control is not None:
            found += map(float, control.timestep_range or ())
            control = control.previous_controlnet
    yield from found
    yield from torch.tensor(found, dtype=torch.float32, device="cpu").tolist()
