"""A chain of the machine's firewall that keeps jobs from the machine's own services (FAULTS.md T31); used by `docker`.

A container on a bridge reaches its host at the bridge's address, and so every service there that listens on all
addresses; the engine has no switch for that. Packets from the jobs' bridge to the machine itself (INPUT) go through
JOBFETCHER, which refuses them; what goes elsewhere (FORWARD) is the engine's own business. Let through are answers of
established connections, questions to a name server that the machine itself uses, in case it is the machine, and what
the owner accepts in JOBFETCHER-USER, which is made here and never changed.

Two workers make the same rules, so each adds what is missing, and none takes anything away: a rule on an interface that
is gone harms nobody. Nothing here stops a job: what cannot be done is said once.
"""

from __future__ import annotations

import ipaddress
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from jobfetcher.core.ports import Emit
from jobfetcher.core.text import clean
from jobfetcher.engine.run_spec import OWN_NETWORK

CHAIN = "JOBFETCHER"
USER_CHAIN = "JOBFETCHER-USER"

#: Whose rule it is, for who lists the machine's rules.
_COMMENT = "of jobfetcher (JOB_NETWORK_GUARD): jobs do not reach this machine"

#: How long what was seen is believed, in seconds. One look is two programs of about 4 ms, so at most one job in so much
#: time waits for them.
LOOK_EVERY_S = 60.0

#: How long a program waits for others that change the rules (-w), and how long it may take in all, in seconds.
_LOCK_S, _WITHIN_S = 2, 10.0

#: Where programs of the administrator lie, which not every service's PATH names; nothing else of ours is passed on.
_PLACES = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

