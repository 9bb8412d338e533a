"""Whether an answer is the store's own, or a page of somebody who stands before it (FAULTS.md C16, C18).

Used by `download`, `upload` and `ranges`; `wire` has the one `Proof` of a transfer. A captive portal, a filter or a
gateway answers for a store: with a sign-in page and 200, with an empty 200, with a 403 of its own. Believed, it would
be a result that is told as stored and is nowhere. So an answer has to prove itself:

- Whoever speaks S3 says an ETag and an `x-amz-request-id`. An answer to a request signed for S3 without either is
  believed only if it carries another id that this very origin was seen to send beside them.
- The API's own origin (a local-disk server) answers a form with 201 and JSON, as was recorded, or with 204; and it
  sends each file with its ETag and date.
- Of other stores nothing is known: a plain PUT may be answered 200, 201 or 204 without another word (RFC 9110, 9.3.4).
  Their word is taken until they are seen to send ETags or ids, which are expected from then on. What a page cannot hide
  is that it is one: HTML, or an `<Error>` document, never counts.
- A file may itself be HTML. Then the store shows itself by an ETag, a `Last-Modified` or an id, which sign-in pages
  have none of.
"""

from __future__ import annotations

import re
from collections import Counter

from jobfetcher.core.text import clean
from jobfetcher.core.urls import SignedRequest, parse_origin
from jobfetcher.transfer import replies
from jobfetcher.transfer.exchange import Reply, Sink
from jobfetcher.transfer.patience import TryAgain

#: How requests for S3 are signed, of version 4 or 2: names of headers and fields, and the query.
_S3_NAMES = ("x-amz-", "awsaccesskeyid")
_S3_QUERY = re.compile(r"(?:^|&)(?:x-amz-|awsaccesskeyid=)")

#: Ids that stores put on their answers; those that any gateway puts on everybody's are left out.
_ID = re.compile(r"x-(?!request-id|correlation-id|trace-id)[a-z0-9-]*id(?:-\d)?")

#: The same objects with the same wrong checksum again and again: one may be damaged, two are the store's way.
_SURE = 2

#: Of so many origins it is remembered what they send.
_MOST = 1024


