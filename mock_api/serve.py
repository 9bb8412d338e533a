"""Objects on their way out: ranges, strong ETags, conditions (RFC 9110, 13 and 14), streamed in large pieces."""

import re
from collections.abc import AsyncIterator
from email.utils import formatdate
from pathlib import Path

from fastapi import Request
from fastapi.responses import FileResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Message, Receive, Scope, Send

from mock_api.storage import StorageError
from mock_api.tree import PIECE_BYTES, StoredObject, Tree

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
_TAG = re.compile(r'(?:W/)?("[^"]*")')


def serve(request: Request, tree: Tree, found: StoredObject) -> Response:
    """The answer to a GET of the object: 200, 206 or 304. Raises `StorageError` 416."""
    etag = f'"{found.md5}"'
    modified = formatdate(found.mtime, usegmt=True)
    headers = {"ETag": etag, "Last-Modified": modified, "Accept-Ranges": "bytes"}
    asked = request.headers
    if _names(asked.get("if-none-match", ""), etag):
        tree.count(found.key, "unchanged")
        return Response(status_code=304, headers=headers)
    wanted = _range(asked.get("range", ""), found.size) if asked.get("if-range", etag) in (etag, modified) else None
    start, end = wanted or (0, found.size)
    headers["Content-Length"] = str(end - start)
    if wanted:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{found.size}"
    tree.count(found.key, "gets")
    status, kind = 206 if wanted else 200, "application/octet-stream"
    if end - start > PIECE_BYTES:
        return StreamingResponse(_body(tree, found, start, end), status, headers, media_type=kind)
    with found.path.open("rb") as file:
        file.seek(start)
        content = file.read(end - start)
    tree.count(found.key, "sent", len(content))
    return Response(content, status, headers, media_type=kind)


def _names(header: str, etag: str) -> bool:
    """Whether a list of entity tags names this one; a weak one does, too, as RFC 9110 has it for a 304."""
    return header.strip() == "*" or etag in _TAG.findall(header)


def _range(header: str, size: int) -> tuple[int, int] | None:
    """First byte and the one after the last; None (the whole) for no range, several, or one that cannot be read."""
    match = _RANGE.fullmatch(header)
    if match is None or match.group(1) == match.group(2) == "":
        return None
    first, last = match.groups()
    start = int(first) if first else max(size - int(last), 0)
    end = min(int(last) + 1, size) if first and last else size
    if first and last and int(last) < start:
        return None
    if start >= end:
        raise StorageError(
            416, "InvalidRange", "The requested range is not satisfiable", {"Content-Range": f"bytes */{size}"}
        )
    return start, end


class LocalFile(FileResponse):
    """A file as a local-disk server sends it, which leaves that to Starlette: an ETag of time and size, ranges, a type
    by the name's ending. The traffic is counted."""

    def __init__(self, tree: Tree, key: str, path: Path) -> None:
        super().__init__(path)
        self._tree = tree
        self._key = key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""

        async def counting(message: Message) -> None:
            await send(message)
            if message["type"] == "http.response.start" and message["status"] in (200, 206):
                self._tree.count(self._key, "gets")
            self._tree.count(self._key, "sent", len(message.get("body", b"")))

        await super().__call__(scope, receive, counting)


async def _body(tree: Tree, found: StoredObject, start: int, end: int) -> AsyncIterator[bytes]:
    # opened here and not before: a response that is never sent leaves no open file
    file = await run_in_threadpool(found.path.open, "rb")
    try:
        file.seek(start)
        left = end - start
        while left > 0 and (piece := await run_in_threadpool(file.read, min(left, PIECE_BYTES))):
            left -= len(piece)
            yield piece
            tree.count(found.key, "sent", len(piece))
    finally:
        file.close()
