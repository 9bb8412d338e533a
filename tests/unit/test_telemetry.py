"""telemetry: events reach every listener and hurt nobody, log lines have their form, bars do not tear lines."""

import codecs
import contextlib
import io
import json
import logging
import os
import pty
import re
import select
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from jobfetcher.telemetry.events import Event, Events
from jobfetcher.telemetry.logs import Format, configure
from jobfetcher.telemetry.progress import ProgressBars

NOON = datetime(2030, 5, 17, 12, 0, 1, 250_000, tzinfo=UTC).timestamp()


class Terminal(io.StringIO):
    """A text stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """`configure` is for a whole process: put back what pytest had set up."""
    root, ours = logging.getLogger(), logging.getLogger("jobfetcher")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


@pytest.fixture(autouse=True)
def in_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plain lines are in local time."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def logged(
    tell: Callable[[Events], None], form: Format = "plain", level: str = "info", stream: io.StringIO | None = None
) -> list[str]:
    """The lines that `tell` makes the log write."""
    stream = stream or io.StringIO()
    tell(Events(configure(form, level, stream), clock=lambda: NOON))
    text = stream.getvalue()
    assert not text or text.endswith("\n")
    return text.split("\n")[:-1]


# -- events -----------------------------------------------------------------------------------------------------------


def test_every_listener_gets_the_event_in_order() -> None:
    heard: list[tuple[str, Event]] = []
    events = Events(
        lambda event: heard.append(("one", event)), lambda event: heard.append(("two", event)), clock=lambda: 7.5
    )
    events.emit("job_started", "warning", job="12", name="a field may be called name")
    event = Event("job_started", "warning", {"job": "12", "name": "a field may be called name"}, 7.5)
    assert heard == [("one", event), ("two", event)]


def test_a_listener_that_fails_hurts_nobody_and_is_told_once_per_kind(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[str] = []

    def broken(event: Event) -> None:
        raise KeyError(event.name) if event.name == "odd" else OSError("the disk is full")

    events = Events(broken, lambda event: heard.append(event.name))
    with caplog.at_level(logging.ERROR):
        for name in ("a", "b", "odd", "c", "odd"):
            events.emit(name)
    assert heard == ["a", "b", "odd", "c", "odd"]
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert "the disk is full" in told[0]
    assert "KeyError" in told[1]


def test_ctrl_c_in_a_listener_is_not_swallowed() -> None:
    def interrupted(_event: Event) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Events(interrupted).emit("x")


# -- lines ------------------------------------------------------------------------------------------------------------


def test_a_plain_line_is_a_sentence_or_a_name_with_its_fields() -> None:
    def tell(events: Events) -> None:
        events.emit("download_started", job="12", message="downloading 3 files (1.2 GB)", files=3)
        events.emit("job_ended", job="12", exit_code=0, seconds=1.23456, note='a "b" c', empty="")
        events.emit("poll_failed", "warning", message="the server does not answer")
        events.emit("broken", "error", error=ValueError("no"))

    assert logged(tell) == [
        "2030-05-17 12:00:01 +0000  job 12  downloading 3 files (1.2 GB)",
        '2030-05-17 12:00:01 +0000  job 12  job ended  exit_code=0 seconds=1.235 note="a \\"b\\" c" empty=""',
        "2030-05-17 12:00:01 +0000  warning: the server does not answer",
        '2030-05-17 12:00:01 +0000  error: broken  error="ValueError: no"',
    ]


def test_a_json_line_is_one_object_with_the_facts_first() -> None:
    lines = logged(
        lambda events: events.emit("job_ended", job="12", n=3, ok=True, ratio=float("nan"), none=None, list=[1], é="é"),
        "json",
    )
    assert len(lines) == 1
    assert lines[0].isascii()
    assert list(json.loads(lines[0]).items()) == [
        ("time", "2030-05-17T12:00:01.250Z"),
        ("level", "info"),
        ("event", "job_ended"),
        ("job", "12"),
        ("n", 3),
        ("ok", True),
        ("ratio", "nan"),
        ("none", None),
        ("list", "[1]"),
        ("é", "é"),
    ]


def test_no_field_can_stand_in_for_the_records_own_facts() -> None:
    (line,) = logged(lambda events: events.emit("real", time="yesterday", event="forged", exc_info=True), "json")
    assert json.loads(line) == {
        "time": "2030-05-17T12:00:01.250Z", "level": "info", "event": "real", "exc_info": True,
    }  # fmt: skip


def test_auto_is_plain_on_a_terminal_and_json_elsewhere() -> None:
    def tell(events: Events) -> None:
        events.emit("hello")

    assert logged(tell, "auto")[0].startswith("{")
    assert "hello" in logged(tell, "auto", stream=Terminal())[0]
    assert not logged(tell, "auto", stream=Terminal())[0].startswith("{")


def test_colour_only_on_a_terminal_that_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def tell(events: Events) -> None:
        events.emit("hello", "warning")

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[33mwarning: hello\x1b[0m" in logged(tell, stream=Terminal())[0]
    assert logged(tell) == ["2030-05-17 12:00:01 +0000  warning: hello"]
    monkeypatch.setenv("NO_COLOR", "1")
    assert logged(tell, stream=Terminal()) == ["2030-05-17 12:00:01 +0000  warning: hello"]


def test_the_level_and_progress_events_are_left_out() -> None:
    def tell(events: Events) -> None:
        for level in ("debug", "info", "warning", "error"):
            events.emit(f"at_{level}", level)
        events.emit("progress", "error", job="1", step="pull", done=1, total=2)
        events.emit("progress_end", "error", job="1", step="pull")

    assert [line.split()[-1] for line in logged(tell, level="debug")] == ["debug", "info", "warning", "error"]
    assert [line.split()[-1] for line in logged(tell, level="warning")] == ["warning", "error"]


def test_libraries_and_warnings_go_the_same_way_from_warning_on() -> None:
    def tell(_events: Events) -> None:
        for name in ("httpx", "httpcore.connection", "urllib3.connectionpool", "docker.utils"):
            logging.getLogger(name).info("chatter")
            logging.getLogger(name).warning("from %s", name)
        try:
            raise ValueError("inner")
        except ValueError:
            logging.getLogger("docker").exception("failed")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            logging.captureWarnings(False)
            logging.captureWarnings(True)  # again, as catch_warnings has put its own in place
            warnings.warn("old thing", DeprecationWarning, stacklevel=1)

    records = [json.loads(line) for line in logged(tell, "json", "debug")]
    assert [(one["level"], one["logger"], one["message"]) for one in records[:4]] == [
        ("warning", name, f"from {name}")
        for name in ("httpx", "httpcore.connection", "urllib3.connectionpool", "docker.utils")
    ]
    assert records[4]["level"] == "error"
    assert re.fullmatch(r"ValueError: inner; in tell \(.*test_telemetry\.py:\d+\)", records[4]["error"])
    assert "DeprecationWarning: old thing" in records[5]["message"]
    assert len(records) == 6


def test_setting_up_again_replaces_the_first() -> None:
    first = io.StringIO()
    configure("plain", "info", first)
    assert len(logged(lambda events: events.emit("hello"))) == 1
    assert first.getvalue() == ""


def test_a_line_that_cannot_be_made_is_said_without_its_content() -> None:
    class Odd:
        def __str__(self) -> str:
            raise RuntimeError("secret inside")

    lines = logged(lambda events: events.emit("x", value=Odd()))
    assert lines == ["a log line of jobfetcher could not be written: RuntimeError"]


def test_a_stream_that_is_gone_hurts_nobody() -> None:
    stream = io.StringIO()
    events = Events(configure("plain", "info", stream))
    stream.close()
    events.emit("hello")


def test_importing_telemetry_does_not_load_the_heavy_libraries() -> None:
    script = (
        "import sys, jobfetcher.telemetry.logs, jobfetcher.telemetry.progress, jobfetcher.resources.detect\n"
        "print(sorted({'rich', 'pynvml'} & set(sys.modules)))"
    )
    assert python(script) == "[]\n"


def python(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


REPOSITORY = Path(__file__).parents[2]

# -- bars -------------------------------------------------------------------------------------------------------------


def test_no_bars_and_untouched_lines_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    with ProgressBars(stream) as bars:
        events = Events(configure("plain", "info", bars), bars, clock=lambda: NOON)
        events.emit("progress", job="1", step="download", done=1, total=2)
        events.emit("hello", message="[bold]hello[/bold] " + "long " * 40)
        events.emit("progress_end", job="1", step="download")
    assert stream.getvalue() == "2030-05-17 12:00:01 +0000  [bold]hello[/bold] " + "long " * 40 + "\n"


def test_no_bars_on_a_terminal_that_cannot_move_its_cursor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with ProgressBars(stream) as bars:
        Events(bars).emit("progress", job="1", step="download", done=1, total=2)
        bars.write("hello\n")
    assert stream.getvalue() == "hello\n"


#: Run on a pseudo terminal. `{body}` sees `events` and `moved`, and waits for the test with `pause`.
ON_A_TERMINAL = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that a shell runs in the background ignore Ctrl-C
from jobfetcher.telemetry.events import Events
from jobfetcher.telemetry.logs import configure
from jobfetcher.telemetry.progress import ProgressBars
pause = sys.stdin.readline
with ProgressBars(sys.stderr) as bars:
    events = Events(configure("plain", "info", bars), bars, clock=lambda: 0)
    def moved(job, step, done, total=1_000_000, **files):
        events.emit("progress", job=job, step=step, done=done, total=total, **files)
{body}
"""


