"""The growing file of one download: which of its bytes are there, their hash, and what the whole must be.

Used by `download` and `ranges`, in the loop's thread. The file is a row of pieces: each begins with bytes that are
there and goes on with bytes that are missing; at most one exchange at a time fills a piece. There is one piece until
`ranges` cuts it.

What a later process needs to go on where this one was killed lies beside it, in `<part>.etag`: the strong ETag, the
size and the checksums of the object that the bytes are of. As long as there is one piece, the file's own length says
how far it came; afterwards the note also says which bytes are there, and is written before the first byte out of order,
then about once a second: what came later is fetched again.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jobfetcher.core.errors import JobFault, JobReason, WorkerFault, WorkerReason
from jobfetcher.core.run import Stored
from jobfetcher.core.text import clean
from jobfetcher.transfer.digests import Algorithm, Digests, Expected
from jobfetcher.transfer.exchange import Reply, Sink
from jobfetcher.transfer.hashing import Follower
from jobfetcher.transfer.patience import TryAgain
from jobfetcher.transfer.replies import content_length, content_range, strong_etag

#: Less than this is fetched again rather than remembered: the small file beside it would cost more. Nor is it asked
#: whether the disk has room for it.
_WORTH_RESUMING = 65_536

#: So much is hashed as it comes, in a quarter of a millisecond; more by a `Follower`.
_SMALL = 256 * 1024

_NOTE_EVERY_S = 1.0
_MAX_NOTE = 65_536

#: Codings that pack bytes (RFC 9110, 8.4.1, and the IANA's list). Stores repeat whatever a client once said of an
#: object: `aws-chunked`, `utf-8`, `binary` or `none` change no byte, so with them the bytes are as they are stored.
_PACKED = frozenset({"gzip", "x-gzip", "deflate", "br", "zstd", "compress", "x-compress"})

_NO_DIGESTS = Digests(frozenset())

_OPEN = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Discard(TryAgain):
    """The reply does not belong to the bytes we have: start over."""


class NoRanges(TryAgain):
    """The server does not answer with the range that was asked for; the bytes we have are as good as before."""


class Tally(Protocol):
    """Where bytes are counted: a `Batch`."""

    def expect(self, size: int) -> None: ...

    def moved(self, size: int) -> None: ...


class Note(BaseModel):
    """What lies beside a part: an `Expected`, and which bytes are there.

    `in_order`: all from 0 to the end of the file; else those that `have` names, as first and behind-the-last one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    etag: str = Field(default="", max_length=202, pattern=r'^("[!#-~]+")?$')
    size: int | None = Field(default=None, ge=0)
    sums: dict[Algorithm, str] = {}
    in_order: bool
    have: list[tuple[int, int]]

    @classmethod
    def of(cls, expected: Expected, have: list[tuple[int, int]] | None) -> Self:
        """`have` None: in order."""
        return cls(etag=expected.etag, size=expected.size, sums=expected.sums, in_order=have is None, have=have or [])

    @property
    def expected(self) -> Expected:
        return Expected(self.etag, self.size, self.sums)


class Piece:
    """Bytes `start` to `at` are there, those to `end` are missing; `end` is None while the file's size is not known.

    `busy`: an exchange fills it, which asked for the bytes from `asked` and before `until`.
    """

    __slots__ = ("asked", "at", "busy", "end", "start", "until")

    def __init__(self, start: int, at: int, end: int | None) -> None:
        self.start, self.at, self.end = start, at, end
        self.busy = False
        self.asked, self.until = at, end

    @property
    def left(self) -> int:
        """Missing bytes, as far as known."""
        return 0 if self.end is None else self.end - self.at

    @property
    def is_full(self) -> bool:
        return self.end is not None and self.at >= self.end


