"""What storage and network do to files on their way (FAULTS.md C, and B14), on real sockets; sleeps take no time."""

import base64
import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from jobfetcher.core.errors import JobFault, JobReason, Stopped, StopReason, WorkerFault, WorkerReason
from jobfetcher.core.halt import Halt
from jobfetcher.core.job import OutputKind
from jobfetcher.core.ports import Transfer
from jobfetcher.core.urls import Method, SignedRequest
from jobfetcher.staging import Progress, stage_out
from jobfetcher.testing.fake_source import FakeLease, FakeSource, Said
from jobfetcher.transfer.body import FileBody
from jobfetcher.transfer.cache import Cache
from jobfetcher.transfer.exchange import NetSettings
from jobfetcher.transfer.multi import TransferLoop
from jobfetcher.workspace import Workspace
from tests.support.file_server import Act, FileServer, Object
from tests.support.jobs import make_job
from tests.support.services import wait_until
from tests.support.side_by_side import when
from tests.support.transfers import Nap, Recorder, get, getting, open_files, produced, putting, sparse, transfer, wanted
from tests.support.worker import TESTS_WITH

CONTENT = hashlib.shake_128(b"an input").digest(3_000_000)
MD5 = hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()
EXPIRED = b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>"


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as running:
        running.objects["/in"] = Object(CONTENT)
        yield running


@pytest.fixture
def moving(nap: Nap, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Transfer]:
    """As a worker has it: with ranges, and with a cache where the tests run with everything on."""
    cache = made_cache(tmp_path_factory.mktemp("base")) if "cache_size" in TESTS_WITH else None
    with closing(transfer(rules=nap.rules, cache=cache)) as made:
        yield made


def made_cache(base: Path) -> Cache:
    return Cache(base / "cache", 2**30, lambda *_, **__: None, room_for=lambda _: None)


def fetch(moving: Transfer, server: FileServer, folder: Path, watch: Recorder | None = None) -> Recorder:
    """Fetch /in and check that it is whole and nothing lies beside it."""
    watch = watch or Recorder()
    moving.download([wanted(folder, "in", getting(server.url("/in")))], watch)
    assert (folder / "in.part").read_bytes() == CONTENT
    assert not (folder / "in.part.etag").exists()
    assert sum(watch.sizes) == len(CONTENT)
    return watch


def ranges(server: FileServer) -> list[str | None]:
    return [seen.header("range") for seen in server.requests("/in")]


def sent(server: FileServer) -> int:
    return sum(seen.sent for seen in server.requests("/in"))


# --- C1: a URL expires


@pytest.mark.fault("C1")
@pytest.mark.parametrize("status", [400, 403])
def test_an_expired_url_is_renewed_and_the_file_resumed(
    server: FileServer, moving: Transfer, nap: Nap, tmp_path: Path, status: int
) -> None:
    server.script("/in", Act(cut=1_000_000), Act(status=status, body=EXPIRED), Act(cut=500_000), Act(status=403))
    signed: list[str] = []

    def sign() -> SignedRequest:
        signed.append(server.url(f"/in?signature={len(signed)}"))
        return get(signed[-1])

    moving.download([wanted(tmp_path, "in", sign)], Recorder())
    assert (tmp_path / "in.part").read_bytes() == CONTENT
    assert [seen.target for seen in server.requests("/in")] == [f"/in?signature={number}" for number in (0, 0, 1, 1, 2)]
    assert sent(server) == len(CONTENT) + len(EXPIRED)
    assert nap.naps == []


@pytest.mark.fault("C1", "C18", "T22")
def test_a_url_that_is_refused_for_ten_minutes_is_the_end(
    server: FileServer, moving: Transfer, nap: Nap, tmp_path: Path
) -> None:
    body = b"<Error><Code>AccessDenied</Code><Message>no\x1b[31m\r\nway</Message></Error>" + b"x" * 200_000
    server.always = Act(status=403, body=body)
    with pytest.raises(JobFault, match=r"input in cannot be had: .*AccessDenied: no\\x1b\[31m\\x0d\\x0away") as caught:
        fetch(moving, server, tmp_path)
    assert caught.value.reason is JobReason.INPUT_MISSING
    assert len(str(caught.value)) < 400
    assert nap.naps == [1, 2, 4, 8, 16, 32, *[60] * 9]  # the first renewal at once
    assert len(server.seen) == 17


# --- C2: cut, reset, short


@pytest.mark.fault("C2")
def test_a_file_cut_at_random_places_arrives_whole_with_no_byte_twice(
    server: FileServer, moving: Transfer, tmp_path: Path
) -> None:
    rng = random.Random(2)  # noqa: S311  repeatable, not secret
    server.script("/in", *(Act(cut=rng.randrange(1, 140_000)) for _ in range(20)))
    fetch(moving, server, tmp_path)
    assert len(server.seen) == 21
    assert sent(server) == len(CONTENT)
    assert server.seen[-1].header("if-range") == f'"{MD5}"'


@pytest.mark.fault("C2")
def test_resets_are_survived(server: FileServer, moving: Transfer, tmp_path: Path) -> None:
    server.script("/in", *(Act(cut=cut, reset=True) for cut in (0, 1, 700_000, 900_000)), Act(drop_reply=True))
    fetch(moving, server, tmp_path)


@pytest.mark.fault("C2")
def test_three_fast_tries_then_back_off_up_to_a_minute(
    server: FileServer, moving: Transfer, nap: Nap, tmp_path: Path
) -> None:
    server.script("/in", *(Act(cut=100) for _ in range(12)))
    fetch(moving, server, tmp_path)
    assert nap.naps == [2, 4, 8, 16, 32, 60, 60, 60, 60]


@pytest.mark.fault("C2")
def test_a_storage_that_is_gone_for_longer_than_the_budget_is_the_workers_fault(nap: Nap, tmp_path: Path) -> None:
    with FileServer() as gone:
        url = gone.url("/in")
    with closing(transfer(rules=nap.rules)) as moving, pytest.raises(WorkerFault) as caught:
        moving.download([wanted(tmp_path, "in", getting(url))], Recorder())
    assert caught.value.reason is WorkerReason.STORAGE
    assert "input in could not be moved for 6.0 hours, given up: 127.0.0.1: " in str(caught.value)
    assert 6 * 3600 < nap.now - 1000 < 6 * 3600 + 120


