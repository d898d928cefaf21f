"""The clock that decides stands still while Python collects garbage, and in functions of the user."""

from __future__ import annotations

import gc
import threading
import time

from srds_fast import clock


def test_collections_of_garbage_are_left_out() -> None:
    clock.pauses()  # it watches from now on
    kept = [[number] for number in range(200_000)]  # a collection of all objects has to look at these
    began_all, began = time.perf_counter(), clock.now()
    before = clock.pauses()
    for _ in range(3):
        gc.collect()
    left_out = clock.pauses() - before
    passed = clock.now() - began
    passed_in_all = time.perf_counter() - began_all
    assert len(kept) == 200_000
    assert left_out > 0
    assert passed + left_out <= passed_in_all + 1e-9, "each reading lies within the ones around it"


def test_collections_are_watched_once_however_many_threads_ask() -> None:
    threads = [threading.Thread(target=clock.now) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert sum(getattr(each, "__self__", None) is clock._pauses for each in gc.callbacks) == 1


def test_functions_of_the_user_are_left_out_in_their_own_thread_alone() -> None:
    began_all, began = time.perf_counter(), clock.now()
    others: list[float] = []

    def other() -> None:
        with clock.stopped():
            gc.collect()
        others.append(clock.stopped_seconds())

    before = clock.stopped_seconds()
    with clock.stopped():
        with clock.stopped():  # of a call within the function
            time.sleep(0.02)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    left_out, passed = clock.stopped_seconds() - before, clock.now() - began
    assert left_out >= 0.02
    assert passed + left_out <= time.perf_counter() - began_all + 1e-9, "nothing is left out twice"
    assert len(others) == 1