class Pty:
    """A process whose standard error, and controlling terminal, is a pseudo terminal 100 characters wide."""

    def __init__(self, body: str) -> None:
        self._controller, terminal = pty.openpty()
        env = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
        env.pop("NO_COLOR", None)
        self.process = subprocess.Popen(
            [sys.executable, "-c", ON_A_TERMINAL.replace("{body}", textwrap.indent(body, "    "))],
            cwd=REPOSITORY,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=terminal,
            text=True,
            start_new_session=True,
        )
        os.close(terminal)
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.written = ""

    def __enter__(self) -> "Pty":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        os.close(self._controller)

    def read_until(self, done: Callable[[list[str]], bool]) -> list[str]:
        """Read until the screen is as wanted, or the process ends; what the screen shows then."""
        deadline = time.monotonic() + 60
        while not done(screen(self.written)):
            assert time.monotonic() < deadline, screen(self.written)
            if select.select([self._controller], [], [], 0.1)[0]:
                try:
                    self.written += self._decoder.decode(os.read(self._controller, 65536))
                except OSError:  # EIO: the process has closed its end
                    break
        return screen(self.written)

    def go_on(self) -> None:
        """End one `pause`."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> tuple[list[str], str]:
        """What the screen shows when the process has ended, and what it printed on standard output."""
        shown = self.read_until(lambda _lines: False)
        printed, _ = self.process.communicate(timeout=60)
        return shown, printed

    def shows_cursor(self) -> bool:
        return self.written.rfind("\x1b[?25h") >= self.written.rfind("\x1b[?25l")


def screen(written: str) -> list[str]:
    """The lines a terminal shows after `written`: enough of ECMA-48 for what rich sends (move up, erase, return)."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", written):
        if token == "\r":
            column = 0
        elif token == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif up := re.fullmatch(r"\x1b\[(\d+)A", token):
            row = max(0, row - int(up[1]))
        elif token == "\x1b[2K":
            lines[row] = ""
        elif re.fullmatch(r"\x1b\[[\d;]*m|\x1b\[\?25[hl]", token):
            pass  # colour; cursor shown or hidden
        else:
            assert not token.startswith("\x1b"), f"a sequence this terminal does not know: {token!r}"
            lines[row] = lines[row][:column].ljust(column) + token + lines[row][column + len(token) :]
            column += len(token)
    return [line.rstrip() for line in lines if line.strip()]


