"""Failpoints: the table and the source agree, and a worker that nobody asked for one has none.

What a kill at each of them does to a job: tests/faults/test_failpoints.py.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobfetcher.core import failpoints
from jobfetcher.core.errors import ConfigError, WorkerFault
from jobfetcher.core.failpoints import FAILPOINTS, Request, ask_for, failpoint, parse_request
from tests.support.worker import command

PACKAGE = Path(failpoints.__file__).parents[1]


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    ask_for(None)


def calls() -> Iterator[tuple[str, ast.Call]]:
    """Every call of `failpoint` in the product, with its place."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and "failpoint" in {
                getattr(node.func, "id", None),
                getattr(node.func, "attr", None),
            }:
                yield f"{path.relative_to(PACKAGE.parent)}:{node.lineno}", node


@pytest.mark.fault("N1")
def test_the_table_and_the_source_agree() -> None:
    placed = set()
    for place, call in calls():
        assert len(call.args) == 1, place
        (name,) = call.args
        assert isinstance(name, ast.Constant), f"{place}: a failpoint is named by a word, not by an expression"
        placed.add(name.value)
    assert placed - FAILPOINTS == set(), "no such line in the table"
    assert FAILPOINTS - placed == set(), "in the table, and nowhere in the source"


def test_there_are_enough() -> None:
    assert len(FAILPOINTS) >= 40


def test_nothing_happens_unless_asked_for() -> None:
    for name in FAILPOINTS:
        failpoint(name)


def test_only_the_asked_one_acts_and_only_once() -> None:
    ask_for(Request("before:claim", "fail", at=2))
    for name in FAILPOINTS - {"before:claim"}:
        failpoint(name)
    failpoint("before:claim")
    with pytest.raises(WorkerFault):
        failpoint("before:claim")
    failpoint("before:claim")


def test_a_bug_is_no_error_of_ours() -> None:
    ask_for(Request("before:claim", "bug"))
    with pytest.raises(RuntimeError):
        failpoint("before:claim")


def test_it_can_be_made_to_wait() -> None:
    ask_for(Request("before:claim", "sleep1"))
    began = time.monotonic()
    failpoint("before:claim")
    assert time.monotonic() - began >= 1.0


def test_a_kill_is_a_kill() -> None:
    code = (
        "from jobfetcher.core.failpoints import *\n"
        "try:\n    ask_for(parse_request('before:claim')); failpoint('before:claim')\n"
        "finally:\n    print('cleaned up')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-9, "", "")


@pytest.mark.parametrize(
    ("text", "request_"),
    [
        ("before:claim", Request("before:claim", "kill", 1)),
        ("after:pull=fail", Request("after:pull", "fail", 1)),
        ("before:beat=sleep2@3", Request("before:beat", "sleep2", 3)),
        ("after:commit@12", Request("after:commit", "kill", 12)),
        ("after:wait=bug", Request("after:wait", "bug", 1)),
    ],
)
def test_what_can_be_asked_for(text: str, request_: Request) -> None:
    assert parse_request(text) == request_


@pytest.mark.parametrize(
    "text",
    [
        "",
        "claim",
        "before:claims",
        "BEFORE:CLAIM",
        " before:claim",
        "before:claim=",
        "before:claim=exit",
        "before:claim=sleep",
        "before:claim=sleep-1",
        "before:claim=sleep²",
        "before:claim@0",
        "before:claim@",
        "before:claim@1@1",
        "before:claim@\uff11",
        "before:claim\n",
    ],
)
def test_what_cannot(text: str) -> None:
    with pytest.raises(ConfigError, match="there is no failpoint"):
        parse_request(text)


def test_the_command_refuses_an_unknown_name(tmp_path: Path) -> None:
    env = {"API_URL": "http://127.0.0.1:9", "ACCESS_TOKEN": "t", "JOBFETCHER_FAILPOINT": "before:nothing"}
    with command(["run", "--path-base", str(tmp_path / "base")], env, tmp_path) as run:
        assert run.wait() == 2
    assert run.errors.splitlines()[-1].startswith("jobfetcher: JOBFETCHER_FAILPOINT: there is no failpoint")
    assert not (tmp_path / "base").exists()
