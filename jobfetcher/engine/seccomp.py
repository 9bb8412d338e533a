"""The filter of system calls that jobs run under (seccomp(2)); used by `box`.

An engine has a filter of its own. Docker 20.10's leaves open what later versions closed: io_uring, AF_VSOCK, and with
32-bit programs' socketcall every other family of sockets. So the worker brings its own (FAULTS.md T11), made by
scripts/seccomp_profile.py, which says of everything that is closed why, and which capability opens it (`JOB_CAP_ADD`).
It is sent with each container, for an engine takes a filter by its contents only.
"""

from __future__ import annotations

import functools
import json
from importlib import resources


@functools.cache
def security_option() -> str:
    """The filter as an engine takes it (HostConfig.SecurityOpt), in as few bytes as it can be: inspect repeats it."""
    profile = json.loads(resources.files(__package__).joinpath("seccomp.json").read_text())
    for rule in profile["syscalls"]:
        rule.pop("comment", None)
    return f"seccomp={json.dumps(profile, separators=(',', ':'))}"
