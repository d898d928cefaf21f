"""The worker owns the pipeline of a server: it loads it, warms it up, and makes the images of requests.

Nothing here knows of HTTP, of queues or of Ray. All calls are synchronous and made by one thread: plans are held for
calls with as many torch threads.
"""

from __future__ import annotations

import io
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from .. import zoo
from ..engine.cancellation import Cancel, using
from ..errors import Cancelled, InvalidArgument, PlanMismatch
from ..pipelines.compile import compile
from ..pipelines.loading import open_pipeline, steps_for
from ..planner.plan import Plan
from ..sampling.stream import Refinement
from ..solvers.contract import ITERATION
from ..telemetry.report import Report
from .contract import ImageRequest, ImageResult, PartialImage, Refused, Usage
from .settings import ServerSettings, Size

logger = logging.getLogger("srds_fast")

# calls whose times tell what the next one of the kind takes, and the share of them that took no longer
LAST, SHARE = 20, 0.9
# the fastest level: higher ones make files a little smaller, and take several times as long
COMPRESSION = 1
PROMPT = "a photograph of a lighthouse by the sea in the evening"


class Kind(NamedTuple):
    """What requests that share a call have in common, and what a plan is held for, together with the batch size."""

    steps: int
    width: int | None
    height: int | None
    guidance_scale: float | None
    negative: bool  # whether there is a negative prompt


class _Image(NamedTuple):
    """One image of a request."""

    prompt: str
    negative_prompt: str | None
    seed: int


