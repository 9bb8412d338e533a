"""Names from outside can neither write, read, delete nor ask for anything outside their place (T1, T2, T3, T9)."""

from __future__ import annotations

import contextlib
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jobfetcher import tree
from jobfetcher.core.errors import UnreadableJob
from jobfetcher.core.halt import Halt
from jobfetcher.core.job import Job, parse_file_ref, parse_job_id, parse_job_path, parse_output_path
from jobfetcher.core.machine import Offer
from jobfetcher.core.ports import Claim
from jobfetcher.core.urls import UrlPolicy, parse_origin
from jobfetcher.sources.worker_api.auth import StaticToken
from jobfetcher.sources.worker_api.client import Client
from jobfetcher.sources.worker_api.source import Filter, WorkerApi
from jobfetcher.sources.worker_api.wire import parse_specs
from jobfetcher.staging import Progress, stage_in, stage_out
from jobfetcher.testing.fake_source import FakeSource
from jobfetcher.testing.fake_transfer import FakeTransfer
from jobfetcher.workspace import Base, Workspace
from tests.support.jobs import Emitted
from tests.support.mock_server import MockServer, job_spec, running_mock_api
from tests.support.trees import fingerprint, names_in

#: Of these an output folder may be named so: they lie inside the job directory whatever is in it.
WRITTEN_BY_PEOPLE = {".", "./", "./a"}

#: No name of these is a path below the job directory.
REFUSED = [
    "",
    ".",
    "..",
    "/",
    "//",
    "./",
    "../",
    "/.",
    "/..",
    "../x",
    "../../etc/passwd",
    "../../../../../../../../etc/shadow",
    "a/..",
    "a/../b",
    "a/../../b",
    "a/b/../../../c",
    "a/.",
    "a/./b",
    "./a",
    "a//b",
    "a///b",
    "/a",
    "//a",
    "///etc/passwd",
    "/etc/passwd",
    "/files/a",
    "/proc/self/environ",
    "/dev/null",
    "\\",
    "..\\x",
    "a\\..\\b",
    "C:\\Windows\\system32",
    "\\\\server\\share",
    "a\\b",
    "\0",
    "a\0b",
    "a\0/../b",
    "../\0",
    "a\nb",
    "a\rb",
    "a\tb",
    "\x1b[2J",
    "a\x7fb",
    "a\x80b",
    "a\x9bb",
    "a\u0085b",
    "a\u2028b",
    "a\u2029b",
    "\ud800",
    "a\udcffb",
    "x" * 256,
    "ä" * 128,
    "中" * 86,
    "\U0001f600" * 64,
    "a/" + "x" * 256,
    "x" * 256 + "/a",
    "/".join(["x"] * 2049),
    "/".join(["x" * 255] * 17),
    "x" * 1_000_000,
    "../" * 100_000,
    "a/" * 2048 + "..",
    "a//",
    "../a/",
    "..//",
    " /../x",
]

#: Odd, and a plain file below the job directory all the same.
TAKEN = [
    "a",
    "...",
    "....",
    "..a",
    "a..",
    ".a",
    "..a/b",
    "a/...",
    ".. ",
    " ..",
    " ",
    "~",
    "~root/x",
    "-rf",
    "--help",
    "$HOME",
    "${PATH}",
    "`id`",
    "$(id)",
    "a;b",
    "a|b",
    "a&b",
    "a'b",
    'a"b',
    "*",
    "?",
    "[a]",
    "{a,b}",
    "%2e%2e",
    "%2e%2e%2fx",
    "..%2f..%2fx",
    "%00",
    "file:",
    "c:",
    "nul",
    "con.txt",
    "a:b",
    "\uff0e\uff0e/x",  # full-width dots
    "\u2024\u2024/x",  # one-dot leaders
    "a\u2215b",  # division slash
    "a\uff0fb",  # full-width slash
    "\u202egnp.exe",
    "a\u200b/b",
    "x" * 255,
    "/".join(["x"] * 2048),
    "/".join(["d" * 100] * 40),
]


def test_the_lists_are_long_enough() -> None:
    assert len(set(REFUSED)) >= 60
    assert len(set(TAKEN)) >= 40


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    made = Workspace(tmp_path / "jobs" / "7")
    made.path.parent.mkdir()
    made.create()
    return made


@contextlib.contextmanager
def nothing_changes_but(tmp_path: Path, workspace: Workspace) -> Iterator[None]:
    """Outside the job's own files, everything is the same after the block."""
    (tmp_path / "etc").mkdir(exist_ok=True)
    (tmp_path / "etc" / "passwd").write_text("canary")
    (workspace.path.parent / "8").mkdir(exist_ok=True)

    def outside() -> dict[str, str]:
        jobs = workspace.path.parent
        names = {
            str(folder): ",".join(names_in(folder)) for folder in (tmp_path, jobs, workspace.path, workspace.parts)
        }
        return names | fingerprint(tmp_path / "etc") | fingerprint(jobs / "8")

    before = outside()
    yield
    assert outside() == before


