"""Who holds how much of this machine: inventory -> offer -> reservation, and an event when something gets free.

Used by the worker (offer, reserve, wait) and the runner (release at container exit). Does no I/O of its own: what
changes from outside comes from the two probes it is given. Thread-safe. It promises that the shares held at one time
never add up to more than the machine less its reserve, and that no GPU is held twice.

    free = inventory - reserve - memory that other programs use - shares held

Memory of others is read only while nothing is held, and that last idle reading is kept while jobs run: what a running
job really uses is part of its share and must not be counted twice. Until the first idle moment of a process that came
back to running jobs, those are taken to use all that they hold.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from jobfetcher.core.errors import WorkerFault, WorkerReason
from jobfetcher.core.job import Needs
from jobfetcher.core.machine import Gpu, Inventory, Offer, Share, whole_cores

#: Less than this is not worth offering: half a core is the least that is advertised as one (core.machine.whole_cores),
#: and in 64 MiB hardly an interpreter starts.
_LEAST_CORES, _LEAST_MEMORY_MIB = 0.5, 64

#: RESERVE_CPUS: heartbeats and transfers of the worker, next to jobs that use every core they have.
DEFAULT_RESERVE_CPUS = 0.1


def default_reserve_memory_mib(total_mib: int) -> int:
    """RESERVE_MEMORY where it is not set: 5 % for the page cache of transfers, and never less than 512 MiB."""
    return max(512, total_mib // 20)


def auto_slots(inventory: Inventory) -> int:
    """MAX_JOBS=auto: one job per GPU, or one on a machine without."""
    return max(1, len(inventory.gpus))


@dataclass(frozen=True, eq=False)
class Reservation:
    """The right to use `share` until `release`, which is idempotent and safe from any thread; also a `with` block."""

    share: Share
    _give_back: Callable[[Reservation], None]

    def release(self) -> None:
        self._give_back(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


class Budget:
    """The machine's accounts. `slots`: how many jobs may run at once (MAX_JOBS).

    The probes are called by `offer` only, outside the lock: `memory_in_use_mib` as said above, `read_gpus` for the GPUs
    that are there now and what is free on them. `reserve_memory_mib` None: see `default_reserve_memory_mib`.
    """

    def __init__(
        self,
        inventory: Inventory,
        *,
        slots: int,
        memory_in_use_mib: Callable[[], int],
        read_gpus: Callable[[], Sequence[Gpu]],
        reserve_cpus: float = DEFAULT_RESERVE_CPUS,
        reserve_memory_mib: int | None = None,
    ) -> None:
        if reserve_memory_mib is None:
            reserve_memory_mib = default_reserve_memory_mib(inventory.memory_mib)
        self.slots = slots
        self._cores = max(0.0, inventory.cpu_cores - reserve_cpus)
        self._memory_mib = max(0, inventory.memory_mib - reserve_memory_mib)
        self._gpus = tuple(inventory.gpus)
        self._others_mib = 0
        self._seen_idle = False
        self._probe_memory = memory_in_use_mib
        self._probe_gpus = read_gpus
        self._held: set[Reservation] = set()
        self._lock = threading.Lock()
        # The one queue whose put() may be called from a signal handler (queue.SimpleQueue: "reentrant"). An Event's
        # set() may not: it can meet the lock that the interrupted thread holds.
        self._changes: queue.SimpleQueue[None] = queue.SimpleQueue()

    def offer(self) -> Offer | None:
        """What a job could have now; None while all slots are taken or too little is free to be of use."""
        with self._lock:
            probing = not (self._held and self._seen_idle)
            if len(self._held) >= self.slots:
                return None
        gpus = tuple(self._probe_gpus())
        in_use_mib = self._probe_memory() if probing else None
        with self._lock:
            self._gpus = gpus
            if in_use_mib is not None and not (self._held and self._seen_idle):
                self._seen_idle = not self._held
                self._others_mib = max(0, in_use_mib - sum(one.share.memory_mib for one in self._held))
            free = self._free()
            if len(self._held) >= self.slots or not _useful(free):
                return None
            return free

    def free(self) -> Offer:
        """What is free by the last readings, useful or not: for people and messages."""
        with self._lock:
            return self._free()

    def reserve(self, needs: Needs) -> Reservation:
        """Hold what `needs` asks for, and an equal share of the machine of what it does not name.

        Of a machine with n slots a share is 1/n of all that jobs may have, at most what is free. Raises
        WorkerFault(DOES_NOT_FIT) naming what was asked for and what is free.
        """
        with self._lock:
            if len(self._held) >= self.slots:
                raise _does_not_fit(f"all {self.slots} job slots are taken")
            free = self._free()
            share = Share(self._take_cores(needs, free), self._take_memory(needs, free), self._take_gpus(needs, free))
            reservation = Reservation(share, self._release)
            self._held.add(reservation)
            return reservation

    def hold(self, share: Share) -> Reservation:
        """Hold exactly `share`, free or not: a container that an earlier process started has it already."""
        reservation = Reservation(share, self._release)
        with self._lock:
            self._held.add(reservation)
        return reservation

    def wait_for_change(self, timeout_s: float) -> bool:
        """Wait until something was released or `wake` was called since the last wait; False after `timeout_s`."""
        try:
            self._changes.get(timeout=max(0.0, timeout_s))
        except queue.Empty:
            return False
        with contextlib.suppress(queue.Empty):  # several changes end one wait
            while True:
                self._changes.get_nowait()
        return True

    def wake(self) -> None:
        """End the wait for another reason. Safe in a signal handler."""
        self._changes.put(None)

    def _release(self, reservation: Reservation) -> None:
        with self._lock:
            if reservation not in self._held:
                return
            self._held.remove(reservation)
        self._changes.put(None)

    def _free(self) -> Offer:
        shares = [reservation.share for reservation in self._held]
        taken = {gpu.uuid for share in shares for gpu in share.gpus}
        return Offer(
            cpu_cores=max(0.0, self._cores - sum(share.cpu_cores for share in shares)),
            memory_mib=max(0, self._for_jobs_mib() - sum(share.memory_mib for share in shares)),
            gpus=tuple(gpu for gpu in self._gpus if gpu.uuid not in taken),
        )

    def _for_jobs_mib(self) -> int:
        return max(0, self._memory_mib - self._others_mib)

    def _take_cores(self, needs: Needs, free: Offer) -> float:
        if needs.cpu_cores is None:
            if free.cpu_cores < _LEAST_CORES:
                raise _does_not_fit(f"the job needs a CPU core; {free.cpu_cores:.2g} are free")
            return min(self._cores / self.slots, free.cpu_cores)
        # A server was told whole cores, so a job for 2 fits into 1.9, and is limited to 1.9.
        if needs.cpu_cores > max(free.cpu_cores, whole_cores(free.cpu_cores)):
            raise _does_not_fit(f"the job asks for {needs.cpu_cores:g} CPU cores; {free.cpu_cores:.3g} are free")
        return min(needs.cpu_cores, free.cpu_cores)

    def _take_memory(self, needs: Needs, free: Offer) -> int:
        if needs.memory_mib is None:
            if free.memory_mib < _LEAST_MEMORY_MIB:
                raise _does_not_fit(f"the job needs memory; {free.memory_mib} MiB are free")
            return min(max(_LEAST_MEMORY_MIB, self._for_jobs_mib() // self.slots), free.memory_mib)
        if needs.memory_mib > free.memory_mib:
            raise _does_not_fit(f"the job asks for {needs.memory_mib} MiB of memory; {free.memory_mib} MiB are free")
        return needs.memory_mib

    def _take_gpus(self, needs: Needs, free: Offer) -> tuple[Gpu, ...]:
        # the smallest that fits, so that the large ones stay for those who need them; then by UUID, to be repeatable
        candidates = sorted(free.gpus, key=lambda gpu: (gpu.memory_mib, gpu.uuid))
        if needs.gpu is False:
            return ()
        if needs.gpu is None:
            return tuple(candidates[: max(1, len(self._gpus) // self.slots)])
        for gpu in candidates:
            if _suits(gpu, needs):
                return (gpu,)
        raise _does_not_fit(f"the job asks for {_asked_gpu(needs)}; {_named(candidates)}")


def _useful(free: Offer) -> bool:
    return free.cpu_cores >= _LEAST_CORES and free.memory_mib >= _LEAST_MEMORY_MIB


def _suits(gpu: Gpu, needs: Needs) -> bool:
    """PROTOCOL.md S18: model and architecture by equality, memory by "at most"; what is not asked suits anyone."""
    return (
        needs.gpu_model in (None, "", gpu.model)
        and needs.gpu_archi in (None, "", gpu.archi)
        and (needs.gpu_mem_mib or 0) <= gpu.memory_mib
    )


def _asked_gpu(needs: Needs) -> str:
    words = ["a GPU"]
    if needs.gpu_model:
        words.append(f"of model {needs.gpu_model!r}")
    if needs.gpu_archi:
        words.append(f"of compute capability {needs.gpu_archi!r}")
    if needs.gpu_mem_mib:
        words.append(f"with {needs.gpu_mem_mib} MiB")
    return " ".join(words)


def _named(gpus: Sequence[Gpu]) -> str:
    if not gpus:
        return "no GPU is free"
    return "free: " + ", ".join(f"{gpu.model} ({gpu.archi}, {gpu.memory_mib} MiB)" for gpu in gpus)


def _does_not_fit(what: str) -> WorkerFault:
    return WorkerFault(WorkerReason.DOES_NOT_FIT, f"{what} on this machine")