@dataclass
class _Known:
    """What is known of a kind of call and a batch size once it was warmed up."""

    fallback: str | None  # why such calls run on the pipeline's own loop
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=LAST))

    @property
    def expected(self) -> float:
        """Seconds that SHARE of the last calls took at most."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(SHARE * len(ordered)))]


class Worker:
    """A compiled pipeline, and what calls of each kind have taken.

    Args:
        pipe: a pipeline of diffusers that makes images of prompts.
        settings: of the server.
        parallel: processes that make each image together, as in `srds_fast.compile`.
        method: as in `srds_fast.compile`.

    Raises:
        PlanMismatch: the plan of the settings is no plan, or is for other steps than those of the settings.
    """

    def __init__(self, pipe: Any, settings: ServerSettings, *, parallel: Any = None, method: str = "auto") -> None:
        self.settings = settings
        if settings.plan is not None:
            plan = Plan.load(settings.plan)
            _check_steps(steps_for(pipe, plan), settings)
            self._fast: Any = compile(pipe, plan=plan, parallel=parallel)
        else:
            tolerance = {} if settings.tolerance is None else {"tolerance": settings.tolerance}
            self._fast = compile(pipe, method=method, latency=settings.latency, parallel=parallel, **tolerance)
        self._known: dict[tuple[Kind, int], _Known] = {}

    @classmethod
    def load(cls, settings: ServerSettings, **more: Any) -> Worker:
        """A worker with the model that the settings name.

        Raises:
            InvalidArgument: there is no such model or device, or it takes no prompt, or not so many steps.
            UnsupportedScheduler: the scheduler of the model is not supported.
            PlanMismatch: the plan is for something else, or for other steps.
        """
        pipe = open_pipeline(settings.model, settings.device, settings.dtype, settings.ddim, max(settings.steps))
        return cls(pipe, settings, **more)

    def kind_of(self, request: ImageRequest) -> Kind:
        """Requests of the same kind may be answered by one call of `generate`."""
        guidance = request.guidance_scale
        if guidance is None:
            guidance = self._default_guidance()
        return Kind(request.steps, request.width, request.height, guidance, request.negative_prompt is not None)

    def warm(self, cancel: Cancel | None = None) -> None:
        """Prepare all step counts, sizes and batch sizes of the settings: make recordings, choose plans and keep them.

        Raises:
            Cancelled: `cancel` was set.
        """
        sizes: Sequence[Size | tuple[None, None]] = self.settings.sizes or ((None, None),)
        for steps in self.settings.steps:
            for width, height in sizes:
                for batch in self.settings.batch_sizes:
                    kind = Kind(steps, width, height, self._default_guidance(), negative=False)
                    with using(cancel=cancel):
                        self._warm(kind, batch)

    def predicted_seconds(self, request: ImageRequest) -> float | None:
        """What the images of a request are expected to take, from earlier calls; None before the first of the kind."""
        kind, seconds = self.kind_of(request), 0.0
        for batch in self._batches(request.n):
            known = self._known.get((kind, batch))
            if known is None:
                return None
            seconds += known.expected
        return seconds

    def predicted_batch_seconds(self, kind: Kind, images: int) -> float | None:
        """The same for so many images of a kind, whichever requests they belong to."""
        known = [self._known.get((kind, batch)) for batch in self._batches(images)]
        return None if None in known else sum(each.expected for each in known if each is not None)

    def generate(self, requests: Sequence[ImageRequest], cancel: Cancel | None = None) -> list[ImageResult]:
        """The images of requests of one kind, in as few calls as the prepared batch sizes allow.

        Image i of a request is drawn with its seed + i (0 if it has none). It does not depend on the other images of a
        call, up to the rounding of the network. `usage` counts the calls that the request had a part in; its seconds
        are those of the whole work, without any waiting.

        Raises:
            Refused: the pipeline does not take the arguments, or its sampling failed.
            Cancelled: `cancel` was set.
        """
        kinds = {self.kind_of(request) for request in requests}
        assert len(kinds) == 1, "the requests of a call are of one kind"
        kind = kinds.pop()
        images = [image for request in requests for image in _images_of(request)]
        begun, made, used = time.perf_counter(), list[bytes](), list[Usage]()
        with _told_as_refusals(), using(cancel=cancel):
            for batch in self._batches(len(images)):
                part = images[len(made) : len(made) + batch]
                files, usage = self._call(kind, part)
                made += files
                used += [usage] * batch
        seconds = time.perf_counter() - begun
        results, first = [], 0
        for request in requests:
            last = first + request.n
            usage = replace(_sum(used[first:last]), seconds=seconds, batch=len(requests))
            results.append(ImageResult(tuple(made[first:last]), usage))
            first = last
        return results

    def stream(self, request: ImageRequest, cancel: Cancel | None = None) -> Iterator[PartialImage | ImageResult]:
        """Previews of a request for one image, `partial_images` at most, then its result, as `generate` makes it.

        The result is that of `generate` bit for bit.
        Where the pipeline's own loop runs, there are no previews. Close the iterator to leave early.

        Raises: as `generate`.
        """
        assert request.n == 1, "a stream is of one image"
        kind, begun = self.kind_of(request), time.perf_counter()
        with _told_as_refusals():
            with using(cancel=cancel):
                known = self._warm(kind, 1)
            if known.fallback is not None:
                yield from self.generate([request], cancel)
                return
            with using(cancel=cancel):
                stream = self._fast.stream(**self._arguments(kind, _images_of(request)))
            shown = 0
            with stream:
                for refinement in stream:
                    if not refinement.final and _is_due(refinement, kind.steps, shown, request.partial_images):
                        yield PartialImage(_png(refinement.images[0]), shown)
                        shown += 1
            usage = _usage(stream.report)
            yield ImageResult((_png(refinement.images[0]),), replace(usage, seconds=time.perf_counter() - begun))

    def _default_guidance(self) -> float | None:
        settings = self.settings
        if settings.guidance_scale is None and settings.model in zoo.names():
            return zoo.GUIDANCE
        return settings.guidance_scale

    def _batches(self, images: int) -> list[int]:
        """Batch sizes of the calls that make so many images, the largest first."""
        found = []
        for batch in reversed(self.settings.batch_sizes):
            found += [batch] * (images // batch)
            images %= batch
        return found

    def _warm(self, kind: Kind, batch: int) -> _Known:
        """Prepare calls of a kind, if they were not prepared before."""
        known = self._known.get((kind, batch))
        if known is None:
            prompt = zoo.prompts(self.settings.model)[0] if self.settings.model in zoo.names() else PROMPT
            images = [_Image(prompt, "blurred" if kind.negative else None, seed) for seed in range(batch)]
            arguments = self._arguments(kind, images)
            begun = time.perf_counter()
            report = self._fast.warmup(**arguments)
            warmed = time.perf_counter()
            self._fast(**arguments)  # as later calls run
            known = _Known(report.fallback_reason)
            known.seconds.append(time.perf_counter() - warmed)
            logger.info("Warmed up %s, %d at once, in %.1f s: %s.", kind, batch, warmed - begun, self._fast.report.plan)
            self._known[kind, batch] = known
        return known

    def _call(self, kind: Kind, images: Sequence[_Image]) -> tuple[list[bytes], Usage]:
        """PNG files of some images, by one call."""
        known = self._warm(kind, len(images))
        begun = time.perf_counter()
        found = self._fast(**self._arguments(kind, images)).images
        files = [_png(image) for image in found]
        known.seconds.append(time.perf_counter() - begun)
        return files, _usage(self._fast.report)

    def _arguments(self, kind: Kind, images: Sequence[_Image]) -> dict[str, Any]:
        """Arguments of a call. Lists also of one image: what a plan is held for depends on the types."""
        asked = {
            "prompt": [image.prompt for image in images],
            "num_inference_steps": kind.steps,
            # on the CPU: then the noise is the same on every device and for every batch size
            "generator": [torch.Generator("cpu").manual_seed(image.seed) for image in images],
            "guidance_scale": kind.guidance_scale,
            "width": kind.width,
            "height": kind.height,
            "negative_prompt": [image.negative_prompt for image in images] if kind.negative else None,
        }
        return {name: value for name, value in asked.items() if value is not None}


class _told_as_refusals:
    """In the block, what a pipeline raises becomes a `Refused`, but for `Cancelled`."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, InvalidArgument):
            raise Refused(400, str(error), code="invalid_argument") from error
        if isinstance(error, Exception) and not isinstance(error, Cancelled | Refused):
            logger.error("A call of the pipeline failed.", exc_info=error)
            raise Refused(500, FAILED, code="sampling_failed") from error


