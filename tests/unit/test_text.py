"""core.text: whatever comes in, one harmless line of bounded length goes out."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobfetcher.core.text import DETAILS_BYTES, clean, details

ANYTHING = st.text(st.characters(), max_size=3000)  # lone surrogates included


@pytest.mark.fault("T17")
@pytest.mark.parametrize(
    ("raw", "shown"),
    [
        ("plain ü 中", "plain ü 中"),
        ("a\nb\r\tc", "a\\x0ab\\x0d\\x09c"),
        ("\x1b]52;c;cm0=\x07", "\\x1b]52;c;cm0=\\x07"),
        ("\x9b31m", "\\x9b31m"),  # CSI as one C1 character
        ("\u202egpj.exe", "\\u202egpj.exe"),
        ("\u2066a\u2069", "\\u2066a\\u2069"),
        ("a\u200bb", "a\\u200bb"),
        ("a\u2028b\u2029c", "a\\u2028b\\u2029c"),
        ("\ud800", "\\ud800"),
        ("\U000e0041", "\\ue0041"),  # a tag character: invisible text
        ("\x00\x7f", "\\x00\\x7f"),
    ],
)
def test_what_drives_a_terminal_is_shown_as_an_escape(raw: str, shown: str) -> None:
    assert clean(raw) == shown


@given(ANYTHING, st.integers(1, 200))
def test_cleaned_text_is_one_short_printable_line(raw: str, limit: int) -> None:
    line = clean(raw, limit)
    assert len(line) <= limit
    assert len(line.splitlines()) <= 1
    assert not any(unicodedata.category(char) in {"Cc", "Cf", "Cs", "Zl", "Zp"} for char in line)
    line.encode()


def test_an_ellipsis_says_that_something_was_left_out() -> None:
    assert clean("abcdef", 6) == "abcdef"
    assert clean("abcdefg", 6) == "abcde…"
    assert clean("\n\n\n", 6) == "\\x0a\\…"


@pytest.mark.fault("T17")
@given(ANYTHING)
def test_details_fit_into_a_query_and_a_mail(raw: str) -> None:
    said = details(raw)
    assert len(said.encode()) <= DETAILS_BYTES
    assert not set(said) & set("<>&")
    assert said == clean(said, DETAILS_BYTES)


def test_details_are_cut_between_characters() -> None:
    assert details("中" * 600).encode() == ("中" * 500).encode()
    assert details("a" + "中" * 600) == "a" + "中" * 499


def test_details_keep_the_sentence_readable() -> None:
    assert details('<a href="x">exit 1 & 2</a>') == '(a href="x")exit 1 + 2(/a)'
