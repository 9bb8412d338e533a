"""Cases that mostly wait, run at the same time; and something that happens while another thing goes on."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor


def side_by_side(cases: Mapping[str, Callable[[], object]]) -> None:
    """Run all cases at once, each in a thread of its own. Raises a group of what failed, with the names of the cases.

    Only for cases that share nothing.
    """
    with ThreadPoolExecutor(len(cases)) as pool:
        futures = {name: pool.submit(case) for name, case in cases.items()}
    failed: list[BaseException] = []
    names: list[str] = []
    for name, future in futures.items():
        if (error := future.exception()) is not None:
            error.add_note(f"in the case: {name}")
            names.append(name)
            failed.append(error)
    if failed:
        raise BaseExceptionGroup(f"{len(failed)} of {len(cases)} cases: {'; '.join(names)}", failed)


@contextlib.contextmanager
def when(ready: Callable[[], bool], act: Callable[[], object]) -> Iterator[None]:
    """Do `act` as soon as `ready`, while the block runs. AssertionError if that did not happen before its end."""
    over, done = threading.Event(), threading.Event()

    def wait() -> None:
        while not ready():
            if over.wait(0.02):
                return
        act()
        done.set()

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert done.is_set(), "what the test waited for did not happen"