LONG = "x" * 120


def test_lines_stand_whole_above_the_bars() -> None:
    body = f"""
events.emit("first", message="the first line")
moved("12", "download", 0, files_done=0, files_total=3)
moved("13", "pull", 500_000, total=None)
events.emit("second", message="the second line {LONG} [bold]")
moved("12", "download", 250_000, files_done=1, files_total=3)
print("a stray line", file=sys.stderr)
print("a result")
pause()
events.emit("progress_end", job="12", step="download")
events.emit("third", "warning", message="the third line")
pause()
events.emit("progress_end", job="13", step="pull")
events.emit("fourth", message="the fourth line")
"""
    first = ["the first line", f"the second line {LONG} [bold]", "a stray line"]
    with Pty(body) as terminal:
        shown = terminal.read_until(
            lambda lines: (
                "a stray line" in lines
                and any("1/3 files" in line for line in lines[:-1])
                and "500.0/? kB" in lines[-1]
            )
        )
        assert [line.removeprefix("1970-01-01 00:00:00 +0000  ") for line in shown[:3]] == first
        assert len(shown) == 5
        assert re.match(r"job 12  download ━+.* 0\.2/1\.0 MB .*1/3 files$", shown[3]), shown[3]
        assert re.match(r"job 13  image +━+.* 500\.0/\? kB", shown[4]), shown[4]
        assert not terminal.shows_cursor()

        terminal.go_on()
        shown = terminal.read_until(
            lambda lines: len(lines) == 5 and "the third line" in lines[3] and lines[4].startswith("job 13  image")
        )
        assert [line.removeprefix("1970-01-01 00:00:00 +0000  ") for line in shown[:4]] == [
            *first,
            "warning: the third line",
        ]
        assert shown[4].startswith("job 13  image")

        terminal.go_on()
        shown, printed = terminal.end()
        assert [line.removeprefix("1970-01-01 00:00:00 +0000  ") for line in shown] == [
            *first, "warning: the third line", "the fourth line",
        ]  # fmt: skip
        assert terminal.shows_cursor()
        assert printed == "a result\n"
        assert terminal.process.returncode == 0


