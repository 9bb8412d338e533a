"""Rows, the catalogue of benchmarks, and what runs them. Used by `__main__` and by every benchmark."""

from __future__ import annotations

import importlib
import json
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

#: Where "in memory" is, on every Linux; without it, the disk has to do.
_SHM = Path("/dev/shm")  # noqa: S108 - directories made in it have random names and are private

#: Of full runs; the median of five still means something when two of them were disturbed.
REPEATS = 5

MIB = 1024 * 1024
GIB = 1024 * MIB


@dataclass(frozen=True)
class Row:
    """One number beside what it is measured against.

    `value` and `baseline` are in `unit`; `limit` is the bar in words, such as "ratio >= 1.0". `ok` is None where
    nothing was judged: in short runs. A row without a peer has `baseline` and `ratio` None.
    """

    id: str
    what: str
    value: float
    unit: str
    against: str
    baseline: float | None
    ratio: float | None
    limit: str
    ok: bool | None


class Benchmark(NamedTuple):
    """Rows of these ids come from `function` ("module:function" of this package, imported when it is run)."""

    ids: tuple[str, ...]
    what: str
    function: str


CATALOGUE = (
    Benchmark(("P1",), "seconds per trivial job, one slot", "jobs:trivial"),
    Benchmark(("P2",), "jobs per second, 4 slots", "jobs:side_by_side"),
    Benchmark(("P3",), "1 GiB in and out, http and https, PUT and POST form", "transfers:large"),
    Benchmark(("P4",), "2,000 files of 4 KiB in and out; API calls for out", "transfers:small"),
    Benchmark(("P5",), "512 MiB in over a link with a limit per connection", "transfers:ranges"),
    Benchmark(("P6",), "transfers hidden behind compute, PREFETCH=1", "jobs:overlap"),
    Benchmark(("P7",), "idle: memory and CPU", "idle:idle"),
    Benchmark(("P8", "P9"), "peak memory of 4 GiB and of 20,000 outputs; heartbeats on busy cores", "memory:peak"),
    Benchmark(("P10",), "start of the command, import of the package", "idle:start"),
    Benchmark(("P11",), "cost per output and per job stays flat", "flat:flat"),
    Benchmark(("P12",), "10,000 workers after a server restart", "backoff:spread"),
    Benchmark(("P13",), "a second job with the same 1 GiB input, cache on", "transfers:cached"),
)
IDS = tuple(sorted((id for benchmark in CATALOGUE for id in benchmark.ids), key=lambda id: int(id[1:])))


@dataclass(frozen=True)
class Bench:
    """What a benchmark is given."""

    short: bool
    memory: Path
    disk: Path

    @property
    def repeats(self) -> int:
        """How often each side is measured."""
        return 1 if self.short else REPEATS

    @property
    def many(self) -> int:
        """How often a side is measured that takes a second or less: as often as makes its median steady."""
        return 1 if self.short else 3 * REPEATS

    def say(self, text: str) -> None:
        """Progress, for people."""
        print(f"    {text}", file=sys.stderr, flush=True)

    def judge(self, ok: bool) -> bool | None:
        """`ok`, but None in a short run, whose sizes say nothing about a bar."""
        return None if self.short else ok

    def faster(self, id: str, what: str, value: float, unit: str, against: str, baseline: float, least: float) -> Row:
        """A row of two speeds: ours must be at least `least` times the peer's."""
        ratio = value / baseline
        return Row(id, what, value, unit, against, baseline, ratio, f"ratio >= {least:g}", self.judge(ratio >= least))

    def at_most(self, id: str, what: str, value: float, unit: str, against: str, baseline: float, more: float) -> Row:
        """A row of two costs: ours may be `more` above the peer's."""
        limit = f"value - baseline <= {more:g} {unit}"
        ratio = value / baseline if baseline else None
        return Row(id, what, value, unit, against, baseline, ratio, limit, self.judge(value - baseline <= more))


