"""The clock that decides stands still while Python collects garbage."""

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
