"""Hosts as people name them in settings: one host, one port of it, all below a domain, a network of addresses.

STORAGE_ALLOW and REGISTRY_ALLOW say with such names who may have internal addresses (`is_allowed`), NO_PROXY which
hosts are asked without a proxy (`Proxies`). Pure: no name is resolved here.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Self
from urllib.parse import urlsplit

from jobfetcher.core.addresses import Address, Kind, Network, kind_of, plain

#: Letters, digits and hyphens (RFC 1123), and the underscore that names inside a lab often have.
_NAME = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)*")


@dataclass(frozen=True, slots=True)
class HostPattern:
    """One entry. `name` is a host, or with `below` the domain whose hosts are meant (but not the domain itself);
    `network` is set instead where addresses are meant. `port`: only that one; None: every port."""

    name: str = ""
    below: bool = False
    port: int | None = None
    network: Network | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """`minio.lab`, `minio.lab:9000`, `*.lab`, `10.0.0.0/8`, `[fd00::1]:9000`, or a URL, which names its host (and
        its port, if that is written out). Raises ValueError with words for the person who wrote it."""
        entry = text.strip().lower()
        if "://" in entry:
            try:
                parts = urlsplit(entry)
                host, port = parts.hostname or "", parts.port
            except ValueError:
                raise ValueError(f"{text!r} is not a URL") from None
            return cls(name=_host(host, text), port=port)
        if "/" in entry:
            try:
                return cls(network=ipaddress.ip_network(entry, strict=False))
            except ValueError:
                raise ValueError(f"{text!r} is neither a host nor a network of addresses such as 10.0.0.0/8") from None
        below = entry.startswith("*.")
        host, port_text = _split_port(entry.removeprefix("*."))
        if port_text is not None and not (port_text.isdecimal() and 0 < int(port_text) < 65_536):
            raise ValueError(f"{text!r} has no valid port")
        return cls(name=_host(host, text), below=below, port=None if port_text is None else int(port_text))

    def matches(self, host: str, port: int | None) -> bool:
        """Whether `host` (in lower case) at `port` is meant; of a host that is an address, also by its network."""
        if self.network is not None:
            return (address := _address(host)) is not None and self.covers(address)
        if self.port is not None and self.port != port:
            return False
        host = str(_address(host) or host)  # an address can be written in more than one way
        return host.endswith(f".{self.name}") if self.below else host == self.name

    @property
    def is_one_address(self) -> bool:
        """Whether the entry is a network of a single address."""
        return self.network is not None and self.network.num_addresses == 1

    def covers(self, address: Address) -> bool:
        """Whether the entry is a network that `address` lies in."""
        return self.network is not None and address.version == self.network.version and address in self.network


def _split_port(entry: str) -> tuple[str, str | None]:
    if entry.startswith("["):
        host, bracket, rest = entry[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            return entry, None  # which is no host
        return host, rest[1:] if rest else None
    if entry.count(":") == 1:
        host, _, port = entry.partition(":")
        return host, port
    return entry, None  # without a port, or an IPv6 address without brackets


def _host(host: str, text: str) -> str:
    host = host.rstrip(".")
    if (address := _address(host)) is not None:
        return str(address)
    if not _NAME.fullmatch(host) or len(host) > 253:
        raise ValueError(
            f"{text!r} is not a host; write a name (minio.lab), name:port, *.domain, or a network (10.0.0.0/8), "
            "with commas between them"
        )
    return host


def _address(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


@lru_cache(maxsize=16)
def host_patterns(entries: frozenset[str]) -> tuple[HostPattern, ...]:
    """All entries, parsed. Raises ValueError for the first that is none."""
    return tuple(HostPattern.parse(entry) for entry in sorted(entries))


def is_allowed(entries: frozenset[str], host: str, port: int | None, address: str | None = None) -> bool:
    """Whether one of them names the host, or the network that the host or `address`, which it has, lies in.

    Others answer for a name, so a name opens no link-local address and no metadata service of a cloud; nor does a
    network that has other addresses, too. Who means such an address writes it down itself.
    """
    ip = None if address is None else plain(address)
    is_special = ip is not None and kind_of(ip) is Kind.NEVER
    for pattern in host_patterns(entries):
        if pattern.network is None or ip is None:
            if pattern.matches(host, port) and (not is_special or _address(pattern.name) is not None):
                return True
        elif pattern.covers(ip) and (not is_special or pattern.network.is_link_local or pattern.is_one_address):
            return True
    return False


# -- proxies ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Proxies:
    """Which proxy a request goes through. `http`, `https`: for addresses of that scheme. `without`: asked directly.

    `is_given_by_owner`: named by PROXY, which means everything. What the environment says is for every program of the
    machine, so that this machine's own addresses are never asked through it, whether NO_PROXY says so or not; nor are
    the names `here`, which somebody has seen to be names of this machine.
    """

    http: str | None = None
    https: str | None = None
    without: tuple[str, ...] = ()
    is_given_by_owner: bool = False
    here: frozenset[str] = frozenset()

    @classmethod
    def everything_through(cls, proxy: str | None) -> Self:
        """One proxy for all; None: no proxy at all."""
        return cls(proxy, proxy, is_given_by_owner=True)

    def choose(self, scheme: str, host: str, port: int) -> str | None:
        """The proxy for one request; None: it is sent directly."""
        proxy = self.https if scheme == "https" else self.http
        if proxy is None or self.is_given_by_owner:
            return proxy
        host = host.lower().rstrip(".")
        is_here = host in self.here or _is_this_machine(host)
        return None if is_here or _is_without(self.without, host, port) else proxy

    @property
    def addresses(self) -> frozenset[str]:
        """All proxies there are."""
        return frozenset(proxy for proxy in (self.http, self.https) if proxy is not None)


NO_PROXIES = Proxies()


def _is_this_machine(host: str) -> bool:
    address = _address(host)
    return host == "localhost" if address is None else address.is_loopback


@lru_cache(maxsize=256)
def _is_without(without: tuple[str, ...], host: str, port: int) -> bool:
    """As curl and requests read NO_PROXY: `*` is every host, `example.org` also all below it, with or without a dot
    before it; addresses and networks by number. What cannot be read is of no use, and is no reason to stop."""
    for entry in without:
        if entry == "*":
            return True
        try:
            pattern = HostPattern.parse(entry.removeprefix("*").removeprefix("."))
        except ValueError:
            continue
        if pattern.matches(host, port):
            return True
        if pattern.network is None and pattern.port in {None, port} and host.endswith(f".{pattern.name}"):
            return _address(host) is None
    return False
