"""The user's side, the status page, the settings and the command."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from mock_api.settings import Settings
from tests.mock_api.calls import pull, put, run_through
from tests.support.mock_server import MockServer, job_spec

TIMEOUT_S = 20


def user(mock: MockServer) -> httpx.Client:
    return httpx.Client(base_url=mock.url, trust_env=False)


def test_a_job_has_state_details_and_history(mock: MockServer, worker: httpx.Client) -> None:
    job_id = mock.submit(job_spec(), group="red")
    assert pull(worker, groups=["red"]) == [job_id]
    run_through(worker, job_id)
    job = mock.job(job_id)
    assert (job["state"], job["group"], job["holder"], job["retries"]) == ("finished", "red", "worker", 0)
    assert [(step["kind"], step["state"]) for step in job["history"]] == [
        ("submit", "queued"),
        ("pull", "pulled"),
        *(("update", state) for state in ("preprocessing", "running", "postprocessing", "finished")),
    ]
    assert mock.violations() == []


def test_jobs_are_listed_newest_first_without_deleted_ones(mock: MockServer) -> None:
    one, two, three = (mock.submit(job_spec()) for _ in range(3))
    mock.delete(two)
    with user(mock) as client:
        assert [job["job_id"] for job in client.get("/user/jobs").json()] == [three, one]
        assert client.get(f"/user/jobs/{two}").status_code == 404
        assert client.get(f"/user/jobs/{two}/files").status_code == 404
        assert client.delete(f"/user/jobs/{two}").status_code == 404
        assert client.delete("/user/jobs/99").status_code == 404


@pytest.mark.parametrize(
    "spec",
    [
        {},
        {"handler": {}},
        {"handler": {"image_url": "x", "files_up": {"other": "a"}}},
        {"handler": {"image_url": 1}},
        [],
    ],
)
def test_a_spec_that_breaks_the_protocol_is_refused(mock: MockServer, spec: object) -> None:
    with user(mock) as client:
        answer = client.post("/user/jobs", json=spec)
        assert answer.status_code == 422
        assert answer.json()["detail"]


def test_only_the_image_is_required(mock: MockServer, worker: httpx.Client) -> None:
    job_id = mock.submit({"handler": {"image_url": "busybox"}})
    handed = worker.get("/jobs", params={"memory": 1}).json()[str(job_id)]
    assert handed["app"] == {"cmd": None, "env": None}


def test_inputs_can_be_put_replaced_and_fetched(mock: MockServer) -> None:
    assert mock.put_input("dir/a b.bin", b"one") == "s3://mock-api/inputs/dir/a b.bin"
    mock.put_input("dir/a b.bin", b"two")
    with user(mock) as client:
        assert client.get("/user/files/dir/a%20b.bin").content == b"two"
        assert client.get("/user/files/none").status_code == 404
        assert client.put("/user/files/a/%2E%2E/%2E%2E/b", content=b"").status_code in (400, 404, 405)
    assert sorted(path.name for path in mock.data_dir.iterdir() if not path.name.startswith("mock.db")) == [
        "files",
        "parts",
        "secret",
    ]
    assert (mock.data_dir / "secret").stat().st_mode & 0o777 == 0o600


def test_the_page_lists_jobs_and_escapes_what_workers_said(mock: MockServer, worker: httpx.Client) -> None:
    with user(mock) as client:
        client.headers["Accept"] = "text/html,*/*"
        assert "No job yet" in client.get("/").text
        job_id = mock.submit(job_spec())
        assert pull(worker) == [job_id]
        assert put(worker, job_id, "error", "<script>alert(1)</script>") == 204
        answer = client.get("/")
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in answer.text
        assert "<script" not in answer.text
        assert "1 breach of the protocol" in answer.text
        assert re.search(r"(src|href)=", answer.text) is None


def test_settings_come_from_the_environment(tmp_path: Path) -> None:
    environ = {
        "MOCK_API_DATA_DIR": str(tmp_path),
        "MOCK_API_LEASE_S": "30",
        "MOCK_API_ACCOUNTS": "a:pw:workers+x,b:p:w:,c:pw",
        "MOCK_API_TOKENS": "t:1:a,u:c",
        "MOCK_API_RETRY_DIFFERENT": "false",
    }
    settings = Settings.from_env(environ, lease_s=40)
    assert settings.data_dir == tmp_path
    assert settings.lease_s == 40
    assert [(a.name, a.password, a.groups) for a in settings.accounts] == [
        ("a", "pw", ("workers", "x")),
        ("b", "p:w", ()),
        ("c", "pw", ("workers",)),
    ]
    assert settings.tokens == {"t:1": "a", "u": "c"}
    assert settings.retry_different is False


@pytest.mark.parametrize(
    ("environ", "complaint"),
    [
        ({"MOCK_API_LEASE_S": "soon"}, "MOCK_API_LEASE_S: "),
        ({"MOCK_API_FILE_MODE": "ftp"}, "MOCK_API_FILE_MODE: "),
        ({"MOCK_API_ACCOUNTS": "a b:pw"}, "MOCK_API_ACCOUNTS: "),
        ({"MOCK_API_TOKENS": "t:nobody"}, "tokens name accounts that do not exist: nobody"),
    ],
)
def test_a_bad_setting_is_one_line_that_names_it(environ: dict[str, str], complaint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(complaint)) as raised:
        Settings.from_env(environ)
    assert "\n" not in str(raised.value)


def test_the_command_prints_its_url_serves_and_stops_on_sigterm(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mock_api", "--port", "0", "--data-dir", str(tmp_path), "--file-mode", "local"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            url = first.split()[3]
            assert httpx.get(f"{url}/access_info", trust_env=False).status_code == 200
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(TIMEOUT_S)
    assert "files: local" in first


def test_the_command_refuses_a_bad_setting(tmp_path: Path) -> None:
    environ = {**os.environ, "MOCK_API_LEASE_S": "soon"}
    command = [sys.executable, "-m", "mock_api", "--port", "0", "--data-dir", str(tmp_path)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 2
    assert done.stderr.startswith("jobfetcher-mock-api: MOCK_API_LEASE_S: ")
    assert done.stderr.count("\n") == 1


def test_help_names_every_setting() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mock_api", "--help"], capture_output=True, text=True, timeout=TIMEOUT_S, check=True
    )
    options = {f"--{name.replace('_', '-')}" for name in Settings.model_fields} - {"--s3-secret-key"}
    assert {option for option in options if option not in done.stdout} == set()
    assert "mock-token" in done.stdout


def test_the_documented_uvicorn_command_works(tmp_path: Path) -> None:
    environ = {**os.environ, "MOCK_API_DATA_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "uvicorn", "mock_api.app:app", "--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            log = ""
            while not (found := re.search(r"http://\S+:\d+", log)):
                line = process.stderr.readline()
                assert line, f"uvicorn ended: {log}"
                log += line
            assert httpx.get(f"{found.group()}/access_info", trust_env=False).status_code == 200
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(TIMEOUT_S)
    assert (tmp_path / "mock.db").exists()
