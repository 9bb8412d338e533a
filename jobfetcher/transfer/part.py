"""The growing file of one download: its bytes, their running hashes, and what the whole must be.

Used by `download`. The worker opens it and asks what is `wanted`; during an exchange the loop's thread owns it
(`accept`, `write`); then the worker has it back. What a later process needs to go on where this one was killed lies
beside it, in `<part>.etag`: the strong ETag, the size and the checksums of the object that the bytes are of.

An attempt asks for one range of one file; today that is always "all that is missing".
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Self

from pydantic import ValidationError

from jobfetcher.core.errors import JobFault, JobReason, WorkerFault, WorkerReason
from jobfetcher.core.run import Stored
from jobfetcher.core.text import clean
from jobfetcher.transfer.digests import Digests, Expected
from jobfetcher.transfer.exchange import Reply, Sink
from jobfetcher.transfer.patience import TryAgain
from jobfetcher.transfer.replies import content_length, content_range, strong_etag

#: Less than this is fetched again rather than remembered: the small file beside it would cost more.
_WORTH_RESUMING = 65_536
_BLOCK = 1024 * 1024

#: `aws-chunked` is how some clients sent the object; stores that repeat it send plain bytes all the same.
_PLAIN = frozenset({"", "identity", "aws-chunked"})


class Discard(TryAgain):
    """The reply does not belong to the bytes we have: start over."""


class Part:
    """One part file. A context manager: leaving it closes the file, which stays, and so can be resumed.

    `offset` bytes are there; `best` is the most there ever was, so that bytes fetched twice count as no progress.
    Raises WorkerFault(DISK) when the file cannot be written, and then takes it away.
    """

    def __init__(self, path: Path, name: str, moved: Callable[[int], None], expect: Callable[[int], None]) -> None:
        self.offset = self.best = 0
        self._path, self._name, self._moved, self._expect = path, name, moved, expect
        self._announced = False
        self._note = path.with_name(path.name + ".etag")
        self._expected: Expected | None = None
        self._digests = Digests(frozenset())
        self._told = 0
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise self._disk(error) from error
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            os.close(self._fd)
            raise WorkerFault(WorkerReason.DISK, f"{path.name} is not a regular file")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def resume(self, check: Callable[[], None]) -> None:
        """Go on with what an earlier process left, if it can be trusted. `check` runs between blocks and may raise."""
        expected, size = self._read_note(), os.fstat(self._fd).st_size
        if expected is None or not expected.etag or (expected.size is not None and size > expected.size):
            return self.restart()
        self._expected, self._digests = expected, Digests.for_expected(expected)
        try:
            while block := os.pread(self._fd, _BLOCK, self.offset):
                check()
                self._digests.update(block)
                self.offset += len(block)
        except OSError as error:
            raise self._disk(error) from error
        self.best = self.offset
        return None

    def wanted(self) -> list[str]:
        """Header lines that ask for what is missing (RFC 9110, 13.1.5: If-Range needs a strong ETag)."""
        if self._expected is None or not self._expected.etag:
            self.restart()
        if not self.offset or self._expected is None:
            return []
        return [f"Range: bytes={self.offset}-", f"If-Range: {self._expected.etag}"]

    def accept(self, reply: Reply) -> Sink | None:
        """Where the body of `reply` goes; None if it is not the file. In the loop's thread."""
        if reply.status not in {200, 206}:
            return None
        encoding = reply.headers.get("content-encoding", "").strip().lower()
        if encoding not in _PLAIN:
            raise JobFault(
                JobReason.INPUT_CORRUPT,
                f"input {self._name} is stored with Content-Encoding {clean(encoding, 40)}, which this worker does not "
                "unpack; store it without",
            )
        if reply.status == 200:
            self._begin(Expected.of(reply))
        else:
            self._go_on(reply)
        return self._write

    def restart(self) -> None:
        """Forget all bytes."""
        self._moved(-self._told)
        self.offset = self._told = 0
        self._expected, self._digests = None, Digests(frozenset())
        try:
            # The note goes first: a note beside bytes of another object would be believed.
            self._note.unlink(missing_ok=True)
            os.ftruncate(self._fd, 0)
        except OSError as error:
            raise self._disk(error) from error

    def check_whole(self, reply: Reply) -> None:
        """Raise TryAgain if bytes are missing, Discard if the end cannot be told from a cut (C2)."""
        expected = self._expected
        if expected is None:
            raise Discard("the storage sent no file")
        if expected.size is not None and self.offset < expected.size:
            raise TryAgain(f"the storage sent {self.offset} of {expected.size} bytes")
        chunked = "chunked" in reply.headers.get("transfer-encoding", "").lower()
        if expected.size is None and not chunked and not expected.sums:
            raise Discard("the storage says neither the file's length nor its checksum")

    def mismatch(self) -> str:
        """What is wrong with the bytes of the whole file, for people; empty if nothing is known to be."""
        return "" if self._expected is None else self._digests.mismatch(self._expected)

    def stored(self) -> Stored:
        """The whole file; the note beside it is gone."""
        self._note.unlink(missing_ok=True)
        etag = "" if self._expected is None else self._expected.etag
        return Stored(self._name, self.offset, self._digests.digest, etag)

    def remove(self) -> None:
        """Take the file and its note away; nothing of it is worth keeping."""
        for path in (self._note, self._path):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def _begin(self, expected: Expected) -> None:
        self.restart()
        self._expected, self._digests = expected, Digests.for_expected(expected)
        if expected.size is not None:
            self._check_room(expected.size)
            self._announce(expected.size)
        if expected.etag and (expected.size is None or expected.size > _WORTH_RESUMING):
            # Only good for resuming: if it cannot be written, nothing is lost but that.
            with contextlib.suppress(OSError):
                self._note.write_text(expected.model_dump_json())

    def _go_on(self, reply: Reply) -> None:
        """A 206 must be exactly what was asked for: from our offset on, of the same object (C4)."""
        piece, length, etag = content_range(reply), content_length(reply), strong_etag(reply)
        if self._expected is None or not self.offset:
            raise Discard("the storage sent a part of the file though all of it was asked for")
        if piece is None or piece.first != self.offset or length not in {None, piece.last - piece.first + 1}:
            raise Discard("the storage sent another part of the file than was asked for")
        if etag not in {"", self._expected.etag}:
            raise Discard("the file changed in the storage meanwhile")
        size = self._expected.size
        if size is not None and (piece.last >= size or piece.whole not in {None, size}):
            raise Discard("the file has another length in the storage than before")
        self._check_room(piece.last - piece.first + 1)
        self._announce(piece.last - piece.first + 1)

    def _announce(self, size: int) -> None:
        """Say once how much is to come; what is moved again later was taken back before."""
        if not self._announced:
            self._announced = True
            self._expect(size)

    def _write(self, data: bytes) -> None:
        expected = self._expected
        if expected is not None and expected.size is not None and self.offset + len(data) > expected.size:
            raise Discard("the storage sent more than the file's length")
        left = memoryview(data)
        try:
            while left:
                written = os.pwrite(self._fd, left, self.offset + len(data) - len(left))
                left = left[written:]
        except OSError as error:
            raise self._disk(error) from error
        self._digests.update(data)
        self.offset += len(data)
        self.best = max(self.best, self.offset)
        self._told += len(data)
        self._moved(len(data))

    def _check_room(self, size: int) -> None:
        room = os.fstatvfs(self._fd)
        free = room.f_bavail * room.f_frsize
        if size > free:
            self.remove()
            raise WorkerFault(
                WorkerReason.DISK,
                f"input {self._name} needs {size / 2**20:.0f} MiB more, the disk of the job directory has "
                f"{free / 2**20:.0f} MiB; free some, or point PATH_BASE to a larger disk",
            )

    def _read_note(self) -> Expected | None:
        try:
            with self._note.open("rb") as file:
                return Expected.model_validate_json(file.read(4096))
        except (OSError, ValidationError):
            return None

    def _disk(self, error: OSError) -> WorkerFault:
        self.remove()
        return WorkerFault(WorkerReason.DISK, f"input {self._name} could not be written: {error.strerror}")
