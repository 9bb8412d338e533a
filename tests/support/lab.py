"""The lab as a fixture, with the oracle after every test; the folders that use it import it in their conftest."""

from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

from tests.support.mock_server import running_mock_api
from tests.support.worker import Lab, assert_clean


@pytest.fixture
def lab(request: pytest.FixtureRequest, tmp_path: Path, engine: docker.APIClient, busybox: str) -> Iterator[Lab]:
    """A mock API and a directory for a worker; at the end `assert_clean`.

    With `@pytest.mark.parametrize("lab", [...], indirect=True)`, each value is a mapping of the mock API's settings.
    """
    with running_mock_api(tmp_path / "server", **getattr(request, "param", {})) as server:
        lab = Lab(server, tmp_path / "base", busybox, engine)
        before = lab.held()
        yield lab
        assert_clean(lab, before)
