"""What stands between this machine and its storage, and stores that differ from the book (FAULTS.md C16 to C22).

On real sockets; sleeps take no time.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from jobfetcher.core.errors import (
    JobFault,
    JobReason,
    SourceUnavailable,
    Stopped,
    StopReason,
    WorkerFault,
    WorkerReason,
)
from jobfetcher.core.job import JobId
from jobfetcher.core.ports import Transfer
from jobfetcher.core.urls import Method, SignedRequest, UrlPolicy, parse_origin
from jobfetcher.reporting import Troubles
from jobfetcher.transfer.exchange import NetSettings
from jobfetcher.transfer.patience import Rules
from tests.support.file_server import Act, FileServer, Object
from tests.support.transfers import LOCAL, Authority, Nap, Recorder, get, produced, transfer, wanted

CONTENT = hashlib.shake_128(b"an input").digest(300_000)
MD5 = hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()

LOGIN = b"<!DOCTYPE html><html><title>Sign in</title></html>"
ERROR = b'<?xml version="1.0"?>\n<Error><Code>InternalError</Code><Message>We failed</Message></Error>'
DENIED = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
NO_IDS: dict[str, str | None] = {"ETag": None, "x-amz-request-id": None}


def page(status: int = 200, body: bytes = LOGIN, kind: str | None = "text/html; charset=utf-8") -> Act:
    return Act(status=status, body=body, headers={} if kind is None else {"Content-Type": kind})


#: Answers of somebody who is no store, to a request that was signed for S3.
NO_STORES = {
    "a page": page(),
    "a page that says no type": page(kind=None),
    "a page in capitals after a mark and a blank": page(body=b"\xef\xbb\xbf\n <HTML>", kind="text/plain"),
    "an error document": page(body=ERROR, kind="application/xml"),
    "an error document with an id": Act(status=200, body=ERROR, headers={"x-amz-request-id": "1"}),
    "nothing": page(body=b"", kind=None),
    "a word": page(body=b"OK", kind="text/plain"),
    "JSON": page(body=b'{"ok": true}', kind="application/json"),
    "a page and 403": page(403),
    "a page and 404": page(404),
    "nothing and 403": page(403, b"", None),
    "a redirect to a page": Act(status=302, headers={"Location": "/login"}),
    "a page and 503": page(503),
}


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as running:
        running.objects["/in"] = Object(CONTENT)
        running.objects["/login"] = Object(
            LOGIN, etag="", headers={"Content-Type": "text/html", "x-amz-request-id": ""}
        )
        yield running


@pytest.fixture
def moving(nap: Nap) -> Iterator[Transfer]:
    with closing(transfer(rules=nap.rules, download_budget_s=1800, upload_budget_s=1800)) as made:
        yield made


@pytest.fixture
def out(tmp_path: Path) -> Path:
    path = tmp_path / "out"
    path.write_bytes(CONTENT)
    return path


S3 = "?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Signature=0"
FORM = (("key", "${filename}"), ("policy", "cA=="), ("x-amz-signature", "0"))


def signed(server: FileServer, how: str) -> SignedRequest:
    if how == "put":
        return SignedRequest(Method.PUT, server.url(f"/put/out{S3}"))
    return SignedRequest(Method.POST, server.url("/up"), fields=FORM)


def send(moving: Transfer, path: Path, request: SignedRequest) -> Recorder:
    watch = Recorder()
    moving.upload([produced(path, lambda _: request)], watch)
    return watch


def fetch(moving: Transfer, folder: Path, request: SignedRequest) -> Recorder:
    watch = Recorder()
    moving.download([wanted(folder, "in", lambda: request)], watch)
    return watch


def stored(server: FileServer, how: str) -> bytes | None:
    found = server.objects.get("/put/out" if how == "put" else "/up/out")
    return None if found is None else found.content


# --- C16: what is no store


@pytest.mark.fault("C16")
@pytest.mark.parametrize("how", ["put", "post"])
@pytest.mark.parametrize("act", NO_STORES.values(), ids=NO_STORES)
def test_an_output_is_not_stored_by_a_page(server: FileServer, moving: Transfer, out: Path, how: str, act: Act) -> None:
    server.script("/put/out" if how == "put" else "/up", *[act] * 8)
    watch = send(moving, out, signed(server, how))
    assert stored(server, how) == CONTENT
    assert watch.names == {"out"}
    assert sum(watch.sizes) == len(CONTENT)
    assert [name for name, _, _ in watch.retries] == ["out"]  # 8 tries, one line
    assert watch.over == ["out"]


@pytest.mark.fault("C16")
@pytest.mark.parametrize("how", ["put", "post"])
@pytest.mark.parametrize("act", [act for act in NO_STORES.values() if act.status != 503], ids=lambda act: act.body[:30])
def test_a_page_that_stays_is_the_workers_fault(
    server: FileServer, moving: Transfer, out: Path, nap: Nap, how: str, act: Act
) -> None:
    server.always = act
    with pytest.raises(WorkerFault) as caught:
        send(moving, out, signed(server, how))
    assert caught.value.reason is WorkerReason.STORAGE
    assert f"HTTP {act.status}" in str(caught.value)
    assert nap.now > 2800


@pytest.mark.fault("C16")
@pytest.mark.parametrize("act", NO_STORES.values(), ids=NO_STORES)
def test_an_input_is_not_brought_by_a_page(server: FileServer, moving: Transfer, tmp_path: Path, act: Act) -> None:
    server.script("/in", *[act] * 8)
    watch = fetch(moving, tmp_path, get(server.url(f"/in{S3}")))
    assert (tmp_path / "in.part").read_bytes() == CONTENT
    assert watch.stored[0].digest == f"md5:{MD5}"
    assert len(watch.retries) == 1
    assert watch.over == ["in"]


@pytest.mark.fault("C16")
@pytest.mark.parametrize("act", [act for act in NO_STORES.values() if act.status != 503], ids=lambda act: act.body[:30])
def test_an_input_that_only_pages_answer_for_is_the_workers_fault(
    server: FileServer, moving: Transfer, tmp_path: Path, act: Act
) -> None:
    server.always = act
    with pytest.raises(WorkerFault) as caught:
        fetch(moving, tmp_path, get(server.url(f"/in{S3}")))
    assert caught.value.reason is WorkerReason.STORAGE


@pytest.mark.fault("C16")
@pytest.mark.parametrize("method", [Method.PUT, Method.POST, Method.GET])
@pytest.mark.parametrize("what", ["a page", "a page that says no type", "an error document"])
def test_a_page_is_none_either_where_nothing_is_known_of_the_store(
    server: FileServer, moving: Transfer, out: Path, tmp_path: Path, method: Method, what: str
) -> None:
    path = "/in" if method is Method.GET else "/put/out" if method is Method.PUT else "/up"
    server.script(path, NO_STORES[what])
    request = SignedRequest(method, server.url(path))
    if method is Method.GET:
        fetch(moving, tmp_path, request)
        assert (tmp_path / "in.part").read_bytes() == CONTENT
    else:
        send(moving, out, request)
        assert stored(server, method.value) == CONTENT
    assert len(server.seen) == 2


@pytest.mark.fault("C16")
@pytest.mark.parametrize("status", [200, 201, 204])
def test_a_plain_store_is_believed_until_it_was_seen_to_say_more(
    server: FileServer, moving: Transfer, out: Path, status: int
) -> None:
    request = SignedRequest(Method.PUT, server.url("/put/out"))
    server.script("/put/out", Act(status=status), Act(), Act(status=status))
    send(moving, out, request)
    assert len(server.seen) == 1
    send(moving, out, request)  # with an ETag
    send(moving, out, request)  # so the answer without one is somebody else's
    assert len(server.seen) == 4


@pytest.mark.fault("C16")
@pytest.mark.parametrize("how", ["put", "post"])
@pytest.mark.parametrize(
    "act",
    [
        Act(headers={"ETag": None}),
        Act(headers={"x-amz-request-id": None}),
        Act(headers={"Content-Type": "text/html; charset=UTF-8"}),  # Swift and GCS call an empty answer HTML
        Act(
            status=201,
            headers={"ETag": f'"{MD5}"', "Content-Type": "application/xml"},
            body=b"<PostResponse><Key>out</Key></PostResponse>",
        ),
    ],
    ids=["an id", "an ETag", "an empty one called HTML", "a PostResponse"],
)
def test_what_a_store_says_is_proof(server: FileServer, moving: Transfer, out: Path, how: str, act: Act) -> None:
    server.script("/put/out" if how == "put" else "/up", act)
    send(moving, out, signed(server, how))
    assert len(server.seen) == 1


@pytest.mark.fault("C16")
def test_an_id_that_a_store_was_seen_to_send_is_proof(server: FileServer, moving: Transfer, out: Path) -> None:
    theirs: dict[str, str | None] = {"x-obs-id-2": "abc"}
    server.script("/put/out", Act(headers=NO_IDS | theirs), Act(headers=theirs), Act(headers=NO_IDS | theirs))
    send(moving, out, signed(server, "put"))  # not known yet: once more
    assert len(server.seen) == 2
    send(moving, out, signed(server, "put"))
    assert len(server.seen) == 3


@pytest.mark.fault("C16")
@pytest.mark.parametrize(
    ("act", "tries"),
    [
        (page(201, b"null", "application/json"), 1),  # as recorded
        (Act(status=204), 1),
        (page(200, b"OK", "text/plain"), 2),
        (page(201, b"OK", "text/plain"), 2),
        (page(200, b"", None), 2),
        (page(), 2),
    ],
    ids=lambda value: f"{value.status} {value.body[:9]!r}" if isinstance(value, Act) else "",
)
def test_the_apis_own_disk_answers_as_recorded(server: FileServer, nap: Nap, out: Path, act: Act, tries: int) -> None:
    server.script("/up", act)
    own = UrlPolicy(parse_origin(server.url("")))
    with closing(transfer(own, rules=nap.rules)) as moving:
        send(moving, out, SignedRequest(Method.POST, server.url("/up"), (("authorization", "Bearer x"),)))
    assert len(server.seen) == tries


@pytest.mark.fault("C16")
def test_a_plain_ok_from_the_apis_own_address_is_no_input(server: FileServer, nap: Nap, tmp_path: Path) -> None:
    """A gateway's `OK` as text says nothing of a page; a file from there comes with its ETag and date."""
    server.objects["/in"] = Object(b"content", etag='"1"')
    server.script("/in", page(200, b"OK\n", "text/plain"), Act())
    own = UrlPolicy(parse_origin(server.url("")))
    with closing(transfer(own, rules=nap.rules)) as moving:
        fetch(moving, tmp_path, get(server.url("/in")))
    assert (tmp_path / "in.part").read_bytes() == b"content"
    assert len(server.seen) == 2


