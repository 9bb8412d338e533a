"""Jobs whose files lie in a real object store: the worker and SeaweedFS, which checks every signature, form and PUT."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import docker
import pytest

from tests.support.mock_server import MockServer, running_mock_api
from tests.support.services import S3
from tests.support.worker import Held, Lab, assert_clean, work

pytestmark = [pytest.mark.s3, pytest.mark.docker]

INPUTS = {
    "data/empty.bin": b"",
    "data/small file.csv": b"x,y\n1,2\n",
    "big.raw": hashlib.shake_128(b"").digest(20 * 1024 * 1024),
}
FILES_UP = {"output": "out", "log": "log", "artifact": "model"}
COMMAND = [
    "cd /files && mkdir -p model/a/b &&",
    "cp data/empty.bin out/empty && cp 'data/small file.csv' out/small && cp big.raw out/big &&",
    "cp 'data/small file.csv' log/one.log && : > log/two.log &&",
    "cp big.raw model/a/b/weights.pt && : > model/a/b/empty && cp 'data/small file.csv' model/a/config",
]
STORED = {
    "output/out/empty": INPUTS["data/empty.bin"],
    "output/out/small": INPUTS["data/small file.csv"],
    "output/out/big": INPUTS["big.raw"],
    "log/log/one.log": INPUTS["data/small file.csv"],
    "log/log/two.log": b"",
    "artifact/model/a/b/weights.pt": INPUTS["big.raw"],
    "artifact/model/a/b/empty": b"",
    "artifact/model/a/config": INPUTS["data/small file.csv"],
}
OWN_LOGS = {"log/jobfetcher/container.log", "log/jobfetcher/provenance.json"}


@contextmanager
def lab_on(
    store: S3, tmp_path: Path, bucket: str, image: str, engine: docker.APIClient, **settings: Any
) -> Iterator[Lab]:
    """A mock API that keeps its files in a bucket of the store, and a place for a worker, which must be clean after."""
    with running_mock_api(
        tmp_path / "mock",
        file_mode="s3",
        s3_endpoint=store.url,
        s3_region=store.region,
        s3_access_key=store.access_key,
        s3_secret_key=store.secret_key,
        s3_bucket=bucket,
        **settings,
    ) as server:
        lab = Lab(server, tmp_path / "base", image, engine)
        before = lab.held()
        # the server's own connections to the store: boto3 keeps up to ten (max_pool_connections)
        before = Held(before.descriptors + 10, before.threads)
        yield lab
        assert_clean(lab, before)


def folder_of(name: str) -> str:
    return name.rpartition("/")[0]


def sorted_notes(server: MockServer, job_id: int) -> list[str]:
    """What upload requests were signed for, each as `<kind>/<folder>/<the file that it was asked for>`."""
    return sorted(event["note"] for event in server.events("sign_upload", job_id))


@pytest.mark.parametrize("method", ["post", "put"])
def test_three_files_in_and_three_kinds_out(
    tmp_path: Path, seaweedfs: S3, busybox: str, engine: docker.APIClient, method: str
) -> None:
    with lab_on(seaweedfs, tmp_path, f"e2e-{method}", busybox, engine, upload_method=method) as lab:
        files_down = {path: lab.server.put_input(path, content) for path, content in INPUTS.items()}
        job_id = lab.submit(*COMMAND, files_down=files_down, files_up=FILES_UP)
        work(lab.settings())

        assert lab.ended(job_id) == ("finished", "")
        results = lab.server.results(job_id)
        assert results.keys() == STORED.keys() | OWN_LOGS
        assert [name for name, content in STORED.items() if results[name] != content] == []
        signed = sorted_notes(lab.server, job_id)
    if method == "post":  # one form serves its whole folder
        assert sorted(map(folder_of, signed)) == sorted({folder_of(name) for name in results})
    else:  # one signature for each object
        assert signed == sorted(results)


def test_an_input_that_the_store_does_not_have_is_an_error(
    tmp_path: Path, seaweedfs: S3, busybox: str, engine: docker.APIClient
) -> None:
    """PROTOCOL.md S14: a link to it is handed out all the same, and the 404 of the storage is no cancel."""
    with lab_on(seaweedfs, tmp_path, "e2e-missing", busybox, engine) as lab:
        there = lab.server.put_input("data/stack-1.tif", b"II*")
        missing = there.removesuffix("-1.tif")
        job_id = lab.submit("true", files_down={"in/1.tif": there, "in/stack.tif": missing}, files_up=FILES_UP)
        work(lab.settings())

        handed_out = {event["note"]: event["code"] for event in lab.server.events("sign_download")}
        assert handed_out == {there: 200, missing: 200}
        state, details = lab.ended(job_id)
        assert state == "error"
        assert "in/stack.tif" in details
        assert lab.server.updates(job_id) == ["preprocessing", "error"]
