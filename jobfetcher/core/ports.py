"""All seams on one page: what the job path asks of the world, and nothing about who answers.

The runner and the worker know these protocols and no adapter. A new source, file scheme or engine is one new file, one
line in `build.py` and one row of the contract test.

Two deviations from the plan, for simplicity's sake: `fetch` returns the lease *and* the job (a lease is only the right
to speak of a job; an unreadable job has a lease but no `Job`), and `Engine.own` exists because a container's root user
leaves files that a worker without root may neither read nor delete (FAULTS.md E13).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import NamedTuple, Protocol

from jobfetcher.core.halt import Halt
from jobfetcher.core.job import FileRef, Job, JobId, OutputKind
from jobfetcher.core.machine import Offer
from jobfetcher.core.phases import Phase
from jobfetcher.core.run import Exit, Image, Outcome, RunSpec, Stored, Written
from jobfetcher.core.urls import SignedRequest


class Standing(Enum):
    """What a source says to an update: KEEP on; CANCEL: its user took it back; LOST: somebody else has it.

    CANCEL and LOST both mean: end the job, never speak of it again.
    """

    KEEP = "keep"
    CANCEL = "cancel"
    LOST = "lost"


class Lease(Protocol):
    """The right to speak of one job. One sender at a time uses it (DESIGN.md, rule 4)."""

    @property
    def job_id(self) -> JobId: ...

    @property
    def token(self) -> str:
        """What `JobSource.resume` needs to rebuild this lease in another process."""
        ...

    def beat(self, phase: Phase, note: str = "") -> Standing:
        """Tell the source where the job stands, and seldom a `note`: what it waits for. After CANCEL or LOST it is
        never asked again.

        Raises SourceUnavailable or SourceRefused; repeating is always safe.
        """
        ...

    def settle(self, outcome: Outcome) -> Standing:
        """Tell the end: `finished` or `error`. Once the source has accepted it, this lease says nothing more.

        Raises SourceUnavailable or SourceRefused while it is not accepted, although it may have been heard: call again
        until it is. TooSoon when nothing was sent because an earlier word may still be on its way.
        """
        ...

    def release(self, why: str) -> Standing:
        """Give the job back for others. Idempotent like `settle`, same errors."""
        ...

    def used_up(self) -> None:
        """The job ran here and was then taken back: it must not be handed to this worker again as if it had not run
        (FAULTS.md T30). `settle` says so by itself. Sends nothing, never raises, and may be called again.
        """
        ...

    def sign_input(self, ref: FileRef) -> SignedRequest:
        """A request that fetches an input, signed now. Raises JobFault if the source does not know it."""
        ...

    def sign_output(self, kind: OutputKind, folder: str, name: str, *, renew: bool = False) -> SignedRequest:
        """A request that stores `folder/name` (folder may be empty). `renew`: the last one did not work any more."""
        ...


class Claim(NamedTuple):
    """A job handed out to us, and the right to speak of it."""

    lease: Lease
    job: Job


class JobSource(Protocol):
    """Where jobs come from. `max_hold_s`: how long a job stays ours without a word, in seconds."""

    @property
    def max_hold_s(self) -> float: ...

    def fetch(self, offer: Offer, wait_s: float) -> Claim | None:
        """A job that fits `offer`, or None; may wait up to `wait_s` for one.

        Raises SourceUnavailable, SourceRefused, or UnreadableJob for a job that nobody could run.
        """
        ...

    def resume(self, token: str, job_id: JobId, *, cut_off: Phase | None = None) -> Lease:
        """The lease of a job that was handed out earlier, from its token. Sends nothing.

        `cut_off`: an earlier process died in that phase, so that an update of its may still be on its way, and the job
        may have been taken back or handed on since: the source is asked before anything is said.
        """
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Download:
    """One file to fetch. `name` is for people; `part` is where its bytes go (a file only this worker writes)."""

    name: str
    sign: Callable[[], SignedRequest]
    part: Path


@dataclass(frozen=True, slots=True)
class Upload:
    """One file to send. `open` gives a fresh descriptor of it, for the caller to close; `sign(renew)` a request for it.

    `size` in bytes and `mtime_ns` are what the walk saw. `open` raises JobFault if the file is not that any more, or
    OSError; one that differs at the end of its sending has changed meanwhile.
    """

    name: str
    filename: str
    size: int
    mtime_ns: int
    open: Callable[[], int]
    sign: Callable[[bool], SignedRequest]


class Watch(Protocol):
    """What a transfer reports to, and where it learns that it must end. Called from the caller's thread only."""

    @property
    def halt(self) -> Halt: ...

    def expect(self, size: int) -> None:
        """`size` more bytes will come or go than were known of (negative: so many less)."""
        ...

    def moved(self, size: int) -> None:
        """`size` more bytes came or went, also out of the cache (negative when they must be moved again)."""
        ...

    def done(self, item: Download | Upload, stored: Stored) -> None:
        """`item` is whole and verified. Raising here aborts the transfer."""
        ...

    def retrying(self, item: Download | Upload, why: str, for_s: float | None) -> None:
        """`item` has to be tried again, for a reason that is new to it, for `for_s` seconds more at most; None: for as
        long as the job is held. Not told for what the next try mends at once."""
        ...

    def recovered(self, item: Download | Upload) -> None:
        """What `retrying` told of `item` is over, since it goes on or is done."""
        ...

    def noticed(self, item: Download | Upload, what: str) -> None:
        """Something about `item`, for people, that keeps it from nothing."""
        ...


