"""The server's job JSON (PROTOCOL.md, JobSpecs), strictly parsed into a `Job`.

Its words live here and nowhere else. Unknown fields are ignored and nulls mean "not said"; a required field that is
missing or of the wrong kind makes the job unreadable, with the path of the field in the message (FAULTS.md B16).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jobfetcher.core.job import Job, JobId
from jobfetcher.core.phases import Phase
from jobfetcher.core.text import clean

POSTPROCESSING = "postprocessing"

#: What the server calls our phases. A job is `pulled` from the fetch on; SETTLING is ours alone.
STATUS_OF_PHASE = {
    Phase.CLAIMED: "preprocessing",
    Phase.STAGING_IN: "preprocessing",
    Phase.RUNNING: "running",
    Phase.STAGING_OUT: POSTPROCESSING,
    Phase.SETTLING: POSTPROCESSING,
}

#: The server's words for ends and for giving back (PROTOCOL.md, States and S10).
FINISHED, ERROR, QUEUED = "finished", "error", "queued"

#: A job's way through the hands of its worker.
_WAY = ("pulled", "preprocessing", "running", POSTPROCESSING)

_FIRST_KEY = re.compile(rb'\s*\{\s*"([A-Za-z0-9_-]{1,64})"\s*:')


def later(one: str, other: str) -> str:
    """Which of two states is further on a job's way; the first where they are equal, or neither is on it."""
    return other if _rank(other) > _rank(one) else one


def is_behind(state: str, other: str) -> bool:
    """Whether both are on a job's way, and `state` comes before `other`."""
    return 0 <= _rank(state) < _rank(other)


def _rank(state: str) -> int:
    return _WAY.index(state) if state in _WAY else -1


def first_key(start: bytes) -> str:
    """The first key of a JSON object of which only the `start` is at hand; ValueError if that is not how it starts."""
    found = _FIRST_KEY.match(start)
    if found is None:
        raise ValueError("it does not start with an object and its first key")
    return found[1].decode()


class _App(BaseModel):
    cmd: list[str] | None = None
    env: dict[str, str] | None = None


#: What the user's side calls the program of a job, on every real one (PROTOCOL.md "How a job must be run").
_LABELS = ("entrypoint", "image_name", "image_version")


class _Handler(BaseModel):
    image_url: str
    files_down: dict[str, str] | None = None
    files_up: dict[str, str] | None = None


class _Hardware(BaseModel):
    # Servers compare these as numbers and keep them as whatever was submitted: a number in a string is accepted,
    # zero means "no need", as null does.
    model_config = ConfigDict(coerce_numbers_to_str=True)

    cpu_cores: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    memory: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    gpu_model: str | None = None
    gpu_archi: str | None = None
    gpu_mem: float | None = Field(default=None, ge=0, allow_inf_nan=False)


class _Specs(BaseModel):
    app: _App = _App()
    handler: _Handler
    hardware: _Hardware | None = None


def parse_specs(job_id: JobId, raw: Any, hashes: Mapping[str, str] | None = None) -> Job:
    """The server's JobSpecs as a Job; ValueError with one readable line when it cannot be one. `hashes`: the SHA-256 of
    inputs by path, where a signature says them."""
    try:
        specs = _Specs.model_validate(raw if not isinstance(raw, dict) else {**raw, "app": raw.get("app") or {}})
        needs = specs.hardware or _Hardware()
        return Job.model_validate(
            {
                "id": job_id,
                "image": specs.handler.image_url,
                "command": specs.app.cmd or None,
                "labels": _labels(raw),
                "user_job_id": _user_job_id(raw),
                "env": specs.app.env or {},
                "inputs": [
                    {"path": path, "ref": ref, "sha256": (hashes or {}).get(path)}
                    for path, ref in (specs.handler.files_down or {}).items()
                ],
                "outputs": [{"kind": kind, "path": path} for kind, path in (specs.handler.files_up or {}).items()],
                "needs": {
                    "cpu_cores": needs.cpu_cores or None,
                    "memory_mib": round(needs.memory) or None if needs.memory is not None else None,
                    "gpu_mem_mib": round(needs.gpu_mem) if needs.gpu_mem is not None else None,
                    "gpu_model": needs.gpu_model or None,
                    "gpu_archi": needs.gpu_archi or None,
                },
            }
        )
    except ValidationError as error:
        raise ValueError(_first_problem(error)) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _labels(raw: Any) -> dict[str, str]:
    """The labels that are set. They decide nothing, so one that is no plain text spoils no job: it is left out."""
    handler = raw.get("handler") if isinstance(raw, dict) else None
    found = {name: handler.get(name) for name in _LABELS} if isinstance(handler, dict) else {}
    return {name: clean(value, 200) for name, value in found.items() if isinstance(value, str)}


def _user_job_id(raw: Any) -> str | None:
    """`meta.job_id`: the number under which the job's user knows it (PROTOCOL.md S22); None where none is said."""
    meta = raw.get("meta") if isinstance(raw, dict) else None
    found = meta.get("job_id") if isinstance(meta, dict) else None
    is_one = isinstance(found, str | int) and not isinstance(found, bool) and found != ""
    return clean(str(found)[:200], 80) if is_one else None


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "job"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return clean(f"{where}: {first['msg'].removeprefix('Value error, ')}{more}", 400)
