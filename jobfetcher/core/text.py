"""One cleaner for every text from outside before it reaches a log, a terminal, a file or a mail.

FAULTS.md T17: control characters, C1, ESC and bidirectional overrides become `\\xNN` / `\\uNNNN`, so one record stays
one line and nothing can drive a terminal.
"""

from __future__ import annotations

import re
import unicodedata

#: Categories that are never shown raw: Cc control, Cf format (bidi, zero width), Cs surrogate, Zl/Zp line separators.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})

#: PROTOCOL.md S12: the details travel in a query string, at most 1,500 bytes before percent-encoding.
DETAILS_BYTES = 1500


def clean(text: str, limit: int = 1000) -> str:
    """`text` as one harmless line of at most `limit` characters (the end is kept out, an ellipsis says so)."""
    if len(text) <= limit and text.isascii() and text.isprintable():  # as most are
        return text
    shown: list[str] = []
    for char in text[: limit + 1]:
        if unicodedata.category(char) not in _HIDDEN:
            shown.append(char)
        elif ord(char) < 0x100:
            shown.append(f"\\x{ord(char):02x}")
        else:
            shown.append(f"\\u{ord(char):04x}")
    line = "".join(shown)
    return line if len(line) <= limit else line[: limit - 1] + "…"


#: Not those that say what was answered.
_NUMBER = re.compile(r"(?<![0-9])(?<!HTTP )[0-9]+")


def unnumbered(text: str) -> str:
    """`text` with its numbers made alike: sizes and durations differ from try to try, and that is no news (J10)."""
    return _NUMBER.sub("0", text)


def details(text: str) -> str:
    """`text` as `runtime_details`: cleaned, no `<`, `>` or `&` (S11: it goes unescaped into an HTML mail), cut to fit.

    The replacements keep the sentence readable and mean nothing to a mail program. At most DETAILS_BYTES bytes.
    """
    harmless = clean(text, DETAILS_BYTES).translate({ord("<"): "(", ord(">"): ")", ord("&"): "+"})
    return harmless.encode()[:DETAILS_BYTES].decode(errors="ignore")
