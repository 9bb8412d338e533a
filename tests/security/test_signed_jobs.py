"""A worker with JOB_SIGNING_KEYS runs what was signed, as it was signed, under the id it was signed for (T15); for
whom, until when, once, and with the inputs that were meant (T30)."""

from __future__ import annotations

import base64
import contextlib
import copy
import errno
import hashlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from jobfetcher.core.errors import ConfigError, SourceError, UnreadableJob, WorkerFault, WorkerReason
from jobfetcher.core.job import JobId, parse_job_id
from jobfetcher.core.machine import Offer, Share
from jobfetcher.core.phases import Phase
from jobfetcher.core.ports import Claim, Standing
from jobfetcher.core.run import Ending, Image, Outcome
from jobfetcher.core.text import clean
from jobfetcher.core.urls import UrlPolicy
from jobfetcher.journal import Journal
from jobfetcher.outbox import Outbox
from jobfetcher.sources.worker_api.nonces import NAME, Nonces
from jobfetcher.sources.worker_api.signing import Keys, NotForThisWorker, Rules, Verifier, read_keys, sign
from jobfetcher.sources.worker_api.source import Filter, WorkerApi
from jobfetcher.sources.worker_api.wire import parse_specs
from jobfetcher.testing.fake_engine import FakeEngine
from jobfetcher.workspace import Base
from tests.fuzz.hostile import fuzz, values
from tests.support.jobs import Emitted, FakeClock
from tests.support.mounts import needs_root
from tests.support.scripted_api import Answer, ScriptedApi, hang_up, reply, scripted_api
from tests.support.talk import client_of
from tests.support.worker import Lab, work

SEVEN, EIGHT = parse_job_id("7"), parse_job_id("8")
OURS, THEIRS = bytes(range(32)), bytes(range(32, 64))

Specs = dict[str, Any]


def public(private: bytes) -> bytes:
    return Ed25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


KEYS: Keys = {"lab": public(OURS), "old": public(bytes(32))}


def specs() -> Specs:
    return {
        "app": {"cmd": ["prog --in", "/files/in/a"], "env": {"A": "b", "Ü": "ä"}},
        "handler": {
            "image_url": "registry.example/decode@sha256:" + "0" * 64,
            "image_name": "decode",
            "entrypoint": "fit",
            "files_down": {"in/a": "s3://bucket/a", "in/b": "s3://bucket/b"},
            "files_up": {"output": "out", "log": "log"},
        },
        "hardware": {"memory": 1024, "cpu_cores": None},
        "meta": {"job_id": 7, "date_created": "2024-01-01"},
    }


#: A moment at which these tests play, and for whom jobs are signed.
NOW, HOUR, DAY = 1_800_000_000, 3600, 86_400
OUR_API = "https://jobs.example.org"
RULES = Rules(frozenset({OUR_API}))


def signed(job: str = "7", private: bytes = OURS, key: str = "lab", **terms: Any) -> Specs:
    made = specs()
    all_terms: dict[str, Any] = {"audience": [OUR_API], "expires": NOW + HOUR} | terms
    made["meta"]["signature"] = sign(private, key, parse_job_id(job), made, **all_terms)
    return made


def signed_before(job: str = "7") -> Specs:
    """As version 1 was: written out by hand, since nothing makes it any more."""
    made = specs()
    text = {
        "job_id": job,
        "image": made["handler"]["image_url"],
        **{name: made["app"][name] for name in ("cmd", "env")},
        **{name: made["handler"][name] for name in ("files_down", "files_up")},
    }
    value = raw_signature(json.dumps(text, sort_keys=True, separators=(",", ":"), ensure_ascii=False))
    made["meta"]["signature"] = {"key": "lab", "value": value}
    return made


def raw_signature(text: str) -> str:
    return base64.b64encode(Ed25519PrivateKey.from_private_bytes(OURS).sign(text.encode())).decode()


def verifier(rules: Rules = RULES, now: float = NOW, nonces: Nonces | None = None) -> Verifier:
    return Verifier(KEYS, rules, nonces or Nonces(now=lambda: now), lambda: now)


def verify(keys: Keys, job_id: JobId, made: Any) -> None:
    """Check one signature by itself."""
    Verifier(keys, RULES, Nonces(now=lambda: NOW), lambda: NOW).check(job_id, made)


@pytest.mark.fault("T15")
def test_a_signed_job_is_taken_and_only_under_its_own_id() -> None:
    verify(KEYS, SEVEN, signed())
    verify(KEYS, SEVEN, signed(private=bytes(32), key="old"))
    with pytest.raises(ValueError, match="belongs to another job"):
        verify(KEYS, EIGHT, signed())


