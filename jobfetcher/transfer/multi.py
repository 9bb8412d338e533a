"""The one thread in which all files move: a `CurlMulti` driven by epoll, for all jobs at once.

Used by `wire`. Threads hand in an exchange and wait; the loop owns all handles and connections, and sleeps in epoll
whenever there is nothing to do: sockets wake it, libcurl's own timer, and one socket pair for what other threads ask.
Connections are kept alive and bounded, per host and in all; what is above the bound waits inside libcurl.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time
from collections import deque

import pycurl

from jobfetcher.core.errors import WorkerFault, WorkerReason
from jobfetcher.transfer.exchange import Exchange, NetSettings

_SELECT = {
    pycurl.POLL_IN: selectors.EVENT_READ,
    pycurl.POLL_OUT: selectors.EVENT_WRITE,
    pycurl.POLL_INOUT: selectors.EVENT_READ | selectors.EVENT_WRITE,
}


class TransferLoop:
    """Runs exchanges. Thread-safe; the thread starts with the first exchange and ends with `close`."""

    def __init__(self, net: NetSettings, *, max_host_connections: int = 16, max_connections: int = 64) -> None:
        self._net = net
        self._bounds = (max_host_connections, max_connections)
        self._lock = threading.Lock()
        self._asked: deque[tuple[Exchange, bool]] = deque()  # and whether it shall run (else: be aborted)
        self._closed = False
        self._thread: threading.Thread | None = None
        self._waker: socket.socket | None = None

    def perform(self, exchange: Exchange) -> None:
        """Run `exchange` and return when it has ended, in whatever way; never raises for what the network did."""
        self._ask(exchange, run=True)
        exchange.ended.wait()

    def abort(self, exchange: Exchange) -> None:
        """End it now, from any thread; nothing happens if it has ended."""
        exchange.unwanted = True  # said first: it may not have reached the loop yet
        if not exchange.ended.is_set():
            self._ask(exchange, run=False)

    def close(self) -> None:
        """Abort everything, close all connections and end the thread."""
        with self._lock:
            self._closed = True
            thread = self._thread
            self._wake()
        if thread is not None:
            thread.join()

    def _ask(self, exchange: Exchange, *, run: bool) -> None:
        with self._lock:
            if self._closed:
                if run:
                    raise WorkerFault(WorkerReason.INTERNAL, "files cannot be moved any more: the worker is closing")
                return
            self._asked.append((exchange, run))
            if self._thread is None:
                ours, theirs = socket.socketpair()
                ours.setblocking(False)
                theirs.setblocking(False)
                self._waker = ours
                self._thread = threading.Thread(target=self._run, args=(theirs,), name="transfer", daemon=True)
                self._thread.start()
            self._wake()

    def _wake(self) -> None:
        if self._waker is not None:
            with contextlib.suppress(BlockingIOError):  # full: then it is awake anyway
                self._waker.send(b"\0")

    def _run(self, wakes: socket.socket) -> None:
        """The thread. However it ends, nobody is left waiting, and the next exchange starts a new one."""
        running: dict[pycurl.Curl, Exchange] = {}
        why = "the transfer loop was closed"
        try:
            with _Poll(self._bounds) as poll:
                poll.selector.register(wakes, selectors.EVENT_READ)
                while not self._closed:
                    if poll.turn(wakes):
                        self._answer(poll, running)
                    for curl, code, failure in poll.ended():
                        poll.give_back(curl)
                        running.pop(curl).finish(code, failure)
                for curl in running:
                    poll.give_back(curl)
        except Exception as error:
            why = f"the transfer loop failed: {error!r}"
            raise
        finally:
            with self._lock:
                wakes.close()
                if self._waker is not None:
                    self._waker.close()
                self._waker = self._thread = None
                asked = [exchange for exchange, run in self._asked if run]
                self._asked.clear()
            for exchange in [*running.values(), *asked]:
                exchange.finish(pycurl.E_ABORTED_BY_CALLBACK, why)

    def _answer(self, poll: _Poll, running: dict[pycurl.Curl, Exchange]) -> None:
        """Do what other threads asked for since the last turn, in their order."""
        while True:
            with self._lock:
                if not self._asked:
                    return
                exchange, run = self._asked.popleft()
            if run and exchange.unwanted:
                exchange.finish(pycurl.E_ABORTED_BY_CALLBACK, "aborted")
            elif run:
                curl = poll.handle()
                running[curl] = exchange
                try:
                    exchange.prepare(curl, self._net)
                    poll.multi.add_handle(curl)
                except pycurl.error as error:
                    del running[curl]
                    curl.close()
                    exchange.finish(pycurl.E_FAILED_INIT, str(error))
            else:
                for curl in [curl for curl, other in running.items() if other is exchange]:
                    poll.give_back(curl)
                    running.pop(curl).finish(pycurl.E_ABORTED_BY_CALLBACK, "aborted")


class _Poll:
    """libcurl's sockets and timer on one selector. Lives in the loop's thread only."""

    def __init__(self, bounds: tuple[int, int]) -> None:
        self.selector = selectors.DefaultSelector()
        self.multi = pycurl.CurlMulti()
        self._due: float | None = None
        self._spare: list[pycurl.Curl] = []
        host, total = bounds
        self._most_spare = total
        self.multi.setopt(pycurl.M_SOCKETFUNCTION, self._on_socket)
        self.multi.setopt(pycurl.M_TIMERFUNCTION, self._on_timer)
        self.multi.setopt(pycurl.M_MAX_HOST_CONNECTIONS, host)
        self.multi.setopt(pycurl.M_MAX_TOTAL_CONNECTIONS, total)
        self.multi.setopt(pycurl.M_MAXCONNECTS, total)

    def __enter__(self) -> _Poll:
        return self

    def __exit__(self, *_: object) -> None:
        for curl in self._spare:
            curl.close()
        self.multi.close()
        self.selector.close()

    def turn(self, wakes: socket.socket) -> bool:
        """Wait for something and let libcurl deal with it; True if another thread asked for something."""
        asked = False
        timeout = None if self._due is None else max(0.0, self._due - time.monotonic())
        for key, events in self.selector.select(timeout):
            if key.fileobj is wakes:
                wakes.recv(4096)
                asked = True
                continue
            mask = pycurl.CSELECT_IN if events & selectors.EVENT_READ else 0
            mask |= pycurl.CSELECT_OUT if events & selectors.EVENT_WRITE else 0
            self.multi.socket_action(key.fd, mask)
        if self._due is not None and self._due <= time.monotonic():
            self._due = None  # before the call, which may set the next one
            self.multi.socket_action(pycurl.SOCKET_TIMEOUT, 0)
        return asked

    def ended(self) -> list[tuple[pycurl.Curl, int, str]]:
        """The handles that are done: result code (0: well) and libcurl's words."""
        done: list[tuple[pycurl.Curl, int, str]] = []
        left = 1
        while left:
            left, well, badly = self.multi.info_read()
            done += [(curl, 0, "") for curl in well]
            done += badly
        return done

    def handle(self) -> pycurl.Curl:
        """A handle to prepare: a used one where there is one, since making one is dear."""
        return self._spare.pop() if self._spare else pycurl.Curl()

    def give_back(self, curl: pycurl.Curl) -> None:
        """Take a handle out of the loop; if it was still at work, its connection is closed."""
        self.multi.remove_handle(curl)
        if len(self._spare) < self._most_spare:
            curl.reset()  # drops the callbacks, and with them the exchange
            self._spare.append(curl)
        else:
            curl.close()

    def _on_socket(self, event: int, fd: int, _multi: pycurl.CurlMulti, _data: object) -> None:
        known = fd in self.selector.get_map()
        if event == pycurl.POLL_REMOVE:
            if known:
                self.selector.unregister(fd)
        elif known:
            self.selector.modify(fd, _SELECT[event])
        else:
            self.selector.register(fd, _SELECT[event])

    def _on_timer(self, timeout_ms: int) -> None:
        self._due = None if timeout_ms < 0 else time.monotonic() + timeout_ms / 1000
