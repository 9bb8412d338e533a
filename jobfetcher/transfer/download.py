"""The story of one input, top to bottom: sign, fetch, resume, renew, verify (FAULTS.md C1 to C7).

Used by `presigned`, told by a batch in the loop's thread. How many connections bring it is the business of `ranges`.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from jobfetcher.core.errors import JobFault, JobReason, WorkerFault, WorkerReason
from jobfetcher.core.ports import Download
from jobfetcher.core.run import Stored
from jobfetcher.core.urls import Method, SignedRequest
from jobfetcher.transfer import replies
from jobfetcher.transfer.batch import Batch, Signed
from jobfetcher.transfer.digests import Digests
from jobfetcher.transfer.exchange import Reply, Stale
from jobfetcher.transfer.flights import ALONE, Flight, Flights, Landing
from jobfetcher.transfer.part import Discard, NoRanges, Part, Piece
from jobfetcher.transfer.patience import Patience, Rules, TryAgain, check_age
from jobfetcher.transfer.proof import Proof, dropped, is_s3
from jobfetcher.transfer.ranges import Attempt, Crew
from jobfetcher.transfer.story import Aside, Tale
from jobfetcher.transfer.wire import Wire

if TYPE_CHECKING:
    from jobfetcher.transfer.cache import Cache, Entry

#: Of a copy out of the cache so many bytes are counted at a time: a disk writes them in some ten milliseconds.
_TELL_COPIED = 8 * 1024 * 1024

#: A URL is good for 600 s (PROTOCOL.md); one that has waited so long for a connection is signed anew.
_STALE_S = 480.0

#: New URLs are refused for so long before we believe that the storage means it (C1, C18).
_REFUSED_S = 600.0

#: Whole files that do not have their checksum before the object itself must be wrong (C3), or its ETag (C22).
_MAX_DAMAGED = 3

#: Fewer new bytes than this do not renew the budget, else a server that trickles could hold us for ever (T23).
_PROGRESS = 1024 * 1024


def fetch(
    item: Download,
    signed: Signed,
    batch: Batch[Download],
    wire: Wire,
    rules: Rules,
    budget_s: float,
    ranges: int,
    cache: Cache | None,
    flights: Flights,
) -> Tale[Stored]:
    """Bring `item.part` to its whole, verified content. Raises JobFault, WorkerFault, or what `item.sign` raises.

    `flights`: what is on its way into `cache`.
    """
    patience = Patience(rules, budget_s, f"input {item.name}", partial(batch.trouble, item))
    part = Part(item.part, item.name, batch, batch.hashers)
    crew = Crew(part, batch, wire, ranges)
    flight = ALONE
    try:
        part.resume()
        request: SignedRequest = yield from patience.signed(item.sign, signed)
        _check_method(request)
        crew.check = partial(check_age, rules, rules.age(), _STALE_S)
        entry: Entry | None = None
        if cache is not None and not part.have:
            entry, flight = yield from _kept(cache, request, flights, batch, patience)
            crew.heard = partial(_end_unless_kept, flight, part, cache)
        renew = False
        damaged: list[str] = []
        while True:
            if renew:
                flight.end()
                renew = False
                request = yield from patience.signed(item.sign)
                _check_method(request)
                crew.check = partial(check_age, rules, rules.age(), _STALE_S)

            reply: Reply | None = None
            if not part.is_whole:
                if part.have:
                    entry = None
                crew.extra = [] if entry is None else [f"If-None-Match: {entry.etag}"]
                crew.fill(request)
                attempt: Attempt | None = yield crew
                if attempt is None:
                    continue
                try:
                    reply = attempt.outcome()
                    _check_reply(reply, attempt.piece, part, entry)
                except Stale:
                    renew = True
                    continue
                except TryAgain as failure:
                    flight.end()
                    if isinstance(failure, NoRanges):
                        crew.most = 1
                        part.join()
                        continue
                    if isinstance(failure, Discard):
                        crew.most = 1 if crew.is_busy else crew.most
                        crew.stop()
                        part.restart()
                    elif crew.is_busy:
                        crew.fewer()
                        part.join()
                        continue
                    if part.best - attempt.before >= _PROGRESS:
                        patience.progressed()
                    elif part.best > attempt.before:
                        patience.accepted()
                    yield from patience.again(str(failure), failure.retry_after_s)
                    continue

            if part.is_whole:
                digests = yield from _hashed(part)
                wrong = "" if part.expected is None else digests.mismatch(part.expected)
                wrong = wrong and _unless_etag(wrong, part, digests, damaged, batch, item, wire.proof)
                if not wrong:
                    patience.over()
                    stored = part.stored(digests)
                    if cache is not None:
                        yield Aside(partial(cache.keep, request, item.part, stored, check=batch.check))
                    flight.end(done=True)
                    return stored
                flight.end()
                if part.is_scattered:
                    crew.most = 1  # it may be the ranges that are wrong: once more without any, before it counts
                else:
                    assert part.expected is not None  # noqa: S101 - something was found wrong
                    damaged.append(digests.beside_etag(part.expected))
                part.restart()
                if len(damaged) >= _MAX_DAMAGED:
                    part.remove()
                    raise JobFault(
                        JobReason.INPUT_CORRUPT, f"input {item.name} arrived damaged {len(damaged)} times: {wrong}"
                    )
            elif reply is None or _is_file(reply):
                continue  # a piece of it; others are on their way
            elif entry is not None and reply.status == 304:
                flight.end(done=True)
                batch.expect(entry.size)
                copied = _Copied(batch)
                take = str if cache is None else partial(cache.take, entry, part.fd, batch.check, copied.add)
                digest: str = yield Aside(take)
                batch.moved((entry.size if digest else 0) - copied.told)
                if digest:
                    return Stored(item.name, entry.size, digest, entry.etag)
                batch.expect(-entry.size)
                entry = None
            elif crew.is_busy:
                crew.fewer()
                part.join()
                renew = replies.is_refused(reply)
            elif part.is_scattered and not replies.is_refused(reply):
                crew.most = 1  # the URL has given the file before, so it is the ranges: once more, all of it at once
                part.restart()
            else:
                renew = True
                yield from _refused(item, request, reply, wire.proof, patience)
    finally:
        flight.end()
        crew.stop()
        part.close()


def _refused(item: Download, request: SignedRequest, reply: Reply, proof: Proof, patience: Patience) -> Tale[None]:
    """Wait until a new URL may do better, or raise why none will. A page of somebody before the store is an outage."""
    words = replies.words(reply)
    if replies.is_missing(reply):
        missing = JobFault(JobReason.INPUT_MISSING, f"input {item.name} not found in storage: {words}")
        if proof.is_missing(request, reply):
            raise missing
        if not is_s3(request) and not proof.is_apis(reply):
            # A plain server may say it with a page, and so may a portal: one lasts.
            yield from patience.refused(str(missing), _REFUSED_S, missing)
            return
    if not proof.is_own(request, reply):
        yield from patience.again(f"{reply.origin} answers {words}, which is not the storage's own word")
        return
    why = f"the storage refuses it with {words}{replies.clock_hint(reply)}{dropped(request)}"
    fault: JobFault | WorkerFault = JobFault(JobReason.INPUT_MISSING, f"input {item.name} cannot be had: {why}")
    if reply.status < 400:  # a redirect that leads nowhere: the server signed for another place than the store's
        fault = WorkerFault(WorkerReason.STORAGE, str(fault))
    elif replies.final_reason(reply) is not None:
        raise fault
    yield from patience.refused(f"input {item.name}: {why}", _REFUSED_S, fault, replies.retry_after_s(reply))


def _unless_etag(
    wrong: str, part: Part, digests: Digests, damaged: list[str], batch: Batch[Download], item: Download, proof: Proof
) -> str:
    """What is wrong with the file; empty where its bytes came alike three times and only the ETag says otherwise: then
    it is the ETag that is no MD5 (FAULTS.md C22)."""
    expected = part.expected
    if expected is None or len(damaged) < _MAX_DAMAGED - 1 or part.is_scattered:
        return wrong
    md5 = digests.beside_etag(expected)
    if not md5 or any(before != md5 for before in damaged):
        return wrong
    proof.etag_was_no_md5(part.origin)
    batch.notice(
        item,
        f"it came {_MAX_DAMAGED} times with the same bytes (md5 {md5}), so the storage's ETag {expected.etag} is no "
        "checksum of it; taken as it is",
    )
    return ""


def _kept(
    cache: Cache, request: SignedRequest, flights: Flights, batch: Batch[Download], patience: Patience
) -> Tale[tuple[Entry | None, Flight]]:
    """What the cache has, once nobody else is fetching it; and the flight that this download is then."""
    name = cache.name(request)
    last = False
    while True:
        other = flights.under_way(name)
        entry: Entry | None = yield Aside(partial(cache.find, request))
        if last:
            return entry, ALONE
        other = other or flights.under_way(name)
        if other is None:
            return entry, flights.begin(name)
        if not other.ended:  # else it may have been kept just after we looked
            yield Landing(other, batch.call)
            patience.progressed()  # whatever time that took was not its own
        last = other.done


def _end_unless_kept(flight: Flight, part: Part, cache: Cache) -> None:
    """Who waits for the file would wait in vain if the cache does not take it."""
    expected = part.expected
    if expected is not None and not cache.takes(expected.etag, expected.size):
        flight.end(done=True)


class _Copied:
    """Bytes that come out of the cache, counted as they land: the room that was promised to them is taken by then."""

    def __init__(self, batch: Batch[Download]) -> None:
        self._batch = batch
        self._untold = 0
        self.told = 0

    def add(self, size: int) -> None:
        """So many more are there. In the copying thread."""
        self._untold += size
        if self._untold >= _TELL_COPIED:
            size, self._untold = self._untold, 0
            self._batch.call(partial(self._tell, size))

    def _tell(self, size: int) -> None:
        self.told += size
        self._batch.moved(size)


def _check_reply(reply: Reply, piece: Piece, part: Part, entry: Entry | None) -> None:
    """Raise TryAgain if it neither brought its piece nor says for good why not."""
    if _is_file(reply):
        part.check_whole(piece, reply)
    elif reply.status == 416 and piece.at and replies.unsatisfied_size(reply) == piece.at == (part.size or piece.at):
        piece.end = piece.at  # the answer to asking for what follows the last byte (C5)
    elif reply.status == 304 and entry is not None and reply.headers.get("etag", entry.etag) == entry.etag:
        pass
    elif replies.is_later(reply):
        raise TryAgain(f"the storage answers {replies.words(reply)}", replies.retry_after_s(reply))
    elif reply.status in replies.REDIRECTS:
        pass  # without an address: a refusal
    elif reply.status == 416 or reply.status < 400:
        raise Discard(f"the storage answers {replies.words(reply)}")


def _hashed(part: Part) -> Tale[Digests]:
    finish = part.finish()
    if part.is_hashed:
        return finish()
    digests: Digests = yield Aside(finish)
    return digests


def _is_file(reply: Reply) -> bool:
    return reply.status in {200, 206}


def _check_method(request: SignedRequest) -> None:
    if request.method is not Method.GET:
        raise JobFault(JobReason.UNSAFE_REQUEST, "the server handed out a request that sends, for a file to be fetched")
