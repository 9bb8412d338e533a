"""A store in memory that plays `core.ports.Transfer`, for tests of whoever moves files and does not care how.

An object's name is the signed request's URL; a POST form adds `/<filename>`, as a form is good for a whole folder.
Everything happens in the caller's thread, one file after the other.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from typing import TypeVar

from jobfetcher.core.errors import JobFault, JobReason, SourceRefused, SourceUnavailable, WorkerFault, WorkerReason
from jobfetcher.core.ports import Download, Upload, Watch
from jobfetcher.core.run import Stored
from jobfetcher.core.urls import Method

T = TypeVar("T")

_SIGN_TRIES = 20


class FakeTransfer:
    """`objects` is what is stored. `failures`: by item name, raised instead of moving it, once per entry.

    `stall`: names of items at which it waits until the halt is set, or they are not in it any more; `troubles`: why an
    item is tried again first, by name. Closed, it refuses to move anything.
    """

    def __init__(self, *, max_upload_bytes: int = 5 * 1024**3) -> None:
        self.objects: dict[str, bytes] = {}
        self.failures: dict[str, list[Exception]] = {}
        self.stall: set[str] = set()
        self.troubles: dict[str, str] = {}
        self.closed = False
        self._max_upload_bytes = max_upload_bytes

    def download(self, items: Iterable[Download], watch: Watch) -> None:
        """As `core.ports.Transfer.download`."""
        for item in items:
            self._begin(item, watch)
            request = _signed(item.sign, watch)
            content = self.objects.get(request.url)
            if request.method is not Method.GET:
                raise JobFault(JobReason.UNSAFE_REQUEST, "the server handed out a request that sends")
            if content is None:
                raise JobFault(JobReason.INPUT_MISSING, f"input {item.name} not found in storage")
            item.part.write_bytes(content)
            watch.expect(len(content))
            watch.moved(len(content))
            watch.done(item, Stored(item.name, len(content), f"sha256:{hashlib.sha256(content).hexdigest()}"))

    def upload(self, items: Iterable[Upload], watch: Watch) -> None:
        """As `core.ports.Transfer.upload`."""
        first: JobFault | WorkerFault | None = None
        for item in items:
            try:
                stored = self._send(item, watch)
            except (JobFault, WorkerFault) as error:
                first = first or error
            else:
                watch.expect(stored.size)
                watch.moved(stored.size)
                watch.done(item, stored)
        if first is not None:
            raise first

    def close(self) -> None:
        self.closed = True

    def _begin(self, item: Download | Upload, watch: Watch) -> None:
        name = item.name
        if self.closed:
            raise WorkerFault(WorkerReason.INTERNAL, "files cannot be moved any more: the worker is closing")
        if name in self.troubles:
            watch.retrying(item, self.troubles[name], 3600.0)
        while name in self.stall and not watch.halt.wait(0.05):
            pass
        watch.halt.check()
        if self.failures.get(name):
            raise self.failures[name].pop(0)

    def _send(self, item: Upload, watch: Watch) -> Stored:
        self._begin(item, watch)
        if item.size > self._max_upload_bytes:
            raise JobFault(JobReason.OUTPUT_TOO_LARGE, f"output {item.name} is larger than the store takes")
        request = _signed(lambda: item.sign(False), watch)
        if request.method is Method.GET:
            raise JobFault(JobReason.UNSAFE_REQUEST, "the server handed out a request that fetches")
        try:
            with os.fdopen(item.open(), "rb") as file:
                now = os.fstat(file.fileno())
                content = file.read()
        except OSError as error:
            raise WorkerFault(WorkerReason.DISK, f"output {item.name} cannot be read: {error.strerror}") from error
        if (now.st_size, now.st_mtime_ns) != (item.size, item.mtime_ns) or len(content) != item.size:
            raise JobFault(JobReason.BAD_OUTPUT, f"output {item.name} changed while it was sent")
        key = request.url if request.method is Method.PUT else f"{request.url}/{item.filename}"
        self.objects[key] = content
        return Stored(item.name, len(content), f"md5:{hashlib.md5(content, usedforsecurity=False).hexdigest()}")


def _signed(sign: Callable[[], T], watch: Watch) -> T:
    for _ in range(_SIGN_TRIES):
        watch.halt.check()
        try:
            return sign()
        except (SourceUnavailable, SourceRefused):
            continue
    raise WorkerFault(WorkerReason.SOURCE, "no file request could be had from the source")
