"""P12: what 10,000 workers do to a server that comes back.

Real: when a worker asks again (`jobfetcher.pace.Pace`, one for each), when a heartbeat is tried again
(`jobfetcher.heartbeat.retry_pause_s`), and how Retry-After is read (`client.retry_after`). Simulated: time, and a
server that refuses every request at once during the outage (with a 503 where it sends Retry-After) and answers at once
after it. There are no jobs, so everybody goes on asking every 30 s (10 % either way, as shipped).

Before the outage the fleet's questions are spread evenly over the 30 s, as they are after any longer time, since each
wait has its own jitter. Counted are all requests of each second from the first one after the restart (where the server
told all to stay away for longer, nobody comes at once) until everybody has asked again, against as many spread evenly
over the same time; medians of several runs, and of the outages the worst one.

Why not only the first request of each, which is told beside it: after an outage of a minute some wait 10 s and some
200 s, and the mean of that is set by the last ones, not by what the server has to bear. In that count the busiest
second is 2.4 times the mean after an hour (full jitter over 300 s is 2.0 by its shape, the rest is chance) and 7 times
after a minute, at fewer requests in a second (240) than the fleet sends on a quiet day (333).

Not judged: an outage shorter than an interval. Of 20 s, polls stay below the bar (1.96), heartbeats do not (2.7): each
failed one is tried again after 1, 2, 4 and 8 s (FAULTS.md J3), so at that moment five generations of tries are due.
"""

from __future__ import annotations

import heapq
import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import formatdate
from typing import NamedTuple, Protocol

from benchmarks.frame import Bench, Row
from jobfetcher.core.errors import SourceUnavailable
from jobfetcher.heartbeat import beat_jitter, retry_pause_s
from jobfetcher.pace import Pace
from jobfetcher.sources.worker_api.reply import retry_after

_WORKERS = 10_000
_INTERVAL_S = 30.0

#: A restart, an update, and an hour.
_OUTAGES_S = (60.0, 300.0, 3600.0)

#: A job's lease is 300 s: after a longer silence its heartbeats are as they are after 300 s.
_BEAT_OUTAGES_S = (60.0, 300.0)


@dataclass
class Clock:
    """Time that passes when it is told to, seconds since 1970."""

    now: float = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


class Client(Protocol):
    """Somebody who asks again and again. Both return the seconds until the next time."""

    def refused(self, asked_s: float | None) -> float: ...

    def answered(self) -> float: ...


class Poller:
    """A worker without a job, as `Worker._poll` uses its pace."""

    def __init__(self, clock: Clock) -> None:
        self._pace = Pace(_INTERVAL_S, lambda *_, **__: None, clock=clock)

    def refused(self, asked_s: float | None) -> float:
        return self._pace.failed(SourceUnavailable("down", retry_after_s=asked_s))

    def answered(self) -> float:
        self._pace.well()
        return self._pace.idle()


class Beater:
    """The heartbeat of one running job."""

    def __init__(self, _clock: Clock) -> None:
        self._failures = 0

    def refused(self, asked_s: float | None) -> float:
        self._failures += 1
        return retry_pause_s(self._failures, asked_s, _INTERVAL_S, beat_jitter())

    def answered(self) -> float:
        self._failures = 0
        return _INTERVAL_S * beat_jitter()


class Load(NamedTuple):
    """Requests in the busiest second and in a mean one: of all requests, and of the first ones of each client."""

    busiest: float
    mean: float
    first_busiest: float
    first_mean: float


#: The Retry-After that the server sends at `now` when it is back at `back`.
_TOLD: dict[str, Callable[[float, float], str | None]] = {
    "nothing told": lambda now, back: None,
    "Retry-After: 120": lambda now, back: "120",
    "Retry-After: the restart's date": lambda now, back: formatdate(back, usegmt=True),
}


def spread(bench: Bench) -> Iterator[Row]:
    """P12."""
    seeds = range(bench.repeats)
    for who, kind, outages in (("polls", Poller, _OUTAGES_S), ("heartbeats", Beater, _BEAT_OUTAGES_S)):
        for told, header in _TOLD.items():
            worst: tuple[float, Load, float] | None = None
            for outage_s in outages[: 1 if bench.short else None]:
                loads = [_after(kind, outage_s, header, seed) for seed in seeds]
                load = Load(*map(statistics.median, zip(*loads, strict=True)))
                ratio, first = load.busiest / load.mean, load.first_busiest / load.first_mean
                bench.say(f"{who}, {told}, {outage_s:g} s: {ratio:.2f} times the mean; of first requests {first:.2f}")
                if worst is None or ratio > worst[0]:
                    worst = (ratio, load, outage_s)
            assert worst is not None
            ratio, load, outage_s = worst
            what = f"busiest second, {who} of 10,000 workers, {told} (worst: {outage_s:g} s outage)"
            ok = bench.judge(ratio <= 2)
            yield Row("P12", what, load.busiest, "requests", "even spread", load.mean, ratio, "ratio <= 2", ok)


def _after(
    kind: Callable[[Clock], Client], outage_s: float, header: Callable[[float, float], str | None], seed: int
) -> Load:
    random.seed(seed)  # the code under test draws from this module's own generator
    clock = Clock()
    back = clock.now + outage_s
    clients = [kind(clock) for _ in range(_WORKERS)]
    due = [(clock.now + random.uniform(0, _INTERVAL_S), number) for number in range(_WORKERS)]  # noqa: S311
    heapq.heapify(due)
    all_requests: Counter[int] = Counter()
    first_requests: Counter[int] = Counter()
    heard: set[int] = set()
    first_s: float | None = None
    while len(heard) < _WORKERS:
        clock.now, number = due[0]
        client = clients[number]
        if clock.now < back:
            wait_s = client.refused(retry_after(header(clock.now, back), clock.now))
        else:
            wait_s = client.answered()
            first_s = clock.now if first_s is None else first_s
            second = int(clock.now - first_s)
            all_requests[second] += 1
            if number not in heard:
                heard.add(number)
                first_requests[second] += 1
        heapq.heapreplace(due, (clock.now + wait_s, number))
    assert first_s is not None
    window_s = max(clock.now - first_s, 1.0)
    return Load(
        max(all_requests.values()),
        all_requests.total() / window_s,
        max(first_requests.values()),
        _WORKERS / window_s,
    )
