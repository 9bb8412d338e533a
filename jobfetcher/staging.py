"""Which files go in and out of a job, and under which names.

Used by the runner and by `steps`. How bytes move is the transfer's business, what a name means to the server the
lease's. Files that an earlier attempt already moved (the journal's marks) are not moved again.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

from jobfetcher import tree
from jobfetcher.core.errors import JobFault, JobReason, WorkerFault, WorkerReason
from jobfetcher.core.failpoints import failpoint
from jobfetcher.core.halt import Halt
from jobfetcher.core.job import InputFile, Job, OutputKind
from jobfetcher.core.ports import Download, Lease, Transfer, Upload
from jobfetcher.core.run import Stored
from jobfetcher.core.text import clean
from jobfetcher.core.urls import SignedRequest
from jobfetcher.pinned import shown
from jobfetcher.workspace import Workspace

#: What the worker itself sends lies below this folder, as logs.
OWN_FOLDER = "jobfetcher"

#: So many skipped things are named; of the others only the number is told.
_NAMED = 5

#: Read at once when an input is hashed, in bytes.
_PIECE = 1024**2


class Troubles(Protocol):
    """What is told of single files, by name; see `core.ports.Watch`."""

    def retrying(self, name: str, why: str, for_s: float | None) -> None: ...

    def recovered(self, name: str) -> None: ...

    def noticed(self, name: str, what: str) -> None: ...


@dataclass(slots=True)
class Progress:
    """How far a batch came. `changed` is called after every change, often; it must be quick. `troubles`: who is told
    where a file has to be tried again."""

    files: int = 0
    files_total: int | None = None
    moved: int = 0
    bytes_total: int | None = None
    changed: Callable[[Progress], None] = lambda progress: None  # noqa: ARG005 - the callback's signature
    troubles: Troubles | None = None


@dataclass(slots=True)
class StagedOut:
    """What was sent, and what was not because it is no plain file (named in the job's details).

    `gone`: folders for outputs, which were there when the job began, and are not any more.
    """

    stored: dict[str, Stored] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    skipped_count: int = 0
    gone: list[str] = field(default_factory=list)

    def skip(self, name: str, why: str) -> None:
        """Remember something that is not sent."""
        self.skipped_count += 1
        if len(self.skipped) < _NAMED:
            self.skipped.append(f"{clean(name, 120)} {why}")

    def sentence(self) -> str:
        """What was skipped or removed, for people; empty when nothing was."""
        said = [f"output folder {clean(path, 120)} is gone: the job removed it" for path in self.gone]
        if not self.skipped_count:
            return "; ".join(said)
        more = self.skipped_count - len(self.skipped)
        said.append(f"not uploaded: {'; '.join(self.skipped)}" + (f"; and {more} more" if more else ""))
        return "; ".join(said)


class _Watch:
    """core.ports.Watch over a Progress and a callback per file."""

    def __init__(
        self,
        halt: Halt,
        progress: Progress,
        done: Callable[[Download | Upload, Stored], None],
        awaits: Callable[[int], None] = lambda size: None,  # noqa: ARG005 - the default: nothing is written here
    ) -> None:
        self.halt = halt
        self._progress = progress
        self._done = done
        self._awaits = awaits

    def expect(self, size: int) -> None:
        self._progress.bytes_total = (self._progress.bytes_total or 0) + size
        self._awaits(self._left())

    def moved(self, size: int) -> None:
        self._progress.moved += size
        if self._progress.bytes_total:  # else nobody said how much there is
            self._awaits(self._left())
        self._progress.changed(self._progress)

    def _left(self) -> int:
        return max(0, (self._progress.bytes_total or 0) - self._progress.moved)

    def done(self, item: Download | Upload, stored: Stored) -> None:
        self._done(item, stored)
        self.recovered(item)
        self._progress.files += 1
        self._progress.changed(self._progress)

    def retrying(self, item: Download | Upload, why: str, for_s: float | None) -> None:
        if self._progress.troubles is not None:
            self._progress.troubles.retrying(item.name, why, for_s)

    def recovered(self, item: Download | Upload) -> None:
        if self._progress.troubles is not None:
            self._progress.troubles.recovered(item.name)

    def noticed(self, item: Download | Upload, what: str) -> None:
        if self._progress.troubles is not None:
            self._progress.troubles.noticed(item.name, what)


def stage_in(
    job: Job,
    lease: Lease,
    workspace: Workspace,
    transfer: Transfer,
    *,
    halt: Halt,
    have: Mapping[str, Stored],
    mark: Callable[[Stored], None],
    progress: Progress,
    awaits: Callable[[int], None] = lambda size: None,  # noqa: ARG005 - the default: whoever calls has seen to it
) -> dict[str, Stored]:
    """Bring all inputs into `workspace.files`; returns them by path.

    A file is moved into place only when it is whole and verified, then marked. `have`: files placed earlier, which are
    kept if they still have their size. `awaits(size)` is called with the bytes that are still to come whenever that is
    known anew, 0 at the end, and raises where they do not fit (FAULTS.md D2). Raises Stopped, JobFault or WorkerFault.
    """
    workspace.create()
    stored: dict[str, Stored] = {file.path: have[file.path] for file in job.inputs if _kept(workspace, file, have)}
    waiting = [file for file in job.inputs if file.path not in stored]
    parts = {workspace.parts / str(number): file for number, file in enumerate(job.inputs)}
    part_of = {file.path: part for part, file in parts.items()}

    def placed(item: Download | Upload, done: Stored) -> None:
        assert isinstance(item, Download)  # noqa: S101 - a download reports downloads
        file = parts[item.part]
        failpoint("before:place")
        try:
            tree.place(item.part, workspace.files, file.path.split("/"))
        except OSError as error:
            raise WorkerFault(WorkerReason.DISK, f"input {file.path!r} cannot be stored: {error.strerror}") from error
        stored[file.path] = done
        mark(done)
        failpoint("after:place")

    progress.files, progress.files_total = len(stored), len(job.inputs)
    items = (Download(file.path, partial(lease.sign_input, file.ref), part_of[file.path]) for file in waiting)
    try:
        transfer.download(items, _Watch(halt, progress, placed, awaits))
    finally:
        awaits(0)
    for file in job.inputs:
        if file.sha256 is not None and (checked := _checked(workspace, file, stored[file.path], halt)):
            stored[file.path] = checked
            mark(checked)
    workspace.make_output_folders(job)
    return stored


def _checked(workspace: Workspace, file: InputFile, stored: Stored, halt: Halt) -> Stored | None:
    """Raise JobFault unless an input has the content that whoever signed the job said, whatever its store says of it
    (FAULTS.md T30). What it is then, where something else was known of it: a store may only have vouched for an MD5.
    """
    found = stored.digest
    if not found.startswith("sha256:"):
        hasher = hashlib.sha256()
        try:
            with tree.open_file(workspace.files, file.path.split("/")) as content:
                while piece := content.read(_PIECE):
                    halt.check()
                    hasher.update(piece)
        except OSError as error:
            raise WorkerFault(WorkerReason.DISK, f"input {file.path!r} cannot be read: {error.strerror}") from error
        found = f"sha256:{hasher.hexdigest()}"
    if found != f"sha256:{file.sha256}":
        raise JobFault(
            JobReason.INPUT_CORRUPT,
            f"input {clean(file.path, 200)} is not what was signed: it is {found}, signed was sha256:{file.sha256}",
        )
    return None if found == stored.digest else replace(stored, digest=found)


def _kept(workspace: Workspace, file: InputFile, have: Mapping[str, Stored]) -> bool:
    if file.path not in have:
        return False
    found = next(tree.walk(workspace.files, file.path.split("/")), None)
    return isinstance(found, tree.Found) and found.size == have[file.path].size


def stage_out(
    job: Job,
    lease: Lease,
    workspace: Workspace,
    transfer: Transfer,
    *,
    halt: Halt,
    have: Mapping[str, Stored],
    mark: Callable[[Stored], None],
    progress: Progress,
) -> StagedOut:
    """Send every file of the job's output trees, then the worker's own logs; whatever the exit code was.

    A file keeps its path relative to the job directory (PROTOCOL.md). The container must be gone. What is no regular
    file is not followed but reported. Raises Stopped, JobFault (after everything else was sent) or WorkerFault.
    """
    if not workspace.files.is_dir():  # nothing to send is a success only where there is something to look at
        raise WorkerFault(
            WorkerReason.DISK, f"the job's directory {shown(workspace.files)} is gone; did somebody delete it?"
        )
    result = StagedOut(dict(have))
    unsendable: list[str] = []

    def items(files: tree.Reader, logs: tree.Reader) -> Iterator[Upload]:
        for output in job.outputs:
            if not tree.is_there(workspace.files, output.parts) and output.path not in result.gone:
                result.gone.append(output.path)
            for found in tree.walk(workspace.files, output.parts):
                halt.check()  # many in a row may have been sent by an earlier attempt
                if isinstance(found, tree.Skipped):
                    result.skip("/".join(found.parts), found.why)
                    continue
                if output.kind is OutputKind.LOG and _is_own(workspace, found):
                    result.skip("/".join(found.parts), "has the name of a log of the worker's own")
                    continue
                if not _sendable(found.parts):
                    unsendable.append(clean("/".join(found.parts), 120))
                    continue
                item = _upload(lease, output.kind, files, found, "/".join(found.parts[:-1]))
                if not _sent(have.get(item.name), found):
                    failpoint("before:upload")
                    yield item
        for found in tree.walk(workspace.logs, ()):
            if isinstance(found, tree.Found):
                item = _upload(lease, OutputKind.LOG, logs, found, OWN_FOLDER)
                if not _sent(have.get(item.name), found):
                    yield item

    def sent(item: Download | Upload, done: Stored) -> None:
        result.stored[item.name] = done
        mark(done)
        failpoint("after:upload")

    try:
        with tree.Reader(workspace.files) as files, tree.Reader(workspace.logs) as logs:
            transfer.upload(items(files, logs), _Watch(halt, progress, sent))
    except PermissionError as error:
        raise WorkerFault(
            WorkerReason.DISK, f"the job's outputs cannot be read: {error.strerror}: {error.filename}"
        ) from error
    except OSError as error:
        raise WorkerFault(WorkerReason.DISK, f"the job's outputs cannot be read: {error}") from error
    if unsendable:
        more = f" and {len(unsendable) - 1} more" if len(unsendable) > 1 else ""
        raise JobFault(
            JobReason.BAD_OUTPUT,
            f"output {unsendable[0]}{more} was not uploaded: its name is not UTF-8 text or has control characters",
        )
    return result


def _upload(lease: Lease, kind: OutputKind, reader: tree.Reader, found: tree.Found, folder: str) -> Upload:
    name = found.parts[-1]

    def sign(renew: bool) -> SignedRequest:
        return lease.sign_output(kind, folder, name, renew=renew)

    said = f"{kind}:{folder}/{name}" if folder else f"{kind}:{name}"

    def open_() -> int:
        try:
            return reader.reopen(found)
        except tree.Changed as error:
            raise JobFault(JobReason.BAD_OUTPUT, f"output {said} changed before it was sent") from error

    return Upload(
        name=said,
        filename=name,
        size=found.size,
        mtime_ns=found.mtime_ns,
        open=open_,
        sign=sign,
    )


def _is_own(workspace: Workspace, found: tree.Found) -> bool:
    """Whether a log of the job would be stored where one of the worker's own goes."""
    return found.parts[:-1] == (OWN_FOLDER,) and (workspace.logs / found.parts[-1]).is_file()


def _sent(earlier: Stored | None, found: tree.Found) -> bool:
    """Whether an earlier attempt stored this file: the container has been gone since, so size is enough."""
    return earlier is not None and earlier.size == found.size


def _sendable(parts: tuple[str, ...]) -> bool:
    """Names travel as UTF-8 text in a form; control characters would break it (FAULTS.md C15)."""
    return not any(unicodedata.category(char) in {"Cc", "Cs"} for part in parts for char in part)
