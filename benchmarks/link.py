"""A link between the worker and a server: latency, and limits of bytes a second, as a TCP proxy in its own process.

Run by `running_link` as `python -m benchmarks.link`. Each direction has its own limits. A connection is accepted at
once by this machine's kernel, so the round trip that a handshake costs is added to the first bytes that are sent.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.services import free_port, running

#: Read at a time. At 20 MiB/s that is one piece every 3 ms, a third of what a timer's millisecond could spoil.
_PIECE = 64 * 1024

#: Pieces under way in one direction of one connection: 8 MiB, the product of 160 MiB/s and 50 ms.
_UNDER_WAY = 128

#: What was not used so long ago is lost; a timer that fires late is made up for.
_BURST_S = 0.01


@contextlib.contextmanager
def running_link(
    folder: Path, to: int, *, round_trip_s: float = 0.0, per_connection: float = 0.0, in_all: float = 0.0
) -> Iterator[int]:
    """A link to loopback port `to`; yields the port of its near end. Limits in bytes a second each way; 0: none."""
    port = free_port()
    argv = [sys.executable, "-m", "benchmarks.link"]
    argv += [str(number) for number in (port, to, round_trip_s, per_connection, in_all)]

    def listening() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=2):
            return True
        return False

    with running(argv, folder / "link.log", listening):
        yield port


class Bucket:
    """A limit of bytes a second, shared by whoever takes from it; 0: none."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._next = 0.0

    def take(self, size: int, now: float) -> float:
        """When so many bytes have passed."""
        if not self._rate:
            return now
        self._next = max(self._next, now - _BURST_S) + size / self._rate
        return self._next


@dataclass(frozen=True)
class Link:
    """Where it leads, and how slow it is."""

    to: int
    round_trip_s: float
    per_connection: float
    there: Bucket
    back: Bucket

    async def serve(self, near: socket.socket) -> None:
        """One connection, to its end."""
        loop = asyncio.get_running_loop()
        established = loop.time() + self.round_trip_s
        far = socket.socket()
        with near, far:
            for side in (near, far):
                side.setblocking(False)
                side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                await loop.sock_connect(far, ("127.0.0.1", self.to))
                async with asyncio.TaskGroup() as both:
                    both.create_task(self._pass_on(near, far, self.there, established))
                    both.create_task(self._pass_on(far, near, self.back, established))
            except* OSError:
                pass  # either side may go away at any time

    async def _pass_on(self, source: socket.socket, sink: socket.socket, shared: Bucket, established: float) -> None:
        """One direction: pieces are taken as fast as the limits allow, and handed over half a round trip later."""
        loop = asyncio.get_running_loop()
        own = Bucket(self.per_connection)
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_UNDER_WAY)

        async def hand_over() -> None:
            data = b"-"
            while data:
                due, data = await under_way.get()
                await _until(due)
                await loop.sock_sendall(sink, data)
            sink.shutdown(socket.SHUT_WR)

        async with asyncio.TaskGroup() as both_ends:
            both_ends.create_task(hand_over())
            data = b"-"
            while data:
                data = await loop.sock_recv(source, _PIECE)
                now = loop.time()
                passed = max(own.take(len(data), now), shared.take(len(data), now))
                await _until(passed)
                await under_way.put((max(passed, established) + self.round_trip_s / 2, data))


async def _until(due: float) -> None:
    left = due - asyncio.get_running_loop().time()
    if left > 0:
        await asyncio.sleep(left)


async def main(arguments: Sequence[str]) -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.link")
    for name, kind in (("port", int), ("to", int), ("round_trip_s", float), ("per_connection", float), ("all", float)):
        parser.add_argument(name, type=kind)
    given = parser.parse_args(arguments)
    link = Link(given.to, given.round_trip_s, given.per_connection, Bucket(given.all), Bucket(given.all))
    loop = asyncio.get_running_loop()
    serving: set[asyncio.Task[None]] = set()
    with socket.create_server(("127.0.0.1", given.port), backlog=512) as listener:
        listener.setblocking(False)
        while True:
            near, _ = await loop.sock_accept(listener)
            task = asyncio.create_task(link.serve(near))
            serving.add(task)
            task.add_done_callback(serving.discard)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