#: Name servers of this machine; the second where systemd-resolved answers in the place of those.
_NAME_SERVERS = (Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf"))

#: What the engine names a bridge, by the network's id, unless this option of the network says otherwise.
_BRIDGE_NAME = "com.docker.network.bridge.name"
_ANY_BRIDGE = f"br-$(docker network inspect -f '{{{{printf \"%.12s\" .Id}}}}' {OWN_NETWORK})"


#: A scope in /proc/net/if_inet6 (linux/ipv6.h: IPV6_ADDR_LINKLOCAL).
_OF_THE_LINK = "20"


class _Failed(Exception):
    """The firewall cannot be read or changed; the message says why, as a part of a sentence."""


class Guard:
    """Keeps the rules of one engine's network for jobs. Thread-safe; never raises.

    `clock`: seconds that pass. `find`: where a program lies, None where it does not. `name_servers`: files in the
    form of resolv.conf(5).
    """

    def __init__(
        self,
        emit: Emit,
        *,
        clock: Callable[[], float] = time.monotonic,
        find: Callable[[str], str | None] = lambda name: shutil.which(name) or shutil.which(name, path=_PLACES),
        name_servers: Sequence[Path] = _NAME_SERVERS,
    ) -> None:
        self._emit = emit
        self._clock = clock
        self._find = find
        self._files = name_servers
        self._lock = threading.Lock()
        self._bridge = ""
        self._due = 0.0
        #: Our part of each program's rules, as it lists them, when all of them were there.
        self._seen: dict[str, list[str]] = {}
        self._said = False

    def hold(self, bridge: str) -> None:
        """Have the rules for this interface, unless they were there a moment ago. Says once why they cannot be had."""
        with self._lock:
            if bridge == self._bridge and self._clock() < self._due:
                return
            if bridge != self._bridge:
                self._seen.clear()
            level, why, added = "info", "", False
            if not _is_here(bridge):
                why = _ELSEWHERE
            else:
                try:
                    added = self._keep("iptables", bridge)
                except _Failed as failed:
                    level, why = "warning", str(failed)
                try:
                    self._keep("ip6tables", bridge)
                except _Failed as failed:
                    if _speaks_ipv6(bridge):  # which a network that was made by us does not
                        level, why = "warning", why or str(failed)
            if why and not self._said:
                self._said = True
                self._emit("network_open", level=level, message=sentence(bridge, why))
            elif added:
                message = f"the chain {CHAIN} of this machine's firewall keeps jobs ({bridge}) from its own services"
                self._emit("network_guarded", message=message)
            self._bridge, self._due = bridge, self._clock() + LOOK_EVERY_S

    def why_not(self, bridge: str) -> str:
        """Why the rules cannot be had, as a sentence; nothing where they can. Changes nothing. `bridge`: empty where
        there is no network for jobs yet."""
        if bridge and not _is_here(bridge):
            return sentence(bridge, _ELSEWHERE)
        try:
            self._listed("iptables")
        except _Failed as failed:
            return sentence(bridge, str(failed))
        return ""

    def _keep(self, program: str, bridge: str) -> bool:
        """Have this program's rules; whether the way into our chain was missing. Raises _Failed."""
        found = self._listed(program)
        if found and found == self._seen.get(program):
            return False
        for chain in (USER_CHAIN, CHAIN):
            if f"-N {chain}" not in found:
                self._ask(program, "-N", chain, missing_ok=True)  # another worker may have made it just now
        for rule in self._returns(program):
            self._have(program, "-I", CHAIN, *rule)
        self._have(program, "-A", CHAIN, "-j", "REJECT")
        # The way into the chain comes last, when the chain is whole.
        added = self._have(program, "-I", "INPUT", "-i", bridge, *_commented(_COMMENT), "-j", CHAIN)
        self._seen[program] = self._listed(program)
        return added

    def _returns(self, program: str) -> Iterator[Sequence[str]]:
        """What goes on to the machine's other rules as it did without us."""
        yield ("-m", "conntrack", "--ctstate", "ESTABLISHED,RELATED", "-j", "RETURN")
        six = program == "ip6tables"
        if six:  # by which neighbours are found
            yield ("-p", "ipv6-icmp", "-j", "RETURN")
        for address in name_servers(self._files):
            if (address.version == 6) is six:
                for protocol in ("udp", "tcp"):
                    yield ("-d", str(address), "-p", protocol, "--dport", "53", "-j", "RETURN")
        yield ("-j", USER_CHAIN)

    def _have(self, program: str, how: str, chain: str, *rule: str) -> bool:
        """Add the rule with `how` (-I or -A) unless the chain has it; whether it was added. Raises _Failed."""
        if self._ask(program, "-C", chain, *rule, missing_ok=True) is not None:
            return False
        self._ask(program, how, chain, *rule)
        return True

    def _listed(self, program: str) -> list[str]:
        """The lines that are ours, without what the owner has in his own chain. Raises _Failed."""
        said = self._ask(program, "-S") or ""
        return [line for line in said.splitlines() if CHAIN in line and not line.startswith(f"-A {USER_CHAIN} ")]

    def _ask(self, program: str, *arguments: str, missing_ok: bool = False) -> str | None:
        """What it says; None where it refuses and that is no wonder (`missing_ok`). Raises _Failed."""
        path = self._find(program)
        if path is None:
            raise _Failed(f"there is no program {program} here")
        command = [path, "-w", str(_LOCK_S), *arguments]
        env = {"PATH": _PLACES, "LC_ALL": "C"}
        try:
            done = subprocess.run(  # noqa: S603 - a list, and no word of it comes from a job
                command, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=_WITHIN_S, check=False
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise _Failed(f"{program} cannot be run ({clean(str(error), 200)})") from error
        if done.returncode == 0:
            return done.stdout.decode(errors="replace")
        # 1: no such rule, or there is such a chain already; 4 and others: it could not look (iptables(8)).
        if missing_ok and done.returncode == 1:
            return None
        said = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
        raise _Failed(f"{program} {arguments[0]}: {clean(said[0], 200)}")


def bridge_of(network_id: str, options: Mapping[str, str]) -> str:
    """The interface of a bridge network of Docker's."""
    return str(options.get(_BRIDGE_NAME) or f"br-{network_id[:12]}")


def name_servers(files: Sequence[Path]) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """Addresses that resolv.conf(5) names, except loopback ones, which are nobody's in a container."""
    found = set()
    for file in files:
        try:
            lines = file.read_text(errors="replace").splitlines()
        except OSError:
            continue
        for line in lines:
            name, *values = line.split()[:2] or [""]
            try:
                address = ipaddress.ip_address(values[0] if name == "nameserver" and values else "")
            except ValueError:
                continue
            if not address.is_loopback and not getattr(address, "scope_id", None):
                found.add(address)
    return sorted(found, key=lambda address: (address.version, int(address)))


def sentence(bridge: str, why: str) -> str:
    """What the owner hears, with the rule that he may add by himself."""
    return (
        f"jobs reach services of the engine's machine that listen on all of its addresses, for {why}. This rule of its "
        f"firewall closes that: iptables -I INPUT -i {bridge or _ANY_BRIDGE} -j REJECT (then set "
        "JOB_NETWORK_GUARD=off, and no more is said of it)"
    )


_ELSEWHERE = "its firewall is not this worker's, which runs in a container or on another machine"


def _is_here(interface: str) -> bool:
    """Whether this process's network namespace has the interface, and so is that of the engine: the name has half an id
    in it, which is nowhere twice."""
    try:
        socket.if_nametoindex(interface)
    except OSError:
        return False
    return True


def _speaks_ipv6(interface: str) -> bool:
    """Whether it has an address of more than the link (/proc/net/if_inet6): containers on it then have IPv6, too."""
    try:
        lines = Path("/proc/thread-self/net/if_inet6").read_text().splitlines()
    except OSError:
        return False
    return any(line.split()[-1] == interface and line.split()[3] != _OF_THE_LINK for line in lines)


def _commented(text: str) -> Sequence[str]:
    return ("-m", "comment", "--comment", text)
