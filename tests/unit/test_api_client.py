"""worker_api: one call in bounded time and memory, and a lease that meets every oddity of the server (S1 to S18)."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from typing import Any

import pytest

from jobfetcher.core.errors import (
    ConfigError,
    JobFault,
    JobReason,
    SourceRefused,
    SourceUnavailable,
    Stopped,
    TooSoon,
    UnreadableJob,
    UnwantedJob,
    Verdict,
    WorkerFault,
    WorkerReason,
    verdict,
)
from jobfetcher.core.job import JobId, OutputKind, parse_file_ref, parse_job_id
from jobfetcher.core.machine import Gpu, Offer
from jobfetcher.core.phases import Phase
from jobfetcher.core.ports import Standing
from jobfetcher.core.run import Ending, Outcome
from jobfetcher.core.urls import Method, UrlPolicy, parse_origin
from jobfetcher.ending import outcome_of
from jobfetcher.sources.worker_api.auth import StaticToken
from jobfetcher.sources.worker_api.client import BODY_BYTES, Client
from jobfetcher.sources.worker_api.nonces import Nonces
from jobfetcher.sources.worker_api.reply import ForeignAnswer, retry_after
from jobfetcher.sources.worker_api.signing import NotForThisWorker, Rules, Verifier
from jobfetcher.sources.worker_api.source import ApiLease, Filter, WorkerApi
from tests.support.jobs import Emitted, FakeClock
from tests.support.scripted_api import ScriptedApi, drip, hang_up, head, reply, scripted_api
from tests.support.talk import TOKEN

SEVEN = parse_job_id("7")
FINISHED = Outcome(Ending.FINISHED, None, "")
FAILED = Outcome(Ending.JOB_FAILED, JobReason.EXIT_CODE, "exit code 3")
OFFER = Offer(4.0, 4096)
GOOD = {"handler": {"image_url": "busybox"}}


@pytest.fixture
def source(client: Client, clock: FakeClock, emit: Emitted) -> WorkerApi:
    policy = UrlPolicy(parse_origin(client.base_url))
    return WorkerApi(client, policy, wanted=Filter(("g1", "g 2"), 60), emit=emit, clock=clock)


# -- one call ---------------------------------------------------------------------------------------------------------


@pytest.mark.fault("B14")
@pytest.mark.parametrize("where", ["headers", "body"])
def test_a_call_ends_in_time_however_slowly_the_server_speaks(api: ScriptedApi, client: Client, where: str) -> None:
    stop = threading.Event()
    data = head(200, 1000, x_long="y" * 500)
    api.then(drip(data, stop) if where == "headers" else _then(head(200, 1000), drip(b"x" * 1000, stop)))
    started = time.monotonic()
    with pytest.raises(SourceUnavailable, match="no answer") as error:
        client.request("GET", "/jobs", within_s=2.0)
    stop.set()
    assert time.monotonic() - started < 20
    assert error.value.sent


def _then(first: bytes, rest: Any) -> Any:
    def answer(connection: Any) -> None:
        connection.sendall(first)
        rest(connection)

    return answer


@pytest.mark.fault("B15")
@pytest.mark.parametrize("length", [BODY_BYTES + 1, None])
def test_a_body_is_cut_off_at_four_mib(api: ScriptedApi, client: Client, length: int | None) -> None:
    sent = [0]

    def huge(connection: Any) -> None:
        connection.sendall(head(200, length))
        for _ in range(64):
            connection.sendall(b"x" * (1 << 20))
            sent[0] += 1

    api.then(huge)
    with pytest.raises(SourceUnavailable, match="larger than 4 MiB"):
        client.request("GET", "/jobs")
    assert sent[0] < 60


@pytest.mark.fault("B15")
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html><body>Welcome to the hotel</body></html>",
        b'{"7": 1, "7": 2}',
        b'{"a": {"b": 1, "b": 2}}',
        b'{"a": NaN}',
        b"[Infinity]",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b"\xff\xfe",
        b'{"a": 1',
        b"\x1b[2J",
    ],
)
def test_what_is_no_sound_json_is_no_answer(api: ScriptedApi, client: Client, body: bytes) -> None:
    api.then(reply(200, body))
    with pytest.raises(SourceUnavailable, match="not the JSON expected") as error:
        client.request("GET", "/x").json()
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 400


@pytest.mark.fault("T16")
def test_an_encoded_body_is_not_unpacked(api: ScriptedApi, client: Client) -> None:
    import gzip

    api.then(reply(200, gzip.compress(b"{}" + b" " * 1000), content_encoding="gzip"))
    with pytest.raises(SourceUnavailable):
        client.request("GET", "/x")
    assert api.asked[0].headers["accept-encoding"] == "identity"


@pytest.mark.fault("T8")
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_never_followed_and_the_token_stays(api: ScriptedApi, source: WorkerApi, status: int) -> None:
    with scripted_api() as other:
        api.default = reply(status, location=f"{other.url}/jobs")
        with pytest.raises(SourceUnavailable):
            source.fetch(OFFER, 0.0)
        lease = source.resume(api.url, SEVEN)
        with pytest.raises(SourceUnavailable):
            lease.beat(Phase.RUNNING)
        with pytest.raises(SourceUnavailable):
            lease.sign_input(parse_file_ref("s3://b/k"))
        assert other.asked == []
    assert all(asked.headers["authorization"] == f"Bearer {TOKEN}" for asked in api.asked)


def test_cookies_are_not_kept(api: ScriptedApi, client: Client) -> None:
    api.default = reply(200, set_cookie="session=1; Path=/")
    for _ in range(3):
        client.request("GET", "/x")
    assert not any("cookie" in asked.headers for asked in api.asked)


def test_a_connection_that_was_never_made_was_not_sent() -> None:
    client = Client("http://127.0.0.1:9")
    client.auth = StaticToken(TOKEN)
    with pytest.raises(SourceUnavailable, match=r"no answer from 127\.0\.0\.1:9") as error:
        client.request("GET", "/x")
    assert not error.value.sent
    client.close()


@pytest.mark.fault("B11")
@pytest.mark.fault("T23")
@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("", None),
        ("soon", None),
        ("1.5", None),
        ("0", 0),
        ("17", 17),
        ("-5", 0),
        ("601", 600),
        ("9" * 400, 600),
        ("-" + "9" * 400, 0),
        ("9" * 5000, None),
        ("Thu, 01 Jan 1970 00:01:40 GMT", 60),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 600),
        ("Fri, 99 Foo 9999 99:99:99 GMT", None),
    ],
)
def test_retry_after_is_seconds_or_a_date_within_ten_minutes(value: str | None, seconds: float | None) -> None:
    assert retry_after(value, now=40.0) == seconds


class Renewing:
    """Two tokens: the first is refused."""

    def __init__(self) -> None:
        self.renewed: list[tuple[str, int]] = []

    def token(self) -> str:
        return "old"

    def renew(self, refused: str, status: int = 401) -> str:
        self.renewed.append((refused, status))
        return "new"


@pytest.mark.fault("B4", "B24")
@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_token_is_met_with_one_new_token_and_one_more_try(
    api: ScriptedApi, client: Client, status: int
) -> None:
    client.auth = auth = Renewing()
    api.then(status, 204)
    assert client.request("PUT", "/x").status == 204
    api.then(status, status)
    assert client.request("PUT", "/x").status == status
    assert [asked.headers["authorization"] for asked in api.asked] == ["Bearer old", "Bearer new"] * 2
    assert auth.renewed == [("old", status)] * 2


@pytest.mark.fault("B21", "B24")
@pytest.mark.parametrize("status", [401, 403])
def test_whoever_refuses_a_token_before_the_api_may_mean_the_token(
    api: ScriptedApi, client: Client, status: int
) -> None:
    """A gateway that checks tokens itself says so in its own words, and a filter says 403 to everything."""
    client.auth = Renewing()
    api.then(reply(status, b'{"message": "Unauthorized"}', content_type="application/json"), 204)
    assert client.request("PUT", "/x").status == 204
    client.auth = StaticToken(TOKEN)
    api.then(reply(status, b"<html>Blocked by your administrator</html>", content_type="text/html"))
    with pytest.raises(ForeignAnswer, match=f"{status} .*text/html, it begins: Blocked by your administrator"):
        client.request("PUT", "/x")


def test_a_call_whose_token_cannot_be_had_was_not_sent(api: ScriptedApi, client: Client) -> None:
    class Away:
        def token(self) -> str:
            raise SourceUnavailable("the sign-in service is away")

        def renew(self, refused: str, status: int = 401) -> str:
            raise SourceUnavailable("the sign-in service is away")

    client.auth = Away()
    with pytest.raises(SourceUnavailable) as error:
        client.request("PUT", "/x")
    assert not error.value.sent
    assert api.asked == []


# -- asking for jobs --------------------------------------------------------------------------------------------------


def test_the_question_says_what_is_free(api: ScriptedApi, source: WorkerApi) -> None:
    api.default = reply(200, b"{}")
    gpus = (Gpu("1", "A", 8000, "8.6"), Gpu("2", "B", 4000, "7.5"), Gpu("3", "A", 9000, "8.6"))
    assert source.fetch(Offer(1.9, 2048, gpus), 0.0) is None
    common = (("memory", "2048"), ("cpu_cores", "2"), ("limit", "1"))
    tail = (("older_than", "60"), ("groups", "g1"), ("groups", "g 2"))
    questions = {asked.query for asked in api.asked}  # S18: one question per model, with the best GPU of it
    assert questions == {
        (*common, ("gpu_mem", "4000"), ("gpu_model", "B"), ("gpu_archi", "7.5"), *tail),
        (*common, ("gpu_mem", "9000"), ("gpu_model", "A"), ("gpu_archi", "8.6"), *tail),
    }
    assert source.fetch(Offer(0.5, 2048), 0.0) is None
    assert api.asked[-1].query == (("memory", "2048"), ("cpu_cores", "1"), ("limit", "1"), *tail)


@pytest.mark.fault("A1")
def test_a_question_whose_answer_was_lost_is_not_repeated(api: ScriptedApi, source: WorkerApi) -> None:
    api.then(hang_up)  # S1: it may have handed out a job
    with pytest.raises(SourceUnavailable):
        source.fetch(OFFER, 0.0)
    assert len(api.asked) == 1


@pytest.mark.fault("B9")
@pytest.mark.fault("B12")
@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (404, b"", "API_URL"),
        (200, b"<html>", "API_URL"),
        (200, b"[]", "not an object"),
        (200, b'"no"', "not an object"),
        (500, b"oops\x1b[2J", r"answered 500 .*oops\\x1b"),
        (429, b"", "answered 429"),
        (418, b'{"detail": "tea"}', "makes no sense"),
        (418, b"tea", "something before it answered 418"),
    ],
)
def test_no_answer_is_not_no_job(api: ScriptedApi, source: WorkerApi, status: int, body: bytes, words: str) -> None:
    api.then(reply(status, body))
    with pytest.raises(SourceUnavailable, match=words):
        source.fetch(OFFER, 0.0)


@pytest.mark.fault("B6")
@pytest.mark.parametrize(("status", "words"), [(401, "ACCESS_TOKEN"), (403, "group 'workers'")])
def test_a_refused_account_is_told_so(api: ScriptedApi, source: WorkerApi, status: int, words: str) -> None:
    api.then(status, status)
    with pytest.raises(SourceRefused, match=words):
        source.fetch(OFFER, 0.0)


@pytest.mark.fault("B16")
def test_of_two_jobs_the_first_is_run_and_the_others_given_back(api: ScriptedApi, source: WorkerApi) -> None:
    api.then(reply(200, json.dumps({"7": GOOD, "../x": GOOD, "8": GOOD, "9": {}}).encode()))
    claim = source.fetch(OFFER, 0.0)
    assert claim is not None
    assert claim.job.id == "7"
    updates = [(asked.path, dict(asked.query)["status"]) for asked in api.asked[1:]]
    assert updates == [("/jobs/8/status", "queued"), ("/jobs/9/status", "queued")]


@pytest.mark.fault("T3")
@pytest.mark.parametrize("name", ["../x", "/etc", ".", "x" * 10_000, "\u0661", "a b", "", "-1"])
def test_a_job_with_a_bad_id_is_not_spoken_of(api: ScriptedApi, source: WorkerApi, emit: Emitted, name: str) -> None:
    api.then(reply(200, json.dumps({name: GOOD}).encode()))
    with pytest.raises(SourceUnavailable, match="without a usable id"):
        source.fetch(OFFER, 0.0)
    assert len(api.asked) == 1
    [event] = emit.named("job_unnameable")
    assert len(str(event["message"])) < 300


@pytest.mark.fault("B15")
@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b'{"7": {"a": 1, "a": 2}}', "the same key twice"),
        (b'{"7": {"a": NaN}}', "NaN is not JSON"),
        (b' {\n"7" : {}, "7": {}}', "the same key twice"),
        (b'{"7": {"hardware": Infinity}}', "Infinity is not JSON"),
        (b'{"7": ' + b"[" * 10_000, "nested too deeply"),
        (b'{"7": ' + b'{"a":' * 10_000, "nested too deeply"),
        (b'{"7": ' + b"9" * 5000 + b"}", "integer string"),
        (b'{"7": [' + b"0," * 60_000 + b"0]}", "too many values"),
        (b'{"7": "' + b"x" * BODY_BYTES + b'"}', "larger than 4 MiB"),
        (b'{"7": {"handler": {"files_down": {' + b'"a/b": "c",' * 10**6 + b'"z": "z"}}}}', "larger than 4 MiB"),
    ],
    ids=["key", "nan", "id", "infinity", "arrays", "objects", "digits", "values", "size", "files"],
)
def test_a_job_in_json_that_nobody_can_use_is_reported_if_its_id_can_be_read(
    api: ScriptedApi, source: WorkerApi, body: bytes, why: str
) -> None:
    api.then(reply(200, body))
    with pytest.raises(UnreadableJob, match=f"worker cannot read the job: .*{why}") as error:
        source.fetch(OFFER, 0.0)
    assert error.value.lease.job_id == "7"
    assert error.value.lease.settle(FAILED) is Standing.KEEP
    assert [(asked.path, dict(asked.query).get("status")) for asked in api.asked[1:]] == [("/jobs/7/status", "error")]


@pytest.mark.fault("B15")
@pytest.mark.parametrize(
    "body", [b"[" * 10_000, b"[NaN]", b'{"../7": NaN}', b'{"7', b'{"7": {"app": ', b'{"7": "\xff"}']
)
def test_what_was_torn_or_names_no_job_is_asked_for_again(api: ScriptedApi, source: WorkerApi, body: bytes) -> None:
    """An answer that a network cut short is no fault of the job, even where its id can be read."""
    api.then(reply(200, body))
    with pytest.raises(SourceUnavailable, match="not the JSON expected"):
        source.fetch(OFFER, 0.0)


@pytest.mark.fault("B15")
def test_a_huge_refusal_is_still_a_refusal(api: ScriptedApi, client: Client) -> None:
    api.then(reply(404, b"x" * (BODY_BYTES + 1)))
    answer = client.send("PUT", f"{client.base_url}/jobs/7/status")
    assert answer.status == 404
    assert len(answer.words) == 300
    assert len(answer.body) < 200_000
    assert not answer.is_own


@pytest.mark.fault("T15")
def test_a_job_that_must_not_run_here_is_reported_and_not_run(client: Client, api: ScriptedApi, emit: Emitted) -> None:
    source = signed_source(client, emit, Checks(ValueError("it is not signed")))
    api.then(reply(200, json.dumps({"7": GOOD}).encode()))
    with pytest.raises(UnreadableJob, match="it is not signed") as error:
        source.fetch(OFFER, 0.0)
    assert error.value.lease.job_id == "7"
    assert not isinstance(error.value, UnwantedJob)


class Checks(Verifier):
    """A check of signatures that ends as a test wants, and keeps which jobs are said to have ended."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__({}, Rules(frozenset()), Nonces())
        self.error = error
        self.over: list[str] = []

    def check(self, job_id: JobId, specs: Any) -> Mapping[str, str]:
        assert (job_id, specs) == ("7", GOOD)
        if self.error is not None:
            raise self.error
        return {}

    def ended(self, job_id: JobId) -> None:
        self.over.append(job_id)