@pytest.mark.fault("C2")
def test_a_server_that_trickles_does_not_renew_the_budget(server: FileServer, nap: Nap, tmp_path: Path) -> None:
    server.always = Act(cut=10)
    with closing(transfer(rules=nap.rules, download_budget_s=600)) as moving, pytest.raises(WorkerFault):
        fetch(moving, server, tmp_path)
    assert len(server.seen) < 25


@pytest.mark.fault("C2")
def test_without_length_only_a_checksum_or_chunks_tell_the_end(
    server: FileServer, moving: Transfer, tmp_path: Path
) -> None:
    server.script("/in", Act(no_length=True, cut=1_000_000))
    fetch(moving, server, tmp_path)  # the cut looks like an end; its MD5 says otherwise
    server.script("/in", Act(chunked=True, cut=1_000_000), Act(chunked=True))
    fetch(moving, server, tmp_path)
    server.seen.clear()
    server.objects["/in"] = Object(CONTENT, etag="")
    server.script("/in", Act(no_length=True), Act(chunked=True))
    fetch(moving, server, tmp_path)
    assert len(server.seen) == 2


@pytest.mark.fault("C2")
@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_later_means_later(server: FileServer, moving: Transfer, nap: Nap, tmp_path: Path, status: int) -> None:
    server.script("/in", Act(status=status), Act(status=status, headers={"Retry-After": "17"}))
    fetch(moving, server, tmp_path)
    assert nap.naps == [17]


@pytest.mark.fault("C2")
@pytest.mark.fault("T23")
@pytest.mark.parametrize(
    ("value", "naps"), [("1000000000", [600]), ("-5", []), ("soon", []), ("Fri, 31 Dec 9999 23:59:59 GMT", [])]
)
def test_retry_after_has_bounds(
    server: FileServer, moving: Transfer, nap: Nap, tmp_path: Path, value: str, naps: list[float]
) -> None:
    server.script("/in", Act(status=503, headers={"Retry-After": value}))
    fetch(moving, server, tmp_path)
    assert nap.naps == naps


# --- C3: damaged bytes


def _sum_headers(content: bytes) -> dict[str, dict[str, str]]:
    def b64(digest: bytes) -> str:
        return base64.b64encode(digest).decode()

    return {
        "sha256": {"x-amz-checksum-sha256": b64(hashlib.sha256(content).digest())},
        "sha1": {"x-amz-checksum-sha1": b64(hashlib.sha1(content, usedforsecurity=False).digest())},
        "crc32": {"x-amz-checksum-crc32": b64(zlib.crc32(content).to_bytes(4, "big"))},
        "content-md5": {"Content-MD5": b64(hashlib.md5(content, usedforsecurity=False).digest())},
    }


@pytest.mark.fault("C3")
@pytest.mark.parametrize("kind", ["etag", "sha256", "sha1", "crc32", "content-md5"])
def test_a_flipped_byte_is_found_and_fetched_again(
    server: FileServer, moving: Transfer, tmp_path: Path, kind: str
) -> None:
    if kind != "etag":
        server.objects["/in"] = Object(CONTENT, etag='"x"', headers=_sum_headers(CONTENT)[kind])
    server.script("/in", Act(flip=1_234_567), Act(flip=0))
    watch = fetch(moving, server, tmp_path)
    assert len(server.seen) == 3
    expected = "md5" if kind in {"etag", "content-md5"} else "sha256"
    assert watch.stored[0].digest == f"{expected}:{hashlib.new(expected, CONTENT).hexdigest()}"


@pytest.mark.fault("C3")
def test_a_flipped_byte_before_a_resume_is_found_too(server: FileServer, moving: Transfer, tmp_path: Path) -> None:
    server.script("/in", Act(cut=1_000_000, flip=500_000))
    fetch(moving, server, tmp_path)
    assert ranges(server) == [None, "bytes=1000000-", None]


@pytest.mark.fault("C3")
def test_an_input_that_is_always_damaged_is_corrupt(server: FileServer, moving: Transfer, tmp_path: Path) -> None:
    server.script("/in", *(Act(flip=place) for place in (10, 11, 10)))
    with pytest.raises(JobFault, match=f"arrived damaged 3 times: its md5 is .*, the storage says {MD5}") as caught:
        fetch(moving, server, tmp_path)
    assert caught.value.reason is JobReason.INPUT_CORRUPT
    assert len(server.seen) == 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault("C3")
@pytest.mark.parametrize(
    ("etag", "headers"),
    [
        (f'"{"0" * 32}"', {"x-amz-server-side-encryption": "aws:kms"}),
        (f'"{"0" * 32}"', {"x-amz-server-side-encryption-customer-algorithm": "AES256"}),
        (f'"{"0" * 32}-3"', {}),
        (f'W/"{"0" * 32}"', {}),
        (f'"{"0" * 32}"', {"x-amz-request-id": None}),  # not S3: an ETag of time and size
        ('"x"', {"x-amz-checksum-crc32": "AAAAAA==-2"}),
        ('"x"', {"x-amz-checksum-sha256": base64.b64encode(b"0" * 32).decode(), "x-amz-checksum-type": "COMPOSITE"}),
        ('"x"', {"x-amz-checksum-sha256": "not base64!"}),
    ],
)
def test_what_is_no_checksum_of_the_bytes_is_not_taken_for_one(
    server: FileServer, moving: Transfer, tmp_path: Path, etag: str, headers: dict[str, str | None]
) -> None:
    server.objects["/in"] = Object(CONTENT, etag=etag)
    server.script("/in", Act(headers=headers))
    watch = fetch(moving, server, tmp_path)
    assert len(server.seen) == 1
    assert watch.stored[0].digest == f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"


# --- C4, C5: another object, ranges that are not what was asked for


@pytest.mark.fault("C4")
def test_an_object_that_changed_is_fetched_anew(server: FileServer, moving: Transfer, tmp_path: Path) -> None:
    server.objects["/in"] = Object(b"y" * 2_000_000)
    server.script("/in", Act(cut=1_500_000))
    original = server.requests

    def swap() -> SignedRequest:
        return get(server.url("/in"))

    watch = Recorder()
    thread = threading.Thread(target=moving.download, args=([wanted(tmp_path, "in", swap)], watch))
    server.script("/in", Act(gate=(gate := threading.Event())))
    thread.start()
    while len(original("/in")) < 2:
        time.sleep(0.005)
    server.objects["/in"] = Object(CONTENT)
    gate.set()
    thread.join(20)
    assert (tmp_path / "in.part").read_bytes() == CONTENT
    assert ranges(server) == [None, "bytes=1500000-"]
    assert sum(watch.sizes) == len(CONTENT)


