"""`stream()` and `astream()`: the iterations of `sample`, as they come."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from ..engine.run import Observer
from ..errors import InvalidArgument
from ..telemetry.report import Report
from .arguments import check_noise
from .rows import Denoiser
from .sample import Inside, sample, sampled
from .stream import AsyncStream, Source, Stream


def stream(
    denoiser: Denoiser, x: Tensor, scheduler: Any = None, num_inference_steps: int | None = None, **settings: Any
) -> Stream:
    """`sample`, as an iterator over a whole sample after every iteration; the last one is the result.

    The call runs in another thread. Closing the stream, from any thread, ends it at its next wave. `report` of the
    stream is that of the call once it has ended. A method without whole samples on the way, as "sequential", gives the
    x0 that the network predicts after every few steps: `Refinement.kind` says which of the two it is.

    Args:
        denoiser, x, scheduler, num_inference_steps: as of `sample`.
        settings: the other arguments of `sample`, but for `observer` and `keep_trajectory`.

    Raises:
        TypeError: `sample` has no such argument.
        InvalidArgument: x is no noise, or `observer` or `keep_trajectory` was given. Others are those of `sample`, and
            come with the first refinement.
    """
    return Stream(_source(denoiser, x, scheduler, num_inference_steps, settings))


def astream(
    denoiser: Denoiser, x: Tensor, scheduler: Any = None, num_inference_steps: int | None = None, **settings: Any
) -> AsyncStream:
    """The same for asyncio: `async for refinement in srds_fast.astream(...)`, see `AsyncStream`."""
    return AsyncStream(_source(denoiser, x, scheduler, num_inference_steps, settings))


def _source(
    denoiser: Denoiser, x: Tensor, scheduler: Any, num_inference_steps: int | None, settings: dict[str, Any]
) -> Source:
    if left_out := {"observer", "keep_trajectory"} & settings.keys():
        raise InvalidArgument(
            f"{sorted(left_out)[0]} was given to a stream, which shows the iterations itself. Leave it out, or call "
            "sample."
        )
    check_noise(x)
    bound = inspect.signature(sample).bind(denoiser, x, scheduler, num_inference_steps, **settings)
    bound.apply_defaults()
    reports: list[Report] = []

    def call(observer: Observer) -> None:
        reports.append(sampled(**{**bound.arguments, "observer": observer}, inside=Inside(previews=True)).report)

    def decode(latents: Tensor) -> list[Any]:
        raise InvalidArgument("A stream of `sample` knows no decoder. Decode `latents` as your model does.")

    def told(what: object) -> None:
        """The stream itself tells the report; nobody else is asked for it."""

    return Source(call, lambda: reports[-1] if reports else None, told, told, x.dtype, decode)
