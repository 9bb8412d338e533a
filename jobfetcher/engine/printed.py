"""What a container printed, as the engine keeps it: whole, or with a word on what is missing. Pure; used by `docker`.

An engine keeps the end of a long log, and nowhere says that there was more. Its driver `local` writes files of 10 MiB
and keeps three of them (moby, daemon/logger/loggerutils/logfile.go): the oldest goes when a fourth begins. So a log is
whole where not even two files are full, and where the first line is still the one that was seen to be the first while
the log was short. Nobody counts the bytes that went, unless all of them are read while the job runs, which a job that
prints much would pay for; but each line has its time, so it can be told until when all of it is missing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

from jobfetcher.core.text import clean

#: How a job's log is kept on the engine's disk: at most so many files of so many bytes (FAULTS.md D4).
FILES, FILE_BYTES = 3, 10 * 1024**2

#: What the driver `local` adds to each line or piece of one: its length twice, where it came from, its time (protobuf).
_ADDED = 27

#: The count of what is kept is an estimate: so far off it may be, as a part.
_SLACK = 0.03

#: The kind of a frame in which the engine itself speaks, of an error on its way through the log.
_ENGINE_SPEAKS = 3


class Frames:
    """The contents of the frames of a log: a header of 8 bytes, the first for what kind it is, the last 4 for the
    length, big-endian; then so many bytes. Read once; afterwards `kept_bytes` estimates what it takes on the engine's
    disk."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = chunks
        self.kept_bytes = 0

    def __iter__(self) -> Iterator[bytes]:
        header, left, kind = b"", 0, 0
        for chunk in self._chunks:
            at = 0
            while at < len(chunk):
                if left == 0:
                    piece = chunk[at : at + 8 - len(header)]
                    header += piece
                    if len(header) == 8:
                        kind, left, header = header[0], int.from_bytes(header[4:], "big"), b""
                        self.kept_bytes += left + _ADDED
                else:
                    piece = chunk[at : at + left]
                    left -= len(piece)
                    yield _engines_words(piece) if kind == _ENGINE_SPEAKS else piece
                at += len(piece)

    @property
    def may_lack_its_begin(self) -> bool:
        """Whether so much is kept that there may have been more. Still more than that, and the engine keeps it all."""
        full = self.kept_bytes / FILE_BYTES
        return (FILES - 1) * (1 - _SLACK) <= full <= FILES * (1 + _SLACK)


def time_of(pieces: Iterable[bytes]) -> str:
    """When the first line was printed, of a log with times before its lines (RFC 3339); empty where there is none."""
    begin = b""
    for piece in pieces:
        begin += piece
        if b" " in begin:
            break
    return begin.partition(b" ")[0].decode("ascii", errors="replace")


def missing(kept_since: str, started: str, *, sure: bool) -> str:
    """One line to stand at the top of a log whose begin was not kept, or may not have been. Times in RFC 3339."""
    what = "what was printed before that"
    with contextlib.suppress(ValueError):  # an engine with times of its own
        until = datetime.fromisoformat(kept_since).astimezone(UTC)
        after = _span(max(0.0, (until - datetime.fromisoformat(started)).total_seconds()))
        what = f"what was printed before {until:%Y-%m-%d %H:%M:%S} UTC, in the first {after} of the run,"
    kept = f"the engine keeps the last {FILES * FILE_BYTES >> 20} MiB of what a job prints"
    if sure:
        return f"[jobfetcher] the first part of this log is missing: {kept}; {what} is not here\n"
    return f"[jobfetcher] the first part of this log may be missing: {kept}, as much as is here; {what} may be lost\n"


def _engines_words(piece: bytes) -> bytes:
    said = clean(piece.decode(errors="replace").strip(), 300)
    return f"\n[jobfetcher] the engine could not read all of this log: {said}\n".encode()


def _span(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {left} s" if minutes else f"{seconds:.3g} s"