@pytest.mark.fault("C4")
@pytest.mark.fault("C5")
@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Range": "bytes 0-1999999/3000000"},
        {"Content-Range": "bytes 1000001-2999999/3000000"},
        {"Content-Range": "bytes 1000000-2999999/4000000"},
        {"Content-Range": "bytes 1000000-2999998/3000000"},
        {"Content-Range": "bytes 1000000-4999999/3000000"},
        {"Content-Range": "octets"},
        {"Content-Range": None},
        {"ETag": '"another"'},
        {"Content-Length": "5000000", "Content-Range": "bytes 1000000-5999999/*"},
        {"Content-Length": None, "Content-Range": "bytes 1000000-5999999/*"},
    ],
    ids=str,
)
def test_a_part_that_does_not_fit_is_discarded(
    server: FileServer, moving: Transfer, tmp_path: Path, headers: dict[str, str | None]
) -> None:
    server.script("/in", Act(cut=1_000_000), Act(headers=headers))
    fetch(moving, server, tmp_path)
    assert ranges(server) == [None, "bytes=1000000-", None]


@pytest.mark.fault("C5")
def test_a_server_that_sends_less_than_asked_is_asked_for_the_rest(
    server: FileServer, moving: Transfer, tmp_path: Path
) -> None:
    piece = CONTENT[1_000_000:1_500_000]
    server.script(
        "/in",
        Act(cut=1_000_000),
        Act(status=206, headers={"Content-Range": "bytes 1000000-1499999/3000000", "ETag": f'"{MD5}"'}, body=piece),
    )
    fetch(moving, server, tmp_path)
    assert ranges(server) == [None, "bytes=1000000-", "bytes=1500000-"]


@pytest.mark.fault("C4")
@pytest.mark.parametrize("etag", [f'W/"{MD5}"', "", "unquoted", '"with\x7fcontrol"', '"' + "x" * 300 + '"'])
def test_without_a_strong_etag_nothing_is_resumed(
    server: FileServer, moving: Transfer, tmp_path: Path, etag: str
) -> None:
    server.objects["/in"] = Object(CONTENT, etag=etag)
    server.script("/in", Act(cut=1_000_000))
    fetch(moving, server, tmp_path)
    assert ranges(server) == [None, None]


@pytest.mark.fault("C5")
def test_a_server_without_ranges_starts_over(server: FileServer, moving: Transfer, tmp_path: Path) -> None:
    server.script("/in", Act(cut=1_000_000), Act(ignore_range=True))
    fetch(moving, server, tmp_path)
    assert ranges(server) == [None, "bytes=1000000-"]


@pytest.mark.fault("C5")
def test_a_part_nobody_asked_for_is_discarded(server: FileServer, moving: Transfer, tmp_path: Path) -> None:
    server.script("/in", Act(status=206, headers={"Content-Range": "bytes 0-4/3000000"}, body=b"false"))
    fetch(moving, server, tmp_path)


def _killed(folder: Path, content: bytes, note: str | dict[str, object]) -> None:
    """What a worker that was killed leaves behind: by its note, if that is no text, all bytes are in order."""
    (folder / "in.part").write_bytes(content)
    known = note if isinstance(note, str) else json.dumps({"in_order": True, "have": []} | note)
    (folder / "in.part.etag").write_text(known)


@pytest.mark.fault("C5")
@pytest.mark.fault("A2")
def test_another_process_goes_on_where_one_was_killed(server: FileServer, nap: Nap, tmp_path: Path) -> None:
    gate = threading.Event()
    server.script("/in", Act(cut=2_000_000), Act(gate=gate))
    watch = Recorder()
    with closing(transfer(rules=nap.rules)) as first:
        thread = threading.Thread(target=_ignore_stop, args=(lambda: fetch(first, server, tmp_path, watch),))
        thread.start()
        while len(server.seen) < 2:
            time.sleep(0.005)
        watch.halt.set(StopReason.SHUTDOWN)
        thread.join(10)
    assert (tmp_path / "in.part").stat().st_size == 2_000_000
    again = Recorder()
    with closing(transfer(rules=nap.rules)) as second:
        second.download([wanted(tmp_path, "in", getting(server.url("/in")))], again)
    assert (tmp_path / "in.part").read_bytes() == CONTENT
    assert server.seen[-1].header("range") == "bytes=2000000-"
    assert sum(again.sizes) == again.expected == 1_000_000
    assert again.stored[0].digest == f"md5:{MD5}"


def _ignore_stop(work: Callable[[], object]) -> None:
    with pytest.raises(Stopped):
        work()


@pytest.mark.fault("C5")
def test_a_part_that_is_whole_already_is_verified_and_done(
    server: FileServer, moving: Transfer, tmp_path: Path
) -> None:
    _killed(tmp_path, CONTENT, {"etag": f'"{MD5}"', "size": len(CONTENT), "sums": {"md5": MD5}})
    watch = Recorder()
    moving.download([wanted(tmp_path, "in", getting(server.url("/in")))], watch)
    assert watch.stored[0].digest == f"md5:{MD5}"
    assert sent(server) == 0


@pytest.mark.fault("C5")
@pytest.mark.fault("C3")
def test_a_part_that_rotted_on_disk_is_fetched_again(server: FileServer, moving: Transfer, tmp_path: Path) -> None:
    _killed(tmp_path, b"x" + CONTENT[1:2_000_000], {"etag": f'"{MD5}"', "size": len(CONTENT), "sums": {"md5": MD5}})
    moving.download([wanted(tmp_path, "in", getting(server.url("/in")))], Recorder())
    assert (tmp_path / "in.part").read_bytes() == CONTENT
    assert ranges(server) == ["bytes=2000000-", None]


