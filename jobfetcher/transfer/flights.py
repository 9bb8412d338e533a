"""Objects that are being fetched for the cache now, so that jobs that want the same one at the same time fetch it once.

Used by `download`, in the loop's thread. Whoever comes first fetches; who comes meanwhile waits until it is kept, and
then asks the store for itself, like everybody who finds something in the cache. Nobody waits for what may never come:
the flight ends at the first trouble, and when the reply says that this file cannot be kept, or that what is kept is
still the same. A job that waits depends on the first one's threads as far as they hash the file and keep it.
"""

from __future__ import annotations

from collections.abc import Callable

from jobfetcher.transfer.story import Resume, Teller


class Flight:
    """One object on its way. `end` it, however it goes; more than once does no harm.

    `done`: it ended well, or nothing can be kept, so who waited has nothing to wait for any more.
    """

    __slots__ = ("_name", "_under_way", "_waiting", "done", "ended")

    def __init__(self, name: str, under_way: dict[str, Flight]) -> None:
        self._name, self._under_way = name, under_way
        self._waiting: list[Landing] = []
        self.done = self.ended = False

    def end(self, *, done: bool = False) -> None:
        """Let all go on that wait for it."""
        if self.ended:
            return
        self.done, self.ended = done, True
        if self._under_way.get(self._name) is self:
            del self._under_way[self._name]
        for landing in self._waiting:
            landing.over()

    def add(self, landing: Landing) -> None:
        """Have `landing` told of the end."""
        self._waiting.append(landing)
        if self.ended:  # looked at behind it: a loop that failed is closed while another one begins
            landing.over()


class Landing:
    """Until a flight has ended; a `story.Wait`. `call` has something called in the loop's thread, later."""

    __slots__ = ("_call", "_flight", "_resume")

    def __init__(self, flight: Flight, call: Callable[[Callable[[], None]], None]) -> None:
        self._flight, self._call = flight, call
        self._resume: Resume | None = None

    def begin(self, _teller: Teller, resume: Resume) -> None:
        self._resume = resume
        self._flight.add(self)

    def cancel(self) -> None:
        self._resume = None

    def over(self) -> None:
        """The flight has ended. Whoever waited goes on in a turn of its own: this may be in the midst of a closing."""
        self._call(self._go_on)

    def _go_on(self) -> None:
        resume, self._resume = self._resume, None
        if resume is not None:
            resume(None, None)


class Flights:
    """All objects that are on their way, by the names that the cache has for them."""

    def __init__(self) -> None:
        self._under_way: dict[str, Flight] = {}

    def under_way(self, name: str) -> Flight | None:
        """The flight of that object, if there is one."""
        return self._under_way.get(name)

    def begin(self, name: str) -> Flight:
        """There is none, so begin it. An object without a name is nobody else's: nobody ever waits for it."""
        flight = Flight(name, self._under_way)
        if name:
            self._under_way[name] = flight
        return flight


#: Of a file that nobody waits for.
ALONE = Flights().begin("")
ALONE.end()
