"""From --model to a pipeline, in a process that prints nothing but what the command says."""

from __future__ import annotations

import argparse
import logging
import warnings
from typing import Any

import diffusers
import transformers

from ..errors import UnsupportedScheduler
from ..pipelines.loading import open_pipeline


def quieten_libraries() -> None:
    """In this process libraries now print errors only."""
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    logging.getLogger("srds_fast").setLevel(logging.WARNING)  # or it would be as quiet as diffusers
    warnings.simplefilter("ignore", FutureWarning)


def open_for(args: argparse.Namespace, steps: int) -> Any:
    """The pipeline that the arguments name, see `open_pipeline`. Libraries are quiet from now on."""
    quieten_libraries()
    try:
        return open_pipeline(args.model, args.device, args.dtype, args.ddim, steps)
    except UnsupportedScheduler as error:
        raise UnsupportedScheduler(f"{error} On the command line: --ddim.") from error
