"""Where one job stands, as an enum and one table of allowed moves.

The journal stores these words; what a server is told is the adapter's business (its words live there).

    CLAIMED -> STAGING_IN -> RUNNING -> STAGING_OUT -> SETTLING -> (record forgotten)

Every phase may also go straight to SETTLING: that is how a job fails, is given back, or is dropped. RUNNING may go back
to STAGING_IN, once: a run that this machine interrupted is repeated from a clean state (FAULTS.md J5, E1, A10).
"""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    """One durable phase of a job on this machine."""

    CLAIMED = "claimed"
    STAGING_IN = "staging_in"
    RUNNING = "running"
    STAGING_OUT = "staging_out"
    SETTLING = "settling"


ALLOWED: dict[Phase, frozenset[Phase]] = {
    Phase.CLAIMED: frozenset({Phase.STAGING_IN, Phase.SETTLING}),
    Phase.STAGING_IN: frozenset({Phase.RUNNING, Phase.SETTLING}),
    Phase.RUNNING: frozenset({Phase.STAGING_OUT, Phase.STAGING_IN, Phase.SETTLING}),
    Phase.STAGING_OUT: frozenset({Phase.SETTLING}),
    Phase.SETTLING: frozenset(),
}


class IllegalMove(Exception):
    """A phase was left for one that cannot follow it: a bug of ours, never the outside's fault."""


def check_move(old: Phase, new: Phase) -> None:
    """Raise IllegalMove unless `new` may follow `old`."""
    if new not in ALLOWED[old]:
        raise IllegalMove(f"{old.value} cannot become {new.value}")
