"""Files in a real object store: requests presigned by boto3, against SeaweedFS, AWS or any other S3.

boto3 is imported only when this storage is configured, and it ships no types: its client is `Any` here and nowhere
else.
"""

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool

from mock_api.models import FileAnswer
from mock_api.settings import Settings
from mock_api.signing import FILENAME
from mock_api.storage import Asker, Folder, key_in
from mock_api.tree import PIECE_BYTES


class S3Storage:
    """One bucket for what users and workers store; a file id that names another is refused.

    Raises botocore's errors when the store cannot be reached: an HTTP 500 of this server.
    """

    def __init__(self, settings: Settings) -> None:
        config = importlib.import_module("botocore.config").Config(
            signature_version="s3v4", s3={"addressing_style": "path"}
        )
        session = importlib.import_module("boto3").session.Session()
        self._client: Any = session.client(
            "s3",
            endpoint_url=settings.s3_endpoint,
            region_name=settings.s3_region,
            aws_access_key_id=settings.s3_access_key,
            aws_secret_access_key=settings.s3_secret_key,
            config=config,
        )
        self._errors: Any = importlib.import_module("botocore.exceptions").ClientError
        self._bucket = settings.s3_bucket
        self._life_s = int(settings.url_life_s)
        self._make_bucket()

    def close(self) -> None:
        """Close the connections to the store."""
        self._client.close()

    def file_id(self, key: str) -> str:
        """An S3 URI."""
        return f"s3://{self._bucket}/{key}"

    async def download(self, file_id: str, _asker: Asker) -> FileAnswer | None:
        """A presigned GET."""
        key = key_in(self._bucket, file_id)
        found = await run_in_threadpool(self._client.list_objects_v2, Bucket=self._bucket, Prefix=key, MaxKeys=1)
        if not found.get("KeyCount"):
            return None
        return FileAnswer(method="get", url=self._presigned("get_object", key))

    async def upload(self, folder: Folder, filename: str | None, _asker: Asker) -> FileAnswer:
        """A presigned form for the whole folder, or, with a file name, a presigned PUT of that one object."""
        key = key_in(self._bucket, folder.below(self.file_id("")))
        if filename is not None:
            return FileAnswer(method="put", url=self._presigned("put_object", key + filename))
        form = self._client.generate_presigned_post(
            self._bucket,
            key + FILENAME,
            Conditions=[["starts-with", "$key", key]],
            ExpiresIn=self._life_s,
        )
        return FileAnswer(method="post", url=form["url"], data=form["fields"])

    def adopt(self, part: Path, key: str, _md5: str) -> None:
        """Upload a finished file; the local one is deleted."""
        self._client.upload_file(str(part), self._bucket, key)
        part.unlink()

    def names(self, folder: str) -> list[str]:
        """Every object below a folder."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=folder)
        keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
        return sorted(key.removeprefix(folder) for key in keys if not key.endswith("/"))

    def read(self, key: str) -> Iterator[bytes] | None:
        """The object's content in pieces."""
        try:
            body = self._client.get_object(Bucket=self._bucket, Key=key)["Body"]
        except self._client.exceptions.NoSuchKey:
            return None
        pieces: Iterator[bytes] = body.iter_chunks(PIECE_BYTES)
        return pieces

    def _presigned(self, action: str, key: str) -> str:
        place = {"Bucket": self._bucket, "Key": key}
        return str(self._client.generate_presigned_url(action, Params=place, ExpiresIn=self._life_s))

    def _make_bucket(self) -> None:
        try:
            self._client.head_bucket(Bucket=self._bucket)
        except self._errors:
            self._client.create_bucket(Bucket=self._bucket)
