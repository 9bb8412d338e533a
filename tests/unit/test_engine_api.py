"""What the one door to the engine makes of its answers: here of a removal, in words that Podman 4.3 was seen to use.

The engine is a scripted server, for what it says depends on a race of microseconds; the real ones are in
tests/contract/test_engine.py.
"""

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from jobfetcher.core.errors import WorkerFault
from jobfetcher.engine.api import EngineApi

IMPROPER = (
    500,
    "cannot remove container 1 as it could not be stopped: sending SIGKILL: container state improper: stopped",
)
GONE = (404, "no such container")


@contextmanager
def engine(answers: list[tuple[int, str]]) -> Iterator[tuple[EngineApi, list[str]]]:
    """A door to an engine that gives `answers` to what is not a question for its version, and what it was told."""
    told: list[str] = []
    left = iter(answers)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer(200, {"ApiVersion": "1.41", "Arch": "amd64", "Os": "linux"})

        def do_DELETE(self) -> None:
            self.script()

        def do_POST(self) -> None:
            self.script()

        def script(self) -> None:
            told.append(f"{self.command} {self.path}")
            status, said = next(left)
            self.answer(status, {"message": said})

        def answer(self, status: int, body: object) -> None:
            content = json.dumps(body).encode() if status != 204 else b""
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """It is quiet."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            with closing(EngineApi(f"tcp://127.0.0.1:{server.server_port}")) as api:
                yield api, told
        finally:
            server.shutdown()


@pytest.mark.parametrize(
    ("answers", "asked"),
    [
        ([(204, "")], ["DELETE"]),
        ([GONE], ["DELETE"]),
        ([IMPROPER, (204, "")], ["DELETE", "DELETE"]),  # it ended while it was told to be gone
        ([IMPROPER, IMPROPER, GONE], ["DELETE", "DELETE", "DELETE"]),
        ([(409, "removal is already in progress"), (200, "")], ["DELETE", "POST"]),
        ([(409, "removal is already in progress"), GONE], ["DELETE", "POST"]),
    ],
)
def test_a_container_is_gone_in_the_end(answers: list[tuple[int, str]], asked: list[str]) -> None:
    with engine(answers) as (api, told):
        with api.calling("remove a container"):
            api.remove("1")
        assert [what.split()[0] for what in told] == asked


@pytest.mark.parametrize("said", [IMPROPER, (500, "driver overlay2 failed to remove root filesystem")])
def test_an_engine_that_cannot_remove_it_is_not_asked_without_end(said: tuple[int, str]) -> None:
    with engine([said] * 10) as (api, told):
        with pytest.raises(WorkerFault, match="could not remove a container"), api.calling("remove a container"):
            api.remove("1")
        assert len(told) == (4 if said == IMPROPER else 1)
