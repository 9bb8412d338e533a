"""P7 and P10: a worker that waits, and a command that only says what it can do.

P7: the real command against the mock API, asking every 30 s and looking at the GPUs each time, as it does when shipped
(NVIDIA's own library holds 18 MiB where there is one: `resources.detect`). It has run jobs before (what a job loads and
leaves is part of what an idle worker holds) and is left alone for a minute and more. CPU is the process's own clock
(user and system, all threads, to the nanosecond), memory its resident set: that includes the pages of libraries that it
shares with other programs; the proportional figure, with those divided by their users, is told beside it.

P10: wall time of the whole process, against `python -c pass` in turns.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.frame import ROOT, Bench, Row, seconds
from benchmarks.jobs import COPY, Site, site, small_files

_KIB = 1024

#: An interpreter's start varies by a factor; more of them than of other things, since they are short.
_STARTS = 15


def idle(bench: Bench) -> Iterator[Row]:
    """P7."""
    poll_s, polls = (1.0, 2) if bench.short else (30.0, 4)
    with site(bench.disk, {"timeout_job": f"{poll_s:g}", "gpus": "all"}) as here:
        inputs, _ = small_files(here)
        here.run(here.spec(COPY, inputs), 1 if bench.short else 3)
        _wait_for_poll(here, 1)  # everything after the jobs is over
        bench.say(f"watching {polls} polls, {poll_s:g} s apart")
        spent, began = _cpu_s(here.worker.pid), time.monotonic()
        asleep = _switches(here.worker.pid)
        _wait_for_poll(here, polls)
        share = (_cpu_s(here.worker.pid) - spent) / (time.monotonic() - began)
        wakes = (_switches(here.worker.pid) - asleep) / polls
        rss, pss = _memory_mib(here.worker.pid)
    what = f"idle memory, resident (proportional: {pss:.1f} MiB)"
    yield Row("P7", what, rss, "MiB", "-", None, None, "value <= 64 MiB", bench.judge(rss <= 64))
    what = f"idle CPU at a {poll_s:g} s poll ({wakes:.1f} voluntary switches per poll)"
    yield Row("P7", what, share * 100, "%", "one core", None, None, "value <= 0.1 %", bench.judge(share <= 0.001))


def _wait_for_poll(here: Site, count: int) -> None:
    """Return when the server was asked so many more times; looks once a second."""
    target = len(here.api.events("poll")) + count
    deadline = time.monotonic() + count * here.settings.timeout_job * 1.5 + 30
    while len(here.api.events("poll")) < target:
        if time.monotonic() > deadline:
            raise AssertionError("the worker does not ask any more")
        time.sleep(1)


def _cpu_s(pid: int) -> float:
    """CPU time of a process, all its threads, those that ended too; clock_getcpuclockid(3)'s number for it."""
    return time.clock_gettime((~pid << 3) | 2)


def _switches(pid: int) -> int:
    """How often the threads of a process have gone to sleep of their own will."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    lines = [line for task in tasks for line in (task / "status").read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))


def _memory_mib(pid: int) -> tuple[float, float]:
    """Resident and proportional set of a process, MiB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) / _KIB for line in lines[1:]}
    return sizes["Rss"], sizes["Pss"]


def start(bench: Bench) -> Iterator[Row]:
    """P10."""
    commands = {
        "bare": ["-c", "pass"],
        "import": ["-c", "import jobfetcher"],
        "help": ["-m", "jobfetcher", "--help"],
    }
    took: dict[str, list[float]] = {name: [] for name in commands}
    for arguments in commands.values():
        _python(arguments)  # byte code is written and read into memory
    for _ in range(2 if bench.short else _STARTS):
        for name, arguments in commands.items():
            took[name].append(seconds(lambda: _python(arguments)))  # noqa: B023 - called at once
    median = {name: statistics.median(times) for name, times in took.items()}
    bare = median["bare"]
    ok = bench.judge(median["help"] <= 0.25)
    yield Row("P10", "jobfetcher --help", median["help"], "s", "python -c pass", bare, None, "value <= 0.25 s", ok)
    yield bench.at_most("P10", "python -c 'import jobfetcher'", median["import"], "s", "python -c pass", bare, 0.05)


def _python(arguments: Sequence[str]) -> None:
    # nothing of this environment: PYTHONDONTWRITEBYTECODE, say, would have everything compiled anew each time
    env = {"PATH": os.environ.get("PATH", os.defpath)}
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, cwd=ROOT, env=env)
