"""The frame of the benchmarks: what is kept, what is printed, and what the exit code says. Measures nothing itself."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import __main__, frame
from benchmarks.frame import Bench, Benchmark, Row

ROW = Row("P3", "a file", 90.0, "MiB/s", "curl", 100.0, 0.9, "ratio >= 0.95", False)


def use(monkeypatch: pytest.MonkeyPatch, **measures: Callable[[Bench], Iterator[Row]]) -> None:
    """Put other benchmarks in the catalogue's place: P1, P2, ... in order."""
    catalogue = [Benchmark((f"P{number}",), name, f"frame:{name}") for number, name in enumerate(measures, 1)]
    monkeypatch.setattr(frame, "CATALOGUE", catalogue)
    monkeypatch.setattr(frame, "IDS", tuple(id for benchmark in catalogue for id in benchmark.ids))
    for name, measure in measures.items():
        monkeypatch.setattr(frame, name, measure, raising=False)


def speeds(bench: Bench) -> Iterator[Row]:
    yield bench.faster("P1", "fast", 20.0, "MiB/s", "curl", 10.0, 1.0)
    yield bench.faster("P1", "slow", 9.0, "MiB/s", "curl", 10.0, 0.95)


def cost(bench: Bench) -> Iterator[Row]:
    assert bench.memory.is_dir()
    yield bench.at_most("P2", "cheap", 1.05, "s", "engine", 1.0, 0.1)


def missing(bench: Bench) -> Iterator[Row]:
    yield bench.at_most("P1", "before", 1.0, "s", "engine", 1.0, 0.1)
    pytest.skip("missing here: a program")


def test_the_list_has_every_bar(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["--list"]) == 0
    listed = [id for line in capsys.readouterr().out.splitlines() for id in line.split()[0].split("/")]
    assert sorted(listed, key=lambda id: int(id[1:])) == [f"P{number}" for number in range(1, 14)]


def test_rows_are_kept_as_the_issue_wants_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, speeds=speeds, cost=cost)
    out = tmp_path / "build" / "bench.json"
    assert frame.run(frame.IDS, out, short=False, in_ci=False) == 1
    kept = json.loads(out.read_text())
    keys = ["id", "what", "value", "unit", "against", "baseline", "ratio", "limit", "ok"]
    assert [list(row) for row in kept] == [keys] * 3
    assert [(row["id"], row["ok"]) for row in kept] == [("P1", True), ("P1", False), ("P2", True)]
    assert kept[0]["ratio"] == 2.0


def test_a_missed_bar_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, speeds=speeds)
    assert frame.run(["P1"], tmp_path / "rows", short=False, in_ci=False) == 1
    told = capsys.readouterr()
    assert "missed: P1 (slow)" in told.err
    assert [line.split()[-1] for line in told.out.splitlines()] == ["ok", "ok", "MISSED"]


def test_a_short_run_judges_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, speeds=speeds, cost=cost)
    assert frame.run(frame.IDS, tmp_path / "rows", short=True, in_ci=True) == 0
    assert [row.ok for row in frame.read(tmp_path / "rows")] == [None] * 3


def test_some_benchmarks_replace_their_rows_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, speeds=speeds, cost=cost)
    out = tmp_path / "rows"
    frame.write(out, [ROW, replace(ROW, id="P2", what="of yesterday")])
    assert frame.run(["P2"], out, short=False, in_ci=False) == 0
    assert [(row.id, row.what) for row in frame.read(out)] == [("P2", "cheap"), ("P3", "a file")]
    frame.run(frame.IDS, out, short=False, in_ci=False)
    assert [row.id for row in frame.read(out)] == ["P1", "P1", "P2"]


def test_what_is_missing_fails_in_ci_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use(monkeypatch, missing=missing, cost=cost)
    assert frame.run(frame.IDS, tmp_path / "rows", short=False, in_ci=False) == 0
    assert "left out: missing here: a program" in capsys.readouterr().err
    assert [row.what for row in frame.read(tmp_path / "rows")] == ["before", "cheap"]
    assert frame.run(frame.IDS, tmp_path / "rows", short=True, in_ci=True) == 1
    assert "did not run: P1" in capsys.readouterr().err


def test_sides_take_turns_and_the_median_counts() -> None:
    order: list[str] = []

    def side(name: str, values: list[float]) -> Callable[[], float]:
        def measure() -> float:
            order.append(name)
            return values.pop()

        return measure

    assert frame.in_turns(side("we", [9.0, 1.0, 2.0]), side("they", [5.0, 7.0, 6.0]), 3) == (2.0, 6.0)
    assert order == ["we", "they", "they", "we", "we", "they"]


@pytest.mark.parametrize("benchmark", frame.CATALOGUE, ids=lambda benchmark: "/".join(benchmark.ids))
def test_every_benchmark_is_where_the_catalogue_says(benchmark: Benchmark) -> None:
    module, _, function = benchmark.function.partition(":")
    assert callable(getattr(importlib.import_module(f"benchmarks.{module}"), function))
