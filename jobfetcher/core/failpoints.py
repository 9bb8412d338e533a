"""Places where a test may kill the worker, make it fail or make it wait: at every step that the world can see.

    failpoint("before:claim")       in the product: nothing happens, unless a test asked for that name

A test asks through the environment (JOBFETCHER_FAILPOINT, read by `settings.failpoint_request`), and only by a name of
FAILPOINTS; there is no way to ask for one through a setting, the server or a job. tests/test_failpoints.py keeps the
table and the source in step, and kills a worker once at each of them.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from jobfetcher.core.errors import ConfigError, WorkerFault, WorkerReason


@dataclass(frozen=True, slots=True)
class Request:
    """Act at the `at`th passage (from 1) of the failpoint `name`: `kill`, `fail`, `bug`, or wait so many seconds."""

    name: str
    action: str = "kill"
    at: int = 1


_lock = threading.Lock()
_asked: Request | None = None
_passed = 0


def failpoint(name: str) -> None:
    """A place of that name. Costs one comparison while no test asked for it."""
    if _asked is not None and _asked.name == name:
        _act(_asked)


def parse_request(text: str) -> Request:
    """`NAME[=ACTION][@N]`, such as `before:claim`, `after:pull=fail` or `before:beat=sleep2@3`. Raises ConfigError."""
    found = _REQUEST.fullmatch(text)
    if found is None or found["name"] not in FAILPOINTS:
        raise ConfigError(f"JOBFETCHER_FAILPOINT: there is no failpoint {text[:80]!r}; it is for tests only")
    return Request(found["name"], found["action"] or "kill", int(found["at"] or 1))


def ask_for(request: Request | None) -> None:
    """Arm one failpoint of this process; None: none."""
    global _asked, _passed
    with _lock:
        _asked, _passed = request, 0


def _act(request: Request) -> None:
    global _passed
    with _lock:
        _passed += 1
        if _passed != request.at:
            return
    if request.action in _ACTIONS:
        _ACTIONS[request.action]()
    else:
        sys.stderr.write(f"waiting at {request.name}\n")  # the test's cue
        sys.stderr.flush()
        time.sleep(float(request.action.removeprefix("sleep")))


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # it ends here; nothing after this line may run


def _fail() -> None:
    raise WorkerFault(WorkerReason.INTERNAL, "a failpoint of a test")


def _bug() -> None:
    raise RuntimeError("a failpoint of a test")


_ACTIONS: dict[str, Callable[[], None]] = {"kill": _kill, "fail": _fail, "bug": _bug}
_REQUEST = re.compile(rf"(?P<name>[a-z_:]+)(=(?P<action>{'|'.join(_ACTIONS)}|sleep[0-9]+))?(@(?P<at>[1-9][0-9]*))?")

#: Every failpoint of the product, by the room it stands in.
FAILPOINTS = frozenset(
    {
        # worker
        "before:recover",
        "after:recover",
        "before:fetch",
        "after:fetch",
        "before:claim",
        "after:claim",
        "after:reserve",
        # heartbeat
        "before:beat",
        "after:beat",
        # staging
        "before:stage_in",
        "before:place",
        "after:place",
        "after:stage_in",
        "before:restore",
        "during:restore",
        "before:upload",
        "after:upload",
        "after:stage_out",
        # runner
        "after:prepare",
        "before:running",
        "after:running",
        "before:start",
        "before:starting",
        "after:starting",
        "after:started",
        "after:wait",
        "after:sync",
        "after:exited",
        "before:save_logs",
        "after:save_logs",
        "after:remove",
        "after:own",
        "after:provenance",
        "before:again",
        "after:again",
        # outbox
        "before:settling",
        "after:settling",
        "before:tell",
        "after:tell",
        "before:remove_container",
        "after:remove_container",
        "after:remove_directory",
        "after:forget",
        "before:quarantine",
        "after:quarantine",
        # sources
        "before:send_update",
        "after:send_update",
        "before:sign_input",
        "before:sign_output",
        # engine
        "before:create",
        "after:create",
        "after:pull",
        # journal
        "before:commit",
        "after:commit",
    }
)
