"""A small world with servers planted where no file transfer may go, and the real transfer sent to each of them.

`python -m tests.security.planted`, by root, in a network and a mount namespace of its own (unshare --net --mount): all
addresses here are real and lead to this process, and no other machine is reached. Prints one JSON object.
"""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from jobfetcher.core.errors import JobfetcherError
from jobfetcher.core.urls import UrlPolicy, parse_origin
from tests.support.transfers import Recorder, produced, transfer, wanted

#: The one public storage server; its answers send the caller on to wherever the path says.
PUBLIC = "93.184.216.34"

SECRET = "planted-secret-5d0a"

#: Addresses that this namespace has besides loopback: the nets of a lab, of its provider, of cloud metadata.
INSIDE = [
    "10.0.0.1", "172.16.0.1", "192.168.0.1", "100.64.0.1", "169.254.0.1", "169.254.169.254", "169.254.170.2",
    "192.0.0.1", "198.18.0.1", "203.0.113.1", "fd00:ec2::254", "fc00::1", "fec0::1", "2001:db8::1",
]  # fmt: skip

#: Names that lead there by the hosts file, which libcurl's resolver reads.
NAMES = {
    "metadata.google.internal": "169.254.169.254",
    "files.example": "10.0.0.1",
    "nas.lab": "192.168.0.1",
    "me.example": "127.0.0.1",
    "six.example": "::1",
    "rebound.example": "fd00:ec2::254",
}

#: How the hosts of hostile links are written: what resolvers and browsers take for an address inside.
HOSTS = [
    "127.0.0.1", "127.1.2.3", "127.1", "127.0.1", "2130706433", "0x7f000001", "0x7f.1", "017700000001", "0177.0.0.1",
    "0", "0.0.0.0", "localhost", "LOCALHOST", "localhost.", "[::1]", "[::]", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]", "[::127.0.0.1]", "[::ffff:169.254.169.254]", "[::ffff:10.0.0.1]", "2852039166", "0xa9fea9fe",
    "0251.0376.0251.0376", "169.254.43518", "10.1", "192.168.1", *NAMES,
    *(f"[{address}]" if ":" in address else address for address in INSIDE),
]  # fmt: skip


class Visit(NamedTuple):
    """A connection that was accepted: at which address, and what was sent."""

    address: str
    request: str


class Planted:
    """Listens at every address of the namespace, port 80; whoever comes to PUBLIC is sent on, others get a file."""

    def __init__(self) -> None:
        self.visits: list[Visit] = []
        self._listeners = [socket.create_server(("", 80)), socket.create_server(("::", 80), family=socket.AF_INET6)]
        for listener in self._listeners:
            threading.Thread(target=self._serve, args=[listener], daemon=True).start()

    def _serve(self, listener: socket.socket) -> None:
        while True:
            line, _ = listener.accept()
            with line, contextlib.suppress(OSError):
                line.settimeout(5)
                request = line.recv(65_536).decode("latin-1")
                self.visits.append(Visit(str(line.getsockname()[0]), request))
                location = request.split(" ")[1].partition("?to=")[2]
                head = f"302 Found\r\nLocation: {location}\r\n" if location else '200 OK\r\nETag: "1"\r\n'
                line.sendall(f"HTTP/1.1 {head}Content-Length: 6\r\nConnection: close\r\n\r\nsecret".encode())


def links() -> Iterator[tuple[str, str]]:
    """How a link is used, and the link: fetched, stored to, or the target of a redirect of the public storage."""
    for host in HOSTS:
        yield "get", f"http://{host}/latest/meta-data/"
        yield "redirect", f"http://{PUBLIC}/x?to=http://{host}/latest/meta-data/"
    for host in HOSTS[::3]:
        yield "put", f"http://{host}/x"
        yield "post", f"http://{host}/x"
    for link in (
        "file:///etc/passwd",
        "//127.0.0.1/x",
        "ftp://127.0.0.1/x",
        "http://u:p@127.0.0.1/",
        "gopher://[::1]/",
    ):
        yield "redirect", f"http://{PUBLIC}/x?to={link}"


def follow(policy: UrlPolicy, how: str, link: str, folder: Path) -> str:
    """Send the transfer there with secrets in every field it lets pass; the kind of its refusal, or `moved`."""
    headers = {"Authorization": f"Bearer {SECRET}", "X-Amz-Security-Token": SECRET, "Cookie": f"session={SECRET}"}
    raw = {"method": how.replace("redirect", "get"), "url": link, "headers": headers, "data": {"key": SECRET}}
    moving = transfer(policy, resolver=lambda _: frozenset({"8.8.8.8"}), download_budget_s=5, upload_budget_s=5)
    try:
        request = policy.parse_request(raw)
        if how in {"get", "redirect"}:
            moving.download([wanted(folder, "in", lambda: request)], Recorder())
        else:
            (path := folder / "out").write_bytes(b"out")
            moving.upload([produced(path, lambda _: request)], Recorder())
    except JobfetcherError as error:
        return type(error).__name__
    finally:
        moving.close()
    return "moved"


def main() -> None:
    """Make the world, try every link, then one that is allowed, and print what happened."""
    for command in (
        "mount --make-rprivate /",
        "ip link set lo up",
        *(f"ip addr add {address}/{128 if ':' in address else 32} dev lo" for address in [PUBLIC, *INSIDE]),
    ):
        subprocess.run([*command.split(), *(["nodad"] if "::" in command else [])], check=True)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        names = "".join(f"{address} {name}\n" for name, address in NAMES.items())
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n::1 localhost\n{names}")
        subprocess.run(["mount", "--bind", str(folder / "hosts"), "/etc/hosts"], check=True)
        planted = Planted()
        outside = UrlPolicy(api=parse_origin("http://api.example"))
        tried = [(how, link, follow(outside, how, link, folder)) for how, link in links()]
        visits = list(planted.visits)
        trusting = UrlPolicy(api=parse_origin("http://api.example"), storage_allow=frozenset({"files.example"}))
        control = follow(trusting, "get", "http://files.example/x", folder)
        json.dump(
            {
                "tried": tried,
                "visits": visits,
                "control": [control, [visit.address for visit in planted.visits[len(visits) :]]],
            },
            sys.stdout,
        )


if __name__ == "__main__":
    main()
