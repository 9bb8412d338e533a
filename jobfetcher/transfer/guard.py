"""Which addresses may be connected to, asked for the very address that is about to be (FAULTS.md T7).

Used by `wire`. `UrlPolicy` judges; this adds what it needs to know of the world: where the API's own host lives.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

from jobfetcher.core.errors import WorkerFault
from jobfetcher.core.urls import UrlPolicy
from jobfetcher.transfer.patience import TryAgain

#: All addresses of a host name; raises OSError when there are none.
Resolver = Callable[[str], frozenset[str]]

_KNOWN_FOR_S = 60.0

#: A look-up that failed may have taken long, and many files wait for the same one.
_AGAIN_AFTER_S = 1.0


def resolve(host: str) -> frozenset[str]:
    """The system's answer; an address is its own."""
    return frozenset(str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM))


class AddressGuard:
    """Checks addresses against a policy. Thread-safe; the API's addresses are asked for once a minute at most."""

    def __init__(self, policy: UrlPolicy, resolver: Resolver, clock: Callable[[], float] = time.monotonic) -> None:
        self._policy, self._resolver, self._clock = policy, resolver, clock
        self._lock = threading.Lock()
        self._api: frozenset[str] | None = None
        self._until = self._not_before = -1.0

    @property
    def knows(self) -> bool:
        """Whether the API's addresses are known and not older than a minute."""
        return self._api is not None and self._clock() < self._until

    def learn(self) -> None:
        """Find the API's addresses unless they are known; may block, so it is called where files are signed: once for
        all files that begin together, and no thread has to be started for it."""
        with self._lock:
            if self.knows or self._clock() < self._not_before:
                return
            try:
                self._api = self._resolver(self._policy.api.host)
                self._until = self._clock() + _KNOWN_FOR_S
            except OSError:  # what was known stays known
                self._not_before = self._clock() + _AGAIN_AFTER_S

    def check(self, host: str, address: str, *, port: int | None = None) -> None:
        """Raise WorkerFault if `host` must not be reached at `address` (and `port`).

        TryAgain if that cannot be said yet, because the API's own addresses are not known.
        """
        known = self._api
        try:
            self._policy.check_address(host, address, known or (), port=port)
        except WorkerFault:
            if known is None:
                raise TryAgain(f"the API's host {self._policy.api.host} has no address now") from None
            raise

    def check_name(self, host: str, *, port: int | None = None) -> None:
        """Check all addresses that `host` has for us. For a proxy, which resolves again: the best that can be done."""
        try:
            addresses = self._resolver(host)
        except OSError:
            return  # a name that only the proxy knows
        for address in addresses:
            self.check(host, address, port=port)