def signed_source(client: Client, emit: Emitted, checks: Verifier) -> WorkerApi:
    policy = UrlPolicy(parse_origin(client.base_url))
    return WorkerApi(client, policy, wanted=Filter(), emit=emit, signatures=checks)


@pytest.mark.fault("T30", "J5")
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (NotForThisWorker("it is signed for lab-9"), WorkerReason.POLICY),
        (WorkerFault(WorkerReason.DISK, "nothing can be noted"), WorkerReason.DISK),
    ],
)
def test_a_job_that_others_may_run_is_given_back(
    client: Client, api: ScriptedApi, emit: Emitted, error: Exception, reason: WorkerReason
) -> None:
    source = signed_source(client, emit, Checks(error))
    api.then(reply(200, json.dumps({"7": GOOD}).encode()))
    with pytest.raises(UnwantedJob, match=str(error)) as unwanted:
        source.fetch(OFFER, 0.0)
    assert verdict(unwanted.value) is Verdict.GIVE_BACK
    assert outcome_of(unwanted.value).reason is reason
    assert outcome_of(unwanted.value).ending is Ending.WORKER_FAILED


@pytest.mark.fault("T30")
def test_a_signature_is_used_up_by_an_end_that_was_decided_here_and_by_nothing_else(
    client: Client, api: ScriptedApi, emit: Emitted
) -> None:
    checks = Checks()
    source = signed_source(client, emit, checks)
    for last, answer, over in (("release", 204, []), ("settle", 204, ["7"]), ("settle", 404, ["7"])):
        api.then(reply(200, json.dumps({"7": GOOD}).encode()), 204, answer)
        claim = source.fetch(OFFER, 0.0)
        assert claim is not None
        assert claim.lease.beat(Phase.CLAIMED) is Standing.KEEP
        assert checks.over == []
        if last == "release":
            claim.lease.release("no")
        else:
            claim.lease.settle(FAILED)
        assert checks.over == over
        checks.over.clear()