A_DATE = NO_IDS | {"Last-Modified": "Sat, 28 Nov 2026 19:31:55 GMT"}


@pytest.mark.fault("C16")
@pytest.mark.parametrize(
    ("query", "headers"),
    [
        (S3, {}),
        (S3, {"ETag": None}),
        ("", {}),
        ("", {"ETag": None}),
        ("", {"x-amz-request-id": None}),
        ("", A_DATE),
    ],
    ids=["signed: both", "signed: an id", "both", "an id", "an ETag", "a date"],
)
def test_an_input_may_be_html(
    server: FileServer, moving: Transfer, tmp_path: Path, query: str, headers: dict[str, str | None]
) -> None:
    server.objects["/in"] = Object(LOGIN)
    server.script("/in", Act(headers={"Content-Type": "text/html", **headers}))
    fetch(moving, tmp_path, get(server.url(f"/in{query}")))
    assert (tmp_path / "in.part").read_bytes() == LOGIN
    assert len(server.seen) == 1


@pytest.mark.fault("C16")
@pytest.mark.parametrize("headers", [{"x-amz-request-id": None}, A_DATE], ids=["an ETag", "a date"])
def test_a_page_without_tls_on_the_way_to_s3_is_no_input_at_the_first_contact_either(
    server: FileServer, moving: Transfer, tmp_path: Path, headers: dict[str, str | None]
) -> None:
    server.script("/in", Act(status=200, body=LOGIN, headers={"Content-Type": "text/html", **headers}))
    fetch(moving, tmp_path, get(server.url(f"/in{S3}")))
    assert (tmp_path / "in.part").read_bytes() == CONTENT
    assert len(server.seen) == 2


