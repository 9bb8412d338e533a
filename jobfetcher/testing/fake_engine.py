"""An engine in memory, for tests of what stands on `core.ports.Engine`: nothing is run, everything is scripted.

It passes the same contract tests as the real one (tests/contract/test_engine.py). Its "host paths" are plain paths of
this machine. Thread-safe.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from jobfetcher.core.errors import ConfigError, JobFault, JobfetcherError, JobReason, WorkerFault, WorkerReason
from jobfetcher.core.halt import Halt
from jobfetcher.core.job import JobId
from jobfetcher.core.ports import PullProgress, PullWaits
from jobfetcher.core.run import Exit, Image, RunSpec, Taken, Written


@dataclass(frozen=True, slots=True)
class Script:
    """What one container does: calls `acts` with the job directory, prints `prints`, and ends as `exit`.

    `held`: it runs until `FakeContainer.release`, `stop` or a removal. `ignores_term`: a `stop` takes its whole grace
    and ends it with 137, where others end at once with 143. `start_error`: it does not start. `written`: bytes that it
    writes to its own layer. `stuck`: not even KILL ends it.
    """

    exit: Exit = field(default_factory=lambda: Exit(0))
    prints: str = ""
    acts: Callable[[Path], None] | None = None
    held: bool = False
    ignores_term: bool = False
    start_error: JobfetcherError | None = None
    written: int = 0
    stuck: bool = False


class FakeContainer:
    """A container that runs a `Script`. Beyond `core.ports.Container`: `release`, and what people do: `remove_outside`
    and `paused`, which is theirs to set; `started` is what its engine says of it."""

    def __init__(self, engine: FakeEngine, spec: RunSpec, script: Script, created_at: float) -> None:
        self.spec = spec
        self.stopped_with: list[float] = []
        self.created_at = created_at
        self.paused = False
        self.started = False
        self._engine = engine
        self._script = script
        self._changed = threading.Condition()
        self._exit: Exit | None = None
        self._removed = False

    @property
    def id(self) -> str:
        return f"fake-{self.spec.name}"

    def wait(self, timeout_s: float) -> Exit | None:
        self._engine.answer()
        if not self.started:
            return Exit(0, genuine=False)
        with self._changed:
            self._changed.wait_for(lambda: self._exit is not None or self._removed, timeout_s)
            self._check_there()
            return self._exit

    def is_paused(self) -> bool:
        self._engine.answer()
        with self._changed:
            self._check_there()
            return self.paused

    def written(self) -> Written:
        self._engine.answer()
        with self._changed:
            self._check_there()
            return Written(engine=Taken(self._script.written, 0))

    def stop(self, grace_s: float) -> None:
        self._engine.answer()
        with self._changed:
            if self._exit is not None or self._removed:
                return
            self.stopped_with.append(grace_s)
            if self._script.stuck:
                raise WorkerFault(WorkerReason.ENGINE, f"the container {self.spec.name} was told to end and still runs")
            if self._script.ignores_term:
                self._changed.wait_for(lambda: self._exit is not None or self._removed, grace_s)
        self._end(Exit(137 if self._script.ignores_term else 143))

    def save_logs(self, path: Path) -> None:
        self._engine.answer()
        path.write_text("" if self._removed else self._script.prints)

    def last_lines(self, count: int) -> str:
        self._engine.answer()
        return "" if self._removed else "\n".join(self._script.prints.splitlines()[-count:])

    def remove(self) -> None:
        self._engine.answer()
        self._engine.forget(self)
        with self._changed:
            self._removed = True
            self._changed.notify_all()

    def release(self, end: Exit | None = None) -> None:
        """Let a held container end: as its script says, or as `end`."""
        self._end(end or self._script.exit)

    def remove_outside(self) -> None:
        """What `docker rm -f` by a person does."""
        self.remove()

    def run(self) -> None:
        """What the engine calls once, at the start."""
        self.started = True
        if self._script.acts is not None:
            self._script.acts(Path(self.spec.files_host_path))
        if not self._script.held:
            self._end(self._script.exit)

    def _check_there(self) -> None:
        if self._removed:
            raise JobFault(JobReason.REMOVED_OUTSIDE, "container removed from outside")

    def _end(self, end: Exit) -> None:
        with self._changed:
            if self._exit is None:
                self._exit = end
                self._changed.notify_all()


class FakeEngine:
    """An engine whose containers do what `script(spec)` says.

    `images`: what `prepare` answers, by reference; None: every reference is an image, pulled the first time. `specs`,
    `prepared`, `owned` and `forgotten` record what was asked; `here` are the images on the machine, by id, and their
    names. While `fault` is set, every call raises it (an engine that is away). `proved` are the specs of boxes of the
    worker's own, and `unfit(spec)` says what is wrong with one. `pull_waits`: what each pull has to wait for first,
    and `pull_stalls`: whether it then waits until the halt is set or this is not so any more.
    `clock`: in seconds, for ages.
    """

    def __init__(
        self,
        script: Callable[[RunSpec], Script] | None = None,
        images: Mapping[str, Image | JobfetcherError] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.specs: list[RunSpec] = []
        self.prepared: list[str] = []
        self.owned: list[str] = []
        self.forgotten: list[tuple[str, str]] = []
        self.here: dict[str, set[str]] = {}
        self.fault: JobfetcherError | None = None
        self.proved: list[RunSpec] = []
        self.pull_waits: list[tuple[str, float]] = []
        self.pull_stalls = False
        self.unfit: Callable[[RunSpec], JobfetcherError | None] = lambda spec: None  # noqa: ARG005 - all is well
        self._clock = clock
        self._script = script
        self._images = images
        self._lock = threading.Lock()
        self._containers: dict[str, FakeContainer] = {}

    @property
    def containers(self) -> list[FakeContainer]:
        """All that were started and not removed, oldest first."""
        with self._lock:
            return list(self._containers.values())

    def check(self) -> None:
        """Raise `fault`, if one is set."""
        if self.fault is not None:
            raise self.fault

    def answer(self) -> None:
        """What every other call does first: the same, but only `check` and `prepare` find a setup wrong."""
        if isinstance(self.fault, ConfigError):
            raise WorkerFault(WorkerReason.ENGINE, str(self.fault))
        self.check()

    def forget(self, container: FakeContainer) -> None:
        """For FakeContainer.remove: it is not listed any more."""
        with self._lock:
            if self._containers.get(container.spec.name) is container:
                del self._containers[container.spec.name]

    def prepare(self, reference: str, halt: Halt, progress: PullProgress, waits: PullWaits | None = None) -> Image:
        self.check()
        if waits is not None:
            for why, for_s in self.pull_waits:
                waits(why, for_s)
        while self.pull_stalls and not halt.wait(0.05):
            pass
        halt.check()
        with self._lock:
            self.prepared.append(reference)
        found = self._known(reference)
        if isinstance(found, JobfetcherError):
            raise found
        progress(found.size_bytes, found.size_bytes)
        with self._lock:
            first = found.id not in self.here
            self.here.setdefault(found.id, {reference})
        return replace(found, pulled=first) if self._images is None else found

    def _known(self, reference: str) -> Image | JobfetcherError:
        if self._images is None:
            digest = hashlib.sha256(reference.encode()).hexdigest()
            return Image(f"sha256:{digest}", reference, f"{reference}@sha256:{digest}", "amd64", size_bytes=1)
        missing = JobFault(JobReason.IMAGE_MISSING, f"the registry does not have image {reference}")
        return self._images.get(reference, missing)

    def start(self, spec: RunSpec, before_start: Callable[[str], None] | None = None) -> FakeContainer:
        self.answer()
        script = self._script(spec) if self._script else Script()
        with self._lock:
            if adopted := self._containers.get(spec.name):
                if dict(adopted.spec.labels) != dict(spec.labels):
                    raise WorkerFault(WorkerReason.ENGINE, f"a container named {spec.name} exists and is not ours")
                container = adopted
            else:
                self.specs.append(spec)
                if script.start_error is not None:
                    raise script.start_error
                container = self._containers[spec.name] = FakeContainer(self, spec, script, self._clock())
        if before_start is not None:
            try:
                before_start(container.id)
            except Exception:
                container.remove()
                raise
        if not container.started:
            container.run()
        return container

    def prove(self, spec: RunSpec, folder: Path) -> bool:
        self.answer()
        with self._lock:
            self.proved.append(spec)
        if not Path(spec.files_host_path).samefile(folder):
            raise WorkerFault(WorkerReason.DISK, f"a file that the worker writes to {folder} is not seen in containers")
        if (wrong := self.unfit(spec)) is not None:
            raise wrong
        return True

    def find(self, job_id: JobId) -> FakeContainer | None:
        self.answer()
        ours = [container for container in self.containers if container.spec.job_id == job_id]
        return ours[-1] if ours else None

    def reap(self, known: frozenset[JobId], *, older_than_s: float = 0.0) -> list[str]:
        self.answer()
        born = self._clock() - older_than_s
        strays = [one for one in self.containers if one.spec.job_id not in known and one.created_at <= born]
        for container in strays:
            container.remove()
        return [container.spec.name for container in strays]

    def forget_image(self, image_id: str, reference: str) -> bool:
        self.answer()
        with self._lock:
            used = any(container.spec.image_id == image_id for container in self._containers.values())
            if used or self.here.get(image_id, set()) - {reference}:
                return False
            self.here.pop(image_id, None)
            self.forgotten.append((image_id, reference))
            return True

    def own(self, host_path: str) -> None:
        self.answer()
        with self._lock:
            self.owned.append(host_path)