# -- a lease: beats ---------------------------------------------------------------------------------------------------


@pytest.mark.fault("B7")
def test_the_first_404_is_final(api: ScriptedApi, lease: ApiLease) -> None:
    api.then(204, 404)
    assert lease.beat(Phase.CLAIMED) is Standing.KEEP
    assert lease.beat(Phase.RUNNING) is Standing.CANCEL
    assert [lease.beat(Phase.RUNNING), lease.settle(FINISHED), lease.release("x")] == [Standing.CANCEL] * 3
    assert api.said == ["preprocessing", "running"]


@pytest.mark.fault("B8")
def test_the_second_5xx_in_a_row_asks_how_the_job_stands(api: ScriptedApi, lease: ApiLease) -> None:
    api.then(500)
    with pytest.raises(SourceUnavailable):
        lease.beat(Phase.RUNNING)
    api.then(503, 404)
    assert lease.beat(Phase.RUNNING) is Standing.CANCEL
    assert api.said == ["running", "running", "GET"]
    assert lease.beat(Phase.RUNNING) is Standing.CANCEL
    assert len(api.asked) == 3


@pytest.mark.fault("B8")
def test_5xx_of_a_job_that_stands_are_an_outage(api: ScriptedApi, lease: ApiLease) -> None:
    api.then(500, 500, reply(200, b'"running"'), 204, 500, 204)
    for _ in range(2):
        with pytest.raises(SourceUnavailable):
            lease.beat(Phase.RUNNING)
    assert lease.beat(Phase.RUNNING) is Standing.KEEP
    with pytest.raises(SourceUnavailable):
        lease.beat(Phase.RUNNING)  # the count began anew: nothing is asked
    assert api.said == ["running", "running", "GET", "running", "running"]


