"""`.env` files and quoted values, read as people mean them, or refused with the file and the line.

Used by `settings` only. The grammar is python-dotenv's, which the reference worker reads its `.env` with; what that
library passes over in silence (a quote that is not closed, a line that is no setting) is said here. `docker run
--env-file` knows no quotes and hands them on with the value, so values of the environment may have to be freed of them.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from jobfetcher.core.errors import ConfigError

_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))

#: `${HOME}` and `${HOME:-/root}`, as python-dotenv has them; a `$` without braces means nothing to it.
_VARIABLE = re.compile(r"\$\{([^}:]*)(?::-([^}]*))?\}")

#: A remark behind a value without quotes, as python-dotenv has it.
_REMARK = re.compile(r"\s+#.*", re.DOTALL)

_QUOTED = re.compile(r"""\s*(["'])(.*)\1\s*(?:#.*)?""")


def read_dotenv(path: Path, environ: Mapping[str, str], is_literal: Callable[[str], bool]) -> dict[str, str]:
    """The values of a file, by name as it is written; of equal names the last.

    `${NAME}` is replaced by what stands above it in the file or in `environ` (which wins), but not in values whose name
    `is_literal`: a password means what it says. Raises ConfigError naming file and line.
    """
    from dotenv.parser import parse_stream

    values: dict[str, str] = {}
    for binding in parse_stream(io.StringIO(_text(path), newline="")):
        written = binding.original.string
        statement = written.lstrip()
        line = binding.original.line + len(re.findall(r"\r\n|\n|\r", written[: len(written) - len(statement)]))
        where = f"{path}, line {line}"
        name = _name_in(statement)
        if binding.error:
            raise ConfigError(f"{where}: {_complaint(statement, name)}")
        if binding.key is None:
            continue
        if len(statement.splitlines()) > 1:
            raise ConfigError(f"{where}: the quote that begins the value of {name} is not closed in that line")
        if binding.value is None:
            raise ConfigError(f"{where}: {name} has no value; write {name}=VALUE, or take the line out")
        if any(ord(char) < 32 and char != "\t" for char in binding.value):
            raise ConfigError(
                f"{where}: the value of {name} has a control character in it; in double quotes \\n and the like "
                "mean one, in single quotes they do not"
            )
        if is_literal(binding.key):
            values[binding.key] = binding.value
        else:
            values[binding.key] = _replaced(binding.value, values, environ, f"{where}: {name}")
    return values


def _text(path: Path) -> str:
    """The file's text. UTF-8, or UTF-16 where a byte order mark says so, as Windows' editors and shells write it."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    encoding, start = "utf-8", 0
    for mark, named in _MARKS:
        if content.startswith(mark):
            encoding, start = named, len(mark)
            break
    try:
        text = content[start:].decode(encoding)
    except UnicodeDecodeError as error:
        before = content[start : start + error.start].decode(encoding, errors="replace")
        line = len(re.findall(r"\r\n|\n|\r", before)) + 1
        raise ConfigError(f"{path} cannot be read: line {line} is not {encoding.upper()}; save it as UTF-8") from None
    if "\0" in text:
        line = len(re.findall(r"\r\n|\n|\r", text[: text.index(chr(0))])) + 1
        raise ConfigError(
            f"{path} cannot be read: line {line} has zero bytes in it, as UTF-16 without a byte order mark has; "
            "save it as UTF-8"
        )
    return text


def _name_in(statement: str) -> str:
    """The name that a line sets, for messages; nothing else of the line is shown, as it may be a password."""
    found = re.match(r"(?:export[ \t]+)?'?([A-Za-z_][A-Za-z0-9_.-]*)", statement)
    return found[1] if found else "the line"


def _complaint(statement: str, name: str) -> str:
    value = statement.partition("=")[2].lstrip(" \t")
    if "=" not in statement.splitlines()[0]:
        return "this is no setting; a line is NAME=VALUE, or a comment that begins with #"
    if value[:1] in {"'", '"'}:
        quote = value[0]
        if quote in value[1:].splitlines()[0]:
            return (
                f"something follows the closing quote of {name}; where the value has a {quote} in it, write \\{quote}"
            )
        return f"the quote that begins the value of {name} is not closed in that line"
    return "this cannot be read; a line is NAME=VALUE, or a comment that begins with #"


def _replaced(value: str, above: Mapping[str, str], environ: Mapping[str, str], where: str) -> str:
    def of(found: re.Match[str]) -> str:
        name, default = found[1], found[2]
        known = environ.get(name, above.get(name, default))
        if known is None:
            raise ConfigError(f"{where} has ${{{name}}} in it, and there is no such variable")
        return known

    return _VARIABLE.sub(of, value)


def unquoted(value: str) -> str | None:
    """What stands in quotes, where all of `value` but a comment does; None where it does not."""
    found = _QUOTED.fullmatch(value)
    return found[2] if found else None


def without_remark(value: str) -> str | None:
    """What stands before a remark, where `value` has one; None where it has none. For values without quotes."""
    found = _REMARK.search(value)
    return value[: found.start()].strip() if found else None