@pytest.mark.fault("T15")
def test_the_signed_bytes_are_what_the_docstring_says() -> None:
    """Written out by hand here, because servers in other languages have to make the same bytes."""
    text = (
        '{"audience":["https://jobs.example.org"],"cmd":["prog --in","/files/in/a"],"env":{"A":"b","Ü":"ä"},'
        '"expires":1800003600,"files_down":{"in/a":"s3://bucket/a","in/b":"s3://bucket/b"},'
        '"files_up":{"log":"log","output":"out"},'
        f'"image":"registry.example/decode@sha256:{"0" * 64}","inputs":{{"in/a":"sha256:{"1" * 64}"}},"job_id":"7",'
        '"nonce":"0123456789abcdef","version":2}'
    )
    terms: dict[str, Any] = {
        "version": 2,
        "audience": [OUR_API],
        "expires": NOW + HOUR,
        "nonce": "0123456789abcdef",
        "inputs": {"in/a": f"sha256:{'1' * 64}"},
    }
    said = {name: terms[name] for name in ("audience", "expires", "nonce", "inputs")}
    assert sign(OURS, "lab", SEVEN, specs(), **said) == {"key": "lab", "value": raw_signature(text), **terms}
    bare = (
        '{"audience":["https://jobs.example.org"],"cmd":null,"env":null,"expires":1800003600,"files_down":null,'
        f'"files_up":null,"image":"b@sha256:{"0" * 64}","inputs":null,"job_id":"7",'
        '"nonce":"0123456789abcdef","version":2}'
    )
    signature = {"key": "lab", "value": raw_signature(bare), **terms, "inputs": None}
    handler = {"image_url": f"b@sha256:{'0' * 64}"}
    verify(KEYS, SEVEN, {"app": None, "handler": handler, "meta": {"signature": signature}})


def test_what_a_server_adds_or_says_otherwise_does_not_matter() -> None:
    made = signed()
    made["meta"]["date_created"] = "2030-01-01"
    made["hardware"] = None
    made["handler"] |= {"entrypoint": "train", "image_name": "another"}  # labels: nothing of them runs
    made["more"] = {"new": [1]}
    made["handler"] = dict(reversed(made["handler"].items()))
    verify(KEYS, SEVEN, json.loads(json.dumps(made)))


CHANGES: dict[str, Callable[[Specs], object]] = {
    "image": lambda made: made["handler"].update(image_url="registry.example/evil"),
    "tag instead of digest": lambda made: made["handler"].update(image_url="registry.example/decode"),
    "command": lambda made: made["app"]["cmd"].append("; rm -rf /"),
    "command joined": lambda made: made["app"].update(cmd=[" ".join(made["app"]["cmd"])]),
    "no command": lambda made: made["app"].update(cmd=None),
    "command removed": lambda made: made["app"].pop("cmd"),
    "no app": lambda made: made.update(app=None),
    "variable added": lambda made: made["app"]["env"].update(LD_PRELOAD="/files/in/a"),
    "variable changed": lambda made: made["app"]["env"].update(A="c"),
    "no variables": lambda made: made["app"].update(env={}),
    "another input": lambda made: made["handler"]["files_down"].update({"in/a": "s3://bucket/evil"}),
    "inputs swapped": lambda made: made["handler"].update(
        files_down={"in/a": "s3://bucket/b", "in/b": "s3://bucket/a"}
    ),
    "input added": lambda made: made["handler"]["files_down"].update({"in/c": "s3://bucket/c"}),
    "input renamed": lambda made: made["handler"]["files_down"].update(x=made["handler"]["files_down"].pop("in/a")),
    "another output": lambda made: made["handler"]["files_up"].update(output="in"),
    "output removed": lambda made: made["handler"].update(files_up=None),
}


@pytest.mark.fault("T15")
@pytest.mark.parametrize("change", CHANGES)
def test_a_job_that_was_changed_after_signing_is_refused(change: str) -> None:
    made = signed()
    before = parse_specs(SEVEN, copy.deepcopy(made))
    CHANGES[change](made)
    assert parse_specs(SEVEN, copy.deepcopy(made)) != before  # it would run something else
    with pytest.raises(ValueError, match="it was changed"):
        verify(KEYS, SEVEN, made)


def _no_signature(made: Specs) -> None:
    del made["meta"]["signature"]


def _rewrite(made: Specs, change: Callable[[str], str]) -> None:
    made["meta"]["signature"]["value"] = change(made["meta"]["signature"]["value"])


