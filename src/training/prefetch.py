"""Batches prepared ahead by a thread, so that a step never waits for the disk."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


def prefetched(make: Callable[[int], T], first: int, stop: int, depth: int) -> Iterator[T]:
    """``make(first)``, … ``make(stop − 1)`` in order, up to ``depth`` of them made before they are asked for.

    ``make`` must depend on its argument alone. Its exceptions are raised where its item is asked for. With ``depth``
    0 there is no thread.
    """
    if depth < 1:
        yield from (make(index) for index in range(first, stop))
        return
    ready: queue.Queue = queue.Queue(maxsize=depth)
    ended = threading.Event()

    def put(item: object) -> bool:
        while not ended.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        for index in range(first, stop):
            try:
                item = (make(index), None)
            except BaseException as error:  # raised in the consumer
                put((None, error))
                return
            if not put(item):
                return

    thread = threading.Thread(target=work, name="batches", daemon=True)
    thread.start()
    try:
        for _ in range(first, stop):
            item, error = ready.get()
            if error is not None:
                raise error
            yield item
    finally:
        ended.set()
        thread.join()
