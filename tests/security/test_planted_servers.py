"""No link, name or redirect of a hostile server leads the transfer to an address inside, and no secret along (N11)."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.security.planted import HOSTS, PUBLIC, SECRET
from tests.support.mounts import needs_root
from tests.support.services import REPOSITORY, require_program


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What `tests.security.planted` saw in a world of its own."""
    unshare = require_program("unshare", "util-linux")
    require_program("ip", "iproute2")
    said = subprocess.run(
        [unshare, "--net", "--mount", sys.executable, "-m", "tests.security.planted"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert said.returncode == 0, said.stderr
    return dict(json.loads(said.stdout))


@needs_root
@pytest.mark.fault("N11", "T7", "T19")
def test_no_planted_server_is_visited(found: dict[str, Any]) -> None:
    assert len(found["tried"]) >= 60
    assert len(HOSTS) >= 40
    # 169.254.169.254, loopback and the lab's own nets all listen; the public storage alone was spoken to.
    assert {address for address, _ in found["visits"]} == {PUBLIC}
    assert [link for _, link, end in found["tried"] if end == "moved"] == []


@needs_root
@pytest.mark.fault("N11", "T8")
def test_the_planted_secrets_went_nowhere(found: dict[str, Any]) -> None:
    tokens = [request for _, request in found["visits"] if f"Bearer {SECRET}" in request or "session=" in request]
    assert tokens == []
    followed = [request for _, request in found["visits"] if "x-amz-security-token" in request.lower()]
    assert followed  # what was signed for the public storage goes there ...
    assert all("?to=" in request.partition("\r\n")[0] for request in followed)  # ... and no further


@needs_root
@pytest.mark.fault("T7")
def test_a_host_that_its_owner_trusts_is_reached(found: dict[str, Any]) -> None:
    """The planted servers do answer: it is the check that keeps them alone."""
    assert found["control"] == ["moved", ["10.0.0.1"]]
