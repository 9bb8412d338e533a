"""Processes of a container that its engine knows nothing of; used by `docker`.

An engine that is killed while it starts a container may never note that it did. Started again, it calls the container
new, ends nothing, and removes it while its program runs on, with the job's directory and a GPU in its hands. The kernel
knows: a process names its container in /proc/PID/cgroup (cgroups(7)), whatever the engine. Seen on Docker 20.10 by
tests/faults/test_engine_faults.py.
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path


def end_unseen(container_id: str) -> list[int]:
    """KILL what runs in the control groups of that container; returns what may not be killed (another user's).

    A worker that is in a container itself sees no process but its own, so nothing is ended there.
    """
    denied = []
    for pid in processes_of(container_id):
        with contextlib.suppress(ProcessLookupError):
            process = os.pidfd_open(pid)  # from here on the number means this process, or nobody
            try:
                if container_id not in _groups(pid):
                    continue
                signal.pidfd_send_signal(process, signal.SIGKILL)
            except PermissionError:
                denied.append(pid)
            finally:
                os.close(process)
    return denied


def processes_of(container_id: str) -> list[int]:
    """The processes in the control groups of that container; none where this process does not see them."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return [pid for pid in pids if container_id in _groups(pid)]


def _groups(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cgroup").read_text(errors="replace")
    except OSError:  # it has ended
        return ""
