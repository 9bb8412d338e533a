"""Whatever a hostile server, store or registry answers: a plain value, or an error of our own tree (T6, T22)."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import socket
import time
import unicodedata
from collections.abc import Callable
from functools import partial
from http.client import HTTPResponse
from typing import Any, cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jobfetcher.core.errors import JobFault, JobfetcherError, JobReason, SourceError, WorkerFault
from jobfetcher.core.job import OutputKind, parse_file_ref, parse_job_id
from jobfetcher.core.phases import Phase
from jobfetcher.core.ports import Lease, Standing
from jobfetcher.core.run import Ending, Outcome
from jobfetcher.core.text import DETAILS_BYTES, clean, details
from jobfetcher.core.urls import UrlPolicy, parse_origin
from jobfetcher.engine import images
from jobfetcher.engine.references import parse_reference
from jobfetcher.sources.worker_api.client import Client, Params
from jobfetcher.sources.worker_api.reply import Reply, failure, retry_after
from jobfetcher.sources.worker_api.source import Filter, WorkerApi
from jobfetcher.telemetry import logs
from jobfetcher.transfer import digests, replies
from jobfetcher.transfer.exchange import Reply as StoreReply
from jobfetcher.transfer.part import Note
from tests.fuzz.hostile import attempt, fuzz, texts, values
from tests.support.jobs import Emitted

API = "https://api.example.org"
POLICY = UrlPolicy(api=parse_origin(API), storage_allow=frozenset({"store.example"}))

#: RFC 9110, 5.5: what may stand in a header's value; and in a request's target.
HEADER_VALUE, TARGET = re.compile(r"[\x20-\x7e\t]*"), re.compile(r"[\x21-\x7e]*")

_urls = (
    st.sampled_from([f"{API}/files/x", "https://store.example/b/k?sig=1", "http://store.example/", "http://h.example/"])
    | texts
    | texts.map(lambda text: f"https://h.example/{text}")
)
_names = st.sampled_from(["Authorization", "x-amz-acl", "Content-Type", "x-goog-a", "Host", "Cookie"]) | texts
_requests = st.fixed_dictionaries(
    {"method": st.sampled_from(["get", "put", "post", "GET", "delete", "get\r\nx"]) | values, "url": _urls | values},
    optional={
        "headers": st.dictionaries(_names, texts | values, max_size=5) | values,
        "data": st.dictionaries(texts, texts, max_size=5) | values,
        "verify": st.just(False),
        "proxies": values,
    },
)


def _check_request(raw: Any) -> None:
    request = attempt(lambda: POLICY.parse_request(raw))
    if isinstance(request, JobfetcherError):
        assert isinstance(request, JobFault | WorkerFault)
        assert len(str(request)) < 1000
        return
    origin = parse_origin(request.url)
    assert origin.scheme == "https" or origin.host == "store.example"
    assert TARGET.fullmatch(request.url)
    for name, value in request.headers:
        assert re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", name)
        assert HEADER_VALUE.fullmatch(value)
        assert name.lower() != "authorization" or origin == POLICY.api
        assert name.lower() not in {"host", "cookie", "transfer-encoding", "content-length"}
    for name, value in request.fields:
        assert name != "file"
        assert isinstance(value, str)


@pytest.mark.fault("T6", "T22")
@fuzz(2_000)
@given(_requests | values)
def test_a_signed_request_is_safe_or_refused(raw: Any) -> None:
    _check_request(raw)


@pytest.mark.fault("T22")
@pytest.mark.parametrize("unit", ["x", "\r\n", "\x1b", "ä", "-", "a:b\r\n"])
def test_ten_megabytes_anywhere_in_a_signed_request_are_refused_at_once(unit: str) -> None:
    huge = unit * (10 * 2**20 // len(unit))
    good = {"method": "put", "url": f"{API}/x"}
    began = time.process_time()
    for raw in (
        good | {"method": huge},
        good | {"url": f"{API}/{huge}"},
        good | {"headers": {"x-amz-a": huge}},
        good | {"headers": {huge: "a"}},
        good | {"data": {"key": huge}},
        good | {"data": {huge: "a"}},
        good | {huge: huge},
    ):
        _check_request(raw)
    assert time.process_time() - began < 5


@pytest.mark.fault("T22")
@fuzz(300)
@given(st.sampled_from(["headers", "data"]), st.integers(50, 400))
def test_many_fields_are_bounded(where: str, count: int) -> None:
    raw = {"method": "post", "url": f"{API}/x", where: {f"x-amz-{number}": "v" for number in range(count)}}
    request = attempt(lambda: POLICY.parse_request(raw))
    if isinstance(request, JobfetcherError):
        assert isinstance(request, JobFault)
        assert request.reason is JobReason.UNSAFE_REQUEST
        return
    assert len(request.fields) <= 64
    assert sum(len(name) + len(value) for name, value in request.headers) < 400 * 20


class StubClient:
    """The network, not here: answers every request with the same reply, and keeps what was asked."""

    base_url = API

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self.asked: list[str] = []

    def request(self, method: str, path: str, params: Params = (), *, within_s: float = 30.0) -> Reply:
        assert TARGET.fullmatch(path)
        self.asked.append(f"{method} {path}")
        return self._reply

    def close(self) -> None:
        """There is nothing to close."""


_replies = st.builds(
    Reply,
    status=st.sampled_from([200, 201, 204, 302, 304, 400, 401, 403, 404, 408, 409, 410, 412, 422, 425, 429, 500, 503]),
    body=st.binary(max_size=60)
    | values.map(lambda value: json.dumps(value).encode())
    | _requests.map(lambda value: json.dumps(value).encode())
    | st.sampled_from([b'"queued"', b'"finished"', b'"running"', b"null", b"<html>", b'"fini\\nshed"']),
    headers=st.fixed_dictionaries({}, optional={"retry-after": texts}),
)


@pytest.mark.fault("T22", "B10", "B12", "S15")
@fuzz(1_000)
@given(_replies, st.booleans())
def test_a_lease_stands_or_falls_with_errors_of_our_own(reply: Reply, resumed: bool) -> None:
    client = StubClient(reply)
    source = WorkerApi(cast(Client, client), POLICY, wanted=Filter(), emit=Emitted())
    job = parse_job_id("7")
    acts: tuple[Callable[[Lease], object], ...] = (
        lambda lease: lease.beat(Phase.RUNNING),
        lambda lease: lease.sign_input(parse_file_ref("s3://bucket/key")),
        lambda lease: lease.sign_output(OutputKind.OUTPUT, "out", "a b"),
        lambda lease: lease.settle(Outcome(Ending.FINISHED, None, "")),
        lambda lease: lease.release("why\r\nnot"),
    )
    for act in acts:
        lease = source.resume(API, job, cut_off=Phase.RUNNING) if resumed else source.resume(API, job)
        error = attempt(partial(act, lease))
        if isinstance(error, JobfetcherError):
            assert str(error) == clean(str(error), 2000)
            wait = getattr(error, "retry_after_s", None)
            assert wait is None or 0 <= wait <= 600
            continue
        # A word that the server did not accept with 2xx is never taken for heard (S6, S7).
        if reply.status == 404 and (said := lease.beat(Phase.RUNNING)) is Standing.KEEP:
            raise AssertionError(f"{said} after a 404")
        before = len(client.asked)
        if reply.status == 404:
            assert lease.settle(Outcome(Ending.FINISHED, None, "")) is not Standing.KEEP
            assert len(client.asked) == before  # latched: nothing more is sent


@pytest.mark.fault("T22", "B11", "T23")
@fuzz(2_000)
@given(
    texts | st.integers(-(10**30), 10**30).map(str) | st.datetimes().map(lambda at: f"{at:%a, %d %b %Y %H:%M:%S} GMT")
)
@example("9" * 10_000)
@example("Fri, 31 Dec 9999 23:59:59 -2359")
@example("Mon, 01 Jan 0001 00:00:00 +2359")
def test_patience_asked_for_is_between_nothing_and_ten_minutes(value: str) -> None:
    for asked in (retry_after(value), replies.retry_after_s(StoreReply(headers={"retry-after": value}))):
        assert asked is None or (0 <= asked <= 600 and math.isfinite(asked))


_store_headers = [
    "etag",
    "content-length",
    "content-range",
    "date",
    "retry-after",
    "content-md5",
    "x-amz-checksum-sha256",
    "x-amz-checksum-crc32",
    "x-amz-server-side-encryption",
]


@pytest.mark.fault("T22", "C3", "C4")
@fuzz(2_000)
@given(
    st.fixed_dictionaries({}, optional=dict.fromkeys(_store_headers, texts)),
    st.sampled_from([200, 206, 400, 403, 404, 410, 416, 429, 500]),
    st.binary(max_size=100) | texts.map(lambda text: f"<Code>{text}</Code><Message>{text}".encode(errors="replace")),
)
def test_a_stores_reply_is_read_or_ignored(headers: dict[str, str], status: int, words: bytes) -> None:
    reply = StoreReply(status, headers, words)
    size, part, whole = replies.content_length(reply), replies.content_range(reply), replies.unsatisfied_size(reply)
    assert size is None or 0 <= size < 10**18
    assert part is None or 0 <= part.first <= part.last < (part.whole or 10**18)
    assert whole is None or 0 <= whole < 10**18
    etag = replies.strong_etag(reply)
    assert HEADER_VALUE.fullmatch(etag)  # it is sent back as If-Range
    assert len(etag) <= 202
    skew = replies.skew_s(reply)
    assert skew is None or math.isfinite(skew)
    for said in (replies.words(reply), replies.code(reply)):
        assert len(said) <= 400
    assert replies.words(reply) == clean(replies.words(reply))
    for judge in (replies.is_later, replies.is_refused, replies.is_missing):
        assert judge(reply) in {True, False}
    expected = digests.Expected.of(reply)
    note = Note.of(expected, [])  # what is read back by the next process
    assert Note.model_validate_json(note.model_dump_json()).expected == expected
    assert all(re.fullmatch("[0-9a-f]{8,64}", digest) for digest in expected.sums.values())


class Received:
    """A socket from which a whole answer can be read."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, _mode: str) -> io.BytesIO:
        return io.BytesIO(self._data)


