"""What is sent: one file, raw for PUT, or as the last part of a form for POST (PROTOCOL.md; S3 refuses chunked).

Used by `upload`. Streams; where a store will say the MD5 of what it got, ours is computed meanwhile.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from jobfetcher.core.errors import JobFault, JobReason, WorkerFault, WorkerReason
from jobfetcher.core.ports import Upload
from jobfetcher.transfer.digests import Algorithm, Digests
from jobfetcher.transfer.hashing import Follower

_MD5: frozenset[Algorithm] = frozenset({"md5"})

#: So much is hashed as it goes out, in a third of a millisecond; more by a `Follower`.
_SMALL = 256 * 1024


class FileBody:
    """`head`, then the file of `item`, then `tail`; `close` it.

    `moved` is told of the file's bytes only. The file is opened by `open`, when there is a connection for it. `hashes`:
    its MD5 will be asked for, so it is computed on the way; else `md5` reads the file again.
    """

    def __init__(
        self,
        item: Upload,
        moved: Callable[[int], None],
        hashers: Callable[[], ThreadPoolExecutor],
        head: bytes = b"",
        tail: bytes = b"",
        *,
        hashes: bool,
    ) -> None:
        self._item, self._size, self._moved, self._hashers = item, item.size, moved, hashers
        self._head, self._tail, self.hashes = head, tail, hashes
        self.length = len(head) + self._size + len(tail)
        self._at = self._sent = 0
        #: Of the open file; -1 while it is not open.
        self.fd = -1
        self._digests: Digests | None = None
        self._follower: Follower | None = None

    def open(self) -> None:
        """Open the file. Raises JobFault or WorkerFault."""
        try:
            self.fd = self._item.open()
        except OSError as error:
            raise self._unreadable(error) from error
        if self.hashes:
            self._hash()

    def check_unchanged(self) -> None:
        """Raise JobFault if the open file is not what the walk saw (FAULTS.md C14)."""
        now = os.fstat(self.fd)
        if now.st_size != self._size or now.st_mtime_ns != self._item.mtime_ns:
            raise self._changed()

    def close(self) -> None:
        """Close the file."""
        if self._follower is not None:
            self._follower.stop()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    @property
    def complete(self) -> bool:
        """Whether all of it was handed out."""
        return self._at == self.length

    @property
    def is_hashed(self) -> bool:
        """Whether `md5` has nothing left to do."""
        return self._digests is not None

    def md5(self) -> str:
        """Of the whole file, in hex digits; blocks unless it `is_hashed`."""
        digests = self._digests
        if digests is None:
            digests = (self._follower or self._follow()).finish(self._size)
        return digests.digest.removeprefix("md5:")

    def read(self, size: int) -> bytes:
        """The next bytes, at most `size`; empty at the end. Raises JobFault if the file has become shorter.

        A small file comes with all of its form at once: libcurl then sends it in one packet together with the request,
        which spares both sides a wake-up for each part.
        """
        piece = self._read_file(size) if self.length == self._size else self._read_form(size)
        self._at += len(piece)
        return piece

    def take_back(self) -> None:
        """What was handed out was so in vain."""
        self._moved(-self._sent)
        self._at = self._sent = 0

    def rewind(self) -> None:
        """From the start again; bytes handed out are taken back."""
        self.take_back()
        if self.hashes and self.fd >= 0:
            self._hash()

    def _hash(self) -> None:
        if self._follower is not None:
            self._follower.stop()
        self._digests = self._follower = None
        if self._size <= _SMALL:
            self._digests = Digests(_MD5)
        else:
            self._follower = self._follow()

    def _follow(self) -> Follower:
        return Follower(self.fd, Digests(_MD5), f"output {self._item.name}", self._hashers)

    def _read_form(self, size: int) -> bytes:
        into_file = self._at - len(self._head)
        piece = self._head[self._at : self._at + size] if into_file < 0 else b""
        into_file += len(piece)
        if 0 <= into_file < self._size and len(piece) < size:
            part = self._read_file(size - len(piece))
            into_file += len(part)
            piece = piece + part if piece else part
        if into_file >= self._size and len(piece) < size:
            piece += self._tail[into_file - self._size :][: size - len(piece)]
        return piece

    def _read_file(self, size: int) -> bytes:
        left = self._size - self._sent
        if not left:
            return b""
        try:
            piece = os.pread(self.fd, min(size, left), self._sent)
        except OSError as error:
            raise self._unreadable(error) from error
        if not piece:
            raise self._changed()
        read = len(piece)
        self._sent += read
        self._moved(read)
        if self._digests is not None:
            self._digests.update(piece)
        elif self._follower is not None:
            self._follower.advance(self._sent)
        return piece

    def _changed(self) -> JobFault:
        return JobFault(JobReason.BAD_OUTPUT, f"output {self._item.name} changed while it was sent")

    def _unreadable(self, error: OSError) -> WorkerFault:
        return WorkerFault(WorkerReason.DISK, f"output {self._item.name} cannot be read: {error.strerror}")


def form(fields: Sequence[tuple[str, str]], filename: str) -> tuple[bytes, bytes, str]:
    """What stands before and after the file in a multipart form (RFC 7578), and its Content-Type.

    Values go as they are, since a signature covers them; but a store that puts the file's name into the object's key
    (`${filename}`, Amazon S3, "POST object") would put the escaped one there, so for a name that needs escaping the key
    is spelt out. The boundary is random: 128 bits cannot be met by chance or be planted.
    """
    boundary = f"jobfetcher-{secrets.token_hex(16)}"
    if _escape(filename) != filename:
        fields = [
            (name, value.replace("${filename}", filename) if name.lower() == "key" else value) for name, value in fields
        ]
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{_escape(name)}"\r\n\r\n{value}\r\n'
        for name, value in fields
    ]
    parts.append(
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{_escape(filename)}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    )
    return "".join(parts).encode(), f"\r\n--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


def _escape(name: str) -> str:
    """As a quoted string (RFC 2183, 2), which servers undo; line breaks as browsers write them, since none is legal."""
    return name.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "%0A").replace("\r", "%0D")
