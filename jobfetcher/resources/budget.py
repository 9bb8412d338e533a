"""Who holds how much of this machine: inventory -> offer -> reservation, and an event when something gets free.

Used by the worker (offer, reserve, wait) and the runner (release at container exit). Does no I/O of its own: what
changes from outside comes from the two probes it is given. Thread-safe. It promises that the shares held at one time
never add up to more than the machine less its reserve, and that no GPU is held twice.

    free = inventory - reserve - memory that other programs use - shares held

With `prefetch`, jobs may be taken whose turn comes when a running one ends: they queue, first come, first served, and
while one queues nothing is taken past it, so a large job is never starved by small ones. What is offered for such a job
is what will be free when the job that computes longest has ended.

Memory of others is read only while nothing is held (with a queue that never runs dry: when the next in it gets its
share), and that last idle reading is kept while jobs run: what a running job really uses is part of its share and must
not be counted twice. Until the first idle moment of a process that came back to running jobs, those are taken to use
all that they hold.
"""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from jobfetcher.core.errors import ConfigError, Stopped, StopReason, WorkerFault, WorkerReason
from jobfetcher.core.halt import Halt
from jobfetcher.core.job import Needs
from jobfetcher.core.machine import Gpu, Inventory, Offer, Share, whole_cores

#: Less than this is not worth offering: half a core is the least that is advertised as one (core.machine.whole_cores),
#: and in 64 MiB hardly an interpreter starts.
_LEAST_CORES, _LEAST_MEMORY_MIB = 0.5, 64

#: Where MAX_JOBS makes an equal share smaller than that, the share is worth it: its owner said so. An engine takes no
#: less than 0.01 (`docker run --cpus`); with five times that a job of a shell still ends.
_LEAST_SHARE = 0.05

#: RESERVE_CPUS: heartbeats and transfers of the worker, next to jobs that use every core they have.
DEFAULT_RESERVE_CPUS = 0.1


