"""Making room: leftovers of jobs, and images that this worker pulled and that nobody needs any more.

Used by the worker: `tidy` every few minutes, `make_room` when a disk is too full to take a job (FAULTS.md D1, D7). Only
what the journal says that this worker made is ever removed, one thing at a time: no prune, nothing forced. What the
engine still uses, or what somebody gave a name of their own, it keeps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

from jobfetcher.core.errors import WorkerFault
from jobfetcher.core.job import JobId
from jobfetcher.core.ports import Emit, Engine
from jobfetcher.journal import Journal, KeptImage
from jobfetcher.workspace import Base

#: IMAGE_KEEP: how long an image is kept that no job uses, in seconds.
DEFAULT_KEEP_S = 7 * 86_400.0

#: Above the first, images go, the least recently used first, until the disk is no fuller than the second.
_CROWDED, _ROOMY = 0.85, 0.80

#: An image that a job used a moment ago may be wanted by the next one; so long it is left alone in any case.
_JUST_USED_S = 600.0

_DAY_S, _MIB = 86_400.0, 1024**2


class Housekeeper:
    """Removes what is not needed. For one thread, the one that takes jobs: none is claimed while it works.

    `clock` is the wall clock, by which the journal remembers when an image was used. `emit` hears `image_removed`,
    `leftover_removed`, and once per change `tidy_failed`.
    """

    def __init__(
        self,
        engine: Engine,
        base: Base,
        journal: Journal,
        emit: Emit,
        *,
        keep_s: float = DEFAULT_KEEP_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._engine = engine
        self._base = base
        self._journal = journal
        self._emit = emit
        self._keep_s = keep_s
        self._clock = clock
        self._told: set[str] = set()

    def tidy(self) -> None:
        """Remove images that no job used for `keep_s`, and on a crowded disk those that were used longest ago."""
        try:
            crowded = self._base.fullness() > _CROWDED
            for image, unused_s in self._idle_images():
                if unused_s <= self._keep_s and not (crowded and self._base.fullness() > _ROOMY):
                    break  # the following ones were used later
                self._remove_image(image, unused_s)
        except WorkerFault as fault:
            self._fail(str(fault))
        else:
            self._told.clear()

    def check_room(self) -> None:
        """Raise WorkerFault(DISK) while there is no room for another job, even after all has gone that may go; what
        this worker may not delete is named then."""
        try:
            self._base.check_room()
        except WorkerFault as fault:
            if not self.make_room():
                if left := self._base.left.words():
                    raise WorkerFault(fault.reason, f"{fault}; {left}") from fault
                raise
            self._base.check_room()  # what is promised to jobs is not for it to see

    def make_room(self) -> bool:
        """Remove leftovers, and then idle images, until there is room; whether there is."""
        if not self._base.is_full():
            return True
        try:
            self._remove_leftovers()
            for image, unused_s in self._idle_images():
                if not self._base.is_full():
                    break
                self._remove_image(image, unused_s)
        except (WorkerFault, OSError) as fault:
            self._fail(str(fault))
        return not self._base.is_full()

    def _idle_images(self) -> Iterator[tuple[KeptImage, float]]:
        """Images that this worker pulled and no open job runs, longest unused first, and for how long in seconds.

        A job whose image is not on record yet has brought it since it was claimed, and may run it hours later: when its
        inputs are here and it is its turn.
        """
        records = self._journal.records()
        running = {record.image.id for record in records if record.image is not None}
        claimed_at = min((record.claimed_at for record in records if record.image is None), default=math.inf)
        now = self._clock()
        for image in self._journal.images():
            unused_s = now - image.used_at
            if image.id not in running and unused_s > _JUST_USED_S and image.used_at < claimed_at:
                yield image, unused_s

    def _remove_image(self, image: KeptImage, unused_s: float) -> None:
        with self._base.making_room():
            is_gone = self._engine.forget_image(image.id, image.reference)
        if not is_gone:
            return  # a container has it, or somebody gave it another name; asked again next time
        self._journal.dropped_image(image)
        self._emit(
            "image_removed",
            message=f"removed the image {image.reference} ({image.size_bytes / _MIB:.0f} MiB), "
            f"unused for {unused_s / _DAY_S:.1f} days",
        )

    def _remove_leftovers(self) -> None:
        """Directories and containers of jobs that are not open."""
        found = self._base.leftovers(frozenset())  # before the journal is asked: whatever is claimed later is not in it
        known = frozenset(record.id for record in self._journal.records()) | {
            JobId(name) for name in self._journal.unreadable
        }
        try:
            for name in self._engine.reap(known):
                self._emit("leftover_removed", level="warning", message=f"removed the leftover container {name}")
        except WorkerFault as fault:
            self._fail(str(fault))
        for name in found:
            # Where the journal lost rows, a directory nobody knows may hold the outputs of one of them.
            if name in known or self._journal.damage or name in self._journal.unreadable:
                continue
            try:
                self._base.remove(name)
            except (OSError, WorkerFault) as error:
                self._fail(f"leftover {name} cannot be deleted: {error}")
            else:
                self._emit("leftover_removed", level="warning", message=f"removed the leftover directory {name}")

    def _fail(self, why: str) -> None:
        if why not in self._told:
            self._told.add(why)
            self._emit("tidy_failed", level="warning", message=f"could not make room: {why}")
