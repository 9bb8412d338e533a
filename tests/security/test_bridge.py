"""What jobs with JOB_NETWORK=bridge reach of the machine itself, as README says, and that the rule it names helps."""

import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

from demo.busybox_image import IMAGE
from jobfetcher.engine.run_spec import OWN_NETWORK, BoxPolicy
from tests.support.boxes import DockerBench, docker_bench
from tests.support.own_engine import end
from tests.support.private_engine import PrivateEngine, private_engine
from tests.support.services import require_program

pytestmark = pytest.mark.docker

README = Path(__file__).parents[2] / "README.md"
PORT = 9099


@pytest.fixture
def own_engine(engine: docker.APIClient, busybox: str) -> Iterator[PrivateEngine]:
    """An engine in a network namespace of its own, which stands for the machine."""
    with private_engine() as own:
        own.copy_image(engine, IMAGE)
        yield own


def outside(own: PrivateEngine, *command: str) -> list[str]:
    """That command, where that engine's machine is."""
    return [require_program("nsenter", "util-linux"), f"--net=/proc/{own.pid}/ns/net", *command]


def test_a_job_reaches_services_of_the_machine_until_the_rule_of_readme_is_there(
    own_engine: PrivateEngine, tmp_path: Path
) -> None:
    (tmp_path / "www").mkdir()
    (tmp_path / "www" / "x").write_text("of the machine\n")
    [rule] = re.findall(r"^    (iptables -I INPUT .*)$", README.read_text(), re.MULTILINE)
    serve = [require_program("busybox", "busybox-static"), "httpd", "-f", "-p", str(PORT), "-h", str(tmp_path / "www")]
    server = subprocess.Popen(outside(own_engine, *serve))
    try:
        with docker_bench(IMAGE, tmp_path / "files", url=own_engine.url) as bench:
            assert "of the machine" in asked(bench)
            found = own_engine.client().networks(names=[OWN_NETWORK])
            name = f"br-{found[0]['Id'][:12]}"
            arguments = re.sub(r"br-\$\(.*?\)", name, rule).split()
            require_program("iptables", "iptables")
            subprocess.run(outside(own_engine, *arguments), check=True, capture_output=True)
            assert "of the machine" not in asked(bench)
    finally:
        end(server, signal.SIGTERM)


def asked(bench: DockerBench) -> str:
    """What a job hears that asks its gateway."""
    gateway = "$(ip route | sed -n 's/^default via \\([0-9.]*\\).*/\\1/p')"
    # Not by wget, which crashes in a static busybox whatever it asks.
    ask = f"printf 'GET /x HTTP/1.0\\r\\n\\r\\n' | nc -w 3 {gateway} {PORT}"
    _, printed = bench.run(bench.spec(ask, policy=BoxPolicy()))
    return printed
