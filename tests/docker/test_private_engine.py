"""The engine that tests may stop, kill and freeze does what they count on, and leaves nothing behind."""

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import docker
import pytest
import requests

from tests.support.private_engine import PrivateEngine, private_engine
from tests.support.services import ensure_busybox_image

pytestmark = pytest.mark.docker

TERMINATED = 128 + signal.SIGTERM


def start_sleeper(client: docker.APIClient) -> str:
    host_config = client.create_host_config(network_mode="none", init=True)
    container = client.create_container(ensure_busybox_image(client), ["sleep", "600"], host_config=host_config)["Id"]
    client.start(container)
    return str(container)


def state(client: docker.APIClient, container: str) -> dict[str, Any]:
    return dict(client.inspect_container(container)["State"])


def processes_with(word: str) -> list[str]:
    """The command lines of running processes that have `word` in them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has just ended
            continue
        if word in command:
            found.append(command)
    return found


def test_it_is_stopped_killed_and_frozen(engine: docker.APIClient, busybox: str) -> None:
    with private_engine() as private:
        private.copy_image(engine, busybox)
        client = private.client()
        first = start_sleeper(client)
        private.stop()
        assert not private.answers()
        private.start()
        assert state(client, first)["Status"] == "exited"

        second = start_sleeper(client)
        private.kill()
        private.start()
        assert (state(client, second)["Status"], state(client, second)["ExitCode"]) == ("exited", TERMINATED)

        private.freeze()
        with contextlib.closing(docker.APIClient(private.url, "1.41", timeout=1)) as impatient:
            with pytest.raises(requests.ReadTimeout):
                impatient.ping()
            private.thaw()
        assert client.ping()
        assert engine.ping(), "the machine's own engine must notice nothing"
        directory = private.directory
    assert not directory.exists()
    assert str(directory) not in Path("/proc/self/mountinfo").read_text()
    assert processes_with(str(directory)) == []


def test_with_live_restore_containers_outlive_it_and_are_ended_at_last() -> None:
    with private_engine(live_restore=True) as private:
        client = private.client()
        container = start_sleeper(client)
        pid = state(client, container)["Pid"]
        private.kill()
        private.start()
        assert (state(client, container)["Running"], state(client, container)["Pid"]) == (True, pid)
        private.kill()  # nobody is left who could end the container in an orderly way
        directory = private.directory
    assert not directory.exists()
    assert str(directory) not in Path("/proc/self/mountinfo").read_text()
    assert processes_with(str(directory)) == []
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_one_that_does_not_start_says_why_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def flags(private: PrivateEngine) -> list[str]:
        made.append(private.directory)
        return ["--no-such-flag"]

    monkeypatch.setattr(PrivateEngine, "_flags", flags)
    with pytest.raises(AssertionError, match="unknown flag: --no-such-flag"), private_engine():
        pytest.fail("it started")
    [directory] = made
    assert not directory.exists()
    assert processes_with(str(directory)) == []