@pytest.mark.fault("C16")
def test_an_input_of_s3_may_be_html_by_its_etag_alone_where_tls_says_who_answers(
    authority: Authority, nap: Nap, tmp_path: Path
) -> None:
    with FileServer(tls=authority.server()) as server:
        server.objects["/in"] = Object(LOGIN)
        server.script("/in", Act(headers={"Content-Type": "text/html", "x-amz-request-id": None}))
        with closing(transfer(rules=nap.rules, net=NetSettings(ca_file=authority.file))) as moving:
            fetch(moving, tmp_path, get(server.url(f"/in{S3}")))
        assert (tmp_path / "in.part").read_bytes() == LOGIN


@pytest.mark.fault("C16")
def test_a_page_with_an_etag_is_none_of_a_store_that_is_known_to_say_more(
    server: FileServer, moving: Transfer, tmp_path: Path
) -> None:
    fetch(moving, tmp_path, get(server.url(f"/in{S3}")))
    server.seen.clear()
    server.script("/in", Act(status=200, body=LOGIN, headers={"Content-Type": "text/html", "ETag": '"portal"'}))
    fetch(moving, tmp_path, get(server.url(f"/in{S3}")))
    assert (tmp_path / "in.part").read_bytes() == CONTENT
    assert len(server.seen) == 2


