"""One call's window of files: signers that run ahead, stories in the loop's thread, and the caller's thread.

Used by `presigned`. Signing is a blocking call, so a few threads do it, and only as far ahead as the window goes: a URL
is used soon after it was signed, and memory is bounded however many items there are. Each signed item becomes a story
(`story.py`), which the loop's thread tells without a thread of its own. The caller's thread reports to the watch, and
ends the batch: at the first failure, at the halt, or when all is done.

Every hand-over between these threads is in bulk: the loop is woken only where it sleeps, and it tells the caller what
has ended when it has nothing better to do, or when much has. A hand-over costs about as much as a file of 4 KiB.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from jobfetcher.core.errors import JobFault, WorkerFault, WorkerReason
from jobfetcher.core.ports import Download, Upload, Watch
from jobfetcher.core.run import Stored
from jobfetcher.core.urls import SignedRequest
from jobfetcher.transfer.multi import TransferLoop
from jobfetcher.transfer.story import Resume, Story, Tale

Item = TypeVar("Item", bound=Download | Upload)

#: What signing gave: a request, or why there is none.
Signed = SignedRequest | BaseException

#: Progress is told at most this often, so that a fast link does not drown the caller.
_TELL_EVERY_S = 0.1

#: But so many bytes that are to come are told at once, since the disk may not have room for them.
_MUCH = 8 * 1024**2

#: Files that ended are told when there are so many, or at the latest after so many seconds. In that time a fast store
#: brings twenty more, which then cost one hand-over together.
_TELL_AT_ONCE = 32
_KEEP_BACK_S = 0.002

#: The window holds so many seconds' worth of files, and no more than so many, however fast they go.
_WINDOW_S = 0.02
_MOST_WINDOW = 256

#: An ended batch gets this long to close its files; only one that hangs in a blocking call needs more.
_LEAVE_S = 1.0

#: Signing that takes less costs a thread's time, not the wire's: one signer is as fast as several.
_SLOW_SIGN_S = 0.001


class Ended(Exception):
    """The batch is over; raised in what it still does aside, heard by nobody."""


class Batch(Generic[Item]):
    """What one call shares. Its stories, and all methods without a word on threads, belong to the loop's thread."""

    def __init__(
        self,
        loop: TransferLoop,
        tell: Callable[[Item, Signed, Batch[Item]], Tale[Stored]],
        *,
        threads: int,
    ) -> None:
        self.loop = loop
        self.closed = threading.Event()
        self.bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.news: deque[tuple[Item, Story[Stored]]] = deque()
        self.progress: deque[tuple[int, int]] = deque()
        self.words: deque[Callable[[Watch], None]] = deque()
        self.why_lost = ""
        self._tell, self._threads = tell, threads
        self._stories: dict[Story[Stored], Item] = {}
        self._signed: deque[tuple[Item, Signed]] = deque()
        self._called = self._ended = False
        self._expected = self._moved = self._untold = 0
        self._told_at = time.monotonic()
        self._rung_at = 0.0
        self._pool: ThreadPoolExecutor | None = None

    # -- from other threads ------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise Ended in a call aside whose work nobody wants any more. From any thread."""
        if self._ended:
            raise Ended

    def begin(self, item: Item, signed: Signed) -> None:
        """Have the story of `item` told. From a signer's thread."""
        self._signed.append((item, signed))
        if not self._called:  # else the loop has been called and not yet looked
            self._called = True
            self.call(self._take)

    def lost(self, why: str) -> None:
        """The loop has ended."""
        self.why_lost = why
        self._end()
        self.bell.put(None)

    def end(self) -> None:
        """Nothing more is wanted: abort what is going on. From the caller's thread."""
        self._ended = True
        self.call(self._end)
        self.closed.wait(_LEAVE_S)
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self.loop.leave(self)

    def call(self, do: Callable[[], None]) -> None:
        """Have `do` called in the loop's thread; if it raises, only this batch is lost."""

        def safely() -> None:
            try:
                do()
            except Exception as error:
                self.lost(f"a transfer failed: {error!r}")

        self.loop.call(safely)

    def take_progress(self) -> tuple[int, int]:
        """Bytes expected and moved that were not told yet. From the caller's thread, when no story runs any more."""
        left = self._expected, self._moved
        self._expected = self._moved = 0
        return left

    # -- in the loop's thread ----------------------------------------------------------------------------------------

    def expect(self, size: int) -> None:
        """Count bytes that are still to come."""
        self._expected += size

    def moved(self, size: int) -> None:
        """Count bytes that came or went."""
        self._moved += size

    def trouble(self, item: Item, why: str, for_s: float | None) -> None:
        """Have the watch told that `item` is tried again, or that this is over (no reason)."""
        self._say(lambda watch: watch.retrying(item, why, for_s) if why else watch.recovered(item))

    def notice(self, item: Item, what: str) -> None:
        """Have the watch told something about `item`."""
        self._say(lambda watch: watch.noticed(item, what))

    def _say(self, say: Callable[[Watch], None]) -> None:
        self.words.append(say)
        self.bell.put(None)

    def hashers(self) -> ThreadPoolExecutor:
        """Threads for hashing."""
        return self.loop.hashers

    def aside(self, do: Callable[[], object], then: Resume) -> Callable[[], bool]:
        """See `story.Teller`. The threads are this batch's: one whose source hangs holds up no other.

        Raises Ended when nobody wants it any more, WorkerFault when there is no thread for it.
        """
        self.check()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="transfer-aside")
        future: Future[object] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    result = do()
                except BaseException as error:
                    future.set_exception(error)
                else:
                    future.set_result(result)

        def ended(future: Future[object]) -> None:
            if not future.cancelled():
                error = future.exception()
                self.call(lambda: then(None if error else future.result(), error))

        future.add_done_callback(ended)
        try:
            self._pool.submit(run)
        except RuntimeError as error:  # no new thread; but the call is queued, and a thread there is may have begun it
            if future.cancel():
                raise _no_thread(error) from error
        return future.cancel

    def flush(self) -> bool:
        """Tell the caller's thread what there is to tell, if it is much, or old, or all."""
        now = time.monotonic()
        late = now - self._told_at >= _TELL_EVERY_S
        if self._expected >= _MUCH or (late and (self._expected or self._moved)):
            self._told_at = now
            self.progress.append(self.take_progress())
        elif not self._untold:
            return False
        elif self._untold < _TELL_AT_ONCE and self._stories and now - self._rung_at < _KEEP_BACK_S:
            return True
        self._rung_at = now
        self._untold = 0
        self.bell.put(None)
        return False

    def _take(self) -> None:
        self._called = False
        while self._signed:
            item, signed = self._signed.popleft()
            if self._ended:
                continue
            story = Story(self._tell(item, signed, self), self, self._on_end)
            self._stories[story] = item
            story.step()

    def _on_end(self, story: Story[Stored]) -> None:
        self.news.append((self._stories.pop(story), story))
        self._untold += 1
        if self._ended and not self._stories:
            self.closed.set()

    def _end(self) -> None:
        self._ended = True
        self._signed.clear()
        for story in list(self._stories):
            story.close()
        if not self._stories:
            self.closed.set()


