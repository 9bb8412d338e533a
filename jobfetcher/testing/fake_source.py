"""A job source in memory: hands out the jobs it was given and records what it is told."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from jobfetcher.core.errors import JobFault, JobReason, SourceError, Stopped, StopReason
from jobfetcher.core.job import FileRef, Job, JobId, OutputKind
from jobfetcher.core.machine import Offer
from jobfetcher.core.phases import Phase
from jobfetcher.core.ports import Claim, Standing
from jobfetcher.core.run import Ending, Outcome
from jobfetcher.core.urls import Method, SignedRequest

#: Words that end a job for its holder.
TERMINAL = frozenset({"finished", "error", "released"})


@dataclass
class Said:
    """Everything a source was told about one job, in order, and how it answers."""

    words: list[str] = field(default_factory=list)
    details: list[str] = field(default_factory=list)
    #: What the next updates are answered with; KEEP once it is empty. An exception is raised instead.
    answers: deque[Standing | SourceError] = field(default_factory=deque)
    gone: Standing | None = None
    #: How often an end was told again that had been accepted.
    repeats: int = 0


class FakeSource:
    """Give it jobs with `put`; read `said[job_id]`. `known_refs` None: every input exists."""

    max_hold_s = 300.0

    def __init__(self, base_url: str = "http://files.invalid") -> None:
        self.said: dict[JobId, Said] = {}
        self.offers: list[Offer] = []
        self.known_refs: set[str] | None = None
        self.fetch_error: SourceError | None = None
        self._base_url = base_url
        self._queue: deque[Job] = deque()
        self._lock = threading.Lock()
        self.changed = threading.Condition()

    def put(self, job: Job) -> Said:
        """Queue a job; returns the record of what will be said about it."""
        with self._lock:
            self._queue.append(job)
            return self.said.setdefault(job.id, Said())

    def fetch(self, offer: Offer, wait_s: float) -> Claim | None:  # noqa: ARG002 - nothing to wait for in memory
        with self._lock:
            self.offers.append(offer)
            if self.fetch_error is not None:
                raise self.fetch_error
            if not self._queue:
                return None
            job = self._queue.popleft()
        return Claim(self.resume("fake", job.id), job)

    def resume(self, token: str, job_id: JobId, *, cut_off: Phase | None = None) -> FakeLease:
        """With `cut_off`, a job that has ended meanwhile is lost, unless it was its end that was being told.

        What is said here arrives at once, so no update of a dead process can still be on its way.
        """
        said = self.said.setdefault(job_id, Said())
        if cut_off not in {None, Phase.SETTLING} and said.words and said.words[-1] in TERMINAL:
            said.gone = said.gone or Standing.LOST
        return FakeLease(self, token, job_id, said)

    def close(self) -> None:
        """Nothing is open."""

    def wait_for(self, happened: Callable[[], bool], timeout_s: float = 10.0) -> bool:
        """Wait until `happened` is true after something was said; False after `timeout_s`."""
        with self.changed:
            return self.changed.wait_for(happened, timeout_s)

    def sign(self, path: str, method: Method) -> SignedRequest:
        """A request that leads nowhere; a fake transfer reads only its URL."""
        return SignedRequest(method, f"{self._base_url}/{path}")


class FakeLease:
    """The lease of a FakeSource's job."""

    def __init__(self, source: FakeSource, token: str, job_id: JobId, said: Said) -> None:
        self.job_id = job_id
        self.token = token
        self._source = source
        self._said = said
        self._ended = False  # an end of this lease was accepted
        self._door = threading.Lock()

    def beat(self, phase: Phase, note: str = "") -> Standing:
        return self._say(phase.value, note)

    def settle(self, outcome: Outcome) -> Standing:
        return self._say("finished" if outcome.ending is Ending.FINISHED else "error", outcome.message)

    def release(self, why: str) -> Standing:
        return self._say("released", why)

    def used_up(self) -> None:
        """Jobs are not signed here, so none can be played again."""

    def sign_input(self, ref: FileRef) -> SignedRequest:
        if self._source.known_refs is not None and ref not in self._source.known_refs:
            raise JobFault(JobReason.INPUT_MISSING, f"input {ref} does not exist")
        return self._source.sign(ref, Method.GET)

    def sign_output(self, kind: OutputKind, folder: str, name: str, *, renew: bool = False) -> SignedRequest:  # noqa: ARG002 - what is signed here never expires
        if self._said.gone is not None:
            raise Stopped(StopReason.LOST if self._said.gone is Standing.LOST else StopReason.CANCELLED)
        return self._source.sign("/".join(part for part in (self.job_id, kind, folder, name) if part), Method.PUT)

    def _say(self, word: str, details: str) -> Standing:
        with self._door, self._source.changed:
            try:
                said = self._said
                if said.gone is not None:
                    return said.gone
                if word in TERMINAL and said.words and said.words[-1] in TERMINAL:
                    said.repeats += not self._ended  # by a lease that does not know
                    self._ended = True
                    return Standing.KEEP
                answer = said.answers.popleft() if said.answers else Standing.KEEP
                if isinstance(answer, SourceError):
                    raise answer
                if answer is not Standing.KEEP:
                    said.gone = answer
                    return answer
                said.words.append(_not_back(said.words, word))
                said.details.append(details)
                self._ended = word in TERMINAL
                return Standing.KEEP
            finally:
                self._source.changed.notify_all()


def _not_back(words: list[str], word: str) -> str:
    """`word`, or the last one said where that is further on: a job that is run again does not go backwards."""
    way = [phase.value for phase in Phase]
    last = words[-1] if words else ""
    return last if word in way and last in way and way.index(last) > way.index(word) else word
