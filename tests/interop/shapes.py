"""What is compared of two answers: the status, the type, three headers, and the kind of the body.

A recorded body is cut at 300 characters, so its JSON may end anywhere: what is there of it is read, and may be part of
what the mock answers.
"""

import json
from dataclasses import dataclass
from typing import Any

CUT_AT = 300
HEADERS = ("www-authenticate", "allow", "location")

#: The kind of a JSON value: the name of its type, or the kinds of what is in it.
Shape = Any


@dataclass(frozen=True)
class Answer:
    """An answer, recorded or given just now. A location is kept from its path on: every server has another host."""

    status: int
    content_type: str | None
    headers: dict[str, str]
    body: str


def differences(real: Answer, mock: Answer) -> set[str]:
    """In what the two differ: "status", "content type", the name of a header, or "body"."""
    found = {name for name in HEADERS if real.headers.get(name) != mock.headers.get(name)}
    if real.status != mock.status:
        found.add("status")
    if real.content_type != mock.content_type:
        found.add("content type")
    if not _same_kind(real, mock):
        found.add("body")
    return found


def _same_kind(real: Answer, mock: Answer) -> bool:
    if real.content_type != "application/json":
        return real.body == mock.body[:CUT_AT]
    try:
        given = json.loads(mock.body)
    except ValueError:
        return False
    text, whole = _closed(real.body)
    return _fits(_shape(json.loads(text)), _shape(given), whole=whole)


def _shape(value: Any) -> Shape:
    if isinstance(value, dict):
        # the ids of jobs are keys, too, and no two servers count alike
        return {"<id>" if key.isdecimal() else key: _shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_shape(inner) for inner in value]
    return type(value).__name__


def _fits(real: Shape, mock: Shape, *, whole: bool) -> bool:
    """Whether the two are of one kind; of a body that was cut the real one may be the smaller."""
    if isinstance(real, dict) and isinstance(mock, dict):
        missing = set(mock) - set(real)
        return (
            set(real) <= set(mock)
            and (not missing or not whole)
            and all(_fits(real[key], mock[key], whole=whole) for key in real)
        )
    if isinstance(real, list) and isinstance(mock, list):
        return (len(real) == len(mock) or not whole) and all(
            _fits(one, other, whole=whole) for one, other in zip(real, mock, strict=False)
        )
    return bool(real == mock)


def _closed(text: str) -> tuple[str, bool]:
    """JSON that was cut, with what is open closed, and whether nothing was. What had only begun is left out."""
    try:
        json.loads(text)
    except ValueError:
        pass
    else:
        return text, True
    for end in range(len(text), 0, -1):
        for closing in ("", '"'):
            candidate = text[:end].rstrip(",:") + closing + _brackets(text[:end] + closing)
            try:
                json.loads(candidate)
            except ValueError:
                continue
            return candidate, False
    raise ValueError(f"no JSON: {text}")


def _brackets(text: str) -> str:
    """What closes the brackets that are open at the end of `text`, strings left out of account."""
    opened: list[str] = []
    quoted = escaped = False
    for char in text:
        if quoted:
            quoted = escaped or char != '"'
            escaped = char == "\\" and not escaped
        elif char == '"':
            quoted = True
        elif char in "{[":
            opened.append("}" if char == "{" else "]")
        elif char in "}]":
            opened.pop()
    return "".join(reversed(opened))
