"""What an address is: public, of this network, of this machine, or one that nothing is ever asked at.

One reading for all who connect because somebody else said so (FAULTS.md T7, T25): storage (`core.urls`), the registry
of a job's image (`engine.registries`), and the API's own host, whose name others answer for (`OwnHost`). Nothing here
resolves or connects: whoever makes an `OwnHost` gives it a resolver.
"""

from __future__ import annotations

import ipaddress
import math
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterable
from enum import StrEnum

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

#: All addresses of a host name, in the order in which they are to be tried; raises OSError when there are none.
Resolver = Callable[[str], Collection[str]]

#: The API's addresses are looked up again after so long, and a look-up that failed after so long: it may have taken
#: long, and many files wait for the same one. In seconds.
_KNOWN_FOR_S, _AGAIN_AFTER_S = 60.0, 1.0

#: IPv6 addresses whose last 32 bits are the IPv4 address that the packet ends up at: IPv4-compatible (RFC 4291),
#: -mapped, -translated (RFC 2765), NAT64 (RFC 6052) and its local form (RFC 8215).
_WRAPPED = tuple(
    ipaddress.IPv6Network(text)
    for text in ("::/96", "::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48")
)

#: Not public, whatever this Python's `ipaddress` knows of them: site-local (RFC 3879), documentation (RFC 9637), 6to4
#: relays (RFC 7526).
_NOT_PUBLIC = tuple(ipaddress.ip_network(text) for text in ("fec0::/10", "3fff::/20", "192.88.99.0/24"))

#: Where clouds hand their machines' credentials to whoever asks, beside the link-local addresses: those of AWS, Google
#: and Scaleway by IPv6, Alibaba's, Oracle's older one, and Azure's wire server, which is even a public address.
_METADATA = frozenset(
    ipaddress.ip_address(text)
    for text in (
        "fd00:ec2::254",
        "fd20:ce::254",
        "fd00:42::42",
        "100.100.100.200",
        "192.0.0.192",
        "168.63.129.16",
    )
)

#: "This host on this network" (RFC 1122): the first of them is unspecified, and Linux takes it for this machine.
_UNSPECIFIED = ipaddress.ip_network("0.0.0.0/8")


class Kind(StrEnum):
    """Where an address lies. NEVER: link-local, multicast, unspecified, or the metadata service of a cloud."""

    PUBLIC = "public"
    PRIVATE = "private"
    LOOPBACK = "loopback"
    NEVER = "link-local or metadata"


#: The most public kind first: whoever lies there is trusted with the least.
_PUBLICITY = (Kind.PUBLIC, Kind.PRIVATE, Kind.LOOPBACK)


