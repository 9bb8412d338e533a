"""The broker's socket and its connections: one thread for each, with one connection to the engine behind it.

Made by `build_broker`. Promises: only the worker's user and root are listened to; a connection of a client and the one
to the engine live and end together, so all answers on one come from one engine process (`engine.vouch`); a client that
is slow, silent or half closed costs a thread for a time that has an end, and at most so many threads there are. A
container is the engine's: when the broker ends, at once and whatever is under way, jobs run on, and a worker finds a
broker that is started again as it finds an engine.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

from jobfetcher.broker.rules import Rules
from jobfetcher.broker.talk import (
    Engine,
    Gone,
    Peer,
    Refusal,
    Reply,
    read_request,
    refusal_reply,
    wait_for_request,
    write_reply,
)
from jobfetcher.core.errors import ConfigError
from jobfetcher.core.ports import Emit
from jobfetcher.core.text import clean

#: Most connections at a time. A job that runs has one, and up to 256 may run beside each other (MAX_JOBS).
_MOST = 600

#: How long one read or write may take, in seconds.
_STEP_S = 30.0

#: How long a connection to the engine may take to be made, in seconds.
_CONNECT_S = 10.0

#: So many refusals are told at once, and so many more each second: whoever floods the broker does not fill the log.
_TOLD_AT_ONCE, _TOLD_PER_S = 50.0, 2.0

#: A thread here holds one small request at a time.
_STACK_BYTES = 512 * 1024


def connect(url: str, client: Peer) -> Engine:
    """A connection to the engine at `unix:///path` or `tcp://host:port`. Raises OSError."""
    scheme, _, rest = url.partition("://")
    if scheme == "tcp":
        host, _, port = rest.rpartition(":")
        sock = socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S)
    else:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(_CONNECT_S)
            sock.connect(rest)
        except OSError:
            sock.close()
            raise
    return Engine(sock, _STEP_S, client)


class Broker:
    """Listens at `path`. `uids`: users that may ask, beside root and its own. Use as a context manager.

    `emit` hears `refused` with the number of all refusals so far, of many at a time the first `told_at_once`.
    """

    def __init__(
        self,
        path: Path,
        uids: frozenset[int],
        rules: Rules,
        engine: Callable[[Peer], Engine],
        emit: Emit,
        *,
        told_at_once: float = _TOLD_AT_ONCE,
    ) -> None:
        self._path = path
        self._uids = uids | {0, os.geteuid()}
        self._owner = min(uids, default=None)
        self._rules = rules
        self._engine = engine
        self._emit = emit
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()
        self._closing = threading.Event()
        self.refused = 0
        self._may_tell, self._told_at = told_at_once, time.monotonic()
        self._told_at_once = told_at_once
        self._listener = self._listen()

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                if not stat.S_ISSOCK(self._path.lstat().st_mode):
                    raise ConfigError(f"BROKER_SOCKET: {self._path} is there and is no socket")
                with socket.socket(socket.AF_UNIX) as other:
                    if other.connect_ex(str(self._path)) == 0:
                        raise ConfigError(f"BROKER_SOCKET: a broker listens at {self._path} already")
                self._path.unlink()
            mask = os.umask(0o177)
            try:
                listener.bind(str(self._path))
            finally:
                os.umask(mask)
            if self._owner is not None:
                os.chown(self._path, self._owner, -1)
            listener.listen(128)
        except OSError as error:
            listener.close()
            raise ConfigError(f"BROKER_SOCKET: {self._path} cannot be made: {error.strerror or error}") from None
        except ConfigError:
            listener.close()
            raise
        return listener

    def __enter__(self) -> Broker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def serve(self) -> None:
        """Take connections until `close`."""
        before = threading.stack_size(_STACK_BYTES)
        try:
            while not self._closing.is_set():
                try:
                    sock, _ = self._listener.accept()
                except OSError:
                    if self._closing.wait(0.1):  # no descriptor is free, say: that passes
                        return
                    continue
                self._take(sock)
        finally:
            threading.stack_size(before)

    def close(self) -> None:
        """Hang up on everybody and end."""
        self._closing.set()
        for sock in (self._listener, *list(self._open)):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in list(self._threads):
            thread.join()
        with contextlib.suppress(OSError):
            self._path.unlink()

    def _take(self, sock: socket.socket) -> None:
        uid = int(Peer(sock, _STEP_S).user.partition(":")[0])
        if uid not in self._uids:
            self._note("another user", f"user {uid} may not ask this broker (BROKER_USER)")
            sock.close()
            return
        with self._lock:
            full = len(self._open) >= _MOST
            if not full:
                self._open.add(sock)
        if full:
            self._note("too many", f"more than {_MOST} connections at a time are none of a worker's")
            sock.close()
            return
        thread = threading.Thread(target=self._serve, args=(sock,), name="broker", daemon=True)
        self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError:  # the limit of threads
            self._threads.discard(thread)
            self._drop(sock)

    def _serve(self, sock: socket.socket) -> None:
        client, engine = Peer(sock, _STEP_S), None
        try:
            while wait_for_request(client, None if engine is None else engine.peer):
                try:
                    request = read_request(client)
                    if request is None:
                        return
                    if engine is None:
                        engine = self._connect(client)
                    reply = self._rules.reply(request, engine, client)
                except Refusal as refusal:
                    reply = self._refuse(refusal)
                    if refusal.closes:
                        write_reply(client, reply)
                        return
                write_reply(client, reply)
        except Gone:  # either side: whoever is left sees the connection end, and asks again on another one
            pass
        except Exception as error:
            self._emit("broker_error", level="error", message=f"a request could not be answered: {error!r}")
        finally:
            if engine is not None:
                engine.close()
            self._drop(sock)
            self._threads.discard(threading.current_thread())

    def _connect(self, client: Peer) -> Engine:
        try:
            return self._engine(client)
        except OSError as error:
            self._rules.engine_lost()
            raise Gone(str(error)) from error

    def _refuse(self, refusal: Refusal) -> Reply:
        if refusal.is_attempt:
            self._note(str(refusal.status), str(refusal))
        return refusal_reply(refusal.status, f"the broker refuses this: {refusal}")

    def _note(self, kind: str, sentence: str) -> None:
        with self._lock:
            self.refused += 1
            count, now = self.refused, time.monotonic()
            self._may_tell = min(self._told_at_once, self._may_tell + (now - self._told_at) * _TOLD_PER_S)
            self._told_at = now
            if self._may_tell < 1:
                return
            self._may_tell -= 1
        self._emit("refused", level="warning", message=f"refused ({kind}): {clean(sentence, 300)}", count=count)

    def _drop(self, sock: socket.socket) -> None:
        with self._lock:
            self._open.discard(sock)
        sock.close()
