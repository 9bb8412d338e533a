"""An engine that does nothing but answer look-ups and write down what it is asked: what arrives behind a broker.

It stands for Docker where a test wants to know that nothing reached it. A test double: no container is ever made.
"""

import contextlib
import http.server
import json
import re
import socketserver
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

_LOOK_UP = re.compile(
    r"/info|/version|/containers/[A-Za-z0-9_-]+/json|/images/[a-z0-9./:-]+/json|/networks/[0-9a-f]{64}"
)


@dataclass
class CountingEngine:
    """`there`: what is found, by path below the version. `asked`: everything that arrived, as (method, path, body)."""

    url: str
    there: dict[str, Any]
    asked: list[tuple[str, str, bytes]] = field(default_factory=list)

    def acts(self) -> list[tuple[str, str, bytes]]:
        """What arrived and was no look-up of what one thing is: it would do something, or tell too much."""
        return [one for one in self.asked if one[0] != "GET" or not _LOOK_UP.fullmatch(one[1])]


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 128


@contextlib.contextmanager
def counting_engine(folder: Path, there: Mapping[str, Any]) -> Iterator[CountingEngine]:
    """An engine below `folder` for the length of the block."""
    path = folder / "engine.sock"
    engine = CountingEngine(f"unix://{path}", dict(there))

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def address_string(self) -> str:
            return "client"

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            whole = urlsplit(self.path).path
            below = whole.removeprefix("/v1.41")
            engine.asked.append((self.command, below, body))
            found = engine.there.get(below) if self.command == "GET" else None
            if self.command == "POST" and below == "/containers/create":
                status, said = 201, json.dumps({"Id": "c" * 64, "Warnings": []}).encode()
            elif found is None:
                status, said = 404, b'{"message": "No such thing"}'
            else:
                status, said = 200, json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(said)

        do_GET = do_POST = do_DELETE = do_PUT = do_HEAD = do_PATCH = _answer

    server = _Server(str(path), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, name="counting engine")
    thread.start()
    try:
        yield engine
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        path.unlink()
