"""The contract about faults and threats, by id: what each row is about, and which tests carry it.

A test names the rows that it carries, `@pytest.mark.fault("A4")`, also several at once. tests/test_fault_coverage.py
fails while a row has no test. `make faults` runs the tests that carry a row and prints them by row (`Table`).
"""

from __future__ import annotations

import ast
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

TESTS = Path(__file__).parent

#: A: worker or host dies. B: API and network. C: transfers. D: disk. E: engine. F: signals, clock, sharing.
#: J: rules of the house. N: numbers to reach. S: oddities of the server. T: threats.
ROWS = {
    "A1": "killed before the claim is on disk",
    "A2": "killed while inputs come in",
    "A3": "killed while the image is pulled or the container is made",
    "A4": "killed while the container runs on",
    "A5": "the container ends while no worker is there",
    "A6": "killed while outputs go out",
    "A7": "killed between telling the end and noting it",
    "A8": "killed while cleaning up",
    "A9": "a job that crashes its worker again and again",
    "A10": "the machine restarts, or loses power in the middle of a write",
    "A11": "the worker's own container is replaced",
    "A12": "the worker is frozen for longer than its lease",
    "B1": "the API is away for a minute",
    "B2": "the API is away for an hour",
    "B3": "the API is away for a day",
    "B4": "the token is refused, once or for long",
    "B5": "the token runs out during a job",
    "B6": "the account is not allowed to work",
    "B7": "a 404 to an update: the job is cancelled",
    "B8": "a 500 to an update: perhaps the job is gone",
    "B9": "the address is not that of an API",
    "B10": "an update is refused with 409, 410, 412 or 422",
    "B11": "the server asks for patience (Retry-After)",
    "B12": "a server error, or a page where JSON should be",
    "B13": "time-outs, resets, half-closed connections, no name",
    "B14": "one byte a second",
    "B15": "huge, deep or ambiguous JSON",
    "B16": "a specification of another shape; two jobs at once",
    "B17": "cancelled by its user, in each phase",
    "B18": "the lease is lost and another worker has the job",
    "B19": "one account on two machines",
    "B20": "proxies and IPv6",
    "B21": "a 404, 403, 5xx or redirect that is not the API's",
    "B22": "a success that is not the API's",
    "B23": "an end that was committed and then answered 500",
    "B24": "a token that is refused with 403, a sign-in that is locked, a token file that changes",
    "C1": "a link runs out during the download",
    "C2": "a download is cut short",
    "C3": "a download is damaged on the way",
    "C4": "the object changes between two parts",
    "C5": "the store cannot resume",
    "C6": "redirects",
    "C7": "the input is not there",
    "C8": "an upload fails half-way",
    "C9": "the answer to an upload is lost",
    "C10": "an upload form has run out, or the clock is wrong",
    "C11": "an output is larger than the store takes",
    "C12": "a hundred thousand small outputs",
    "C13": "one very large file",
    "C14": "an output changes while it is sent",
    "C15": "empty files and odd names",
    "C16": "a success that is no store's",
    "C17": "a content encoding that packs nothing",
    "C18": "a store that refuses for a while",
    "C19": "addresses that are not encoded, and links to the API's own host",
    "C20": "form fields that are no text",
    "C21": "retries that nobody hears of",
    "C22": "an ETag that is no digest",
    "D1": "too little disk to take a job",
    "D2": "the disk fills up during a download",
    "D3": "the job fills the disk",
    "D4": "the job prints without end",
    "D5": "the disk is full when the journal is written",
    "D6": "no inodes, a read-only disk, a disk that fails",
    "D7": "what is left after years",
    "E1": "the engine restarts during a job",
    "E2": "the engine restarts and its containers live on",
    "E3": "the engine is away for long, or hangs",
    "E4": "the job runs out of memory",
    "E5": "the job does not want to end, or cannot be ended",
    "E6": "the image is missing, denied or misnamed",
    "E7": "the registry is away, slow or busy",
    "E8": "the image is for another machine, or cannot start",
    "E9": "zombies, and a container that never ends",
    "E10": "containers that nobody knows any more",
    "E11": "a person kills, removes, pauses or restarts the container",
    "E12": "the job's directory is not where the engine looks",
    "E13": "outputs that belong to another user",
    "E14": "a GPU fails, also where only a container sees it",
    "E15": "the job asks for more than there is, or for nothing",
    "F1": "told to leave while idle",
    "F2": "told to leave while busy",
    "F3": "told to leave a second time",
    "F4": "told to leave a third time",
    "F5": "signals at any moment",
    "F6": "the wall clock jumps",
    "F7": "two workers, one directory",
    "F8": "the keep-alive thread dies",
    "F9": "no CPU time to be had",
    "F10": "few descriptors, little memory",
    "F11": "outputs that are no plain files",
    "F12": "a journal of another version",
    "J1": "the journal is durable before each act, and damage never stops the worker",
    "J2": "names decide what is ours: a name that is taken is adopted",
    "J3": "one sender per job; the end comes after the last keep-alive",
    "J4": "how old the lease is counts through sleep; in doubt the server is asked first",
    "J5": "whose fault it is decides what becomes of the job",
    "J6": "finished is said only of a genuine exit 0 with every output stored",
    "J7": "every call has one deadline in all",
    "J8": "what is tried again, how often, and what is not",
    "J9": "files stay until the end is confirmed; kept ends are told later",
    "J10": "each fault is one line per change of state",
    "N1": "killed at random and at every named place: nothing lost, one end each",
    "N2": "the same while the engine is killed, too: nothing falsely finished",
    "N3": "from the start to the first word of a job in hand",
    "N4": "the longest silence of a job in hand, under load",
    "N5": "outages of a minute, an hour and a day in each phase",
    "N6": "from cancelled to container gone",
    "N7": "cuts and flipped bits: few bytes twice, none wrong",
    "N8": "memory stays flat",
    "N9": "the journal cut and flipped at every byte",
    "N10": "hostile names, trees and links: nothing outside is touched",
    "N11": "hostile addresses: nothing inside is asked, no secret leaves",
    "N12": "how long leaving takes",
    "S1": "a job is handed out without acknowledgement",
    "S2": "a worker is its account",
    "S3": "an account never gets a job a second time",
    "S4": "a silent job goes back to the queue after 300 s",
    "S5": "a requeued job can be taken back by a keep-alive",
    "S6": "a late update opens a finished job again",
    "S7": "a deleted job is 404 once, then 500",
    "S8": "an upload without a lease is 500",
    "S9": "of two updates at once one may fail",
    "S10": "queued gives a job back",
    "S11": "each end is a mail, and its details go into it",
    "S12": "details travel in the query",
    "S13": "links live 600 s, objects have at most 5 GB",
    "S14": "a link may lead to nothing",
    "S15": "headers may be nested",
    "S16": "401 and 403 are about the worker",
    "S17": "an error is final",
    "S18": "GPU models are compared for equality",
    "S19": "a state is committed before the user's side hears of it",
    "S20": "the API's own answers, and those of whoever stands before it",
    "S21": "groups are a preference, after priority and before age",
    "S22": "the queue's number of a job and its user's are different ones",
    "S23": "an account with a semicolon in its name is never handed a job",
    "S24": "a sweep that cannot reach the user's side ends whole",
    "T1": "an input name that leads elsewhere",
    "T2": "an output name that leads elsewhere",
    "T3": "a job id that leads elsewhere",
    "T4": "outputs that are links to other files",
    "T5": "paths that change while they are read",
    "T6": "a signed request with more in it than a request",
    "T7": "a link to an address inside",
    "T8": "the token goes to another host",
    "T9": "a file id that becomes another endpoint",
    "T10": "secrets in logs, records and processes",
    "T11": "a job that asks for more rights",
    "T12": "a job that exhausts the machine",
    "T13": "a job that takes other GPUs",
    "T14": "an image that its owner did not allow",
    "T15": "a job that nobody signed",
    "T16": "bodies and images that unpack without end",
    "T17": "text that writes into logs, terminals and mails",
    "T18": "the status page asked from elsewhere",
    "T19": "a job that reaches what it should not",
    "T20": "somebody in the middle",
    "T21": "other users of the machine",
    "T22": "headers, tags and messages that are hostile or huge",
    "T23": "jobs, a server or a machine that waste the worker's time; it tests itself",
    "T24": "where the worker's own parts come from",
    "T25": "an image's registry that leads the engine inside",
    "T26": "a directory of somebody else's below or above the worker's own",
    "T27": "helper containers outside the policy",
    "T28": "what an image's configuration brings along",
    "T29": "a flood of log lines",
    "T30": "a signed job that is played again, or with other inputs",
    "T31": "a job that reaches the host's services on the gateway",
    "T32": "settings and keys that others may write",
    "T33": "a worker that was broken into and holds the engine's socket",
}

