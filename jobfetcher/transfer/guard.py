"""Which addresses may be connected to, asked for the very address that is about to be (FAULTS.md T7).

Used by `wire`. `UrlPolicy` judges; this adds what it needs to know of the world: where the API's own host lives.
"""

from __future__ import annotations

import socket

from jobfetcher.core.addresses import Kind, OwnHost, Resolver, kind_of, plain
from jobfetcher.core.errors import WorkerFault
from jobfetcher.core.urls import UrlPolicy
from jobfetcher.transfer.patience import TryAgain


def resolve(host: str) -> tuple[str, ...]:
    """The system's answer, in its order; an address is its own."""
    return tuple(dict.fromkeys(str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)))


class AddressGuard:
    """Checks addresses against a policy. Thread-safe. `own`: the API's host, whose class is pinned at its first
    look-up; its addresses are asked for once a minute at most."""

    def __init__(self, policy: UrlPolicy, resolver: Resolver, own: OwnHost) -> None:
        self._policy, self._resolver, self._own = policy, resolver, own

    @property
    def knows(self) -> bool:
        """Whether the API's addresses are known and not older than a minute."""
        return self._own.is_known

    def learn(self) -> None:
        """Find the API's addresses unless they are known; may block, so it is called where files are signed: once for
        all files that begin together, and no thread has to be started for it."""
        self._own.learn()

    def check(self, host: str, address: str, *, port: int | None = None) -> None:
        """Raise WorkerFault if `host` must not be reached at `address` (and `port`).

        TryAgain if that cannot be said yet, because the API's own addresses are not known.
        """
        known = self._own.addresses
        try:
            self._policy.check_address(host, address, known or (), port=port)
        except WorkerFault:
            if known is None:
                raise self._unknown() from None
            raise
        if known is None and host == self._own.host and kind_of(plain(address)) is not Kind.PUBLIC:
            raise self._unknown()

    def check_name(self, host: str, *, port: int | None = None) -> None:
        """Check all addresses that `host` has for us. For a proxy, which resolves again: the best that can be done."""
        try:
            addresses = self._resolver(host)
        except OSError:
            return  # a name that only the proxy knows
        for address in addresses:
            self.check(host, address, port=port)

    def _unknown(self) -> TryAgain:
        return TryAgain(f"the API's host {self._own.host} has no address now")
