"""What a hostile server, store, registry or job may send, as strategies; and how the tests of this folder run them.

The examples are the same in every run (derandomized), so a failure here fails everywhere and needs no database.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from jobfetcher.core.errors import JobfetcherError

T = TypeVar("T")

#: Pieces that mean something to a header, a terminal, a log, a URL, a path, a form, a number parser or a shell.
PIECES = [
    "\r\n", "\n", "\r", "\0", "\x1b[31m", "\x1b]52;c;ZXZpbA==\x07", "\x7f", "\x85", "\x9b", "\u2028", "\u202e",
    "\u200b", "\ud800", "\udfff", "\ufeff", "\uff0e", "ä", "é̈", "\U0001f600", " ", "\t", '"', "'", "\\", "/", "//",
    "..", ".", "%2e", "%00", "%", "&", "?", "#", "=", ";", ",", ":", "<script>", "W/", '"abc"', "bytes 0-1/2",
    "bytes */9", "-1", "0", "1", "1e9", "9" * 25, "NaN", "Infinity", "null", "true", "[]", "{}", "{0}", "%s", "$(id)",
    "http://127.0.0.1/", "https://h.example/x", "file:///etc/passwd", "Authorization", "Bearer x", "x-amz-acl",
    "Content-Type", "Host", "Transfer-Encoding: chunked", "Mon, 01 Jan 2024 00:00:00 GMT", "Mon, 99 Foo 0000",
]  # fmt: skip

texts = st.text(max_size=20) | st.lists(st.sampled_from(PIECES), max_size=6).map("".join)

#: JSON values of any shape, as Python reads them (`1e999` is infinite, `\ud800` half a character).
values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=10,
)


def fuzz(examples: int) -> settings:
    """Run this many examples, always the same ones."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )


def attempt(act: Callable[[], T]) -> T | JobfetcherError:
    """What `act` gives, or the error of our own tree that it raises. Any other exception is a bug and passes."""
    try:
        return act()
    except JobfetcherError as error:
        return error
