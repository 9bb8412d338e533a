"""How many connections a store gets, and how many bytes a second pass: what keeps us a polite guest.

Used by `multi`, in the loop's thread only.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING

import pycurl

if TYPE_CHECKING:
    from jobfetcher.transfer.exchange import Exchange

#: "Too many": 503 is S3's SlowDown and what a bound on connections answers, 429 says so in its name (RFC 6585).
_TOO_MANY = frozenset({429, 503})

#: Some servers say it by ending the connection without a word.
_CUT_OFF = frozenset({pycurl.E_GOT_NOTHING, pycurl.E_RECV_ERROR, pycurl.E_SEND_ERROR})

#: One connection more is tried after so many files that went well, for each connection there is: often enough to be
#: back from 1 to 16 after 252 files, and so rarely that under a fixed bound of 8 one file in 16 is refused.
_GROW_AFTER = 2
_GROW_AT_LEAST = 8


class Origin:
    """One server's connections, one way: halved when it says that there are too many, one more after so much success
    (AIMD)."""

    __slots__ = ("_age", "_most", "_well", "active", "kept", "limit", "waiting")

    def __init__(self, most: int) -> None:
        self._most = self.limit = most
        self._age = self._well = self.active = 0
        self.waiting: deque[Exchange] = deque()
        #: Turns that are kept for files which are signed anew, by `Exchange.since`.
        self.kept: set[float] = set()

    def begin(self, exchange: Exchange) -> None:
        """Count one in."""
        self.active += 1
        exchange.age = self._age

    def end(self, exchange: Exchange) -> None:
        """Count one out, and learn from how it went."""
        status = exchange.reply.status
        if status in _TOO_MANY or (not status and exchange.code in _CUT_OFF):
            if exchange.age == self._age:  # those that began before the last cut say nothing new
                self.limit = max(1, min(self.limit, self.active) // 2)
                self._age += 1
                self._well = 0
        elif 200 <= status < 400 and self.limit < self._most:
            self._well += 1
            if self._well >= max(_GROW_AT_LEAST, _GROW_AFTER * self.limit):
                self.limit += 1
                self._well = 0
        self.active -= 1

    @property
    def has_room(self) -> bool:
        return self.active + len(self.kept) < self.limit

    @property
    def is_forgettable(self) -> bool:
        """Nothing is going on, and nothing was learnt."""
        return not self.active and not self.waiting and not self.kept and self.limit == self._most


class Bucket:
    """A token bucket (RFC 2697's single rate): `rate` bytes a second, and a tenth of a second's worth at once.

    It may be overdrawn by one piece, which the next ones then wait for; so the mean is exact and no piece is cut.
    """

    _BURST_S = 0.1

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._level = rate * self._BURST_S
        self._at = time.monotonic()

    def take(self, size: int) -> bool:
        """Whether `size` bytes may pass now."""
        self._refill()
        if self._level <= 0:
            return False
        self._level -= size
        return True

    def wait_s(self) -> float:
        """Until when it makes sense to ask again: the level is then at half a burst, or one millisecond has passed."""
        self._refill()
        return max(0.001, self._BURST_S / 2 - self._level / self._rate)

    def _refill(self) -> None:
        now = time.monotonic()
        self._level = min(self._rate * self._BURST_S, self._level + (now - self._at) * self._rate)
        self._at = now
