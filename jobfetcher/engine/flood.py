"""A job that prints without end, held back so that its flood costs its own time and not the machine's (FAULTS.md T29).

The engine copies whatever a container prints, in its own process and on nobody's account. Measured on Docker 20.10, a
container of one core that runs `yes`: 0.8 to 1.1 cores of dockerd, and 0.03 of the container. It makes no difference
how the log is kept: the driver `local` blocking and not blocking (which loses lines besides, and a result that was
printed and lost is worse than a slow job), compressed or not, and even `none` costs 0.2 to 0.5 and the shim as much. An
engine has no limit for it. What does help is that the container does not print: it is paused for a while (the control
group's freezer), and nothing that it printed is lost by that.

How much was printed is told by what is kept. Of a long log two to three files of 10 MiB are there. If its first line
is another than at the last look, a file was dropped since, and so at least 20 MiB were printed between the first line
and the last one. Where that took less than `SPAN_S`, and it still prints a second later, the job floods: more than
1.4 MiB a second, which costs dockerd 0.15 cores. It is then paused for `HOLD_S`, and looked at each second once it goes
on. Lines of one letter fill 30 MiB in 3.5 s (a line that is kept has 27 bytes more than were printed), so in a round of
34 s it prints for 4 s, and dockerd takes 0.12 cores.

Pure; used by `docker`.
"""

from __future__ import annotations

from collections.abc import Callable

from jobfetcher.engine.printed import FILE_BYTES, FILES
from jobfetcher.engine.vouch import when

#: Two full files printed in less time than this are a flood, in seconds.
SPAN_S = 14.0

#: A job that floods is paused for so long each time, in seconds.
HOLD_S = 30.0

#: A log is looked at so often, in seconds; and so often at first, and while it may be flooding.
_LOOK_S, _CLOSE_LOOK_S = 4.0, 1.0

#: So many looks in a row without a flood, and the job is one that does not flood.
_CLOSE_LOOKS = 10


class Restraint:
    """What is known of how much one container prints. Times that are compared with `due` are those of one clock.

    `due`: when something is to be done: its log is to be looked at, or where it is `held`, it is to go on. `times`: how
    often it was held.
    """

    def __init__(self, now: float) -> None:
        self.due = now + _CLOSE_LOOK_S
        self.held = False
        self.times = 0
        self._first = self._last = ""
        self._suspect = False
        self._close_looks = _CLOSE_LOOKS

    def floods(self, last: str, first: Callable[[], str], now: float) -> bool:
        """Whether it is to be held now, of the times (RFC 3339) of the last line that is kept, and of the first one,
        which is asked for only where it has printed meanwhile; empty where there is none."""
        flooding = False
        if last not in {"", self._last}:
            known, self._first = self._first, first()
            dropped = known not in {"", self._first}
            flooding = _span(self._first, last) < SPAN_S and (dropped or self._suspect)
        self._last = last
        # A burst may be over by now; of a job that was held before it is not waited for.
        sure, self._suspect = flooding and (self._suspect or self.times > 0), flooding
        self._close_looks = _CLOSE_LOOKS if flooding else max(0, self._close_looks - 1)
        self.due = now + (_CLOSE_LOOK_S if self._close_looks else _LOOK_S)
        return sure

    def put_off(self, now: float) -> None:
        """Its engine did not answer."""
        self.due = now + _LOOK_S

    def hold(self, now: float) -> None:
        """It was paused."""
        self.held, self.times, self.due = True, self.times + 1, now + HOLD_S

    def let_go(self, now: float) -> None:
        """It goes on."""
        self.held, self._suspect, self.due, self._close_looks = False, False, now + _CLOSE_LOOK_S, _CLOSE_LOOKS

    def note(self) -> str:
        """One line for the job's log, of why it took so long; nothing where it was never held."""
        if not self.times:
            return ""
        return (
            f"[jobfetcher] this job was paused {self._often()}for {HOLD_S:g} s, because it printed "
            f"{(FILES - 1) * FILE_BYTES >> 20} MiB in less than {SPAN_S:g} s: print less, or into a file\n"
        )

    def _often(self) -> str:
        return f"{self.times} times " if self.times > 1 else ""


def _span(first: str, last: str) -> float:
    try:
        return (when(last) - when(first)).total_seconds()
    except ValueError:  # an engine with times of its own
        return float("inf")