@pytest.mark.fault("B10")
@pytest.mark.parametrize("status", [409, 410, 412, 422])
def test_an_undecided_answer_asks_how_the_job_stands(api: ScriptedApi, lease: ApiLease, status: int) -> None:
    api.then(status, 404)
    assert lease.beat(Phase.RUNNING) is Standing.CANCEL
    assert api.said == ["running", "GET"]


@pytest.mark.fault("B10")
def test_the_words_of_an_undecided_answer_are_logged_once_and_cleaned(
    api: ScriptedApi, lease: ApiLease, emit: Emitted
) -> None:
    said = b'{"detail": "conflict\\u001b[2J", "more": "\\n' + b"y" * 5000 + b'"}'
    for _ in range(3):
        api.then(reply(409, said), reply(200, b'"running"'))
        with pytest.raises(SourceUnavailable, match="answered 409"):
            lease.beat(Phase.RUNNING)
    [event] = emit.named("update_refused")
    message = str(event["message"])
    assert r"conflict\u001b[2J" in message
    assert len(message.encode()) <= 1024
    assert lease.beat(Phase.RUNNING) is Standing.KEEP  # heartbeats go on
    api.then(reply(409, said), reply(200, b'"running"'))
    with pytest.raises(SourceUnavailable):
        lease.beat(Phase.RUNNING)
    assert len(emit.named("update_refused")) == 2  # a new change of state


@pytest.mark.fault("B10")
@pytest.mark.parametrize("status", [409, 412])
def test_an_end_that_the_api_will_not_take_a_second_time_is_not_repeated(
    api: ScriptedApi, lease: ApiLease, status: int
) -> None:
    lease.beat(Phase.STAGING_OUT)
    api.then(status, reply(200, b'"finished"'))
    assert lease.settle(FINISHED) is Standing.KEEP
    assert lease.settle(FINISHED) is Standing.KEEP
    assert api.said == ["postprocessing", "finished", "GET"]


@pytest.mark.fault("B10")
def test_a_heartbeat_refused_because_the_job_has_ended_ends_it_here(api: ScriptedApi, lease: ApiLease) -> None:
    api.then(409, reply(200, b'"error"'))
    assert lease.beat(Phase.RUNNING) is Standing.LOST
    assert lease.settle(FINISHED) is Standing.LOST
    assert api.said == ["running", "GET"]


@pytest.mark.fault("B10")
def test_an_end_without_words_whose_answer_was_lost_is_in_doubt(
    api: ScriptedApi, lease: ApiLease, clock: FakeClock
) -> None:
    api.then(422, hang_up)
    with pytest.raises(SourceUnavailable):
        lease.settle(FAILED)
    with pytest.raises(SourceUnavailable, match="on its way"):
        lease.settle(FAILED)
    clock.now += 31
    api.then(reply(200, b'"error"'))
    assert lease.settle(FAILED) is Standing.KEEP
    assert api.said == ["error", "error", "GET", "error"]


def test_an_update_that_a_gateway_gave_up_may_still_arrive(api: ScriptedApi, lease: ApiLease) -> None:
    lease.beat(Phase.STAGING_OUT)
    api.then(504)
    with pytest.raises(SourceUnavailable, match="answered 504"):
        lease.beat(Phase.STAGING_OUT)
    with pytest.raises(SourceUnavailable, match="on its way") as wait:
        lease.settle(FINISHED)
    assert wait.value.retry_after_s == pytest.approx(30.0)


@pytest.mark.fault("S6")
def test_no_heartbeat_follows_the_end(api: ScriptedApi, lease: ApiLease) -> None:
    lease.settle(FAILED)
    assert lease.beat(Phase.RUNNING) is Standing.KEEP
    assert api.said == ["error"]


@pytest.mark.fault("B10")
def test_a_422_to_our_words_is_met_without_them(api: ScriptedApi, lease: ApiLease) -> None:
    api.then(422, 204)
    assert lease.settle(FAILED) is Standing.KEEP
    assert [dict(asked.query) for asked in api.asked] == [
        {"status": "error", "runtime_details": "exit code 3"},
        {"status": "error"},
    ]