SIGNATURES: dict[str, tuple[Callable[[Specs], object], str]] = {
    "none": (_no_signature, "not signed"),
    "null": (lambda made: made["meta"].update(signature=None), "not signed"),
    "no meta": (lambda made: made.update(meta=None), "not signed"),
    "meta a list": (lambda made: made.update(meta=[made["meta"]]), "not signed"),
    "a string": (lambda made: made["meta"].update(signature="trust me"), "not signed"),
    "no value": (lambda made: made["meta"]["signature"].pop("value"), "not signed"),
    "value a number": (lambda made: made["meta"]["signature"].update(value=1), "not signed"),
    "value a list": (lambda made: made["meta"]["signature"].update(value=["x"]), "not signed"),
    "no key": (lambda made: made["meta"]["signature"].pop("key"), "not signed"),
    "key a list": (lambda made: made["meta"]["signature"].update(key=["lab"]), "not signed"),
    "unknown key": (lambda made: made["meta"]["signature"].update(key="evil\r\n"), "does not know"),
    "another known key": (lambda made: made["meta"]["signature"].update(key="old"), "was changed"),
    "empty": (lambda made: made["meta"]["signature"].update(value=""), "was changed"),
    "zeros": (lambda made: made["meta"]["signature"].update(value="A" * 86 + "=="), "was changed"),
    "no base64": (lambda made: made["meta"]["signature"].update(value="ä" * 88), "was changed"),
    "too long": (lambda made: made["meta"]["signature"].update(value="A" * 10**7), "was changed"),
    "cut": (
        lambda made: made["meta"]["signature"].update(value=made["meta"]["signature"]["value"][:-4]),
        "was changed",
    ),
    "followed by more": (
        lambda made: made["meta"]["signature"].update(value=made["meta"]["signature"]["value"] + "AAAA"),
        "was changed",
    ),
    "by somebody else": (
        lambda made: made["meta"].update(
            signature=sign(THEIRS, "lab", SEVEN, made, audience=[OUR_API], expires=NOW + HOUR)
        ),
        "was changed",
    ),
    "no audience": (lambda made: made["meta"]["signature"].pop("audience"), "was changed"),
    "another audience": (lambda made: made["meta"]["signature"].update(audience=["https://x.example"]), "was changed"),
    "later": (lambda made: made["meta"]["signature"].update(expires=NOW + DAY), "was changed"),
    "another nonce": (lambda made: made["meta"]["signature"].update(nonce="f" * 32), "was changed"),
    "hashes added": (
        lambda made: made["meta"]["signature"].update(inputs={"in/a": f"sha256:{'1' * 64}"}),
        "was changed",
    ),
    "as if of version 1": (lambda made: made["meta"]["signature"].pop("version"), "was changed"),
    "version 3": (lambda made: made["meta"]["signature"].update(version=3), "does not know"),
    "version true": (lambda made: made["meta"]["signature"].update(version=True), "does not know"),
    "version a list": (lambda made: made["meta"]["signature"].update(version=[[2]]), "does not know"),
    "elsewhere": (lambda made: made.update(signature=made["meta"].pop("signature")), "not signed"),
}


@pytest.mark.fault("T15", "T22")
@pytest.mark.parametrize("case", SIGNATURES)
def test_a_job_without_a_good_signature_is_refused(case: str) -> None:
    made = signed()
    change, said = SIGNATURES[case]
    change(made)
    with pytest.raises(ValueError, match=said) as refused:
        verify(KEYS, SEVEN, made)
    assert str(refused.value) == clean(str(refused.value), 300)


@pytest.mark.fault("T15")
@fuzz(200)
@given(values | st.fixed_dictionaries({"meta": values, "handler": values, "app": values}), values)
def test_nothing_made_up_is_taken(raw: Any, value: Any) -> None:
    for made in (raw, {**signed(), "handler": value}, {**signed(), "app": value}):
        with pytest.raises(ValueError, match="sign"):
            verify(KEYS, SEVEN, made)


@pytest.mark.fault("T15")
def test_a_job_too_deep_to_be_written_is_refused() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    made = signed()
    made["app"]["cmd"] = deep
    with pytest.raises(ValueError, match="was changed"):
        verify(KEYS, SEVEN, made)


# -- for whom, until when, once, and with which inputs ----------------------------------------------------------------


@pytest.mark.fault("T30")
def test_a_job_for_others_is_given_back_and_not_failed() -> None:
    """The signature is good: those it is for may run the job."""
    with pytest.raises(NotForThisWorker, match=r"signed for lab-9, and this worker is https://jobs\.example\.org"):
        verifier().check(SEVEN, signed(audience=["lab-9"]))
    with pytest.raises(NotForThisWorker, match="signed for nobody"):
        verifier().check(SEVEN, signed(audience=[]))
    with pytest.raises(NotForThisWorker):  # the owner's names take the place of the API's
        verifier(Rules(frozenset({"lab-9"}))).check(SEVEN, signed())
    verifier(Rules(frozenset({"lab-9", "gpus"}))).check(SEVEN, signed(audience=["cpus", "gpus"]))


@pytest.mark.fault("T30")
@pytest.mark.parametrize(
    ("now", "said"),
    [
        (NOW, ""),
        (NOW + HOUR + 299, ""),  # clocks differ
        (NOW + HOUR + 301, "ran out 5 min ago"),
        (NOW + 10 * DAY, r"ran out 10\.0 days ago"),
        (NOW - 91 * DAY, "more than 90 days"),
        (NOW - 89 * DAY, ""),
    ],
)
def test_a_signature_holds_until_it_expires(now: float, said: str) -> None:
    if not said:
        verifier(now=now).check(SEVEN, signed())
        return
    with pytest.raises(ValueError, match=said):
        verifier(now=now).check(SEVEN, signed())