@pytest.mark.fault("C16")
def test_a_plain_store_has_files_without_an_etag_but_no_empty_answers(
    server: FileServer, moving: Transfer, tmp_path: Path
) -> None:
    fetch(moving, tmp_path, get(server.url("/in")))
    server.script("/in", Act(headers=NO_IDS), page(body=b"", kind=None))
    fetch(moving, tmp_path, get(server.url("/in")))
    assert len(server.seen) == 2
    fetch(moving, tmp_path, get(server.url("/in")))
    assert (tmp_path / "in.part").read_bytes() == CONTENT
    assert len(server.seen) == 4


# --- C18: refusals


REFUSALS = {
    "denied": Act(status=403, body=DENIED),
    "expired token": Act(status=400, body=b"<Error><Code>ExpiredToken</Code></Error>"),
    "not yet valid": Act(status=403, body=b"<Error><Code>AccessDenied</Code><Message>not valid yet</Message></Error>"),
    "no room": Act(status=507),
}


class Refusing:
    """A script that refuses for so many seconds of the nap's time."""

    def __init__(self, server: FileServer, nap: Nap, act: Act, for_s: float) -> None:
        server.always = act
        until = nap.now + for_s
        pause = nap.pause

        def watched(seconds: float) -> float:
            left = pause(seconds)
            if nap.now >= until:
                server.always = None
            return left

        self.rules = Rules(clock=lambda: nap.now, pause=watched, dice=lambda: 1.0)


@pytest.mark.fault("C18")
@pytest.mark.parametrize("for_s", [5, 120])
@pytest.mark.parametrize("how", ["get", "put", "post"])
@pytest.mark.parametrize("act", REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_that_passes_costs_nothing(
    server: FileServer, nap: Nap, out: Path, tmp_path: Path, how: str, act: Act, for_s: float
) -> None:
    rules = Refusing(server, nap, act, for_s).rules
    with closing(transfer(rules=rules)) as moving:
        if how == "get":
            watch = fetch(moving, tmp_path, get(server.url(f"/in{S3}")))
        else:
            watch = send(moving, out, signed(server, how))
    assert len(watch.stored) == 1
    assert len(watch.retries) == 1
    assert len(server.seen) < 16


@pytest.mark.fault("C18")
def test_an_input_that_is_refused_for_good_is_the_jobs(
    server: FileServer, moving: Transfer, nap: Nap, tmp_path: Path
) -> None:
    server.always = Act(status=403, body=DENIED)
    with pytest.raises(JobFault, match="input in cannot be had: the storage refuses it with HTTP 403") as caught:
        fetch(moving, tmp_path, get(server.url(f"/in{S3}")))
    assert caught.value.reason is JobReason.INPUT_MISSING
    assert 600 < nap.now - 1000 < 700


@pytest.mark.fault("C8", "C18")
@pytest.mark.parametrize("how", ["put", "post"])
def test_an_output_that_is_refused_is_kept_for_the_whole_budget(
    server: FileServer, moving: Transfer, nap: Nap, out: Path, how: str
) -> None:
    server.always = Act(status=403, body=DENIED)
    with pytest.raises(WorkerFault, match="refused by the storage with HTTP 403"):
        send(moving, out, signed(server, how))
    assert 1800 < nap.now - 1000 < 1900


@pytest.mark.fault("C18")
@pytest.mark.parametrize("how", ["put", "post"])
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("KeyTooLongError", JobReason.BAD_OUTPUT),
        ("EntityTooSmall", JobReason.BAD_OUTPUT),
        ("InvalidObjectName", JobReason.BAD_OUTPUT),
        ("XMinioInvalidObjectName", JobReason.BAD_OUTPUT),
        ("EntityTooLarge", JobReason.OUTPUT_TOO_LARGE),
        ("QuotaExceeded", JobReason.OUTPUT_TOO_LARGE),
        ("XMinioAdminBucketQuotaExceeded", JobReason.OUTPUT_TOO_LARGE),
    ],
)
def test_what_no_patience_changes_fails_the_job_at_once(
    server: FileServer, moving: Transfer, out: Path, how: str, code: str, reason: JobReason
) -> None:
    server.always = Act(status=400, body=f"<Error><Code>{code}</Code><Message>too much</Message></Error>".encode())
    with pytest.raises(JobFault, match=f"{code}: too much") as caught:
        send(moving, out, signed(server, how))
    assert caught.value.reason is reason
    assert len(server.seen) == 1


