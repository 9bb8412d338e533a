"""Files on their way in: raw bodies and multipart forms, streamed to disk with at most a piece of each in memory.

Used by every route that takes a file. A file that does not arrive whole leaves nothing behind.
"""

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from mock_api.form import FieldDone, FileStart, FormParser
from mock_api.storage import StorageError
from mock_api.tree import PIECE_BYTES

DRAIN_BYTES = 8 * 1024 * 1024  # of a refused body; a client that sends more sees the connection closed


class Incoming:
    """One file being received: bytes are gathered, and hashed and written a piece at a time.

    A full piece is written off the event loop; a small file, and what is left of a large one, is not worth the hop.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path = path
        self.size = 0
        self._max_bytes = max_bytes
        self._gathered = bytearray()
        self._md5 = hashlib.md5(usedforsecurity=False)
        self._file: BinaryIO | None = None

    async def write(self, data: bytes) -> None:
        """Take the next bytes. Raises `StorageError` once the file is larger than the storage takes (S13)."""
        self.size += len(data)
        if self.size > self._max_bytes:
            message = "Your proposed upload exceeds the maximum allowed size"
            raise StorageError(400, "EntityTooLarge", message)
        self._gathered += data
        if len(self._gathered) >= PIECE_BYTES:
            await run_in_threadpool(self._flush)

    def finish(self) -> str:
        """Write what is left; the file's MD5 as hex."""
        self._flush()
        self.close()
        return self._md5.hexdigest()

    def close(self) -> None:
        """Close the file, whole or not."""
        if self._file is not None:
            self._file.close()

    def _flush(self) -> None:
        if self._file is None:
            self._file = self.path.open("wb")
        self._md5.update(self._gathered)
        self._file.write(self._gathered)
        self._gathered.clear()


@asynccontextmanager
async def incoming(part: Path, max_bytes: int) -> AsyncIterator[Incoming]:
    """A file being received below the name `part`; what nobody adopted by the end of the block is deleted."""
    file = Incoming(part, max_bytes)
    try:
        yield file
    finally:
        file.close()
        part.unlink(missing_ok=True)


async def receive_body(request: Request, file: Incoming, admit: Callable[[], str]) -> tuple[str, str]:
    """Stream a raw body into `file`; the key it goes under, and its MD5 as hex.

    `admit` is called before the body is read; it returns the key, or raises. Raises `StorageError`.
    """
    stream = request.stream()
    async with refusing(request, stream):
        key = admit()
        async for data in stream:
            await file.write(data)
    return key, file.finish()


class NoFileError(StorageError):
    """A body without a file part, be it no form at all."""


async def receive_form(
    request: Request, file: Incoming, admit: Callable[[dict[str, str], str], str], *, any_length: bool = False
) -> tuple[str, str]:
    """Stream the `file` part of a multipart form into `file`; the key it goes under, and its MD5 as hex.

    `admit` gets the fields before the file part and its file name; it returns the key, or raises. What follows the file
    part is not looked at, as on S3. Raises `StorageError`; a body without a length (chunked) is refused unless
    `any_length`.
    """
    stream = request.stream()
    fields: dict[str, str] = {}
    key: str | None = None
    async with refusing(request, stream):
        if not any_length:
            check_length(request)
        form = _parser(request)
        async for data in stream:
            for found in form.feed(data):
                if isinstance(found, FieldDone):
                    fields[found.name] = found.value
                elif isinstance(found, FileStart):
                    key = admit(fields, found.filename)
                else:
                    await file.write(found.data)
        if key is None and form.complete:
            raise NoFileError(400, "InvalidArgument", "POST requires exactly one file upload per request.")
        if key is None or not form.complete:
            raise StorageError(400, "MalformedPOSTRequest", "The body of your POST request is not well-formed")
    return key, file.finish()


def _parser(request: Request) -> FormParser:
    try:
        return FormParser(request.headers.get("content-type", ""))
    except StorageError as error:
        raise NoFileError(error.status, error.code, error.message) from error


def check_length(request: Request) -> None:
    """Raise `StorageError` 411 for a body without a length (chunked), as S3 does."""
    if "content-length" not in request.headers:
        raise StorageError(411, "MissingContentLength", "You must provide the Content-Length HTTP header.")


@asynccontextmanager
async def refusing(request: Request, stream: AsyncIterator[bytes]) -> AsyncIterator[None]:
    """Read on through a body that the block refuses, up to a limit, so that its sender gets to read the refusal.

    A sender that waits to be asked (`Expect: 100-continue`) is not asked: the refusal is its answer.
    """
    try:
        yield
    except StorageError:
        if "expect" not in request.headers:
            await _drain(stream)
        raise


async def _drain(stream: AsyncIterator[bytes]) -> None:
    seen = 0
    async for data in stream:
        seen += len(data)
        if seen > DRAIN_BYTES:
            return
