"""The worker API as a JobSource. Every oddity of the server (PROTOCOL.md, S1 to S24) is met here and nowhere else.

How an end is told (`finished`, `error`, and `queued`, which gives the job back):

1. An end counts as told when a PUT of it was accepted by the API itself, and by nothing else (S19, S20). The server
   commits an update to its queue first and then tells the user's side. Where that fails it answers 500, its state says
   `finished`, and the user's side never hears of it unless the end is told again: no state that is read back proves
   anything. So after a 5xx, a time-out, a cut or a page the end is told again until it is accepted.
2. `GET status` decides one thing, whether the job is still ours: 404 ends the story (S7). It is asked before an end is
   repeated, and before the first one where the lease is older than 300 s (J4). After a state that is an end nothing
   but the end is sent, for any other word would open the job again (S6).
3. Nothing is sent while an update sent before can still be on its way, whether a heartbeat or an end: 30 s after one
   without an answer, or that a gateway answered with 5xx, because the API behind it may still be at it.
4. Where the API itself answers 5xx the pauses grow from 2 s to 5 min. Each repeat that it commits may append the
   details once more and send one more mail (S11). That is accepted, because the user who never hears of a result has
   lost it, and a second mail costs a look: with these pauses it is some 2,000 repeats in the seven days of the outbox.
5. One answer is as final as an acceptance: a 4xx of the API's own to an end that its state shows already. A server that
   checks transitions refuses a repeat for ever (B10).
6. A process that died while it told the end may have been heard or not. Its successor waits as in 3, asks as in 2, and
   tells it again, unless the journal says that the end was accepted (outbox.py).
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from jobfetcher.core.errors import (
    ConfigError,
    JobFault,
    JobReason,
    SourceError,
    SourceUnavailable,
    Stopped,
    StopReason,
    TooSoon,
    UnreadableJob,
    UnwantedJob,
    WorkerFault,
    WorkerReason,
)
from jobfetcher.core.failpoints import failpoint
from jobfetcher.core.job import FileRef, JobId, OutputKind, parse_job_id
from jobfetcher.core.machine import Gpu, Offer
from jobfetcher.core.phases import Phase
from jobfetcher.core.ports import Claim, Emit, Standing
from jobfetcher.core.run import Ending, Outcome
from jobfetcher.core.text import clean, details
from jobfetcher.core.urls import Method, SignedRequest, UrlPolicy, canonical_url
from jobfetcher.sources.worker_api.client import CALL_S, Client, Params
from jobfetcher.sources.worker_api.reply import ForeignAnswer, Reply, UnusableAnswer, failure, is_definite
from jobfetcher.sources.worker_api.signing import NotForThisWorker, Verifier
from jobfetcher.sources.worker_api.wire import (
    ERROR,
    FINISHED,
    POSTPROCESSING,
    QUEUED,
    STATUS_OF_PHASE,
    first_key,
    is_behind,
    later,
    parse_specs,
)

#: PROTOCOL.md S4: a job silent for longer is handed on.
LEASE_S = 300.0

#: FAULTS.md J3: short, so that ten heartbeats fit into one lease.
BEAT_WITHIN_S = 10.0

#: So long after we gave it up an update that got no answer may still arrive at the server: the length of a whole call.
IN_DOUBT_S = CALL_S

#: FAULTS.md B10: what a server may answer to an update without saying whether the job is still ours.
_UNDECIDED = frozenset({409, 410, 412, 422})

#: What a filter before the API may answer to the words of an update, which travel in its address.
_ABOUT_WORDS = frozenset({400, 403, 406, 413, 414, 431})

#: Longest pause before an end is told again to an API that answers 5xx to it, in seconds.
_REPEAT_CAP_S = 300.0

#: PROTOCOL.md: a form is valid for 600 s; two minutes are kept for the upload that uses it last.
FORM_S = 480.0

#: Forms of at most this many folders are kept: the walk goes folder by folder, so few are in use at once.
_FORMS_KEPT = 64


#: Of jobs that nobody asked for so many are given back, and so many bad ids are named: a server that hands out
#: thousands at once would keep the worker busy for hours with jobs that return to their queue by themselves (S4).
_GIVEN_BACK, _NAMED = 3, 16

#: So long the first job waits for that, in seconds; what is left goes on beside it.
_GIVE_BACK_S = 5.0


def boottime() -> float:
    """Seconds, counting those that the machine was suspended (FAULTS.md J4): a lease runs out during sleep, too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


