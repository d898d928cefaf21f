"""A model of k-diffusion as a denoiser of `srds_fast.sample`: its arguments are gathered for the rows of each wave."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from torch import Tensor

from ..engine.graphs.cache_key import modules_of


class Rows:
    """Calls `model(x, sigma, **extra_args)` with the entries of extra_args that belong to the rows.

    Attributes:
        model: the model.
        cond: the tensors of extra_args that belong to samples, [batch, ...], by the names that `__call__` takes.
        modules: the networks that the model is known to call, perhaps not all.
    """

    def __init__(self, model: Callable[..., Tensor], x: Tensor, extra_args: Mapping[str, Any]) -> None:
        self.model = model
        try:
            self.modules = modules_of(model)
        except ValueError:  # it refers to too many objects
            self.modules = ()
        self.cond: dict[str, Tensor] = {}
        self._batch = len(x)
        self._given = {name: self._taken(value) for name, value in extra_args.items()}

    @property
    def known(self) -> Hashable:
        """What the costs of the model are remembered by: its networks and its code; without these, itself."""
        code = getattr(self.model, "__code__", None)
        try:
            networks = tuple(map(weakref.ref, self.modules)) or (code or weakref.ref(self.model),)
        except TypeError:  # no weak reference: its costs cannot be remembered
            return object()
        return type(self.model), code, networks

    def __call__(self, x: Tensor, sigma: Tensor, **cond: Tensor) -> Tensor:
        given = {name: _filled(value, cond) for name, value in self._given.items()}
        return self.model(x, sigma, **given)

    def _taken(self, value: Any) -> Any:
        """The value with the names of tensors in the place of those that belong to samples."""
        if isinstance(value, Tensor) and value.ndim and len(value) == self._batch:
            name = f"extra_{len(self.cond)}"
            self.cond[name] = value
            return _Named(name)
        if type(value) in (list, tuple):
            return type(value)(map(self._taken, value))
        if type(value) is dict:
            return {name: self._taken(each) for name, each in value.items()}
        return value


class _Named(str):
    """The name of a tensor in `Rows.cond`."""


def _filled(value: Any, cond: Mapping[str, Tensor]) -> Any:
    if isinstance(value, _Named):
        return cond[value]
    if type(value) in (list, tuple):
        return type(value)(_filled(each, cond) for each in value)
    if type(value) is dict:
        return {name: _filled(each, cond) for name, each in value.items()}
    return value
