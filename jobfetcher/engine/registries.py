"""Which registries the engine is asked to pull from (FAULTS.md T25).

Used by `images`. A job names its image, and with it a host that the engine then asks, from this machine and with this
machine's reach. So that host is judged before the engine hears of it, with the rules for a storage's address (T7): by
all addresses that its name has, in any spelling, unless the owner named the registry.

What this cannot close is closed at the engine's own egress, by a proxy for its pulls (README, Images): the engine
resolves the name once more, and a name server may answer it otherwise; and it follows a registry to the address where
that has its users sign in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from jobfetcher.core.addresses import Address, Kind, OwnHost, Resolver, class_of, is_open, kind_of, literal, plain
from jobfetcher.core.errors import WorkerFault, WorkerReason
from jobfetcher.core.hosts import NO_PROXIES, Proxies, is_allowed
from jobfetcher.engine.references import Reference, names_registry

#: The registry of images that name none, and the host that an engine asks for them.
_DEFAULT, _DEFAULT_HOST = "docker.io", "registry-1.docker.io"

#: An engine asks a registry that names no port here; it tries the other one of HTTP only where it was told to.
_HTTPS = 443


class Egress(NamedTuple):
    """How an engine reaches registries: its proxies, and whether it asks mirrors in the place of docker.io."""

    proxies: Proxies = NO_PROXIES
    has_mirrors: bool = False

    @classmethod
    def of(cls, info: Mapping[str, Any]) -> Egress:
        """What an engine says of it in GET /info. Podman has the same names for its proxies."""
        without = tuple(entry.strip() for entry in str(info.get("NoProxy") or "").split(",") if entry.strip())
        proxies = Proxies(info.get("HttpProxy") or None, info.get("HttpsProxy") or None, without)
        return cls(proxies, bool((info.get("RegistryConfig") or {}).get("Mirrors")))

    @property
    def is_proxied(self) -> bool:
        """Whether pulls go through a proxy: registries are asked by HTTPS."""
        return self.proxies.https is not None


@dataclass(frozen=True, slots=True)
class RegistryRules:
    """What is asked and what is not. `own`: the API's host, whose class decides whether internal ones may be.

    `allow`: REGISTRY_ALLOW. `images`: ALLOWED_IMAGES, which names registries, too.
    """

    own: OwnHost
    resolver: Resolver
    allow: frozenset[str] = frozenset()
    images: tuple[str, ...] = ()

    def check(self, wanted: Reference, egress: Egress) -> None:
        """Raise WorkerFault unless the engine may ask the registry of that image: POLICY where it may not (another
        machine's owner may see it otherwise), REGISTRY where that cannot be said now. May block for a look-up.

        Through a proxy it is the proxy that resolves, so what a name leads to here is the best that can be known, and
        one that nobody here knows is no reason to wait: as for a storage. Neither is it where the owner named the
        registry, which the engine may know from a hosts file of its own.
        """
        host, port = _split(wanted.domain)
        if wanted.domain == _DEFAULT and egress.has_mirrors:
            return  # they are asked first, and are the choice of the engine's owner
        is_named = names_registry(self.images, wanted.domain)
        if (address := literal(host)) is not None:
            self._judge(wanted, str(address), port, address, is_named=is_named)
            return
        names = (host, _DEFAULT) if host == _DEFAULT_HOST else (host,)
        is_named = is_named or any(is_allowed(self.allow, name, port) for name in names)
        may_be_unknown = is_named or egress.proxies.choose("https", host, port) is not None
        try:
            found = self.resolver(host)
        except (OSError, UnicodeError) as error:
            if may_be_unknown:
                return
            why = "and the engine is not asked in the blind; if only the engine knows it, add it to REGISTRY_ALLOW"
            raise WorkerFault(
                WorkerReason.REGISTRY, f"the registry of image {wanted} is out of reach: {host} has no address, {why}"
            ) from error
        for text in found:
            self._judge(wanted, host, port, plain(text), is_named=is_named)

    def _judge(self, wanted: Reference, host: str, port: int, address: Address, *, is_named: bool) -> None:
        kind = kind_of(address)
        if kind is Kind.PUBLIC or is_allowed(self.allow, host, port, str(address)):
            return
        # Others answer for a name: the owner who means such an address writes it down itself.
        if is_named and (kind is not Kind.NEVER or literal(host) is not None):
            return
        if kind is not Kind.NEVER:
            self.own.learn()
            if self.own.addresses is None:
                raise WorkerFault(
                    WorkerReason.REGISTRY,
                    f"whether image {wanted} may be asked for cannot be said now: its registry is internal, and the "
                    f"API's host {self.own.host} has no address",
                )
            if is_open(kind, class_of(self.own.addresses)):
                return
        raise WorkerFault(
            WorkerReason.POLICY,
            f"image {wanted} is not asked for: its registry has an internal address ({kind}), which this worker lets "
            "no job name; if that registry is yours, add it to REGISTRY_ALLOW, or name it in ALLOWED_IMAGES",
        )


def _split(domain: str) -> tuple[str, int]:
    """The host that an engine asks and its port, of a reference's domain, whose grammar is checked (`references`)."""
    if domain == _DEFAULT:
        return _DEFAULT_HOST, _HTTPS
    host, colon, port = domain.rpartition(":")
    if not colon or "]" in port:
        return domain.strip("[]").lower(), _HTTPS
    return host.strip("[]").lower(), int(port)
