"""A worker behind the proxy of its machine: a whole job, signed in, by a name that only the proxy knows."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.http_proxy import HttpProxy, running_http_proxy
from tests.support.services import free_port
from tests.support.worker import Lab, command

pytestmark = [pytest.mark.docker, pytest.mark.fault("B20")]

NAME = "jobs.example"


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpProxy]:
    """A proxy that runs in this process and finds the mock API under NAME, which the worker's own process does not."""
    ask = socket.getaddrinfo

    def getaddrinfo(host: str, *more: object, **named: object) -> object:
        return ask("127.0.0.1" if host == NAME else host, *more, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with running_http_proxy() as running:
        yield running


def settings(lab: Lab) -> dict[str, str]:
    port = lab.server.url.rpartition(":")[2]
    lab.server.add_account("lab-7", "correct-Horse-7-battery")
    return lab.env(
        api_url=f"http://{NAME}:{port}",
        allow_insecure_http="true",
        username="lab-7",
        password="correct-Horse-7-battery",
        aws_endpoint_url=f"http://{NAME}:{port}",
    )


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "PROXY"])
def test_a_job_comes_and_goes_through_the_proxy(lab: Lab, tmp_path: Path, proxy: HttpProxy, variable: str) -> None:
    file_id = lab.server.put_input("in.txt", b"content")
    job = lab.submit("cp /files/in /files/out/x", files_down={"in": file_id}, files_up={"output": "out"})
    env = settings(lab) | {variable: proxy.url}
    with command(["run", "--once"], env, tmp_path) as run:
        assert run.wait() == 0
    assert lab.ended(job) == ("finished", "")
    assert lab.server.results(job)["output/out/x"] == b"content"
    assert {asked.split("/")[2].partition(":")[0] for asked in proxy.asked} == {NAME}


def test_what_switches_the_proxy_off(lab: Lab, tmp_path: Path, proxy: HttpProxy) -> None:
    """PROXY=none, and NO_PROXY for this host: then the name leads nowhere, as it does without any proxy."""
    for switch in ({"PROXY": "none"}, {"NO_PROXY": ".example"}):
        env = settings(lab) | {"HTTP_PROXY": proxy.url} | switch
        with command(["run", "--exit-when-idle", "1"], env, tmp_path) as run:
            assert run.wait() == 1
            assert f"no answer from {NAME}:" in run.errors
            assert "through the proxy" not in run.errors
    assert proxy.asked == []


def test_a_server_on_this_machine_is_asked_directly(lab: Lab, tmp_path: Path) -> None:
    job = lab.submit("true")
    dead = f"http://127.0.0.1:{free_port()}"
    with command(["run", "--once"], lab.env() | {"HTTP_PROXY": dead, "https_proxy": dead}, tmp_path) as run:
        assert run.wait() == 0
    assert lab.ended(job) == ("finished", "")
