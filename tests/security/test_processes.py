"""What other users and jobs can see of a worker's secrets in /proc, and what a job can reach over the network."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.support.services import LOOPBACK, wait_until
from tests.support.worker import DEADLINE_S, UNTIL_LET_GO, Lab, command, work

pytestmark = pytest.mark.docker

TOKEN = "planted-token-77aa"


def _seen_of(pid: int) -> dict[str, bytes]:
    """The environment and the command line of a process, as root or its own user can read them; none once it ended."""
    try:
        return {f"{name} of {pid}": Path(f"/proc/{pid}/{name}").read_bytes() for name in ("environ", "cmdline")}
    except (FileNotFoundError, ProcessLookupError):  # the job's `sleep` lives for a twentieth of a second
        return {}


@pytest.mark.fault("T10")
@pytest.mark.parametrize("lab", [{"tokens": f"{TOKEN}:worker"}], indirect=True)
@pytest.mark.parametrize("way", ["file", ".env"])
def test_a_token_in_a_file_is_in_no_environment_and_on_no_command_line(lab: Lab, tmp_path: Path, way: str) -> None:
    job = lab.submit("env > /files/out/env;", UNTIL_LET_GO, files_up={"output": "out"})
    env = {name: value for name, value in lab.env(log_level="debug").items() if name != "ACCESS_TOKEN"}
    secret = tmp_path / ("token" if way == "file" else ".env")
    secret.write_text(TOKEN if way == "file" else f"ACCESS_TOKEN={TOKEN}\n")
    secret.chmod(0o600)
    if way == "file":
        env["ACCESS_TOKEN_FILE"] = str(secret)
    with command(["run", "--once"], env, tmp_path) as run:
        lab.server.wait_for_state(job, "running", timeout_s=DEADLINE_S)
        wait_until((lab.files(job) / "out" / "env").exists, "the job began", DEADLINE_S)
        (container,) = lab.containers()
        in_job = [int(line[0]) for line in lab.engine.top(container["Id"], "-eo pid,args")["Processes"]]
        assert in_job
        seen = _seen_of(run.pid)
        for pid in in_job:
            seen |= _seen_of(pid)
        assert len(seen) >= 4, "the worker and at least one process of the job were looked at"
        lab.let_go(job)
        assert run.wait() == 0
        seen["log"] = run.errors.encode() + run.output.encode()
    assert any(b"ACCESS_TOKEN_FILE" in text or b"LOG_LEVEL" in text for text in seen.values())  # it was looked at
    assert [where for where, text in seen.items() if TOKEN.encode() in text] == []
    assert TOKEN.encode() not in lab.server.results(job)["output/out/env"]


@pytest.mark.fault("T10")
@pytest.mark.parametrize("lab", [{"tokens": f"{TOKEN}:worker"}], indirect=True)
def test_a_token_in_the_environment_is_not_handed_on(lab: Lab, tmp_path: Path) -> None:
    """The kernel keeps the first environment of a process for its own user; what the worker starts gets none of it."""
    job = lab.submit("env > /files/out/env", files_up={"output": "out"})
    with command(["run", "--once"], lab.env(access_token=TOKEN), tmp_path) as run:
        assert run.wait() == 0
    assert TOKEN.encode() not in lab.server.results(job)["output/out/env"]


# -- T19 --------------------------------------------------------------------------------------------------------------


class _Hello(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"hello from the lab")

    def log_message(self, *_: object) -> None:
        """The test's output is not the place."""


@pytest.fixture
def neighbour() -> Iterator[int]:
    """A server on all addresses of this machine, as a lab's other machines have them: its port."""
    with ThreadingHTTPServer(("0.0.0.0", 0), _Hello) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.05])
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def _fetch(port: int) -> str:
    """Shell: print every address of the host that a job may guess, and what comes from there and from its own host."""
    return (
        "gateway=$(ip route 2>/dev/null | sed -n 's/^default via \\([0-9.]*\\).*/\\1/p');"
        f"for host in $gateway 169.254.169.254 {LOOPBACK}; do"
        f" echo asked $host; wget -T 2 -q -O - http://$host:{port}/ 2>/dev/null; echo; done > /files/out/said"
    )


@pytest.mark.fault("T19")
def test_a_job_without_a_network_reaches_nobody(lab: Lab, neighbour: int) -> None:
    job = lab.submit(_fetch(neighbour), files_up={"output": "out"})
    work(lab.settings(job_network="none"))
    said = lab.server.results(job)["output/out/said"].decode()
    assert re.findall("asked (.*)", said) == ["169.254.169.254", LOOPBACK]  # there is no way out to ask for
    assert "hello" not in said


@pytest.mark.fault("T19")
def test_a_job_on_the_bridge_reaches_no_loopback_of_the_machine(lab: Lab, neighbour: int) -> None:
    """The machine's other addresses are open to it, as to any container; `none` is for jobs that shall reach nobody."""
    job = lab.submit(_fetch(neighbour), files_up={"output": "out"})
    work(lab.settings(job_network="bridge"))
    assert lab.ended(job)[0] == "finished"
    said = lab.server.results(job)["output/out/said"].decode()
    _, _, own_loopback = said.partition(f"asked {LOOPBACK}")
    assert "hello" not in own_loopback
    gateway = re.findall("asked (.*)", said)[0]
    assert gateway != "169.254.169.254"  # it has a way out
    assert "hello" not in said.partition("asked 169.254.169.254")[2]
