"""Log lines: one event is one line, for people or for machines, harmless and without secrets.

Set up once by `build` (`configure`), which also hands `redact` to whoever holds secrets. Everything that a library logs
or warns of goes the same way, so nothing else writes to the stream. Promises, for own and foreign text alike:

- one record is one line, and nothing in it drives a terminal (FAULTS.md T17, by core.text.clean);
- registered secrets, and the values of what is named like a signature or a token, are masked (FAULTS.md T10).

One `logging.Formatter` does both, for records that carry an event of ours and for those of libraries. No library for
it: structlog loads rich, attrs and asyncio, 13 MiB that a waiting worker would hold for two lines an hour.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from itertools import count
from typing import Any, Literal, Protocol, TextIO, cast
from urllib.parse import quote, quote_plus

from jobfetcher.core.text import clean
from jobfetcher.telemetry.events import Event, Listener

Format = Literal["auto", "plain", "json"]

_MASK = "***"

#: Long enough for one sentence with a job's last lines in it; a registry may answer with megabytes.
_VALUE_LIMIT = 2000

#: Under which name a log record carries the event it is about.
_EVENT = "jobfetcher_event"

#: What comes first in a line, in this order.
_HEAD = ("time", "level", "event", "job", "message")


class Stream(Protocol):
    """What a log needs of where it is written to: a text file, or progress bars that print lines above them."""

    def write(self, text: str, /) -> object: ...

    def flush(self) -> object: ...

    def isatty(self) -> bool: ...


# -- secrets ----------------------------------------------------------------------------------------------------------

#: Names whose values are secrets, in queries, forms, headers and fields: S3, GCS and Azure signatures, sign-in answers.
_SENSITIVE = r"[\w-]*(?:signature|credential|token|password)|sig|policy|(?:proxy-)?authorization"
_NAMED = re.compile(_SENSITIVE, re.IGNORECASE)

_PATTERNS = (
    # name=value in a query or a form; also where the whole URL is itself a parameter, percent-encoded
    (
        re.compile(rf"(?i)(?:(?<![\w-])|(?<=%26)|(?<=%3F))((?:{_SENSITIVE})(?:=|%3D))(?:(?!%26)[^&\s\"'<>])+"),
        rf"\1{_MASK}",
    ),
    # "name": "value" and ('name', 'value'): JSON, and how Python shows mappings and pairs
    (re.compile(rf"(?i)(([\"'])(?:{_SENSITIVE})\2\s*[:,]\s*)([\"']).*?\3"), rf"\1\3{_MASK}\3"),
    # a header line: name: scheme value
    (
        re.compile(r"(?i)((?:authorization|x-(?:amz|goog)-[a-z-]+)\s*:\s*)(?:(?:bearer|basic)\s+)?[^\s\"']+"),
        rf"\1{_MASK}",
    ),
    (re.compile(r"(?i)(\bbearer\s+)[a-z0-9._~+/=-]{8,}"), rf"\1{_MASK}"),  # RFC 6750, section 2.1
    # base64 that begins with '{"': a JSON web token or an upload policy, whatever its name
    (re.compile(r"\beyJ[\w+/=.-]{16,}"), _MASK),
    # user:password@ in a URL
    (re.compile(r"(://)[^/\s:@]+:[^/\s@]+@"), rf"\1{_MASK}@"),
)


#: For `_Secrets.change`: a number is never used twice.
_changes = count()


class _Secrets:
    """The values that must not be shown, bounded: a worker that renews its tokens for years must not collect them.

    The first ones stay (the password and token from the settings come at the start), of later ones the latest.
    """

    _FIRST, _LATEST = 16, 32

    #: Shorter ones would mask pieces of ordinary words, and show by that what they are.
    _SHORTEST = 4

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._first: list[str] = []
        self._latest: deque[str] = deque(maxlen=self._LATEST)
        self._pattern: re.Pattern[str] | None = None
        #: Another number after each change: what was masked before one may have to be masked again.
        self.change = next(_changes)

    def add(self, secret: str) -> None:
        if len(secret) < self._SHORTEST:
            return
        with self._lock:
            if secret in self._first or secret in self._latest:
                return
            if len(self._first) < self._FIRST:
                self._first.append(secret)
            else:
                self._latest.append(secret)
            # as it is, as it stands in a URL or a form, and inside JSON
            forms = {
                form
                for known in (*self._first, *self._latest)
                for form in (known, quote(known, safe=""), quote(known), quote_plus(known), json.dumps(known)[1:-1])
            }
            longest_first = sorted(forms, key=len, reverse=True)  # one secret may be the beginning of another
            self._pattern = re.compile("|".join(re.escape(form) for form in longest_first))
            self.change = next(_changes)

    def mask(self, text: str) -> str:
        if self._pattern is not None:
            text = self._pattern.sub(_MASK, text)
        for pattern, masked in _PATTERNS:
            text = pattern.sub(masked, text)
        return text


#: One process has one standard error, and a secret is one whoever logs it.
_secrets = _Secrets()


def redact(secret: str) -> None:
    """Never show `secret` from now on: for each password and token, at the start and at each renewal. Thread-safe."""
    _secrets.add(secret)


def mask(text: str) -> str:
    """`text` with every known secret, and every value that is named like one, replaced by `***`."""
    return _secrets.mask(text)


# -- lines ------------------------------------------------------------------------------------------------------------


def configure(format: Format = "auto", level: str = "info", stream: Stream | None = None) -> Listener:
    """Route everything that is logged to `stream` (standard error), and return the listener that logs events.

    `auto` is plain on a terminal, JSON elsewhere. `level` (debug, info, warning, error) is for our own events;
    libraries are heard from warning on. Colour: only on a terminal, and as NO_COLOR and TERM say. Calling it again
    replaces what was set up before.
    """
    output: Stream = sys.stderr if stream is None else stream
    plain = format == "plain" or (format == "auto" and output.isatty())
    handler = _Handler(cast(TextIO, output))  # StreamHandler uses write and flush only
    handler.setFormatter(_Formatter(_Plain(_has_colour(output)) if plain else _render_json))
    logging.basicConfig(force=True, level=logging.WARNING, handlers=[handler])
    logging.captureWarnings(True)
    ours = logging.getLogger("jobfetcher")
    ours.setLevel(level.upper())

    def log_event(event: Event) -> None:
        if not event.name.startswith("progress"):  # several a second, for bars only
            number = logging.getLevelNamesMapping().get(event.level.upper(), logging.INFO)
            ours.log(number, "%s", event.name, extra={_EVENT: event})

    return log_event


class _Handler(logging.StreamHandler[TextIO]):
    def handleError(self, record: logging.LogRecord) -> None:
        """Name the kind of failure only: the default prints the raw record, secrets and all."""
        with contextlib.suppress(OSError, ValueError):  # the stream itself may be what failed
            self.stream.write(f"a log line of {record.name} could not be written: {type(sys.exception()).__name__}\n")


class _Formatter(logging.Formatter):
    """A record as one safe line, as `render` writes it."""

    def __init__(self, render: Callable[[Mapping[str, Any]], str]) -> None:
        super().__init__()
        self._render = render

    def format(self, record: logging.LogRecord) -> str:
        event: Event | None = getattr(record, _EVENT, None)
        return self._render(_safe(event or _from_library(record)))


def _from_library(record: logging.LogRecord) -> Event:
    """A record of the standard `logging` in the form of our own events."""
    fields: dict[str, object] = {"message": record.getMessage(), "logger": record.name}
    if record.exc_info and record.exc_info[1]:
        fields["error"] = record.exc_info[1]
    return Event("log", record.levelname.lower(), fields, record.created)


def _safe(event: Event) -> Mapping[str, Any]:
    """Mask, then clean, every name and value: what is left is safe to show. Masked first, as cleaning changes text."""
    safe: dict[str, object] = {}
    for name, value in event.fields.items():
        shown, is_secret = _safe_name(name, _secrets.change)
        safe[shown] = _MASK if is_secret and value is not None else _safe_value(value)
    # the record's own facts come last: no field can stand in for them
    safe |= {"time": float(event.time), "level": clean(event.level, 20), "event": _safe_text(event.name)}
    first = {name: safe[name] for name in _HEAD if name in safe}
    return first | safe


@lru_cache(maxsize=128)  # there are some forty; all of them are our own words
def _safe_name(name: str, _change: int) -> tuple[str, bool]:
    """As it is shown, and whether what it names must not be. Anew after each change of the secrets."""
    return clean(mask(name), 80), _NAMED.fullmatch(name) is not None


def _safe_value(value: object) -> object:
    match value:
        case None | bool() | int():
            return value
        case float() if math.isfinite(value):  # JSON has no other numbers
            return round(value, 3)
        case BaseException():
            return _safe_text(_describe(value))
        case _:
            return _safe_text(str(value))


def _safe_text(text: str) -> str:
    # cut before the search as well as after it: masking ten megabytes takes seconds
    return clean(mask(text[: 8 * _VALUE_LIMIT]), _VALUE_LIMIT)


def _describe(error: BaseException) -> str:
    """An exception as one line: kind, text, and the last five places it came through, innermost first."""
    places = [f"{frame.name} ({frame.filename}:{frame.lineno})" for frame in traceback.extract_tb(error.__traceback__)]
    text = f"{type(error).__name__}: {error}"
    return f"{text}; in {' < '.join(places[:-6:-1])}" if places else text


def _render_json(line: Mapping[str, Any]) -> str:
    """One object; `time` as RFC 3339 in UTC. ASCII only, so that it can be written whatever the locale."""
    moment = datetime.fromtimestamp(line["time"], UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return json.dumps({**line, "time": moment})


class _Plain:
    """`2030-05-17 12:00:01 +0200  job 12  downloading 3 files (1.2 GB)`, in local time with its distance from UTC.

    An event with a message is shown as that sentence; one without, as its name and fields. JSON has all of it.
    """

    _COLOURS: Mapping[str, str] = {"warning": "\x1b[33m", "error": "\x1b[31m", "critical": "\x1b[31m"}
    _DIM, _PLAIN = "\x1b[2m", "\x1b[0m"

    def __init__(self, colour: bool) -> None:
        self._colour = colour

    def __call__(self, line: Mapping[str, Any]) -> str:
        sentence = str(line.get("message") or line["event"].replace("_", " "))
        if line["level"] in self._COLOURS:
            sentence = self._paint(self._COLOURS[line["level"]], f"{line['level']}: {sentence}")
        parts = [self._paint(self._DIM, time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(line["time"])))]
        if line.get("job") is not None:
            parts.append(f"job {line['job']}")
        parts.append(sentence)
        rest = " ".join(f"{name}={_quoted(value)}" for name, value in line.items() if name not in _HEAD)
        if rest and not line.get("message"):
            parts.append(self._paint(self._DIM, rest))
        return "  ".join(parts)

    def _paint(self, colour: str, text: str) -> str:
        return f"{colour}{text}{self._PLAIN}" if self._colour else text


def _quoted(value: object) -> str:
    text = str(value)
    return '"' + text.replace('"', '\\"') + '"' if not text or re.search(r'[\s="]', text) else text


def _has_colour(output: Stream) -> bool:
    """Whether colours are wanted there; rich knows the conventions (NO_COLOR, FORCE_COLOR, TERM=dumb)."""
    if not output.isatty():
        return False
    from rich.console import Console

    console = Console(file=cast(TextIO, output))
    return console.color_system is not None and not console.no_color