_progress = st.fixed_dictionaries(
    {},
    optional={
        "id": texts | values,
        "status": st.sampled_from(["Downloading", "Download complete", "Extracting"]) | values,
        "progressDetail": st.fixed_dictionaries({}, optional={"current": values, "total": values}) | values,
        "error": values,
    },
)


@pytest.mark.fault("T22", "E7")
@fuzz(700)
@given(
    st.lists((_progress | values).map(lambda value: json.dumps(value).encode()) | st.binary(max_size=30), max_size=6)
)
def test_a_pulls_progress_is_numbers_or_an_error_of_our_own(lines: list[bytes]) -> None:
    answer = HTTPResponse(cast(socket.socket, Received(b"HTTP/1.1 200 OK\r\n\r\n" + b"\r\n".join(lines))))
    answer.begin()
    seen: list[tuple[int, int]] = []
    with contextlib.suppress(ValueError):  # no JSON: `EngineApi.calling`, around it, makes a WorkerFault of it
        follow = partial(images._follow, parse_reference("busybox"), answer)
        heard = images._Pull(lambda done, total: seen.append((done, total)), lambda: None)
        fault = attempt(lambda: follow(heard))
        assert fault is None or str(fault) == clean(str(fault), 2000)
    assert all(isinstance(number, int) for pair in seen for number in pair)