class Part:
    """One part file; `close` it. It is opened with the first byte that is written, so that waiting costs no descriptor.

    `have` counts the bytes that are there; `best` is the most there ever were, so that bytes fetched twice count as no
    progress. `origin` is whose they are. `takes_ranges`: the server says, or has shown, that it answers with parts;
    `is_scattered`: the bytes are not, or were not, all at the start. Raises WorkerFault(DISK) when the file
    cannot be written, and takes it away.
    """

    def __init__(self, path: Path, name: str, tally: Tally, hashers: Callable[[], ThreadPoolExecutor]) -> None:
        self.have = self.best = 0
        self.pieces = [Piece(0, 0, None)]
        self.expected: Expected | None = None
        self.takes_ranges = False
        self.origin = ""
        self._path, self._name, self._tally, self._hashers = str(path), name, tally, hashers
        self._note = f"{path}.etag"
        self._fd = -1
        self._digests = _NO_DIGESTS
        self._follower: Follower | None = None
        self._has_note = self.is_scattered = False
        self._noted_at = 0.0
        self._announced = self._told = 0

    # -- as a file ---------------------------------------------------------------------------------------------------

    @property
    def fd(self) -> int:
        """Its descriptor, for reading and writing."""
        if self._fd < 0:
            self._open()
        return self._fd

    def close(self) -> None:
        """Close the file, which stays, and so can be resumed from all that is there."""
        if self.is_scattered and self._has_note:
            self._keep_note()
        if self._follower is not None:
            self._follower.stop()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def resume(self) -> None:
        """Go on with what an earlier process left, if it can be trusted."""
        self._has_note = os.access(self._note, os.F_OK, follow_symlinks=False)
        if not self._has_note:
            return None
        note, size = self._read_note(), os.fstat(self.fd).st_size
        if note is None or not note.etag or (note.size is not None and size > note.size):
            return self.restart()
        have = [(0, size)] if note.in_order else note.have
        if not have or have[0][0]:
            have = [(0, 0), *have]
        ends = [*(first for first, _ in have[1:]), note.size]
        pieces = [Piece(first, last, end) for (first, last), end in zip(have, ends, strict=True)]
        if any(not piece.start <= piece.at <= size or piece.left < 0 for piece in pieces):
            return self.restart()
        self.pieces = pieces
        self.is_scattered = not note.in_order
        self.have = self.best = sum(piece.at - piece.start for piece in pieces)
        self._begin_with(note.expected)
        self.merge()
        return None

    def restart(self) -> None:
        """Forget all bytes."""
        self._tally.moved(-self._told)
        self.have = self._told = 0
        self.pieces = [Piece(0, 0, None)]
        self.expected = None
        if self._follower is not None:
            self._follower.stop()
        self._follower, self._digests = None, _NO_DIGESTS
        self.is_scattered = False
        try:
            # The note goes first: a note beside bytes of another object would be believed.
            if self._has_note:
                Path(self._note).unlink(missing_ok=True)
                self._has_note = False
            if self._fd >= 0:
                os.ftruncate(self._fd, 0)
        except OSError as error:
            raise self._disk(error) from error

    def remove(self) -> None:
        """Take the file and its note away; nothing of it is worth keeping."""
        self._has_note = False
        for path in (self._note, self._path):
            with contextlib.suppress(OSError):
                Path(path).unlink()

    # -- what is asked for, and what comes ---------------------------------------------------------------------------

    @property
    def size(self) -> int | None:
        """Of the whole file, as far as known."""
        return None if self.expected is None else self.expected.size

    @property
    def is_whole(self) -> bool:
        """Whether all bytes are there."""
        return len(self.pieces) == 1 and self.pieces[0].is_full

    def drop_unresumable(self) -> None:
        """Start over where nothing says which object the bytes are of."""
        if self.have and (self.expected is None or not self.expected.etag):
            self.restart()

    def wanted(self, piece: Piece) -> list[str]:
        """Header lines that ask for what is missing of it (RFC 9110, 13.1.5: If-Range needs a strong ETag)."""
        piece.asked, piece.until = piece.at, piece.end
        if self.expected is None or not piece.at:
            return []
        last = "" if piece.end is None or piece.end == self.expected.size else str(piece.end - 1)
        return [f"Range: bytes={piece.at}-{last}", f"If-Range: {self.expected.etag}"]

    def accept(self, piece: Piece, reply: Reply, *, alone: bool, etag_is_md5: bool = True) -> Sink | None:
        """Where the body of `reply` goes; None if it is not the file. `alone`: no other exchange fills a piece.
        `etag_is_md5`: see `Expected.of`."""
        if reply.status not in {200, 206}:
            return None
        encoding = reply.headers.get("content-encoding", "").lower()
        if encoding and not _PACKED.isdisjoint(re.split(r"[\s,;]+", encoding)):
            raise JobFault(
                JobReason.INPUT_CORRUPT,
                f"input {self._name} is stored with Content-Encoding {clean(encoding, 40)}, which this worker does not "
                "unpack; store it again without this header (then its bytes stay packed) or unpacked",
            )
        self.origin = reply.origin
        if reply.status == 206:
            self._go_on(piece, reply, alone=alone)
            self.takes_ranges = True
        elif alone:
            self._begin(piece, Expected.of(reply, etag_is_md5=etag_is_md5))
            self.takes_ranges = reply.headers.get("accept-ranges", "").lower() == "bytes"
        else:
            self._refuse_whole(reply)
        return lambda data, size: self._write(piece, data, size)

    def check_whole(self, piece: Piece, reply: Reply) -> None:
        """Raise TryAgain if bytes of `piece` are missing, Discard if the end cannot be told from a cut (C2)."""
        expected = self.expected
        if expected is None:
            raise Discard("the storage sent no file")
        if piece.end is not None:
            if not piece.is_full:
                raise TryAgain(f"the storage sent {piece.at} of {piece.end} bytes")
            return
        chunked = "chunked" in reply.headers.get("transfer-encoding", "").lower()
        if not chunked and not expected.sums:
            raise Discard("the storage says neither the file's length nor its checksum")
        piece.end = piece.at

    def finish(self) -> Callable[[], Digests]:
        """What computes the digests of the whole file: at once for a small file, blocking for another."""
        follower = self._follower
        if follower is None:
            return lambda: self._digests
        return partial(follower.finish, self.pieces[0].at)

    @property
    def is_hashed(self) -> bool:
        """Whether `finish` has nothing left to do."""
        return self._follower is None

    def stored(self, digests: Digests) -> Stored:
        """The whole file; the note beside it is gone."""
        if self._has_note:
            Path(self._note).unlink(missing_ok=True)
            self._has_note = False
        etag = "" if self.expected is None else self.expected.etag
        return Stored(self._name, self.have, digests.digest, etag)

    # -- pieces ------------------------------------------------------------------------------------------------------

    def cut(self, piece: Piece, at: int) -> Piece | None:
        """Make the bytes of `piece` from `at` on a piece of their own; None where the note of it cannot be written."""
        if not self.is_scattered and not self._keep_note():
            return None
        other = Piece(at, at, piece.end)
        piece.end = at
        self.pieces.insert(self.pieces.index(piece) + 1, other)
        return other

    def join(self) -> None:
        """Undo cuts: a piece that is empty and that nobody fills is left to the exchange before it, if it asked for
        those bytes, too."""
        index = 0
        while index + 1 < len(self.pieces):
            piece, after = self.pieces[index], self.pieces[index + 1]
            covered = piece.until is None or (after.end is not None and piece.until >= after.end)
            if piece.busy and covered and not after.busy and after.at == after.start:
                piece.end = after.end
                del self.pieces[index + 1]
            else:
                index += 1

    def keep_note(self) -> None:
        """Write down which bytes are there, at most once a second."""
        if self.is_scattered and time.monotonic() - self._noted_at >= _NOTE_EVERY_S:
            self._keep_note()

    def _keep_note(self) -> bool:
        self._noted_at = time.monotonic()
        have: list[tuple[int, int]] = []
        for piece in self.pieces:
            if have and have[-1][1] == piece.start:
                have[-1] = (have[-1][0], piece.at)
            elif piece.at > piece.start:
                have.append((piece.start, piece.at))
        self.is_scattered = self._write_note(have) or self.is_scattered
        return self.is_scattered

    def _write_note(self, have: list[tuple[int, int]] | None) -> bool:
        """Only good for resuming: if it cannot be written, nothing is lost but that. `have` None: all in order."""
        expected = self.expected
        if expected is None:
            return False
        note = Note.of(expected, have)
        new = Path(f"{self._note}.new")
        try:
            new.write_text(note.model_dump_json())
            new.replace(self._note)
        except OSError:
            with contextlib.suppress(OSError):
                new.unlink()
            return False
        self._has_note = True
        return True

    def merge(self) -> None:
        """Neighbours that are full become one, so that the first piece is all that is there from the start on. Due
        whenever an exchange has ended, however it ended: nobody else fills a piece that is full."""
        index = 0
        while index + 1 < len(self.pieces):
            piece, after = self.pieces[index], self.pieces[index + 1]
            if piece.is_full and not piece.busy:
                after.start = piece.start
                del self.pieces[index]
            else:
                index += 1
        self._advance()

    def _advance(self) -> None:
        if self._follower is not None:
            self._follower.advance(self.pieces[0].at)

    # -- replies -----------------------------------------------------------------------------------------------------

    def _begin(self, piece: Piece, expected: Expected) -> None:
        if self.have or self._told or self._has_note:
            self.restart()
        if self._fd < 0:
            self._open()
        self._begin_with(expected)
        piece.start = piece.at = 0
        piece.end = expected.size
        self.pieces = [piece]
        if expected.size is not None:
            self._check_room(expected.size)
            self._announce(expected.size)
        if expected.etag and (expected.size is None or expected.size > _WORTH_RESUMING):
            self._write_note(None)

    def _begin_with(self, expected: Expected) -> None:
        self.expected = expected
        digests = Digests.for_expected(expected)
        if expected.size is not None and expected.size <= _SMALL and not self.have:
            self._digests = digests
        else:
            self._follower = Follower(self.fd, digests, f"input {self._name}", self._hashers)
            self._advance()

    def _refuse_whole(self, reply: Reply) -> None:
        """A 200 where a range was asked for, while the first stream goes on."""
        expected = self.expected
        if expected is None or strong_etag(reply) != expected.etag or content_length(reply) not in {None, self.size}:
            raise Discard("the file changed in the storage meanwhile")
        raise NoRanges("the storage sent all of the file though a part of it was asked for")

    def _go_on(self, piece: Piece, reply: Reply, *, alone: bool) -> None:
        """A 206 must be exactly what was asked for: from the piece's offset on, of the same object (C4)."""
        found, length = content_range(reply), content_length(reply)
        if self.expected is None or not piece.asked:
            raise Discard("the storage sent a part of the file though all of it was asked for")
        if reply.headers.get("etag", self.expected.etag) != self.expected.etag:  # a weak one, too: it is another
            raise Discard("the file changed in the storage meanwhile")
        size = self.expected.size
        if found is not None and size is not None and found.whole not in {None, size}:
            raise Discard("the file has another length in the storage than before")
        if (
            found is None
            or found.first != piece.asked
            or length not in {None, found.last - found.first + 1}
            or (piece.until is not None and found.last >= piece.until)
        ):
            why = "the storage sent another part of the file than was asked for"
            raise Discard(why) if alone else NoRanges(why)
        if size is None:  # a server may send less than was asked for (RFC 9110, 15.3.7), so its end is not the file's
            if found.whole is None:
                raise Discard("the storage sent a part of the file without saying how long all of it is")
            piece.end = size = found.whole
            self.expected = replace(self.expected, size=size)
        self._check_room(found.last - found.first + 1)
        self._announce(size - self.have)

    def _announce(self, size: int) -> None:
        """Say how much is to come, as far as that is not known yet; what is moved again was taken back before."""
        news = self._told + size - self._announced
        if news:
            self._announced += news
            self._tally.expect(news)

    # -- bytes -------------------------------------------------------------------------------------------------------

    def _write(self, piece: Piece, data: list[bytes], size: int) -> bool:
        """Take the next bytes of a piece; true when it is full and more would come, since it was cut meanwhile."""
        enough = False
        if piece.end is not None and piece.at + size > piece.end:
            if piece.end == self.size:
                raise Discard("the storage sent more than the file's length")
            size = piece.end - piece.at
            data = [b"".join(data)[:size]]
            enough = True
        at = piece.at
        try:
            written = os.pwrite(self._fd, data[0], at) if len(data) == 1 else os.pwritev(self._fd, data, at)
            if written < size:
                left = memoryview(b"".join(data))[written:]
                while left:
                    written = os.pwrite(self._fd, left, at + size - len(left))
                    left = left[written:]
        except OSError as error:
            raise self._disk(error) from error
        piece.at += size
        self.have += size
        self._told += size
        if self.have > self.best:
            self.best = self.have
        self._tally.moved(size)
        if self._follower is None:
            for block in data:
                self._digests.update(block)
        elif piece is self.pieces[0]:
            self._follower.advance(piece.at)
        if enough and piece.end == piece.until:  # after what belongs here, so that asking for it again has an end
            raise NoRanges("the storage sent more than the part that was asked for")
        return enough

    def _open(self) -> None:
        try:
            self._fd = os.open(self._path, _OPEN, 0o600)
        except OSError as error:
            raise self._disk(error) from error
        found = os.fstat(self._fd)
        if not stat.S_ISREG(found.st_mode):
            self.close()
            raise WorkerFault(WorkerReason.DISK, f"{Path(self._path).name} is not a regular file")
        if found.st_size and not self._has_note:
            os.ftruncate(self._fd, 0)

    def _check_room(self, size: int) -> None:
        if size <= _WORTH_RESUMING:
            return
        room = os.fstatvfs(self.fd)
        free = room.f_bavail * room.f_frsize
        if size > free:
            self.remove()
            raise WorkerFault(
                WorkerReason.DISK,
                f"input {self._name} needs {size / 2**20:.0f} MiB more, the disk of the job directory has "
                f"{free / 2**20:.0f} MiB; free some, or point PATH_BASE to a larger disk",
            )

    def _read_note(self) -> Note | None:
        try:
            with open(self._note, "rb") as file:
                return Note.model_validate_json(file.read(_MAX_NOTE))
        except (OSError, ValidationError):
            return None

    def _disk(self, error: OSError) -> WorkerFault:
        self.remove()
        return WorkerFault(WorkerReason.DISK, f"input {self._name} could not be written: {error.strerror}")
