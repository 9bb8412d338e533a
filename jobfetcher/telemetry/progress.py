"""Bars for downloads, image pulls and uploads of the jobs in hand, and how long each has been running, on a terminal;
nothing anywhere else.

Made by `build`. It is two things at once, because a line printed without the bars' knowledge would tear them: the
listener of the progress events (see telemetry.events), and the stream that the log writes to (telemetry.logs), whose
lines it puts above the bars. There is one live display for all jobs; it is on the screen only while a bar is.

`close` (or leaving the `with` block) takes the bars away and shows the cursor again. Whoever ends the process without
unwinding (os._exit) must call it first.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO, TypeGuard

from jobfetcher.core.text import clean
from jobfetcher.telemetry.events import Event

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

#: What a person reads beside a bar, by step.
_WORDS = {"download": "download", "pull": "image", "run": "running", "upload": "upload"}


class ProgressBars:
    """Bars on `stream` if it is a terminal that can move its cursor; else only passes written lines on.

    Thread-safe: events and log lines come from every thread.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.RLock()
        self._bars: dict[tuple[object, object], TaskID] = {}
        self._display = _display(stream) if stream.isatty() else None

    # -- the listener

    def __call__(self, event: Event) -> None:
        """Draw a `progress` event, take the bar away at `progress_end`; other events are not for us."""
        if self._display is None or event.name not in {"progress", "progress_end", "run"}:
            return
        bar = (event.fields.get("job"), event.fields.get("step"))
        with self._lock:
            if event.name == "run":
                self._begin(self._display, (event.fields.get("job"), "run"), clock=True)
            elif event.name == "progress":
                self._draw(self._display, bar, event)
            elif bar in self._bars:
                self._display.remove_task(self._bars.pop(bar))
                if not self._bars:
                    self._display.stop()

    def _draw(self, display: Progress, bar: tuple[object, object], event: Event) -> None:
        done, total, files_done, files_total = (
            value if _is_number(value := event.fields.get(name)) else None
            for name in ("done", "total", "files_done", "files_total")
        )
        files = ""
        if files_total is not None:
            files = f"{files_done or 0:g}/{files_total:g} files"
        elif files_done is not None:  # how many outputs there are is known when the last one was found
            files = f"{files_done:g} file" if files_done == 1 else f"{files_done:g} files"
        self._begin(display, bar)
        display.update(self._bars[bar], completed=done, total=total, files=files)

    def _begin(self, display: Progress, bar: tuple[object, object], *, clock: bool = False) -> None:
        """Show one more bar, unless it is there. `clock`: it counts the time that passes, and nothing else."""
        if bar not in self._bars:
            job, step = bar
            words = f"job {clean(str(job), 20)}  {_WORDS.get(str(step), clean(str(step), 20))}"
            self._bars[bar] = display.add_task(words, total=None, files="", clock=clock)
            display.start()

    # -- the stream

    def write(self, text: str, /) -> int:
        """Write whole lines, above the bars while there are any."""
        with self._lock:
            if self._display is None or not self._bars:
                return self._stream.write(text)
            from rich.text import Text

            # soft_wrap: the terminal breaks long lines, so that copied ones stay whole
            self._display.console.print(Text.from_ansi(text.rstrip("\n")), soft_wrap=True)
            return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    # -- the end

    def close(self, *, within_s: float = -1.0) -> None:
        """Take the bars away and show the cursor again. Idempotent; later events are ignored, lines pass through.

        `within_s`: do without where somebody is stuck in a write for longer (a terminal after Ctrl-S, a full pipe).
        """
        if not self._lock.acquire(timeout=within_s):
            return
        try:
            if self._display is not None:
                self._display.stop()
            self._display = None
            self._bars.clear()
        finally:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _display(stream: TextIO) -> Progress | None:
    """rich's live display, not yet shown; None on a terminal that cannot move its cursor (TERM=dumb)."""
    from rich import progress
    from rich.console import Console, RenderableType
    from rich.text import Text

    console = Console(file=stream, highlight=False)
    if console.is_dumb_terminal:
        return None

    class Words(progress.ProgressColumn):
        """Which job and step, and of a running one for how long."""

        def render(self, task: progress.Task) -> Text:
            words = task.description
            return Text(f"{words} {_duration(task.elapsed or 0.0)}" if task.fields["clock"] else words)

    class OfBytes(progress.ProgressColumn):
        """A column that has a meaning only where bytes move."""

        def __init__(self, column: progress.ProgressColumn) -> None:
            super().__init__(table_column=column.get_table_column())
            self._column = column

        def render(self, task: progress.Task) -> RenderableType:
            return "" if task.fields["clock"] else self._column(task)

    return progress.Progress(
        Words(),
        OfBytes(progress.BarColumn(bar_width=None)),
        OfBytes(progress.DownloadColumn(binary_units=False)),
        OfBytes(progress.TransferSpeedColumn()),
        OfBytes(progress.TimeRemainingColumn(compact=True)),
        progress.TextColumn("{task.fields[files]}", markup=False),
        console=console,
        refresh_per_second=5,
        transient=True,
        expand=True,
        redirect_stdout=False,  # it may be a file or a pipe, where results go
    )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