@pytest.mark.fault("C5")
@pytest.mark.parametrize(
    "note",
    [
        "",
        "garbage",
        "[]",
        {"etag": ""},
        {"etag": 'no"quotes'},
        {"etag": '"x"\r\nEvil: 1'},
        {"etag": '"x"', "size": 10},
        {"etag": '"x"', "size": 3_000_000, "sums": {"shake_128": "00"}},
        {"etag": '"x"', "size": 3_000_000, "in_order": None},
        {"etag": '"x"', "size": 3_000_000, "in_order": False},
        '{"etag": "\\"x\\"", "size": 3000000}',
    ],
    ids=str,
)
def test_a_part_whose_note_cannot_be_believed_is_started_over(
    server: FileServer, moving: Transfer, tmp_path: Path, note: str | dict[str, object]
) -> None:
    _killed(tmp_path, b"z" * 1000, note)
    fetch(moving, server, tmp_path)
    assert ranges(server) == [None]


@pytest.mark.fault("C5")
def test_a_part_without_a_note_is_started_over(server: FileServer, moving: Transfer, tmp_path: Path) -> None:
    (tmp_path / "in.part").write_bytes(CONTENT[:1000])
    fetch(moving, server, tmp_path)
    assert ranges(server) == [None]


@pytest.mark.fault("C5")
def test_a_useless_416_starts_over(server: FileServer, moving: Transfer, tmp_path: Path) -> None:
    server.script("/in", Act(cut=1_000_000), Act(status=416, headers={"Content-Range": "bytes */77"}))
    fetch(moving, server, tmp_path)
    assert ranges(server) == [None, "bytes=1000000-", None]


# --- inputs that an earlier job had


@pytest.fixture
def kept(server: FileServer, nap: Nap, tmp_path: Path) -> Iterator[tuple[Transfer, Path]]:
    """A transfer with a cache that holds /in, and the cache's directory."""
    (first := tmp_path / "first").mkdir()
    with closing(transfer(rules=nap.rules, cache=made_cache(tmp_path))) as made:
        made.download([wanted(first, "in", getting(server.url("/in")))], Recorder())
        server.seen.clear()
        yield made, tmp_path / "cache"


def _again(made: Transfer, server: FileServer, folder: Path) -> Recorder:
    (second := folder / "second").mkdir()
    watch = Recorder()
    made.download([wanted(second, "in", getting(server.url("/in")))], watch)
    assert (second / "in.part").read_bytes() == CONTENT
    assert watch.stored[0].digest == f"md5:{MD5}"
    return watch


def test_an_input_that_is_kept_is_asked_about_and_not_moved(
    server: FileServer, kept: tuple[Transfer, Path], tmp_path: Path
) -> None:
    server.script("/in", Act(status=503), Act(status=304, headers={"ETag": f'"{MD5}"'}))
    watch = _again(kept[0], server, tmp_path)
    assert [seen.header("if-none-match") for seen in server.seen] == [f'"{MD5}"'] * 2
    assert (sent(server), watch.stored[0].etag) == (0, f'"{MD5}"')
    assert sum(watch.sizes) == watch.expected == len(CONTENT)  # not over the wire, but it takes room all the same


def test_a_kept_input_that_is_damaged_is_fetched(
    server: FileServer, kept: tuple[Transfer, Path], tmp_path: Path
) -> None:
    (entry,) = kept[1].iterdir()
    with entry.open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"rot")
    server.script("/in", Act(status=304, headers={"ETag": f'"{MD5}"'}))
    watch = _again(kept[0], server, tmp_path)
    assert sum(watch.sizes) == watch.expected == len(CONTENT)
    assert [seen.header("if-none-match") for seen in server.seen] == [f'"{MD5}"', None]


@pytest.mark.parametrize("cached", [False, True], ids=["not asked for", "of another object"])
def test_a_304_that_means_nothing_is_not_believed(
    server: FileServer, kept: tuple[Transfer, Path], tmp_path: Path, nap: Nap, cached: bool
) -> None:
    server.script("/in", Act(status=304, headers={"ETag": '"other"'}))
    with closing(transfer(rules=nap.rules)) as without:
        _again(kept[0] if cached else without, server, tmp_path)
    assert len(server.seen) == 2


# --- C7: missing, refused


@pytest.mark.fault("C7")
@pytest.mark.parametrize(
    "act", [Act(status=404), Act(status=410), Act(status=400, body=b"<Error><Code>NoSuchKey</Code></Error>")]
)
def test_a_missing_object_is_named_at_once(server: FileServer, moving: Transfer, tmp_path: Path, act: Act) -> None:
    server.script("/in", act)
    with pytest.raises(JobFault, match="input in not found in storage") as caught:
        fetch(moving, server, tmp_path)
    assert caught.value.reason is JobReason.INPUT_MISSING
    assert len(server.seen) == 1


@pytest.mark.fault("C7")
def test_another_refusal_of_the_store_is_waited_for_as_long(
    server: FileServer, moving: Transfer, nap: Nap, tmp_path: Path
) -> None:
    server.script("/in", Act(status=400))
    fetch(moving, server, tmp_path)
    server.always = Act(status=405, body=b"<Error><Code>MethodNotAllowed</Code></Error>")
    with pytest.raises(JobFault, match="HTTP 405"):
        fetch(moving, server, tmp_path)
    assert 600 < nap.now - 1000 < 700


# --- B14: slow


@pytest.mark.fault("B14")
@pytest.mark.parametrize("act", [Act(stall_headers=True), Act(stall_body=True)], ids=["headers", "body"])
def test_a_server_that_falls_silent_is_left(server: FileServer, tmp_path: Path, act: Act) -> None:
    server.script("/in", act)
    began = time.monotonic()
    with closing(transfer(net=NetSettings(slow_for_s=1))) as moving:
        fetch(moving, server, tmp_path)
    assert 1 <= time.monotonic() - began < 6
    assert len(server.seen) == 2


@pytest.mark.fault("B14")
def test_an_upload_that_gets_no_answer_is_sent_again(server: FileServer, tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"out")
    server.script("/out", Act(stall_headers=True))
    with closing(transfer(net=NetSettings(slow_for_s=1))) as moving:
        moving.upload([produced(path, putting(server.url("/out")))], Recorder())
    assert len(server.seen) == 2


@pytest.mark.fault("B14")
def test_a_connection_that_nobody_accepts_is_given_up(tmp_path: Path, nap: Nap) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as deaf, socket.socket() as filler:
        filler.setblocking(False)
        filler.connect_ex(deaf.getsockname())  # fills the queue of one
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}/in"
        began = time.monotonic()
        made = transfer(net=NetSettings(connect_timeout_s=0.2, slow_for_s=1), rules=nap.rules, download_budget_s=1)
        with closing(made) as moving, pytest.raises(WorkerFault) as caught:
            moving.download([wanted(tmp_path, "in", getting(url))], Recorder())
    assert caught.value.reason is WorkerReason.STORAGE
    assert time.monotonic() - began < 30


