"""The story of one output, top to bottom: measure, sign, send, compare (FAULTS.md C8 to C11, C14).

Used by `presigned`, told by a batch in the loop's thread. Every try sends the whole file again: same key, so nothing is
doubled.
"""

from __future__ import annotations

import math
import time
from functools import partial
from typing import NamedTuple
from urllib.parse import parse_qs

from jobfetcher.core.errors import JobFault, JobReason, WorkerFault, WorkerReason
from jobfetcher.core.ports import Upload
from jobfetcher.core.run import Stored
from jobfetcher.core.urls import Method, SignedRequest
from jobfetcher.transfer import replies
from jobfetcher.transfer.batch import Batch, Signed
from jobfetcher.transfer.body import FileBody, form
from jobfetcher.transfer.digests import etag_md5
from jobfetcher.transfer.exchange import Reply, Stale
from jobfetcher.transfer.patience import Patience, Rules, TryAgain, check_age
from jobfetcher.transfer.proof import Proof, dropped, is_s3
from jobfetcher.transfer.story import Aside, Tale
from jobfetcher.transfer.wire import Wire

_STORED = frozenset({200, 201, 204})

#: A form at hand may be 480 s old when it is given out, and ends after 600 (PROTOCOL.md): so long a file may wait for a
#: connection. Also, the lease was looked at when it was given out (FAULTS.md B18).
_STALE_S = 100.0

_MAX_DAMAGED = 3


def sign(item: Upload, max_bytes: int) -> SignedRequest:
    """The first request for `item`. Raises JobFault for one that no request would be good for."""
    if item.size > max_bytes:
        raise _too_large(item, f"the store takes at most {max_bytes / 2**30:g} GB per file")
    return item.sign(False)


def send(item: Upload, signed: Signed, batch: Batch[Upload], wire: Wire, rules: Rules, budget_s: float) -> Tale[Stored]:
    """Store one file. Raises JobFault, WorkerFault, or what `item.sign` and `item.open` raise."""
    batch.expect(item.size)
    patience = Patience(rules, budget_s, f"output {item.name}", partial(batch.trouble, item))
    damaged = 0
    since = time.monotonic()
    first: Signed | None = signed
    renew = False
    while True:
        if isinstance(first, SignedRequest):
            request = first
        else:
            request = yield from patience.signed(partial(item.sign, renew), first)
        first, renew = None, False
        try:
            reply, stored = yield from _once(item, request, batch, wire, rules, since)
        except Stale:
            continue
        except TryAgain as failure:
            yield from patience.again(str(failure), failure.retry_after_s)
            continue

        if stored is not None:
            if stored.theirs in {None, stored.md5}:
                patience.over()
                digest = f"md5:{stored.md5}" if stored.md5 else ""
                return Stored(item.name, item.size, digest, replies.strong_etag(reply))
            damaged += 1
            if damaged >= _MAX_DAMAGED:
                raise WorkerFault(
                    WorkerReason.STORAGE,
                    f"output {item.name} arrived damaged {damaged} times: its md5 is {stored.md5}, the storage got "
                    f"{stored.theirs}",
                )
            continue
        words = replies.words(reply)
        if (final := replies.final_reason(reply)) is JobReason.OUTPUT_TOO_LARGE:
            raise _too_large(item, f"the storage refuses it with {words}")
        if final is not None:
            raise JobFault(final, f"output {item.name} cannot be stored: the storage refuses it with {words}")
        renew = True
        why = f"output {item.name} is refused by the storage with {words}{replies.clock_hint(reply)}{dropped(request)}"
        if wire.proof.is_own(request, reply):
            fault = WorkerFault(WorkerReason.STORAGE, why)
            yield from patience.refused(why, budget_s, fault, replies.retry_after_s(reply))
        else:
            yield from patience.again(f"{reply.origin} answers {words}, which is not the storage's own word")


class _Sent(NamedTuple):
    """The MD5 of what was stored (empty where nobody needs it), and what the store says that it is."""

    md5: str
    theirs: str | None


def _once(
    item: Upload, request: SignedRequest, batch: Batch[Upload], wire: Wire, rules: Rules, since: float
) -> Tale[tuple[Reply, _Sent | None]]:
    """One try: the reply, and what is stored now; None where the request was refused. Raises TryAgain where neither.

    It begins when there is a connection for it, or raises Stale if the request is too old then. What was sent in vain
    is taken back from the progress.
    """
    if request.method is Method.GET:
        raise JobFault(JobReason.UNSAFE_REQUEST, "the server handed out a request that fetches, for a file to be sent")
    head, tail, content_type = b"", b"", None
    if request.method is Method.POST:
        head, tail, content_type = form(request.fields, item.filename)
    body = FileBody(item, batch.moved, batch.hashers, head, tail, hashes=is_s3(request))
    signed_at = rules.age()
    stored = False

    def begin() -> None:
        check_age(rules, signed_at, _STALE_S)
        body.open()

    try:
        reply = yield from wire.send(request, body, content_type, begin, since)
        body.check_unchanged()
        _check_reply(request, reply, wire.proof)
        if reply.status >= 400:
            return reply, None
        if not body.complete:
            raise TryAgain("the storage said that it has the file before all of it was sent")
        stored = True
        theirs = etag_md5(reply.headers) if wire.proof.etag_is_md5(reply.origin) else None
        if body.is_hashed:
            return reply, _Sent(body.md5(), theirs)
        # An S3 may stand behind requests that are not signed in its way: it is compared all the same.
        md5: str = "" if theirs is None and not body.hashes else (yield Aside(body.md5))
        return reply, _Sent(md5, theirs)
    finally:
        if not stored:
            body.take_back()
        body.close()


def _check_reply(request: SignedRequest, reply: Reply, proof: Proof) -> None:
    """Raise TryAgain unless it says that the file is stored, and proves it, or refuses it for now."""
    if reply.status in _STORED:
        if why := proof.not_stored(request, reply):
            raise TryAgain(why)
    elif reply.status == 303 and request.method is Method.POST and _names_etag(reply):
        pass  # the form asked for it (`success_action_redirect`), and the page is for people
    elif reply.status in replies.REDIRECTS:
        # Followed, the file would go where nobody signed for. A young bucket is found within hours, a portal leaves.
        raise TryAgain(f"the storage redirects an upload, which is never followed: {replies.words(reply)}")
    elif reply.status < 400 or replies.is_later(reply):
        raise TryAgain(f"the storage answers {replies.words(reply)}", replies.retry_after_s(reply))


def _names_etag(reply: Reply) -> bool:
    """Whether a redirect after a form says the ETag of what was stored: as a header, or in the address as S3 does."""
    query = reply.headers.get("location", "").partition("?")[2]
    return bool(reply.headers.get("etag") or parse_qs(query, max_num_fields=64).get("etag"))


def _too_large(item: Upload, why: str) -> JobFault:
    # Rounded up, so that one byte too many does not read "5 GB of at most 5 GB".
    size = math.ceil(item.size / 2**30 * 100) / 100
    return JobFault(JobReason.OUTPUT_TOO_LARGE, f"output {item.name} is {size:g} GB, {why}")
