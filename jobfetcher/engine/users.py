"""Whose numbers jobs run under, for the machine's owner at the start. Pure, but for what asks who has a number.

Used by `build`. A container's users are numbers, and without a range of their own they are this machine's numbers: what
breaks out of its box as root is root outside, and a job of user 1000 that comes out is whoever has 1000 here, owns what
that one owns, and counts among that one's processes (RLIMIT_NPROC) even inside. Docker's userns-remap gives containers
numbers that nobody has; an engine without root rights has such a range anyway.
"""

from __future__ import annotations

import pwd
from collections.abc import Callable, Iterator

from jobfetcher.engine.flavour import Flavour

#: Numbers that nobody has, as a rule: above those of people, services and systemd (up to 65535), and below the ranges
#: for containers (subuid(5), from 100000).
_FREE = 70000


def name_of(number: int) -> str | None:
    """Who has that number on this machine (passwd(5), or what stands in its place); None: nobody."""
    try:
        return pwd.getpwuid(number).pw_name
    except (KeyError, OverflowError):
        return None


def notes(flavour: Flavour, job_user: str | None, who: Callable[[int], str | None] = name_of) -> Iterator[str]:
    """What is to be said of JOB_USER, a sentence each.

    `who`: the local user of a number, as this process sees them: in a container those are its image's.
    """
    if flavour.rootless or flavour.remapped:
        return
    user = (job_user or "").partition(":")[0]
    if not user or (user.isdecimal() and int(user) == 0):
        yield (
            f"jobs run under this machine's own user numbers, root among them: {flavour.name} has no range of its own "
            f"for containers. {_AUTO if flavour.kind else _REMAP}; or JOB_USER={_FREE}:{_FREE}, numbers that nobody has"
        )
    elif user.isdecimal() and (name := who(int(user))) is not None:
        yield (
            f"JOB_USER={job_user}: {user} is {name}, a user of this machine: what of a job gets out of its box is "
            f"{name}, and its processes count as {name}'s. Take numbers that nobody has, such as {_FREE}:{_FREE}"
        )


_REMAP = '"userns-remap": "default" in /etc/docker/daemon.json gives it one (it then pulls its images anew)'
_AUTO = "A Podman without root rights has one"