def test_a_running_job_shows_for_how_long_and_an_upload_how_many_files() -> None:
    body = """
events.emit("run", job="12", message="running busybox")
moved("13", "upload", 250_000, files_done=1, files_total=None)
pause()
moved("13", "upload", 500_000, files_done=2, files_total=None)
pause()
events.emit("progress_end", job="12", step="run")
events.emit("progress_end", job="13", step="upload")
"""
    with Pty(body) as terminal:
        shown = terminal.read_until(lambda lines: len(lines) == 3 and lines[2].endswith("1 file"))
        assert re.fullmatch(r"job 12  running 0:00:\d\d", shown[1]), shown
        assert re.match(r"job 13  upload +━+.* 0\.2/1\.0 MB .*1 file$", shown[2]), shown
        terminal.go_on()
        terminal.read_until(lambda lines: lines[-1].endswith("2 files") and not lines[1].endswith("0:00:00"))
        terminal.go_on()
        shown, _ = terminal.end()
        assert [line.removeprefix("1970-01-01 00:00:00 +0000  ") for line in shown] == ["job 12  running busybox"]


def test_bars_come_and_go_many_times_without_touching_lines() -> None:
    body = """
for job in range(5):
    events.emit("start", message=f"start {job}")
    for step in ("download", "pull", "upload"):
        moved(job, step, 10)
    events.emit("middle", message=f"middle {job}")
    for step in ("download", "pull", "upload"):
        events.emit("progress_end", job=job, step=step)
        events.emit("progress_end", job=job, step=step)
"""
    with Pty(body) as terminal:
        shown, _ = terminal.end()
        assert shown == [f"1970-01-01 00:00:00 +0000  {word} {job}" for job in range(5) for word in ("start", "middle")]
        assert terminal.shows_cursor()


def test_many_threads_tear_nothing() -> None:
    body = """
import threading
def work(job):
    for count in range(40):
        moved(job, "download", count)
        events.emit("line", message=f"line {job} {count}")
    events.emit("progress_end", job=job, step="download")
threads = [threading.Thread(target=work, args=(job,)) for job in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
    with Pty(body) as terminal:
        shown, _ = terminal.end()
        assert sorted(shown) == sorted(
            f"1970-01-01 00:00:00 +0000  line {job} {count}" for job in range(4) for count in range(40)
        )


def test_ctrl_c_takes_the_bars_away_and_shows_the_cursor() -> None:
    body = """
events.emit("hello")
moved("12", "upload", 1)
print("drawn", flush=True)
pause()
"""
    with Pty(body) as terminal:
        terminal.read_until(lambda lines: any("job 12  upload" in line for line in lines))
        # A worker handles its signals, so that none ends a thread that is drawing; here one would.
        assert terminal.process.stdout is not None
        assert terminal.process.stdout.readline() == "drawn\n"
        terminal.process.send_signal(signal.SIGINT)
        with contextlib.suppress(BrokenPipeError):  # it has ended; else the signal came just before it began to wait
            terminal.go_on()
        shown, _ = terminal.end()
        assert shown[0] == "1970-01-01 00:00:00 +0000  hello"
        assert shown[-1] == "KeyboardInterrupt"
        assert not any("job 12" in line for line in shown)
        assert terminal.shows_cursor()


def test_after_close_lines_pass_through_and_events_draw_nothing() -> None:
    body = """
moved("12", "upload", 1)
bars.close()
bars.close()
moved("13", "upload", 1)
events.emit("hello")
"""
    with Pty(body) as terminal:
        assert terminal.end()[0] == ["1970-01-01 00:00:00 +0000  hello"]
        assert terminal.shows_cursor()
