"""Measured cost curves on disk, so that another process need not measure them: one JSON file for each kind of call."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import weakref
from collections.abc import Hashable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import InvalidArgument, shown
from . import json_files
from .context import Context
from .cost_curve import CostCurve

logger = logging.getLogger("srds_fast")

VARIABLE = "SRDS_FAST_CACHE"
"""The environment variable that names the folder if no argument does."""


@dataclass(frozen=True)
class _Kept:
    """What a file holds."""

    of: dict[str, Any]  # the kind of call, see `CurveCache._described`
    curve: CostCurve


@dataclass(frozen=True)
class CurveCache:
    """A folder of curves. Those of networks that are not known by name and shape are not kept.

    options: how networks are run, in words: curves of other options are not found.
    """

    folder: Path
    options: str = ""

    @classmethod
    def of(cls, cache_dir: str | os.PathLike[str] | None, options: object = "") -> CurveCache | None:
        """The cache in a folder, which is made; in that of SRDS_FAST_CACHE, if None; None if neither is given.

        Raises InvalidArgument if there can be no such folder.
        """
        given = cache_dir if cache_dir is not None else os.environ.get(VARIABLE) or None
        if given is None:
            return None
        try:
            folder = Path(given)
            folder.mkdir(parents=True, exist_ok=True)
        except (TypeError, ValueError, OSError) as error:  # no path, a null byte, no such folder
            raise InvalidArgument(
                f"cache_dir is {shown(given)}, and there can be no such folder: {error}. Pass a folder that can be "
                f"written to, or None; {VARIABLE} names it otherwise."
            ) from None
        return cls(folder, str(options))

    def load(self, key: Hashable, context: Context) -> CostCurve | None:
        """The curve of a kind of call, measured in this context; None if there is none that can be used."""
        of = self._described(key, context)
        path = self._path(of)
        if of is None or not path.exists():
            return None
        try:
            found = json_files.build(_Kept, json_files.read(path))
            if found.of != of:
                raise ValueError("it is of another kind of call")
            return found.curve
        except (OSError, ValueError) as error:
            logger.warning("%s holds no usable costs: %s. They are measured again.", path, error)
            return None

    def save(self, key: Hashable, context: Context, curve: CostCurve) -> None:
        """Keep a curve. A file that cannot be written is a warning."""
        of = self._described(key, context)
        if of is None:
            return
        try:
            json_files.write(self._path(of), asdict(_Kept(of, curve)))
        except (OSError, InvalidArgument) as error:
            logger.warning("Costs could not be written to %s: %s.", self.folder, error)

    def _described(self, key: Hashable, context: Context) -> dict[str, Any] | None:
        """The kind of call, the options and the context as JSON; None if the network is not known."""
        if context.network is None:
            return None
        here = {name: value for name, value in asdict(context).items() if name != "scheduler"}  # c(rows) is the same
        return {"call": repr(_stable(key)), "options": self.options, **here}

    def _path(self, of: Any) -> Path:
        return self.folder / f"costs-{hashlib.sha256(json.dumps(of).encode()).hexdigest()[:16]}.json"


def _stable(key: Any) -> Any:
    """The key without what differs from process to process: networks are told apart by the context."""
    if isinstance(key, tuple):
        return tuple(map(_stable, key))
    if isinstance(key, weakref.ref):
        return type(key()).__name__
    return getattr(key, "__qualname__", None) or getattr(key, "co_qualname", key)