def nonces_in(base: Path, now: Callable[[], float]) -> Nonces:
    return Nonces(lambda: base, now)


@pytest.mark.fault("T30")
def test_a_job_that_ended_is_not_run_again_and_one_that_was_given_back_is(tmp_path: Path) -> None:
    made, path = signed(), tmp_path / "nonces.jsonl"
    first = verifier(nonces=nonces_in(path.parent, lambda: NOW))
    first.check(SEVEN, made)
    first.check(SEVEN, made)  # it was given back, or its lease ran out
    again = verifier(nonces=nonces_in(path.parent, lambda: NOW))  # the next process
    again.check(SEVEN, made)
    again.ended(EIGHT)
    again.check(SEVEN, made)
    again.ended(SEVEN)
    for known in (again, verifier(nonces=nonces_in(path.parent, lambda: NOW))):
        with pytest.raises(ValueError, match="that job has ended: it is played again"):
            known.check(SEVEN, made)
        known.check(SEVEN, signed())  # signed anew by whoever holds the key


class Player:
    """A server that hands out the same signed job again and again, and a worker's memory that outlives its processes.

    Each `process` is a new adapter with the same file of nonces, as a worker has after a restart. `answers`: what the
    server says after the job.
    """

    def __init__(self, api: ScriptedApi, base: Path) -> None:
        self.api, self.base, self.made = api, base, signed()
        self.clock = FakeClock()

    @contextmanager
    def process(self) -> Iterator[WorkerApi]:
        client = client_of(self.api.url)
        known = verifier(nonces=nonces_in(self.base, lambda: NOW))
        parts: dict[str, Any] = {"wanted": Filter(), "emit": Emitted(), "signatures": known, "clock": self.clock}
        with closing(WorkerApi(client, UrlPolicy(client.origin), **parts)) as source:
            yield source

    def take(self, source: WorkerApi, *answers: Answer | int) -> Claim:
        self.api.answers.clear()
        self.api.then(reply(200, json.dumps({"7": self.made}).encode()), *answers)
        claim = source.fetch(Offer(4.0, 4096), 0.0)
        assert claim is not None
        return claim

    def is_refused(self) -> bool:
        """Whether the next process refuses the job, for it is played again."""
        with self.process() as source:
            try:
                self.take(source)
            except UnreadableJob as error:
                return "played again" in str(error)
            return False


@pytest.fixture
def player(tmp_path: Path) -> Iterator[Player]:
    with scripted_api() as api:
        yield Player(api, tmp_path)


FINISHED, FAILED = Outcome(Ending.FINISHED, None, ""), Outcome(Ending.JOB_FAILED, None, "exit code 3")

#: What a server may say to an end.
NO_ACCEPTANCE: dict[str, Answer | int] = {"404": 404, "500": 500, "503": 503, "403": 403, "409": 409, "no": hang_up}


@pytest.mark.fault("T30")
@pytest.mark.parametrize("answer", NO_ACCEPTANCE)
@pytest.mark.parametrize("outcome", [FINISHED, FAILED], ids=["finished", "error"])
def test_a_job_that_ended_here_is_not_run_again_whatever_the_server_says_of_its_end(
    player: Player, outcome: Outcome, answer: str
) -> None:
    with player.process() as source:
        claim = player.take(source, *[NO_ACCEPTANCE[answer]] * 4)
        with contextlib.suppress(SourceError):  # it is told again by the outbox
            assert claim.lease.settle(outcome) is not Standing.KEEP
    assert player.is_refused()
    player.clock.now += 31
    with player.process() as source:  # and the end is still told, for telling needs no signature
        player.api.answers.clear()
        player.api.then(reply(200, b'"postprocessing"'), 204, 204)
        lease = source.resume(player.api.url, SEVEN, cut_off=Phase.SETTLING)
        player.clock.now += 31
        assert lease.settle(outcome) is Standing.KEEP
    assert player.api.said[-1] == ("finished" if outcome is FINISHED else "error")


@pytest.mark.fault("T30")
@pytest.mark.parametrize("answer", [204, 404, 500])
def test_a_job_that_was_given_back_may_come_again(player: Player, answer: int) -> None:
    with player.process() as source:
        claim = player.take(source, answer)
        with contextlib.suppress(SourceError):
            claim.lease.release("no room")
    assert not player.is_refused()


@contextmanager
def outbox_of(player: Player, journal: Journal, base: Base) -> Iterator[Outbox]:
    yield Outbox(
        base=base,
        journal=journal,
        engine=FakeEngine(),
        worker_fault_is_error=False,
        emit=Emitted(),
        sleep=lambda _: None,
        clock=player.clock,
    )


GIVEN_BACK = Outcome(Ending.WORKER_FAILED, WorkerReason.SHUTDOWN, "the worker is stopped")
DROPPED = Outcome(Ending.DROPPED, None, "taken back by the server")