def in_turns(ours: Callable[[], float], peer: Callable[[], float], repeats: int) -> tuple[float, float]:
    """Medians of what both return, measured in turns; who begins changes each time, so that neither has the better
    half of a machine that warms up or a disk that fills."""
    found: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats):
        for side in ((0, 1), (1, 0))[turn % 2]:
            found[side].append((ours, peer)[side]())
    return statistics.median(found[0]), statistics.median(found[1])


def seconds(work: Callable[[], object]) -> float:
    """How long `work` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def in_words(size: int) -> str:
    """A size in bytes, for people."""
    return f"{size / GIB:g} GiB" if size >= GIB else f"{size // MIB} MiB"


def run(chosen: Sequence[str], out: Path, *, short: bool, in_ci: bool) -> int:
    """Run the benchmarks of these ids, keep their rows in `out`, print them all; the exit code.

    Rows of other ids that are in `out` already stay where not all ids were chosen.
    """
    benchmarks = [benchmark for benchmark in CATALOGUE if set(benchmark.ids) & set(chosen)]
    ids = {id for benchmark in benchmarks for id in benchmark.ids}
    rows = read(out) if ids != set(IDS) else []
    failed: list[str] = []
    for benchmark in benchmarks:
        name = "/".join(benchmark.ids)
        print(f"{name}  {benchmark.what}", file=sys.stderr, flush=True)
        rows = [row for row in rows if row.id not in benchmark.ids]
        try:
            for row in _rows_of(benchmark, short):
                rows.append(row)
                write(out, rows)
                print(f"    {row.what}: {_figure(row.value)} {row.unit}", file=sys.stderr, flush=True)
        except pytest.skip.Exception as missing:
            print(f"    left out: {missing}", file=sys.stderr)
            failed += [name] if in_ci else []
        except (Exception, pytest.fail.Exception):
            traceback.print_exc()
            failed.append(name)
        write(out, rows)
    if measured := [row for row in rows if row.id in ids]:
        print(table(measured))
    missed = [f"{row.id} ({row.what})" for row in measured if row.ok is False]
    if missed:
        print(f"missed: {', '.join(missed)}", file=sys.stderr)
    if failed:
        print(f"did not run: {', '.join(failed)}", file=sys.stderr)
    return 1 if missed or failed else 0


def _rows_of(benchmark: Benchmark, short: bool) -> Iterator[Row]:
    module, _, function = benchmark.function.partition(":")
    measure: Callable[[Bench], Iterator[Row]] = getattr(importlib.import_module(f"benchmarks.{module}"), function)
    with ExitStack() as directories:

        def directory(parent: Path) -> Path:
            made = Path(tempfile.mkdtemp(prefix="jobfetcher-bench-", dir=parent))
            directories.callback(shutil.rmtree, made, ignore_errors=True)
            return made

        build = ROOT / "build"
        build.mkdir(exist_ok=True)
        yield from measure(Bench(short, directory(_SHM if _SHM.is_dir() else build), directory(build)))


def read(path: Path) -> list[Row]:
    """The rows of a file that `write` wrote; none if there is no such file."""
    if not path.exists():
        return []
    return [Row(**row) for row in json.loads(path.read_text())]


def write(path: Path, rows: Sequence[Row]) -> None:
    """Keep rows as JSON, sorted by id; at no time is there half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(path.name + ".new")
    whole.write_text(json.dumps([asdict(row) for row in sorted(rows, key=_number)], indent=1) + "\n")
    whole.replace(path)


def table(rows: Sequence[Row]) -> str:
    """Rows for people."""
    lines = [("id", "what", "value", "against", "baseline", "ratio", "limit", "ok")]
    lines += [
        (
            row.id,
            row.what,
            f"{_figure(row.value)} {row.unit}",
            row.against,
            _figure(row.baseline),
            _figure(row.ratio),
            row.limit,
            {True: "ok", False: "MISSED", None: "-"}[row.ok],
        )
        for row in sorted(rows, key=_number)
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _number(row: Row) -> int:
    return int(row.id[1:])


def _figure(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"