def default_reserve_memory_mib(total_mib: int) -> int:
    """RESERVE_MEMORY where it is not set: 5 % for the page cache of transfers, and never less than 512 MiB."""
    return max(512, total_mib // 20)


def auto_slots(inventory: Inventory, *, gpu_unasked: bool = True) -> int:
    """MAX_JOBS=auto: one job per GPU, or one on a machine without.

    Where GPUs are for those who ask (GPU_UNASKED=none), one more for jobs that need none. Not else: a server matches
    jobs that say nothing of GPUs with every offer (PROTOCOL.md S18), so that slot would draw, while the GPUs compute,
    the very jobs that count on one without asking.
    """
    return max(1, len(inventory.gpus) + (not gpu_unasked and bool(inventory.gpus)))


def check_shares(inventory: Inventory, slots: int, reserve_cpus: float, reserve_memory_mib: int | None) -> str:
    """A remark where MAX_JOBS leaves each job less than a core; nothing else. Raises ConfigError, naming the setting,
    where no job would ever be taken, because nothing is left for it."""
    cores, memory_mib = inventory.cpu_cores - reserve_cpus, inventory.memory_mib - (reserve_memory_mib or 0)
    if cores < _LEAST_CORES:
        raise ConfigError(
            f"RESERVE_CPUS={reserve_cpus:g} leaves less than {_LEAST_CORES:g} of {inventory.cpu_cores:g} cores: no job "
            "would ever be taken; lower it"
        )
    if memory_mib < _LEAST_MEMORY_MIB:
        raise ConfigError(
            f"RESERVE_MEMORY={reserve_memory_mib}MiB leaves less than {_LEAST_MEMORY_MIB} of {inventory.memory_mib} "
            "MiB: no job would ever be taken; lower it"
        )
    share = cores / slots
    if share < _LEAST_SHARE:
        raise ConfigError(
            f"MAX_JOBS={slots} gives each job {share:.2g} of {cores:.3g} cores; with less than {_LEAST_SHARE:g} of one "
            "nothing ends; lower it"
        )
    few = slots > max(1.0, inventory.cpu_cores)
    return (
        f"MAX_JOBS={slots} is more than this machine's {inventory.cpu_cores:g} cores: each job gets {share:.2g}"
        if few
        else ""
    )


class Reservation:
    """The right to use `share` until `release`, which is idempotent and safe from any thread; also a `with` block.

    One that queues has no share yet: `wait` for it.
    """

    def __init__(self, share: Share | None, budget: Budget | None = None, needs: Needs | None = None) -> None:
        self.needs = needs
        #: How often it did not even fit while nothing was held.
        self.misfits = 0
        #: Whether its job computes by now, as opposed to bringing its files.
        self.computes = False
        #: Set when something changed for one that waits.
        self.changed = threading.Event()
        self._share = share
        self._budget = budget

    @property
    def share(self) -> Share:
        assert self._share is not None, "it has to be waited for"  # noqa: S101 - a bug of ours
        return self._share

    @property
    def is_waiting(self) -> bool:
        """Whether there is no share yet."""
        return self._share is None

    def wait(self, halt: Halt, at_most_s: float | None, clock: Callable[[], float] = time.monotonic) -> Share:
        """The share, as soon as it is this one's turn. Raises Stopped, with WAITED after `at_most_s` (None: never), and
        WorkerFault(DOES_NOT_FIT) where this machine has become too small for it.
        """
        give_up_at = math.inf if at_most_s is None else clock() + at_most_s
        with halt.waking(self.changed.set):
            while self._share is None:
                assert self._budget is not None  # noqa: S101 - only a budget makes one that waits
                self.changed.clear()
                halt.check()
                retry_s = self._budget.grant(self)
                left = give_up_at - clock()
                if self._share is None and left <= 0:
                    self._budget.expired(self)
                    raise Stopped(StopReason.WAITED)
                if self._share is None:
                    longest = min(left, retry_s)
                    self.changed.wait(None if longest == math.inf else longest)
        return self._share

    def take(self) -> bool:
        """The share at once, if it is this one's turn and it fits; whether it has it now."""
        if self._share is None and self._budget is not None:
            self._budget.grant(self)
        return self._share is not None

    def set_share(self, share: Share | None) -> None:
        """For the budget: it may be used from now on; None: it has to be waited for."""
        self._share = share

    def again(self, needs: Needs) -> None:
        """Give the share back and take another one, or wait for it before all others: the job is to run once more, and
        what it had may be somebody else's by now."""
        assert self._budget is not None  # noqa: S101 - of a job that runs
        self.needs = needs
        self._budget.requeue(self)

    def begin(self) -> None:
        """The job computes from now on, so that the next one may be prefetched."""
        self.computes = True
        if self._budget is not None:
            self._budget.wake()

    def cancel(self) -> bool:
        """Leave the queue; False if it has its share already, or had left."""
        return self._budget is not None and self._budget.cancel(self)

    def release(self) -> None:
        if self._budget is not None:
            self._budget.release(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()


#: Of a job that needs no compute any more.
NOTHING = Reservation(Share(cpu_cores=0.0, memory_mib=0))

#: A slot is free, and yet the first in the queue does not fit: a GPU's memory is given back by the driver a moment
#: after the process that had it. Looked at again after so many seconds.
_LOOK_AGAIN_S = 2.0

#: While nothing is held only other programs or a lost GPU can be in its way. After so many looks, half a minute, it is
#: given up: nothing would be taken past it.
_MISFITS = 15


class Budget:
    """The machine's accounts. `slots`: how many jobs may run at once (MAX_JOBS); `prefetch`: how many may queue.

    The probes are called by `offer` and `grant`, outside the lock: `memory_in_use_mib` as said above, `read_gpus` for
    the GPUs that are there now and what is free on them. `reserve_memory_mib` None: see `default_reserve_memory_mib`.
    `gpu_unasked`: whether a job that does not say if it needs a GPU gets its share of them. It counts on that, so on a
    machine with GPUs as many slots are kept for jobs with one, and none of any kind is taken while no GPU works.
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
        prefetch: int = 0,
        gpu_unasked: bool = True,
    ) -> None:
        if reserve_memory_mib is None:
            reserve_memory_mib = default_reserve_memory_mib(inventory.memory_mib)
        self.slots = slots
        self._cores = max(0.0, inventory.cpu_cores - reserve_cpus)
        # Less a little for what sums of shares lose: 1.9 less three quarters of it may be 0.47499...
        equal = max(_LEAST_SHARE, self._cores / slots * 0.999)
        self._least_cores = min(_LEAST_CORES, equal) if self._cores >= _LEAST_CORES else _LEAST_CORES
        self._memory_mib = max(0, inventory.memory_mib - reserve_memory_mib)
        self._gpus = tuple(inventory.gpus)
        self._slots_with_gpu = min(slots, len(self._gpus)) if gpu_unasked else 0
        self._others_mib = 0
        self._seen_idle = False
        self._probe_memory = memory_in_use_mib
        self._probe_gpus = read_gpus
        self.prefetch = prefetch
        self._gpu_unasked = gpu_unasked
        self._held: dict[Reservation, None] = {}  # in the order of their beginning
        self._queue: deque[Reservation] = deque()
        #: One that queued had to be given back: nothing is prefetched before a running job has ended.
        self._expired = False
        self._lock = threading.Lock()
        # The one queue whose put() may be called from a signal handler (queue.SimpleQueue: "reentrant"). An Event's
        # set() may not: it can meet the lock that the interrupted thread holds.
        self._changes: queue.SimpleQueue[None] = queue.SimpleQueue()

    def offer(self) -> Offer | None:
        """What a job could have now, or else one that may queue later; None while neither can be taken."""
        with self._lock:
            probing = self._sees_others()
            if not self._may_start() and not self._may_prefetch():
                return None
        gpus, in_use_mib = self._probe(probing)
        with self._lock:
            self._note(gpus, in_use_mib)
            free = self._free()
            if self._may_start() and self._useful(free):
                return free
            if self._may_prefetch() and self._useful(later := self._free_after_the_first()):
                return later
            return None

    def free(self) -> Offer:
        """What is free by the last readings, useful or not: for people and messages."""
        with self._lock:
            return self._free()

    def shortage(self) -> str:
        """Where nothing is free: why, and what a person can do."""
        free = self.free()
        if self._has_enough(free):
            return (
                "none of its GPUs works, and a job that does not say whether it needs one counts on one; see what was "
                "said of the GPUs, or set GPU_UNASKED=none to take jobs that need none"
            )
        return (
            f"only {free.cpu_cores:.1f} cores and {free.memory_mib} MiB are free: other programs use the rest; close "
            "some, or lower RESERVE_CPUS and RESERVE_MEMORY"
        )

    def reserve(self, needs: Needs) -> Reservation:
        """Hold what `needs` asks for, and an equal share of the machine of what it does not name; or queue for it.

        Of a machine with n slots a share is 1/n of all that jobs may have, at most what is free. Raises
        WorkerFault(DOES_NOT_FIT) naming what was asked for and what is free, where there is no room in the queue, or
        the job would not even fit if nothing else ran.
        """
        with self._lock:
            try:
                if not self._may_start():
                    raise _does_not_fit(f"all {self.slots} job slots are taken")
                reservation = Reservation(self._share_for(needs, self._free()), self, needs)
                self._held[reservation] = None
            except WorkerFault:
                if not self._may_queue():
                    raise
                self._share_for(needs, self._free_when_idle())
                reservation = Reservation(None, self, needs)
                self._queue.append(reservation)
            return reservation

    def queue(self, needs: Needs) -> Reservation:
        """Queue for what `needs` asks for, whatever `prefetch` says: a job that an earlier process began is here.

        Raises WorkerFault(DOES_NOT_FIT) where it would not even fit if nothing else ran.
        """
        with self._lock:
            self._share_for(needs, self._free_when_idle())
            reservation = Reservation(None, self, needs)
            self._queue.append(reservation)
            return reservation

    def requeue(self, reservation: Reservation) -> None:
        """See `Reservation.again`."""
        with self._lock:
            self._held.pop(reservation, None)
            if reservation in self._queue:  # it never had a share: of two that an earlier process left, say
                self._queue.remove(reservation)
            reservation.set_share(None)
            reservation.computes = False
            # Before all that wait, since its share is the one that is free now; and at once where it can be, else a
            # drain gives it back, or the next offer gives its slot away.
            try:
                if len(self._held) >= self.slots or reservation.needs is None:
                    raise _does_not_fit("others hold all slots")
                reservation.set_share(self._share_for(reservation.needs, self._free()))
                self._held[reservation] = None
            except WorkerFault:
                self._queue.appendleft(reservation)
        self._tell_of_change()

    def hold(self, share: Share) -> Reservation:
        """Hold exactly `share`, free or not: a container that an earlier process started has it already."""
        reservation = Reservation(share, self)
        reservation.computes = True
        with self._lock:
            self._held[reservation] = None
        return reservation

    def grant(self, waiting: Reservation) -> float:
        """Give one that waits its share, if it is its turn and fits. Else: seconds after which to ask again, if nothing
        changes before. Raises WorkerFault(DOES_NOT_FIT) where waiting for others to end is of no use."""
        with self._lock:
            if not self._is_next(waiting):
                return math.inf
            probing = self._sees_others()
        gpus, in_use_mib = self._probe(probing)
        with self._lock:
            if not self._is_next(waiting):
                return math.inf
            assert waiting.needs is not None  # noqa: S101 - it queued with them
            self._note(gpus, in_use_mib)
            try:
                share = self._share_for(waiting.needs, self._free())
            except WorkerFault:
                waiting.misfits += not self._held
                if waiting.misfits > _MISFITS:
                    raise
                # Of CPU and memory of others that compute nothing comes back before one of them ends, and that is told.
                counts_on_one = waiting.needs.gpu or (waiting.needs.gpu is None and self._slots_with_gpu)
                return _LOOK_AGAIN_S if counts_on_one or not self._held else math.inf
            self._queue.popleft()
            self._held[waiting] = None
            waiting.set_share(share)
        self._tell_of_change()  # there is room in the queue again
        return math.inf

    def expired(self, waiting: Reservation) -> None:
        """One that waits is given up: no other job is to wait in vain, too, until a running one has ended."""
        with self._lock:
            self._expired = bool(self._held)
        self.release(waiting)

    def cancel(self, waiting: Reservation) -> bool:
        """Take it out of the queue; False if it is not there."""
        with self._lock:
            if waiting not in self._queue:
                return False
            self._queue.remove(waiting)
        self._tell_of_change()
        return True

    def release(self, reservation: Reservation) -> None:
        """Give back what it holds, or its place in the queue. Idempotent."""
        with self._lock:
            if reservation in self._held:
                del self._held[reservation]
                self._expired = False
            elif reservation in self._queue:
                self._queue.remove(reservation)
            else:
                return
        self._tell_of_change()

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

    def _tell_of_change(self) -> None:
        with self._lock:
            waiting = list(self._queue)
        for one in waiting:
            one.changed.set()
        self._changes.put(None)

    def _sees_others(self) -> bool:
        """Whether memory in use that is read now tells of other programs (see the module's docstring)."""
        return not (self._held and self._seen_idle)

    def _probe(self, memory: bool) -> tuple[tuple[Gpu, ...], int | None]:
        return tuple(self._probe_gpus()), self._probe_memory() if memory else None

    def _note(self, gpus: tuple[Gpu, ...], in_use_mib: int | None) -> None:
        self._gpus = gpus
        if in_use_mib is not None and self._sees_others():
            self._seen_idle = not self._held
            self._others_mib = max(0, in_use_mib - sum(one.share.memory_mib for one in self._held))

    def _useful(self, free: Offer) -> bool:
        return self._has_enough(free) and (bool(free.gpus) or not self._counts_on_gpus())

    def _counts_on_gpus(self) -> bool:
        """Whether the next job must get a GPU if it does not say that it needs none: the slots for jobs without one are
        taken, or no GPU works, so that each would have to do without."""
        if not self._slots_with_gpu:
            return False
        without = sum(not one.share.gpus for one in self._held)
        return not self._gpus or without >= self.slots - self._slots_with_gpu

    def _has_enough(self, free: Offer) -> bool:
        return free.cpu_cores >= self._least_cores and free.memory_mib >= _LEAST_MEMORY_MIB

    def _may_start(self) -> bool:
        return len(self._held) < self.slots and not self._queue

    def _may_prefetch(self) -> bool:
        # While one that has a share still brings its own files, another's would only take the line from it.
        return self._may_queue() and not self._expired and all(one.computes for one in self._held)

    def _may_queue(self) -> bool:
        """Also where all has changed since the offer: what was handed out then is as good as any other."""
        return bool(self._held or self._queue) and len(self._queue) < self.prefetch

    def _is_next(self, waiting: Reservation) -> bool:
        return bool(self._queue) and self._queue[0] is waiting and len(self._held) < self.slots

    def _share_for(self, needs: Needs, free: Offer) -> Share:
        return Share(self._take_cores(needs, free), self._take_memory(needs, free), self._take_gpus(needs, free))

    def _free(self) -> Offer:
        shares = [reservation.share for reservation in self._held]
        taken = {gpu.uuid for share in shares for gpu in share.gpus}
        return Offer(
            cpu_cores=max(0.0, self._cores - sum(share.cpu_cores for share in shares)),
            memory_mib=max(0, self._for_jobs_mib() - sum(share.memory_mib for share in shares)),
            gpus=tuple(gpu for gpu in self._gpus if gpu.uuid not in taken),
        )

    def _free_after_the_first(self) -> Offer:
        """What will be free when the job that has computed for longest has ended."""
        free = self._free()
        if not self._held:
            return free
        first = next(iter(self._held)).share
        return Offer(free.cpu_cores + first.cpu_cores, free.memory_mib + first.memory_mib, (*free.gpus, *first.gpus))

    def _free_when_idle(self) -> Offer:
        held = tuple(gpu for one in self._held for gpu in one.share.gpus)
        return Offer(self._cores, self._for_jobs_mib(), (*self._free().gpus, *held))

    def _for_jobs_mib(self) -> int:
        return max(0, self._memory_mib - self._others_mib)

    def _take_cores(self, needs: Needs, free: Offer) -> float:
        if needs.cpu_cores is None:
            if free.cpu_cores < self._least_cores:
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
        if needs.gpu is False or (needs.gpu is None and not self._gpu_unasked):
            return ()
        if needs.gpu is None and not candidates and self._counts_on_gpus():
            raise _does_not_fit("the job does not say whether it needs a GPU, and none is free")
        if needs.gpu is None:
            return tuple(candidates[: max(1, len(self._gpus) // self.slots)])
        for gpu in candidates:
            if _suits(gpu, needs):
                return (gpu,)
        raise _does_not_fit(f"the job asks for {_asked_gpu(needs)}; {_named(candidates)}")


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
