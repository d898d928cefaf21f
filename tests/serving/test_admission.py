"""The queue: order of arrival, deadlines that are kept, and nothing that is lost."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srds_fast.serving.admission import Queue
from srds_fast.serving.batching import Policy, Waiting
from srds_fast.serving.contract import Refused

SIZES = (1, 2, 4)


def seconds(shape: object, way: str, images: int) -> float:
    """Odd on purpose: three images take longer than four, as where calls are prepared for four."""
    alone = {"a": 1.0, "b": 2.5, "c": 0.3}[str(shape)]
    factor = {1: 1.0, 2: 1.3, 3: 2.4, 4: 1.9}.get(images, images)
    return alone * factor * (1.0 if way == "parallel" else 1.4 - 0.2 * min(images, 4))


@dataclass
class Server:
    """A clock, devices that take exactly what was predicted, and a queue."""

    devices: int
    most: int = 100
    now: float = 0.0
    running: list[tuple[float, int, tuple[Waiting, ...]]] = field(default_factory=list)
    ended: dict[int, float] = field(default_factory=dict)
    begun: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.queue = Queue(Policy(sizes=SIZES), seconds, self.most)

    def free(self) -> list[float]:
        busy = [end for end, _, _ in self.running]
        return [self.now] * (self.devices - len(busy)) + busy

    def begin(self) -> None:
        while len(self.running) < self.devices and (call := self.queue.next()) is not None:
            self.begun.append(call.members[0].number)
            end = self.now + call.seconds(seconds)
            heapq.heappush(self.running, (end, call.members[0].number, call.members))

    def until(self, time: float) -> None:
        while self.running and self.running[0][0] <= time:
            self.now, _, members = heapq.heappop(self.running)
            for each in members:
                assert each.number not in self.ended, "answered once"
                self.ended[each.number] = self.now
            self.begin()
        self.now = max(self.now, time) if time < float("inf") else self.now

    def ask(self, kind: str, images: int = 1, deadline: float | None = None, streamed: bool = False) -> Waiting:
        due = None if deadline is None else self.now + deadline
        found = self.queue.admit(None if streamed else kind, kind, images, due, self.free(), self.now)
        self.begin()
        return found


events = st.lists(
    st.tuples(
        st.floats(0.0, 2.0),  # seconds after the event before
        st.sampled_from(["a", "a", "a", "b", "c"]),
        st.integers(1, 3),
        st.one_of(st.none(), st.floats(0.1, 12.0)),
        st.booleans(),
        st.one_of(st.none(), st.integers(0, 12)),  # which of those that wait leaves then
    ),
    max_size=25,
)


@given(events, st.integers(1, 3))
def test_whom_the_queue_lets_in_is_answered_in_time_whoever_leaves(
    events: list[tuple[float, str, int, float | None, bool, int | None]], devices: int
) -> None:
    server = Server(devices)
    admitted: dict[int, Waiting] = {}
    left: set[int] = set()
    for gap, kind, images, deadline, streamed, leaving in events:
        server.until(server.now + gap)
        new = refused = None
        try:
            new = server.ask(kind, images, deadline, streamed)
        except Refused as why:
            refused = why
        if new is not None:
            admitted[new.number] = new
        if refused is not None:
            assert deadline is not None, "without a deadline nobody is refused while there is room"
            assert refused.status in (422, 429)
            assert (refused.retry_after is None) == (refused.status == 422)
        waiting = server.queue.waiting
        if leaving is not None and leaving < len(waiting):
            left.add(waiting[leaving].number)
            server.queue.leave(waiting[leaving], server.free())
            assert len(server.queue) == len(waiting) - 1
            server.begin()
    server.until(float("inf"))
    assert len(server.queue) == 0
    assert set(admitted) - left <= set(server.ended) <= set(admitted)
    for number, each in admitted.items():
        if each.due is not None and number not in left:
            assert server.ended[number] <= each.due + 1e-9


@given(events, st.integers(1, 3))
def test_calls_begin_in_order_of_arrival(
    events: list[tuple[float, str, int, float | None, bool, int | None]], devices: int
) -> None:
    server = Server(devices)
    for gap, kind, images, _, streamed, leaving in events:
        server.until(server.now + gap)
        server.ask(kind, images, None, streamed)
        waiting = server.queue.waiting
        if leaving is not None and leaving < len(waiting):
            server.queue.leave(waiting[leaving], server.free())
            server.begin()
    server.until(float("inf"))
    assert server.begun == sorted(server.begun)


def test_a_request_that_waits_too_long_is_told_the_predicted_seconds() -> None:
    server = Server(1)
    server.ask("b")
    server.ask("b")
    with pytest.raises(Refused, match=r"predicted in 6\.00 seconds, 1\.00 of them for the sampling") as refused:
        server.ask("a", deadline=5.0)
    assert refused.value.status == 429
    assert refused.value.retry_after == pytest.approx(1.0)
    assert refused.value.code == "deadline_cannot_be_met"
    server.ask("a", deadline=6.0)


def test_a_deadline_shorter_than_the_sampling_is_no_matter_of_load() -> None:
    with pytest.raises(Refused, match=r"the sampling alone is predicted to take 2\.50 seconds") as refused:
        Server(1).ask("b", deadline=2.0)
    assert refused.value.status == 422
    assert refused.value.retry_after is None
    assert refused.value.parameter == "X-Deadline-Ms"


def test_a_request_that_would_make_another_one_late_is_refused() -> None:
    server = Server(1)
    server.ask("b")
    server.ask("a", deadline=3.6)  # its answer comes after 3.5 seconds, after 3.8 if another one shares its call
    with pytest.raises(Refused):
        server.ask("a", deadline=4.0)
    server.ask("a", deadline=4.6)


def test_a_full_queue_refuses_and_says_when_to_come_again() -> None:
    server = Server(1, most=2)
    for _ in range(3):  # one runs, two wait
        server.ask("b", streamed=True)
    with pytest.raises(Refused, match="2 requests wait, and no more may") as refused:
        server.ask("b")
    assert refused.value.status == 429
    assert refused.value.code == "queue_full"
    assert refused.value.retry_after == pytest.approx(5.0)


def test_a_queue_for_nobody_takes_requests_while_a_device_is_free() -> None:
    server = Server(1, most=0)
    server.ask("a")
    with pytest.raises(Refused):
        server.ask("a")


def test_a_new_device_takes_a_part_of_the_queue() -> None:
    server = Server(1)
    for _ in range(3):
        server.ask("b", streamed=True)
    server.devices = 2
    server.queue.replan(server.free())
    server.begin()
    server.until(float("inf"))
    assert server.now == pytest.approx(5.0)
