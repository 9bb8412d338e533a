"""The one thread in which all files move: a `CurlMulti` driven by epoll, for all jobs at once.

Used by `batch` and the waits of `story`. The loop owns all handles and connections, and sleeps in epoll whenever there
is nothing to do: sockets wake it, timers, and one eventfd for what other threads ask. They ask by `call`, which wakes
the loop only if it sleeps. Connections are kept alive and bounded, per origin and in all; what is above the bound waits
here, where it does not time out, and the bound follows what the server bears (`limits.Origin`).
"""

from __future__ import annotations

import bisect
import contextlib
import gc
import heapq
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from typing import Protocol

import pycurl

from jobfetcher.core.errors import WorkerFault, WorkerReason
from jobfetcher.transfer.exchange import Exchange, Handle, NetSettings, Stale
from jobfetcher.transfer.limits import Bucket, Origin

_EPOLL = {
    pycurl.POLL_IN: select.EPOLLIN,
    pycurl.POLL_OUT: select.EPOLLOUT,
    pycurl.POLL_INOUT: select.EPOLLIN | select.EPOLLOUT,
}

#: A hostile server may name many others; of so many origins we remember what they bear.
_MOST_ORIGINS = 256

#: A loop that never sleeps lets its members tell so often what happened; one that sleeps wakes for what was kept back.
_FLUSH_EVERY_S = 0.05
_KEEP_BACK_S = 0.002

#: A turn is kept for so long for a file that is signed anew: one call of the API. After that others go on.
_KEEP_TURN_S = 2.0

#: Closing takes milliseconds, unless libcurl waits for a look-up of a name, which nothing can interrupt (only from 8.20
#: on it may be told not to, by CURLMOPT_QUICK_EXIT, which pycurl does not have). Then the thread is left to itself.
_CLOSE_S = 2.0

#: Young objects that are looked through for garbage in circles at a time. With Python's 700, the files that are just on
#: their way are looked through again and again; so many take some 2 MB.
_GC_AFTER = 10_000

#: More than four would take the cores that jobs pay for; one hashes 0.8 to 1.9 GB/s.
_MOST_HASHERS = 4


class Member(Protocol):
    """Somebody whose stories run here: told when the loop pauses, and when it is gone."""

    def flush(self) -> bool:
        """A moment to tell other threads what happened; true if something is kept back. In the loop's thread."""
        ...

    def lost(self, why: str) -> None:
        """The loop has ended, and with it everything that ran. From any thread."""
        ...


class Timer:
    """Something to be done later, unless it is cancelled."""

    __slots__ = ("do",)

    def __init__(self, do: Callable[[], None]) -> None:
        self.do: Callable[[], None] | None = do

    def cancel(self) -> None:
        self.do = None


