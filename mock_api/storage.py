"""Where the files of jobs are, and how workers get at them: the interface that the routes see.

Three kinds: `local` (the API serves the files, with the caller's own token) and `signed` (own signed URLs below
`/_storage`) in `disk.py`, and S3 in `s3.py`. Keys are laid out so, whatever the kind:

    inputs/<path>                                          what users put
    outputs/<job_id>/<kind>/<base_path>/<filename>         what workers send; kind is output, log or artifact
"""

import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from mock_api.models import FileAnswer, FileKind

INPUTS = "inputs"
OUTPUTS = "outputs"


class StorageError(Exception):
    """A refusal of the storage, told as S3 does: HTTP status, error code and message in XML."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.headers = headers


class NotAllowed(Exception):
    """A place that no file may be read from or written to: the API's own 403, whose `detail` is the message."""


@dataclass(frozen=True)
class Asker:
    """The request that asks for a URL: the origins its answer shall name, the token it came with, and what it asked:
    the path, decoded, and the query as it came."""

    api: str
    storage: str
    authorization: str
    asked: str


@dataclass(frozen=True)
class Folder:
    """Where a worker wants to store files: one `kind` and `base_path` of one job."""

    job_id: int
    kind: FileKind
    base_path: str

    def below(self, file_id: str) -> str:
        """The folder's own file id, ending in a slash; `file_id` is that of the storage's root.

        Joined as paths are: a `base_path` that is absolute leads elsewhere, and `..` stays as it is.
        """
        path = posixpath.join(file_id, OUTPUTS, str(self.job_id), self.kind, self.base_path)
        return path if path.endswith("/") else f"{path}/"


class Storage(Protocol):
    """What the routes need of a place for files. What is no coroutine blocks; keys are checked by the storage."""

    def close(self) -> None:
        """Let go of connections, if there are any."""

    def file_id(self, key: str) -> str:
        """What a job's `files_down` names the object by."""

    async def download(self, file_id: str, asker: Asker, /) -> FileAnswer | None:
        """How to fetch a file. None when there is none; an object store checks no more than that some object's name
        starts like that (S14). Raises `NotAllowed` for a place outside the storage."""

    async def upload(self, folder: Folder, filename: str | None, asker: Asker, /) -> FileAnswer:
        """How to send files of one folder; `filename` is the one file that a PUT is to be signed for. Raises
        `NotAllowed` for a folder outside the storage."""

    def adopt(self, part: Path, key: str, md5: str, /) -> None:
        """Store the finished file `part`, which is gone from its place afterwards."""

    def names(self, folder: str) -> list[str]:
        """Every object below `folder`, its name relative to it, sorted."""

    def read(self, key: str) -> Iterator[bytes] | None:
        """The object's content in pieces; None when there is none. Raises at once, not at the first piece."""


def parts_of(path: str) -> list[str]:
    """The components of a path, empty ones left out. Raises `StorageError` on `.`, `..` and NUL."""
    parts = [part for part in path.split("/") if part]
    if any(part in (".", "..") or "\0" in part for part in parts):
        raise StorageError(400, "InvalidURI", "a path must not contain '.', '..' or NUL")
    return parts


def key_in(bucket: str, file_id: str) -> str:
    """The key of an S3 URI. Raises `NotAllowed` for anything that is no S3 URI, and for another bucket."""
    if not file_id.startswith("s3://"):
        raise NotAllowed("Path should start with s3://")
    named, _, key = file_id.removeprefix("s3://").partition("/")
    if named != bucket:
        raise NotAllowed("Bucket does not match")
    return key


def job_of(key: str) -> int | None:
    """The job that an output's key belongs to."""
    top, _, rest = key.partition("/")
    job_id = rest.partition("/")[0]
    return int(job_id) if top == OUTPUTS and job_id.isdecimal() else None
