"""The wire models of PROTOCOL.md, as this server reads them. Unknown fields are kept and handed on as they came."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class State(StrEnum):
    """Where a job is."""

    QUEUED = "queued"
    PREPROCESSING = "preprocessing"
    PULLED = "pulled"
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
    """What to run it in, and which files go in and out.

    The deployed user-facing server sets three labels on every job, the keys of its table of applications. They say
    nothing about the container, and a worker that takes `entrypoint` for one's ENTRYPOINT fails every job.
    """

    image_url: str
    image_name: str | None = "decode"
    image_version: str | None = "latest"
    entrypoint: str | None = "fit"
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


class Environment(StrEnum):
    """Where a job may run: accounts in the group `cloud` are `cloud`, all others `local` (S21)."""

    CLOUD = "cloud"
    LOCAL = "local"


class Wishes(BaseModel):
    """What decides when and by whom a job is taken, beside its needs (S21).

    A job without an environment is for both; `retries` of None is the server's own number.
    """

    group: str | None = None
    priority: int = Field(0, ge=0, le=5, description="0 to 5, the highest first")
    environment: Environment | None = None
    retries: int | None = None


@dataclass(frozen=True)
class Offer:
    """What a worker offers in `GET /jobs`; memory in MiB, `older_than` in seconds since the job was made.

    No number is refused; one that makes no sense fits no job.
    """

    memory: int
    cpu_cores: int
    gpu_mem: int
    gpu_model: str | None
    gpu_archi: str | None
    groups: list[str]
    limit: int
    older_than: int


class FileAnswer(BaseModel):
    """How to fetch or send a file. `headers` are strings by right, but the schema lets them be nested (S15)."""

    method: str
    url: str
    headers: dict[str, Any] = Field(default_factory=dict)
    data: dict[str, str] = Field(default_factory=dict)