@pytest.mark.fault("T30")
@pytest.mark.parametrize("restarted", [False, True], ids=["at once", "by the next process"])
@pytest.mark.parametrize(
    ("outcome", "answer", "ran", "refused"),
    [
        (DROPPED, 404, False, False),  # nothing of it ran, and somebody else may give it back
        (DROPPED, 404, True, True),
        (GIVEN_BACK, 204, True, False),
        (GIVEN_BACK, 404, False, False),
        (GIVEN_BACK, 404, True, True),
    ],
    ids=["cancelled before it ran", "cancelled", "given back", "gone before it ran", "gone as it was given back"],
)
def test_a_job_that_is_taken_back_after_its_run_began_is_not_run_again(
    tmp_path: Path, player: Player, outcome: Outcome, answer: int, ran: bool, refused: bool, restarted: bool
) -> None:
    """The journal knows of the run, and not the heartbeat: a server may answer `404` to one that it held back."""
    with closing(Base(tmp_path / "base", reserve_mib=0)) as base, closing(Journal(tmp_path / "journal")) as journal:
        with player.process() as source:
            lease, job = player.take(source, *[answer] * 4)
            journal.claim(job.id, lease.token, job)
            if ran:
                journal.advance(SEVEN, Phase.STAGING_IN)
                journal.running(SEVEN, Share(1.0, 64), Image("sha256:1", "busybox", None, "amd64"))
            if not restarted:
                with outbox_of(player, journal, base) as outbox:
                    outbox.settle(lease, outcome)
            else:
                journal.settling(SEVEN, outcome)
        if restarted:
            with player.process() as source, outbox_of(player, journal, base) as outbox:
                player.api.answers.clear()
                player.api.then(reply(200, b'"running"') if answer == 204 else 404, answer)
                lease = source.resume(player.api.url, SEVEN, cut_off=Phase.SETTLING)
                player.clock.now += 31
                assert outbox.deliver(lease, outcome)
        assert journal.records() == []
    assert player.is_refused() == refused


@pytest.mark.fault("T30")
def test_a_nonce_serves_one_job_and_is_forgotten_when_it_cannot_be_used_any_more(tmp_path: Path) -> None:
    nonce, path, now = "n" * 16, tmp_path / "nonces.jsonl", [float(NOW)]
    known = nonces_in(path.parent, lambda: now[0])
    verifier(nonces=known).check(SEVEN, signed(nonce=nonce))
    with pytest.raises(ValueError, match="used before, for job 7: it is played again"):
        verifier(nonces=known).check(EIGHT, signed("8", nonce=nonce))
    verifier(nonces=known).check(EIGHT, signed("8", private=bytes(32), key="old", nonce=nonce))  # of another signer
    assert path.read_text().count("nonce") == 2
    now[0] += 92 * DAY
    nine = parse_job_id("9")
    for _ in range(2):  # the second start knows of a signature that was made long after the first two had run out
        late = signed("9", expires=int(now[0]) + HOUR)
        verifier(now=now[0], nonces=nonces_in(path.parent, lambda: now[0])).check(nine, late)
    assert [json.loads(line)["job"] for line in path.read_text().splitlines() if line] == ["9", "9"]


@pytest.mark.fault("T30", "J4")
@pytest.mark.parametrize("ahead", [DAY, 80 * DAY, 1000 * DAY, 36_500 * DAY])
def test_a_start_with_the_clock_ahead_forgets_no_nonce(tmp_path: Path, ahead: float) -> None:
    made, now = signed(), [float(NOW)]

    def start() -> Verifier:
        return Verifier(KEYS, RULES, nonces_in(tmp_path, lambda: now[0]), lambda: now[0])

    first = start()
    first.check(SEVEN, made)
    first.ended(SEVEN)
    now[0] += ahead
    again = start()
    with pytest.raises(ValueError, match="ran out"):
        again.check(SEVEN, made)
    again.ended(EIGHT)  # which reads the file
    now[0] = NOW
    for known in (again, start()):
        with pytest.raises(ValueError, match="played again"):
            known.check(SEVEN, made)


@pytest.mark.fault("T30", "D5")
def test_nonces_do_not_pile_up_while_the_worker_runs(tmp_path: Path) -> None:
    """Half a day goes by from one job to the next, each is signed for an hour, and those of 91 days are to be known."""
    path, now = tmp_path / NAME, [float(NOW)]
    known = nonces_in(tmp_path, lambda: now[0])
    most = 0
    for number in range(3000):
        now[0] += DAY / 2
        job = parse_job_id(str(number))
        known.use(f"lab {number:016}", job, now[0] + HOUR)
        known.ended(job)
        most = max(most, path.read_bytes().count(b"nonce"))
    assert most <= 2 * 92 + 1000  # what is to be known, and the lines since
    for check in (known, nonces_in(tmp_path, lambda: now[0])):
        with pytest.raises(ValueError, match="played again"):
            check.use(f"lab {2999:016}", parse_job_id("2999"), now[0] + HOUR)
        with pytest.raises(ValueError, match="played again"):  # 89 days old
            check.use(f"lab {2999 - 178:016}", parse_job_id(str(2999 - 178)), now[0] + HOUR)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [NAME]