_ENDS = frozenset({FINISHED, ERROR})


@dataclass(frozen=True, slots=True)
class Filter:
    """Which jobs to ask for: of these groups first (S21), and only those that waited at least `older_than_s`."""

    groups: tuple[str, ...] = ()
    older_than_s: int = 0


class WorkerApi:
    """The JobSource. `client.auth` must be set. `signatures`: None where jobs need none (T15, T30).

    `beat_within_s`: the deadline of one heartbeat, in seconds.
    """

    max_hold_s = LEASE_S

    def __init__(
        self,
        client: Client,
        policy: UrlPolicy,
        *,
        wanted: Filter,
        emit: Emit,
        signatures: Verifier | None = None,
        beat_within_s: float = BEAT_WITHIN_S,
        clock: Callable[[], float] = boottime,
    ) -> None:
        self._client = client
        self._beat_within_s = beat_within_s
        self._policy = policy
        self._wanted = wanted
        self._emit = emit
        self._signatures = signatures
        self._clock = clock
        #: The lease of each job that somebody here holds: a server without RETRY_DIFFERENT may hand it out again.
        self._held: weakref.WeakValueDictionary[JobId, ApiLease] = weakref.WeakValueDictionary()
        self._closing = threading.Event()

    def fetch(self, offer: Offer, wait_s: float) -> Claim | None:  # noqa: ARG002 - this server has no long poll
        """Ask for one job; once per free GPU model, because the server compares models for equality (S18).

        The server hands a job out the moment it answers, without acknowledgement (S1): a lost answer is a job that
        comes back to the queue after 300 s, and asking again would lose a second one. So nothing is repeated here.
        """
        for gpu in _one_per_model(offer.gpus) or [None]:
            asked_at = self._clock()
            try:
                reply = self._client.request("GET", "/jobs", self._question(offer, gpu))
                if reply.status == 404:
                    raise SourceUnavailable(
                        f"{self._client.base_url} has no /jobs (404): is API_URL the address of a worker API?"
                    )
                if reply.status != 200:
                    raise failure(reply, "the request for a job")
                handed_out = reply.json()
            except UnusableAnswer as error:
                raise self._unreadable(error, asked_at) or error from None
            if not isinstance(handed_out, dict):
                raise SourceUnavailable("the server's answer to the request for a job is not an object")
            if handed_out:
                return self._take_first(handed_out, asked_at)
        return None

    def resume(self, token: str, job_id: JobId, *, cut_off: Phase | None = None) -> ApiLease:
        """Raises ConfigError for a job of another server: its words would mean another job here.

        Without `cut_off` other processes may speak of the job, too (jobfetcher.steps): only its end is asked for first.
        """
        if _spelt_alike(token) != _spelt_alike(self._client.base_url):
            raise ConfigError(
                f"PATH_BASE holds job {job_id} of {clean(token, 200)}, but API_URL is {self._client.base_url}; start "
                "once more with the old API_URL to bring the job to its end, or use another PATH_BASE"
            )
        return self._lease(job_id, accepted_at=None, cut_off=cut_off)

    def close(self) -> None:
        self._closing.set()
        self._client.close()

    def _question(self, offer: Offer, gpu: Gpu | None) -> Params:
        question = [("memory", str(offer.memory_mib)), ("cpu_cores", str(offer.whole_cores)), ("limit", "1")]
        if gpu is not None:
            question += [("gpu_mem", str(gpu.memory_mib)), ("gpu_model", gpu.model), ("gpu_archi", gpu.archi)]
        if self._wanted.older_than_s:
            question.append(("older_than", str(self._wanted.older_than_s)))
        return [*question, *(("groups", group) for group in self._wanted.groups)]

    def _take_first(self, handed_out: Mapping[str, Any], asked_at: float) -> Claim:
        """The first job. Of the others, which nobody asked for, a few go back at once (FAULTS.md B16), and what is more
        than a few returns to its queue by itself (S4).

        `asked_at`: when the question was sent, from which the lease counts (S4).
        """
        leases: list[tuple[ApiLease, Any]] = []
        bad, more = 0, 0
        for key, specs in handed_out.items():
            try:
                job_id = parse_job_id(key)
            except ValueError as error:
                # Not even its name can be spoken: nothing can be sent about it; it returns to the queue by itself.
                bad += 1
                if bad <= _NAMED:
                    message = f"the server handed out a job with a bad id: {error}"
                    self._emit("job_unnameable", level="error", message=message)
                continue
            if (held := self._held.get(job_id)) is not None:
                held.was_handed_out_again(asked_at)
                if leases:
                    continue  # it is in hand here
            if len(leases) > _GIVEN_BACK:
                more += 1
            else:
                leases.append((self._lease(job_id, accepted_at=asked_at), specs))
        if not leases:
            raise SourceUnavailable("the server handed out a job without a usable id")
        if more or bad > _NAMED:
            message = (
                f"the server handed out {len(handed_out)} jobs where one was asked for ({bad} with a bad id): "
                f"{_GIVEN_BACK} are given back at most, the others return to their queue by themselves"
            )
            self._emit("too_many_jobs", level="warning", message=message)
        self._give_back([extra for extra, _ in leases[1:]])
        lease, specs = leases[0]
        try:
            hashes = {} if self._signatures is None else self._signatures.check(lease.job_id, specs)
            return Claim(lease, parse_specs(lease.job_id, specs, hashes))
        except NotForThisWorker as error:
            raise UnwantedJob(lease, WorkerReason.POLICY, str(error)) from None
        except WorkerFault as fault:
            raise UnwantedJob(lease, fault.reason, str(fault)) from fault
        except ValueError as error:
            raise UnreadableJob(lease, str(error)) from None

    def _give_back(self, extras: Sequence[ApiLease]) -> None:
        """Give these jobs back in a thread of its own: a server that does not answer holds up the job that was taken
        for some seconds only, and neither a signal nor the end of the worker."""

        def give_back() -> None:
            for extra in extras:
                if self._closing.is_set():
                    return
                try:
                    extra.release("this worker asked for one job only")
                except SourceError as error:
                    self._emit("release_failed", level="warning", job=extra.job_id, message=str(error))
                    return  # nor would it hear of the others, which return to their queue by themselves

        if not extras:
            return
        thread = threading.Thread(target=give_back, name="give-back", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the limit of threads: they return to their queue by themselves
            return
        thread.join(_GIVE_BACK_S)

    def _ended(self, job_id: JobId) -> None:
        if self._signatures is not None:
            self._signatures.ended(job_id)

    def _unreadable(self, error: UnusableAnswer, asked_at: float) -> UnreadableJob | None:
        """A job in an answer that nobody can use, if its id can be read all the same (FAULTS.md B15)."""
        try:
            job_id = parse_job_id(first_key(error.start))
        except ValueError:
            return None
        return UnreadableJob(self._lease(job_id, accepted_at=asked_at), error.why)

    def _lease(self, job_id: JobId, accepted_at: float | None, cut_off: Phase | None = None) -> ApiLease:
        lease = ApiLease(
            self._client,
            self._policy,
            job_id,
            accepted_at=accepted_at,
            cut_off=cut_off,
            emit=self._emit,
            on_end=self._ended,
            beat_within_s=self._beat_within_s,
            clock=self._clock,
        )
        self._held.setdefault(job_id, lease)
        return lease


def _spelt_alike(url: str) -> str:
    """An address that may be spelt in several ways, in one; an older worker wrote it down as its owner had."""
    try:
        return canonical_url(url)
    except ValueError:
        return url


class ApiLease:
    """One job of the worker API. All updates go through one lock, in order (S9: two at once may fail).

    What is said of a job never goes backwards: while it is run again, the server goes on hearing `running`.
    """

    def __init__(
        self,
        client: Client,
        policy: UrlPolicy,
        job_id: JobId,
        *,
        accepted_at: float | None,
        cut_off: Phase | None,
        emit: Emit,
        on_end: Callable[[JobId], None] = lambda job_id: None,  # noqa: ARG005 - nobody wants to know
        beat_within_s: float = BEAT_WITHIN_S,
        clock: Callable[[], float] = boottime,
    ) -> None:
        self.job_id = job_id
        self._on_end = on_end
        self._beat_within_s = beat_within_s
        self.token = client.base_url
        self._client = client
        self._policy = policy
        self._emit = emit
        self._clock = clock
        self._door = threading.Lock()
        #: Latched: after the first 404 the job is never spoken of again (S7), nor after somebody else ended it.
        self._gone: Standing | None = None
        #: Send time of the last accepted update; None when this process never had one accepted (S4).
        self._accepted_at = accepted_at
        #: Nobody else speaks of this job, so that it is this lease's business to know whether it is still ours (J4).
        self._alone = accepted_at is not None or cut_off is not None
        #: How far the job is, in the server's words: what it accepted from us, or was seen to know already.
        self._heard = ""
        self._server_errors = 0
        self._undecided = 0
        #: Until then an update that got no answer may still be on its way, and arrive after one sent later.
        self._on_its_way_until = 0.0
        if cut_off is not None:
            self._on_its_way_until = clock() + (IN_DOUBT_S if cut_off is Phase.SETTLING else beat_within_s)
        #: The end may have been committed although it was not accepted: the server is asked before it is told again.
        self._end_in_doubt = cut_off is Phase.SETTLING or not self._alone
        #: An end was sent: no heartbeat may follow it (S6). How often the API answered 5xx to it, and until when it
        #: rests.
        self._end_was_sent = False
        self._end_refusals, self._end_rests_until = 0, 0.0
        self._settled = False
        self._forms = _Forms(clock)

    def beat(self, phase: Phase, note: str = "") -> Standing:
        """See `Lease.beat`. A note is appended to the job's record each time (S11): whoever sends one says it once."""
        with self._door:
            if self._gone or self._settled or self._end_was_sent:
                return self._gone or Standing.KEEP
            if self._alone and self._is_unsure():
                return self._confirm(STATUS_OF_PHASE[phase])
            return self._update(later(STATUS_OF_PHASE[phase], self._heard), note, within_s=self._beat_within_s)

    def was_handed_out_again(self, asked_at: float) -> None:
        """The server gave us anew what we hold, after a silence: it is ours as of then, and stands at `pulled`."""
        with self._door:
            if not self._gone and not self._settled:
                self._accepted_at, self._heard = asked_at, ""

    def settle(self, outcome: Outcome) -> Standing:
        # Before anything is sent: a server that never accepts an end could else play the job again for ever (T30).
        self._on_end(self.job_id)
        word = FINISHED if outcome.ending is Ending.FINISHED else ERROR
        # S11: what is written here is appended to the user's record and mailed; a plain success needs no words.
        return self._end(word, "" if outcome.ending is Ending.FINISHED and not outcome.message else outcome.message)

    def release(self, why: str) -> Standing:
        return self._end(QUEUED, why)

    def used_up(self) -> None:
        self._on_end(self.job_id)

    def sign_input(self, ref: FileRef) -> SignedRequest:
        failpoint("before:sign_input")
        path = "/".join(quote(segment, safe="") for segment in ref.split("/"))
        reply = self._client.request("GET", f"/files/{path}/url")
        if reply.status == 404:
            raise JobFault(JobReason.INPUT_MISSING, f"input {clean(ref, 200)} does not exist on the server")
        self._check_not_refused(reply, JobReason.INPUT_MISSING, f"input {clean(ref, 200)}")
        what = f"the request for a link to {clean(ref, 200)}"
        return self._signed(reply, {200}, what, {Method.GET}, lambda answer: _encoded_as_asked(answer, ref, path))

    def sign_output(self, kind: OutputKind, folder: str, name: str, *, renew: bool = False) -> SignedRequest:
        """One form serves all files of its folder for 600 s, so it is kept; a PUT is for one file (PROTOCOL.md).

        Whoever stores a file of a job that was handed on overwrites what its new holder stored (FAULTS.md B18). So a
        form at hand is not enough: once the lease is old, the server is asked before each file. Raises Stopped.
        """
        failpoint("before:sign_output")
        if self._alone and self._is_unsure():  # else the door is left alone: a heartbeat that hangs stops no upload
            with self._door:
                if self._gone is None and self._is_unsure():  # no other file was quicker
                    self._confirm(POSTPROCESSING)
        self._check_not_gone()
        return self._forms.get((kind, folder), renew, lambda: self._sign_output(kind, folder, name))

    def _sign_output(self, kind: OutputKind, folder: str, name: str) -> SignedRequest:
        reply = self._client.request(
            "POST",
            f"/jobs/{quote(self.job_id, safe='')}/files/url",
            [("type", kind.value), ("base_path", folder), ("filename", name)],
        )
        if reply.status >= 500 or reply.status == 404:
            # S8: a lost lease is answered with 500 here. The status of a job that somebody else has can be asked for,
            # too: only an update tells.
            with self._door:
                if not self._gone and self._alone:
                    self._confirm(POSTPROCESSING)
                elif not self._gone:
                    self._look()
                self._check_not_gone()
        self._check_not_refused(reply, JobReason.BAD_OUTPUT, f"output {clean(name, 100)}")
        return self._signed(reply, {200, 201}, f"the request to upload {clean(name, 100)}", {Method.POST, Method.PUT})

    def _check_not_gone(self) -> None:
        if self._gone is not None:
            raise Stopped(StopReason.LOST if self._gone is Standing.LOST else StopReason.CANCELLED)

    def _check_not_refused(self, reply: Reply, reason: JobReason, what: str) -> None:
        """Raise JobFault for a definite no to this one file: asking again would get the same answer (J8, C7).

        A 403 may also be about the account, which is never the job's fault (S16): then the status is refused, too.
        """
        if reply.status == 403:
            with self._door:
                if self._gone is None:
                    self._look()  # raises SourceRefused
                self._check_not_gone()
        elif not is_definite(reply):
            return
        raise JobFault(reason, f"the server refuses {what} with {reply.status}: {reply.words}")

    def _signed(
        self, reply: Reply, good: set[int], what: str, methods: set[Method], mend: Callable[[Any], Any] = lambda it: it
    ) -> SignedRequest:
        if reply.status not in good:
            refusal = failure(reply, what)
            if reply.status >= 500 and isinstance(refusal, SourceUnavailable):
                refusal.only_this = not self._is_unsure()  # its own word, and it takes our keep-alives meanwhile
            raise refusal
        request = self._policy.parse_request(mend(reply.json()))
        if request.method not in methods:
            raise JobFault(JobReason.UNSAFE_REQUEST, f"the server answered {what} with method {request.method.value}")
        if request.ignored:
            self._emit("request_fields_ignored", level="debug", job=self.job_id, fields=", ".join(request.ignored))
        return request

    def _is_unsure(self) -> bool:
        """J4: whether the server may have handed the job on by now without our knowing."""
        return self._accepted_at is None or self._clock() - self._accepted_at > LEASE_S

    def _confirm(self, word: str) -> Standing:
        """Whether the job is still ours; the door is held. Raises SourceError when that cannot be had now.

        Its state is asked for, which tells of a deletion (S7) and of an end. Then a word is said, which takes the job
        back where it lies in the queue (S5), and is answered with 404 where another account has it.
        """
        state = self._look(within_s=self._beat_within_s)
        if isinstance(state, Standing):
            return state
        if state in _ENDS:
            return Standing.KEEP  # our own end, committed and perhaps not heard; a word would open the job again (S6)
        return self._update(later(word, self._heard), "", within_s=self._beat_within_s)

    def _look(self, *, within_s: float = CALL_S) -> str | Standing:
        """The server's own view of the job, or CANCEL or LOST, latched, where it is not ours any more. The door is
        held."""
        reply = self._client.request("GET", self._status_path, within_s=within_s)
        if reply.status == 404:
            self._gone = Standing.CANCEL
            return self._gone
        if reply.status != 200:
            raise failure(reply, f"the question how job {self.job_id} stands")
        state = reply.json()
        if not isinstance(state, str):
            raise SourceUnavailable(f"the server's answer to the question how job {self.job_id} stands is no state")
        ended_without_us = state in _ENDS and not self._end_in_doubt
        # Only another worker with our account can have brought it back (S2, B19). `queued` is no such sign: the job was
        # silent for too long (S4), and a word of ours takes it back.
        if ended_without_us or (self._is_unsure() and is_behind(state, self._heard)):
            self._gone = Standing.LOST
            return self._gone
        self._heard = later(self._heard, state)
        return state

    def _update(self, word: str, why: str, *, within_s: float = CALL_S) -> Standing:
        """Send one status update; the door is held. Raises SourceError when it was not accepted."""
        sent_at = self._clock()
        try:
            reply = self._put(word, why, within_s)
        except ForeignAnswer as error:
            return self._not_accepted(word, error, error.status if error.status >= 500 else 0, within_s)
        if 200 <= reply.status < 300:
            self._accepted_at, self._server_errors, self._undecided = sent_at, 0, 0
            self._heard = later(self._heard, word)
            return Standing.KEEP
        if reply.status == 404:
            self._gone = Standing.CANCEL
            return self._gone
        refusal = failure(reply, f"the update of job {self.job_id} to {word!r}")
        return self._not_accepted(word, refusal, reply.status, within_s)

    def _not_accepted(self, word: str, error: SourceError, status: int, within_s: float) -> Standing:
        """Raise `error`, unless the job's state says that it is over. `status` 0: one that tells nothing."""
        self._server_errors = self._server_errors + 1 if status >= 500 else 0
        if status in _UNDECIDED and status != self._undecided:
            self._emit("update_refused", level="warning", job=self.job_id, message=str(error))
        self._undecided = status if status in _UNDECIDED else 0
        # S7: after its first 404 was lost, or when the server's sweep met the deletion first, only 500 ever comes; or
        # the page that a gateway makes of it.
        if self._server_errors >= 2 or self._undecided:
            state = self._look(within_s=within_s)
            if isinstance(state, Standing):
                return state
            if self._undecided and state == word and word in {*_ENDS, QUEUED}:
                return Standing.KEEP  # B10: it will not take it a second time
        raise error

    def _put(self, word: str, why: str, within_s: float) -> Reply:
        """Send it, and once more without its words where they may be what is refused (B10)."""
        bare = [("status", word)]
        if not why:
            return self._send(bare, within_s)
        worded = [*bare, ("runtime_details", details(why))]
        try:
            reply = self._send(worded, within_s)
        except ForeignAnswer as error:
            if error.status not in _ABOUT_WORDS:
                raise
        else:
            if reply.status != 422:
                return reply
        return self._send(bare, within_s)

    def _send(self, params: Params, within_s: float) -> Reply:
        failpoint("before:send_update")
        try:
            reply = self._client.request("PUT", self._status_path, params, within_s=within_s)
        except SourceUnavailable as error:
            # A page with another status comes from who did not pass the request on. With 5xx a gateway gave up, and
            # the server behind it may still take it.
            if error.sent and not (isinstance(error, ForeignAnswer) and error.status < 500):
                self._on_its_way_until = self._clock() + IN_DOUBT_S
            raise
        if reply.status == 504:
            self._on_its_way_until = self._clock() + IN_DOUBT_S
        failpoint("after:send_update")
        return reply

    def _end(self, word: str, why: str) -> Standing:
        """The update after which this job is never mentioned again. How it is told: see the module."""
        with self._door:
            if self._gone or self._settled:
                return self._gone or Standing.KEEP
            self._check_not_too_soon()
            unsure, state = self._is_unsure(), ""
            if unsure or self._end_in_doubt:
                found = self._look()
                if isinstance(found, Standing):
                    return found
                state = found
            if word == QUEUED and state in _ENDS:
                self._settled = True  # somebody ended it: there is nothing left to give back
                return Standing.KEEP
            if word == FINISHED and state not in _ENDS and (unsure or self._heard != POSTPROCESSING):
                # The server was away meanwhile. Its word also takes a job back that was put into the queue (S5).
                standing = self._update(POSTPROCESSING, "")
                if standing is not Standing.KEEP:
                    return standing
            doubted, self._end_in_doubt, self._end_was_sent = self._end_in_doubt, True, True
            try:
                standing = self._update(word, why)
            except SourceError as error:
                self._end_in_doubt = doubted or (isinstance(error, SourceUnavailable) and error.sent)
                self._rest_after(error)
                raise
            self._settled = standing is Standing.KEEP
            return standing

    def _check_not_too_soon(self) -> None:
        """Raise TooSoon while an update may still be on its way, or an end that got 5xx rests."""
        now = self._clock()
        if now < self._on_its_way_until:
            left_s = self._on_its_way_until - now
            raise TooSoon("waiting until no earlier update can be on its way any more", retry_after_s=left_s)
        if now < self._end_rests_until:
            left_s = self._end_rests_until - now
            raise TooSoon("waiting before the end is told again to a server that fails at it", retry_after_s=left_s)

    def _rest_after(self, error: SourceError) -> None:
        """Ever longer where it is the API itself that fails: it may have committed the end each time (S11)."""
        if not isinstance(error, SourceUnavailable) or isinstance(error, ForeignAnswer) or not self._server_errors:
            return
        self._end_refusals += 1
        pause_s = min(_REPEAT_CAP_S, 2.0 ** min(self._end_refusals, 10))
        self._end_rests_until = self._clock() + pause_s
        error.retry_after_s = max(pause_s, error.retry_after_s or 0.0)

    @property
    def _status_path(self) -> str:
        return f"/jobs/{quote(self.job_id, safe='')}/status"


class _Forms:
    """Upload forms by folder, each asked for once at a time and kept for FORM_S."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: dict[tuple[OutputKind, str], tuple[float, SignedRequest]] = {}
        self._asking: dict[tuple[OutputKind, str], threading.Lock] = {}
        #: This server signs single objects: there is nothing to keep, and nothing to wait for.
        self._one_object_each = False

    def get(self, key: tuple[OutputKind, str], renew: bool, ask: Callable[[], SignedRequest]) -> SignedRequest:
        if self._one_object_each:
            return ask()
        called_at = self._clock()
        with self._lock:
            asking = self._asking.setdefault(key, threading.Lock())
        with asking:
            signed_at, form = self._kept.get(key, (0.0, None))
            fresh = form is not None and called_at - signed_at < FORM_S
            # With `renew`, a form that somebody else fetched since this call began is new enough.
            if form is not None and fresh and (not renew or signed_at > called_at):
                return form
            asked_at = self._clock()
            request = ask()
            self._one_object_each = request.method is Method.PUT
            if request.method is Method.POST:
                with self._lock:
                    self._kept[key] = (asked_at, request)
                    while len(self._kept) > _FORMS_KEPT:
                        oldest = next(iter(self._kept))
                        del self._kept[oldest]
                        self._asking.pop(oldest, None)
            return request


def _encoded_as_asked(answer: Any, ref: FileRef, path: str) -> Any:
    """A local-disk server's answer about file `ref`, its link encoded as `path`, in which the file was asked for.

    Such a server makes the link of the *decoded* address of the question (PROTOCOL.md, FAULTS.md C19), so that a `#`,
    `?` or `%41` of the file's name would be read as the address's own, and the file be missing. The link's end is known
    letter for letter, and so is what it means: nothing is guessed, and its host stays what the server says.
    """
    decoded = f"/files/{ref}/download"
    if not isinstance(answer, dict) or not isinstance(url := answer.get("url"), str) or not url.endswith(decoded):
        return answer
    if any(mark in url.removesuffix(decoded) for mark in "?#"):
        return answer  # it ends another address's query
    return {**answer, "url": f"{url.removesuffix(decoded)}/files/{path}/download"}


def _one_per_model(gpus: tuple[Gpu, ...]) -> list[Gpu | None]:
    """For each model the free GPU with the most memory: what fits a smaller one fits it, too."""
    best: dict[str, Gpu] = {}
    for gpu in sorted(gpus, key=lambda gpu: gpu.memory_mib):
        best[gpu.model] = gpu
    return list(best.values())