class _Signers(Generic[Item]):
    """Threads that take items, sign them and hand them to the batch.

    At most `window` are taken and not told as done yet; more where files go by so fast that it would soon be empty.

    The first one starts the next only while signing takes long, so that signatures that cost nothing cost no threads.
    """

    def __init__(
        self,
        items: Iterable[Item],
        sign: Callable[[Item], SignedRequest],
        batch: Batch[Item],
        *,
        most: int,
        window: int,
    ) -> None:
        self.failure: BaseException | None = None
        self._items, self._sign, self._batch, self._most = iter(items), sign, batch, most
        # Who walks holds no lock that others need: what was sent before is passed over here, for as long as that takes.
        self._walk = threading.Lock()
        self._lock = threading.Lock()
        self._room = threading.Condition(self._lock)
        self._free = self._window = self._least_window = window
        self._counted, self._counted_at = 0, time.monotonic()
        self._taken = self._told = self._threads = self._idle = 0
        self._exhausted = threading.Event()
        self._slow = True  # until it is known better
        try:
            self._start()
        except RuntimeError as error:
            raise _no_thread(error) from error

    @property
    def is_done(self) -> bool:
        """Whether all items there are were told as done."""
        return self._exhausted.is_set() and self._told == self._taken

    def told(self, count: int) -> None:
        """So many items are done with."""
        with self._lock:
            self._told += count
            self._free += count
            now = time.monotonic()
            if now - self._counted_at >= 0.05:
                rate = (self._told - self._counted) / (now - self._counted_at)
                window = max(self._least_window, min(_MOST_WINDOW, int(rate * _WINDOW_S)))
                self._free += window - self._window
                self._window, self._counted, self._counted_at = window, self._told, now
            if self._idle:
                self._room.notify(min(count, self._idle))

    def close(self) -> None:
        """No more items are wanted."""
        with self._lock:
            self._exhausted.set()
            self._room.notify_all()

    def _start(self) -> None:
        threading.Thread(target=self._run, name="transfer-sign", daemon=True).start()
        self._threads += 1

    def _run(self) -> None:
        while (item := self._take()) is not None:
            began = time.monotonic()
            signed: Signed
            try:
                signed = self._sign(item)
            except BaseException as error:
                signed = error
            self._slow = time.monotonic() - began > _SLOW_SIGN_S
            self._batch.begin(item, signed)

    def _take(self) -> Item | None:
        with self._lock:
            while self._free <= 0 and not self._exhausted.is_set():
                self._idle += 1
                self._room.wait()
                self._idle -= 1
            if self._exhausted.is_set():
                return None
            self._free -= 1
        with self._walk:
            if self._exhausted.is_set():
                return None
            try:
                item = next(self._items, None)
            except BaseException as error:
                self.failure, item = error, None
            with self._lock:
                if item is None or self._exhausted.is_set():  # the end, or closed meanwhile
                    self._exhausted.set()
                    self._room.notify_all()
                    self._batch.bell.put(None)
                    return None
                self._taken += 1
                if self._slow and not self._idle and self._free > 0 and self._threads < self._most:
                    with contextlib.suppress(RuntimeError):  # no new thread: those there are sign them all
                        self._start()
                return item