class Transfer(Protocol):
    """How bytes move. Batches, concurrent, memory bounded whatever the sizes and the number of items.

    Both raise Stopped (the halt was set), JobFault (input missing or corrupt, output too large) or WorkerFault (storage
    out of reach for longer than the budget, disk). `download` ends at the first failure; `upload` sends all it can
    first and then raises the first failure. `items` is consumed lazily, so it may be a generator.
    """

    def download(self, items: Iterable[Download], watch: Watch) -> None: ...

    def upload(self, items: Iterable[Upload], watch: Watch) -> None: ...

    def close(self) -> None: ...


#: Called while an image is pulled: bytes so far, and in all as far as the engine knows.
PullProgress = Callable[[int, int], None]


#: Called while a pull is tried again: why, and for how many seconds more at most.
PullWaits = Callable[[str, float], None]


class Container(Protocol):
    """One container of ours."""

    @property
    def id(self) -> str: ...

    def wait(self, timeout_s: float) -> Exit | None:
        """How it ended, as soon as it does; None if it still runs after `timeout_s`.

        Of one that was never started, as far as the engine knows, it is an end that is not genuine.
        Raises WorkerFault when the engine cannot be reached, JobFault when the container was removed by somebody else.
        """
        ...

    def is_paused(self) -> bool:
        """Whether a person paused it (FAULTS.md E11)."""
        ...

    def written(self) -> Written:
        """What it holds on disks that has no name in the job's directory; slow. Too little where this process may not
        look: then only the free space of the disk tells the rest (FAULTS.md D3)."""
        ...

    def stop(self, grace_s: float) -> None:
        """TERM, and KILL after `grace_s`. Safe from any thread, when it has ended, and when it is gone."""
        ...

    def save_logs(self, path: Path) -> None:
        """Write what it printed (stdout and stderr in order) to `path`, memory bounded."""
        ...

    def last_lines(self, count: int) -> str:
        """The last `count` lines it printed, as text, at most 64 KiB read."""
        ...

    def remove(self) -> None:
        """Remove it with its anonymous volumes. Safe when it is gone already."""
        ...


class Engine(Protocol):
    """What runs containers. Raises WorkerFault(ENGINE) when it cannot be reached, JobFault for the job's own faults."""

    def check(self) -> None:
        """Raise ConfigError (not there, no permission) or WorkerFault (does not answer) unless jobs could run now."""
        ...

    def prepare(self, reference: str, halt: Halt, progress: PullProgress, waits: PullWaits | None = None) -> Image:
        """The image on this machine: allowed, pulled if the policy says so, right architecture.

        Raises Stopped, JobFault (missing, denied, not allowed, other architecture) or WorkerFault (registry, engine).
        """
        ...

    def start(self, spec: RunSpec, before_start: Callable[[str], None] | None = None) -> Container:
        """Create and start; if a container of that name exists and its labels are ours, adopt it instead.

        `before_start` is called with the container's id before the engine is asked to start it. Whoever remembers that
        must not call this again for the same directory: what was asked for once may have run, whatever an engine says
        that was killed meanwhile (FAULTS.md A3). One that was lost on the way raises WorkerFault(INTERRUPTED), as does
        an image that is gone: then a clean state and a new container are right.
        """
        ...

    def prove(self, spec: RunSpec, folder: Path) -> bool:
        """Run a box of the worker's own, made as `spec` says but for its name and program, see it work, remove it.

        `folder` is where this process sees `spec.files_host_path`. `spec.image_id` empty: the engine has an image for
        that; else an image that was prepared before, in which `spec`'s GPUs are asked whether they answer. False: such
        an image cannot tell.

        Raises ConfigError naming the setting that is wrong, or WorkerFault(GPU, DISK, ENGINE) saying what to do.
        """
        ...

    def find(self, job_id: JobId) -> Container | None:
        """This worker's container of that job, running or not."""
        ...

    def reap(self, known: frozenset[JobId], *, older_than_s: float = 0.0) -> list[str]:
        """Remove this worker's containers of jobs not in `known` that are at least so old; returns their names."""
        ...

    def forget_image(self, image_id: str, reference: str) -> bool:
        """Remove an image that this worker pulled, if `reference` still means it and nothing uses it; never forced.

        False: it is in use, or it is not ours any more (somebody gave it other names); True: it is gone.
        """
        ...

    def own(self, host_path: str) -> None:
        """Make everything below `host_path` belong to this process's user, through a throw-away container.

        Raises WorkerFault(DISK) for what cannot be given back, after all that can has been; WorkerFault(ENGINE) where a
        later try may go better.
        """
        ...


#: Something that happened: a stable name and plain fields. Never raises into the caller.
Emit = Callable[..., None]
