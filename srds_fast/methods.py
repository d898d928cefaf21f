"""The methods by name, and what of each can be chosen: what `__all__` of the registry lists."""

from __future__ import annotations

from .solvers.registry import *  # noqa: F403