#: What of a row comes with a later part of the program.
WAITING = {
    "B19": "that `doctor` refuses a second live instance",
    "J10": "that `status` shows it",
    "T10": "the status page among the places that are searched",
    "T18": "the whole row: there is no status page yet",
    "T19": "that `doctor` tries the metadata address from a container",
    "T31": "that jobs cannot learn each other's names from the engine's name server",
    "T24": "the base image's digest and a signature: they come with the first release",
}

#: What of a row one machine cannot show, and what stands in for it.
NOT_HERE = {
    "A10": "no machine is restarted: another boot id, a killed engine and a damaged journal stand in for it",
    "E5": "no process is made unkillable: a proxy of the engine's socket answers the kill and forwards none",
    "E14": "no GPU is broken: a stub of NVIDIA's library loses it, errs or hangs below the real bindings",
    "B20": "no network of another MTU: a proxy, IPv6 on loopback and network namespaces are here",
    "C12": "a CI run moves 300 files and walks 100,000; the bounds are those of the row",
    "C13": "a CI run moves 512 MiB; memory does not depend on the size",
    "D4": "a CI run prints 64 MiB, which wraps the log's files as 10 GB would",
    "F5": "a CI run starts the worker 8 times under signals, with JOBFETCHER_TESTS_FULL=1 80 times",
    "F7": "no NFS server: the kind of the file system is put in by the test",
    "N4": "the times are a tenth of the row's, and so are the limits; 32 MiB and 300 files stand for 20 GB and 100,000",
    "N7": "a CI run cuts and flips an eighth of the bytes, with JOBFETCHER_TESTS_FULL=1 all",
    "N8": "as C13 and D4; the 100,000 outputs are there, without a network",
    "N9": "a CI run takes every 101st byte, with JOBFETCHER_TESTS_FULL=1 every one",
    "T11": "docker-bench cannot be had here: every field of `docker inspect` is compared with a golden file",
}

