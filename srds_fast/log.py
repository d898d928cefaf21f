"""The logger "srds_fast": it is as loud as diffusers' own, unless the user has configured it.

`diffusers.utils.logging.set_verbosity_info()` shows what is chosen, recorded and dropped, `set_verbosity_debug()` the
numbers behind it too. A level or a handler that the user sets on the logger "srds_fast" itself goes before that, as in
any Python program. INFO: plans chosen and changed, recordings made and dropped. WARNING: what does not run as asked,
once for each reason. DEBUG: costs, times, counts.
"""

from __future__ import annotations

import logging
import sys

NAME = "srds_fast"


class _Logger(logging.Logger):
    """Takes level and handlers of diffusers where it has none of its own. Without diffusers it is a plain logger."""

    def getEffectiveLevel(self) -> int:
        theirs = _of_diffusers()
        if self.level or self.handlers or theirs is None:
            return super().getEffectiveLevel()
        return theirs.getEffectiveLevel()

    def callHandlers(self, record: logging.LogRecord) -> None:
        theirs = _of_diffusers()
        if theirs is None or self.hasHandlers():  # also those of the root logger
            super().callHandlers(record)
        else:
            theirs.callHandlers(record)


def _of_diffusers() -> logging.Logger | None:
    return logging.getLogger("diffusers") if "diffusers" in sys.modules else None


def configure() -> None:
    """Let the logger follow diffusers. It stays the object that it is: a user may have asked for it before.

    A class of the user's for loggers stays too.
    """
    logger = logging.getLogger(NAME)
    if type(logger) is logging.Logger:
        logger.__class__ = _Logger