@pytest.mark.fault("C7", "C18")
@pytest.mark.parametrize("query", [S3, ""], ids=["signed", "plain"])
def test_a_plain_servers_404_is_believed_and_a_page_only_if_it_stays(
    server: FileServer, moving: Transfer, tmp_path: Path, query: str
) -> None:
    server.always = Act(status=404, body=b"no such file", headers={"Content-Type": "text/plain"})
    with pytest.raises(WorkerFault if query else JobFault):
        fetch(moving, tmp_path, get(server.url(f"/in{query}")))
    server.always = page(404)
    with pytest.raises(WorkerFault if query else JobFault):
        fetch(moving, tmp_path, get(server.url(f"/in{query}")))


# --- C17, C20, C22: stores that differ


@pytest.mark.fault("C17")
@pytest.mark.parametrize(
    "coding", ["utf-8", "UTF-8", "binary", "none", "aws-chunked", "identity", "text/plain", "x" * 5000]
)
def test_a_coding_that_packs_nothing_changes_nothing(
    server: FileServer, moving: Transfer, tmp_path: Path, coding: str
) -> None:
    server.script("/in", Act(headers={"Content-Encoding": coding}))
    fetch(moving, tmp_path, get(server.url("/in")))
    assert (tmp_path / "in.part").read_bytes() == CONTENT


@pytest.mark.fault("C17", "T16")
@pytest.mark.parametrize("coding", ["gzip", "x-gzip", "deflate", "br", "zstd", "compress", "aws-chunked,gzip"])
def test_a_coding_that_packs_is_refused_with_a_cure(
    server: FileServer, moving: Transfer, tmp_path: Path, coding: str
) -> None:
    server.script("/in", Act(headers={"Content-Encoding": coding}))
    with pytest.raises(JobFault, match="store it again without this header") as caught:
        fetch(moving, tmp_path, get(server.url("/in")))
    assert caught.value.reason is JobReason.INPUT_CORRUPT


@pytest.mark.fault("C20")
def test_a_form_of_any_scalars_is_sent_as_text(server: FileServer, moving: Transfer, out: Path) -> None:
    fields = {"key": "${filename}", "success_action_status": 201, "x-amz-meta-a": True, "x-amz-meta-b": None, "c": 1.5}
    request = LOCAL.parse_request({"method": "post", "url": server.url("/up"), "data": fields})
    send(moving, out, request)
    names = [part[0].split('name="')[1].split('"')[0] for part in server.seen[0].form()]
    assert names == ["key", "success_action_status", "x-amz-meta-a", "c", "file"]
    assert [part[2] for part in server.seen[0].form()[1:4]] == [b"201", b"true", b"1.5"]


@pytest.mark.fault("C22")
def test_an_etag_that_is_no_md5_is_found_out(server: FileServer, moving: Transfer, tmp_path: Path) -> None:
    server.objects["/in"] = Object(CONTENT, etag=f'"{"0" * 32}"')
    watch = fetch(moving, tmp_path, get(server.url("/in")))
    assert (tmp_path / "in.part").read_bytes() == CONTENT
    assert len(server.seen) == 3
    assert watch.stored[0].digest == f"md5:{MD5}"
    assert [name for name, what in watch.notices if "is no checksum of it" in what] == ["in"]
    fetch(moving, tmp_path, get(server.url("/in")))
    assert len(server.seen) == 6
    fetch(moving, tmp_path, get(server.url("/in")))  # two such files are the store's way
    assert len(server.seen) == 7