class TransferLoop:
    """Runs exchanges. The thread starts with the first member and ends with `close`.

    `bandwidth_limit`: bytes a second, each way; None: no limit.
    """

    def __init__(
        self,
        net: NetSettings,
        *,
        max_host_connections: int = 16,
        max_connections: int = 64,
        bandwidth_limit: float | None = None,
    ) -> None:
        self._net = net
        self._max_host, self._max_total = max_host_connections, max_connections
        self.bandwidth_limit = bandwidth_limit
        self._lock = threading.Lock()
        self._asked: deque[Callable[[], None]] = deque()
        self._members: set[Member] = set()
        self._closed = self._asleep = False
        self._flushed_at = 0.0
        self._thread: threading.Thread | None = None
        self._waker = -1
        self._poll: _Poll | None = None
        self._hashers: ThreadPoolExecutor | None = None

    # -- from any thread ---------------------------------------------------------------------------------------------

    def join(self, member: Member) -> None:
        """Have the loop run for `member` until it leaves. Raises WorkerFault when the worker is closing."""
        with self._lock:
            if self._closed:
                raise WorkerFault(WorkerReason.INTERNAL, "files cannot be moved any more: the worker is closing")
            if self._thread is None:
                self._start()
            self._members.add(member)

    def _start(self) -> None:
        try:
            waker = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        except OSError as error:
            raise WorkerFault(WorkerReason.INTERNAL, f"files cannot be moved: {error.strerror}") from error
        thread = threading.Thread(target=self._run, args=(waker,), name="transfer", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            os.close(waker)
            raise WorkerFault(WorkerReason.INTERNAL, f"a thread for transfers cannot be started: {error}") from error
        self._waker, self._thread = waker, thread

    def leave(self, member: Member) -> None:
        """`member` wants nothing more."""
        with self._lock:
            self._members.discard(member)

    def call(self, do: Callable[[], None]) -> None:
        """Have `do` called in the loop's thread, soon, in the order of asking; not at all if the loop is gone."""
        self._asked.append(do)
        if self._asleep:
            self._asleep = False
            self._wake()

    def close(self) -> None:
        """Abort everything, close all connections and end the thread, within about `_CLOSE_S`."""
        with self._lock:
            self._closed = True
            thread = self._thread
        self._wake()
        if thread is not None:
            thread.join(_CLOSE_S)

    def _wake(self) -> None:
        with self._lock:
            if self._waker >= 0:
                with contextlib.suppress(BlockingIOError):  # full: then it is awake anyway
                    os.eventfd_write(self._waker, 1)

    # -- in the loop's thread ----------------------------------------------------------------------------------------

    def start(self, exchange: Exchange) -> None:
        """Run `exchange` as soon as there is a connection for it; its `resume` is called when it has ended."""
        assert self._poll is not None  # noqa: S101 - only the loop's own thread asks
        self._poll.start(exchange)

    def abort(self, exchange: Exchange, code: int, why: str) -> None:
        """End it now with libcurl's `code`; nothing happens if it has ended."""
        if self._poll is not None:
            self._poll.abort(exchange, code, why)

    def later(self, seconds: float, do: Callable[[], None]) -> Timer:
        """Call `do` after so many seconds; never before the caller has returned."""
        return self._here.later(seconds, do)

    def soon(self, do: Callable[[], None]) -> None:
        """Call `do` in this turn, when the caller has returned: from libcurl's callbacks nothing may be begun."""
        self._here.soon(do)

    def free_connections(self, origin: str) -> int:
        """How many more connections `origin` may have now."""
        return self._here.free_connections(origin)

    @property
    def hashers(self) -> ThreadPoolExecutor:
        """Threads for hashing; started when first used."""
        if self._hashers is None:
            threads = min(_MOST_HASHERS, os.cpu_count() or 1)
            self._hashers = ThreadPoolExecutor(threads, thread_name_prefix="transfer-hash")
        return self._hashers

    @property
    def _here(self) -> _Poll:
        assert self._poll is not None  # noqa: S101 - only the loop's own thread asks
        return self._poll

    def _run(self, wakes: int) -> None:
        """The thread. However it ends, nobody is left waiting, and the next member starts a new one."""
        # What is loaded by now stays. Small files leave no garbage in circles, but make so many objects that everything
        # there is would be searched for it every few thousand files: up to a fifth of the time they take, and what is
        # young every few files: another twenty-fifth.
        gc.freeze()
        gc.set_threshold(_GC_AFTER)
        why = "the transfer loop was closed"
        try:
            with _Poll(self._net, self._max_host, self._max_total, self.bandwidth_limit, wakes) as poll:
                self._poll = poll
                while not self._closed:
                    self._answer()
                    if not poll.turn(0.0):
                        self._sleep(poll)
                    elif time.monotonic() - self._flushed_at > _FLUSH_EVERY_S:
                        self._flush()
        except BaseException as error:
            why = f"the transfer loop failed: {error!r}"
            raise
        finally:
            with self._lock:
                self._poll = self._thread = None
                self._waker = -1
                self._asleep = False
                os.close(wakes)
                members, self._members = self._members, set()
                hashers, self._hashers = self._hashers, None
            for member in members:
                member.lost(why)
            # What is still asked for ends stories that can be ended without the loop (files are closed).
            while self._asked:
                with contextlib.suppress(Exception):
                    self._asked.popleft()()
            if hashers is not None:
                hashers.shutdown(wait=False, cancel_futures=True)

    def _flush(self) -> bool:
        self._flushed_at = time.monotonic()
        kept_back = [member.flush() for member in list(self._members)]
        return any(kept_back)

    def _sleep(self, poll: _Poll) -> None:
        poll.take_heads()
        keeps_back = self._flush()
        # Who asks from now on sees that we sleep, and wakes us; who asked before is seen here.
        self._asleep = True
        poll.turn(0.0 if self._asked or self._closed else None, at_most=_KEEP_BACK_S if keeps_back else None)
        self._asleep = False

    def _answer(self) -> None:
        """Do what other threads asked for since the last turn, in their order."""
        for _ in range(len(self._asked)):
            self._asked.popleft()()


class _Poll:
    """libcurl's sockets and timers on one epoll, its handles, and who has a connection. In the loop's thread only."""

    def __init__(
        self, net: NetSettings, max_host: int, max_total: int, bandwidth_limit: float | None, wakes: int
    ) -> None:
        self._net, self._max_host, self._max_total, self._wakes = net, max_host, max_total, wakes
        self._down = None if bandwidth_limit is None else Bucket(bandwidth_limit)
        self._up = None if bandwidth_limit is None else Bucket(bandwidth_limit)
        self._paused: dict[str, list[Handle]] = {"down": [], "up": []}
        self._timers: list[tuple[float, int, Timer]] = []
        self._numbers = count()
        self._fds: set[int] = set()
        self._resting: set[int] = set()
        self._running: dict[pycurl.Curl, Handle] = {}
        self._spare: dict[tuple[str, str | None], list[Handle]] = {}
        self._origins: dict[tuple[str, bool], Origin] = {}
        self._with_bytes: list[Handle] = []
        self._ready: deque[Callable[[], None]] = deque()
        self._epoll = select.epoll()
        self._epoll.register(wakes, select.EPOLLIN)
        self._multi = pycurl.CurlMulti()
        self._multi.setopt(pycurl.M_SOCKETFUNCTION, self._on_socket)
        self._multi.setopt(pycurl.M_MAX_HOST_CONNECTIONS, 2 * max_host)  # each way
        self._multi.setopt(pycurl.M_MAX_TOTAL_CONNECTIONS, max_total)
        self._multi.setopt(pycurl.M_MAXCONNECTS, max_total)

    def __enter__(self) -> _Poll:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in list(self._running.values()):
            self._multi.remove_handle(handle.curl)
            handle.unload()
            handle.curl.close()
        for spare in self._spare.values():
            for handle in spare:
                handle.curl.close()
        self._multi.close()
        self._epoll.close()

    def start(self, exchange: Exchange) -> None:
        origin = exchange.place = self._origin(exchange.origin, fetches=exchange.body is None)
        origin.kept.discard(exchange.since)
        if origin.has_room and len(self._running) < self._max_total:
            self._begin(exchange, origin)
        elif origin.waiting and exchange.since < origin.waiting[-1].since:
            bisect.insort(origin.waiting, exchange, key=lambda waiting: waiting.since)
        else:
            origin.waiting.append(exchange)

    def abort(self, exchange: Exchange, code: int, why: str) -> None:
        handle = exchange.handle
        if handle is not None:
            self._end(handle, exchange, code, why)
            return
        if exchange.place is not None and exchange in exchange.place.waiting:
            exchange.place.waiting.remove(exchange)
            exchange.finish(code, why)
            self.soon(exchange.wake)

    def soon(self, do: Callable[[], None]) -> None:
        self._ready.append(do)

    def later(self, seconds: float, do: Callable[[], None]) -> Timer:
        timer = Timer(do)
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._numbers), timer))
        return timer

    def free_connections(self, origin: str) -> int:
        known = self._origin(origin, fetches=True)
        if known.waiting:
            return 0
        return min(known.limit - known.active - len(known.kept), self._max_total - len(self._running))

    def turn(self, timeout: float | None, at_most: float | None = None) -> bool:
        """Let libcurl and the timers do what is due; `timeout` None: wait for it, `at_most` so many seconds.

        True if anything was done.
        """
        if timeout is None:
            timeout = self._until_due()
            if at_most is not None:
                timeout = at_most if timeout is None else min(timeout, at_most)
        events = self._epoll.poll(-1 if timeout is None else timeout)
        busy = bool(events)
        for fd, event in events:
            if fd == self._wakes:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(fd)
                continue
            if fd in self._resting:  # the server has closed it, which libcurl finds out when it wants it again
                self._forget(fd)
                continue
            mask = pycurl.CSELECT_IN if event & ~select.EPOLLOUT else 0
            mask |= pycurl.CSELECT_OUT if event & ~select.EPOLLIN else 0
            self._multi.socket_action(fd, mask)
        if self._multi.timeout() == 0:  # also for all that was begun since the last turn
            self._multi.socket_action(pycurl.SOCKET_TIMEOUT, 0)
            busy = True
        if self._with_bytes:
            self._flush()
        self._collect()
        while self._ready:
            busy = True
            self._ready.popleft()()
        return self._ring() or busy

    def take_heads(self) -> None:
        """Read the heads of replies whose body is still to come: it may not, and what they say is known now."""
        for handle in list(self._running.values()):
            if not handle.take_head() and handle.exchange is not None:
                self._end(handle, handle.exchange, pycurl.E_WRITE_ERROR, "the reply is not wanted")

    def _until_due(self) -> float | None:
        if self._ready:
            return 0.0
        while self._timers and self._timers[0][2].do is None:
            heapq.heappop(self._timers)
        left_s = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None
        # Asked for where it matters: libcurl's own call about it would come three times for each small file.
        curls_ms = self._multi.timeout()
        if curls_ms < 0:
            return left_s
        return curls_ms / 1000 if left_s is None else min(left_s, curls_ms / 1000)

    def _ring(self) -> bool:
        """Do what timers say."""
        rang = False
        now = time.monotonic() if self._timers else 0.0
        last = next(self._numbers)
        while self._timers and self._timers[0][0] <= now and self._timers[0][1] < last:
            _, _, timer = heapq.heappop(self._timers)
            if timer.do is not None:
                timer.do()
            rang = True
        return rang

    def _flush(self) -> None:
        """Hand on what came in this turn."""
        handles, self._with_bytes = self._with_bytes, []
        for handle in handles:
            if not handle.flush() and handle.exchange is not None:
                self._end(handle, handle.exchange, pycurl.E_WRITE_ERROR, "the file could not be written")

    def _collect(self) -> None:
        """Take out what libcurl is done with."""
        left = 1
        while left:
            left, well, badly = self._multi.info_read()
            for curl in well:
                self._ended(curl, 0, "")
            for curl, code, failure in badly:
                self._ended(curl, code, failure)

    def _ended(self, curl: pycurl.Curl, code: int, failure: str) -> None:
        handle = self._running[curl]
        if handle.exchange is not None:
            handle.take_head()
            self._end(handle, handle.exchange, code, failure)

    def _begin(self, exchange: Exchange, origin: Origin) -> None:
        """Give it a connection. If it cannot even begin it has ended, and the connection is free as before."""
        proxy = None if self._net.proxy is None else self._net.proxy_for(exchange.origin)
        spare = self._spare.get((exchange.method, proxy))
        try:
            handle = spare.pop() if spare else self._make(exchange.method, proxy)
        except Exception as error:
            exchange.error = error
            exchange.finish(pycurl.E_FAILED_INIT, str(error))
            self.soon(exchange.wake)
            return
        origin.begin(exchange)
        self._running[handle.curl] = handle
        exchange.handle = handle
        try:
            if exchange.on_start is not None:
                exchange.on_start()
            handle.load(exchange)
            self._multi.add_handle(handle.curl)
        except BaseException as error:
            if not isinstance(error, pycurl.error):
                exchange.error = error
            if isinstance(error, Stale):
                origin.kept.add(exchange.since)
                self.later(_KEEP_TURN_S, partial(self._keep_no_longer, origin, exchange.since))
            self._release(handle, exchange, pycurl.E_FAILED_INIT, str(error))

    def _end(self, handle: Handle, exchange: Exchange, code: int, failure: str) -> None:
        """Take a handle out of the loop; if it was still at work, its connection is closed."""
        handle.flush()
        self._multi.remove_handle(handle.curl)
        self._release(handle, exchange, code, failure)
        if exchange.place is not None:
            self._next(exchange.place)

    def _release(self, handle: Handle, exchange: Exchange, code: int, failure: str) -> None:
        """The handle is free for another exchange, and the story of this one goes on."""
        handle.unload()
        del self._running[handle.curl]
        if self._down is not None:  # else nobody ever pauses
            for paused in self._paused.values():
                if handle in paused:
                    paused.remove(handle)
        spare = self._spare.setdefault((handle.method, handle.proxy), [])
        if len(spare) < self._max_host:
            spare.append(handle)
        else:
            handle.curl.close()
        exchange.handle = None
        exchange.finish(code, failure)
        if exchange.place is not None:
            exchange.place.end(exchange)
        self._ready.append(exchange.wake)

    def _next(self, freed: Origin) -> None:
        """Give free connections to those who wait: at the origin that has one more, or, where only the sum was full, at
        the one that has fewest: else who has them all would keep them until nothing of it is left."""
        if len(self._running) < self._max_total - 1:
            waiting, running = freed.waiting, self._running
            while waiting and freed.has_room and len(running) < self._max_total:
                self._begin(waiting.popleft(), freed)
            return
        while len(self._running) < self._max_total:
            fewest_first = sorted(self._origins.values(), key=lambda origin: origin.active)
            origin = next((origin for origin in fewest_first if origin.waiting and origin.has_room), None)
            if origin is None:
                return
            self._begin(origin.waiting.popleft(), origin)

    def _keep_no_longer(self, origin: Origin, since: float) -> None:
        if since in origin.kept:
            origin.kept.discard(since)
            self._next(origin)

    def _make(self, method: str, proxy: str | None) -> Handle:
        def on_pause(handle: Handle) -> None:
            self._pause(handle, "down" if method == "GET" else "up")

        bucket = self._down if method == "GET" else self._up
        return Handle(method, self._net, proxy=proxy, limited=bucket, on_bytes=self._with_bytes_of, on_pause=on_pause)

    def _with_bytes_of(self, handle: Handle) -> None:
        self._with_bytes.append(handle)

    def _pause(self, handle: Handle, way: str) -> None:
        """There are no tokens for it; when there are, all that wait go on, first come, first served."""
        paused = self._paused[way]
        bucket = self._down if way == "down" else self._up
        if not paused and bucket is not None:
            self.later(bucket.wait_s(), lambda: self._unpause(way))
        if handle not in paused:
            paused.append(handle)

    def _unpause(self, way: str) -> None:
        paused, self._paused[way] = self._paused[way], []
        for handle in paused:
            exchange = handle.exchange
            if exchange is not None:
                try:
                    handle.curl.pause(pycurl.PAUSE_CONT)  # hands over what was held back, so it may end here
                except pycurl.error as error:
                    self._end(handle, exchange, int(error.args[0]), str(error.args[-1]))

    def _origin(self, name: str, *, fetches: bool) -> Origin:
        """Of what is fetched from there, or of what is sent there: large outputs must not keep the next job's inputs
        waiting."""
        origin = self._origins.get((name, fetches))
        if origin is None:
            if len(self._origins) >= _MOST_ORIGINS:
                self._origins = {key: known for key, known in self._origins.items() if not known.is_forgettable}
            origin = self._origins[name, fetches] = Origin(self._max_host)
        return origin

    def _on_socket(self, event: int, fd: int, _multi: pycurl.CurlMulti, _data: object) -> None:
        if event == pycurl.POLL_REMOVE:
            # Not taken out: the next file on this connection begins in a moment, and one system call less for each is
            # worth it. Should anything happen on it meanwhile, `turn` takes it out.
            self._resting.add(fd)
            return
        self._resting.discard(fd)
        if fd in self._fds:
            try:
                self._epoll.modify(fd, _EPOLL[event])
                return
            except FileNotFoundError:  # it was closed while it rested, and the number is another connection's now
                pass
        self._epoll.register(fd, _EPOLL[event])
        self._fds.add(fd)

    def _forget(self, fd: int) -> None:
        self._resting.discard(fd)
        self._fds.discard(fd)
        with contextlib.suppress(OSError):
            self._epoll.unregister(fd)
