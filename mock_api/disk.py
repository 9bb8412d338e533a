"""The two storages on this machine's own disk: `local` and `signed`. Both keep their objects in one `Tree`.

A file id names an object as `s3://<any bucket>/<key>`, `/<key>` or `<key>`; all three are understood by both.
"""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlencode

from mock_api.models import FileAnswer
from mock_api.signing import Signer
from mock_api.storage import Asker, Folder
from mock_api.tree import Tree

BUCKET = "mock-api"
STORAGE_PATH = "/_storage"


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
        """The API's own download endpoint."""
        if not self._tree.has_prefix(key_of(file_id)):
            return None
        url = f"{asker.api}/files/{quote(file_id)}/download"
        return FileAnswer(method="get", url=url, headers={"Authorization": asker.authorization})

    async def upload(self, folder: Folder, filename: str | None, asker: Asker) -> FileAnswer:
        """The API's own upload endpoint: a form, or, with a file name, a PUT."""
        query = {"type": folder.kind.value, "base_path": folder.base_path}
        if filename is not None:
            query["filename"] = filename
        return FileAnswer(
            method="post" if filename is None else "put",
            url=f"{asker.api}/jobs/{folder.job_id}/files/upload?{urlencode(query)}",
            headers={"Authorization": asker.authorization},
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
        key = key_of(file_id)
        return FileAnswer(method="get", url=self._url("GET", key, asker)) if self._tree.has_prefix(key) else None

    async def upload(self, folder: Folder, filename: str | None, asker: Asker) -> FileAnswer:
        """A signed form for the whole folder, or, with a file name, a signed PUT of that one object."""
        if filename is None:
            url = f"{asker.storage}{STORAGE_PATH}"
            return FileAnswer(method="post", url=url, data=self._signer.form(folder.key))
        return FileAnswer(method="put", url=self._url("PUT", folder.key + filename, asker))

    def _url(self, method: str, key: str, asker: Asker) -> str:
        return f"{asker.storage}{STORAGE_PATH}/{quote(key)}?{self._signer.query(method, key)}"


def key_of(file_id: str) -> str:
    """The object's key: the file id without scheme, bucket and leading slashes."""
    if file_id.startswith("s3://"):
        return file_id.removeprefix("s3://").partition("/")[2]
    return file_id.lstrip("/")