@pytest.mark.fault("C3", "C22")
@pytest.mark.parametrize(
    "headers",
    [{"Content-MD5": "AAAAAAAAAAAAAAAAAAAAAA=="}, {"x-amz-checksum-sha256": "A" * 43 + "="}],
    ids=["md5", "sha256"],
)
def test_another_checksum_is_believed_however_often_the_bytes_come(
    server: FileServer, moving: Transfer, tmp_path: Path, headers: dict[str, str]
) -> None:
    server.objects["/in"] = Object(CONTENT, etag='"x"', headers=headers)
    with pytest.raises(JobFault, match="arrived damaged 3 times"):
        fetch(moving, tmp_path, get(server.url("/in")))


# --- C19: addresses


NAMES = {
    "a b.txt": "a%20b.txt",
    "größe.txt": "gr%C3%B6%C3%9Fe.txt",
    "a+b.txt": "a+b.txt",
    "100% sure.txt": "100%25%20sure.txt",
    "a%20b.txt": "a%20b.txt",
    "\u65e5\u672c.tif": "%E6%97%A5%E6%9C%AC.tif",
    'quo"te{}.txt': 'quo"te{}.txt',
}


@pytest.mark.fault("C19")
@pytest.mark.parametrize("method", ["get", "post"])
@pytest.mark.parametrize(("name", "asked"), NAMES.items(), ids=NAMES)
def test_a_raw_name_in_an_address_is_asked_for(
    server: FileServer, moving: Transfer, tmp_path: Path, out: Path, method: str, name: str, asked: str
) -> None:
    """As a server on a local disk writes it: from its own decoded address (PROTOCOL.md)."""
    server.objects[f"/d/{asked}/download"] = Object(CONTENT)
    request = LOCAL.parse_request({"method": method, "url": server.url(f"/d/{name}/download")})
    if method == "get":
        fetch(moving, tmp_path, request)
    else:
        send(moving, out, request)
    assert [seen.target for seen in server.seen] == [f"/d/{asked}/download"]


@pytest.mark.fault("C6", "C19")
@pytest.mark.parametrize(("name", "asked"), NAMES.items(), ids=NAMES)
def test_a_raw_name_in_a_redirect_is_followed(
    server: FileServer, moving: Transfer, tmp_path: Path, name: str, asked: str
) -> None:
    server.objects[f"/d/{asked}"] = Object(CONTENT)
    location = f"/d/{name}".encode().decode("latin-1")  # the server double writes latin-1
    server.script("/in", Act(status=302, headers={"Location": location}))
    fetch(moving, tmp_path, get(server.url("/in")))
    assert server.seen[-1].target == f"/d/{asked}"


# --- item 15: redirects and headers


ENDPOINT = (
    b"<Error><Code>%s</Code><Message>Use the endpoint.</Message><Bucket>b</Bucket>"
    b"<Endpoint>b.s3.eu-central-1.example</Endpoint></Error>"
)


@pytest.mark.fault("C6", "C18")
@pytest.mark.parametrize("how", ["get", "put", "post"])
@pytest.mark.parametrize(("status", "code"), [(301, b"PermanentRedirect"), (307, b"TemporaryRedirect")])
def test_a_redirect_without_location_is_told_in_the_stores_words(
    server: FileServer, moving: Transfer, tmp_path: Path, out: Path, how: str, status: int, code: bytes
) -> None:
    server.always = Act(status=status, body=ENDPOINT % code)
    words = rf"HTTP {status} \({code.decode()}: Use the endpoint\.; its endpoint is b\.s3\.eu-central-1\.example"
    move = partial(fetch, moving, tmp_path, get(server.url(f"/in{S3}")))
    if how != "get":
        move = partial(send, moving, out, signed(server, how))
    with pytest.raises(WorkerFault, match=words):
        move()


@pytest.mark.fault("C6", "C8")
@pytest.mark.parametrize("how", ["put", "post"])
def test_a_young_bucket_is_waited_for(server: FileServer, moving: Transfer, out: Path, how: str) -> None:
    away = Act(status=307, headers={"Location": "http://127.0.0.2:1/"}, body=ENDPOINT % b"TemporaryRedirect")
    server.script("/put/out" if how == "put" else "/up", *[away] * 6)
    watch = send(moving, out, signed(server, how))
    assert stored(server, how) == CONTENT
    assert len(watch.retries) == 1
    assert "b.s3.eu-central-1.example" in watch.retries[0][1]


