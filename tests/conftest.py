"""Session-wide services as fixtures, started on first use and gone at the end, and two checks that every test gets.

The services themselves are in tests/support/services.py. The checks: a test leaves no thread behind that would keep the
program alive, and a test marked `docker` leaves no container of ours.
"""

import threading
import time
from collections.abc import Iterator

import docker
import hypothesis
import pytest

from tests.fault_rows import Table
from tests.support import services
from tests.support.podman import PrivatePodman, private_podman
from tests.without import RULES

# As where CI is set: a machine that stands still for a moment is no example of anything.
hypothesis.settings.register_profile("ours", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("ours")

_GRACE_S = 5.0  # a thread that was told to stop, and an engine that is removing a container, get this long


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--faults-table`, which `make faults` uses, and `--without RULE`."""
    parser.addoption(
        "--faults-table", action="store_true", help="run the tests that carry a row of the contract; print them by row"
    )

    parser.addoption("--without", choices=sorted(RULES), help="drop one standing rule from the product (tests/without)")


def pytest_configure(config: pytest.Config) -> None:
    """The table is a plugin of its own."""
    if config.getoption("--faults-table"):
        config.pluginmanager.register(Table())


@pytest.fixture(autouse=True)
def without_a_rule(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drop the rule that `--without` names."""
    if rule := request.config.getoption("--without"):
        RULES[rule].drop(monkeypatch)


@pytest.fixture(scope="session")
def engine() -> Iterator[docker.APIClient]:
    """A client of the container engine that answers here."""
    client = services.docker_client()
    yield client
    client.close()


@pytest.fixture(scope="session")
def busybox(engine: docker.APIClient) -> str:
    """The reference of an image with busybox in it."""
    return services.ensure_busybox_image(engine)


@pytest.fixture(scope="session")
def base_python(engine: docker.APIClient) -> str:
    """The reference of a Debian image with Python; a minute of debootstrap when the engine does not have it yet."""
    return services.base_python_image(engine)


@pytest.fixture(scope="session")
def worker_image(engine: docker.APIClient) -> str:
    """The reference of the worker's own image, built from this checkout."""
    return services.worker_image(engine)


@pytest.fixture(scope="session")
def podman() -> Iterator[PrivatePodman]:
    """A rootful Podman. A test that stops its service starts it again."""
    with private_podman() as running:
        yield running


@pytest.fixture(scope="session")
def rootless_podman() -> Iterator[PrivatePodman]:
    """A Podman of a user of its own. A test that stops its service starts it again."""
    with private_podman(rootless=True) as running:
        yield running


@pytest.fixture(scope="session")
def registry() -> Iterator[services.Registry]:
    """An image registry that anyone may use. A test that stops it starts it again."""
    with services.running_registry() as running:
        yield running


@pytest.fixture(scope="session")
def seaweedfs() -> Iterator[services.S3]:
    """An S3 object store that checks signatures. Each test makes a bucket of its own."""
    with services.running_seaweedfs() as store:
        yield store


@pytest.fixture(scope="session")
def moto() -> Iterator[services.Moto]:
    """moto_server. Each test makes a user pool of its own."""
    with services.running_moto() as server:
        yield server


@pytest.fixture(scope="session")
def gpus(tmp_path_factory: pytest.TempPathFactory) -> services.GpuStub:
    """The compiled NVML stub: for subprocesses only."""
    return services.gpu_stub(tmp_path_factory.mktemp("nvml"))


@pytest.fixture(autouse=True)
def _no_threads_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + _GRACE_S
    while left := [thread for thread in threading.enumerate() if thread not in before and not thread.daemon]:
        if time.monotonic() > deadline:
            pytest.fail(f"threads left running: {', '.join(thread.name for thread in left)}", pytrace=False)
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def _no_containers_left(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    if request.node.get_closest_marker("docker") is None:
        yield
        return
    client: docker.APIClient = request.getfixturevalue("engine")
    ours = str(tmp_path_factory.getbasetemp())
    yield
    deadline = time.monotonic() + _GRACE_S
    while left := _worker_containers(client, ours):
        if time.monotonic() > deadline:
            for container in left:
                client.remove_container(container, force=True)
            pytest.fail(f"containers left behind, removed now: {', '.join(left)}", pytrace=False)
        time.sleep(0.05)


def _worker_containers(client: docker.APIClient, below: str) -> list[str]:
    """Names of the containers, running or not, that carry a label of the worker and mount a directory below `below`.

    The mount tells this run's containers from those of another run, or of a real worker, on the same engine.
    """
    return sorted(
        container["Names"][0].lstrip("/")
        for container in client.containers(all=True)
        if any(label.startswith("jobfetcher.") for label in container["Labels"] or {})
        and any(mount.get("Source", "").startswith(f"{below}/") for mount in container["Mounts"])
    )