def bring(workspace: Workspace, name: str) -> None:
    """A whole job with one input called `name`, from the server's JSON to the file in its place."""
    job = parse_specs(
        parse_job_id("7"), {"handler": {"image_url": "i", "files_down": {name: "s3://b/k"}, "files_up": {}}}
    )
    source, transfer = FakeSource("http://x"), FakeTransfer()
    transfer.objects["http://x/s3://b/k"] = b"content"
    stage_in(
        job,
        source.resume("t", job.id),
        workspace,
        transfer,
        halt=Halt(),
        have={},
        mark=_ignore,
        progress=Progress(),
    )


def _ignore(stored: object) -> None:
    """Marks are another test's."""


@pytest.mark.fault("T1")
@pytest.mark.parametrize("name", REFUSED, ids=lambda name: ascii(name)[:30])
def test_a_hostile_input_name_is_refused_before_anything_is_written(
    tmp_path: Path, workspace: Workspace, name: str
) -> None:
    with nothing_changes_but(tmp_path, workspace):
        with pytest.raises(ValueError, match="path") as refused:
            bring(workspace, name)
        assert str(refused.value).isprintable()
        assert len(str(refused.value)) <= 400
    assert names_in(workspace.files) == []


@pytest.mark.fault("T1")
@pytest.mark.parametrize("name", TAKEN, ids=lambda name: ascii(name)[:30])
def test_an_odd_input_name_is_a_file_below_the_job_directory(tmp_path: Path, workspace: Workspace, name: str) -> None:
    with nothing_changes_but(tmp_path, workspace):
        bring(workspace, name)
    [found] = _all_files(workspace.files, name.split("/"))
    assert "/".join(found.parts) == name
    workspace.remove()


def _all_files(root: Path, parts: list[str]) -> list[tree.Found]:
    with tree.opened(root, parts[:-1]) as folder:
        assert os.listdir(folder) == [parts[-1]]
        size = os.stat(parts[-1], dir_fd=folder).st_size
    return [tree.Found(tuple(parts), size, 0)]


_pieces = st.sampled_from(
    [
        "..",
        ".",
        "",
        "/",
        "//",
        "\\",
        "\0",
        "a",
        "b",
        "etc",
        "passwd",
        " ",
        "~",
        "\n",
        "\u202e",
        "ä",
        "\uff0e",
        "%2e",
        "\x1b",
    ]
)
_names = (
    st.text(st.characters(), max_size=40)
    | st.lists(_pieces, max_size=12).map("".join)
    | st.lists(_pieces, max_size=8).map("/".join)
)


