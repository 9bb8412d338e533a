"""The two storages on this machine's own disk: `local` and `signed`. Both keep their objects in one `Tree`.

A file id names an object as `s3://mock-api/<key>` where URLs are signed, and as `/<key>` on a local-disk server, whose
directories are `/inputs` and `/outputs`. Neither understands the other's.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from mock_api.models import FileAnswer
from mock_api.signing import Signer
from mock_api.storage import INPUTS, OUTPUTS, Asker, Folder, NotAllowed, key_in
from mock_api.tree import Tree

BUCKET = "mock-api"
STORAGE_PATH = "/_storage"
_OUTSIDE = "Path is not in base directory"


class _Disk:
    def __init__(self, tree: Tree) -> None:
        self._tree = tree

    def close(self) -> None:
        """Nothing is held open."""

    def adopt(self, part: Path, key: str, md5: str) -> None:
        """Store a finished file."""
        self._tree.adopt(part, key, md5)

    def names(self, folder: str) -> list[str]:
        """Every object below a folder."""
        return self._tree.names(folder)

    def read(self, key: str) -> Iterator[bytes] | None:
        """The object's content in pieces."""
        return self._tree.read(key)


class LocalStorage(_Disk):
    """A local-disk server: URLs on the API's own origin, good with the caller's own token only."""

    def file_id(self, key: str) -> str:
        """An absolute path, below the server's file root."""
        return f"/{key}"

    async def download(self, file_id: str, asker: Asker) -> FileAnswer | None:
        """The API's own download endpoint, which is the address that was asked with another end to it."""
        if not self._tree.exists(local_key(file_id)):
            return None
        url = re.sub("/url$", "/download", asker.api + asker.asked)
        return FileAnswer(method="get", url=url, headers={"authorization": asker.authorization})

    async def upload(self, folder: Folder, filename: str | None, asker: Asker) -> FileAnswer:
        """The API's own upload endpoint: a form, or, with a file name, a PUT.

        It is the address that was asked, with every `/url` in it replaced, be it in the query. What the query did not
        say, the address does not say: without `base_path` the endpoint refuses the file.
        """
        _check_inside(folder.below("/"))
        return FileAnswer(
            method="post" if filename is None else "put",
            url=(asker.api + asker.asked).replace("/url", "/upload"),
            headers={"authorization": asker.authorization},
        )


class SignedStorage(_Disk):
    """A small object store of our own behind signed URLs that need no token, and bear none."""

    def __init__(self, tree: Tree, signer: Signer) -> None:
        super().__init__(tree)
        self._signer = signer

    def file_id(self, key: str) -> str:
        """An S3 URI."""
        return f"s3://{BUCKET}/{key}"

    async def download(self, file_id: str, asker: Asker) -> FileAnswer | None:
        """A signed GET."""
        key = key_in(BUCKET, file_id)
        return FileAnswer(method="get", url=self._url("GET", key, asker)) if self._tree.has_prefix(key) else None

    async def upload(self, folder: Folder, filename: str | None, asker: Asker) -> FileAnswer:
        """A signed form for the whole folder, or, with a file name, a signed PUT of that one object."""
        key = key_in(BUCKET, folder.below(self.file_id("")))
        if filename is None:
            url = f"{asker.storage}{STORAGE_PATH}"
            return FileAnswer(method="post", url=url, data=self._signer.form(key))
        return FileAnswer(method="put", url=self._url("PUT", key + filename, asker))

    def _url(self, method: str, key: str, asker: Asker) -> str:
        return f"{asker.storage}{STORAGE_PATH}/{quote(key)}?{self._signer.query(method, key)}"


def local_key(file_id: str) -> str:
    """The key that an absolute path on a local-disk server stands for.

    Raises `NotAllowed` for what is not below its directories. A deployed server compares without resolving `..`, and so
    lets a path out; this one does not.
    """
    _check_inside(file_id)
    if ".." in file_id.split("/") or "\0" in file_id:
        raise NotAllowed(_OUTSIDE)
    return file_id.removeprefix("/")


def _check_inside(path: str) -> None:
    if not path.startswith((f"/{INPUTS}/", f"/{OUTPUTS}/")):
        raise NotAllowed(_OUTSIDE)
