"""The mock API over a real object store: presigned GET, PUT and POST form against SeaweedFS."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.mock_api.calls import pull, worker_client
from tests.support.mock_server import MockServer, job_spec, running_mock_api
from tests.support.services import S3

pytestmark = pytest.mark.s3

CONTENT = bytes(range(256)) * 40


@contextmanager
def running(tmp_path: Path, store: S3, bucket: str, **settings: Any) -> Iterator[MockServer]:
    with running_mock_api(
        tmp_path,
        file_mode="s3",
        s3_endpoint=store.url,
        s3_region=store.region,
        s3_access_key=store.access_key,
        s3_secret_key=store.secret_key,
        s3_bucket=bucket,
        **settings,
    ) as mock:
        yield mock


def test_presigned_get_and_form(tmp_path: Path, seaweedfs: S3) -> None:
    with running(tmp_path, seaweedfs, "mock-forms") as mock, worker_client(mock) as worker:
        file_id = mock.put_input("a b/ü.bin", CONTENT)
        assert file_id == "s3://mock-forms/inputs/a b/ü.bin"
        down = worker.get(f"/files/{file_id}/url").json()
        assert down["method"] == "get"
        assert down["url"].startswith(seaweedfs.url)
        got = httpx.get(down["url"], headers={"Range": "bytes=5-9"}, trust_env=False)
        assert (got.status_code, got.content) == (206, CONTENT[5:10])

        job_id = mock.submit(job_spec())
        assert pull(worker) == [job_id]
        where = {"type": "output", "base_path": "out/x", "filename": "ignored"}
        up = worker.post(f"/jobs/{job_id}/files/url", params=where).json()
        assert up["method"] == "post"
        for name in ("one.csv", "two.csv"):
            sent = httpx.post(up["url"], data=up["data"], files={"file": (name, CONTENT)}, trust_env=False)
            assert sent.is_success
        assert mock.results(job_id) == {"output/out/x/one.csv": CONTENT, "output/out/x/two.csv": CONTENT}
        with httpx.Client(base_url=mock.url, trust_env=False) as user:
            assert user.get("/user/files/a%20b/%C3%BC.bin").content == CONTENT
            assert user.get("/user/files/none").status_code == 404


def test_presigned_put(tmp_path: Path, seaweedfs: S3) -> None:
    with running(tmp_path, seaweedfs, "mock-puts", upload_method="put") as mock, worker_client(mock) as worker:
        job_id = mock.submit(job_spec())
        assert pull(worker) == [job_id]
        where = {"type": "log", "base_path": "jobfetcher", "filename": "run.log"}
        up = worker.post(f"/jobs/{job_id}/files/url", params=where).json()
        assert (up["method"], up["data"]) == ("put", {})
        assert httpx.put(up["url"], content=CONTENT, trust_env=False).is_success
        assert mock.results(job_id) == {"log/jobfetcher/run.log": CONTENT}


@pytest.mark.fault("S14")
def test_a_missing_object_is_the_stores_404(tmp_path: Path, seaweedfs: S3) -> None:
    with running(tmp_path, seaweedfs, "mock-missing") as mock, worker_client(mock) as worker:
        file_id = mock.put_input("a.tif.bak", b"x")
        assert worker.get("/files/s3://mock-missing/inputs/b.tif/url").status_code == 404
        url = worker.get(f"/files/{file_id.removesuffix('.bak')}/url").json()["url"]
        missing = httpx.get(url, trust_env=False)
        assert missing.status_code == 404
        assert "NoSuchKey" in missing.text


@pytest.mark.fault("S13")
def test_the_store_itself_refuses_a_form_that_has_expired(tmp_path: Path, seaweedfs: S3) -> None:
    with running(tmp_path, seaweedfs, "mock-late", url_life_s=1) as mock, worker_client(mock) as worker:
        job_id = mock.submit(job_spec())
        assert pull(worker) == [job_id]
        up = worker.post(f"/jobs/{job_id}/files/url", params={"type": "output", "base_path": ""}).json()

        def send() -> int:
            sent = httpx.post(up["url"], data=up["data"], files={"file": ("x", b"x")}, trust_env=False)
            return sent.status_code

        deadline = time.monotonic() + 20
        while (code := send()) != 403 and time.monotonic() < deadline:
            time.sleep(0.2)
        assert code == 403
