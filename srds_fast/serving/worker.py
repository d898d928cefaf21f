"""The worker owns the pipeline of a server: it loads it, warms it up, and makes the images of requests.

Nothing here knows of HTTP, of queues or of Ray. All calls are synchronous and made by one thread: plans are held for
calls with as many torch threads.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from ..engine.cancellation import Cancel, using
from ..errors import Cancelled, InvalidArgument, PlanMismatch
from ..pipelines.compile import compile
from ..pipelines.loading import open_pipeline, steps_for
from ..planner.plan import Plan
from ..sampling.stream import Refinement
from ..solvers.contract import ITERATION
from ..solvers.registry import SEQUENTIAL as STEP_BY_STEP
from ..telemetry.report import Report
from .batching import PARALLEL, SEQUENTIAL, CallCosts, Policy, Warmed, batches, costs_of, sizes_that_pay
from .calls import Prepared, png, sum_of, usage_of
from .contract import ImageRequest, ImageResult, PartialImage, Refused
from .kinds import Kind, images_of, kinds_of
from .settings import AUTO, ServerSettings

logger = logging.getLogger("srds_fast")

# batch sizes that are prepared where they pay, if the settings name none
AUTO_SIZES = (1, 2, 4, 8)
FEWEST_GRAPHS = 8  # that each compiled pipeline keeps

FAILED = (
    "The pipeline failed while it made the image. The log of the server has the reason. Try another seed or prompt, "
    "or tell who runs the server."
)


class Worker:
    """A compiled pipeline, and what calls of each kind have taken.

    A call samples in one of two ways: PARALLEL, by the plan that was chosen for one image, or SEQUENTIAL, one step
    after another. Where the plan was found to be no faster, the first way takes one step after another too.

    Args:
        pipe: a pipeline of diffusers that makes images of prompts.
        settings: of the server.
        parallel: processes that make each image together, as in `srds_fast.compile`.

    Raises:
        PlanMismatch: the plan of the settings is no plan, or is for other steps than those of the settings.
        OSError: its file cannot be read.
    """

    def __init__(self, pipe: Any, settings: ServerSettings, *, parallel: Any = None) -> None:
        self.settings, self._pipe, self._kinds = settings, pipe, kinds_of(settings)
        sizes = AUTO_SIZES if isinstance(settings.batch_sizes, str) else settings.batch_sizes
        self._policy = Policy.of(settings.batching, sizes)
        self._sizes = (1,) if settings.batch_sizes == AUTO else self._policy.sizes
        # what was recorded before the first request is kept
        recordings = {"max_graphs": max(FEWEST_GRAPHS, len(self._kinds) * len(self._policy.sizes))}
        self._options: dict[str, Any] = {"parallel": parallel, **recordings}
        if settings.plan is not None:
            plan = Plan.load(settings.plan)
            _check_steps(steps_for(pipe, plan), settings)
            self._fast: Any = compile(pipe, plan=plan, **self._options)
        else:
            tolerance: dict[str, Any] = {} if settings.tolerance is None else {"tolerance": settings.tolerance}
            self._fast = compile(pipe, latency=settings.latency, **tolerance, **self._options)
        self._step_by_step: Any = compile(pipe, method=STEP_BY_STEP, **self._options)
        self._by_plan: dict[Plan, Any] = {}  # pipelines compiled with the plans of calls for one image
        self._plans: dict[Kind, Plan | None] = {}
        self._prepared: dict[tuple[Kind, str, int], Prepared] = {}
        self._seconds = 0.0, 0.0  # of the warm-up, see `Warmed`

    @classmethod
    def load(cls, settings: ServerSettings, *, parallel: Any = None) -> Worker:
        """A worker with the model that the settings name.

        Raises:
            InvalidArgument: there is no such model or device, or it takes no prompt, or not so many steps.
            UnsupportedScheduler: the scheduler of the model is not supported.
            PlanMismatch, OSError: as above.
        """
        pipe = open_pipeline(settings.model, settings.device, settings.dtype, settings.ddim, max(settings.steps))
        return cls(pipe, settings, parallel=parallel)

    def warm(self, cancel: Cancel | None = None) -> Warmed:
        """Prepare the calls of all kinds and batch sizes: make recordings, choose plans and keep them.

        Raises:
            Cancelled: `cancel` was set.
        """
        self.warm_shared(self.warm_single(cancel), cancel)
        return self.warmed()

    def warm_single(self, cancel: Cancel | None = None) -> tuple[int, ...]:
        """Prepare the calls for one image. Returns the batch sizes that are to be prepared too.

        Raises: as `warm`.
        """
        begun = time.perf_counter()
        with using(cancel=cancel):
            for kind in self._kinds:
                self._prepare(kind, PARALLEL, 1)
                self._prepare(kind, self._policy.ways[0], 1)  # one request alone always runs in the first way
        self._seconds = time.perf_counter() - begun, 0.0
        if self.settings.batch_sizes != AUTO:
            return self._sizes
        pay = [sizes_that_pay(self._costs(kind), self._policy) for kind in self._kinds]
        return tuple(sorted({size for sizes in pay for size in sizes}))

    def warm_shared(self, sizes: tuple[int, ...], cancel: Cancel | None = None) -> None:
        """Prepare the calls for several images.

        Raises: as `warm`.
        """
        begun = time.perf_counter()
        with using(cancel=cancel):
            for kind, way, size in product(self._kinds, self._policy.ways, sizes):
                if size > 1:
                    self._prepare(kind, way, size)
        self._sizes, self._seconds = sizes, (self._seconds[0], time.perf_counter() - begun)
        images = ", ".join(map(str, sizes))
        logger.info("Warm in %.1f s; in %.1f s more for calls of several images: %s.", *self._seconds, images)

    def warmed(self) -> Warmed:
        """Which calls were prepared, and what they cost."""
        return Warmed(self._sizes, tuple((kind, self._costs(kind)) for kind in self._kinds), self._seconds)

    def _costs(self, kind: Kind) -> CallCosts:
        timed = [(way, size, each.expected) for (of, way, size), each in self._prepared.items() if of == kind]
        return costs_of(self._plans[kind], kind.steps, self._prepared[kind, PARALLEL, 1].expected, timed)

    def generate(
        self, requests: Sequence[ImageRequest], cancel: Cancel | None = None, way: str = PARALLEL
    ) -> list[ImageResult]:
        """The images of requests of one kind, in as few calls as the prepared batch sizes allow.

        Image i of a request is drawn with its seed + i (0 + i if it has none). It does not depend on the other images
        of a call, up to the rounding of the network. `usage` counts the calls that the request had a part in; its
        seconds are those of the whole work, without any waiting.

        Raises:
            Refused: the pipeline does not take the arguments, or its sampling failed.
            Cancelled: `cancel` was set.
        """
        (kind,) = {Kind.of(request) for request in requests}
        images = [image for request in requests for image in images_of(request)]
        begun, files, used = time.perf_counter(), list[bytes](), []
        with _told_as_refusals(), using(cancel=cancel):
            for batch in batches(len(images), self._sizes):
                made, usage = self._prepare(kind, way, batch).call(images[len(files) : len(files) + batch])
                files += made
                used += [usage] * batch
        seconds = time.perf_counter() - begun
        results, first = [], 0
        for request in requests:
            last = first + request.n
            usage = replace(sum_of(used[first:last]), seconds=seconds, batch=len(requests))
            results.append(ImageResult(tuple(files[first:last]), usage))
            first = last
        return results

    def stream(self, request: ImageRequest, cancel: Cancel | None = None) -> Iterator[PartialImage | ImageResult]:
        """Previews of a request for one image, `partial_images` at most, then its result, as `generate` makes it.

        The result is that of `generate` for the request alone, bit for bit. Where the pipeline's own loop runs, there
        are no previews. Close the iterator to leave early.

        Raises: as `generate`.
        """
        assert request.n == 1, "a stream is of one image"
        kind, begun, way = Kind.of(request), time.perf_counter(), self._policy.ways[0]
        with _told_as_refusals():
            with using(cancel=cancel):
                prepared = self._prepare(kind, way, 1)
            if prepared.fallback is not None:
                yield from self.generate([request], cancel, way)
                return
            with using(cancel=cancel):
                stream = prepared.fast.stream(**kind.arguments(images_of(request)))
            shown, wanted = 0, request.partial_images
            with stream:
                for refinement in stream:
                    if not refinement.final and _is_due(refinement, kind.steps, shown, wanted):
                        yield PartialImage(png(refinement.images[0]), shown)
                        shown += 1
            usage = replace(usage_of(stream.report), seconds=time.perf_counter() - begun)
            yield ImageResult((png(refinement.images[0]),), usage)

    def _prepare(self, kind: Kind, way: str, batch: int) -> Prepared:
        """Calls of a kind, warmed up if they were not before."""
        key = (kind, way, batch)
        if key not in self._prepared:
            images = kind.images_for_warming(self.settings.model, batch)
            arguments, fast = kind.arguments(images), self._compiled(kind, way, batch)
            begun = time.perf_counter()
            report = fast.warmup(**arguments)
            prepared = Prepared(fast, kind, report.fallback_reason)
            prepared.call(images)  # as later ones run
            if (way, batch) == (PARALLEL, 1):
                self._plans[kind] = self._plan_of(fast, arguments, report)
            self._prepared[key] = prepared
            took = time.perf_counter() - begun
            logger.info("Warmed up %s, %s, batches of %d, in %.1f s.", kind, way, batch, took)
        return self._prepared[key]

    @staticmethod
    def _plan_of(fast: Any, arguments: dict[str, Any], report: Report) -> Plan | None:
        """The plan of a call that was warmed up; None if it runs on the pipeline's own loop for want of another way."""
        return None if report.fallback_reason is not None else fast.plan_for(**arguments, measure=True)

    def _compiled(self, kind: Kind, way: str, batch: int) -> Any:
        """The compiled pipeline that makes such calls."""
        if way == SEQUENTIAL:
            return self._step_by_step
        if batch == 1 or self.settings.plan is not None:
            return self._fast
        self._prepare(kind, way, 1)
        plan = self._plans[kind]
        if plan is None:
            return self._fast
        if plan not in self._by_plan:
            self._by_plan[plan] = compile(self._pipe, plan=plan, **self._options)
        return self._by_plan[plan]


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


def _check_steps(of_plan: int, settings: ServerSettings) -> None:
    if settings.steps != (of_plan,):
        given = ", ".join(map(str, settings.steps))
        raise PlanMismatch(
            f"The plan in {settings.plan} is for {of_plan} steps, and the server was set to {given}. "
            f"Set it to {of_plan} steps."
        )


def _is_due(refinement: Refinement, steps: int, shown: int, wanted: int) -> bool:
    """Whether a preview is shown. Those in the middle of a run are spread over it."""
    if shown >= wanted:
        return False
    if refinement.kind == ITERATION:  # how many there will be is not known
        return True
    return refinement.iteration * (wanted + 1) >= steps * (shown + 1)