@pytest.mark.fault("T30", "D5")
def test_an_end_that_could_not_be_noted_is_noted_when_there_is_room_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, made = verifier(nonces=nonces_in(tmp_path, lambda: NOW)), signed()
    known.check(SEVEN, made)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        disk.setattr(Path, "open", lambda *_, **__: full(0))
        known.ended(SEVEN)
    known.check(EIGHT, signed("8"))  # the next job
    with pytest.raises(ValueError, match="played again"):
        verifier(nonces=nonces_in(tmp_path, lambda: NOW)).check(SEVEN, made)


@pytest.mark.fault("T30", "A10")
@pytest.mark.parametrize("tail", [b'{"nonce": "lab x', b"\0" * 100, b"[]\n7\n{}\n", b'{"nonce": 1, "job": 2}\n'])
def test_a_torn_note_costs_no_other(tmp_path: Path, tail: bytes) -> None:
    path, made = tmp_path / "nonces.jsonl", signed()
    first = verifier(nonces=nonces_in(path.parent, lambda: NOW))
    first.check(SEVEN, made)
    first.ended(SEVEN)
    with path.open("ab") as file:
        file.write(tail)
    with pytest.raises(ValueError, match="played again"):
        verifier(nonces=nonces_in(path.parent, lambda: NOW)).check(SEVEN, made)


@pytest.mark.fault("T30")
def test_what_cannot_be_noted_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for base in (tmp_path / "file", tmp_path / "missing"):
        with pytest.raises(WorkerFault, match="no signed job is run") as fault:
            verifier(nonces=nonces_in(base, lambda: NOW)).check(SEVEN, signed())
        assert fault.value.reason is WorkerReason.DISK


@pytest.mark.fault("T30")
def test_an_image_by_tag_is_refused_where_the_owner_does_not_allow_it() -> None:
    made = specs()
    made["handler"]["image_url"] = "registry.example/decode:latest"
    made["meta"]["signature"] = sign(OURS, "lab", SEVEN, made, audience=[OUR_API], expires=NOW + HOUR)
    with pytest.raises(ValueError, match=r"named by a tag.*must name it by digest \(JOB_SIGNING_ALLOW=tags"):
        verify(KEYS, SEVEN, made)
    verifier(Rules(RULES.audience, tags=True)).check(SEVEN, made)


@pytest.mark.fault("T30")
def test_a_signature_of_before_is_refused_with_the_way_to_a_new_one() -> None:
    with pytest.raises(ValueError, match=r"of version 1, .* sign it anew with version 2 \(JOB_SIGNING_ALLOW=version-1"):
        verify(KEYS, SEVEN, signed_before())
    old = Rules(RULES.audience, version_1=True)
    assert verifier(old).check(SEVEN, signed_before()) == {}
    with pytest.raises(ValueError, match="belongs to another job"):
        verifier(old).check(EIGHT, signed_before())
    with pytest.raises(ValueError, match="says nothing of the content of input"):
        verifier(Rules(RULES.audience, version_1=True, every_input=True)).check(SEVEN, signed_before())


@pytest.mark.fault("T30")
def test_hashes_of_inputs_come_with_the_job() -> None:
    one = {"in/a": f"sha256:{'1' * 64}"}
    both = one | {"in/b": f"sha256:{'2' * 64}"}
    strict = Rules(RULES.audience, every_input=True)
    assert verifier().check(SEVEN, signed()) == {}
    assert verifier().check(SEVEN, signed(inputs=one)) == {"in/a": "1" * 64}
    hashes = verifier(strict).check(SEVEN, signed(inputs=both))
    job = parse_specs(SEVEN, signed(inputs=both), hashes)
    assert [(file.path, file.sha256) for file in job.inputs] == [("in/a", "1" * 64), ("in/b", "2" * 64)]
    for some in (None, one):
        with pytest.raises(ValueError, match="says nothing of the content of input"):
            verifier(strict).check(SEVEN, signed(inputs=some))


TERMS: dict[str, dict[str, Any]] = {
    "audience a string": {"audience": OUR_API},
    "audience of numbers": {"audience": [7]},
    "a million names": {"audience": ["x"] * 10**6},
    "a long name": {"audience": ["x" * 10**5]},
    "expires a string": {"expires": "tomorrow"},
    "expires a fraction": {"expires": NOW + 0.5},
    "expires true": {"expires": True},
    "expires beyond all numbers": {"expires": 10**400},
    "expires below zero": {"expires": -1},
    "a short nonce": {"nonce": "x"},
    "a long nonce": {"nonce": "x" * 129},
    "a nonce of two lines": {"nonce": "x" * 16 + "\n"},
    "inputs a list": {"inputs": ["in/a"]},
    "an md5": {"inputs": {"in/a": "md5:" + "0" * 32}},
    "a hash in capitals": {"inputs": {"in/a": "sha256:" + "A" * 64}},
    "a hash of no input": {"inputs": {"in/c": "sha256:" + "0" * 64}},
}


