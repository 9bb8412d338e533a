"""The one clock of the server: real time plus a shift that tests turn forward (`POST /_mock/clock`)."""

import time


class Clock:
    """Seconds since 1970 as everything in this server sees them: leases, tokens, signed URLs."""

    def __init__(self) -> None:
        self._shift_s = 0.0

    def now(self) -> float:
        """Unix time, shifted."""
        return time.time() + self._shift_s

    def advance(self, seconds: float) -> None:
        """Jump forward (or, with a negative number, back)."""
        self._shift_s += seconds