def run(
    items: Iterable[Item],
    sign: Callable[[Item], SignedRequest],
    tell: Callable[[Item, Signed, Batch[Item]], Tale[Stored]],
    watch: Watch,
    loop: TransferLoop,
    *,
    signers: int,
    window: int,
    go_on: bool,
) -> None:
    """Tell the story of each item, signed; `window` of them at a time.

    `go_on`: past a JobFault or WorkerFault; the first one is raised at the end.
    """
    watch.halt.check()
    batch: Batch[Item] = Batch(loop, tell, threads=signers)
    loop.join(batch)
    failure: JobFault | WorkerFault | None = None
    supply: _Signers[Item] | None = None
    try:
        with watch.halt.waking(lambda: batch.bell.put(None)):
            supply = _Signers(items, sign, batch, most=signers, window=window)
            while not supply.is_done:
                batch.bell.get()
                watch.halt.check()
                if supply.failure is not None:
                    raise supply.failure
                while batch.progress:
                    _tell(batch.progress.popleft(), watch)
                while batch.words:
                    batch.words.popleft()(watch)
                done = 0
                for item, story in _drain(batch):
                    done += 1
                    if story.error is None and story.result is not None:
                        watch.done(item, story.result)
                    elif go_on and isinstance(story.error, JobFault | WorkerFault):
                        failure = failure or story.error
                    elif story.error is not None and not isinstance(story.error, Ended):
                        raise story.error
                if batch.why_lost:
                    raise WorkerFault(WorkerReason.INTERNAL, batch.why_lost)
                supply.told(done)
            if supply.failure is not None:  # it may have come while the last ones were reported
                raise supply.failure
            _tell(batch.take_progress(), watch)
            while batch.words:
                batch.words.popleft()(watch)
    finally:
        if supply is not None:
            supply.close()
        batch.end()
    if failure is not None:
        raise failure


def _drain(batch: Batch[Item]) -> Iterator[tuple[Item, Story[Stored]]]:
    with contextlib.suppress(IndexError):
        while True:
            yield batch.news.popleft()


def _tell(progress: tuple[int, int], watch: Watch) -> None:
    expected, moved = progress
    if moved:  # first: what is here already takes no more of the disk's room
        watch.moved(moved)
    if expected:
        watch.expect(expected)


def _no_thread(error: RuntimeError) -> WorkerFault:
    return WorkerFault(WorkerReason.INTERNAL, f"a thread for transfers cannot be started: {error}")
