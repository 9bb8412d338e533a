"""The storage's endpoints: what signed URLs and forms point to (`/_storage`), and what a local-disk server's do.

They answer as S3 does, refusals in XML included: an expired or foreign signature, a missing object (S14), a body
without a length, an object that is too large (S13), a header that was not signed, a token where none belongs.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from mock_api.auth import Worker
from mock_api.context import Context, Parts
from mock_api.disk import STORAGE_PATH, key_of
from mock_api.models import FileKind
from mock_api.receive import check_length, incoming, receive_body, receive_form
from mock_api.serve import serve
from mock_api.signing import base_name
from mock_api.storage import Folder, StorageError, job_of

router = APIRouter()


async def unadorned(parts: Parts, request: Request) -> None:
    """Refuse what S3 refuses beside a signed URL: a second way to sign, and `x-amz-` headers that were not signed."""
    if "authorization" in request.headers:
        parts.store.note("violation", note=f"Authorization header sent to the storage: {request.url.path}")
        raise StorageError(400, "InvalidArgument", "Only one auth mechanism allowed")
    if any(name.startswith("x-amz-") for name in request.headers):
        message = "There were headers present in the request which were not signed"
        raise StorageError(403, "AccessDenied", message)


Signed = Annotated[None, Depends(unadorned)]


@router.head(STORAGE_PATH + "/{key:path}", include_in_schema=False)  # 403 as on S3: the URL was signed for GET
@router.get(STORAGE_PATH + "/{key:path}")
async def get_object(
    parts: Parts, _: Signed, request: Request, key: str, expires: str | None = None, signature: str | None = None
) -> Response:
    """An object, by signed URL."""
    parts.signer.check_query(request.method, key, expires, signature)
    return await _download(parts, request, key)


@router.put(STORAGE_PATH + "/{key:path}")
async def put_object(
    parts: Parts, _: Signed, request: Request, key: str, expires: str | None = None, signature: str | None = None
) -> Response:
    """Store the body, by signed URL."""

    def admit() -> str:
        parts.signer.check_query("PUT", key, expires, signature)
        check_length(request)
        return key

    return await _take_body(parts, request, admit, status=200)


@router.post(STORAGE_PATH)
async def post_object(parts: Parts, _: Signed, request: Request) -> Response:
    """Store a file, by signed form."""
    return await _take_form(parts, request, parts.signer.check_form, status=204)


@router.get("/files/{file_id:path}/download")
async def download(parts: Parts, _: Worker, request: Request, file_id: str) -> Response:
    """An object, by token: what the URLs of a local-disk server point to."""
    return await _download(parts, request, key_of(file_id))


@router.post("/jobs/{job_id}/files/upload")
async def upload_form(
    parts: Parts,
    caller: Worker,
    request: Request,
    job_id: int,
    kind: Annotated[FileKind, Query(alias="type")],
    base_path: str = "",
) -> Response:
    """Store a file of a form, by token: what the forms of a local-disk server point to."""
    folder = Folder(job_id, kind, base_path)
    if not parts.store.holds(job_id, caller.name):
        return Response(status_code=500)
    return await _take_form(parts, request, lambda _, filename: folder.key + base_name(filename), status=201)


@router.put("/jobs/{job_id}/files/upload")
async def upload_body(
    parts: Parts,
    caller: Worker,
    request: Request,
    job_id: int,
    filename: str,
    kind: Annotated[FileKind, Query(alias="type")],
    base_path: str = "",
) -> Response:
    """Store the body, by token: what a local-disk server that signs PUTs points to."""
    folder = Folder(job_id, kind, base_path)
    if not parts.store.holds(job_id, caller.name):
        return Response(status_code=500)

    def admit() -> str:
        check_length(request)
        return folder.key + base_name(filename)

    return await _take_body(parts, request, admit, status=201)


async def _download(parts: Context, request: Request, key: str) -> Response:
    found = parts.tree.known(key) or await run_in_threadpool(parts.tree.find, key)
    if found is None:
        parts.store.note("missing", note=key, code=404)
        raise StorageError(404, "NoSuchKey", "The specified key does not exist.")
    return serve(request, parts.tree, found)


async def _take_body(parts: Context, request: Request, admit: Callable[[], str], status: int) -> Response:
    async with incoming(parts.tree.new_part(), parts.settings.max_object_bytes) as file:
        key, md5 = await receive_body(request, file, admit)
        return _stored(parts, file.path, key, md5, status)


async def _take_form(
    parts: Context, request: Request, admit: Callable[[dict[str, str], str], str], status: int
) -> Response:
    async with incoming(parts.tree.new_part(), parts.settings.max_object_bytes) as file:
        key, md5 = await receive_form(request, file, admit)
        return _stored(parts, file.path, key, md5, status)


def _stored(parts: Context, part: Path, key: str, md5: str, status: int) -> Response:
    if not key or key.endswith("/"):
        raise StorageError(400, "InvalidArgument", "the file has no name")
    parts.tree.adopt(part, key, md5)
    parts.store.note("stored", job_id=job_of(key), note=key)
    return Response(status_code=status, headers={"ETag": f'"{md5}"'})