# --- disk


@pytest.mark.fault("D2")
def test_an_input_larger_than_the_disk_is_refused_before_a_byte_is_written(
    server: FileServer, moving: Transfer, tmp_path: Path
) -> None:
    server.script("/in", Act(status=200, headers={"Content-Length": str(10**17)}))
    with pytest.raises(WorkerFault, match=r"input in needs .* MiB more, the disk of the job directory has") as caught:
        fetch(moving, server, tmp_path)
    assert caught.value.reason is WorkerReason.DISK
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault("D2")
@pytest.mark.fault("D6")
def test_a_write_that_fails_is_the_disks_fault(
    server: FileServer, moving: Transfer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, several = os.pwrite, os.pwritev

    def full(fd: int, data: bytes, offset: int) -> int:
        if offset > 1_000_000:
            raise OSError(28, "No space left on device")
        return one(fd, data, offset)

    def full_too(fd: int, data: list[bytes], offset: int) -> int:
        if offset > 1_000_000:
            raise OSError(28, "No space left on device")
        return several(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    monkeypatch.setattr(os, "pwritev", full_too)
    with pytest.raises(WorkerFault, match="input in could not be written: No space left on device") as caught:
        fetch(moving, server, tmp_path)
    assert caught.value.reason is WorkerReason.DISK
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fault("D6")
def test_a_part_that_is_a_link_or_a_pipe_is_not_written_through(
    server: FileServer, moving: Transfer, tmp_path: Path
) -> None:
    (victim := tmp_path / "victim").write_bytes(b"mine")
    (tmp_path / "in.part").symlink_to(victim)
    with pytest.raises(WorkerFault):
        fetch(moving, server, tmp_path)
    assert victim.read_bytes() == b"mine"
    (tmp_path / "in.part").unlink(missing_ok=True)
    os.mkfifo(tmp_path / "in.part")
    with pytest.raises(WorkerFault, match="not a regular file"):
        fetch(moving, server, tmp_path)


# --- uploads: C8 to C11, C13, C14


@pytest.fixture
def out(tmp_path: Path) -> Path:
    path = tmp_path / "out"
    path.write_bytes(CONTENT)
    return path


def form(server: FileServer) -> Callable[[bool], SignedRequest]:
    return lambda _: SignedRequest(Method.POST, server.url("/up"), fields=(("key", "a/${filename}"), ("policy", "p")))


@pytest.mark.fault("C8")
@pytest.mark.fault("C9")
@pytest.mark.parametrize("method", ["put", "post"])
@pytest.mark.parametrize(
    "act",
    [
        Act(cut_upload=1_500_000),
        Act(drop_reply=True),
        Act(status=500),
        Act(status=503, body=b"<Error><Code>SlowDown</Code></Error>"),
        Act(status=400, body=b"<Error><Code>RequestTimeout</Code></Error>"),
        Act(status=202),
        Act(headers={"ETag": f'"{"0" * 32}"'}),
    ],
    ids=["reset", "reply lost", "500", "slow down", "stalled", "not stored", "damaged"],
)
def test_an_upload_that_fails_is_sent_again_whole(
    server: FileServer, moving: Transfer, out: Path, method: str, act: Act
) -> None:
    path, sign = ("/out", putting(server.url("/out"))) if method == "put" else ("/up", form(server))
    server.script(path, act, act)
    watch = Recorder()
    moving.upload([produced(out, sign)], watch)
    assert server.objects["/out" if method == "put" else "/up/out"].content == CONTENT
    assert len(server.seen) == 3
    assert watch.stored[0].digest == f"md5:{MD5}"
    assert sum(watch.sizes) in {len(CONTENT), 3 * len(CONTENT)}  # a damaged copy did go over the wire


def _signed(server: FileServer, how: str) -> Callable[[bool], SignedRequest]:
    """A request for an output, signed for S3 in one of its ways, or `plain`: S3 may answer all the same."""
    url = server.url("/out" if how != "form" else "/up")
    requests = {
        "plain": SignedRequest(Method.PUT, url),
        "query": SignedRequest(Method.PUT, f"{url}?a=b&X-Amz-Signature=0"),
        "query of version 2": SignedRequest(Method.PUT, f"{url}?AWSAccessKeyId=0&Signature=0"),
        "header": SignedRequest(Method.PUT, url, (("x-amz-meta-a", "b"),)),
        "form": SignedRequest(Method.POST, url, fields=(("key", "${filename}"), ("X-Amz-Signature", "0"))),
    }
    return lambda _: requests[how]


_SIGNED = ["plain", "query", "query of version 2", "header", "form"]


@pytest.mark.fault("C9")
@pytest.mark.parametrize("size", [len(CONTENT), 4096, 0])
@pytest.mark.parametrize("how", _SIGNED)
def test_an_upload_that_always_arrives_damaged_is_the_workers_fault(
    server: FileServer, moving: Transfer, out: Path, how: str, size: int
) -> None:
    os.truncate(out, size)
    server.always = Act(headers={"ETag": f'"{"0" * 32}"'})
    with pytest.raises(WorkerFault, match="output out arrived damaged 3 times") as caught:
        moving.upload([produced(out, _signed(server, how))], Recorder())
    assert caught.value.reason is WorkerReason.STORAGE
    assert len(server.seen) == 3


@pytest.mark.fault("C9")
@pytest.mark.parametrize(
    "headers",
    [{"x-amz-server-side-encryption": "aws:kms"}, {"x-amz-request-id": None}, {"ETag": '"abc-2"'}, {"ETag": None}],
)
def test_an_etag_that_is_no_md5_is_not_compared(
    server: FileServer, moving: Transfer, out: Path, headers: dict[str, str | None]
) -> None:
    server.script("/out", Act(headers={"ETag": f'"{"0" * 32}"', **headers}))
    moving.upload([produced(out, putting(server.url("/out")))], Recorder())
    assert len(server.seen) == 1


@pytest.mark.fault("C9")
@pytest.mark.parametrize("how", _SIGNED)
def test_an_output_is_hashed_where_s3_is_spoken(server: FileServer, moving: Transfer, out: Path, how: str) -> None:
    server.always = Act(headers={"x-amz-request-id": None})  # no S3 answers, so nothing is compared
    watch = Recorder()
    moving.upload([produced(out, _signed(server, how))], watch)
    assert watch.stored[0].digest == ("" if how == "plain" else f"md5:{MD5}")


@pytest.mark.fault("C8")
def test_one_output_that_cannot_be_stored_does_not_hold_up_the_others(
    server: FileServer, nap: Nap, tmp_path: Path
) -> None:
    server.scripts["/put/3"].extend(Act(status=503) for _ in range(1000))
    for number in range(30):
        (tmp_path / str(number)).write_bytes(b"x" * number)
    watch = Recorder()
    with (
        closing(transfer(rules=nap.rules, upload_budget_s=900)) as moving,
        pytest.raises(WorkerFault, match="output 3"),
    ):
        moving.upload(
            (produced(tmp_path / str(number), putting(server.url(f"/put/{number}"))) for number in range(30)), watch
        )
    assert watch.names == {str(number) for number in range(30)} - {"3"}


@pytest.mark.fault("C10")
def test_an_expired_form_is_renewed(server: FileServer, moving: Transfer, out: Path) -> None:
    body = b"<Error><Code>AccessDenied</Code><Message>Invalid according to Policy: Policy expired.</Message></Error>"
    server.script("/up", Act(status=403, body=body), Act(status=400, body=body))
    renewed: list[bool] = []

    def sign(renew: bool) -> SignedRequest:
        renewed.append(renew)
        return form(server)(renew)

    moving.upload([produced(out, sign)], Recorder())
    assert renewed == [False, True, True]
    assert server.objects["/up/out"].content == CONTENT


@pytest.mark.fault("C10")
def test_a_wrong_clock_is_named(server: FileServer, nap: Nap, out: Path) -> None:
    server.always = Act(
        status=403,
        headers={"Date": "Tue, 01 Jan 2019 00:00:00 GMT"},
        body=b"<Error><Code>RequestTimeTooSkewed</Code><Message>too large</Message></Error>",
    )
    hint = r"check the clock of this machine: it is \d+ s ahead of the storage's"
    watch = Recorder()
    with closing(transfer(rules=nap.rules, upload_budget_s=900)) as moving, pytest.raises(WorkerFault, match=hint):
        moving.upload([produced(out, putting(server.url("/out")))], watch)
    assert [bool(re.search(hint, why)) for _, why, _ in watch.retries] == [True]  # and long before, while it waits


@pytest.mark.fault("C11")
def test_a_store_that_finds_a_file_too_large_is_believed(server: FileServer, moving: Transfer, out: Path) -> None:
    server.script("/out", Act(status=400, body=b"<Error><Code>EntityTooLarge</Code></Error>"))
    with pytest.raises(JobFault, match=r"output out is 0\.01 GB, the storage refuses it with HTTP 400") as caught:
        moving.upload([produced(out, putting(server.url("/out")))], Recorder())
    assert caught.value.reason is JobReason.OUTPUT_TOO_LARGE


@pytest.mark.fault("C11")
def test_a_file_of_more_than_5_gib_is_not_even_signed_for(moving: Transfer, tmp_path: Path) -> None:
    def sign(_: bool) -> SignedRequest:
        raise AssertionError("signed")

    big = sparse(tmp_path / "big", 5 * 2**30 + 1)
    with pytest.raises(JobFault, match=r"output big is 5\.01 GB, the store takes at most 5 GB per file"):
        moving.upload([produced(big, sign)], Recorder())


@pytest.mark.fault("C13")
def test_a_form_has_its_fields_first_its_file_last_and_a_true_length(
    server: FileServer, moving: Transfer, tmp_path: Path
) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"content\r\n--x\r\n")
    item = produced(
        path,
        lambda _: SignedRequest(
            Method.POST,
            server.url("/up"),
            headers=(("content-type", "text/evil"), ("x-amz-meta-a", "b"), ("x-amz-meta-empty", "")),
            fields=(("key", "a/${filename}"), ('we"ird\r\nname', "väl\r\nue"), ("policy", "cG9s")),
        ),
    )
    item = type(item)(item.name, 'na"me\r\nX: ü.txt', item.size, item.mtime_ns, item.open, item.sign)
    moving.upload([item], Recorder())
    (seen,) = server.seen
    disposition = "form-data; name="
    assert seen.form() == [
        # spelt out: the store would put the escaped name into the object's key
        (f'{disposition}"key"', "", 'a/na"me\r\nX: ü.txt'.encode()),
        (f'{disposition}"we\\"ird%0D%0Aname"', "", "väl\r\nue".encode()),
        (f'{disposition}"policy"', "", b"cG9s"),
        (f'{disposition}"file"; filename="na\\"me%0D%0AX: ü.txt"', "application/octet-stream", b"content\r\n--x\r\n"),
    ]
    assert seen.header("content-length") == str(len(seen.body))
    assert seen.header("transfer-encoding") is None
    assert seen.header("expect") is None
    assert seen.header("x-amz-meta-a") == "b"
    assert seen.header("x-amz-meta-empty") == ""
    assert [value for name, value in seen.headers if name.lower() == "content-type"] == [seen.header("content-type")]


@pytest.mark.fault("C14")
@pytest.mark.parametrize("change", ["touch", "grow", "shrink"])
def test_an_output_that_changes_while_it_is_sent_is_not_taken_for_stored(
    server: FileServer, moving: Transfer, out: Path, change: str
) -> None:
    gate = threading.Event()
    server.scripts["/out"].append(Act(gate=gate))

    def act() -> None:
        match change:
            case "touch":
                os.utime(out, ns=(1, 1))
            case "grow":
                with out.open("ab") as file:
                    file.write(b"more")
            case _:
                os.truncate(out, 1000)
        gate.set()

    watch = Recorder()
    with when(lambda: server.busy == 1, act), pytest.raises(JobFault, match="output out changed while it was sent"):
        moving.upload([produced(out, putting(server.url("/out")))], watch)
    assert watch.stored == []


def open_below(folder: Path) -> list[str]:
    """What this process has open below `folder`."""
    opened = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed by now
            opened.append(os.readlink(f"/proc/self/fd/{number}"))
    return [path for path in opened if path.startswith(str(folder))]


class Sending:
    """One job's outputs on their way from its directory: `out/other` and `out/deep/result`, and a log of the worker's.

    `act` is called when the file `at` is signed, which is after the walk has found it and before it is opened.
    """

    def __init__(self, folder: Path, server: FileServer, moving: Transfer) -> None:
        self.halt, self.marks = Halt(), list[str]()
        self.at = "result"
        self.act: Callable[[], None] = lambda: None
        self._server, self._moving = server, moving
        self.workspace = Workspace(folder / "job")
        self.workspace.create()
        self.result = self.workspace.files / "out" / "deep" / "result"
        self.result.parent.mkdir(parents=True)
        (self.workspace.files / "out" / "other").write_bytes(b"other")
        self.result.write_bytes(b"result")
        (self.workspace.logs / "own.log").write_bytes(b"log")

    def run(self) -> None:
        sending = self

        class Lease(FakeLease):
            def sign_output(self, kind: OutputKind, folder: str, name: str, *, renew: bool = False) -> SignedRequest:
                if name == sending.at:
                    sending.act()
                return super().sign_output(kind, folder, name, renew=renew)

        job = make_job(outputs={"output": "out"})
        stage_out(
            job,
            Lease(FakeSource(self._server.url("")), "t", job.id, Said()),
            self.workspace,
            self._moving,
            halt=self.halt,
            have={},
            mark=lambda stored: self.marks.append(stored.name),
            progress=Progress(),
        )

    @property
    def stored(self) -> set[str]:
        return {path.rpartition("/")[2] for path in self._server.objects if path != "/in"}


@pytest.fixture
def sending(server: FileServer, moving: Transfer, tmp_path: Path) -> Sending:
    return Sending(tmp_path, server, moving)


@pytest.mark.fault("C14")
@pytest.mark.parametrize("change", ["grown", "touched", "link", "folder", "FIFO", "folder of a link"])
def test_an_output_that_changed_after_the_walk_is_the_jobs_own_doing(sending: Sending, change: str) -> None:
    """The rest is sent all the same."""
    path = sending.result

    def act() -> None:
        match change:
            case "grown":
                path.write_bytes(b"result and more")
            case "touched":
                os.utime(path, ns=(1, 1))
            case "folder of a link":
                path.parent.rename(path.parent.parent / "elsewhere")
                path.parent.symlink_to("elsewhere")
            case _:
                path.unlink()
        match change:
            case "link":
                path.symlink_to("../other")
            case "folder":
                path.mkdir()
            case "FIFO":
                os.mkfifo(path)

    sending.act = act
    with pytest.raises(JobFault, match="output output:out/deep/result changed before it was sent") as caught:
        sending.run()
    assert caught.value.reason is JobReason.BAD_OUTPUT
    assert set(sending.marks) == {"output:out/other", "log:jobfetcher/own.log"}
    assert sending.stored == {"other", "own.log"}


@pytest.mark.parametrize("gone", ["files/out/deep/result", "files/out/deep", "files", ".", "logs/own.log"])
def test_an_output_that_is_gone_after_the_walk_is_the_machines_fault(sending: Sending, gone: str) -> None:
    """No job is left that could have deleted it; a person may have."""
    path = sending.workspace.path / gone
    sending.at = "own.log" if gone == "logs/own.log" else "result"
    sending.act = path.unlink if path.is_file() else partial(shutil.rmtree, path)
    with pytest.raises(WorkerFault) as caught:
        sending.run()
    assert caught.value.reason is WorkerReason.DISK
    assert "No such file" in str(caught.value)


def test_to_stop_waits_for_no_file_that_hangs_as_it_is_opened(
    sending: Sending, monkeypatch: pytest.MonkeyPatch
) -> None:
    opens, goes_on, came_back = os.open, threading.Event(), threading.Event()

    def hang(path: str, flags: int, *args: int, dir_fd: int | None = None) -> int:
        if path == "result":
            sending.halt.set(StopReason.SHUTDOWN)
            goes_on.wait(60)
            came_back.set()
        return opens(path, flags, *args, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", hang)
    try:
        with pytest.raises(Stopped):
            sending.run()
        assert not came_back.is_set()
    finally:
        goes_on.set()
    wait_until(lambda: not open_below(sending.workspace.path), "the file and its folder are closed")


@pytest.mark.fault("C14")
def test_an_output_that_shrinks_before_it_is_read_ends_its_sending(out: Path) -> None:
    with ThreadPoolExecutor(1) as pool, closing(sent_body(out, pool, head=b"head", tail=b"tail")) as body:
        body.open()
        assert body.read(14) == b"head" + CONTENT[:10]
        os.truncate(out, 10)
        with pytest.raises(JobFault, match="output out changed while it was sent"):
            body.read(100)


@pytest.mark.parametrize("size", [1, 7, 100_000])
@pytest.mark.parametrize(("head", "tail"), [(b"head", b"tail"), (b"", b"tail"), (b"head", b""), (b"", b"")])
def test_a_body_is_head_file_and_tail_however_it_is_read(out: Path, size: int, head: bytes, tail: bytes) -> None:
    whole = head + CONTENT[:1000] + tail
    os.truncate(out, 1000)
    moved: list[int] = []
    with ThreadPoolExecutor(1) as pool, closing(sent_body(out, pool, moved.append, head=head, tail=tail)) as body:
        for _ in range(2):
            assert body.length == len(whole)
            body.open()
            pieces = list(iter(lambda: body.read(size), b""))
            assert b"".join(pieces) == whole
            assert max(map(len, pieces)) <= size
            assert len(pieces) == -(-len(whole) // size)
            assert body.complete
            assert sum(moved) == 1000
            body.rewind()
            assert sum(moved) == 0


def sent_body(
    path: Path, pool: ThreadPoolExecutor, moved: Callable[[int], None] = lambda _: None, *, head: bytes, tail: bytes
) -> FileBody:
    item = produced(path, lambda _: SignedRequest(Method.PUT, ""))
    return FileBody(item, moved, lambda: pool, head, tail, hashes=False)


@pytest.mark.fault("C15")
def test_odd_names_and_empty_files_arrive(server: FileServer, moving: Transfer, tmp_path: Path) -> None:
    names = ["-rf", "é", "é", "a b", "%41", "x" * 255, "#?&=", "\u202egnp.exe"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    moving.upload((produced(tmp_path / name, form(server)) for name in names), Recorder())
    assert {path for path in server.objects if path.startswith("/up/")} == {f"/up/{name}" for name in names}
    assert all(seen.form()[-1][2] == b"" for seen in server.seen)


# --- many, large, and the loop itself


@pytest.mark.fault("C12")
def test_many_small_files_share_a_few_connections(server: FileServer, tmp_path: Path) -> None:
    with closing(transfer(concurrency=32, max_host_connections=8)) as moving:
        for number in range(300):
            (tmp_path / str(number)).write_bytes(f"{number}".encode() * 25)
        watch = Recorder()
        moving.upload(
            (produced(tmp_path / str(number), putting(server.url(f"/put/{number}"))) for number in range(300)), watch
        )
        moving.download(
            (wanted(tmp_path, f"{number}", getting(server.url(f"/put/{number}"))) for number in range(300)), watch
        )
    assert len(watch.stored) == 600
    for number in range(300):
        assert (tmp_path / f"{number}.part").read_bytes() == f"{number}".encode() * 25
    assert server.connections <= 8
    assert 1 < server.busiest <= 8


def test_a_dead_kept_alive_connection_costs_nothing(server: FileServer, moving: Transfer, tmp_path: Path) -> None:
    fetch(moving, server, tmp_path)
    server.script("/in", Act(no_length=True))  # the server closes after this one
    fetch(moving, server, tmp_path)
    fetch(moving, server, tmp_path)
    assert len(server.seen) == 3


def _resident() -> int:
    """Memory of this process, in bytes (proc(5), statm: the second number is resident pages)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class _Peak:
    """The most memory that was seen, looked at each time progress is told."""

    def __init__(self) -> None:
        self.watch = Recorder()
        self.before, self.most = _resident(), 0
        self.halt = self.watch.halt

    def expect(self, size: int) -> None:
        self.watch.expect(size)

    def moved(self, size: int) -> None:
        self.most = max(self.most, _resident() - self.before)
        self.watch.moved(size)

    def done(self, item: object, stored: object) -> None:
        self.moved(0)

    def retrying(self, item: object, why: str, for_s: float | None) -> None: ...

    def recovered(self, item: object) -> None: ...

    def noticed(self, item: object, what: str) -> None: ...

    @property
    def growth_mib(self) -> float:
        return self.most / 2**20


@pytest.mark.slow
@pytest.mark.fault("C13")
@pytest.mark.parametrize("how", ["get", "put", "post"])
def test_memory_does_not_grow_with_the_file(server: FileServer, moving: Transfer, tmp_path: Path, how: str) -> None:
    size = 512 * 2**20
    fetch(moving, server, tmp_path)  # what is allocated once is allocated
    peak = _Peak()
    if how == "get":
        server.objects["/big"] = Object(zeros=size, etag='"big"')
        moving.download([wanted(tmp_path, "big", getting(server.url("/big")))], peak)
        assert (tmp_path / "big.part").stat().st_size == size
        (tmp_path / "big.part").unlink()
    else:
        sign = putting(server.url("/big")) if how == "put" else form(server)
        moving.upload([produced(sparse(tmp_path / "big", size), sign)], peak)
        assert size <= server.seen[-1].body_size < size + 2000
    assert sum(peak.watch.sizes) == size
    assert peak.growth_mib < 32


def test_an_idle_loop_sleeps(server: FileServer, moving: Transfer, tmp_path: Path) -> None:
    fetch(moving, server, tmp_path)
    gate = threading.Event()
    server.script("/in", Act(gate=gate))
    timer = threading.Timer(1.0, gate.set)
    timer.start()
    began = time.process_time()
    moving.download([wanted(tmp_path, "again", getting(server.url("/in")))], Recorder())
    timer.join()
    assert time.process_time() - began < 0.3


def test_progress_is_told_a_few_times_a_second(server: FileServer, moving: Transfer, tmp_path: Path) -> None:
    server.objects["/big"] = Object(zeros=100 * 2**20, etag='"big"')
    watch = Recorder()
    began = time.monotonic()
    moving.download([wanted(tmp_path, "big", getting(server.url("/big")))], watch)
    assert len(watch.sizes) <= (time.monotonic() - began) * 10 + 2


def test_close_ends_the_thread_and_leaves_nothing_open(server: FileServer, tmp_path: Path) -> None:
    before = open_files()
    moving = transfer()
    assert _loops() == []
    fetch(moving, server, tmp_path)
    assert len(_loops()) == 1
    moving.close()
    moving.close()
    assert _loops() == []
    deadline = time.monotonic() + 5
    while open_files() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert open_files() <= before


def _loops() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "transfer"]


def test_a_hanging_signature_does_not_hold_up_a_halt(server: FileServer, moving: Transfer, tmp_path: Path) -> None:
    release, watch = threading.Event(), Recorder()

    def sign() -> SignedRequest:
        release.wait(20)
        return get(server.url("/in"))

    timer = threading.Timer(0.2, watch.halt.set, [StopReason.CANCELLED])
    timer.start()
    began = time.monotonic()
    with pytest.raises(Stopped):
        moving.download([wanted(tmp_path, "in", sign)], watch)
    assert time.monotonic() - began < 10
    release.set()
    assert server.seen == []


def test_what_waits_for_a_connection_is_not_timed_out(server: FileServer, tmp_path: Path) -> None:
    gate = threading.Event()
    server.script("/in", Act(gate=gate))
    timer = threading.Timer(2.5, gate.set)
    timer.start()
    net = NetSettings(connect_timeout_s=1.0, slow_for_s=10)
    with closing(transfer(net=net, max_host_connections=1)) as moving:
        moving.download(
            (wanted(tmp_path, name, getting(server.url("/in"))) for name in ("first", "second")), watch := Recorder()
        )
    timer.join()
    assert watch.names == {"first", "second"}
    assert len(server.seen) == 2


def test_a_loop_that_dies_fails_what_it_ran_and_comes_back(
    server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("planted")

    answer = TransferLoop._answer
    monkeypatch.setattr(TransferLoop, "_answer", broken)
    heard: list[object] = []
    monkeypatch.setattr(threading, "excepthook", heard.append)
    with closing(transfer(download_budget_s=-1)) as moving:
        with pytest.raises(WorkerFault, match="the transfer loop failed: RuntimeError"):
            fetch(moving, server, tmp_path)
        assert len(heard) == 1
        monkeypatch.setattr(TransferLoop, "_answer", answer)
        fetch(moving, server, tmp_path)
