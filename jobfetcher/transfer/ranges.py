"""The exchanges that fill one file: one, and more where that is faster; who takes which piece, and for how long.

Used by `download`, in the loop's thread. A download begins as one plain GET. While what is left would take longer than
a moment at the speed measured, the number of connections is doubled, as long as the last doubling has paid; each new
one takes a piece near the front, so that hashing can follow, and small enough that the last ones end together. A piece
of a connection that lags far behind its like is taken over by a new one. A fast link never gets here.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from jobfetcher.core.urls import SignedRequest
from jobfetcher.transfer.exchange import Exchange, Reply, Sink
from jobfetcher.transfer.multi import Timer
from jobfetcher.transfer.part import Part, Piece
from jobfetcher.transfer.proof import looking
from jobfetcher.transfer.story import Resume, Story, Teller
from jobfetcher.transfer.wire import Wire

if TYPE_CHECKING:
    from jobfetcher.transfer.batch import Batch

#: How often speed is measured: a connection over 50 ms of round trip is at its full 20 MiB/s after about 0.5 s.
_LOOK_EVERY_S = 0.5

#: What is done sooner anyway is left to the connections there are.
_WORTH_SPREADING_S = 2.0

#: One connection that brings so much, in bytes a second, is not what limits the link; disks and hashes are near.
_FAST = 400 * 1024**2

#: A doubling that brings less than this is the last one for a while.
_LEAST_GAIN = 1.15
_GROW_AGAIN_AFTER_S = 30.0

#: Pieces: no smaller, since a new one costs a round trip; no larger, since hashing follows the front. In between, what
#: one connection brings in a few seconds.
_LEAST_PIECE, _MOST_PIECE = 4 * 1024**2, 256 * 1024**2
_PIECE_S = 4.0

#: A connection is judged by so many seconds; one that is so many times slower than its like loses its piece, unless it
#: is about to end.
_JUDGE_AFTER_S = 5.0
_LAGS = 16.0
_SOON_S = 10.0


class Attempt:
    """One exchange that fills a piece, with its redirects; and how it ended."""

    __slots__ = ("at", "before", "dropped", "piece", "since", "story")

    def __init__(self, piece: Piece, before: int) -> None:
        self.piece, self.before = piece, before
        self.at, self.since = piece.at, time.monotonic()
        self.dropped = False
        self.story: Story[Reply] | None = None

    def outcome(self) -> Reply:
        """The reply; raises what went wrong."""
        assert self.story is not None  # noqa: S101 - it has ended
        if self.story.error is not None:
            raise self.story.error
        assert self.story.result is not None  # noqa: S101
        return self.story.result


class Crew:
    """The attempts at one file; a `story.Wait` for the next one that ends (or for None: time to `fill` again).

    `most`: connections at once. `extra`: header lines that attempts send along. `check` is called when there is a
    connection for one, and may raise, which ends it; `heard` when a reply begins to bring bytes. They wait for
    connections since the file does.
    """

    def __init__(self, part: Part, batch: Batch[Any], wire: Wire, most: int) -> None:
        self.most = most
        self.extra: list[str] = []
        self.check: Callable[[], None] | None = None
        self.heard: Callable[[], None] | None = None
        self._part, self._batch, self._wire = part, batch, wire
        self._active: list[Attempt] = []
        self._ended: deque[Attempt] = deque()
        self._resume: Resume | None = None
        self._timer: Timer | None = None
        self._origin = ""
        self._target = 1
        self._grows = True
        self._speed = self._speed_before = self._best = 0.0
        self._have = 0
        self._since = self._grew_at = 0.0
        self._waits_since = time.monotonic()

    @property
    def is_busy(self) -> bool:
        """Whether any attempt is on its way."""
        return bool(self._active)

    # -- as a wait ---------------------------------------------------------------------------------------------------

    def begin(self, _teller: Teller, resume: Resume) -> None:
        self._resume = resume
        if self._ended:
            self._batch.loop.soon(self._wake)
        elif self._can_spread():
            self._timer = self._batch.loop.later(_LOOK_EVERY_S, self._wake)

    def cancel(self) -> None:
        self._resume = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None  # whoever waits next has to look at the clock again

    def _wake(self) -> None:
        resume = self._resume
        if resume is not None:
            self.cancel()
            resume(self._ended.popleft() if self._ended else None, None)

    # -- work --------------------------------------------------------------------------------------------------------

    def fill(self, request: SignedRequest) -> None:
        """Begin what shall be begun now: at least one attempt, unless the end of one is still to be heard.

        One may end before it has begun to wait, such as where no thread can be had.
        """
        if self._can_spread():
            self._look()
        while not self._ended and (not self._active or (len(self._active) < self._target and self._may_add())):
            piece = self._take()
            if piece is None:
                return
            self._start(request, piece)

    def fewer(self) -> None:
        """One attempt failed while others go on: they are enough for now."""
        self._target = max(1, min(self._target, len(self._active) + 1) - 1)
        self._grows, self._grew_at = False, time.monotonic()

    def stop(self) -> None:
        """End all attempts."""
        attempts, self._active = self._active, []
        for attempt in attempts:
            self._drop(attempt)
        self._ended.clear()
        self._target, self._since = 1, 0.0

    def _drop(self, attempt: Attempt) -> None:
        attempt.dropped = True
        attempt.piece.busy = False
        if attempt.story is not None:
            attempt.story.close()

    def _start(self, request: SignedRequest, piece: Piece) -> None:
        if not self._active:
            self._part.drop_unresumable()
            if piece not in self._part.pieces:
                piece = self._part.pieces[0]
        attempt = Attempt(piece, self._part.best)
        piece.busy = True
        self._active.append(attempt)

        def on_reply(exchange: Exchange, reply: Reply) -> Sink | None:
            self._origin = exchange.origin
            sink = self._accept(request, piece, reply)
            if sink is not None and self.heard is not None:
                self.heard()
            if reply.status == 200:  # the file begins anew, and so does the measuring
                self._target, self._since = 1, 0.0
            if self._timer is None and self._can_spread():
                self._batch.loop.soon(self._wake)  # to look at the clock from now on
            return sink

        lines = [*self._part.wanted(piece), *self.extra]
        attempt.story = Story(
            self._wire.get(request, lines, on_reply, self.check, self._waits_since),
            self._batch,
            partial(self._on_end, attempt),
        )
        attempt.story.step()

    def _accept(self, request: SignedRequest, piece: Piece, reply: Reply) -> Sink | None:
        """Where the bytes of a reply go, if they are the store's."""
        if reply.status not in {200, 206}:
            return None
        proof = self._wire.proof
        doubt = proof.check_brought(request, reply)  # before the part believes its headers
        sink = self._part.accept(
            piece, reply, alone=len(self._active) == 1, etag_is_md5=proof.etag_is_md5(reply.origin)
        )
        return looking(sink, reply) if doubt and sink is not None else sink

    def _on_end(self, attempt: Attempt, _story: Story[Reply]) -> None:
        if attempt.dropped:
            return
        attempt.piece.busy = False
        self._part.merge()
        self._active.remove(attempt)
        self._ended.append(attempt)
        self._wake()

    # -- how many, and which -----------------------------------------------------------------------------------------

    def _can_spread(self) -> bool:
        part = self._part
        return (
            self.most > 1
            and part.takes_ranges
            and part.size is not None
            and part.size >= 2 * _LEAST_PIECE
            and part.expected is not None
            and bool(part.expected.etag)
        )

    def _may_add(self) -> bool:
        """Only connections that nobody else waits for."""
        return self._can_spread() and self._batch.loop.free_connections(self._origin) > 0

    def _look(self) -> None:
        """Measure, and decide how many connections are wanted."""
        now, part = time.monotonic(), self._part
        part.keep_note()
        if not self._since or part.have < self._have:
            self._since, self._have = now, part.have
            return
        if now - self._since < _LOOK_EVERY_S * 0.9:
            return
        speed = (part.have - self._have) / (now - self._since)
        self._speed, self._since, self._have = speed, now, part.have
        if self._target > 1 and self._grows and speed < self._speed_before * _LEAST_GAIN:
            self._grows, self._grew_at = False, now
        elif not self._grows and now - self._grew_at > _GROW_AGAIN_AFTER_S:
            self._grows = True
        left = (part.size or 0) - part.have
        if self._grows and self._target < self.most and 0 < speed < _FAST and left > speed * _WORTH_SPREADING_S:
            self._target = min(self.most, 2 * self._target, self._enough(speed))
            self._speed_before = speed
        self._judge(now)

    def _enough(self, speed: float) -> int:
        """How many connections of the speed they have reach the limit on bandwidth: what more would bring is only
        held up in this machine, and thrown away when pieces are cut."""
        limit = self._batch.loop.bandwidth_limit
        return self.most if limit is None else max(self._target, math.ceil(limit / speed * len(self._active)))

    def _judge(self, now: float) -> None:
        """Take pieces from connections that lag far behind."""
        for attempt in list(self._active):
            took = now - attempt.since
            if took < _JUDGE_AFTER_S:
                continue
            rate = (attempt.piece.at - attempt.at) / took
            attempt.at, attempt.since = attempt.piece.at, now
            self._best = max(rate, 0.9 * self._best)
            if rate * _LAGS < self._best and attempt.piece.left > rate * _SOON_S:
                self._active.remove(attempt)
                self._drop(attempt)

    def _take(self) -> Piece | None:
        """A piece to be filled: one that nobody fills, else a part of the largest."""
        part = self._part
        length = min(max(_LEAST_PIECE, int(self._speed / max(1, len(self._active)) * _PIECE_S)), _MOST_PIECE)
        for piece in part.pieces:
            if not piece.busy and not piece.is_full:
                if self._active and piece.left > 2 * length:
                    part.cut(piece, piece.at + length)
                return piece
        largest = max(part.pieces, key=lambda piece: piece.left)
        rate = self._speed / max(1, len(self._active))
        if largest.left < max(2 * _LEAST_PIECE, rate):
            return None
        if largest.left <= 2 * length:
            return part.cut(largest, largest.at + largest.left // 2)
        rest = part.cut(largest, largest.at + length)
        if rest is not None and rest.left > 2 * length:
            part.cut(rest, rest.at + length)
        return rest
