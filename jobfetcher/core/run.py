"""What is run, and how it ended. Plain values between the runner and an engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from jobfetcher.core.errors import JobReason, WorkerReason
from jobfetcher.core.job import JobId


@dataclass(frozen=True, slots=True)
class Image:
    """An image that is on this machine and was checked; `id` is what is run, so no tag can move in between.

    `digest` is the registry's (`repo@sha256:...`), or None for an image that never was in one. `pulled`: this worker
    brought it just now, so it may remove it again one day (FAULTS.md D7). `volumes`: the paths that it declares to hold
    files (VOLUME), in its author's words. `own_init`: its entry point, or its own command, is an init program, which
    runs as process 1 or not at all. `labels`: the keys of its labels. `env`: of its variables (`NAME=value`) those that
    may act outside of its container (NVIDIA_*, LD_*).
    """

    id: str
    reference: str
    digest: str | None
    architecture: str
    size_bytes: int = 0
    pulled: bool = False
    volumes: tuple[str, ...] = ()
    own_init: Literal["", "entry point", "command"] = ""
    labels: tuple[str, ...] = ()
    env: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RunSpec:
    """Everything an engine needs to run one job, already decided; the engine adds nothing of its own.

    Memory in MiB, `cpu_cores` may be a fraction, `time_limit_s` is not here: the runner watches the clock.
    The image's own entry point stays: nothing of a job replaces it. `network` None means no network at all. `folders`:
    of the job's directory, relative to it, which must be there before the start: each is mounted once more at its own
    place, over a volume that the image declares. `volumes`: what it declares elsewhere, where the engine makes its own.
    `init`: the engine's small init program is process 1. `withheld`: variables that the job asked for and does not get.
    `unset`: variables that its image has and the job does not get. `own_filter`: under the worker's filter of system
    calls, where the engine takes one. `layer_mib`: what the engine is to hold the container's own layer to, where it
    can.
    """

    job_id: JobId
    name: str
    labels: Mapping[str, str]
    image_id: str
    command: tuple[str, ...] | None
    env: Mapping[str, str]
    files_host_path: str
    cpu_cores: float
    cpu_shares: int
    memory_mib: int
    shm_mib: int
    pids_limit: int
    gpu_uuids: tuple[str, ...] = ()
    runtime: str | None = None
    network: str | None = None
    user: str | None = None
    read_only: bool = False
    cap_add: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    volumes: tuple[str, ...] = ()
    init: bool = True
    withheld: tuple[str, ...] = ()
    unset: tuple[str, ...] = ()
    own_filter: bool = True
    layer_mib: int | None = None


@dataclass(frozen=True, slots=True)
class Exit:
    """How a container ended.

    `genuine` is False when the engine cannot vouch for the exit code (it restarted meanwhile): such an exit is
    *interrupted*, never a success, whatever the code (FAULTS.md E1). Times are the engine's own (RFC 3339 text).
    `stopped_for`: this worker stopped it for that reason, and `error` is the sentence that says so.
    """

    code: int
    oom_killed: bool = False
    genuine: bool = True
    started_at: str = ""
    finished_at: str = ""
    error: str = ""
    stopped_for: JobReason | WorkerReason | None = None


#: What of a disk has run out.
Scarce = Literal["bytes", "inodes"]


@dataclass(frozen=True, slots=True)
class Taken:
    """Room on a disk, taken or free: bytes, and inodes (one for each file, folder and link), which run out as well."""

    bytes: int = 0
    inodes: int = 0

    def __add__(self, more: Taken) -> Taken:
        return Taken(self.bytes + more.bytes, self.inodes + more.inodes)

    def __sub__(self, less: Taken) -> Taken:
        return Taken(self.bytes - less.bytes, self.inodes - less.inodes)

    def __mul__(self, times: int) -> Taken:
        return Taken(self.bytes * times, self.inodes * times)

    def of(self, kind: Scarce) -> int:
        """Only the bytes, or only the inodes."""
        return self.bytes if kind == "bytes" else self.inodes


@dataclass(frozen=True, slots=True)
class Written:
    """What a container holds on disks beside what has a name in the job's directory, as far as it can be seen.

    `engine`: on the engine's disk (its layer, volumes, files that the engine mounts into it). `files`: on the disk of
    the job's directory: files there that were deleted and are still open.
    """

    engine: Taken = Taken()
    files: Taken = Taken()


class Ending(Enum):
    """The four ways a job can end for this worker."""

    FINISHED = "finished"
    JOB_FAILED = "job failed"
    WORKER_FAILED = "worker failed"
    DROPPED = "dropped"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended and why, in one sentence. Begins as *worker failed*: success is earned (DESIGN.md, rule 2)."""

    ending: Ending = Ending.WORKER_FAILED
    reason: JobReason | WorkerReason | None = WorkerReason.INTERNAL
    message: str = "the worker stopped before the job's end was decided"


@dataclass(frozen=True, slots=True)
class Stored:
    """One file that reached its place: bytes, the digest we computed (`sha256:...` or `md5:...`), the store's ETag.

    `digest` is empty for an output whose store does not say what it got: there is nothing to compare with.
    """

    name: str
    size: int
    digest: str
    etag: str = ""
