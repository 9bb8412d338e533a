"""A TCP proxy that a test switches while connections run through it: what a network does, not what a server says.

    with FaultProxy(server.url) as proxy:
        worker(api_url=proxy.url)
        proxy.refuse()                             # nobody listens any more, and what was open is closed
        proxy.listen()
        proxy.then(Fault(cut_answer=100))          # the next connection; the others are as they were
        proxy.always(Fault(black_hole=True))       # every connection, the open ones as well

Faults of HTTP (a status, a page, a header) are `mock_api.faults`' business. One thread accepts, each connection has
two; all are gone, and all descriptors closed, when the block ends.
"""

import contextlib
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import urlsplit

from tests.support.services import LOOPBACK, free_port

_BLOCK = 65_536
_CONNECT_S = 5.0


@dataclass(frozen=True)
class Fault:
    """What is done to a connection; the default is nothing. Offsets count the bytes of one connection's one direction.

    `reset`: it is reset as soon as it is there. `black_hole`: it is kept, and nothing passes either way.
    `cut_request`, `cut_answer`: so many bytes pass that way, then it is reset. `drop_answer`: the request passes, the
    answer does not, and the connection is closed. `half_close`: after so many bytes of the answer the client is told
    that no more will come, while its own direction stays open. `flip`: this byte of the answer is inverted.
    `delay_s`: so long before each piece, either way. `drip_s`: from byte `drip_from` of the answer on, so long before
    each single byte.
    """

    reset: bool = False
    black_hole: bool = False
    cut_request: int | None = None
    cut_answer: int | None = None
    drop_answer: bool = False
    half_close: int | None = None
    flip: int | None = None
    delay_s: float = 0.0
    drip_s: float = 0.0
    drip_from: int = 0


_NONE = Fault()


@dataclass
class Connection:
    """One connection of a client, as it went. Times are `time.monotonic()`, here; None: it is still open.

    `requested` and `answered` count the bytes that were passed on.
    """

    fault: Fault
    opened_at: float
    client_left_at: float | None = None
    closed_at: float | None = None
    requested: int = 0
    answered: int = 0


@dataclass
class _Trip:
    """`act` is called when `marker` is seen, once."""

    marker: bytes
    in_answer: bool
    act: Callable[[], None]


class _Ended(Exception):
    """This connection is over. `reset`: the client is told so by a reset."""

    def __init__(self, *, reset: bool) -> None:
        super().__init__()
        self.reset = reset


@dataclass(eq=False)
class _Pair:
    """A connection in progress: the client's socket, the target's, and what is kept of it."""

    client: socket.socket
    kept: Connection
    target: socket.socket | None = None
    own_fault: bool = False
    over: threading.Event = field(default_factory=threading.Event)
    gone: threading.Event = field(default_factory=threading.Event)
    threads: list[threading.Thread] = field(default_factory=list)
    reset: bool = False

    def end(self, *, reset: bool) -> None:
        """Wake both threads, which then leave; a reset is made when the client's socket is closed."""
        if not self.over.is_set():
            self.reset = reset
            self.over.set()
        for side in (self.client, self.target):
            if side is not None:
                with contextlib.suppress(OSError):
                    # Only the receiving half: it wakes the thread that reads, and tells nobody anything.
                    side.shutdown(socket.SHUT_RD)


