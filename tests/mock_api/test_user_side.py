"""The user's side, the status page, the settings and the command."""

import contextlib
import os
import re
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from mock_api.__main__ import _say, listen
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
        assert "src=" not in answer.text
        assert set(re.findall(r'href="([^"]*)"', answer.text)) == {f"/page/jobs/{job_id}", f"/page/jobs/{job_id}#files"}


def test_a_jobs_own_page_tells_its_details_and_links_its_files(mock: MockServer, worker: httpx.Client) -> None:
    job_id = mock.submit(job_spec())
    assert pull(worker) == [job_id]
    form = worker.post(f"/jobs/{job_id}/files/url", params={"type": "output", "base_path": "out"}).json()
    name = "ü <b>&.csv"
    httpx.post(form["url"], data=form["data"], files={"file": (name, b"1,2")}, trust_env=False).raise_for_status()
    assert put(worker, job_id, "error", "<i>exit code 3</i>") == 204
    with user(mock) as client:
        text = client.get(f"/page/jobs/{job_id}").text
        assert "&lt;i&gt;exit code 3&lt;/i&gt;" in text
        assert "output/out/ü &lt;b&gt;&amp;.csv" in text
        assert "<b>" not in text
        links = re.findall(r'href="([^"]*)"', text)
        [file] = [link for link in links if "/files/" in link]
        assert client.get(file).content == b"1,2"
        assert {client.get(link).status_code for link in links} == {200}
        assert client.get("/page/jobs/99").status_code == 404


def test_what_a_phone_has_no_room_for_is_not_shown_on_one(mock: MockServer) -> None:
    """Two columns go below 40 rem; details have a line of their own, which breaks anywhere."""
    mock.submit(job_spec())
    with user(mock) as client:
        text = client.get("/", headers={"Accept": "text/html"}).text
    assert "@media (max-width: 40rem) { .wide { display: none; } }" in text
    assert re.findall(r'<th class="wide">(.*?)</th>', text) == ["Submitted (UTC)", "Worker"]
    assert "<th>Details</th>" not in text
    assert re.search(r"\.details {[^}]*overflow-wrap: anywhere", text)


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


@pytest.mark.parametrize(
    ("host", "usable"), [("0.0.0.0", "http://127.0.0.1:"), ("127.0.0.1", "http://127.0.0.1:"), ("::1", "http://[::1]:")]
)
def test_the_addresses_that_it_says_are_ones_to_use(
    host: str, usable: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _say(host, 8000, Settings(data_dir=tmp_path))
    said = capsys.readouterr().out
    assert "http://0.0.0.0" not in said
    assert said.count(f"{usable}8000") == 5
    assert ("http://host.docker.internal:8000" in said) == (host == "0.0.0.0")
    with listen(host, 0) as listener:
        assert listener.getsockname()[1] > 0


def test_a_port_that_is_taken_is_said_with_what_to_type(tmp_path: Path) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        done = command_ends(tmp_path, "--port", str(port))
    assert done.stderr == (
        f"jobfetcher-mock-api: port {port} is taken: name another, --port {port + 1}, or --port 0 for a free one\n"
    )
    assert (
        command_ends(tmp_path, "--host", "192.0.2.1").stderr
        == "jobfetcher-mock-api: cannot listen on 192.0.2.1 port 8000: Cannot assign requested address\n"
    )


@pytest.mark.parametrize("content", [b"something else that is no database", None])
def test_data_of_something_else_or_of_another_version_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "mock.db"
    if content:
        path.write_bytes(content)
    else:
        with contextlib.closing(sqlite3.connect(path)) as old:
            old.execute("CREATE TABLE jobs (id INTEGER)")
    done = command_ends(tmp_path, "--port", "0")
    assert done.stderr.startswith(f"jobfetcher-mock-api: {path} ")
    assert done.stderr.count("\n") == 1


def command_ends(data_dir: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "mock_api", "--data-dir", str(data_dir), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 2
    return done


def test_help_names_every_setting() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mock_api", "--help"], capture_output=True, text=True, timeout=TIMEOUT_S, check=True
    )
    options = {f"--{name.replace('_', '-')}" for name in Settings.model_fields} - {"--s3-secret-key"}
    assert {option for option in options if option not in done.stdout} == set()
    assert "mock-token" in done.stdout
    assert "VALUE" not in done.stdout
    assert re.search(r"\(S\d+\)", done.stdout) is None  # no row of the protocol, which nobody who reads this has
    assert "True" not in done.stdout


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
