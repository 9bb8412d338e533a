"""What users do: put inputs, submit jobs, look at them, delete them, fetch results. No password: this is a test server.

Results are `<kind>/<base_path>/<filename>` below their job; on a disk storage they lie in `files/outputs/<job_id>/`
of the data directory.
"""

from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool

from mock_api.context import Context, Parts
from mock_api.models import HardwareSpec, JobSpecs, Wishes
from mock_api.receive import incoming, receive_body
from mock_api.storage import INPUTS, OUTPUTS, parts_of

router = APIRouter(prefix="/user")


@router.post("/jobs", status_code=201)
async def submit(
    parts: Parts,
    spec: Annotated[Any, Body()],
    wishes: Annotated[Wishes, Depends()],
    raw: bool = False,
) -> dict[str, int]:
    """Queue a job. `raw`: any JSON at all, handed out as it is to whoever asks first.

    The `job_id` of the answer is the queue's, the one that workers know and that the other routes here take;
    `user_job_id` in `GET /user/jobs/{job_id}` is the user's own number of it, `meta.job_id` (S22).
    """
    if isinstance(spec, bytes):  # what a body becomes that does not say it is JSON
        raise HTTPException(400, "the body must be application/json")
    needs = HardwareSpec()
    if not raw:
        try:
            checked = JobSpecs.model_validate(spec)
        except ValidationError as error:
            raise RequestValidationError(error.errors(include_url=False, include_input=False)) from error
        needs, spec = checked.hardware, checked.model_dump(mode="json")
    return {"job_id": parts.store.submit(spec, needs, wishes)}


@router.get("/jobs")
async def jobs(parts: Parts, limit: int = 1000) -> list[dict[str, Any]]:
    """The newest jobs, newest first."""
    return parts.store.jobs(limit)


@router.get("/jobs/{job_id}")
async def job(parts: Parts, job_id: int) -> dict[str, Any]:
    """State, details and history of one job."""
    found = _job(parts, job_id)
    history = [
        {"time": entry.time, "kind": entry.kind, "state": entry.state, "account": entry.account}
        for entry in parts.store.record(job_id=job_id)
        if entry.kind in ("submit", "pull", "requeue") or (entry.kind == "update" and entry.code == 204)
    ]
    return found | {"history": history}


@router.delete("/jobs/{job_id}", status_code=204)
async def delete(parts: Parts, job_id: int, swept: bool = False) -> None:
    """Delete a job. `swept`: as though the server's own sweep had met the deletion first (S7)."""
    if not parts.store.delete(job_id, swept=swept):
        raise HTTPException(404, "Job not found")


@router.get("/jobs/{job_id}/files")
def results(parts: Parts, job_id: int) -> dict[str, list[dict[str, str]]]:
    """The names of everything the worker stored for the job, each with its file id."""
    _job(parts, job_id)
    folder = f"{OUTPUTS}/{job_id}/"
    names = parts.storage.names(folder)
    return {"files": [{"name": name, "file_id": parts.storage.file_id(folder + name)} for name in names]}


@router.get("/jobs/{job_id}/files/{name:path}")
def result(parts: Parts, job_id: int, name: str) -> StreamingResponse:
    """One result."""
    _job(parts, job_id)
    return _content(parts, f"{OUTPUTS}/{job_id}/{name}")


@router.put("/files/{path:path}", status_code=201)
async def put_input(parts: Parts, request: Request, path: str) -> dict[str, str]:
    """Store an input; the answer's `file_id` is what a job's `files_down` names it by."""
    key = "/".join([INPUTS, *parts_of(path)])
    async with incoming(parts.tree.new_part(), parts.settings.max_object_bytes) as file:
        _, md5 = await receive_body(request, file, lambda: key)
        await run_in_threadpool(parts.storage.adopt, file.path, key, md5)
    return {"file_id": parts.storage.file_id(key)}


@router.get("/files/{path:path}")
def get_input(parts: Parts, path: str) -> StreamingResponse:
    """An input."""
    return _content(parts, f"{INPUTS}/{path}")


def _job(parts: Context, job_id: int) -> dict[str, Any]:
    found = parts.store.job(job_id)
    if found is None:
        raise HTTPException(404, "Job not found")
    return found


def _content(parts: Context, key: str) -> StreamingResponse:
    pieces = parts.storage.read(key)
    if pieces is None:
        raise HTTPException(404, "File not found")
    return StreamingResponse(pieces, media_type="application/octet-stream")
