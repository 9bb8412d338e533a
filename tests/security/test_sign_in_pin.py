"""A server that was taken over cannot have a worker's password sent to a user pool of its own (FAULTS.md T20, M2)."""

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from jobfetcher import build
from jobfetcher.core.errors import ConfigError, SourceRefused
from jobfetcher.core.machine import Offer
from jobfetcher.settings import load
from tests.support.jobs import Emitted

pytestmark = pytest.mark.fault("T20")

OURS = {"user_pool_id": "eu-central-1_ours", "client_id": "ourclient", "region": "eu-central-1"}
THEIRS = {
    "user_pool_id": "eu-central-1_ours",
    "client_id": "theirclient",
    "region": "eu-central-1",
}  # the id means nothing
PASSWORD = "correct-Horse-7-battery"


class Server(http.server.ThreadingHTTPServer):
    """A worker API, and the service where it has workers sign in: `asked` has the client of each sign-in."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.pool: dict[str, str] = OURS
        self.accepts = True
        self.asked: list[str] = []


class _Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        self._send(200, {"cognito": self.server.pool} if self.path == "/access_info" else {})

    def do_POST(self) -> None:
        assert isinstance(self.server, Server)
        said = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(json.loads(said)["ClientId"])
        good = {"AuthenticationResult": {"IdToken": "token", "ExpiresIn": 3600}}
        bad = {"__type": "NotAuthorizedException", "message": "no"}
        self._send(200, good) if self.server.accepts else self._send(400, bad)

    def _send(self, status: int, answer: object) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing: the tests look at `asked`."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def start(server: Server, base: Path, **more: str) -> None:
    """Start a worker on that directory, as far as its first question for a job."""
    environ = {"API_URL": server.url, "AWS_ENDPOINT_URL": server.url, "USERNAME": "lab", "PASSWORD": PASSWORD}
    settings = load(environ=environ | {"PATH_BASE": str(base)} | more).settings
    with closing(build.make_source(settings, Emitted())) as source:
        assert source.fetch(Offer(1.0, 1000), 0.0) is None


def test_a_pool_that_changes_gets_no_password_until_a_person_accepts_it(server: Server, tmp_path: Path) -> None:
    start(server, tmp_path)
    start(server, tmp_path)
    server.pool = THEIRS
    for _ in range(2):
        with pytest.raises(SourceRefused, match="no password is sent there") as refused:
            start(server, tmp_path)
    assert server.asked == ["ourclient", "ourclient"]
    said = str(refused.value)
    assert "sign in at eu-central-1_ours/theirclient in eu-central-1, and it was eu-central-1_ours/ourclient" in said
    assert f"set COGNITO_POOL to it, or delete {tmp_path / 'sign-in.json'}" in said
    start(server, tmp_path, COGNITO_POOL="eu-central-1_ours/theirclient")
    (tmp_path / "sign-in.json").unlink()
    start(server, tmp_path)
    server.pool = OURS
    with pytest.raises(SourceRefused):
        start(server, tmp_path)
    assert server.asked[2:] == ["theirclient", "theirclient"]


@pytest.mark.parametrize(
    "change", [{"region": "us-east-1"}, {"client_id": "x\x1b[31m" * 30}, {"client_id": "ourclient "}]
)
def test_any_part_that_decides_where_it_goes_counts(server: Server, tmp_path: Path, change: dict[str, str]) -> None:
    start(server, tmp_path)
    server.pool = OURS | change
    with pytest.raises(SourceRefused) as refused:
        start(server, tmp_path)
    assert len(server.asked) == 1
    assert "\x1b" not in str(refused.value)


def test_a_pool_whose_id_alone_is_told_otherwise_is_the_same_one(server: Server, tmp_path: Path) -> None:
    start(server, tmp_path)
    server.pool = {name: value for name, value in OURS.items() if name != "user_pool_id"}
    start(server, tmp_path)
    start(server, tmp_path, COGNITO_POOL="eu-central-1_ours/ourclient")
    assert len(server.asked) == 3


@pytest.mark.parametrize(
    "wanted", ["eu-central-1_ours/theirclient", "us-east-1_ours/ourclient", "eu-central-1_other/ourclient"]
)
def test_where_the_owner_names_the_pool_no_first_use_is_trusted(server: Server, tmp_path: Path, wanted: str) -> None:
    with pytest.raises(SourceRefused, match=f"COGNITO_POOL is {wanted}"):
        start(server, tmp_path, COGNITO_POOL=wanted)
    assert server.asked == []
    assert not list(tmp_path.iterdir())


def test_what_did_not_work_is_not_kept(server: Server, tmp_path: Path) -> None:
    """Else a server that was set up wrongly for a minute would lock its workers out."""
    server.pool, server.accepts = THEIRS, False
    with pytest.raises(SourceRefused, match="was refused"):
        start(server, tmp_path)
    server.pool, server.accepts = OURS, True
    start(server, tmp_path)
    assert server.asked == ["theirclient", "ourclient"]
    assert (tmp_path / "sign-in.json").stat().st_mode & 0o777 == 0o600
    assert PASSWORD not in (tmp_path / "sign-in.json").read_text()


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"api_url": 1}', '{"api_url": "URL", "client_id": ""}'])
def test_damage_and_another_server_are_a_first_use(server: Server, tmp_path: Path, damage: str) -> None:
    (tmp_path / "sign-in.json").write_text(damage.replace("URL", server.url))
    start(server, tmp_path)
    assert json.loads((tmp_path / "sign-in.json").read_text())["api_url"] == server.url
    noted = OURS | {"api_url": "https://another.example", "client_id": "anotherclient"}
    (tmp_path / "sign-in.json").write_text(json.dumps(noted))
    start(server, tmp_path)
    assert server.asked == ["ourclient", "ourclient"]


def test_where_nothing_can_be_written_a_worker_works(server: Server, tmp_path: Path) -> None:
    start(server, tmp_path / "not" / "there")
    (tmp_path / "sign-in.json.new").symlink_to(tmp_path / "elsewhere")
    start(server, tmp_path)
    assert not (tmp_path / "elsewhere").exists()
    assert server.asked == ["ourclient", "ourclient"]


@pytest.mark.parametrize(
    "value", ["ourclient", "eu-central-1_ours", "/x", "eu-central-1_ours/", "a b_c/d", "eu/ours/x"]
)
def test_what_names_no_pool_is_refused(value: str, tmp_path: Path) -> None:
    environ = {"API_URL": "https://h", "ACCESS_TOKEN": "t", "PATH_BASE": str(tmp_path), "COGNITO_POOL": value}
    with pytest.raises(ConfigError, match=r"^COGNITO_POOL: must be a user pool's id and a client's"):
        load(environ=environ)
