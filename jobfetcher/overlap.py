"""Two things done at once for one job, as one step: done when both are, failed with the first failure.

Used by the runner, which pulls the image while the inputs download.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from jobfetcher.core.errors import Stopped, StopReason
from jobfetcher.core.halt import Halt

_A = TypeVar("_A")
_B = TypeVar("_B")


def both(halt: Halt, here: Callable[[Halt], _A], beside: Callable[[Halt], _B], name: str) -> tuple[_A, _B]:
    """What both return. `here` runs in this thread and `beside` in one called `name`, each with a halt of its own that
    is set with `halt`, and with FAILED when the other one fails; so both must heed it. What one waits for is known to
    `halt` as well. Returns, and raises the first failure, when both have ended.
    """
    inner = Halt(on_wait=halt.waits_for)
    done: list[_B] = []
    failures: list[BaseException] = []  # in the order of time: a failure that the other one caused comes second

    def run() -> None:
        try:
            done.append(beside(inner))
        except BaseException as error:
            failures.append(error)
            inner.set(StopReason.FAILED)

    def pass_on() -> None:
        inner.set(halt.reason or StopReason.FAILED)

    thread = threading.Thread(target=run, name=name)
    with halt.waking(pass_on):
        try:
            thread.start()
        except RuntimeError:  # this user may start no more threads: then one after the other
            first = here(inner)
            return first, beside(inner)
        try:
            first = here(inner)
        except BaseException as error:
            failures.append(error)
            inner.set(StopReason.FAILED)
        finally:
            thread.join()
    if failures:
        cause = next((one for one in failures if not _is_consequence(one)), failures[0])
        raise cause
    return first, done[0]


def _is_consequence(error: BaseException) -> bool:
    return isinstance(error, Stopped) and error.reason is StopReason.FAILED