@pytest.mark.fault("T22", "T30")
@pytest.mark.parametrize("case", TERMS)
def test_nonsense_is_refused_although_it_is_signed(case: str) -> None:
    made = specs()
    terms = {"version": 2, "audience": [OUR_API], "expires": NOW + HOUR, "nonce": "n" * 16, "inputs": None}
    terms |= TERMS[case]
    text = {
        **terms,
        "job_id": "7",
        "image": made["handler"]["image_url"],
        **{name: made["app"][name] for name in ("cmd", "env")},
        **{name: made["handler"][name] for name in ("files_down", "files_up")},
    }
    value = raw_signature(json.dumps(text, sort_keys=True, separators=(",", ":"), ensure_ascii=False))
    made["meta"]["signature"] = {"key": "lab", "value": value, **terms}
    with pytest.raises(ValueError, match="its signature") as refused:
        verify(KEYS, SEVEN, made)
    assert not isinstance(refused.value, NotForThisWorker)
    assert str(refused.value) == clean(str(refused.value), 400)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "keys"
    path.write_text(text)
    path.chmod(0o644)
    return path


@pytest.mark.fault("T15")
def test_keys_are_read_from_a_file(tmp_path: Path) -> None:
    lines = [f"{name} {base64.b64encode(key).decode()}" for name, key in KEYS.items()]
    assert read_keys(write(tmp_path, "# our keys\n\n" + "\n".join(lines) + "\n")) == KEYS


