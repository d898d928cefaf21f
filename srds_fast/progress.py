"""Progress bars of long work: one at a time, with the time left, as diffusers shows those of its pipelines.

They obey `pipe.set_progress_bar_config`, as `disable=True`, where the work is for a pipeline. Otherwise they are shown
on terminals alone. Work that is done soon shows none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm.auto import tqdm

# seconds that pass before a bar is shown
DELAY = 0.5

_config: ContextVar[Mapping[str, Any] | None] = ContextVar("srds_fast.progress.config", default=None)
_open: ContextVar[bool] = ContextVar("srds_fast.progress.open", default=False)


@contextmanager
def configured_by(pipe: Any) -> Iterator[None]:
    """In the block, bars are shown as those of this pipeline."""
    token = _config.set(getattr(pipe, "_progress_bar_config", None) or {})
    try:
        yield
    finally:
        _config.reset(token)


@contextmanager
def bar(what: str, total: float | None = None, unit: str = "it") -> Iterator[Any]:
    """A tqdm bar: call its `update`. Within another bar it is not shown: one tells how long the whole takes.

    what: the label. total: in units; None: not known yet, set it with `reset(total=...)`.
    """
    asked = dict(_config.get() or {})
    # None: on a terminal alone
    hidden = True if _open.get() else asked.pop("disable", None)
    token = _open.set(True)
    usual = {"leave": False, "delay": DELAY, "unit": unit, "unit_scale": isinstance(total, float)}  # in three digits
    try:
        with tqdm(**{**usual, **asked, "desc": what, "disable": hidden, "total": total}) as made:
            yield made
    finally:
        _open.reset(token)
