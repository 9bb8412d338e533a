"""Straight lines that wait without a thread: a story is a generator, and what it yields is what it waits for.

Used by `batch` (starts stories), and by everyone who tells one: `download`, `upload`, `wire`, `patience`. All stories
run in the loop's thread, so nothing they share needs a lock, and a file costs no thread: a hand-off between threads
takes longer than 4 KiB take over a fast wire. What would block (signing, a copy out of the cache) is put into an
`Aside` and runs in a thread of the batch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from jobfetcher.transfer.multi import Timer, TransferLoop

T = TypeVar("T")

#: Takes the result of a wait, or the error that ended it.
Resume = Callable[[Any, BaseException | None], None]


class Wait(Protocol):
    """What a story yields. `begin` never calls `resume` before it has returned; `cancel` forgets `resume`."""

    def begin(self, teller: Teller, resume: Resume) -> None: ...

    def cancel(self) -> None: ...


class Teller(Protocol):
    """Where stories are told: the loop they run in, and threads for what would block it."""

    @property
    def loop(self) -> TransferLoop: ...

    def aside(self, do: Callable[[], object], then: Resume) -> Callable[[], bool]:
        """Run `do` in another thread and `then` in the loop's; the result takes it back if it has not begun."""
        ...


#: A story whose end is a T.
Tale = Generator[Wait, Any, T]


class Pause:
    """Nothing for so many seconds."""

    __slots__ = ("_seconds", "_timer")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._timer: Timer | None = None

    def begin(self, teller: Teller, resume: Resume) -> None:
        self._timer = teller.loop.later(self._seconds, lambda: resume(None, None))

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


class Aside:
    """A call that blocks. Its result, or its exception, is the story's.

    What it works on (a descriptor) belongs to the story, so a story that is ended meanwhile ends only when it returns.
    """

    __slots__ = ("_do", "_take_back")

    def __init__(self, do: Callable[[], object]) -> None:
        self._do = do
        self._take_back: Callable[[], bool] = lambda: True

    def begin(self, teller: Teller, resume: Resume) -> None:
        self._take_back = teller.aside(self._do, resume)

    def take_back(self) -> bool:
        """Whether it never runs; else it is running, and `resume` will be called."""
        return self._take_back()

    def cancel(self) -> None:
        self._take_back()


class Story(Generic[T]):
    """One generator on its way. In the loop's thread only; `on_end` is called once, however it ends.

    Whatever goes wrong is its own `error`: neither method raises, since the loop that calls them is everybody's.
    """

    __slots__ = ("_closed", "_on_end", "_tale", "_teller", "_wait", "ended", "error", "result")

    def __init__(self, tale: Tale[T], teller: Teller, on_end: Callable[[Story[T]], None]) -> None:
        self._tale, self._teller, self._on_end = tale, teller, on_end
        self._wait: Wait | None = None
        self._closed = self.ended = False
        self.result: T | None = None
        self.error: BaseException | None = None

    def step(self, value: object = None, error: BaseException | None = None) -> None:
        """Go on with what was waited for."""
        self._wait = None
        if self._closed:
            self._finish()
            return
        try:
            wait = self._tale.send(value) if error is None else self._tale.throw(error)
        except StopIteration as end:
            self.result = end.value
            self._end()
            return
        except BaseException as failure:
            self.error = failure
            self._end()
            return
        self._wait = wait
        try:
            wait.begin(self._teller, self.step)
        except BaseException as failure:  # such as a thread that cannot be had: it ends this story and no other
            self._wait = None
            self.error = failure
            self._finish()

    def close(self) -> None:
        """End it where it stands; its `finally` blocks run."""
        if self.ended or self._closed:
            return
        self._closed = True
        wait = self._wait
        if isinstance(wait, Aside) and not wait.take_back():
            return  # ends when the call returns
        if wait is not None:
            try:
                wait.cancel()
            except BaseException as failure:
                self.error = failure
        self._finish()

    def _finish(self) -> None:
        try:
            self._tale.close()
        except BaseException as failure:
            self.error = failure
        self._end()

    def _end(self) -> None:
        self.ended = True
        # Whoever hears of the end often knows the story: without this circle nothing is left for the garbage collector,
        # which would cost a fifth of the time of a small file.
        on_end, self._on_end = self._on_end, _heard
        on_end(self)


def _heard(_story: Story[Any]) -> None:
    pass