@pytest.mark.fault("T15")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no key in"),
        ("# only words\n\n", "no key in"),
        ("lab\n", "line 1"),
        ("# x\nlab AAAA\n", "line 2"),
        ("lab not-base64\n", "line 1"),
        (f"lab {'A' * 43}= more\n", "line 1"),
        ("lab " + "A" * 86 + "==\n", "line 1"),
    ],
)
def test_a_file_that_is_no_list_of_keys_stops_the_worker(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_keys(write(tmp_path, text))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(tmp_path / "not-there")


@pytest.mark.fault("T15", "T32")
@pytest.mark.parametrize(("mode", "said"), [(0o666, "written by others"), (0o664, "written by others"), (0o600, "")])
def test_a_file_of_keys_that_others_may_write_stops_the_worker(tmp_path: Path, mode: int, said: str) -> None:
    path = write(tmp_path, f"lab {base64.b64encode(KEYS['lab']).decode()}\n")
    path.chmod(mode)
    if not said:
        assert set(read_keys(path)) == {"lab"}
        return
    with pytest.raises(ConfigError, match=rf"JOB_SIGNING_KEYS: .*/keys may be {said} \(run `chmod go-w"):
        read_keys(path)


@needs_root
@pytest.mark.fault("T15", "T32")
def test_a_file_of_keys_of_another_user_stops_the_worker(tmp_path: Path) -> None:
    path = write(tmp_path, f"lab {base64.b64encode(KEYS['lab']).decode()}\n")
    os.chown(path, 1000, 0)
    with pytest.raises(ConfigError, match=r"belongs to another user \(number 1000\)"):
        read_keys(path)


def test_the_library_is_imported_only_where_it_is_needed() -> None:
    check = "import sys, jobfetcher.sources.worker_api.signing; sys.exit('cryptography' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.fault("T15")
def test_without_the_library_a_worker_with_keys_does_not_start(tmp_path: Path) -> None:
    path = write(tmp_path, f"lab {base64.b64encode(KEYS['lab']).decode()}\n")
    check = (
        "import sys; sys.modules['cryptography'] = None\n"
        "from pathlib import Path\n"
        "from jobfetcher.core.errors import ConfigError, WorkerFault, WorkerReason\n"
        "from jobfetcher.sources.worker_api.signing import read_keys\n"
        "try: read_keys(Path(sys.argv[1]))\n"
        "except ConfigError as error: sys.exit(f'refused: {error}')\n"
    )
    said = subprocess.run([sys.executable, "-c", check, str(path)], capture_output=True, text=True, check=False).stderr
    assert "refused: JOB_SIGNING_KEYS needs the extra `signing`" in said
    # what is asked for is in the lock file by its hash, and no registry is asked for our name
    assert said.rstrip().endswith(" type: pip install --require-hashes --only-binary :all: -r requirements/worker.txt")


# -- through a whole worker -------------------------------------------------------------------------------------------


def keys_of(tmp_path: Path) -> str:
    return str(write(tmp_path, f"lab {base64.b64encode(KEYS['lab']).decode()}\n"))


def sign_for(lab: Lab, job: int, made: Specs, **terms: Any) -> None:
    """Sign a job for the API of these tests, for an hour by the real clock; `terms` say otherwise."""
    all_terms: dict[str, Any] = {"audience": [lab.server.url], "expires": int(time.time()) + HOUR} | terms
    made["meta"]["signature"] = sign(OURS, "lab", parse_job_id(str(job)), made, **all_terms)


@pytest.mark.docker
@pytest.mark.fault("T15", "T30")
def test_a_worker_with_keys_runs_signed_jobs_and_no_others(lab: Lab, tmp_path: Path) -> None:
    ids = itertools.count(lab.submit("true"))  # handed out one after the other; the first is not signed
    jobs = {"unsigned": next(ids)}

    def submit(case: str, change: Callable[[Specs], object] = lambda made: None, shift: int = 0, **terms: Any) -> None:
        """A job of the command below, signed for its id (and `shift`), then changed."""
        jobs[case] = next(ids)
        made: Specs = {
            "app": {"cmd": ["echo ran > /files/out/ran"], "env": None},
            "handler": {"image_url": lab.image, "files_up": {"output": "out"}},
            "meta": {},
        }
        sign_for(lab, jobs[case] + shift, made, **terms)
        change(made)
        assert lab.server.submit(made) == jobs[case]

    submit("good")
    submit("replayed", shift=-1)
    submit("changed", lambda made: made["app"].update(cmd=["echo evil > /files/out/ran"]))
    submit("expired", expires=int(time.time()) - 301)
    submit("for others", audience=["https://other.example"])
    settings = lab.settings(job_signing_keys=keys_of(tmp_path), job_signing_allow="tags")
    heard = work(settings, jobs=6)
    assert {case: lab.server.state(job) for case, job in jobs.items()} == {
        "unsigned": "error",
        "good": "finished",
        "replayed": "error",
        "changed": "error",
        "expired": "error",
        "for others": "queued",
    }
    assert lab.server.results(jobs["good"])["output/out/ran"] == b"ran\n"
    assert "not signed" in lab.ended(jobs["unsigned"])[1]
    assert [case for case, job in jobs.items() if case != "good" and lab.server.results(job)] == []
    assert "belongs to another job" in lab.ended(jobs["replayed"])[1]
    assert "it was changed" in lab.ended(jobs["changed"])[1]
    assert "ran out 5 min ago" in lab.ended(jobs["expired"])[1]
    assert "signed for https://other.example" in lab.ended(jobs["for others"])[1]
    assert len(heard.all("run")) == 1  # one container in all
    noted = [json.loads(line) for line in (lab.base / NAME).read_text().splitlines() if line]
    assert {(one["job"], one["ended"]) for one in noted} == {(str(jobs["good"]), False), (str(jobs["good"]), True)}


@pytest.mark.docker
@pytest.mark.fault("T30")
def test_a_worker_runs_no_signed_image_by_tag(lab: Lab, tmp_path: Path) -> None:
    made: Specs = {"app": {"cmd": ["true"]}, "handler": {"image_url": lab.image}, "meta": {}}
    sign_for(lab, 1, made)
    assert lab.server.submit(made) == 1
    work(lab.settings(job_signing_keys=keys_of(tmp_path)))
    assert lab.ended(1)[0] == "error"
    assert "must name it by digest" in lab.ended(1)[1]


@pytest.mark.docker
@pytest.mark.fault("T30")
@pytest.mark.parametrize("content", ["as signed", "another"])
def test_an_input_of_another_content_fails_the_job_before_it_runs(lab: Lab, tmp_path: Path, content: str) -> None:
    """The storage or the server exchanged it; the address that was signed is the same."""
    ref = lab.server.put_input("in/a", b"as signed" if content == "as signed" else b"evil")
    made: Specs = {
        "app": {"cmd": ["cp /files/in/a /files/out/a"]},
        "handler": {"image_url": lab.image, "files_down": {"in/a": ref}, "files_up": {"output": "out"}},
        "meta": {},
    }
    digest = hashlib.sha256(b"as signed").hexdigest()
    sign_for(lab, 1, made, inputs={"in/a": f"sha256:{digest}"})
    assert lab.server.submit(made) == 1
    settings = {"job_signing_allow": "tags", "job_signing_inputs": "required"}
    heard = work(lab.settings(job_signing_keys=keys_of(tmp_path), **settings))
    if content == "as signed":
        assert lab.ended(1) == ("finished", "")
        return
    state, details = lab.ended(1)
    assert state == "error"
    assert f"input in/a is not what was signed: it is sha256:{hashlib.sha256(b'evil').hexdigest()}" in details
    assert heard.all("run") == []


@pytest.mark.docker
@pytest.mark.fault("T15")
def test_a_worker_whose_keys_cannot_be_read_does_not_start(lab: Lab, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no key in"):
        work(lab.settings(job_signing_keys=str(write(tmp_path, "# none yet\n"))))
    assert lab.server.events("poll") == []
