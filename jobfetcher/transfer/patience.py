"""When to try again, and when to give up: fast tries, then full-jitter back-off within a budget (FAULTS.md C2, J8).

Used by `download` and `upload`, one `Patience` per file.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

from jobfetcher.core.errors import JobFault, SourceRefused, SourceUnavailable, WorkerFault, WorkerReason
from jobfetcher.core.text import clean, unnumbered
from jobfetcher.core.urls import SignedRequest
from jobfetcher.transfer.exchange import Stale
from jobfetcher.transfer.story import Aside, Pause, Tale

#: The first tries after a failure come at once: most cuts are one cut.
_FAST_TRIES = 3
_CAP_S = 60.0


class TryAgain(Exception):
    """It did not work now, for a reason that may pass. `retry_after_s`: what the store asked for, in seconds."""

    def __init__(self, why: str, retry_after_s: float | None = None) -> None:
        super().__init__(why)
        self.retry_after_s = retry_after_s


_boottime = partial(time.clock_gettime, time.CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True)
class Rules:
    """The clock, the dice, and how long a pause of so many seconds really is; replaced in tests.

    `age` is the clock by which signatures get old: it goes on while the machine sleeps.
    """

    clock: Callable[[], float] = time.monotonic
    age: Callable[[], float] = _boottime
    pause: Callable[[float], float] = float
    dice: Callable[[], float] = random.random


def check_age(rules: Rules, signed_at: float, most_s: float) -> None:
    """Raise Stale if a request that was signed then, by `rules.age`, is older than so many seconds."""
    if rules.age() - signed_at > most_s:
        raise Stale


def _unheard(_why: str, _for_s: float | None) -> None:
    pass


class Patience:
    """What is left of it for one file. `what` names the file for people.

    `tell(why, for_s)` is called where the file has to wait for a reason that is new, with how many seconds it is tried
    again at most (None: as long as the job is held), and with an empty reason when that is over (FAULTS.md C21). A cut
    that is mended at once is no news.
    """

    def __init__(
        self, rules: Rules, budget_s: float, what: str, tell: Callable[[str, float | None], None] = _unheard
    ) -> None:
        self._rules, self._budget_s, self._what, self._tell = rules, budget_s, what, tell
        self._failures = self._refusals = 0
        self._since = rules.clock()
        self._refused_since: float | None = None
        self._told = ""

    def progressed(self) -> None:
        """Something was reached: the budget and the fast tries begin anew."""
        self._failures, self._since = 0, self._rules.clock()
        self.over()

    def accepted(self) -> None:
        """A request brought something, so that the next refusal is a first one again (FAULTS.md C1)."""
        self._refusals, self._refused_since = 0, None

    def over(self) -> None:
        """What was in the way is not any more."""
        self.accepted()
        if self._told:
            self._told = ""
            self._tell("", None)

    def again(self, why: str, retry_after_s: float | None = None) -> Tale[None]:
        """Wait until the next try is due, or raise WorkerFault when the budget is spent."""
        spent = self._rules.clock() - self._since
        if spent > self._budget_s:
            raise self._given_up(spent, why)
        yield from self._pause(retry_after_s, why, self._budget_s - spent)

    def refused(
        self, why: str, most_s: float, fault: JobFault | WorkerFault, retry_after_s: float | None = None
    ) -> Tale[None]:
        """Wait until a request that was refused is due to be signed and sent anew; the first time at once.

        Refusals are timed, not counted (FAULTS.md C18): rights are given, clocks come right and quotas are raised while
        minutes pass. Raises `fault` when that has gone on for `most_s`.
        """
        now = self._rules.clock()
        if self._refused_since is None:
            self._refused_since = now
            return
        spent = now - self._refused_since
        if spent > most_s:
            raise fault
        backoff = min(_CAP_S, 2.0 ** min(self._refusals, 10))
        self._refusals += 1
        yield from self._wait(max(self._rules.dice() * backoff, retry_after_s or 0.0), why, most_s - spent)

    def signed(
        self, sign: Callable[[], SignedRequest], first: SignedRequest | BaseException | None = None
    ) -> Tale[SignedRequest]:
        """What `sign` gives, asked again while the source is out of reach; its other errors are final.

        That costs nothing of the budget: a source that is away for a day takes no job back (FAULTS.md B2, B3). One that
        is there and fails at this file only is no outage: it gets as long as a storage that is away, from its first
        such answer on, and then WorkerFault is raised (C2). `first`: what it gave already.
        """
        began = self._rules.clock()
        spent = 0.0  # while only this file was given no link
        failed_at: float | None = None
        while True:
            try:
                if isinstance(first, BaseException):
                    _throw(first)
                request: SignedRequest = first or (yield Aside(sign))
            except (SourceUnavailable, SourceRefused) as error:
                first = None
                why, now, for_s = f"no link to be had: {error}", self._rules.clock(), None
                spent += 0.0 if failed_at is None else now - failed_at
                failed_at = None
                if isinstance(error, SourceUnavailable) and error.only_this:
                    if spent > self._budget_s:
                        raise self._given_up(spent, why) from error
                    failed_at, for_s = now, self._budget_s - spent
                yield from self._pause(getattr(error, "retry_after_s", None), why, for_s)
            else:
                passed = self._rules.clock() - began
                self._since += passed
                if self._refused_since is not None:
                    self._refused_since += passed
                return request

    def _given_up(self, spent_s: float, why: str) -> WorkerFault:
        hours = f"{spent_s / 3600:.1f} hours"
        return WorkerFault(
            WorkerReason.STORAGE, f"{self._what} could not be moved for {hours}, given up: {clean(why, 400)}"
        )

    def _pause(self, retry_after_s: float | None, why: str, for_s: float | None) -> Tale[None]:
        self._failures += 1
        backoff = min(_CAP_S, 2.0 ** min(self._failures - _FAST_TRIES, 10)) if self._failures > _FAST_TRIES else 0.0
        yield from self._wait(max(self._rules.dice() * backoff, retry_after_s or 0.0), why, for_s)

    def _wait(self, delay_s: float, why: str, for_s: float | None) -> Tale[None]:
        if not delay_s:
            return
        if (news := unnumbered(why)) != self._told:
            self._told = news
            self._tell(why, for_s)
        yield Pause(self._rules.pause(delay_s))


def _throw(error: BaseException) -> NoReturn:
    raise error
