"""The clock of one other process, which a test turns: A TEST TOOL, and no part of the product.

`shim` compiles `clock_shim.c`; a process that is started with `Clock.env()` has it preloaded, and from then on its
clocks say what the test wants, and its waits end by them:

    with shim(tmp_path) as clock, command(["run"], {**env, **clock.env()}, tmp_path):
        clock.rate(1000)          # a second is a thousand seconds there
        clock.jump_realtime(-3600)  # the wall clock is set back
        clock.suspend(400)        # the machine was asleep: only CLOCK_BOOTTIME and the wall clock count it
        clock.skip(400)           # so much time went by while the process did nothing (SIGSTOP): all clocks count it

What a process *does* takes as long as ever: at a rate of 1000 an HTTP call of 5 ms takes 5 s there. So a test turns the
rate up only while the process has nothing to do but wait.
"""

import mmap
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.services import require_program

_NS = 1_000_000_000

#: `control_t` of clock_shim.c: version; sleeping; base, mono, boot_ahead, wall_ahead, rate.
_VERSION, _SLEEPING, _BODY = struct.Struct("=Q"), struct.Struct("=q"), struct.Struct("=qqqqd")


class Clock:
    """The clocks of the processes that run with `env`. Times in seconds. For one thread."""

    def __init__(self, library: Path, control: Path, mapped: mmap.mmap) -> None:
        self._library, self._control, self._mapped = library, control, mapped
        self._version = 0
        self._base = self._mono = time.monotonic_ns()
        self._boot_ahead = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - self._base
        self._wall_ahead = time.time_ns() - self._base
        self._rate = 1.0
        self._write()

    def env(self) -> dict[str, str]:
        """The environment that gives a new process this clock."""
        return {"LD_PRELOAD": str(self._library), "JF_CLOCK": str(self._control)}

    def now(self) -> float:
        """What `time.monotonic()` says there."""
        return self._now() / _NS

    @property
    def sleeping(self) -> int:
        """How many threads there are asleep: in `time.sleep`, as opposed to waiting for something."""
        return int(_SLEEPING.unpack_from(self._mapped, _VERSION.size)[0])

    def rate(self, factor: float) -> None:
        """From now on time passes there `factor` times as fast as here. No clock jumps."""
        self._turn()
        self._rate = factor
        self._write()

    def jump_realtime(self, seconds: float) -> None:
        """Somebody sets the wall clock, ahead or back."""
        self._wall_ahead += int(seconds * _NS)
        self._write()

    def suspend(self, seconds: float) -> None:
        """The machine was asleep for so long: CLOCK_MONOTONIC does not count it, CLOCK_BOOTTIME does."""
        self._boot_ahead += int(seconds * _NS)
        self._wall_ahead += int(seconds * _NS)
        self._write()

    def skip(self, seconds: float) -> None:
        """So much time went by on all clocks."""
        self._turn()
        self._mono += int(seconds * _NS)
        self._write()

    def run(self, seconds: float, factor: float, step: Callable[[], None] = lambda: None) -> None:
        """Let `seconds` pass there at that rate, then go on as slowly as here; `step` is called meanwhile."""
        ends_at = self.now() + seconds
        self.rate(factor)
        try:
            while (left := ends_at - self.now()) > 0:
                step()
                time.sleep(min(0.02, left / factor))
        finally:
            self.rate(1.0)

    def _now(self) -> int:
        return self._mono + int((time.monotonic_ns() - self._base) * self._rate)

    def _turn(self) -> None:
        """Count from now on, so that a new rate does not change what has passed."""
        now = time.monotonic_ns()
        self._mono += int((now - self._base) * self._rate)
        self._base = now

    def _write(self) -> None:
        """The version is odd meanwhile: a reader then waits, and reads again when it changed."""
        _VERSION.pack_into(self._mapped, 0, self._version + 1)
        values = (self._base, self._mono, self._boot_ahead, self._wall_ahead, self._rate)
        _BODY.pack_into(self._mapped, _VERSION.size + _SLEEPING.size, *values)
        self._version += 2
        _VERSION.pack_into(self._mapped, 0, self._version)


@contextmanager
def shim(directory: Path) -> Iterator[Clock]:
    """Compile the shim into `directory` with gcc, and make a clock that says what this process's clocks say."""
    gcc = require_program("gcc", "gcc")
    library, control = directory / "clock_shim.so", directory / "clock"
    source = Path(__file__).with_name("clock_shim.c")
    command = [gcc, "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-O2", "-o", str(library), str(source), "-ldl"]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode:
        raise AssertionError(f"the clock shim does not compile:\n{built.stderr}")
    control.write_bytes(bytes(_VERSION.size + _SLEEPING.size + _BODY.size))
    with control.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        yield Clock(library, control, mapped)