@pytest.mark.fault("C6", "C16")
@pytest.mark.parametrize(
    ("headers", "tries"),
    [
        ({"Location": "/thanks", "ETag": f'"{MD5}"'}, 1),
        ({"Location": f"/thanks?bucket=b&key=out&etag=%22{MD5}%22"}, 1),
        ({"Location": "/login"}, 2),
    ],
    ids=["ETag", "in the address", "none"],
)
def test_303_after_a_form_is_stored_if_it_names_an_etag(
    server: FileServer, moving: Transfer, out: Path, headers: dict[str, str | None], tries: int
) -> None:
    server.script("/up", Act(status=303, headers=headers))
    assert send(moving, out, signed(server, "post")).names == {"out"}
    assert [seen.target for seen in server.seen] == ["/up"] * tries


@pytest.mark.fault("C18")
@pytest.mark.parametrize("method", ["get", "put"])
def test_headers_that_do_not_go_along_are_named_when_the_request_is_refused(
    server: FileServer, moving: Transfer, tmp_path: Path, out: Path, method: str
) -> None:
    server.always = Act(status=403, body=b"<Error><Code>SignatureDoesNotMatch</Code></Error>")
    headers = {"x-lab-token": "secret-canary", "Cookie": "secret-canary"}
    request = LOCAL.parse_request({"method": method, "url": server.url(f"/in{S3}"), "headers": headers})
    watch = Recorder()
    move = partial(moving.download, [wanted(tmp_path, "in", lambda: request)], watch)
    if method == "put":
        move = partial(moving.upload, [produced(out, lambda _: request)], watch)
    with pytest.raises((JobFault, WorkerFault), match="does not send: x-lab-token, Cookie") as caught:
        move()
    assert ["does not send: x-lab-token, Cookie" in why for _, why, _ in watch.retries] == [True]
    assert "canary" not in f"{caught.value} {watch.retries}"


# --- C21: what is said


class Said:
    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []
        self.names: list[str] = []

    def emit(self, name: str, /, level: str = "info", **fields: object) -> None:
        assert fields["job"] == "7"
        self.names.append(name)
        self.lines.append((level, str(fields["message"])))


class Watching(Recorder):
    """Tells troubles as a job does."""

    def __init__(self, nap: Nap, said: Said) -> None:
        super().__init__()
        self._troubles = Troubles(
            said.emit, JobId("7"), "download", lambda: nap.now, lambda words: None, wall=lambda: 1_795_894_315.0
        )
        self.retrying = lambda item, why, for_s: self._troubles.retrying(item.name, why, for_s)  # type: ignore[method-assign]
        self.recovered = lambda item: self._troubles.recovered(item.name)  # type: ignore[method-assign]


@pytest.mark.fault("C21", "J10")
@pytest.mark.parametrize("files", [1, 20])
@pytest.mark.parametrize(
    "act",
    [Act(status=503, body=b"<Error><Code>SlowDown</Code></Error>"), Act(status=403, body=DENIED), page()],
    ids=["later", "refused", "a page"],
)
def test_25_seconds_of_trouble_are_two_lines(
    server: FileServer, nap: Nap, tmp_path: Path, act: Act, files: int
) -> None:
    said = Said()
    with closing(transfer(rules=Refusing(server, nap, act, 25).rules)) as moving:
        watch = Watching(nap, said)
        for number in range(files):
            server.objects[f"/in/{number}"] = Object(CONTENT)
        signs = [partial(get, server.url(f"/in/{number}{S3}")) for number in range(files)]
        moving.download((wanted(tmp_path, f"f{number}", sign) for number, sign in enumerate(signs)), watch)
    assert len(watch.stored) == files
    assert [level for level, _ in said.lines] == ["warning", "info"]
    assert said.lines[0][1].startswith("download of f")
    assert f"HTTP {act.status}" in said.lines[0][1]
    assert "it is tried again until 2026-11-" in said.lines[0][1]
    assert "goes on after" in said.lines[1][1]


