"""The story of one output, top to bottom: measure, sign, send, compare (FAULTS.md C8 to C11, C14).

Used by `presigned`, told by a batch in the loop's thread. Every try sends the whole file again: same key, so nothing is
doubled.
"""

from __future__ import annotations

import math
import re
import time
from functools import partial

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
from jobfetcher.transfer.story import Aside, Tale
from jobfetcher.transfer.wire import Wire

_S3_NAMES = ("x-amz-", "awsaccesskeyid")
_S3_QUERY = re.compile(r"(?:^|&)(?:x-amz-|awsaccesskeyid=)")

_STORED = frozenset({200, 201, 204})

#: A form at hand may be 480 s old when it is given out, and ends after 600 (PROTOCOL.md): so long a file may wait for a
#: connection. Also, the lease was looked at when it was given out (FAULTS.md B18).
_STALE_S = 100.0

#: Newly signed requests that are refused in a row before we believe it: one may have expired on its way.
_MAX_RENEWALS = 2
_MAX_DAMAGED = 3


def sign(item: Upload, max_bytes: int) -> SignedRequest:
    """The first request for `item`. Raises JobFault for one that no request would be good for."""
    if item.size > max_bytes:
        raise _too_large(item, f"the store takes at most {max_bytes / 2**30:g} GB per file")
    return item.sign(False)


def send(item: Upload, signed: Signed, batch: Batch[Upload], wire: Wire, rules: Rules, budget_s: float) -> Tale[Stored]:
    """Store one file. Raises JobFault, WorkerFault, or what `item.sign` and `item.open` raise."""
    batch.expect(item.size)
    patience = Patience(rules, budget_s, f"output {item.name}")
    refused = damaged = 0
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
            reply, md5, theirs = yield from _once(item, request, batch, wire, rules, since)
            if reply.status not in _STORED and (reply.status < 400 or replies.is_later(reply)):
                raise TryAgain(f"the storage answers {replies.words(reply)}", replies.retry_after_s(reply))
        except Stale:
            continue
        except TryAgain as failure:
            yield from patience.again(str(failure), failure.retry_after_s)
            continue

        if reply.status in _STORED:
            if theirs in {None, md5}:
                return Stored(item.name, item.size, f"md5:{md5}" if md5 else "", replies.strong_etag(reply))
            damaged += 1
            if damaged >= _MAX_DAMAGED:
                raise WorkerFault(
                    WorkerReason.STORAGE,
                    f"output {item.name} arrived damaged {damaged} times: its md5 is {md5}, the storage got {theirs}",
                )
        elif reply.status == 413 or replies.code(reply) == "EntityTooLarge":
            raise _too_large(item, f"the storage refuses it with {replies.words(reply)}")
        else:
            refused += 1
            renew = True
            if refused > (_MAX_RENEWALS if replies.is_refused(reply) else 1):
                raise WorkerFault(
                    WorkerReason.STORAGE,
                    f"output {item.name} is refused by the storage with {replies.words(reply)}{_clock(reply)}",
                )


def _once(
    item: Upload, request: SignedRequest, batch: Batch[Upload], wire: Wire, rules: Rules, since: float
) -> Tale[tuple[Reply, str, str | None]]:
    """One try: the reply, the MD5 of what was sent (empty where nobody needs it), and what the store says it is.

    It begins when there is a connection for it, or raises Stale if the request is too old then. What was sent in vain
    is taken back from the progress.
    """
    if request.method is Method.GET:
        raise JobFault(JobReason.UNSAFE_REQUEST, "the server handed out a request that fetches, for a file to be sent")
    head, tail, content_type = b"", b"", None
    if request.method is Method.POST:
        head, tail, content_type = form(request.fields, item.filename)
    body = FileBody(item, batch.moved, batch.hashers, head, tail, hashes=_is_s3(request))
    signed_at = rules.age()
    stored = False

    def begin() -> None:
        check_age(rules, signed_at, _STALE_S)
        body.open()

    try:
        reply = yield from wire.send(request, body, content_type, begin, since)
        body.check_unchanged()
        if reply.status in _STORED and not body.complete:
            raise TryAgain("the storage said that it has the file before all of it was sent")
        stored = reply.status in _STORED
        if not stored:
            return reply, "", None
        theirs = etag_md5(reply.headers)
        if body.is_hashed:
            return reply, body.md5(), theirs
        # An S3 may stand behind requests that are not signed in its way: it is compared all the same.
        md5: str = "" if theirs is None and not body.hashes else (yield Aside(body.md5))
        return reply, md5, theirs
    finally:
        if not stored:
            body.take_back()
        body.close()


def _is_s3(request: SignedRequest) -> bool:
    """Whether S3 is likely to answer, and so to say the MD5 of what it got.

    From the request's signature, of version 4 or 2, in its query, its form or its headers. A wrong yes costs a hash, a
    wrong no a second read of the file.
    """
    query = request.url.partition("?")[2]
    if query and _S3_QUERY.search(query.lower()):
        return True
    said = request.fields + request.headers
    return bool(said) and any(name.lower().startswith(_S3_NAMES) for name, _ in said)


def _too_large(item: Upload, why: str) -> JobFault:
    # Rounded up, so that one byte too many does not read "5 GB of at most 5 GB".
    size = math.ceil(item.size / 2**30 * 100) / 100
    return JobFault(JobReason.OUTPUT_TOO_LARGE, f"output {item.name} is {size:g} GB, {why}")


def _clock(reply: Reply) -> str:
    """A wrong clock is the usual reason where a fresh signature is refused for its time (C10)."""
    skew = replies.skew_s(reply)
    if replies.code(reply) != "RequestTimeTooSkewed" or skew is None:
        return ""
    where = "ahead of" if skew > 0 else "behind"
    return f"; check the clock of this machine: it is {abs(skew):.0f} s {where} the storage's"
