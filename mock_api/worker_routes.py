"""What workers call: jobs, their states, and where their files come from and go to (PROTOCOL.md, "Endpoints")."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Query, Request
from fastapi.responses import Response

from mock_api.auth import CLOUD, Worker
from mock_api.context import Context, Parts, crash
from mock_api.models import Environment, FileAnswer, FileKind, Offer, State
from mock_api.storage import Asker, Folder, StorageError

router = APIRouter()


async def _offer(
    memory: int,
    cpu_cores: int = 1,
    gpu_mem: int = 0,
    gpu_model: str | None = None,
    gpu_archi: str | None = None,
    groups: Annotated[list[str] | None, Query()] = None,
    limit: int = 1,
    older_than: int = 0,
) -> Offer:
    """The query of `GET /jobs`; one parameter each, so that a refusal reads as a deployed server's."""
    return Offer(memory, cpu_cores, gpu_mem, gpu_model, gpu_archi, groups or [], limit, older_than)


@router.get("/jobs")
async def pull(
    parts: Parts, caller: Worker, request: Request, offer: Annotated[Offer, Depends(_offer)]
) -> dict[int, Any]:
    """Jobs that fit the offer. They are the caller's from now on, without acknowledgement (S1)."""
    if ";" in caller.name:
        raise HTTPException(500, "an account name must not contain ';'")
    environment = Environment.CLOUD if CLOUD in caller.groups else Environment.LOCAL
    return parts.store.pull(offer, caller.name, environment, asked=request.url.query, away=_unheard(request))


@router.get("/jobs/{job_id}/status")
async def get_status(parts: Parts, caller: Worker, job_id: int) -> State:
    """The job's state, to any worker; 404 when the job is gone."""
    state = parts.store.state(job_id, caller.name)
    if state is None:
        raise HTTPException(404, "Not Found")
    return state


@router.put("/jobs/{job_id}/status", status_code=204, response_class=Response)
async def put_status(
    parts: Parts, caller: Worker, request: Request, job_id: int, status: State, runtime_details: str = ""
) -> Response:
    """A worker's word on a job: heartbeat, progress, end or release. 404: stop this job (S5 to S7, S10). 500: the job
    is not known any more (S7), or it is committed and the user's side could not be told (S19)."""
    code = parts.store.update(job_id, caller.name, status, runtime_details, away=_unheard(request))
    if code == 404:
        raise HTTPException(404, "Not Found")
    return crash() if code == 500 else Response(status_code=204)


@router.get("/files/{file_id:path}/url")
async def download_url(parts: Parts, caller: Worker, request: Request, file_id: str) -> FileAnswer:
    """How to fetch an input. That an object's name starts like it is all that an object store checks (S14)."""
    answer = await parts.storage.download(file_id, _asker(parts, request))
    code = 404 if answer is None else 200
    parts.store.note("sign_download", account=caller.name, code=code, note=file_id)
    if answer is None:
        raise HTTPException(404, "Not Found")
    return _nested(parts, request, answer)


@router.post("/jobs/{job_id}/files/url", status_code=201, response_model=FileAnswer)
async def upload_url(
    parts: Parts,
    caller: Worker,
    request: Request,
    job_id: int,
    kind: Annotated[FileKind, Query(alias="type")],
    base_path: str = "",
    filename: str | None = None,
) -> FileAnswer | Response:
    """How to send outputs. 500 when the job is no longer the caller's (S8). Deployed servers ignore `filename`."""
    held = parts.store.holds(job_id, caller.name)
    note = "/".join(filter(None, [kind, base_path, filename]))
    parts.store.note("sign_upload", job_id=job_id, account=caller.name, code=201 if held else 500, note=note)
    if not held:
        return crash()
    one_object = filename if parts.settings.upload_method == "put" else None
    if one_object is not None and (one_object in ("", ".", "..") or "/" in one_object):
        raise StorageError(400, "InvalidArgument", "filename must be one path component")
    answer = await parts.storage.upload(Folder(job_id, kind, base_path), one_object, _asker(parts, request))
    return _nested(parts, request, answer)


def _unheard(request: Request) -> bool:
    """Whether a fault keeps what this request changes from the user's side (S19)."""
    return bool(getattr(request.state, "unheard", False))


def _asker(parts: Context, request: Request) -> Asker:
    api = (parts.settings.public_url or str(request.base_url)).rstrip("/")
    storage = (parts.settings.storage_url or api).rstrip("/")
    query = request.scope["query_string"].decode("latin-1")
    asked = request.scope["path"] + (f"?{query}" if query else "")
    return Asker(api, storage, request.headers["authorization"], asked)


def _nested(parts: Context, request: Request, answer: FileAnswer) -> FileAnswer:
    """The answer, with headers nested as the deployed schema allows (S15), where that is switched on."""
    if not (parts.settings.nested_headers or getattr(request.state, "nested_headers", False)):
        return answer
    return answer.model_copy(update={"headers": {**answer.headers, "x-nested": {"a": "b", "c": ["d"]}}})
