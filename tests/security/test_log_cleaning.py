"""Foreign text in the log: it stays in its line, drives no terminal (T17), and shows no secret (T10)."""

import io
import itertools
import json
import logging
import re
import threading
import time
import unicodedata
from collections.abc import Iterator
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobfetcher.core.urls import Method, SignedRequest
from jobfetcher.telemetry import logs
from jobfetcher.telemetry.events import Events
from jobfetcher.telemetry.logs import Format, configure, mask, redact

CANARY = "canary-7d1f"


@pytest.fixture(autouse=True)
def logging_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`configure` and `redact` are for a whole process: put back what was there."""
    monkeypatch.setattr(logs, "_secrets", logs._Secrets())
    root, ours = logging.getLogger(), logging.getLogger("jobfetcher")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# -- T17 --------------------------------------------------------------------------------------------------------------

ATTACKS = [
    *(chr(code) for code in range(0x20)),  # C0
    *(chr(code) for code in range(0x7F, 0xA0)),  # DEL and C1
    *(chr(code) for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x200E, 0x200F, 0x061C)),  # bidi
    *(chr(code) for code in (0x2028, 0x2029, 0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF, 0xFFF9, 0xE0041, 0xAD)),
    "\ud800",  # a lone surrogate, as Python reads names that are not UTF-8
    "\r\n", "\n\n\n", "\x1b[2J\x1b[H", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\x1b]52;c;ZXZpbA==\x07",
    "\x1b]8;;http://evil.example\x07click\x1b]8;;\x07", "\x1b[?1049h", "\x1bP$q\x1b\\", "\x1b[6n", "\x9b31m",
    "\x1b[1A\x1b[2K12:00:00  job 1  finished", "ok\n12:00:00  job 2  finished", 'x"}\n{"level": "info"}',
    "\b\b\b\b", "\x00hidden", "%s %d %(name)s", "{0} {event}", "[bold]x[/bold]", "<script>alert(1)</script>",
    '"quoted" key=value', "  two  spaces", "=", "'", "\\x1b[31m", "x" * 100_000, "\n" * 5_000, "é̈" * 50,
]  # fmt: skip
WRAPPED = [f"{before}{attack}{after}" for attack in ATTACKS for before, after in (("", ""), ("before ", " after"))]

#: The only sequences that we write ourselves, on a terminal that wants colour.
OUR_COLOURS = re.compile("\x1b\\[(2|31|33|0)m")


def test_the_corpus_is_large() -> None:
    assert len(set(WRAPPED)) >= 200


def harmless(text: str) -> bool:
    """Nothing in it is hidden or drives a terminal: no control, format, surrogate or separator character."""
    return not {unicodedata.category(char) for char in text} & {"Cc", "Cf", "Cs", "Zl", "Zp"}


def emitted(form: Format, text: str, stream: io.StringIO, how: str) -> str:
    events = Events(configure(form, "debug", stream))
    match how:
        case "message":
            events.emit("x", "warning", job="12", message=text)
        case "field":
            events.emit("x", "error", **{"note": text, text or "empty": "value"})
        case "job":
            events.emit("x", job=text)
        case "exception":
            events.emit("x", error=RuntimeError(text))
        case "name":
            events.emit(f"x{text}", level=text)
        case "library":
            logging.getLogger("urllib3").warning("from the library: %s", text)
    return stream.getvalue()


@pytest.mark.fault("T17")
@pytest.mark.parametrize("how", ["message", "field", "job", "exception", "name", "library"])
@pytest.mark.parametrize("form", ["plain", "json", "colour"])
def test_one_record_is_one_harmless_line(form: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for text in WRAPPED:
        stream = Terminal() if form == "colour" else io.StringIO()
        written = emitted("json" if form == "json" else "plain", text, stream, how)
        assert written.count("\n") == 1, ascii(text[:100])
        assert written.endswith("\n")
        assert len(written) < 5_000
        line = OUR_COLOURS.sub("", written[:-1]) if form == "colour" else written[:-1]
        assert harmless(line), ascii(text[:100])
        written.encode()  # can be written whatever it was
        if form == "json":
            record = json.loads(line)
            assert all(harmless(str(value)) and harmless(name) for name, value in record.items())


@pytest.mark.fault("T17")
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(), how=st.sampled_from(["message", "field", "job", "exception", "library"]))
def test_any_text_is_one_harmless_line(text: str, how: str) -> None:
    forms: tuple[Format, ...] = ("plain", "json")
    for form in forms:
        written = emitted(form, text, io.StringIO(), how)
        assert written.count("\n") == 1
        assert harmless(written[:-1])


# -- T10 --------------------------------------------------------------------------------------------------------------

JWT = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJsYWIifQ.c2lnbmF0dXJlLWJ5dGVz"

#: Text as it may come from servers, libraries and our own values, with the canary where a secret stands.
LEAKS = [
    f"https://s3.example/b/k?X-Amz-Signature={CANARY}&x=1",
    f"https://s3.example/b/k?x-amz-credential={CANARY}%2F20300517&X-Amz-Security-Token={CANARY}",
    f"https://s3.example/b/k?AWSAccessKeyId=known&Signature={CANARY}&Expires=1",
    f"https://blob.example/c/k?sv=1&sig={CANARY}&se=2",
    f"https://gcs.example/b/k?X-Goog-Signature={CANARY}",
    f"https://proxy.example/?url=https%3A%2F%2Fs3%2Fk%3FX-Amz-Signature%3D{CANARY}%26x%3D1",
    f"https://proxy.example/?url=https%3A%2F%2Fblob%2Fk%3Fsv%3D1%26sig%3D{CANARY}%26se%3D2",
    f"https://user:{CANARY}@registry.example/v2/",
    f"GET /x?token={CANARY} HTTP/1.1",
    f"access_token={CANARY}&refresh_token={CANARY}",
    f"username=lab&password={CANARY}",
    f"policy={CANARY}",
    f"Authorization: Bearer {CANARY}",
    f"authorization: {CANARY}",
    f"Proxy-Authorization: Basic {CANARY}",
    f"sent Bearer {CANARY}xxxx to the server",
    f"X-Amz-Security-Token: {CANARY}",
    json.dumps({"policy": CANARY, "X-Amz-Signature": CANARY, "IdToken": CANARY}),
    str({"Authorization": f"Bearer {CANARY}", "refreshToken": CANARY}),
    str([("x-amz-signature", CANARY), ("policy", CANARY)]),
    str(
        SignedRequest(
            Method.POST, f"https://s3/?sig={CANARY}", (("Authorization", CANARY),), (("x-amz-credential", CANARY),)
        )
    ),
]


@pytest.mark.fault("T10")
@pytest.mark.parametrize("form", ["plain", "json"])
@pytest.mark.parametrize("text", LEAKS)
def test_what_is_named_like_a_secret_is_masked(text: str, form: Format) -> None:
    for how in ("message", "field", "exception", "library"):
        written = emitted(form, text, io.StringIO(), how)
        assert CANARY not in written
        assert "***" in written


@pytest.mark.fault("T10")
@pytest.mark.parametrize(
    "name", ["token", "Policy", "password", "Authorization", "access_token", "X-Amz-Signature", "sig", "IdToken"]
)
def test_fields_named_like_a_secret_are_masked(name: str) -> None:
    stream = io.StringIO()
    Events(configure("json", "info", stream)).emit("x", **{name: CANARY})
    assert json.loads(stream.getvalue())[name] == "***"


@pytest.mark.fault("T10")
@pytest.mark.parametrize(
    "secret", ["correct horse", "p&ss=wörd?", 'quo"te\\back', "a+b/c==", "line\nbreak", "x" * 3000]
)
def test_a_registered_secret_is_masked_in_every_form(secret: str) -> None:
    redact(secret)
    for written in (secret, quote(secret), quote(secret, safe=""), quote_plus(secret), json.dumps(secret)):
        for form, how in itertools.product(("plain", "json"), ("message", "field", "exception", "library")):
            line = emitted("json" if form == "json" else "plain", f"before {written} after", io.StringIO(), how)
            assert "before" in line
            assert "after" in line
            assert written not in line
            assert secret not in line


@pytest.mark.fault("T10")
def test_a_name_of_a_field_that_was_shown_before_is_masked_once_it_is_a_secret() -> None:
    stream = io.StringIO()
    log = Events(configure("json", "info", stream))
    log.emit("x", **{"later-a-secret": "1"})
    redact("later-a-secret")
    log.emit("x", **{"later-a-secret": "1"})
    before, after = (json.loads(line) for line in stream.getvalue().splitlines())
    assert "later-a-secret" in before
    assert "later-a-secret" not in after
    assert after["***"] == "1"


@pytest.mark.fault("T10")
def test_tokens_are_known_by_their_form() -> None:
    assert mask(f"refused {JWT} now") == "refused *** now"


@pytest.mark.fault("T10")
def test_a_secret_that_begins_like_another_is_masked_whole() -> None:
    redact("hunter2")
    redact("hunter2-and-more")
    assert mask("hunter2-and-more hunter2") == "*** ***"


@pytest.mark.fault("T10")
def test_secrets_are_bounded_and_the_first_and_the_latest_stay() -> None:
    redact("the password")
    renewals = [f"renewal-{number:05d}." for number in range(1_000)]
    for token in renewals:
        redact(token)
        assert mask(f"the password {token}") == "*** ***"
    kept = [token for token in renewals if mask(token) == "***"]
    assert kept[-32:] == renewals[-32:]
    assert len(kept) <= 48


@pytest.mark.fault("T10")
def test_secrets_may_be_added_while_others_log() -> None:
    def add(number: int) -> None:
        for count in range(100):
            token = f"thread-{number}-{count}-end"
            redact(token)
            if mask(token) != "***":
                missed.append(token)

    missed: list[str] = []
    threads = [threading.Thread(target=add, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert missed == []


@pytest.mark.parametrize(
    "text",
    [
        "downloading 3 files (1.2 GB)",
        "the pull policy is always; PULL_POLICY=always",
        "the token expired; signing in again",
        "signature check failed: job 12 is not signed",
        "https://api.example/jobs?memory=1000&cpu_cores=2",
        "image repo/name@sha256:0123456789abcdef",
        "exit code 137: out of memory (limit 512 MiB)",
        "job asks for design=a, assignment=b",
    ],
)
def test_ordinary_sentences_are_left_alone(text: str) -> None:
    redact("abc")  # too short to be told from ordinary words
    assert mask(text) == text


@pytest.mark.parametrize(
    "text", ["a-" * 8_000, "token" * 3_200, "x" * 16_000, '"' * 16_000, "://a:" * 3_000, "eyJ" * 5_000]
)
def test_masking_takes_no_long_time_whatever_the_text(text: str) -> None:
    redact("the password")
    started = time.monotonic()
    mask(text)
    assert time.monotonic() - started < 2