def test_a_job_that_is_run_again_does_not_go_backwards(api: ScriptedApi, lease: ApiLease) -> None:
    for phase in (Phase.STAGING_IN, Phase.RUNNING, Phase.STAGING_IN, Phase.RUNNING, Phase.STAGING_OUT):
        lease.beat(phase)
    assert api.said == ["preprocessing", "running", "running", "running", "postprocessing"]


@pytest.mark.fault("B4")
@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_never_cancels(api: ScriptedApi, lease: ApiLease, status: int) -> None:
    for _ in range(5):
        api.then(status)
        with pytest.raises(SourceRefused):
            lease.beat(Phase.RUNNING)
    assert lease.beat(Phase.RUNNING) is Standing.KEEP


@pytest.mark.fault("J3")
@pytest.mark.fault("S9")
def test_two_threads_never_send_two_updates_at_once(api: ScriptedApi, lease: ApiLease) -> None:
    inside, overlaps, lock = [0], [0], threading.Lock()

    def busy(connection: Any) -> None:
        with lock:
            inside[0] += 1
            overlaps[0] += inside[0] > 1
        time.sleep(0.01)  # long enough for another to come
        with lock:
            inside[0] -= 1
        connection.sendall(head(204, 0))

    api.default = busy
    threads = [threading.Thread(target=lease.beat, args=(Phase.RUNNING,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(api.asked) == 8
    assert overlaps == [0]


# -- a lease: the end -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcome", "query"),
    [
        (FINISHED, {"status": "finished"}),
        (
            Outcome(Ending.FINISHED, None, "not uploaded: a"),
            {"status": "finished", "runtime_details": "not uploaded: a"},
        ),
        (FAILED, {"status": "error", "runtime_details": "exit code 3"}),
        (Outcome(), {"status": "error", "runtime_details": Outcome().message}),
    ],
)
def test_an_end_is_told_once(api: ScriptedApi, lease: ApiLease, outcome: Outcome, query: dict[str, str]) -> None:
    lease.beat(Phase.STAGING_OUT)
    for _ in range(3):
        assert lease.settle(outcome) is Standing.KEEP
    lease.release("no")
    assert [dict(asked.query) for asked in api.asked[1:]] == [query]


def test_finished_is_said_only_after_the_upload_was(api: ScriptedApi, lease: ApiLease) -> None:
    """The server was away while the job went on; its words in between were never heard."""
    lease.beat(Phase.STAGING_IN)
    lease.settle(FINISHED)
    assert api.said == ["preprocessing", "postprocessing", "finished"]


@pytest.mark.fault("B7")
def test_a_job_that_is_gone_by_then_is_not_finished(api: ScriptedApi, lease: ApiLease) -> None:
    api.then(404)
    assert lease.settle(FINISHED) is Standing.CANCEL
    assert api.said == ["postprocessing"]


@pytest.mark.fault("T17")
def test_details_are_short_and_harmless(api: ScriptedApi, lease: ApiLease) -> None:
    message = "<script>\x1b[2J\n&" + "ä" * 3000
    lease.settle(Outcome(Ending.JOB_FAILED, JobReason.EXIT_CODE, message))
    details = dict(api.asked[0].query)["runtime_details"]
    assert len(details.encode()) <= 1500  # S12
    assert details.isprintable()
    assert not set(details) & set("<>&")  # S11


def test_beats_carry_no_details(api: ScriptedApi, lease: ApiLease) -> None:
    lease.beat(Phase.RUNNING)
    assert api.asked[0].query == (("status", "running"),)  # S11


@pytest.mark.fault("A7")
def test_after_a_lost_answer_the_end_is_told_again_whatever_the_state_says(
    api: ScriptedApi, lease: ApiLease, clock: FakeClock
) -> None:
    lease.beat(Phase.STAGING_OUT)
    api.then(hang_up)
    with pytest.raises(SourceUnavailable):
        lease.settle(FINISHED)
    with pytest.raises(SourceUnavailable, match="on its way") as wait:  # it may still be on its way
        lease.settle(FINISHED)
    assert wait.value.retry_after_s == pytest.approx(30.0)
    clock.now += 31
    api.then(reply(200, b'"finished"'))
    assert [lease.settle(FINISHED), lease.settle(FINISHED)] == [Standing.KEEP] * 2
    assert api.said == ["postprocessing", "finished", "GET", "finished"]  # and nothing that would open it again (S6)


@pytest.mark.parametrize("end", [FINISHED, FAILED])
def test_no_end_is_told_while_a_heartbeat_may_still_be_on_its_way(
    api: ScriptedApi, lease: ApiLease, clock: FakeClock, end: Outcome
) -> None:
    """S6: a heartbeat that arrives after the end would open the job again."""
    lease.beat(Phase.STAGING_OUT)
    api.then(hang_up)
    with pytest.raises(SourceUnavailable):
        lease.beat(Phase.STAGING_OUT)
    clock.now += 12
    with pytest.raises(SourceUnavailable, match="on its way") as wait:
        lease.settle(end)
    assert wait.value.retry_after_s == pytest.approx(18.0)
    clock.now += 19
    assert lease.settle(end) is Standing.KEEP
    assert api.said[:2] == ["postprocessing", "postprocessing"]
    assert len(api.said) == 3


@pytest.mark.fault("C7")
@pytest.mark.parametrize("status", [400, 409, 422])
def test_a_definite_no_to_a_file_is_the_jobs_fault_at_once(api: ScriptedApi, lease: ApiLease, status: int) -> None:
    api.then(status)
    with pytest.raises(JobFault, match=f"refuses input a/b with {status}") as fault:
        lease.sign_input(parse_file_ref("a/b"))
    assert fault.value.reason is JobReason.INPUT_MISSING
    api.then(status)
    with pytest.raises(JobFault, match=f"refuses output x with {status}"):
        lease.sign_output(OutputKind.OUTPUT, "out", "x")


@pytest.mark.fault("B6")
def test_a_403_to_a_file_is_the_accounts_where_the_status_is_refused_too(api: ScriptedApi, lease: ApiLease) -> None:
    api.then(403, 403)
    with pytest.raises(SourceRefused):
        lease.sign_input(parse_file_ref("a"))
    api.then(403, reply(200, b'"running"'))
    with pytest.raises(JobFault, match="refuses input a with 403"):
        lease.sign_input(parse_file_ref("a"))


@pytest.mark.fault("A7")
def test_after_a_lost_request_the_end_is_told_again(api: ScriptedApi, lease: ApiLease, clock: FakeClock) -> None:
    lease.beat(Phase.STAGING_OUT)
    api.then(hang_up)
    with pytest.raises(SourceUnavailable):
        lease.settle(FINISHED)
    clock.now += 31
    api.then(reply(200, b'"postprocessing"'), 204)
    assert lease.settle(FINISHED) is Standing.KEEP
    assert api.said == ["postprocessing", "finished", "GET", "finished"]


@pytest.mark.fault("A7", "B23", "S19")
@pytest.mark.parametrize("end", [FINISHED, FAILED])
def test_an_end_that_was_committed_and_answered_500_is_told_until_it_is_accepted(
    api: ScriptedApi, lease: ApiLease, clock: FakeClock, end: Outcome
) -> None:
    """The state says that it was heard, and the user's side never was told."""
    lease.beat(Phase.STAGING_OUT)
    word = "finished" if end is FINISHED else "error"
    api.asked.clear()
    waits = []
    for number in range(12):
        api.then(*([reply(200, f'"{word}"'.encode())] if number else []), 500)
        if number:
            api.then(reply(200, f'"{word}"'.encode()))  # the second 5xx in a row asks as well (S7)
        with pytest.raises(SourceUnavailable, match="500") as error:
            lease.settle(end)
        asked = len(api.asked)
        with pytest.raises(TooSoon) as rests:
            lease.settle(end)
        assert len(api.asked) == asked
        assert error.value.retry_after_s == rests.value.retry_after_s
        waits.append(rests.value.retry_after_s)
        clock.now += rests.value.retry_after_s or 0
    assert waits == [2, 4, 8, 16, 32, 64, 128, 256, 300, 300, 300, 300]  # S11: each repeat may be one more mail
    api.then(reply(200, f'"{word}"'.encode()))
    assert [lease.settle(end), lease.settle(end)] == [Standing.KEEP] * 2
    assert set(api.said) == {"GET", word}
    assert api.said.count(word) == 13


@pytest.mark.fault("A7", "B23")
def test_a_release_that_was_committed_and_answered_500_is_told_again(
    api: ScriptedApi, lease: ApiLease, clock: FakeClock
) -> None:
    api.then(500)
    with pytest.raises(SourceUnavailable):
        lease.release("x")
    clock.now += 2
    api.then(reply(200, b'"queued"'), 204)
    assert lease.release("x") is Standing.KEEP
    assert api.said == ["queued", "GET", "queued"]


@pytest.mark.fault("B8", "B23", "S7")
def test_an_end_of_a_job_that_was_deleted_meanwhile_is_not_told_for_ever(
    api: ScriptedApi, lease: ApiLease, clock: FakeClock
) -> None:
    lease.beat(Phase.STAGING_OUT)
    api.then(500)
    with pytest.raises(SourceUnavailable):
        lease.settle(FINISHED)
    clock.now += 2
    api.then(404)
    assert [lease.settle(FINISHED), lease.settle(FINISHED)] == [Standing.CANCEL] * 2
    assert api.said == ["postprocessing", "finished", "GET"]


@pytest.mark.fault("B18", "B23")
def test_an_end_of_a_job_that_another_account_took_meanwhile_is_not_told_for_ever(
    api: ScriptedApi, lease: ApiLease, clock: FakeClock
) -> None:
    lease.beat(Phase.STAGING_OUT)
    api.then(hang_up)
    with pytest.raises(SourceUnavailable):
        lease.settle(FINISHED)
    clock.now += 400
    api.then(reply(200, b'"postprocessing"'), 404)
    assert [lease.settle(FINISHED), lease.settle(FINISHED)] == [Standing.CANCEL] * 2
    assert api.said == ["postprocessing", "finished", "GET", "postprocessing"]


@pytest.mark.fault("S6")
def test_no_heartbeat_follows_an_end_that_was_not_accepted(api: ScriptedApi, lease: ApiLease) -> None:
    api.then(500)
    with pytest.raises(SourceUnavailable):
        lease.settle(FAILED)
    assert lease.beat(Phase.RUNNING) is Standing.KEEP
    assert api.said == ["error"]


@pytest.mark.fault("A7", "S6")
def test_an_end_to_which_a_gateway_gave_up_may_still_arrive(
    api: ScriptedApi, lease: ApiLease, clock: FakeClock
) -> None:
    api.then(502)
    with pytest.raises(ForeignAnswer):
        lease.settle(FAILED)
    with pytest.raises(TooSoon, match="on its way"):
        lease.settle(FAILED)
    clock.now += 31
    api.then(reply(200, b'"error"'))
    assert lease.settle(FAILED) is Standing.KEEP
    assert api.said == ["error", "GET", "error"]


@pytest.mark.fault("B10", "B21")
@pytest.mark.parametrize("status", [400, 403, 413, 414])
def test_an_end_whose_words_a_filter_refuses_is_told_without_them(
    api: ScriptedApi, lease: ApiLease, status: int
) -> None:
    """What a failed job printed last travels in the address, and may look like an attack."""
    api.then(reply(status, b"<html>Request blocked</html>", content_type="text/html"), 204)
    assert lease.settle(FAILED) is Standing.KEEP
    assert [dict(asked.query) for asked in api.asked] == [
        {"status": "error", "runtime_details": "exit code 3"},
        {"status": "error"},
    ]


def test_a_refused_end_was_not_heard_and_is_told_again_at_once(api: ScriptedApi, lease: ApiLease) -> None:
    api.then(403)
    with pytest.raises(SourceRefused):
        lease.settle(FAILED)
    assert lease.settle(FAILED) is Standing.KEEP
    assert api.said == ["error", "error"]


@pytest.mark.fault("J4")
@pytest.mark.parametrize(("age_s", "asked"), [(299.0, []), (301.0, ["GET"])])
def test_an_old_lease_asks_first(
    api: ScriptedApi, lease: ApiLease, clock: FakeClock, age_s: float, asked: list[str]
) -> None:
    """The lease counts from the question that brought the job, and from each accepted update (S4)."""
    clock.now += age_s
    api.then(*[reply(200, b'"queued"') for _ in asked])
    lease.settle(FAILED)
    assert api.said == [*asked, "error"]


def test_an_accepted_beat_renews_the_lease_and_a_failed_one_does_not(
    api: ScriptedApi, lease: ApiLease, clock: FakeClock
) -> None:
    clock.now += 200
    lease.beat(Phase.RUNNING)
    clock.now += 200
    api.then(hang_up)
    with pytest.raises(SourceUnavailable):
        lease.beat(Phase.RUNNING)
    clock.now += 150
    api.then(reply(200, b'"running"'))
    lease.settle(FINISHED)
    assert api.said == ["running", "running", "GET", "postprocessing", "finished"]


@pytest.mark.fault("B18")
def test_an_old_lease_of_a_job_that_is_gone_ends_in_silence(
    api: ScriptedApi, lease: ApiLease, clock: FakeClock
) -> None:
    clock.now += 400
    api.then(404)
    assert lease.settle(FINISHED) is Standing.CANCEL
    assert lease.settle(FINISHED) is Standing.CANCEL
    assert api.said == ["GET"]


@pytest.mark.fault("A7")
@pytest.mark.parametrize("state", ["finished", "error"])
def test_a_lease_from_an_earlier_process_asks_first(api: ScriptedApi, source: WorkerApi, state: str) -> None:
    lease = source.resume(api.url, SEVEN)
    assert api.asked == []
    api.then(reply(200, json.dumps(state).encode()))
    assert [lease.settle(FINISHED), lease.settle(FINISHED)] == [Standing.KEEP] * 2
    assert api.said == ["GET", "finished"]


@pytest.mark.parametrize(("state", "said"), [("queued", ["GET", "queued"]), ("finished", ["GET"])])
def test_a_release_is_repeated_unless_the_job_has_ended(
    api: ScriptedApi, source: WorkerApi, state: str, said: list[str]
) -> None:
    lease = source.resume(api.url, SEVEN)
    api.then(reply(200, json.dumps(state).encode()))
    assert lease.release("restarted") is Standing.KEEP
    assert api.said == said


@pytest.mark.parametrize("spelling", ["{0}/", "HTTP://127.0.0.1:{1}", "http://127.0.0.1.:{1}//"])
def test_a_lease_whose_server_was_spelt_another_way_is_ours(api: ScriptedApi, source: WorkerApi, spelling: str) -> None:
    assert source.resume(spelling.format(api.url, api.url.rpartition(":")[2]), SEVEN).job_id == SEVEN


def test_a_lease_of_another_server_is_refused(source: WorkerApi) -> None:
    with pytest.raises(ConfigError, match=r"old\.example.*API_URL"):
        source.resume("https://old.example", SEVEN)


# -- files ------------------------------------------------------------------------------------------------------------


def signed(method: str = "get", **more: Any) -> bytes:
    return json.dumps({"method": method, "url": "https://storage.example/x", "headers": {}, "data": {}} | more).encode()


@pytest.mark.fault("T9")
@pytest.mark.parametrize(
    ("ref", "path"),
    [
        ("s3://bucket/key", "/files/s3%3A//bucket/key/url"),
        ("/data/user/a.tif", "/files//data/user/a.tif/url"),
        ("a?b#c", "/files/a%3Fb%23c/url"),
        ("%2e%2e/x", "/files/%252e%252e/x/url"),
        ("..%2f", "/files/..%252f/url"),
        ("a b/ä", "/files/a%20b/%C3%A4/url"),
        ("a;b/c&d=e", "/files/a%3Bb/c%26d%3De/url"),
        ("...", "/files/.../url"),
    ],
)
def test_a_file_id_reaches_one_endpoint_only(api: ScriptedApi, lease: ApiLease, ref: str, path: str) -> None:
    api.then(reply(200, signed()))
    lease.sign_input(parse_file_ref(ref))
    assert (api.asked[0].method, api.asked[0].path, api.asked[0].query) == ("GET", path, ())


@pytest.mark.fault("C19")
@pytest.mark.parametrize(
    "name", ["c#d.txt", "q?r.txt", "e%20f.txt", "100%.txt", "a b.txt", "gr\u00fcn.txt", "a+b&c=d.txt", "url"]
)
def test_a_link_made_of_the_decoded_address_of_the_question_is_encoded_as_the_question_was(
    api: ScriptedApi, lease: ApiLease, name: str
) -> None:
    # word for word what a local-disk server answers: its own decoded address with /download for /url
    api.then(reply(200, signed(url=f"{api.url}/files//data/user/{name}/download")))
    request = lease.sign_input(parse_file_ref(f"/data/user/{name}"))
    assert request.url == f"{api.url}{api.asked[0].path.removesuffix('/url')}/download"


@pytest.mark.fault("C19")
@pytest.mark.parametrize(
    "rest", ["/files/other#x/download", "/files/a#b/c/download", "/x?to=/files/a#b/download", "/a#b"]
)
def test_a_link_to_anything_else_stays_as_the_server_wrote_it(api: ScriptedApi, lease: ApiLease, rest: str) -> None:
    api.then(reply(200, signed(url=f"https://storage.example{rest}")))
    assert lease.sign_input(parse_file_ref("a#b")).url == f"https://storage.example{rest}"


@pytest.mark.fault("C7")
def test_an_input_that_the_server_does_not_know_is_missing_not_cancelled(api: ScriptedApi, lease: ApiLease) -> None:
    api.then(404)
    with pytest.raises(JobFault, match="does not exist") as fault:
        lease.sign_input(parse_file_ref("s3://b/k"))
    assert fault.value.reason is JobReason.INPUT_MISSING
    assert lease.beat(Phase.STAGING_IN) is Standing.KEEP


@pytest.mark.fault("T6")
@pytest.mark.parametrize("name", ["verify", "proxies", "auth", "cert", "hooks", "allow_redirects", "timeout", "json"])
def test_what_is_no_part_of_a_signed_request_is_dropped(
    api: ScriptedApi, lease: ApiLease, emit: Emitted, name: str
) -> None:
    api.then(reply(200, signed(**{name: "evil"})))
    request = lease.sign_input(parse_file_ref("s3://b/k"))
    assert name in request.ignored
    assert request.headers == request.fields == ()
    assert emit.named("request_fields_ignored")


@pytest.mark.fault("T6")
@pytest.mark.parametrize("method", ["put", "post", "delete", "", "get\r\nx"])
def test_an_input_is_fetched_and_nothing_else(api: ScriptedApi, lease: ApiLease, method: str) -> None:
    api.then(reply(200, signed(method)))
    with pytest.raises(JobFault) as fault:
        lease.sign_input(parse_file_ref("s3://b/k"))
    assert fault.value.reason is JobReason.UNSAFE_REQUEST


@pytest.mark.fault("T8")
def test_a_token_in_the_answer_goes_to_the_api_only(api: ScriptedApi, lease: ApiLease) -> None:
    given = {"Authorization": f"Bearer {TOKEN}", "X-Evil": "1", "x-amz-acl": "private", "nested": {"a": "b"}}
    api.then(reply(200, signed(headers=given)), reply(200, signed(headers=given, url=f"{api.url}/files/x/download")))
    elsewhere = lease.sign_input(parse_file_ref("a"))
    here = lease.sign_input(parse_file_ref("a"))
    assert dict(elsewhere.headers) == {"x-amz-acl": "private"}
    assert dict(here.headers) == {"Authorization": f"Bearer {TOKEN}", "x-amz-acl": "private"}


def test_a_form_serves_its_folder_and_is_renewed_in_time(api: ScriptedApi, lease: ApiLease, clock: FakeClock) -> None:
    api.default = reply(201, signed("post", data={"key": "x"}))
    for name in "abc":
        assert lease.sign_output(OutputKind.OUTPUT, "out", name).method is Method.POST
    assert len(api.asked) == 1
    assert api.asked[0].path == "/jobs/7/files/url"
    assert api.asked[0].query == (("type", "output"), ("base_path", "out"), ("filename", "a"))
    lease.sign_output(OutputKind.OUTPUT, "out/deep", "a")
    lease.sign_output(OutputKind.LOG, "out", "a")
    assert len(api.asked) == 3
    clock.now += 240
    lease.beat(Phase.STAGING_OUT)
    clock.now += 239
    lease.sign_output(OutputKind.OUTPUT, "out", "d")
    assert api.said == ["POST"] * 3 + ["postprocessing"]
    clock.now += 2
    lease.sign_output(OutputKind.OUTPUT, "out", "e")
    assert len(api.asked) == 5
    lease.sign_output(OutputKind.OUTPUT, "out", "e", renew=True)
    assert len(api.asked) == 6


def test_a_put_is_for_one_object(api: ScriptedApi, lease: ApiLease) -> None:
    api.default = reply(201, signed("put"))
    for name in "abc":
        assert lease.sign_output(OutputKind.OUTPUT, "", name).method is Method.PUT
    assert [dict(asked.query)["filename"] for asked in api.asked] == ["a", "b", "c"]
    assert dict(api.asked[0].query)["base_path"] == ""


@pytest.mark.fault("B2", "C2")
def test_a_500_to_one_link_is_no_outage_while_keep_alives_are_accepted(
    api: ScriptedApi, lease: ApiLease, clock: FakeClock
) -> None:
    def asked_for_a_link() -> SourceUnavailable:
        with pytest.raises(SourceUnavailable) as error:
            lease.sign_input(parse_file_ref("s3://b/in"))
        return error.value

    api.then(500)
    assert asked_for_a_link().only_this
    api.then(reply(500, b"<html>no</html>", content_type="text/html"))
    assert not asked_for_a_link().only_this, "a page is not the API's word"
    api.then(429)
    assert not asked_for_a_link().only_this, "it asks for patience"
    clock.now += 301
    api.then(500)
    assert not asked_for_a_link().only_this, "nothing else was accepted for as long as a lease lasts"
    api.then(reply(200, b'"preprocessing"'), 204, 500)
    assert lease.beat(Phase.CLAIMED) is Standing.KEEP
    assert asked_for_a_link().only_this


@pytest.mark.fault("S8")
@pytest.mark.parametrize("status", [500, 404])
def test_an_upload_refused_for_a_lost_lease_ends_the_job(api: ScriptedApi, lease: ApiLease, status: int) -> None:
    api.then(status, 404)
    with pytest.raises(Stopped):
        lease.sign_output(OutputKind.OUTPUT, "out", "a")
    assert lease.settle(FINISHED) is Standing.CANCEL
    assert api.said == ["POST", "GET"]


@pytest.mark.fault("S8")
def test_an_upload_refused_because_another_account_has_the_job_ends_it(api: ScriptedApi, lease: ApiLease) -> None:
    api.then(500, reply(200, b'"running"'), 404)  # its state may be asked for by anyone
    with pytest.raises(Stopped):
        lease.sign_output(OutputKind.OUTPUT, "out", "a")
    assert api.said == ["POST", "GET", "postprocessing"]


def test_an_upload_refused_by_a_server_in_trouble_may_be_tried_again(api: ScriptedApi, lease: ApiLease) -> None:
    api.then(500, reply(200, b'"postprocessing"'))
    with pytest.raises(SourceUnavailable, match="answered 500"):
        lease.sign_output(OutputKind.OUTPUT, "out", "a")
    assert api.said == ["POST", "GET", "postprocessing"]
