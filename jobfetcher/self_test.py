"""This machine shows that it can run a job before it takes one, and again whenever there is reason to doubt it.

Used by the worker before it asks for a job, and by the runner's question after a failed job that held a GPU. What is
run is one box of the worker's own, made as a job's is (`Engine.prove`), first with all GPUs at once, and only where
that fails without any and with each in turn. So a sound machine is tested in well below a second.

It is tested at the start, every ten minutes while no job is in hand, after each job that this machine failed by its
engine, its disk or a GPU, and after five jobs in a row that ended badly (FAULTS.md T23; `pace` counts them). While it
fails, no job is taken: an account never gets a job again that it gave back (PROTOCOL.md S3), so a machine that takes
jobs to see whether it can run them eats them.

A GPU that cannot be given to a box, or that does not answer inside one though the driver lists it (FAULTS.md E14), is
set aside with its reason and comes back when it passes. The others, and jobs that need none, go on. Inside a box it is
asked by NVIDIA's own program, on an image that a failed job had: only such an image has the C library it needs.

But an image can make that program fail, by libraries of its own, and one image must not take a GPU away from all. So it
is asked in the image too in which it answered last, whose word counts more; where there is none, what one image says
gives the job back, and only the second one sets the GPU aside. It comes back when it answers in any of these images,
and without any that ever answered it is tried again after half an hour.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from jobfetcher import tree
from jobfetcher.core.errors import ConfigError, WorkerFault, WorkerReason
from jobfetcher.core.machine import Gpu
from jobfetcher.core.ports import Engine
from jobfetcher.core.run import RunSpec
from jobfetcher.pinned import shown

#: An idle machine is tested this often, and a GPU that is set aside, in seconds.
IDLE_S, GPU_S = 600.0, 120.0

#: A GPU that is set aside by the word of jobs' images alone is tried with another job after so many seconds.
RETRY_S = 1800.0

#: Why a job was given back that makes this machine doubtful: its engine, its disk or a GPU did not do their part.
DOUBTFUL = frozenset({WorkerReason.ENGINE, WorkerReason.DISK, WorkerReason.GPU})

#: The directory below PATH_BASE that the box gets instead of a job's.
FOLDER = "proof"


class Gpus(Protocol):
    """The GPUs of this machine: `resources.detect.GpuProbe`."""

    def every(self) -> Sequence[Gpu]:
        """All that answer the driver, also those that are set aside."""
        ...

    def is_aside(self, gpu: Gpu) -> bool: ...

    def set_aside(self, gpu: Gpu, why: str) -> None:
        """No job gets it from now on."""
        ...

    def take_back(self, gpu: Gpu) -> None: ...


class SelfTest:
    """Tests this machine when that is due. `check` is for the main thread; `ask` and `lost` are for any.

    `make_spec` makes a box's specification from the GPUs that it gets; `base` is PATH_BASE, where the box's directory
    is made for each test and removed after it.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        make_spec: Callable[[Sequence[Gpu]], RunSpec],
        base: Path,
        gpus: Gpus,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._make_spec = make_spec
        self._base = base
        self._gpus = gpus
        self._clock = clock
        self._lock = threading.Lock()  # one test at a time: they share a directory
        self._asked = True
        self._tested_at = self._gpus_tested_at = clock()
        #: The image in which NVIDIA's program answered last; and those in which it did not, by the UUID of a GPU that
        #: could be given to a box all the same, and since when.
        self._image = ""
        self._failed_in: dict[str, set[str]] = {}
        self._failed_since: dict[str, float] = {}

    def ask(self) -> None:
        """Test before the next job is taken."""
        self._asked = True

    def check(self, *, busy: bool, asked: bool = False) -> bool:
        """Test this machine if that is due; whether it was, and passed. `busy`: jobs are in hand; `asked`: see `ask`.

        Raises ConfigError naming a setting that is wrong, or WorkerFault saying why no job could run here. It is due
        again then.
        """
        now = self._clock()
        if asked or self._asked or (not busy and now - self._tested_at >= IDLE_S):
            self._asked = False  # first: who asks during the test does not ask in vain
            try:
                with self._lock, self._folder() as folder:
                    self._test(folder)
            except BaseException:
                self._asked = True
                raise
            self._tested_at = self._gpus_tested_at = self._clock()
            return True
        if now - self._gpus_tested_at >= GPU_S:
            self._gpus_tested_at = now
            aside = [gpu for gpu in self._gpus.every() if self._gpus.is_aside(gpu)]
            if aside:
                with self._lock, self._folder() as folder:
                    self._test_each(aside, folder)
        return False

    def lost(self, gpus: Sequence[Gpu], image_id: str) -> str:
        """What is wrong with GPUs that a failed job held, in one sentence; nothing where they work in a new box.

        `image_id`: that of the job. A GPU that does not work is set aside. Never raises.
        """
        if not gpus:
            return ""
        try:
            with self._lock, self._folder() as folder:
                found = [(gpu, why) for gpu in gpus if (why := self._judge(gpu, folder, image_id))]
                return "; ".join(
                    f"GPU {gpu.model} ({gpu.uuid}) does not work in a container: {why}" for gpu, why in found
                )
        except (WorkerFault, ConfigError) as error:
            self.ask()
            return str(error)

    def _judge(self, gpu: Gpu, folder: Path, image_id: str) -> str:
        """What is wrong with a GPU, if its box or its job's image is to be believed. Raises what `prove` raises where
        boxes do not work without a GPU either: then it is not the GPU that is broken."""
        if why := self._why((gpu,), folder):
            self._engine.prove(self._make_spec(()), folder)
            self._gpus.set_aside(gpu, why)
            return why
        before, (_, why) = self._image, self._ask_in(image_id, (gpu,), folder)
        if not why:
            return ""
        failed_in = {image_id}
        if before and before != image_id:
            answers, said = self._ask_in(before, (gpu,), folder)
            if answers:
                return ""  # the GPU works, and that job's image is broken
            if said:  # else it is gone, and tells nothing
                failed_in.add(before)
        self._failed_since.setdefault(gpu.uuid, self._clock())
        failed_in |= self._failed_in.get(gpu.uuid, set())
        self._failed_in[gpu.uuid] = failed_in
        if before in failed_in or len(failed_in) > 1:
            self._gpus.set_aside(gpu, why)
        return why

    def _test(self, folder: Path) -> None:
        gpus = self._gpus.every()
        if gpus and not self._why(gpus, folder, self._image):
            for gpu in gpus:
                if gpu.uuid not in self._failed_in:
                    self._gpus.take_back(gpu)
            self._test_each([gpu for gpu in gpus if self._gpus.is_aside(gpu)], folder)
            return
        self._engine.prove(self._make_spec(()), folder)
        self._test_each(gpus, folder)

    def _test_each(self, gpus: Sequence[Gpu], folder: Path) -> None:
        for gpu in gpus:
            if why := self._why((gpu,), folder):
                self._gpus.set_aside(gpu, why)
            elif self._works_inside(gpu, folder):
                self._failed_in.pop(gpu.uuid, None)
                self._failed_since.pop(gpu.uuid, None)
                self._gpus.take_back(gpu)

    def _works_inside(self, gpu: Gpu, folder: Path) -> bool:
        """Whether a GPU that can be given to a box works there as well, as far as any image tells."""
        if gpu.uuid not in self._failed_in:
            if self._image and (why := self._ask_in(self._image, (gpu,), folder)[1]):
                self._failed_in[gpu.uuid], self._failed_since[gpu.uuid] = {self._image}, self._clock()
                self._gpus.set_aside(gpu, why)
                return False
            return True
        images = sorted(self._failed_in[gpu.uuid] | ({self._image} if self._image else set()))
        if any(self._ask_in(image_id, (gpu,), folder)[0] for image_id in images):
            return True
        is_believed = self._image in self._failed_in[gpu.uuid]
        return not is_believed and self._clock() - self._failed_since[gpu.uuid] >= RETRY_S

    def _why(self, gpus: Sequence[Gpu], folder: Path, image_id: str = "") -> str:
        """Why boxes with these GPUs do not work; nothing where they do, or where this image cannot tell."""
        try:
            self._engine.prove(self._make_spec(gpus), folder)
        except (WorkerFault, ConfigError) as error:
            return str(error)
        return self._ask_in(image_id, gpus, folder)[1] if image_id else ""

    def _ask_in(self, image_id: str, gpus: Sequence[Gpu], folder: Path) -> tuple[bool, str]:
        """Whether NVIDIA's program answers well in a box of this image, which is kept in mind then; and what it says
        else: nothing where it cannot be run there."""
        try:
            answers = self._engine.prove(replace(self._make_spec(gpus), image_id=image_id), folder)
        except (WorkerFault, ConfigError) as error:
            return False, str(error)
        if answers:
            self._image = image_id
        return answers, ""

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        """The box's directory, empty, as a job's is made; what a killed process left there goes first."""
        folder = self._base / FOLDER
        try:
            if folder.exists():
                tree.remove(self._base, FOLDER)
            folder.mkdir(mode=0o700)
            folder.chmod(0o777)  # PATH_BASE is 0700
        except OSError as error:
            raise WorkerFault(WorkerReason.DISK, f"{shown(folder)} cannot be made: {error.strerror}") from error
        try:
            yield folder
        finally:
            try:
                tree.remove(self._base, FOLDER)
            except OSError as error:
                raise WorkerFault(WorkerReason.DISK, f"{shown(folder)} cannot be removed: {error.strerror}") from error