class FaultProxy:
    """Listens on a loopback port from `with` to its end, and passes everything on to the host and port of `target`."""

    def __init__(self, target: str = "") -> None:
        self.target = target
        #: Every connection so far, oldest first.
        self.connections: list[Connection] = []
        self._lock = threading.Lock()
        self._always = _NONE
        self._next: deque[Fault] = deque()
        self._trips: list[_Trip] = []
        self._pairs: set[_Pair] = set()
        self._threads: list[threading.Thread] = []
        self._closing = threading.Event()
        self._listening = threading.Event()
        # A port that was asked for by number stays with the socket while it does not listen (Linux): see `refuse`.
        self._listener = socket.create_server((LOOPBACK, free_port()), backlog=128)
        self._listening.set()
        self._door = threading.Thread(target=self._accept, name="fault-proxy")
        self.url = f"http://{LOOPBACK}:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._door.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self.refuse()
        self._listening.set()  # wakes the thread at the door, which leaves
        self._door.join()
        self.cut()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def refuse(self) -> None:
        """Nobody listens: connections are refused, and those that are open are closed."""
        with self._lock:
            self._listening.clear()
            with contextlib.suppress(OSError):  # it was refusing already
                self._listener.shutdown(socket.SHUT_RDWR)
        self.cut(reset=False)

    def listen(self) -> None:
        """After `refuse`: connections are taken again."""
        with self._lock:
            if not self._listening.is_set():
                self._listener.listen(128)
                self._listening.set()

    def always(self, fault: Fault = _NONE) -> None:
        """Every connection has this fault from now on, the open ones as well; without one, none has."""
        with self._lock:
            self._always = fault
            for pair in self._pairs:
                if not pair.own_fault:
                    pair.kept.fault = fault
        if fault.reset:
            self.cut()

    def then(self, *faults: Fault) -> None:
        """Each of the next connections has one of these; those that are open are closed, so that there is a next."""
        with self._lock:
            self._next.extend(faults)
        self.cut(reset=False)

    def cut(self, *, reset: bool = True) -> None:
        """End every connection that is open, and see it closed; but for one whose own thread asks for it."""
        with self._lock:
            pairs = list(self._pairs)
        for pair in pairs:
            pair.end(reset=reset)
        for pair in pairs:
            if threading.current_thread() not in pair.threads:
                pair.gone.wait(_CONNECT_S)

    def on_request(self, marker: bytes, act: Callable[[], None]) -> None:
        """Call `act` once, when a client sends something with `marker` in it, *before* that is passed on."""
        self._trips.append(_Trip(marker, False, act))

    def on_answer(self, marker: bytes, act: Callable[[], None]) -> None:
        """Call `act` once, when the target sends something with `marker` in it, *after* that was passed on."""
        self._trips.append(_Trip(marker, True, act))

    @property
    def is_listening(self) -> bool:
        """Whether connections are taken."""
        return self._listening.is_set()

    @property
    def open(self) -> int:
        """How many connections there are now."""
        return len(self._pairs)

    @property
    def unused(self) -> int:
        """How many of the faults of `then` no connection has met so far."""
        return len(self._next)

    def _accept(self) -> None:
        while True:
            self._listening.wait()
            if self._closing.is_set():
                return
            try:
                client, _ = self._listener.accept()
            except OSError:  # nobody listens now
                continue
            with self._lock:
                own = bool(self._next)
                kept = Connection(self._next.popleft() if own else self._always, time.monotonic())
                pair = _Pair(client, kept, own_fault=own)
                self.connections.append(kept)
                self._pairs.add(pair)
                thread = threading.Thread(target=self._serve, args=(pair,), name="fault-proxy")
                pair.threads.append(thread)
            thread.start()
            self._threads = [other for other in self._threads if other.is_alive()] + [thread]

    def _serve(self, pair: _Pair) -> None:
        """The thread of one connection: it passes the requests on; a second one passes the answers."""
        answers: threading.Thread | None = None
        try:
            if pair.kept.fault.reset or not self._listening.is_set():  # or it came while the door was being closed
                pair.end(reset=True)
                return
            pair.client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            to = urlsplit(self.target)
            pair.target = socket.create_connection((to.hostname or "", to.port or 80), timeout=_CONNECT_S)
            pair.target.settimeout(None)
            if pair.over.is_set():  # ended before `end` could wake the thread that is about to begin
                return
            answers = threading.Thread(target=self._pump, args=(pair, True), name="fault-proxy")
            pair.threads.append(answers)
            answers.start()
            self._pump(pair, False)
        except OSError:
            pair.end(reset=True)  # nobody is there behind the proxy
        finally:
            if answers is not None:
                answers.join()
            self._close(pair)

    def _close(self, pair: _Pair) -> None:
        with self._lock:
            self._pairs.discard(pair)
        if pair.reset:
            # SO_LINGER with zero seconds: close() sends RST instead of FIN.
            with contextlib.suppress(OSError):
                pair.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        pair.client.close()
        if pair.target is not None:
            pair.target.close()
        pair.kept.closed_at = time.monotonic()
        pair.gone.set()

    def _pump(self, pair: _Pair, answers: bool) -> None:
        """Pass one direction on until it ends."""
        assert pair.target is not None
        source, sink = (pair.target, pair.client) if answers else (pair.client, pair.target)
        try:
            while (data := source.recv(_BLOCK)) and not pair.over.is_set():
                trips = self._tripped(data, answers)
                if not answers:
                    _act(trips)
                self._pass(pair, data, answers, sink)
                if answers:
                    _act(trips)
            if not pair.over.is_set():
                if not answers:
                    pair.kept.client_left_at = time.monotonic()
                if pair.kept.fault.black_hole or pair.kept.fault.half_close is not None:
                    pair.end(reset=False)  # nothing would ever come of it
                sink.shutdown(socket.SHUT_WR)  # one side has said all; the other may go on
        except _Ended as end:
            pair.end(reset=end.reset)
        except OSError:
            pair.end(reset=True)

    def _pass(self, pair: _Pair, data: bytes, answers: bool, sink: socket.socket) -> None:
        """Pass one piece on, as the connection's fault has it."""
        for piece, pause_s in _pieces(pair.kept, data, answers):
            if pause_s and pair.over.wait(pause_s):
                raise _Ended(reset=pair.reset)
            fault = pair.kept.fault
            if pair.over.is_set() or (answers and fault.drop_answer):
                raise _Ended(reset=pair.reset)
            if fault.black_hole:
                return
            passed = pair.kept.answered if answers else pair.kept.requested
            cut = fault.cut_answer if answers else fault.cut_request
            end = fault.half_close if answers else None
            bounds = [bound - passed for bound in (cut, end) if bound is not None]
            part = piece[: max(0, min(bounds))] if bounds else piece
            if answers and fault.flip is not None and passed <= fault.flip < passed + len(part):
                at = fault.flip - passed
                part = part[:at] + bytes([part[at] ^ 0xFF]) + part[at + 1 :]
            sink.sendall(part)
            if answers:
                pair.kept.answered += len(part)
            else:
                pair.kept.requested += len(part)
            if cut is not None and passed + len(part) >= cut:
                raise _Ended(reset=True)
            if end is not None and passed + len(part) >= end:
                sink.shutdown(socket.SHUT_WR)
                pair.over.wait()  # the client's direction stays open until it leaves, or the test ends it

    def _tripped(self, data: bytes, answers: bool) -> list[_Trip]:
        with self._lock:
            found = [trip for trip in self._trips if trip.in_answer is answers and trip.marker in data]
            self._trips = [trip for trip in self._trips if trip not in found]
        return found


def _act(trips: list[_Trip]) -> None:
    for trip in trips:
        trip.act()


def _pieces(kept: Connection, data: bytes, answers: bool) -> Iterator[tuple[bytes, float]]:
    """`data` in the pieces in which it is passed on, each with the pause before it in seconds."""
    fault = kept.fault
    whole = len(data)
    if answers and fault.drip_s:
        whole = max(0, min(whole, fault.drip_from - kept.answered))
    if whole:
        yield data[:whole], fault.delay_s
    for at in range(whole, len(data)):
        yield data[at : at + 1], fault.drip_s
