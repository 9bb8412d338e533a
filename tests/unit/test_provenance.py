"""provenance: enough to run a job again, and nothing that should not leave this machine."""

import json
from pathlib import Path
from typing import Any

import pytest

from jobfetcher import __version__
from jobfetcher.core.machine import Gpu, Share
from jobfetcher.core.run import Exit, Image, Stored
from jobfetcher.engine.run_spec import BoxPolicy, build_run_spec
from jobfetcher.provenance import exit_class, provenance
from tests.support.jobs import make_job

IMAGE = Image("sha256:1", "docker.io/library/busybox:latest", "busybox@sha256:2", "amd64")
GPU = Gpu("GPU-1", "RTX", 8000, "8.6")


@pytest.mark.parametrize(
    ("end", "word"),
    [
        (Exit(0), "success"),
        (Exit(0, oom_killed=True), "out_of_memory"),
        (Exit(3), "failure"),
        (Exit(137), "killed"),
        (Exit(137, oom_killed=True), "out_of_memory"),
        (Exit(0, genuine=False), "interrupted"),
        (Exit(137, oom_killed=True, genuine=False), "interrupted"),
    ],
)
def test_each_end_has_its_class(end: Exit, word: str) -> None:
    assert exit_class(end) == word


def record_of(tmp_path: Path, **changes: Any) -> tuple[str, dict[str, object]]:
    job = make_job(inputs={"in/ä": "s3://b/k"}, env={"KEY": "job-secret", "A": "b"}, command=["a", "b"], **changes)
    host = "/srv/private/place"
    spec = build_run_spec(
        job,
        Share(1.5, 512, (GPU,)),
        image=IMAGE,
        files_host_path=host,
        attempt=1,
        instance="i",
        policy=BoxPolicy(network=None),
    )
    text = provenance(
        job,
        image=IMAGE,
        spec=spec,
        inputs={"in/ä": Stored("in/ä", 3, "sha256:x")},
        exit=Exit(3, started_at="2024-01-01T00:00:00Z", finished_at="2024-01-01T00:00:01Z"),
        seconds={"stage_in": 0.12345, "run": 1.0},
    )
    return text, json.loads(text)


def test_the_record_says_what_ran_on_what_and_how_it_ended(tmp_path: Path) -> None:
    text, record = record_of(tmp_path)
    assert record == {
        "jobfetcher": __version__,
        "job": "7",
        "user_job": None,
        "image": {"reference": IMAGE.reference, "id": "sha256:1", "digest": "busybox@sha256:2", "arch": "amd64"},
        "command": ["/bin/sh", "-c", "a b"],
        "labels": {},
        "environment": ["A", "KEY", "NVIDIA_VISIBLE_DEVICES"],
        "inputs": [{"path": "in/ä", "source": "s3://b/k", "size": 3, "digest": "sha256:x"}],
        "gpus": ["GPU-1"],
        "limits": {"cpu_cores": 1.5, "memory_mib": 512, "shm_mib": 256, "processes": 4096, "network": "none"},
        "exit": {
            "class": "failure",
            "code": 3,
            "started_at": "2024-01-01T00:00:00Z",
            "finished_at": "2024-01-01T00:00:01Z",
        },
        "seconds": {"stage_in": 0.123, "run": 1.0},
    }
    assert text.endswith("}\n")
    assert "ä" in text


@pytest.mark.fault("T10")
def test_no_value_of_the_environment_and_no_path_of_the_host_is_in_it(tmp_path: Path) -> None:
    text, _ = record_of(tmp_path)
    assert "job-secret" not in text
    assert "/srv/private" not in text


@pytest.mark.fault("S22")
def test_labels_and_the_users_own_number_are_on_record(tmp_path: Path) -> None:
    _, record = record_of(tmp_path, labels={"entrypoint": "fit"}, user_job_id="12")
    assert (record["job"], record["user_job"], record["labels"]) == ("7", "12", {"entrypoint": "fit"})
