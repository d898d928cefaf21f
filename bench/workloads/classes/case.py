"""A pipeline class at a tiny size: its parts, and the arguments of a call."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import nn


@dataclass(frozen=True)
class Case:
    """A class of diffusers with parts of its own kinds and random weights.

    Attributes:
        cls: its name.
        parts: makes its components by name, with the scheduler of a popular checkpoint. What the class does not take
            is left out, and None is given for what is missing.
        call: the arguments of a call but `num_inference_steps` and `generator`.
        note: what tells it from other cases of its class.
        options: other arguments of the class's constructor.
        attributes: of the pipeline, set after that.
    """

    cls: str
    parts: Callable[[], dict[str, Any]]
    call: dict[str, Any]
    note: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.cls}, {self.note}" if self.note else self.cls

    def build(self, scheduler: object | None = None, seed: int = 0) -> Any:
        """The pipeline, with a scheduler in the place of its own if one is given.

        Raises:
            ImportError: this version of diffusers has no such class, or a package that it needs is not installed.
        """
        cls = pipeline_class(self.cls)
        torch.manual_seed(seed)
        parts = {**self.parts(), **self.options}
        parts["scheduler"] = scheduler or parts["scheduler"]
        pipe = ready(cls(**_taken(cls, parts)))
        vars(pipe).update(self.attributes)
        return pipe


def pipeline_class(name: str) -> Any:
    """A class of diffusers by name.

    Raises:
        ImportError: there is none, or a package that it needs is not installed.
    """
    cls = getattr(diffusers, name, None)
    if cls is None or "dummy" in cls.__module__:
        raise ImportError(f"{name} is not in diffusers {diffusers.__version__}, or a package that it needs is missing")
    return cls


def _taken(cls: Any, parts: dict[str, Any]) -> dict[str, Any]:
    """The parts that the class takes; None for those that it needs and does not get."""
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
    needed = {each.name: None for each in parameters if each.default is each.empty}
    return {**needed, **{each.name: parts[each.name] for each in parameters if each.name in parts}}


def ready(pipe: Any) -> Any:
    """The pipeline in evaluation mode, without a progress bar."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval()  # a model built from a configuration is in training mode
    pipe.set_progress_bar_config(disable=True)
    return pipe
