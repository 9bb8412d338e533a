"""One call's window of files: a few workers, each telling one file's story at a time, and the caller's thread.

Used by `presigned`. The bytes move in the loop's thread; a worker signs (a blocking call), waits, verifies and tries
again. That keeps the story of one file a straight line, and several signing calls go on at once. The caller's thread
feeds the window, reports to the watch, and ends the batch: at the first failure, at the halt, or when all is done.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from jobfetcher.core.errors import JobFault, WorkerFault
from jobfetcher.core.ports import Download, Upload, Watch
from jobfetcher.core.run import Stored
from jobfetcher.transfer.exchange import Exchange
from jobfetcher.transfer.multi import TransferLoop

Item = TypeVar("Item", Download, Upload)

#: Progress is told at most this often, so that a fast link does not drown the caller.
_TELL_EVERY_S = 0.1

#: Workers of an ended batch get this long; only one that hangs in a signing call, holding nothing open, needs more.
_LEAVE_S = 1.0


class Ended(Exception):
    """The batch is over; raised in its workers, heard by nobody."""


class Batch:
    """What the workers of one call share. `ended` is set once, when nothing more is wanted."""

    def __init__(self, loop: TransferLoop) -> None:
        self.ended = threading.Event()
        self.events: queue.SimpleQueue[Future[Stored] | None] = queue.SimpleQueue()
        self._loop = loop
        self._lock = threading.Lock()
        self._active: set[Exchange] = set()
        self._expected = self._moved = 0
        self._told_at = time.monotonic()

    def check(self) -> None:
        """Raise Ended in a worker whose work nobody wants any more."""
        if self.ended.is_set():
            raise Ended

    def perform(self, exchange: Exchange) -> None:
        """Run an exchange on the loop; it is aborted when the batch ends."""
        with self._lock:
            self.check()
            self._active.add(exchange)
        try:
            self._loop.perform(exchange)
        finally:
            with self._lock:
                self._active.discard(exchange)
        self.check()

    def moved(self, size: int) -> None:
        """Count bytes, from any thread; the caller's thread tells them on."""
        with self._lock:
            self._moved += size
            now = time.monotonic()
            if now - self._told_at < _TELL_EVERY_S:
                return
            self._told_at = now
        self.events.put(None)

    def expect(self, size: int) -> None:
        """Count bytes that are still to come, from any thread."""
        with self._lock:
            self._expected += size

    def take_news(self) -> tuple[int, int]:
        """Bytes expected and bytes moved that were not told yet."""
        with self._lock:
            news = self._expected, self._moved
            self._expected = self._moved = 0
        return news

    def end(self) -> None:
        """Nothing more is wanted: abort what is going on."""
        with self._lock:
            self.ended.set()
            active = list(self._active)
        for exchange in active:
            self._loop.abort(exchange)


def run(
    items: Iterable[Item],
    work: Callable[[Item, Batch], Stored],
    watch: Watch,
    loop: TransferLoop,
    *,
    width: int,
    go_on: bool,
) -> None:
    """Do `work` for all items, `width` at a time.

    `go_on`: past a JobFault or WorkerFault; the first one is raised at the end.
    """
    watch.halt.check()
    batch = Batch(loop)
    pool = ThreadPoolExecutor(width, thread_name_prefix="transfer")
    open_items: dict[Future[Stored], Item] = {}
    failure: JobFault | WorkerFault | None = None

    def feed(source: Iterator[Item]) -> None:
        # Twice the width, so that no worker waits while the caller's thread reports.
        while len(open_items) < 2 * width and (item := next(source, None)) is not None:
            future = pool.submit(work, item, batch)
            open_items[future] = item
            future.add_done_callback(batch.events.put)

    try:
        with watch.halt.waking(lambda: batch.events.put(None)):
            source = iter(items)
            feed(source)
            while open_items:
                event = batch.events.get()
                watch.halt.check()
                if event is None:
                    _tell(batch, watch)
                    continue
                item = open_items.pop(event)
                try:
                    stored = event.result()
                except (JobFault, WorkerFault) as error:
                    if not go_on:
                        raise
                    failure = failure or error
                else:
                    watch.done(item, stored)
                feed(source)
            _tell(batch, watch)
    finally:
        batch.end()
        pool.shutdown(wait=False, cancel_futures=True)
        wait(open_items, timeout=_LEAVE_S)
    if failure is not None:
        raise failure


def _tell(batch: Batch, watch: Watch) -> None:
    expected, moved = batch.take_news()
    if expected:
        watch.expect(expected)
    if moved:
        watch.moved(moved)
