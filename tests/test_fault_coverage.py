"""Every row of the contract about faults and threats has a test that carries it, and no test carries an unknown row."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fault_rows import NOT_HERE, ROWS, TESTS, WAITING, WITHOUT_TEST, marks


def test_every_row_has_a_test() -> None:
    carried = {mark.id for mark in marks()}
    missing = [f"{row} {title}" for row, title in ROWS.items() if row not in carried | WITHOUT_TEST]
    assert not missing, "no test carries\n  " + "\n  ".join(missing)


def test_no_marker_names_a_row_that_there_is_not() -> None:
    unknown = [f"{mark.place}: {mark.id}" for mark in marks() if mark.id not in ROWS]
    assert not unknown, "not an id of ROWS, as a plain string:\n  " + "\n  ".join(unknown)


def test_a_row_is_without_a_test_for_a_reason_only() -> None:
    assert set(ROWS) >= set(WAITING) | set(NOT_HERE) | WITHOUT_TEST
    assert set(WAITING) | set(NOT_HERE) >= WITHOUT_TEST
    # Once somebody has tested it, it must be tested from then on.
    assert not {mark.id for mark in marks()} & WITHOUT_TEST


def test_the_rows_are_all_there_and_in_order() -> None:
    counts = {"A": 12, "B": 24, "C": 22, "D": 7, "E": 15, "F": 12, "J": 10, "N": 12, "S": 24, "T": 33}
    assert list(ROWS) == [f"{letter}{number + 1}" for letter, count in counts.items() for number in range(count)]


def test_the_table_runs_what_carries_a_row_and_says_how_it_went(tmp_path: Path) -> None:
    written = tmp_path / "test_written.py"
    written.write_text(
        "import pytest\n"
        "pytestmark = pytest.mark.fault('A1', 'S3')\n"
        "@pytest.mark.fault('T2')\n"
        "@pytest.mark.parametrize('good', [True, False])\n"
        "def test_one(good): assert good\n"
        "@pytest.mark.skip('not now')\n"
        "def test_two(): pass\n"
    )
    without = "tests/test_fault_coverage.py"  # carries no row itself; brings the option with it
    said = subprocess.run(
        [sys.executable, "-m", "pytest", "--faults-table", "-p", "no:cacheprovider", str(written), without],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line.strip() for line in said.stdout.splitlines()]
    assert said.returncode == pytest.ExitCode.TESTS_FAILED, said.stdout + said.stderr
    for row in ("A1", "S3"):
        assert f"{row:<4} {ROWS[row]}: 1 failed, 1 passed, 1 skipped" in lines
    at = lines.index(f"T2   {ROWS['T2']}: 1 failed, 1 passed")
    assert lines[at + 1].startswith("1 failed, 1 passed ")
    assert lines[at + 1].endswith("::test_one")
    assert f"A2   {ROWS['A2']}: NOT RUN" in lines
    assert f"T18  {ROWS['T18']}: later" in lines
    assert f"later: {WAITING['T18']}" in lines
    assert f"not on one machine: {NOT_HERE['A10']}" in lines
