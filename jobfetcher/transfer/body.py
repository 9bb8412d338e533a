"""What is sent: one file, raw for PUT, or as the last part of a form for POST (PROTOCOL.md; S3 refuses chunked).

Used by `upload`. Streams; the MD5 of the file's own bytes is computed as they pass.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Sequence
from typing import BinaryIO

from jobfetcher.core.errors import JobFault, JobReason, WorkerFault, WorkerReason


class FileBody:
    """`head`, then `size` bytes of `file`, then `tail`. `moved` is told of the file's bytes only."""

    def __init__(
        self, file: BinaryIO, size: int, name: str, moved: Callable[[int], None], head: bytes = b"", tail: bytes = b""
    ) -> None:
        self._file, self._size, self._name, self._moved = file, size, name, moved
        self._head, self._tail = head, tail
        self._at = self._sent = 0
        self._md5 = hashlib.md5(usedforsecurity=False)

    @property
    def length(self) -> int:
        return len(self._head) + self._size + len(self._tail)

    @property
    def complete(self) -> bool:
        """Whether all of it was handed out."""
        return self._at == self.length

    @property
    def md5(self) -> str:
        """Of the file's bytes handed out so far, in hex digits."""
        return self._md5.hexdigest()

    def read(self, size: int) -> bytes:
        """The next bytes, at most `size`; empty at the end. Raises JobFault if the file has become shorter."""
        into_file = self._at - len(self._head)
        if into_file < 0:
            piece = self._head[self._at : self._at + size]
        elif into_file < self._size:
            piece = self._read_file(min(size, self._size - into_file))
        else:
            piece = self._tail[into_file - self._size :][:size]
        self._at += len(piece)
        return piece

    def rewind(self) -> None:
        """From the start again; bytes handed out are taken back."""
        self._moved(-self._sent)
        self._at = self._sent = 0
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._file.seek(0)

    def _read_file(self, size: int) -> bytes:
        try:
            piece = self._file.read(size)
        except OSError as error:
            raise WorkerFault(WorkerReason.DISK, f"output {self._name} cannot be read: {error.strerror}") from error
        if not piece:
            raise changed(self._name)
        self._md5.update(piece)
        self._sent += len(piece)
        self._moved(len(piece))
        return piece


def changed(name: str) -> JobFault:
    """The error for a file that is not what the walk saw (FAULTS.md C14)."""
    return JobFault(JobReason.BAD_OUTPUT, f"output {name} changed while it was sent")


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
