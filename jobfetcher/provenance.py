"""The record of how a job was run, sent beside its logs: enough to run it again, and to see what it had."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from jobfetcher import __version__
from jobfetcher.core.errors import WorkerFault, WorkerReason
from jobfetcher.core.job import Job
from jobfetcher.core.run import Exit, Image, RunSpec, Stored


def exit_class(exit: Exit) -> str:
    """The kind of end, as one word: `success`, `failure`, `out_of_memory`, `killed` or `interrupted`."""
    if not exit.genuine:
        return "interrupted"
    if exit.oom_killed:
        return "out_of_memory"
    if exit.code == 0:
        return "success"
    return "killed" if exit.code == 137 else "failure"


def provenance(
    job: Job,
    *,
    image: Image,
    spec: RunSpec,
    inputs: Mapping[str, Stored],
    exit: Exit,
    seconds: Mapping[str, float],
) -> str:
    """The record as JSON text. `seconds`: how long each step took; memory in MiB.

    `job` is the server's id and `user_job` the user's own, which is another number (PROTOCOL.md S22).

    No token, signed URL or host path is in it, and no value of an environment variable: people put their keys there.
    """
    record = {
        "jobfetcher": __version__,
        "job": job.id,
        "user_job": job.user_job_id,
        "image": {"reference": image.reference, "id": image.id, "digest": image.digest, "arch": image.architecture},
        "command": list(spec.command) if spec.command is not None else None,
        "labels": dict(job.labels),
        "environment": sorted(spec.env),
        "inputs": [
            {
                "path": file.path,
                "source": file.ref,
                "size": inputs[file.path].size,
                "digest": inputs[file.path].digest,
            }
            for file in job.inputs
        ],
        "gpus": list(spec.gpu_uuids),
        "limits": {
            "cpu_cores": round(spec.cpu_cores, 3),
            "memory_mib": spec.memory_mib,
            "shm_mib": spec.shm_mib,
            "processes": spec.pids_limit,
            "network": spec.network or "none",
        },
        "exit": {
            "class": exit_class(exit),
            "code": exit.code,
            "started_at": exit.started_at,
            "finished_at": exit.finished_at,
        },
        "seconds": {step: round(took, 3) for step, took in seconds.items()},
    }
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"


def keep(text: str, logs: Path, *, draft: Path) -> None:
    """Write the record into the folder `logs`, whole or not at all (by way of `draft`, a file on the same disk).

    Only once: after a restart it would not know how long the steps took. Raises WorkerFault(DISK).
    """
    target = logs / "provenance.json"
    if target.exists():
        return
    try:
        draft.write_text(text, encoding="utf-8")
        draft.rename(target)
    except OSError as error:
        raise WorkerFault(WorkerReason.DISK, f"the record of the run cannot be written: {error}") from error