@pytest.mark.fault("T22", "E6")
@pytest.mark.parametrize("unit", ["repository ", "manifest for ", "permission ", "toomany", "a"])
def test_a_megabyte_of_a_registrys_words_is_understood_in_no_time(unit: str) -> None:
    began = time.process_time()
    fault = images._fault(parse_reference("busybox"), unit * (2**20 // len(unit)))
    assert time.process_time() - began < 1
    assert len(str(fault)) < 1000


@pytest.mark.fault("T17", "T10")
@pytest.mark.parametrize(
    "unit",
    ["token=", '"token": "', "token%3D", "Authorization: ", "bearer ", "eyJ", "://a:", "://a:b", "x-amz-", "%26", "a-"],
)
def test_a_log_line_made_to_be_hard_to_search_is_masked_in_no_time(unit: str) -> None:
    began = time.process_time()
    logs._safe_text(unit * (10 * 2**20 // len(unit)))
    assert time.process_time() - began < 2


@pytest.mark.fault("T17", "T22")
@fuzz(2_000)
@given(texts | st.text(), st.integers(1, 3000))
def test_a_cleaned_text_is_one_harmless_line(text: str, limit: int) -> None:
    line = clean(text, limit)
    assert len(line) <= limit
    assert not {unicodedata.category(char) for char in line} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert len(line.splitlines()) <= 1
    said = details(text)
    assert len(said.encode()) <= DETAILS_BYTES
    assert not set(said) & set("<>&\r\n\x1b")


@pytest.mark.fault("T22", "B12")
@fuzz(500)
@given(_replies)
def test_every_unplanned_answer_is_a_reason_to_try_later(reply: Reply) -> None:
    error = failure(reply, "a question")
    assert isinstance(error, SourceError)
    assert str(error) == clean(str(error))
