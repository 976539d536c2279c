"""Work done ahead in threads, with results in the order of the work."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


def mapped(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """`map` with up to `threads` calls running and twice as many ahead; 0 = none ahead.

    `items` is walked in the caller's thread only.
    """
    if not threads:
        yield from map(function, items)
        return
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="sterna-data") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class Ahead(Iterator[T]):
    """An iterator walked by a thread of its own, `depth` items ahead. Its errors are raised
    here, in their place. `close` ends the thread; a closed one is over."""

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._queue: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
        self._stop = threading.Event()
        self._is_over = False
        self._thread = threading.Thread(target=self._walk, args=(items,), daemon=True)
        self._thread.start()

    def _walk(self, items: Iterator[T]) -> None:
        try:
            for item in items:
                if not self._put((True, item)):
                    return
            self._put((False, None))
        except BaseException as error:  # noqa: BLE001 - raised again in the reader's thread
            self._put((False, error))
        finally:
            close = getattr(items, "close", None)
            if close is not None:
                close()

    def _put(self, entry: tuple[bool, Any]) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def __next__(self) -> T:
        if self._is_over:
            raise StopIteration
        is_item, value = self._queue.get()
        if is_item:
            item: T = value
            return item
        self._is_over = True
        if value is not None:
            raise value
        raise StopIteration

    def close(self) -> None:
        """End the thread and wait for it."""
        self._is_over = True
        self._stop.set()
        self._thread.join()
