"""The wire models of PROTOCOL.md, as this server reads them. Unknown fields are kept and handed on as they came."""

from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class State(StrEnum):
    """Where a job is."""

    QUEUED = "queued"
    PULLED = "pulled"
    PREPROCESSING = "preprocessing"
    RUNNING = "running"
    POSTPROCESSING = "postprocessing"
    FINISHED = "finished"
    ERROR = "error"


TERMINAL = frozenset({State.FINISHED, State.ERROR})
HELD = (State.PULLED, State.PREPROCESSING, State.RUNNING, State.POSTPROCESSING)


class FileKind(StrEnum):
    """What an uploaded file is."""

    OUTPUT = "output"
    LOG = "log"
    ARTIFACT = "artifact"


class _Section(BaseModel):
    model_config = ConfigDict(extra="allow")


class AppSpec(_Section):
    """What to run: `cmd` is a list of shell fragments."""

    cmd: list[str] | None = None
    env: dict[str, str] | None = None


class HandlerSpec(_Section):
    """What to run it in, and which files go in and out."""

    image_url: str
    image_name: str | None = None
    image_version: str | None = None
    entrypoint: str | None = None
    files_down: dict[str, str] | None = None
    files_up: dict[FileKind, str] | None = None


class HardwareSpec(_Section):
    """What the job needs; memory in MiB. Null needs match every worker (PROTOCOL.md S18)."""

    cpu_cores: int | None = None
    memory: int | None = None
    gpu_model: str | None = None
    gpu_archi: str | None = None
    gpu_mem: int | None = None


class JobSpecs(_Section):
    """A job as its user submits it. The server adds `meta.job_id` and `meta.date_created` when it hands the job out."""

    app: AppSpec = Field(default_factory=AppSpec)
    handler: HandlerSpec
    meta: dict[str, Any] = Field(default_factory=dict)
    hardware: HardwareSpec = Field(default_factory=HardwareSpec)


class Offer(BaseModel):
    """What a worker offers in `GET /jobs`; memory in MiB, `older_than` in seconds since the job was made."""

    memory: int = Field(ge=0)
    cpu_cores: int = Field(1, ge=0)
    gpu_mem: int = Field(0, ge=0)
    gpu_model: str | None = None
    gpu_archi: str | None = None
    groups: list[str] = Field(default_factory=list)
    limit: int = Field(1, ge=1)
    older_than: float = Field(0, ge=0)


class FileAnswer(BaseModel):
    """How to fetch or send a file. `headers` are strings by right, but the schema lets them be nested (S15)."""

    method: str
    url: str
    headers: dict[str, Any] = Field(default_factory=dict)
    data: dict[str, str] = Field(default_factory=dict)