FAILED = (
    "The pipeline failed while it made the image. The log of the server has the reason. Try another seed or prompt, "
    "or tell who runs the server."
)


def _check_steps(of_plan: int, settings: ServerSettings) -> None:
    if settings.steps != (of_plan,):
        given = ", ".join(map(str, settings.steps))
        raise PlanMismatch(
            f"The plan in {settings.plan} is for {of_plan} steps, and the server was set to {given}. "
            f"Set it to {of_plan} steps."
        )


def _images_of(request: ImageRequest) -> list[_Image]:
    first = request.seed or 0
    return [_Image(request.prompt, request.negative_prompt, first + number) for number in range(request.n)]


def _is_due(refinement: Refinement, steps: int, shown: int, wanted: int) -> bool:
    """Whether a preview is shown: previews in the middle of a run are spread over it."""
    if shown >= wanted:
        return False
    if refinement.kind == ITERATION:  # how many there will be is not known
        return True
    return refinement.iteration * (wanted + 1) >= steps * (shown + 1)


def _png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG", compress_level=COMPRESSION)
    return file.getvalue()


def _usage(report: Report | None) -> Usage:
    """Of one call; its seconds are filled in by who knows when the request came."""
    if report is None:
        return Usage(0.0, 0.0, 0, 0, "unknown")
    return Usage(
        seconds=report.seconds,
        queued_seconds=0.0,
        waves=report.waves,
        rows=report.rows,
        plan=report.plan or report.method,
        fallback=report.fallback_reason,
        missed=report.missed,
    )


def _sum(used: Sequence[Usage]) -> Usage:
    """Of the calls that made the images of a request; each is counted once for each of these images' calls."""
    calls = list({id(each): each for each in used}.values())
    return replace(
        calls[-1],
        waves=sum(each.waves for each in calls),
        rows=sum(each.rows for each in calls),
        missed=sum(each.missed for each in calls),
        fallback=next((each.fallback for each in calls if each.fallback is not None), None),
    )


Load = Callable[[ServerSettings], Worker]
"""Makes the worker of a server."""
