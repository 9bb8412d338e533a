"""Whether an engine can vouch for the exit it tells of a container (FAULTS.md E1, J6). Pure; used by `docker`.

An engine that is stopped or started again ends the containers that it finds running: by TERM, and 10 s later by KILL. A
job that traps TERM then exits 0, and the record that the engine keeps on its disk looks like a success. It is not one.

What follows holds of answers from ONE engine process, asked over a connection that was made after the exit was seen.
dockerd closes its listener before it signals containers, so a process that takes such a connection has not ended this
one by its own shutdown. (A connection from before is worthless: it is served on while the containers are ended.) What
is left is that it ended the container at its own start, or that an engine before it did. Against both there are three
witnesses; one is enough:

- memory: it remembers the container's end (event `die`; the memory is lost with the process and holds 256 events), and
  a `create` of any container before that, such as its own. A create comes through the API, which opens after the start,
  and what a start ends is ended before anything else happens.
- presence: it remembers the end, and we were told on one connection, so by one process, first "running" (or, before it
  was started, "watching it") and then "ended". The end was not at the start of that process, whose API was open; and no
  later process can remember it.
- age: its network `bridge` was made before the container was started. dockerd makes it anew at each start, except when
  containers run on over it, which is only so with live-restore: then this witness is not heard.

    the engine                                  while the job    worker    why                               genuine
    ------------------------------------------  ---------------  --------  --------------------------------  -------
    up all the time                             ends             there     presence, memory                  yes
    up all the time                             ends             away      memory; age                       yes
    up all the time, 256 later events           ends             away      age; no bridge: nobody            yes; no
    out of reach or frozen, the same after      ends             either    as above                          as above
    stopped in order                            runs             either    no memory, younger                no
    killed, started                             runs             either    ends first in memory, younger     no
    killed or stopped, started                  ends between     either    no memory, younger                no
    frozen, then killed, started                ends between     either    no memory, younger                no
    restarted with live-restore                 runs, ends then  there     presence                          yes
    restarted with live-restore                 runs, ends then  away      memory, if a create came before   yes; no
    restarted with live-restore                 ends between     either    no memory                         no

Beside all that, and with every engine, a run that a person started again (`docker restart`, `docker start`) is no run
of ours, and exit 0 after a signal from outside (`docker stop` of a job that traps TERM) is no success: not genuine. A
reboot is the caller's to see, by the boot id (A10): a clock that it set back could make a bridge look old.

Podman has no such process: each container is run by a conmon of its own, which notes the exit code in a file, whoever
serves the API meanwhile. The service may be stopped, killed and started again (systemd's unit has KillMode=process, and
it ends by itself when nobody asks for a while): containers run on, and none is ended at a start. Nor does its network
`bridge` say anything, since its age is that of the question. So there every end is genuine but for the two kinds above,
whatever happened to the service (`Flavour.ends_containers`). Its memory is a log that outlives it, and tells what was
started again or signalled. Two things are not told from a job's own end: `podman stop` of a job that obeys TERM at
once and exits 0, since Podman notes a stop only where it sees the end before conmon's helper does; and the TERM that a
user's processes get when the session ends (`loginctl enable-linger` prevents that).

Sources: moby, daemon/daemon.go `restore` (ends what it finds running, then the networks, then restart policies) and
daemon/daemon_unix.go `configureNetworking` ("Clear stale bridge network"), the same in 20.10 and 29. Each row of the
table is tried on real engines: tests/faults/test_engine_faults.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

#: What an engine must be asked to remember for `Memory.of`: the filters of GET /events.
FILTERS: Mapping[str, list[str]] = {"type": ["container"], "event": ["create", "start", "kill", "die"]}

#: Events that say of a container that somebody ended it through the engine. Docker has `kill` for all of them.
_SIGNALS = {"kill", "stop", "restart"}


@dataclass(frozen=True, slots=True)
class Memory:
    """What an engine process remembers of one container's run.

    `ended`: its end. `api_before`: something before that end which only the API can have caused. `signalled`: it was
    sent a signal through the engine. `again`: it was started more than once.
    """

    ended: bool = False
    api_before: bool = False
    signalled: bool = False
    again: bool = False

    @staticmethod
    def of(events: Iterable[Mapping[str, Any]], container_id: str) -> Memory:
        """From events, oldest first."""
        created = created_before = False
        own: list[str] = []
        for event in events:
            action = str(event.get("Action"))
            if action == "create":
                created = True
            if (event.get("Actor") or {}).get("ID") == container_id:
                own.append(action)
                if action == "die":
                    created_before = created
        return Memory(
            ended="die" in own,
            api_before=created_before,
            signalled=not _SIGNALS.isdisjoint(own),
            again=own.count("die") > 1 or own.count("start") > 1,
        )


def genuine(memory: Memory, code: int, *, present: bool, older: bool, by_us: bool) -> bool:
    """Whether the exit `code` of a container that ended is its own. `by_us`: this process stopped it.

    `present`: one connection saw it run and end. `older`: see `engine_is_older`.
    """
    if memory.again or (code == 0 and memory.signalled and not by_us):
        return False
    return older or (memory.ended and (present or memory.api_before))


def engine_is_older(bridge_created: str, live_restore: bool, started: str, finished: str) -> bool:
    """Whether the engine process runs since before the container was started. Times in RFC 3339, by the engine's clock.

    The end must be younger as well, for what an engine ends at its start is older than its bridge, even where the clock
    was set back meanwhile. (The end of a short run may be noted as before its start: two programs write them.)
    """
    return not live_restore and when(bridge_created) < min(when(started), when(finished))


def when(timestamp: str) -> datetime:
    """An engine's timestamp (RFC 3339; nanoseconds are cut to microseconds)."""
    return datetime.fromisoformat(timestamp)