def plain(address: str) -> Address:
    """The address, an IPv4 one where it only wears IPv6 clothes (::ffff:127.0.0.1, 64:ff9b::7f00:1). ValueError: it is
    none."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.sixtofour is not None:
            return ip.sixtofour
        # ::1 and :: lie in the first of them and are themselves.
        if int(ip) > 1 and any(ip in network for network in _WRAPPED):
            return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip


def literal(host: str) -> Address | None:
    """The address that `host` is in any spelling that a resolver takes without asking anybody (`2130706433`, `0x7f.1`,
    `127.1`, `[::1]` without its brackets); None: it is a name."""
    try:
        return plain(host)
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host))
    except (OSError, UnicodeEncodeError):
        return None


def kind_of(address: Address) -> Kind:
    """Where a `plain` address lies."""
    if address.is_link_local or address.is_multicast or address.is_unspecified or address in _METADATA:
        return Kind.NEVER
    if address.version == 4 and address in _UNSPECIFIED:
        return Kind.NEVER
    if address.is_loopback:
        return Kind.LOOPBACK
    is_listed = any(address.version == network.version and address in network for network in _NOT_PUBLIC)
    return Kind.PUBLIC if address.is_global and not is_listed else Kind.PRIVATE


def class_of(addresses: Iterable[str]) -> Kind | None:
    """The kind that a host counts as which has all these addresses: the most public one of them, because trust in what
    lies inside is for those who lie wholly inside. None: nothing is known of it."""
    kinds = {kind_of(plain(address)) for address in addresses}
    return next((kind for kind in _PUBLICITY if kind in kinds), None)


def is_open(kind: Kind, own: Kind | None) -> bool:
    """Whether an address of that kind may be asked for a server of the class `own`: public ones may, private ones where
    the server itself is private or on this machine, loopback where it is on this machine (FAULTS.md T7)."""
    match kind:
        case Kind.PUBLIC:
            return True
        case Kind.PRIVATE:
            return own in {Kind.PRIVATE, Kind.LOOPBACK}
        case Kind.LOOPBACK:
            return own is Kind.LOOPBACK
        case Kind.NEVER:
            return False


class OwnHost:
    """The API's own host, by the kind of addresses that its name has. Thread-safe.

    Others answer for a name. Who has it answer with an address inside would lead this worker there, and be trusted with
    more (FAULTS.md T7): so what is found first is pinned for the life of this process, and trust is only ever lowered.
    A server that moves to another place of the same kind, or to a more public one, is followed; the first answer may
    have been that of a hotel's portal. For one that moves inside, the worker is started anew.

    `is_proven`: by TLS. Then its own calls go wherever the name leads (a VPN may have it lead inside), for nobody else
    can answer there, but what it is trusted with stays as it was.
    """

    def __init__(
        self,
        host: str,
        resolver: Resolver,
        clock: Callable[[], float] = time.monotonic,
        *,
        is_proven: bool = False,
    ) -> None:
        self.host = host
        self._resolver, self._clock, self._is_proven = resolver, clock, is_proven
        self._lock = threading.Lock()
        #: One that is written down as an address is the owner's word, and nobody can have it answer otherwise.
        address = literal(host)
        self._is_literal = address is not None
        self._pinned: frozenset[str] | None = None if address is None else frozenset({str(address)})
        self._until = math.inf if self._is_literal else -1.0
        self._not_before = -1.0

    @property
    def addresses(self) -> frozenset[str] | None:
        """Those that it is known by: the most public ones that it had. None: nobody has asked, or none were there."""
        return self._pinned

    @property
    def kind(self) -> Kind | None:
        """Its class; None: not known yet."""
        return class_of(self._pinned or ())

    @property
    def is_known(self) -> bool:
        """Whether its addresses are known, and were looked up within the last minute."""
        return self._pinned is not None and self._clock() < self._until

    def learn(self) -> None:
        """Find its addresses unless they are known. May block; not asked again within a second of a failure."""
        with self._lock:
            if self.is_known or self._clock() < self._not_before:
                return
            try:
                self._pin(self._resolver(self.host))
            except OSError:  # what was known stays known
                self._not_before = self._clock() + _AGAIN_AFTER_S

    def resolve(self) -> list[str]:
        """Its addresses now, in the order in which they are to be tried, without those of a kind that it must not have.
        Where nothing is left, ValueError says so to people. Raises OSError when there are none."""
        found = list(self._resolver(self.host))
        if self._is_literal:
            return found
        with self._lock:
            known = {kind_of(plain(address)) for address in self._pin(found)}
        if self._is_proven and known:
            known |= {Kind.PUBLIC, Kind.PRIVATE, Kind.LOOPBACK}
        known.discard(Kind.NEVER)
        usable = [address for address in found if kind_of(plain(address)) in known]
        if found and not usable:
            was = f", and it was {self.kind} before" if known else ""
            raise ValueError(
                f"the name {self.host} leads to {found[0]}, which is {kind_of(plain(found[0]))}{was}: it is not asked "
                "there. If the server has moved, start the worker anew"
            )
        return usable

    def _pin(self, addresses: Collection[str]) -> frozenset[str]:
        """What it is known by from here on. The lock is held."""
        now, before = class_of(addresses), self.kind
        if now is not None and (before is None or _PUBLICITY.index(now) < _PUBLICITY.index(before)):
            self._pinned = frozenset(addresses)
        self._until = self._clock() + _KNOWN_FOR_S
        return self._pinned or frozenset()
