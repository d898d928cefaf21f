"""The dispatcher over a runner whose calls end when a test says so: no request is lost, and none is mixed up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any

import pytest

from srds_fast.planner.cost_curve import CostCurve
from srds_fast.serving.batching import PARALLEL, CallCosts, Warmed
from srds_fast.serving.contract import ImageRequest, ImageResult, PartialImage, Refused, Usage
from srds_fast.serving.dispatcher import Dispatcher
from srds_fast.serving.kinds import Kind
from srds_fast.serving.metrics import Metrics
from srds_fast.serving.settings import ServerSettings

pytest.importorskip("prometheus_client")

WORK = Usage(seconds=0.0, queued_seconds=0.0, waves=10, rows=100, plan="a plan")
COSTS = CallCosts(CostCurve((1, 1000), (0.1, 0.1)), (10,) * 10, 50)


def asked(prompt: str, **more: Any) -> ImageRequest:
    return ImageRequest(prompt, 50, **more)


class Runner:
    """Calls wait until `end`. Images are the prompts."""

    def __init__(self, slots: int = 1) -> None:
        self.number, self.begun, self.cancelled = slots, list[list[str]](), list[list[str]]()
        self._ends: list[asyncio.Future[None]] = []

    def slots(self) -> int:
        return self.number

    async def generate(self, requests: Sequence[ImageRequest], way: str) -> list[ImageResult]:
        await self._wait([each.prompt for each in requests])
        return [ImageResult((each.prompt.encode(),), WORK) for each in requests]

    async def stream(self, request: ImageRequest) -> AsyncGenerator[PartialImage | ImageResult, None]:
        yield PartialImage(b"early", 0)
        await self._wait([request.prompt])
        yield ImageResult((request.prompt.encode(),), WORK)

    async def _wait(self, prompts: list[str]) -> None:
        self.begun.append(prompts)
        self._ends.append(asyncio.get_running_loop().create_future())
        try:
            await self._ends[-1]
        except asyncio.CancelledError:
            self.cancelled.append(prompts)
            raise

    def end(self, error: Exception | None = None) -> None:
        """The call that has run longest ends."""
        end = next(each for each in self._ends if not each.done())
        end.set_result(None) if error is None else end.set_exception(error)


async def settled() -> None:
    """All that can go on has gone on."""
    for _ in range(20):
        await asyncio.sleep(0)


Test = Callable[[Runner, Dispatcher, Metrics], Awaitable[None]]


def run(test: Test, slots: int = 1, **settings: Any) -> None:
    async def main() -> None:
        runner, metrics = Runner(slots), Metrics()
        given = ServerSettings(replicas=0, **settings)
        dispatcher = Dispatcher(runner, given, metrics)
        dispatcher.prepare(Warmed((1, 2, 4), ((Kind.of(asked("")), COSTS),)))
        await test(runner, dispatcher, metrics)

    asyncio.run(main())


def test_those_that_wait_share_a_call_and_each_gets_its_own_images() -> None:
    async def test(runner: Runner, dispatcher: Dispatcher, metrics: Metrics) -> None:
        tasks = [asyncio.create_task(dispatcher.generate(asked(name))) for name in "abcde"]
        await settled()
        assert runner.begun == [["a"]]
        runner.end()
        await settled()
        assert runner.begun == [["a"], ["b", "c", "d", "e"]]
        runner.end()
        found = await asyncio.gather(*tasks)
        assert [each.images[0].decode() for each in found] == list("abcde")
        assert [each.usage.batch for each in found] == [1, 4, 4, 4, 4]
        assert all(0 <= each.usage.queued_seconds <= each.usage.seconds for each in found)
        text = metrics.text()
        assert 'srds_fast_requests_total{status="200"} 5.0' in text
        assert 'srds_fast_calls_total{plan="a plan",way="parallel"} 2.0' in text
        assert "srds_fast_batch_sum 5.0" in text
        assert "srds_fast_queue_length 0.0" in text

    run(test)


def test_a_call_ends_once_all_of_its_clients_have_left() -> None:
    async def test(runner: Runner, dispatcher: Dispatcher, metrics: Metrics) -> None:
        first, *others = [asyncio.create_task(dispatcher.generate(asked(name))) for name in "abc"]
        await settled()
        runner.end()
        await settled()
        assert runner.begun[-1] == ["b", "c"]
        others[0].cancel()
        await settled()
        assert not runner.cancelled, "the other one still waits for it"
        others[1].cancel()
        await settled()
        assert runner.cancelled == [["b", "c"]]
        assert (await first).images == (b"a",)
        assert 'srds_fast_requests_total{status="499"} 2.0' in metrics.text()
        again = asyncio.create_task(dispatcher.generate(asked("d")))
        await settled()
        assert runner.begun[-1] == ["d"], "the device is free again"
        runner.end()
        await again

    run(test)


def test_a_client_that_leaves_before_its_call_has_begun_costs_no_call() -> None:
    async def test(runner: Runner, dispatcher: Dispatcher, metrics: Metrics) -> None:
        tasks = [asyncio.create_task(dispatcher.generate(asked(name))) for name in "ab"]
        await settled()
        tasks[1].cancel()
        await settled()
        runner.end()
        await settled()
        assert runner.begun == [["a"]]
        # and one that leaves in the very turn of the loop in which its call begins
        third = asyncio.create_task(dispatcher.generate(asked("c")))
        await asyncio.sleep(0)
        third.cancel()
        await settled()
        fourth = asyncio.create_task(dispatcher.generate(asked("d")))
        await settled()
        assert runner.begun[-1] == ["d"]
        runner.end()
        await fourth

    run(test)


def test_a_stream_has_a_call_of_its_own_and_ends_with_the_client() -> None:
    async def test(runner: Runner, dispatcher: Dispatcher, metrics: Metrics) -> None:
        running = asyncio.create_task(dispatcher.generate(asked("a")))
        await settled()
        found: list[Any] = []

        async def read() -> None:
            async for item in dispatcher.stream(asked("b", partial_images=1)):
                found.append(item)

        reading = asyncio.create_task(read())
        beside = asyncio.create_task(dispatcher.generate(asked("c")))
        await settled()
        runner.end()
        await settled()
        assert found == [PartialImage(b"early", 0)]
        runner.end()
        await settled()
        assert found[-1].images == (b"b",)
        assert found[-1].usage.batch == 1
        runner.end()
        await asyncio.gather(running, reading, beside)
        left = dispatcher.stream(asked("e"))
        assert await anext(left) == PartialImage(b"early", 0)
        await settled()
        await left.aclose()
        await settled()
        assert runner.cancelled == [["e"]]

    run(test)


@pytest.mark.parametrize(
    ("error", "status"),
    [(Refused(503, "lost", code="replica_lost", retry_after=1.0), 503), (ValueError("no traceback"), 500)],
)
def test_a_failed_call_fails_its_requests_alone(error: Exception, status: int) -> None:
    async def test(runner: Runner, dispatcher: Dispatcher, metrics: Metrics) -> None:
        tasks = [asyncio.create_task(dispatcher.generate(asked(name))) for name in "abc"]
        await settled()
        runner.end()
        await settled()
        runner.end(error)
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(answers[0], ImageResult)
        for answer in answers[1:]:
            assert isinstance(answer, Refused)
            assert answer.status == status
            assert "traceback" not in answer.message

    run(test)


def test_without_a_replica_requests_are_refused_until_there_is_one() -> None:
    async def test(runner: Runner, dispatcher: Dispatcher, metrics: Metrics) -> None:
        with pytest.raises(Refused, match="No replica is ready") as refused:
            await dispatcher.generate(asked("a"))
        assert refused.value.status == 503
        assert refused.value.retry_after
        runner.number = 1
        dispatcher.wake()
        later = asyncio.create_task(dispatcher.generate(asked("b")))
        waits = asyncio.create_task(dispatcher.generate(asked("c")))
        await settled()
        runner.number = 2  # another replica takes who waits
        dispatcher.wake()
        await settled()
        assert runner.begun == [["b"], ["c"]]
        runner.end()
        runner.end()
        await asyncio.gather(later, waits)

    run(test, slots=0)


def test_who_waits_is_told_when_no_replica_is_left() -> None:
    async def test(runner: Runner, dispatcher: Dispatcher, metrics: Metrics) -> None:
        running, waits = [asyncio.create_task(dispatcher.generate(asked(name))) for name in "ab"]
        await settled()
        runner.number = 0
        dispatcher.wake()
        with pytest.raises(Refused, match="No replica is ready") as refused:
            await waits
        assert refused.value.status == 503
        runner.end()
        assert (await running).images == (b"a",), "its own replica still ends it"
        assert len(runner.begun) == 1

    run(test)


def test_a_server_that_ends_answers_who_is_in_and_refuses_who_comes() -> None:
    async def test(runner: Runner, dispatcher: Dispatcher, metrics: Metrics) -> None:
        tasks = [asyncio.create_task(dispatcher.generate(asked(name))) for name in "ab"]
        await settled()
        draining = asyncio.create_task(dispatcher.drain(60))
        await settled()
        with pytest.raises(Refused, match="shutting down") as refused:
            await dispatcher.generate(asked("c"))
        assert refused.value.status == 503
        runner.end()
        await settled()
        runner.end()
        await draining
        assert [each.images for each in await asyncio.gather(*tasks)] == [(b"a",), (b"b",)]

    run(test)


def test_a_server_that_may_wait_no_longer_refuses_who_is_not_answered() -> None:
    async def test(runner: Runner, dispatcher: Dispatcher, metrics: Metrics) -> None:
        tasks = [asyncio.create_task(dispatcher.generate(asked(name))) for name in "ab"]
        await settled()
        await dispatcher.drain(0)
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(each, Refused) and each.status for each in answers] == [503, 503]
        assert runner.begun == [["a"]], "no call begins that nobody would get"
        assert runner.cancelled == [["a"]]

    run(test)


def test_predictions_follow_what_calls_take() -> None:
    async def test(runner: Runner, dispatcher: Dispatcher, metrics: Metrics) -> None:
        with pytest.raises(Refused, match=r"predicted to take 1\.00 seconds"):  # 10 waves of 0.1 s
            await dispatcher.generate(asked("a", deadline=0.5))
        assert COSTS.seconds(PARALLEL, 1) == pytest.approx(1.0)
        call = asyncio.create_task(dispatcher.generate(asked("b")))
        await settled()
        runner.end()
        await call  # it took next to nothing
        again = asyncio.create_task(dispatcher.generate(asked("c", deadline=0.5)))
        await settled()
        runner.end()
        assert (await again).images == (b"c",)

    run(test)
