"""The storage's endpoints: what signed URLs and forms point to (`/_storage`), and what a local-disk server's do.

The first answer as S3 does, refusals in XML included: an expired or foreign signature, a missing object (S14), a body
without a length, an object that is too large (S13), a header that was not signed, a token where none belongs. The
second are the API's own, and answer as it does.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.concurrency import run_in_threadpool

from mock_api.auth import Worker
from mock_api.context import Context, Parts, crash
from mock_api.disk import STORAGE_PATH, local_key
from mock_api.models import FileKind
from mock_api.receive import NoFileError, check_length, incoming, receive_body, receive_form
from mock_api.serve import LocalFile, serve
from mock_api.signing import base_name
from mock_api.storage import Folder, NotAllowed, StorageError, job_of
from mock_api.tokens import Caller

router = APIRouter()


async def unadorned(parts: Parts, request: Request) -> None:
    """Refuse what S3 refuses beside a signed URL: a second way to sign, and `x-amz-` headers that were not signed."""
    if "authorization" in request.headers:
        parts.store.note("violation", note=f"Authorization header sent to the storage: {request.url.path}")
        raise StorageError(400, "InvalidArgument", "Only one auth mechanism allowed")
    if any(name.startswith("x-amz-") for name in request.headers):
        message = "There were headers present in the request which were not signed"
        raise StorageError(403, "AccessDenied", message)


#: What FastAPI says of a form without its file.
_NO_FILE = {"type": "missing", "loc": ("body", "file"), "msg": "Field required", "input": None}

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


@router.get("/files/{file_id:path}/download", response_class=FileResponse)
async def download(parts: Parts, _: Worker, file_id: str) -> Response:
    """A file, by token: what the URLs of a local-disk server point to. Its ETag is no MD5, and no condition but
    `If-Range` is looked at. An object store's API has nothing here (403)."""
    _local_disk_only(parts)
    key = local_key(file_id)
    if not await run_in_threadpool(parts.tree.exists, key):
        parts.store.note("missing", note=key, code=404)
        raise HTTPException(404, "Not Found")
    path = parts.tree.place(key)
    return LocalFile(parts.tree, key, path) if path.is_file() else crash()


@router.post("/jobs/{job_id}/files/upload", status_code=201)
async def upload_form(
    parts: Parts,
    caller: Worker,
    request: Request,
    job_id: int,
    kind: Annotated[FileKind, Query(alias="type")],
    base_path: str,
) -> Response:
    """Store a file of a form, by token: what the forms of a local-disk server point to. It takes the whole body before
    it says anything, chunked ones as well, and an object store's API refuses it then (403)."""
    async with incoming(parts.tree.new_part(), parts.settings.max_object_bytes) as file:
        try:
            filename, md5 = await receive_form(request, file, lambda _, filename: filename, any_length=True)
        except NoFileError as error:
            raise RequestValidationError([_NO_FILE]) from error
        except StorageError as error:
            raise HTTPException(400, error.message) from error
        return _keep(parts, file.path, Folder(job_id, kind, base_path), caller, filename, md5)


@router.put("/jobs/{job_id}/files/upload", status_code=201)
async def upload_body(
    parts: Parts,
    caller: Worker,
    request: Request,
    job_id: int,
    filename: str,
    kind: Annotated[FileKind, Query(alias="type")],
    base_path: str,
) -> Response:
    """Store the body, by token. No deployed server has it: it is for `upload_method` put."""
    async with incoming(parts.tree.new_part(), parts.settings.max_object_bytes) as file:
        name, md5 = await receive_body(request, file, lambda: filename)
        return _keep(parts, file.path, Folder(job_id, kind, base_path), caller, name, md5)


def _keep(parts: Context, part: Path, folder: Folder, caller: Caller, filename: str, md5: str) -> Response:
    """The verdict of a local-disk server on a file that it has received whole."""
    if not parts.store.holds(folder.job_id, caller.name):
        return crash()
    _local_disk_only(parts)
    key = local_key(folder.below("/")) + (base_name(filename) or "unnamed")
    try:
        parts.tree.adopt(part, key, md5)
    except StorageError:  # no name for a file, or one of a folder
        return crash()
    parts.store.note("stored", job_id=folder.job_id, note=key)
    return JSONResponse(None, 201)


def _local_disk_only(parts: Context) -> None:
    if parts.settings.file_mode != "local":
        raise NotAllowed("Please get a pre-signed url instead.")


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