@pytest.mark.fault("C21")
def test_each_new_reason_is_a_line_and_what_is_mended_at_once_is_none(
    server: FileServer, nap: Nap, moving: Transfer, tmp_path: Path
) -> None:
    server.script("/in", Act(cut=10), Act(cut=20), Act(status=503))
    said = Said()
    watch = Watching(nap, said)
    moving.download([wanted(tmp_path, "in", partial(get, server.url("/in")))], watch)
    assert said.lines == []
    server.script("/in", *[Act(status=503)] * 8, *[Act(status=500)] * 3, *[Act(cut=number) for number in range(1, 4)])
    moving.download([wanted(tmp_path, "in", partial(get, server.url("/in")))], watch)
    assert [level for level, _ in said.lines] == ["warning"] * 3 + ["info"]
    assert [
        word in line
        for word, (_, line) in zip(["HTTP 503", "HTTP 500", "127.0.0.1: ", "goes on"], said.lines, strict=True)
    ]


@pytest.mark.fault("C21")
def test_an_api_that_gives_no_link_is_said_too(server: FileServer, nap: Nap, moving: Transfer, tmp_path: Path) -> None:
    answers: list[Callable[[], SignedRequest]] = [partial(get, server.url("/in"))]
    failures = [SourceUnavailable("no answer") for _ in range(8)]

    def sign() -> SignedRequest:
        if failures:
            raise failures.pop()
        return answers[0]()

    said = Said()
    moving.download([wanted(tmp_path, "in", sign)], Watching(nap, said))
    assert [level for level, _ in said.lines] == ["warning", "info"]
    assert "no link to be had: no answer; it is tried again as long as the job is held" in said.lines[0][1]


@pytest.mark.fault("C2", "B2", "C21")
@pytest.mark.parametrize("how", ["get", "put"])
def test_a_link_that_only_this_file_is_not_given_is_asked_for_as_long_as_a_storage_that_is_away(
    nap: Nap, moving: Transfer, tmp_path: Path, out: Path, how: str
) -> None:
    asked = 0

    def sign(*_: bool) -> SignedRequest:
        nonlocal asked
        asked += 1
        raise SourceUnavailable("the server answered 500", only_this=True)

    watch, began = Recorder(), nap.now
    move = partial(moving.download, [wanted(tmp_path, "in", sign)], watch)
    if how == "put":
        move = partial(moving.upload, [produced(out, sign)], watch)
    with pytest.raises(WorkerFault, match=r"could not be moved for 0\.5 hours, given up: no link to be had: ") as fault:
        move()
    assert fault.value.reason is WorkerReason.STORAGE
    assert 1800 < nap.now - began < 1900
    assert asked > 20
    [(_, why, for_s)] = watch.retries
    assert why == "no link to be had: the server answered 500"
    assert for_s is not None
    assert 1790 <= for_s <= 1800


@pytest.mark.fault("B2", "B3")
def test_of_a_file_that_is_given_no_link_only_the_time_counts_in_which_the_api_was_there(
    server: FileServer, nap: Nap, moving: Transfer, tmp_path: Path
) -> None:
    """For half an hour in all it fails at this file, now and then, and for two days it is away."""
    began, tries = nap.now, 0

    def sign() -> SignedRequest:
        nonlocal tries
        tries += 1
        if nap.now - began > 2 * 86_400:
            return get(server.url("/in"))
        raise SourceUnavailable("the server answered 500", only_this=tries % 200 < 2)

    moving.download([wanted(tmp_path, "in", sign)], Recorder())
    assert tries > 1800


@pytest.mark.fault("C21", "B17")
@pytest.mark.parametrize("how", ["get", "put"])
def test_leaving_cuts_a_wait_short(server: FileServer, tmp_path: Path, out: Path, how: str) -> None:
    server.always = Act(status=503, headers={"Retry-After": "600"})
    watch = Recorder()
    retrying = watch.retrying

    def leave(*args: object) -> None:
        retrying(*args)  # type: ignore[arg-type]
        watch.halt.set(StopReason.SHUTDOWN)

    watch.retrying = leave  # type: ignore[method-assign, assignment]
    with closing(transfer(rules=Rules())) as moving:
        move = partial(moving.download, [wanted(tmp_path, "in", partial(get, server.url(f"/in{S3}")))], watch)
        if how == "put":
            move = partial(moving.upload, [produced(out, lambda _: signed(server, "put"))], watch)
        with pytest.raises(Stopped):
            move()
    assert len(watch.retries) == 1