#: Rows that have no test at all; each must be in WAITING or NOT_HERE.
WITHOUT_TEST = frozenset({"T18"})


class Mark(NamedTuple):
    """One id in one `fault` marker, and where it stands. An id that is no plain string is None."""

    id: str | None
    place: str


def marks() -> Iterator[Mark]:
    """Every `pytest.mark.fault(...)` below tests/, wherever it is written. Nothing is imported."""
    for path in sorted(TESTS.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.fault":
                place = f"{path.relative_to(TESTS.parent)}:{node.lineno}"
                for argument in node.args or [ast.Constant(None)]:
                    value = argument.value if isinstance(argument, ast.Constant) else None
                    yield Mark(value if isinstance(value, str) else None, place)


class Table:
    """Runs only the tests that carry a row, and prints at the end how each row did. A pytest plugin."""

    def __init__(self) -> None:
        self._rows: dict[str, list[str]] = {}
        self._results: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        for item in items:
            self._rows[item.nodeid] = [str(row) for mark in item.iter_markers("fault") for row in mark.args]
        config.hook.pytest_deselected(items=[item for item in items if not self._rows[item.nodeid]])
        items[:] = [item for item in items if self._rows[item.nodeid]]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A test that passes has three good reports, and one that fails to tidy up a bad one after a good one.
        if report.when != "call" and report.passed:
            return
        for row in self._rows[report.nodeid]:
            self._results[row][report.nodeid.partition("[")[0]][report.outcome] += 1

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("faults and threats")
        for row, title in ROWS.items():
            tests = self._results.get(row, {})
            total = sum(tests.values(), Counter[str]())
            verdict = _words(total) or ("later" if row in WITHOUT_TEST else "NOT RUN")
            terminalreporter.write_line(f"{row:<4} {title}: {verdict}", red=bool(total["failed"]), bold=True)
            for test, results in tests.items():
                terminalreporter.write_line(f"       {_words(results):<24} {test}")
            for why, notes in (("later", WAITING), ("not on one machine", NOT_HERE)):
                if row in notes:
                    terminalreporter.write_line(f"       {why}: {notes[row]}")


def _words(results: Counter[str]) -> str:
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(results.items()))