@pytest.mark.fault("T1", "T2", "N10")
@settings(max_examples=10_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(_names)
@example("a/../../b")
@example("..")
def test_ten_thousand_names_stay_inside(name: str) -> None:
    for parse in (parse_job_path, parse_output_path):
        try:
            path = parse(name)
        except ValueError as refused:
            reason = str(refused)
            assert "path" in reason
            continue
        joined = os.path.normpath(f"/jobs/7/files/{path}")
        if parse is parse_output_path and path == ".":  # the whole directory, and nothing above it
            assert joined == "/jobs/7/files"
            continue
        assert joined == f"/jobs/7/files/{path}"
        assert joined.startswith("/jobs/7/files/")
        assert not any(unicodedata.category(char) in {"Cc", "Cs"} for char in path)


@pytest.mark.fault("T1")
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=_names)
def test_names_written_for_real_stay_inside(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    root = tmp_path_factory.mktemp("names")
    workspace = Workspace(root / "jobs" / "7")
    workspace.path.parent.mkdir()
    workspace.create()
    with nothing_changes_but(root, workspace), contextlib.suppress(ValueError):
        bring(workspace, name)
    tree.remove(root.parent, root.name)


@pytest.mark.fault("T2")
@pytest.mark.parametrize("name", sorted(set(REFUSED) - WRITTEN_BY_PEOPLE), ids=lambda name: ascii(name)[:30])
def test_a_hostile_output_folder_sends_nothing(workspace: Workspace, name: str) -> None:
    with pytest.raises(ValueError, match="path"):
        Job.model_validate({"id": "7", "image": "i", "outputs": [{"kind": "output", "path": name}]})


@pytest.mark.fault("T2")
def test_a_job_that_asks_for_the_hosts_files_is_an_error_and_the_store_stays_empty(tmp_path: Path) -> None:
    with running_mock_api(tmp_path / "api") as server, _api(server) as source:
        spec = job_spec(handler={"image_url": "i", "files_down": {}, "files_up": {"output": "../../../etc"}})
        job_id = server.submit(spec, raw=True)
        with pytest.raises(UnreadableJob, match=r"outputs\.0\.path.*inside the job directory") as error:
            source.fetch(Offer(4.0, 4096), 0.0)
        assert error.value.lease.job_id == str(job_id)
        assert server.results(job_id) == {}


@pytest.mark.fault("T2")
def test_an_output_folder_that_turned_into_a_link_sends_nothing(tmp_path: Path, workspace: Workspace) -> None:
    (tmp_path / "secret").write_text("canary")
    (workspace.files / "out").symlink_to(tmp_path)
    job = Job.model_validate({"id": "7", "image": "i", "outputs": [{"kind": "output", "path": "out"}]})
    transfer = FakeTransfer()
    stage_out(
        job,
        FakeSource().resume("t", job.id),
        workspace,
        transfer,
        halt=Halt(),
        have={},
        mark=_ignore,
        progress=Progress(),
    )
    assert transfer.objects == {}


# -- job ids (T3) -----------------------------------------------------------------------------------------------------

BAD_IDS = [
    "",
    ".",
    "..",
    "../x",
    "/etc",
    "a/b",
    "a\\b",
    "a.b",
    "-a",
    "_a",
    " a",
    "a ",
    "a\n",
    "\n",
    "a\0",
    "x" * 65,
    "x" * 10_240,
    "ä",
    "\u0661",
    "\uff11",
    "7%2f",
    "7?x",
    "7#x",
    "*",
    "$(id)",
    "\ud800",
]


@pytest.mark.fault("T3")
@pytest.mark.parametrize("text", BAD_IDS, ids=lambda text: ascii(text)[:20])
def test_a_hostile_job_id_is_no_job_id(text: str) -> None:
    with pytest.raises(ValueError, match="not a job id") as refused:
        parse_job_id(text)
    assert len(str(refused.value)) < 600


@pytest.mark.fault("T3")
@settings(max_examples=2000, deadline=None)
@given(st.text(st.characters(), max_size=70) | _names)
def test_an_id_is_a_single_plain_name_or_refused(text: str) -> None:
    try:
        job_id = parse_job_id(text)
    except ValueError:
        return
    assert job_id.isascii()
    assert "/" not in job_id
    assert job_id.strip(".") == job_id != ""


@pytest.mark.fault("T3")
@pytest.mark.parametrize("name", ["..", ".", "", "../other", "../../precious", "a/../../lock", "a/b", "{tmp}/precious"])
def test_a_directory_is_deleted_inside_jobs_only(tmp_path: Path, name: str) -> None:
    """Every place named here lies in the test's own folder: should the check ever fail, nothing else is lost."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("keep")
    with Base(tmp_path / "base", reserve_mib=0) as base:
        (base.path / "other").mkdir()
        before = fingerprint(tmp_path)
        with pytest.raises(ValueError, match="not the name of something"):
            base.remove(name.format(tmp=tmp_path))
        assert fingerprint(tmp_path) == before


# -- file ids (T9) ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _api(server: MockServer) -> Iterator[WorkerApi]:
    client = Client(server.url)
    client.auth = StaticToken("mock-token")
    yield WorkerApi(client, UrlPolicy(parse_origin(server.url)), wanted=Filter(), emit=Emitted())
    client.close()


@pytest.mark.fault("T9")
@pytest.mark.parametrize(
    "ref",
    ["", ".", "..", "../jobs/7/status", "a/../b", "a/.", "./a", "s3://b/../../x", "a\nb", "a\0", "\ud800", "x" * 5000],
)
def test_a_file_id_with_dot_segments_or_control_characters_is_refused(ref: str) -> None:
    with pytest.raises(ValueError, match="file id"):
        parse_file_ref(ref)


@pytest.mark.fault("T9")
def test_a_file_id_cannot_reach_another_endpoint_with_our_token(tmp_path: Path) -> None:
    names = (
        "x?status=finished",
        "x#y",
        "%2e%2e/%2e%2e/jobs/1/status?status=error",
        "x/url?y=",
        "..%2f..%2fjobs",
        "x;/a",
    )
    refs = [f"s3://mock-api/{name}" for name in names]
    with running_mock_api(tmp_path / "api") as server, _api(server) as source:
        server.submit(job_spec())
        claim = source.fetch(Offer(4.0, 4096), 0.0)
        assert isinstance(claim, Claim)
        before = [event for event in server.events() if event["kind"] != "sign_download"]
        for ref in refs:
            with contextlib.suppress(Exception):
                claim.lease.sign_input(parse_file_ref(ref))
        asked: list[Any] = [event["note"] for event in server.events("sign_download")]
        assert asked == refs  # each came whole, and to this endpoint
        assert [event for event in server.events() if event["kind"] != "sign_download"] == before
