"""The errors that modular pipelines log while an exception passes through their blocks.

A call that cannot be made in turns ends with an exception and starts again on the stock loop. The user reads the
reason in the report, and no traceback of an error that is none.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

LOGGER = "diffusers.modular_pipelines.modular_pipeline"


@contextmanager
def held_back() -> Iterator[None]:
    """Hold back what this thread logs in the block; if the block raises, it is logged then."""
    logger, thread = logging.getLogger(LOGGER), threading.get_ident()
    held: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        if record.thread != thread or record.levelno < logging.ERROR:
            return True
        held.append(record)
        return False

    logger.addFilter(hold)
    try:
        yield
    except BaseException:
        logger.removeFilter(hold)
        for record in held:
            logger.handle(record)
        raise
    finally:
        logger.removeFilter(hold)