class Proof:
    """What is known of each store. `api`: the API's own origin. In the loop's thread only."""

    def __init__(self, api: str) -> None:
        self._api = api
        self._ids: dict[str, frozenset[str]] = {}
        self._proven: set[tuple[str, bool]] = set()
        self._no_md5: Counter[str] = Counter()

    # -- files that were sent ----------------------------------------------------------------------------------------

    def not_stored(self, request: SignedRequest, reply: Reply) -> str:
        """Why a 2xx does not prove that the file is stored; empty if it does."""
        words, headers = reply.words, reply.headers
        if words and (replies.is_page(reply) or replies.is_error(words)):
            return f"{_from(reply)} answers {replies.words(reply)} to a file, which is no store's word that it has it"
        if headers.get("etag") or headers.get("x-amz-request-id"):
            self._learn(reply, sent=True)
            return ""
        if reply.origin == self._api:
            if reply.status == 204 or (reply.status == 201 and replies.is_json(reply)):
                return ""
        elif replies.is_page(reply):
            pass
        elif self._shows_id(reply) or not (_is_signed(request) or (reply.origin, True) in self._proven):
            return ""
        return f"{_from(reply)} answers {replies.words(reply)} without an ETag, so nothing proves that it has the file"

    # -- files that come ---------------------------------------------------------------------------------------------

    def check_brought(self, request: SignedRequest, reply: Reply) -> bool:
        """Raise TryAgain unless the head of a 200 or 206 may be the store's. True: its first bytes tell (`looking`)."""
        headers = reply.headers
        etag, modified = headers.get("etag"), headers.get("last-modified")
        is_html = replies.is_page(reply)
        if etag and not is_html:
            self._learn(reply, sent=False)
            return False
        shown = self._shows_id(reply)
        if is_html:
            said = (etag or modified) and reply.origin not in self._ids and _is_asked(request, reply)
            # Without TLS anybody on the way may answer, and a portal's page has an ETag as well; S3 has an id besides.
            open_s3 = is_s3(request) and reply.origin.startswith("http://")
            if shown or (said and not open_s3):
                return False
            raise TryAgain(f"{_from(reply)} answers {replies.words(reply)} with a web page instead of the file")
        if modified or shown:
            return True
        if reply.origin == self._api:  # what serves files there (Starlette's FileResponse) names ETag and date of each
            raise TryAgain(f"{_from(reply)} answers {replies.words(reply)} without an ETag, as it never does")
        # A plain server has ETags for some files and none for others, but an empty answer says nothing at all.
        is_empty = headers.get("content-length") == "0"
        if is_s3(request) or (is_empty and (reply.origin, False) in self._proven):
            raise TryAgain(f"{_from(reply)} answers {replies.words(reply)} as this store does not: without an ETag")
        return True

    # -- refusals ----------------------------------------------------------------------------------------------------

    def is_own(self, request: SignedRequest, reply: Reply) -> bool:
        """Whether a refusal is the store's or the API's own: a document of S3's or its kin, or one of the API's."""
        if replies.code(reply) or (self._shows_id(reply) and not replies.is_page(reply)):
            return True
        if reply.origin == self._api:
            return replies.is_json(reply) and b'"detail"' in reply.words
        return replies.is_json(reply) and not is_s3(request)

    def is_missing(self, request: SignedRequest, reply: Reply) -> bool:
        """Whether a 404 is to be believed at once: S3 and the API say it in their words, a plain server in any."""
        if self.is_own(request, reply):
            return True
        return reply.origin != self._api and not replies.is_page(reply) and not is_s3(request)

    def is_apis(self, reply: Reply) -> bool:
        """Whether the API's own origin answered."""
        return reply.origin == self._api

    # -- checksums ---------------------------------------------------------------------------------------------------

    def etag_is_md5(self, origin: str) -> bool:
        """Whether an ETag that looks like an MD5 may be one there (FAULTS.md C22)."""
        return not self._no_md5 or self._no_md5[origin] < _SURE

    def etag_was_no_md5(self, origin: str) -> None:
        """A file came three times alike, and not as its ETag says."""
        self._no_md5[origin] += 1

    # -- what is known -----------------------------------------------------------------------------------------------

    def _shows_id(self, reply: Reply) -> bool:
        """Whether it carries an id of S3's, or one that this origin is known to send."""
        if reply.headers.get("x-amz-request-id"):
            return True
        known = self._ids.get(reply.origin)
        return known is not None and not known.isdisjoint(reply.headers)

    def _learn(self, reply: Reply, *, sent: bool) -> None:
        if (reply.origin, sent) in self._proven:
            return
        if len(self._proven) >= _MOST:
            self._proven.clear()
            self._ids.clear()
        self._proven.add((reply.origin, sent))
        ids = frozenset(name for name in reply.headers if _ID.fullmatch(name))
        if ids:
            self._ids[reply.origin] = self._ids.get(reply.origin, frozenset()) | ids


def is_s3(request: SignedRequest) -> bool:
    """Whether S3 is likely to answer, by the signature of version 4 or 2 in the query, the form or the headers."""
    query = request.url.partition("?")[2]
    if query and _S3_QUERY.search(query.lower()):
        return True
    said = request.fields + request.headers
    return bool(said) and any(name.lower().startswith(_S3_NAMES) for name, _ in said)


def dropped(request: SignedRequest) -> str:
    """The headers that the server wanted for a request and that do not go out with it: why it may be refused."""
    names = [name.removeprefix("header ") for name in request.ignored if name.startswith("header ")]
    if not names:
        return ""
    return f"; the server wanted headers with it that this worker does not send: {clean(', '.join(names), 200)}"


def _is_signed(request: SignedRequest) -> bool:
    """Whether whoever takes the file speaks S3: a form with a policy is of S3's making, whoever signed it."""
    return is_s3(request) or any(name.lower() == "policy" for name, _ in request.fields)


def _is_asked(request: SignedRequest, reply: Reply) -> bool:
    """Whether the answer is of the origin that the request was signed for, and not of one that it was led on to."""
    return parse_origin(request.url) == parse_origin(reply.origin)


def _from(reply: Reply) -> str:
    return reply.origin.partition("://")[2] or "the storage"


def looking(sink: Sink, reply: Reply) -> Sink:
    """`sink`, which looks at the first bytes: nothing else says whether they are a page's."""
    looked = False

    def take(pieces: list[bytes], size: int) -> bool:
        nonlocal looked
        if not looked:
            looked = True
            if replies.begins_as_page(pieces[0]) or replies.is_error(pieces[0]):
                raise TryAgain(f"{_from(reply)} answers {replies.words(reply)} with a page instead of the file")
        return sink(pieces, size)

    return take
