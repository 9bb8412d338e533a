"""The story of one input, top to bottom: sign, fetch, resume, renew, verify (FAULTS.md C1 to C7).

Used by `presigned`, in a batch's worker thread.
"""

from __future__ import annotations

from jobfetcher.core.errors import JobFault, JobReason
from jobfetcher.core.ports import Download
from jobfetcher.core.run import Stored
from jobfetcher.core.urls import Method, SignedRequest
from jobfetcher.transfer import replies
from jobfetcher.transfer.batch import Batch
from jobfetcher.transfer.exchange import Reply
from jobfetcher.transfer.part import Discard, Part
from jobfetcher.transfer.patience import Patience, Rules, TryAgain
from jobfetcher.transfer.wire import Wire

#: New URLs without a new byte before we believe that the storage means it (C1).
_MAX_RENEWALS = 20

#: Whole files that do not have their checksum before the object itself must be wrong (C3).
_MAX_DAMAGED = 3

#: Fewer new bytes than this do not renew the budget, else a server that trickles could hold us for ever (T23).
_PROGRESS = 1024 * 1024


def fetch(item: Download, batch: Batch, wire: Wire, rules: Rules, budget_s: float) -> Stored:
    """Bring `item.part` to its whole, verified content. Raises JobFault, WorkerFault, or what `item.sign` raises."""
    batch.check()
    patience = Patience(rules, budget_s, f"input {item.name}", batch.ended)
    with Part(item.part, item.name, batch.moved, batch.expect) as part:
        part.resume(batch.check)
        request: SignedRequest | None = None
        renewals = damaged = 0
        while True:
            batch.check()
            if request is None:
                request = patience.signed(item.sign)
                _check_method(request)
            before = part.best
            try:
                reply = wire.get(request, part.wanted(), part.accept, batch)
                if _is_file(reply, part):
                    part.check_whole(reply)
                elif replies.is_later(reply):
                    raise TryAgain(f"the storage answers {replies.words(reply)}", replies.retry_after_s(reply))
                elif reply.status == 416 or reply.status < 400:
                    raise Discard(f"the storage answers {replies.words(reply)}")
            except TryAgain as failure:
                if isinstance(failure, Discard):
                    part.restart()
                if part.best > before:
                    renewals = 0
                if part.best - before >= _PROGRESS:
                    patience.progressed()
                patience.again(str(failure), failure.retry_after_s)
                continue

            if _is_file(reply, part):
                wrong = part.mismatch()
                if not wrong:
                    return part.stored()
                damaged += 1
                part.restart()
                if damaged >= _MAX_DAMAGED:
                    part.remove()
                    raise JobFault(
                        JobReason.INPUT_CORRUPT, f"input {item.name} arrived damaged {damaged} times: {wrong}"
                    )
            elif replies.is_missing(reply):
                raise JobFault(
                    JobReason.INPUT_MISSING, f"input {item.name} not found in storage: {replies.words(reply)}"
                )
            else:
                renewals += 1
                request = None
                if renewals > (_MAX_RENEWALS if replies.is_refused(reply) else 1):
                    raise JobFault(
                        JobReason.INPUT_MISSING,
                        f"input {item.name} cannot be had: the storage refuses it with {replies.words(reply)}",
                    )


def _is_file(reply: Reply, part: Part) -> bool:
    """Whether all the bytes are here now. 416 is the answer to asking for what follows the last one (C5)."""
    return reply.status in {200, 206} or (reply.status == 416 and replies.unsatisfied_size(reply) == part.offset)


def _check_method(request: SignedRequest) -> None:
    if request.method is not Method.GET:
        raise JobFault(JobReason.UNSAFE_REQUEST, "the server handed out a request that sends, for a file to be fetched")
