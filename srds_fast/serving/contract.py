"""What the HTTP application and a backend say to each other. The application knows HTTP, a backend knows pipelines."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class ImageRequest:
    """One request for images, checked against the limits of the server.

    Attributes:
        prompt: What to draw.
        steps: Number of steps of the sampler.
        n: How many images.
        width, height: In pixels; None for the pipeline's own size.
        seed: Image i is drawn from seed + i, so each equals the image of a request for one. None: any seed.
        guidance_scale: None for the pipeline's own.
        negative_prompt: None for none.
        partial_images: How many previews a stream shows at most.
        deadline: Seconds from the arrival in which the answer is wanted; None for no deadline.
    """

    prompt: str
    steps: int
    n: int = 1
    width: int | None = None
    height: int | None = None
    seed: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    partial_images: int = 0
    deadline: float | None = None


@dataclass(frozen=True)
class Usage:
    """What a request has cost.

    Attributes:
        seconds: From the arrival to the answer.
        queued_seconds: How long it waited of these.
        waves, rows: Batched network calls, and the rows in them.
        plan: What ran, as the report tells it.
        batch: How many requests shared the call.
        fallback: Why the call did not run parallel in time; None if it did.
        missed: How many samples may be beyond the tolerance.
    """

    seconds: float
    queued_seconds: float
    waves: int
    rows: int
    plan: str
    batch: int = 1
    fallback: str | None = None
    missed: int = 0


@dataclass(frozen=True)
class PartialImage:
    """A preview: the PNG file, and its number from 0."""

    png: bytes
    index: int


@dataclass(frozen=True)
class ImageResult:
    """The images of a request, as PNG files."""

    images: tuple[bytes, ...]
    usage: Usage


class Refused(Exception):
    """A request that is not answered with images.

    Attributes:
        status: HTTP status: 400, 401, 404, 408, 413, 415, 422, 429, 503, or 500 where the sampling failed.
        message: What is wrong, why, and what to do.
        parameter: The name of the argument that is wrong, as the client sent it.
        code: A short name for programs, as `deadline_cannot_be_met`.
        retry_after: Seconds after which to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        parameter: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.parameter, self.code, self.retry_after = (
            status,
            message,
            parameter,
            code,
            retry_after,
        )

    def __reduce__(self) -> tuple[object, ...]:
        return _refused, (self.status, self.message, self.parameter, self.code, self.retry_after)


def _refused(status: int, message: str, parameter: str | None, code: str | None, retry_after: float | None) -> Refused:
    return Refused(status, message, parameter=parameter, code=code, retry_after=retry_after)


@dataclass(frozen=True)
class Readiness:
    """Whether a backend answers requests at once; if not, what it is doing."""

    ready: bool
    reason: str = ""


class Backend(Protocol):
    """Makes images. Cancelling `generate`, or closing the iterator of `stream`, ends the sampling at its next wave."""

    def models(self) -> list[str]:
        """Names of the models that are served."""

    async def readiness(self) -> Readiness:
        """Whether recordings are made and the plan is frozen."""

    async def generate(self, request: ImageRequest) -> ImageResult:
        """Images of a request.

        Raises:
            Refused: no room, no time, wrong arguments, or a failure of the sampling.
        """

    def stream(self, request: ImageRequest) -> AsyncIterator[PartialImage | ImageResult]:
        """Previews of a request for one image, then its result, which equals that of `generate` bit for bit.

        Raises:
            Refused: as `generate`, before the first preview or after some.
        """

    async def metrics(self) -> str:
        """Counters and histograms in the text format of Prometheus."""
