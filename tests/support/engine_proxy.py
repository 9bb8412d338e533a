"""A unix socket before an engine's own, for what happens between it and its client: lost answers, absence, silence."""

import contextlib
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

ENGINE_SOCKET = "/var/run/docker.sock"


class EngineProxy:
    """Passes bytes to and from the engine at `url`. `requests` has the first line of each request.

    `lose(text)`: the answer to the next request that begins so is not passed. `swallow(text)`: requests that begin so
    do not arrive and get no answer, until `swallow(None)`. `away()`: every connection is cut and new ones are refused,
    until `back()`. Containers notice nothing of it.
    """

    def __init__(self, directory: Path, engine: str = ENGINE_SOCKET) -> None:
        self._engine = engine
        self._path = directory / "engine.sock"
        self.url = f"unix://{self._path}"
        self.lost: list[bytes] = []
        self.requests: list[bytes] = []
        self._losing: bytes | None = None
        self._swallowing: bytes | None = None
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self._threads: list[threading.Thread] = []

    def back(self) -> None:
        """Listen."""
        listener = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        listener.bind(str(self._path))
        listener.listen()
        self._listener = listener
        self._spawn(self._accept, listener)

    def away(self) -> None:
        """Cut every connection; the socket's file stays, and nobody listens."""
        if self._listener is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        with self._lock:
            for sock in self._open:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def lose(self, request: str) -> None:
        """The engine acts on the next request that begins with `request`, and its answer gets lost."""
        self._losing = request.encode()

    def swallow(self, request: str | None) -> None:
        """Requests that begin so are not passed on, and get no answer: an engine that hangs in them."""
        self._swallowing = request.encode() if request is not None else None

    def close(self) -> None:
        """Cut all and wait for the threads."""
        self.away()
        for thread in self._threads:
            thread.join()

    def _spawn(self, target: object, *args: object) -> None:
        assert callable(target)
        thread = threading.Thread(target=target, args=args)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            engine = socket.socket(socket.AF_UNIX)
            engine.connect(self._engine)
            with self._lock:
                self._open |= {client, engine}
            muted = threading.Event()
            self._spawn(self._pass, client, engine, muted, True)
            self._spawn(self._pass, engine, client, muted, False)

    def _pass(self, source: socket.socket, sink: socket.socket, muted: threading.Event, asking: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if asking:
                    self.requests.append(data.partition(b"\r\n")[0])
                if asking and self._swallowing and data.startswith(self._swallowing):
                    continue
                if asking and self._losing and data.startswith(self._losing):
                    self.lost.append(self._losing)
                    self._losing = None
                    muted.set()
                if not asking and muted.is_set():
                    break
                sink.sendall(data)
        for sock in (source, sink):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._open.discard(source)
        source.close()


@contextlib.contextmanager
def engine_proxy(url: str = f"unix://{ENGINE_SOCKET}") -> Iterator[EngineProxy]:
    """A proxy of the engine at `url` that listens; gone at the end.

    In a directory of its own: a socket's path has room for 107 bytes.
    """
    with tempfile.TemporaryDirectory(prefix="jobfetcher-proxy-") as directory:
        proxy = EngineProxy(Path(directory), url.removeprefix("unix://"))
        proxy.back()
        try:
            yield proxy
        finally:
            proxy.close()
