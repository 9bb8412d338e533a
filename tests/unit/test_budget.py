"""resources.budget: what is offered, what a job gets, what comes back, the waiting for it, and the queue."""

import math
import signal
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from jobfetcher.core.errors import ConfigError, Stopped, StopReason, WorkerFault, WorkerReason
from jobfetcher.core.halt import Halt
from jobfetcher.core.job import Needs
from jobfetcher.core.machine import Gpu, Inventory, Offer, Share
from jobfetcher.resources import budget as budget_module
from jobfetcher.resources.budget import Budget, Reservation, auto_slots, check_shares, default_reserve_memory_mib
from tests.support.services import wait_until

SMALL = Gpu("GPU-b", "NVIDIA RTX A2000", 6000, "8.6")
LARGE = Gpu("GPU-a", "NVIDIA RTX A4000", 16000, "8.6")
OLD = Gpu("GPU-c", "NVIDIA TITAN V", 12000, "7.0")


class Others:
    """What the probes say; a test changes it as other programs come and go."""

    def __init__(self, memory_mib: int = 0, gpus: Sequence[Gpu] = ()) -> None:
        self.memory_mib = memory_mib
        self.gpus = gpus
        self.asked = 0

    def read_memory_mib(self) -> int:
        self.asked += 1
        return self.memory_mib

    def read_gpus(self) -> Sequence[Gpu]:
        self.asked += 1
        return self.gpus


def budget(
    cores: float = 8.0,
    memory_mib: int = 10_000,
    gpus: tuple[Gpu, ...] = (),
    slots: int = 1,
    others: Others | None = None,
    reserve_cpus: float = 0.0,
    reserve_memory_mib: int | None = 0,
    prefetch: int = 0,
    gpu_unasked: bool = True,
) -> Budget:
    others = others or Others(gpus=gpus)
    return Budget(
        Inventory(cores, memory_mib, gpus),
        slots=slots,
        memory_in_use_mib=others.read_memory_mib,
        read_gpus=others.read_gpus,
        reserve_cpus=reserve_cpus,
        reserve_memory_mib=reserve_memory_mib,
        prefetch=prefetch,
        gpu_unasked=gpu_unasked,
    )


def refused(of: Budget, needs: Needs) -> str:
    with pytest.raises(WorkerFault) as caught:
        of.reserve(needs)
    assert caught.value.reason is WorkerReason.DOES_NOT_FIT
    return str(caught.value)


# -- the offer --------------------------------------------------------------------------------------------------------


def test_reserve_and_others_are_not_offered() -> None:
    of = budget(2.0, 24_000, others=Others(3_000), reserve_cpus=0.1, reserve_memory_mib=None)
    offer = of.offer()
    assert offer == Offer(1.9, 24_000 - 1_200 - 3_000)
    assert offer.whole_cores == 2


def test_default_reserve_of_memory_is_a_twentieth_and_at_least_512() -> None:
    assert [default_reserve_memory_mib(total) for total in (1_000, 10_240, 64_000)] == [512, 512, 3_200]


def test_slots_are_one_per_gpu_or_one_and_one_more_where_gpus_are_for_those_who_ask() -> None:
    machines = [Inventory(8, 1000, gpus) for gpus in ((), (SMALL,), (SMALL, LARGE))]
    assert [auto_slots(machine) for machine in machines] == [1, 1, 2]
    assert [auto_slots(machine, gpu_unasked=False) for machine in machines] == [1, 2, 3]


@pytest.mark.parametrize(("cores", "memory_mib"), [(0.49, 10_000), (0.0, 10_000), (8.0, 63), (8.0, 0)])
def test_what_is_too_little_is_not_offered(cores: float, memory_mib: int) -> None:
    of = budget(cores, memory_mib)
    assert of.offer() is None
    assert of.free() == Offer(cores, memory_mib)
    assert "free on this machine" in refused(of, Needs())


@pytest.mark.parametrize(("cores", "slots"), [(2.0, 4), (4.0, 8), (3.0, 7), (16.0, 40)])
def test_all_slots_are_used_where_a_share_is_less_than_half_a_core(cores: float, slots: int) -> None:
    of = budget(cores, 24_000, slots=slots, reserve_cpus=0.1)
    for _ in range(slots):
        assert of.offer() is not None
        assert of.reserve(Needs()).share.cpu_cores == pytest.approx((cores - 0.1) / slots)
    assert of.offer() is None


def test_less_than_half_a_core_is_offered_as_none_and_refused_to_who_asks_for_one() -> None:
    of = budget(2.0, 24_000, slots=4, reserve_cpus=0.1)
    for _ in range(3):
        of.reserve(Needs())
    offer = of.offer()
    assert offer is not None
    assert offer.whole_cores == 0
    assert "asks for 1 CPU cores" in refused(of, Needs(cpu_cores=1))
    of.reserve(Needs())


def test_no_offer_and_no_probe_while_all_slots_are_taken() -> None:
    others = Others()
    of = budget(slots=1, others=others)
    with of.reserve(Needs(cpu_cores=1, memory_mib=100)):
        assert of.offer() is None
        assert refused(of, Needs(cpu_cores=1)) == "all 1 job slots are taken on this machine"
    assert others.asked == 0
    assert of.offer() is not None
    assert others.asked == 2


def test_memory_of_others_is_read_while_idle_and_kept_while_jobs_run() -> None:
    others = Others(1_000)
    of = budget(slots=2, others=others)
    assert of.offer() == Offer(8.0, 9_000)
    job = of.reserve(Needs(cpu_cores=1, memory_mib=4_000))
    others.memory_mib = 1_000 + 3_900  # the job uses what it was given: that is in its share already
    assert of.offer() == Offer(7.0, 5_000)
    job.release()
    others.memory_mib = 2_000
    assert of.offer() == Offer(8.0, 8_000)


def test_gpus_are_read_at_every_offer() -> None:
    others = Others(gpus=(SMALL, LARGE))
    of = budget(gpus=(SMALL, LARGE), slots=3, others=others, gpu_unasked=False)
    with of.reserve(Needs(cpu_cores=1, memory_mib=100, gpu_model=LARGE.model)):
        half = Gpu(SMALL.uuid, SMALL.model, 3_000, SMALL.archi)
        others.gpus = (half, LARGE)
        offer = of.offer()
        assert offer is not None
        assert offer.gpus == (half,)
        others.gpus = ()  # both fell off the bus
        offer = of.offer()
        assert offer is not None
        assert offer.gpus == ()


NULL = Needs(cpu_cores=1, memory_mib=100)  # as the real applications ask, which compute on a GPU all the same


@pytest.mark.fault("E14", "T23")
def test_while_no_gpu_works_nothing_is_taken_that_may_count_on_one() -> None:
    others = Others(gpus=(SMALL,))
    of = budget(gpus=(SMALL,), slots=4, others=others)
    assert of.offer() is not None
    others.gpus = ()
    assert of.offer() is None
    assert "none of its GPUs works" in of.shortage()
    assert "GPU_UNASKED=none" in of.shortage()
    with pytest.raises(WorkerFault, match="does not say whether it needs a GPU, and none is free") as fault:
        of.reserve(NULL)
    assert fault.value.reason is WorkerReason.DOES_NOT_FIT
    of.reserve(Needs(cpu_cores=1, memory_mib=100, gpu_mem_mib=0)).release()  # it says that it needs none
    others.gpus = (SMALL,)
    assert of.offer() is not None


@pytest.mark.fault("E14", "T23")
def test_as_many_jobs_as_there_are_slots_beyond_the_gpus_may_do_without_one() -> None:
    others = Others(gpus=(SMALL, LARGE))
    of = budget(gpus=(SMALL, LARGE), slots=3, others=others)
    assert [len(of.reserve(NULL).share.gpus) for _ in range(2)] == [1, 1]
    assert of.offer() is not None, "the third slot was the owner's own wish"
    of = budget(gpus=(SMALL, LARGE), slots=2, others=others)
    others.gpus = (SMALL,)  # the other one is set aside
    assert of.offer() is not None
    with of.reserve(NULL) as held:
        assert held.share.gpus == (SMALL,)
        assert of.offer() is None, "a second one would have none"
    assert of.offer() is not None


@pytest.mark.fault("A4")
def test_a_share_that_is_in_use_already_is_held_whatever_is_free() -> None:
    others = Others(gpus=(SMALL, LARGE))
    of = budget(4.0, 4_000, (SMALL, LARGE), slots=2, others=others)
    kept = of.hold(Share(3.0, 3_000, (LARGE,)))
    assert kept.share == Share(3.0, 3_000, (LARGE,))
    assert of.free() == Offer(1.0, 1_000, (SMALL,))
    # The machine shrank while the worker was away, and there are more containers than slots: free is never negative.
    more = [of.hold(Share(2.0, 2_000)), of.hold(Share(1.0, 1_000))]
    assert of.free() == Offer(0.0, 0, (SMALL,))
    assert of.offer() is None
    assert "all 2 job slots are taken" in refused(of, Needs())
    for one in (kept, *more):
        one.release()
        one.release()
    assert of.free() == Offer(4.0, 4_000, (SMALL, LARGE))


@pytest.mark.fault("A4")
def test_what_others_use_is_guessed_while_a_process_comes_back_to_running_jobs() -> None:
    others = Others(5_000)  # 2,000 of them are the container's own
    of = budget(slots=2, others=others)
    kept = of.hold(Share(1.0, 2_000))
    assert of.offer() == Offer(7.0, 10_000 - 3_000 - 2_000)
    others.memory_mib = 1_000  # it does not use all that it holds
    assert of.offer() == Offer(7.0, 8_000)
    kept.release()
    others.memory_mib = 3_000
    assert of.offer() == Offer(8.0, 7_000)
    of.hold(Share(1.0, 2_000))
    others.memory_mib = 9_000  # an idle moment was seen: that reading stays
    assert of.offer() == Offer(7.0, 5_000)


# -- what a job gets --------------------------------------------------------------------------------------------------


def test_a_job_gets_what_it_asks_for() -> None:
    of = budget(slots=2)
    assert of.reserve(Needs(cpu_cores=1.5, memory_mib=700)).share == Share(1.5, 700)
    assert of.free() == Offer(6.5, 9_300)


@pytest.mark.fault("E15")
def test_a_job_that_does_not_say_gets_an_equal_share_at_most_what_is_free() -> None:
    of = budget(8.1, 10_000, slots=4, others=Others(1_000), reserve_cpus=0.1, reserve_memory_mib=1_000)
    of.offer()
    assert of.reserve(Needs()).share == Share(2.0, 2_000)
    assert of.reserve(Needs(cpu_cores=5, memory_mib=5_500)).share == Share(5.0, 5_500)
    assert of.reserve(Needs()).share == Share(1.0, 500)


@pytest.mark.fault("E15")
def test_what_was_rounded_up_for_the_server_fits_and_is_capped() -> None:
    of = budget(2.0, slots=1, reserve_cpus=0.1)
    assert of.reserve(Needs(cpu_cores=2)).share.cpu_cores == 1.9


@pytest.mark.parametrize(("reserve_cpus", "fits"), [(0.5, True), (0.6, False)])
def test_rounding_is_half_up(reserve_cpus: float, fits: bool) -> None:
    of = budget(2.0, reserve_cpus=reserve_cpus)
    if fits:
        assert of.reserve(Needs(cpu_cores=2)).share.cpu_cores == 1.5
    else:
        assert refused(of, Needs(cpu_cores=2)) == "the job asks for 2 CPU cores; 1.4 are free on this machine"


def test_a_fraction_of_a_core_fits_where_no_whole_one_is_free() -> None:
    assert budget(0.4).reserve(Needs(cpu_cores=0.25, memory_mib=10)).share == Share(0.25, 10)


@pytest.mark.fault("E15")
def test_more_than_is_free_is_refused_with_both_numbers() -> None:
    of = budget(8.0, 10_000, slots=2, reserve_memory_mib=500)
    assert refused(of, Needs(cpu_cores=9)) == "the job asks for 9 CPU cores; 8 are free on this machine"
    assert refused(of, Needs(memory_mib=9_501)) == (
        "the job asks for 9501 MiB of memory; 9500 MiB are free on this machine"
    )
    assert of.free() == Offer(8.0, 9_500), "a refused job holds nothing"


def test_a_gpu_job_gets_the_smallest_one_that_fits() -> None:
    def chosen(**asked: object) -> tuple[Gpu, ...]:
        return budget(gpus=(LARGE, SMALL, OLD), slots=1).reserve(Needs.model_validate(asked)).share.gpus

    assert chosen(gpu_mem_mib=1) == (SMALL,)
    assert chosen(gpu_mem_mib=6_001) == (OLD,)
    assert chosen(gpu_mem_mib=6_001, gpu_archi="8.6") == (LARGE,)
    assert chosen(gpu_archi="8.6") == (SMALL,)
    assert chosen(gpu_model="NVIDIA TITAN V") == (OLD,)
    twins = (Gpu("GPU-z", "X", 8_000, "8.6"), Gpu("GPU-y", "X", 8_000, "8.6"))
    assert budget(gpus=twins).reserve(Needs(gpu_model="X")).share.gpus == (twins[1],)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"gpu_mem_mib": 16_001}, "a GPU with 16001 MiB"),
        ({"gpu_model": "nvidia rtx a4000"}, "a GPU of model 'nvidia rtx a4000'"),
        ({"gpu_archi": "8"}, "a GPU of compute capability '8'"),
    ],
)
def test_a_gpu_that_is_not_here_is_refused(asked: dict[str, object], words: str) -> None:
    said = refused(budget(gpus=(LARGE,)), Needs.model_validate(asked))
    assert said == f"the job asks for {words}; free: NVIDIA RTX A4000 (8.6, 16000 MiB) on this machine"
    assert "no GPU is free" in refused(budget(), Needs.model_validate(asked))


def test_a_gpu_is_given_to_one_job_at_a_time() -> None:
    of = budget(gpus=(SMALL, LARGE), slots=3)
    first = of.reserve(Needs(cpu_cores=1, memory_mib=100, gpu_mem_mib=5_000))
    second = of.reserve(Needs(cpu_cores=1, memory_mib=100, gpu_mem_mib=5_000))
    assert (first.share.gpus, second.share.gpus) == ((SMALL,), (LARGE,))
    assert "no GPU is free" in refused(of, Needs(cpu_cores=1, gpu_mem_mib=5_000))
    first.release()
    assert of.reserve(Needs(cpu_cores=1, memory_mib=100, gpu_mem_mib=5_000)).share.gpus == (SMALL,)


@pytest.mark.parametrize(("slots", "expected"), [(1, 3), (2, 1), (3, 1), (4, 1)])
def test_a_job_that_says_nothing_of_gpus_gets_its_share_of_them(slots: int, expected: int) -> None:
    of = budget(gpus=(SMALL, LARGE, OLD), slots=slots)
    assert len(of.reserve(Needs()).share.gpus) == expected


def test_a_job_that_wants_no_gpu_gets_none() -> None:
    assert budget(gpus=(SMALL,)).reserve(Needs(gpu_mem_mib=0)).share.gpus == ()


@pytest.mark.parametrize("slots", [1, 2])
def test_where_gpus_are_for_those_who_ask_no_other_job_holds_one(slots: int) -> None:
    of = budget(gpus=(SMALL,), slots=slots, gpu_unasked=False)
    with of.reserve(Needs(cpu_cores=1, memory_mib=100)) as silent:
        assert silent.share.gpus == ()
        if slots == 2:
            assert of.offer() == Offer(7.0, 9_900, (SMALL,))
            assert of.reserve(Needs(cpu_cores=1, memory_mib=100, gpu_mem_mib=1)).share.gpus == (SMALL,)


def test_a_job_that_says_nothing_runs_without_a_gpu_when_none_is_free() -> None:
    of = budget(gpus=(SMALL,), slots=2)
    of.reserve(Needs(cpu_cores=1, memory_mib=100, gpu_mem_mib=1))
    assert of.reserve(Needs()).share.gpus == ()


# -- what comes back --------------------------------------------------------------------------------------------------


def test_release_is_idempotent_and_a_reservation_is_a_block() -> None:
    of = budget(slots=2)
    whole = of.free()
    with of.reserve(Needs(cpu_cores=2, memory_mib=100)) as first:
        second = of.reserve(Needs(cpu_cores=2, memory_mib=100))
        first.release()
        first.release()
        assert of.free() == Offer(6.0, 9_900)
    assert of.free() == Offer(6.0, 9_900)
    second.release()
    assert of.free() == whole


def test_equal_shares_are_told_apart() -> None:
    of = budget(slots=2)
    one, _other = (of.reserve(Needs(cpu_cores=1, memory_mib=100)) for _ in range(2))
    one.release()
    one.release()
    assert of.free() == Offer(7.0, 9_900)


def test_waiting_ends_at_a_release_before_or_after_it_began() -> None:
    of = budget(slots=2)
    one, other = (of.reserve(Needs(cpu_cores=1, memory_mib=100)) for _ in range(2))
    one.release()
    one.release()
    assert of.wait_for_change(0)
    assert not of.wait_for_change(0), "one change ends one wait"
    thread = threading.Timer(0.05, other.release)
    thread.start()
    assert of.wait_for_change(30)
    thread.join()


def test_several_changes_end_one_wait() -> None:
    of = budget()
    for _ in range(5):
        of.wake()
    assert of.wait_for_change(0)
    assert not of.wait_for_change(0.01)


def test_a_signal_handler_may_wake() -> None:
    of = budget()
    before = signal.signal(signal.SIGALRM, lambda _number, _frame: of.wake())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        started = time.monotonic()
        assert of.wait_for_change(30)
        assert time.monotonic() - started < 20
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# -- the queue (PREFETCH) ----------------------------------------------------------------------------------------------

PART = Needs(cpu_cores=1, memory_mib=1_000)


def in_background(reservation: Reservation, halt: Halt | None = None, at_most_s: float | None = None) -> Future[Share]:
    """The share that a thread waits for."""
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(reservation.wait, halt or Halt(), at_most_s)
    finally:
        pool.shutdown(wait=False)


def test_without_prefetch_nothing_queues() -> None:
    of = budget(slots=1)
    with of.reserve(PART):
        assert of.offer() is None
        assert "all 1 job slots are taken" in refused(of, PART)


def test_what_is_offered_while_one_computes_is_what_is_free_when_the_first_has_ended() -> None:
    of = budget(8.0, 10_000, (SMALL, LARGE), slots=2, prefetch=1)
    first = of.reserve(Needs(cpu_cores=2, memory_mib=3_000, gpu_model=LARGE.model))
    assert of.offer() == Offer(6.0, 7_000, (SMALL,)), "a slot is free: what may start now"
    second = of.reserve(Needs(cpu_cores=5, memory_mib=6_000, gpu_mem_mib=0))
    first.begin()
    assert of.offer() is None, "the second still brings its own files"
    second.begin()
    assert of.wait_for_change(0)
    assert of.offer() == Offer(3.0, 4_000, (SMALL, LARGE))
    first.release()
    third = of.reserve(Needs(cpu_cores=1, memory_mib=500, gpu_mem_mib=0))
    third.begin()
    assert of.offer() == Offer(7.0, 9_500, (SMALL, LARGE)), "the second is the first now"
    with of.reserve(PART) as waiting:
        assert waiting.is_waiting
        assert of.offer() is None
        assert of.free() == Offer(2.0, 3_500, (SMALL, LARGE)), "what waits holds nothing"
        assert "all 2 job slots are taken" in refused(of, PART)
    for one in (second, third):
        one.release()
    assert of.free() == Offer(8.0, 10_000, (SMALL, LARGE))


def test_a_run_that_is_repeated_goes_before_what_waits() -> None:
    of = budget(8.0, 10_000, slots=1, prefetch=1)
    running, prefetched = of.reserve(PART), of.reserve(PART)
    running.again(PART)
    assert (running.is_waiting, prefetched.is_waiting) == (False, True)
    with of.hold(Share(1.0, 1_000)):  # a container that an earlier process started
        running.again(PART)
        assert running.is_waiting
        assert not prefetched.take()
    assert running.take()
    assert not prefetched.take()
    running.release()
    assert prefetched.take()


def test_one_that_is_to_run_again_before_it_had_its_share_queues_once() -> None:
    """Two that an earlier process left running, and one slot: both were interrupted by the same power cut."""
    of = budget(8.0, 10_000, slots=1)
    first, second = of.queue(PART), of.queue(PART)
    assert (first.take(), second.take()) == (True, False)
    first.again(PART)
    second.again(PART)
    assert (first.is_waiting, second.is_waiting) == (False, True)
    first.release()
    assert second.take()
    second.release()
    assert of.offer() == Offer(8.0, 10_000)
    waiting = of.queue(PART)
    waiting.again(PART)
    waiting.release()
    assert of.offer() == Offer(8.0, 10_000)


def test_what_would_not_fit_if_nothing_else_ran_does_not_queue() -> None:
    of = budget(8.0, 10_000, (SMALL,), slots=1, prefetch=1)
    with of.reserve(Needs()):
        assert "9 CPU cores; 8 are free" in refused(of, Needs(cpu_cores=9))
        assert "a GPU with 6001 MiB" in refused(of, Needs(gpu_mem_mib=6_001))
        assert of.reserve(Needs(cpu_cores=8, memory_mib=10_000, gpu_mem_mib=6_000)).is_waiting


def test_the_queue_is_first_come_first_served_and_nothing_passes_it() -> None:
    of = budget(8.0, 10_000, slots=2, prefetch=2)
    small, large = of.reserve(PART), of.reserve(Needs(cpu_cores=7, memory_mib=1_000))
    whole = of.reserve(Needs(cpu_cores=8, memory_mib=1_000))
    after = of.reserve(PART)
    waits = [in_background(one) for one in (whole, after)]
    large.release()
    # a slot is free, and the second would fit into what is free: it waits for the first
    assert of.offer() is None
    assert of.grant(after) == math.inf
    assert [wait.done() for wait in waits] == [False, False]
    assert "all 2 job slots are taken" in refused(of, PART)
    small.release()
    assert waits[0].result(20) == Share(8.0, 1_000)
    assert after.is_waiting
    whole.release()
    assert waits[1].result(20) == Share(1.0, 1_000)


def test_one_that_leaves_the_queue_lets_the_next_one_go_on() -> None:
    of = budget(8.0, 10_000, slots=2, prefetch=2)
    of.reserve(PART)
    of.reserve(Needs(cpu_cores=7, memory_mib=1_000)).release()
    running = of.reserve(PART)
    blocks, after = of.reserve(Needs(cpu_cores=8, memory_mib=1_000)), of.reserve(PART)
    running.release()
    wait = in_background(after)
    assert of.grant(blocks) == math.inf
    blocks.release()
    assert wait.result(20) == Share(1.0, 1_000)
    assert not blocks.cancel(), "it has left already"


def test_what_waits_gets_the_gpu_that_the_other_one_gives_back() -> None:
    of = budget(gpus=(SMALL,), slots=1, prefetch=1)
    first = of.reserve(Needs(gpu_mem_mib=1))
    second = of.reserve(Needs(gpu_mem_mib=6_000))
    wait = in_background(second)
    first.release()
    assert wait.result(20).gpus == (SMALL,)


def test_a_gpu_whose_memory_comes_back_late_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget_module, "_LOOK_AGAIN_S", 0.005)
    monkeypatch.setattr(budget_module, "_MISFITS", 10**9)
    others = Others(gpus=(SMALL,))
    of = budget(gpus=(SMALL,), slots=1, prefetch=1, others=others)
    first = of.reserve(Needs(gpu_mem_mib=1))
    wait = in_background(of.reserve(Needs(gpu_mem_mib=6_000)))
    others.gpus = (Gpu(SMALL.uuid, SMALL.model, 100, SMALL.archi),)
    first.release()
    asked = others.asked
    wait_until(lambda: others.asked > asked + 2, "it looks again", 20)
    assert not wait.done()
    others.gpus = (SMALL,)
    assert wait.result(20).gpus == (SMALL,)


@pytest.mark.fault("E14")
def test_a_job_that_this_machine_has_no_room_for_any_more_does_not_block_it_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not even where nothing is ever given back, and no time limits the wait."""
    monkeypatch.setattr(budget_module, "_LOOK_AGAIN_S", 0.001)
    others = Others(gpus=(SMALL,))
    of = budget(gpus=(SMALL,), slots=1, prefetch=1, others=others, gpu_unasked=False)
    first = of.reserve(Needs(gpu_mem_mib=1))
    with of.reserve(Needs(gpu_mem_mib=1)) as second:
        wait = in_background(second)
        others.gpus = ()  # it fell off the bus
        first.release()
        with pytest.raises(WorkerFault, match="no GPU is free") as fault:
            wait.result(20)
        assert fault.value.reason is WorkerReason.DOES_NOT_FIT
        assert of.offer() is None
    assert of.offer() is not None


def test_memory_of_others_is_read_again_when_the_next_in_the_queue_gets_its_share() -> None:
    others = Others(1_000)
    of = budget(slots=1, prefetch=1, others=others)
    assert of.offer() == Offer(8.0, 9_000)
    first = of.reserve(Needs())
    assert first.share.memory_mib == 9_000
    with of.reserve(Needs()) as second:
        others.memory_mib = 4_000  # of which 3,000 may be the running job's own: not read while it runs
        assert of.free() == Offer(0.0, 0)
        first.release()
        assert second.wait(Halt(), 0).memory_mib == 6_000


def test_one_that_waited_for_too_long_leaves_and_no_other_queues_before_one_has_ended() -> None:
    of = budget(slots=2, prefetch=1)
    first, second = of.reserve(PART), of.reserve(PART)
    of.wait_for_change(0)
    with of.reserve(PART) as waiting, pytest.raises(Stopped) as stopped:
        waiting.wait(Halt(), 0.01)
    assert stopped.value.reason is StopReason.WAITED
    assert of.wait_for_change(0)
    assert of.offer() is None
    first.release()
    assert of.offer() is not None
    third = of.reserve(PART)
    assert not third.is_waiting
    assert of.reserve(PART).is_waiting
    second.release()


def test_what_was_handed_out_before_all_changed_still_queues() -> None:
    """Between the offer and the answer, what ran ends, or what waited is given back."""
    of = budget(slots=1, prefetch=2)
    first, second = of.reserve(PART), of.reserve(PART)
    first.begin()
    assert of.offer() is not None
    first.release()  # the second was not told yet
    third = of.reserve(PART)
    assert third.is_waiting
    second.wait(Halt(), None)
    of.expired(third)
    assert of.offer() is None
    assert of.reserve(PART).is_waiting


def test_giving_up_when_nothing_runs_any_more_pauses_nothing() -> None:
    of = budget(slots=1, prefetch=1)
    first = of.reserve(PART)
    waiting = of.reserve(PART)
    first.release()
    of.expired(waiting)
    with of.reserve(PART) as third:
        third.begin()
        assert of.offer() is not None
        assert of.reserve(PART).is_waiting


@pytest.mark.parametrize("reason", [StopReason.CANCELLED, StopReason.DETACH, StopReason.SHUTDOWN])
def test_a_halt_ends_the_wait_and_the_place_is_free(reason: StopReason) -> None:
    of = budget(slots=1, prefetch=1)
    with of.reserve(PART):
        halt = Halt()
        waiting = of.reserve(PART)
        wait = in_background(waiting, halt)
        halt.set(reason)
        with pytest.raises(Stopped) as stopped:
            wait.result(20)
        assert stopped.value.reason is reason
        waiting.release()
        assert of.reserve(PART).is_waiting


def test_a_job_that_runs_again_in_a_new_process_goes_before_the_one_that_waited() -> None:
    of = budget(slots=1, prefetch=1)
    kept = of.hold(Share(8.0, 10_000))
    waiting = of.reserve(PART)
    wait = in_background(waiting)
    assert of.offer() is None
    kept.release()
    assert wait.result(20) == Share(1.0, 1_000)


def test_of_a_cancel_and_a_grant_at_the_same_time_one_wins() -> None:
    """As in a drain: who is taken out of the queue has no share, and who is not has one and runs."""
    won = {True: 0, False: 0}
    with ThreadPoolExecutor(2) as pool:
        for number in range(300):
            of = budget(slots=1, prefetch=1)
            whole = of.free()
            running, waiting, halt = of.reserve(PART), of.reserve(PART), Halt()
            wait = pool.submit(waiting.wait, halt, None)
            ending = pool.submit(running.release)
            if number % 3:
                ending.result(20)
            if number % 3 == 2:
                wait.result(20)
            cancelled = waiting.cancel()
            won[cancelled] += 1
            if cancelled:
                halt.set(StopReason.SHUTDOWN)
                assert isinstance(wait.exception(20), Stopped)
                assert waiting.is_waiting
            else:
                assert wait.result(20) == Share(1.0, 1_000)
                assert of.free() == Offer(7.0, 9_000)
            ending.result(20)
            waiting.release()
            assert of.free() == whole
    assert won[True]
    assert won[False]


# -- the promise ------------------------------------------------------------------------------------------------------

GPUS = (SMALL, LARGE, OLD)
NEEDS = st.builds(
    Needs,
    cpu_cores=st.none() | st.floats(0.01, 12),
    memory_mib=st.none() | st.integers(1, 12_000),
    gpu_mem_mib=st.none() | st.integers(0, 17_000),
    gpu_model=st.none() | st.sampled_from([gpu.model for gpu in GPUS]),
    gpu_archi=st.none() | st.sampled_from(["8.6", "7.0"]),
)


@settings(deadline=None)
@given(
    cores=st.floats(0.5, 16),
    memory_mib=st.integers(100, 16_000),
    gpus=st.lists(st.sampled_from(GPUS), unique=True).map(tuple),
    slots=st.integers(1, 5),
    used_mib=st.integers(0, 8_000),
    steps=st.lists(st.tuples(st.booleans(), NEEDS, st.integers(0, 9)), max_size=30),
)
def test_shares_never_exceed_the_machine(
    cores: float,
    memory_mib: int,
    gpus: tuple[Gpu, ...],
    slots: int,
    used_mib: int,
    steps: list[tuple[bool, Needs, int]],
) -> None:
    of = budget(cores, memory_mib, gpus, slots, Others(used_mib, gpus), reserve_cpus=0.1, reserve_memory_mib=50)
    of.offer()
    whole = of.free()
    held: list[Reservation] = []
    for reserve, needs, which in steps:
        if reserve:
            before = of.free()
            try:
                held.append(of.reserve(needs))
            except WorkerFault:
                assert of.free() == before, "a refused job holds nothing"
        elif held:
            held.pop(which % len(held)).release()
        shares = [one.share for one in held]
        assert len(shares) <= slots
        assert all(share.cpu_cores > 0 and share.memory_mib > 0 for share in shares)
        assert math.fsum(share.cpu_cores for share in shares) <= whole.cpu_cores + 1e-9
        assert sum(share.memory_mib for share in shares) <= whole.memory_mib
        uuids = [gpu.uuid for share in shares for gpu in share.gpus]
        assert len(uuids) == len(set(uuids))
        offer = of.offer()
        assert offer is None or not set(uuids) & {gpu.uuid for gpu in offer.gpus}
    for one in held:
        one.release()
    assert of.free() == whole


def test_many_threads_share_one_budget() -> None:
    of = budget(4.0, 4_000, GPUS, slots=3)
    whole = of.free()
    holders: dict[str, int] = {}
    clashes: list[str] = []
    rounds = 300

    def work(number: int) -> None:
        for _ in range(rounds):
            try:
                held = of.reserve(Needs(cpu_cores=1, memory_mib=1_000, gpu_mem_mib=1))
            except WorkerFault:
                continue
            with held:
                uuid = held.share.gpus[0].uuid
                if holders.setdefault(uuid, number) != number:
                    clashes.append(uuid)
                del holders[uuid]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clashes == []
    assert of.free() == whole


class Machine(RuleBasedStateMachine):
    """Jobs come, queue, wait, leave the queue and end, in any order."""

    jobs: Bundle[Reservation] = Bundle("jobs")

    @initialize(
        cores=st.floats(0.6, 16),
        memory_mib=st.integers(100, 16_000),
        gpus=st.lists(st.sampled_from(GPUS), unique=True).map(tuple),
        slots=st.integers(1, 4),
        prefetch=st.integers(0, 3),
    )
    def starts(self, cores: float, memory_mib: int, gpus: tuple[Gpu, ...], slots: int, prefetch: int) -> None:
        self.of = budget(cores, memory_mib, gpus, slots, reserve_cpus=0.1, reserve_memory_mib=10, prefetch=prefetch)
        self.whole = self.of.free()
        self.queue: list[Reservation] = []
        self.held: list[Reservation] = []
        self.again: list[Reservation] = []  # they queue in any case

    @rule(target=jobs, needs=NEEDS)
    def comes(self, needs: Needs) -> Reservation:
        self.of.offer()
        before = self.of.free()
        try:
            job = self.of.reserve(needs)
        except WorkerFault:
            assert self.of.free() == before
            return multiple()  # type: ignore[return-value]  # no job, which hypothesis has no type for
        (self.queue if job.is_waiting else self.held).append(job)
        return job

    @rule(job=jobs)
    def asks(self, job: Reservation) -> None:
        first = bool(self.queue) and self.queue[0] is job
        self.of.grant(job)
        if first and not job.is_waiting:
            self.held.append(self.queue.pop(0))

    @rule(job=jobs)
    def runs_again(self, job: Reservation) -> None:
        if job in self.held and job.needs is not None:
            self.held.remove(job)
            job.again(job.needs)
            self.again.append(job)
            (self.queue if job.is_waiting else self.held).append(job)

    @rule(job=consumes(jobs))
    def ends(self, job: Reservation) -> None:
        job.release()
        job.release()
        self._forget(job)

    @rule(job=jobs)
    def leaves_the_queue(self, job: Reservation) -> None:
        assert job.cancel() == (job in self.queue)
        if job in self.queue:
            self.queue.remove(job)

    @rule(job=consumes(jobs))
    def gives_up(self, job: Reservation) -> None:
        self.of.expired(job)
        self._forget(job)

    def _forget(self, job: Reservation) -> None:
        for jobs in (self.queue, self.held):
            if job in jobs:
                jobs.remove(job)

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "of"):
            return
        assert sum(job not in self.again for job in self.queue) <= self.of.prefetch
        assert all(job.is_waiting for job in self.queue)
        shares = [job.share for job in self.held]
        assert len(shares) <= self.of.slots
        assert math.fsum(share.cpu_cores for share in shares) <= self.whole.cpu_cores + 1e-9
        assert sum(share.memory_mib for share in shares) <= self.whole.memory_mib
        uuids = [gpu.uuid for share in shares for gpu in share.gpus]
        assert len(uuids) == len(set(uuids))

    def teardown(self) -> None:
        """When all that compute have ended, each one that waits has its turn."""
        if not hasattr(self, "of"):
            return
        while self.held or self.queue:
            for job in list(self.held):
                job.release()
                self._forget(job)
            if self.queue:
                job = self.queue.pop(0)
                self.of.grant(job)
                assert not job.is_waiting, "nothing runs, and the first in the queue does not get its share"
                self.held.append(job)
        assert self.of.free() == self.whole


Machine.TestCase.settings = settings(deadline=None, max_examples=150, stateful_step_count=30)
TestMachine = Machine.TestCase


@pytest.mark.parametrize(
    ("slots", "reserve_cpus", "reserve_memory_mib", "named"),
    [
        (41, 0.0, None, "MAX_JOBS=41 gives each job 0.049 of 2 cores"),
        (1, 1.6, None, "RESERVE_CPUS=1.6 leaves less than 0.5 of 2 cores"),
        (1, 0.1, 7990, "RESERVE_MEMORY=7990MiB leaves less than 64 of 8000 MiB"),
    ],
)
def test_what_leaves_nothing_for_any_job_is_refused_by_name(
    slots: int, reserve_cpus: float, reserve_memory_mib: int | None, named: str
) -> None:
    with pytest.raises(ConfigError) as seen:
        check_shares(Inventory(2.0, 8000), slots, reserve_cpus, reserve_memory_mib)
    assert str(seen.value).startswith(named)


def test_more_jobs_than_cores_is_remarked_and_no_more_is_not() -> None:
    assert check_shares(Inventory(2.0, 8000), 2, 0.1, 0) == ""
    assert check_shares(Inventory(0.6, 8000), 1, 0.1, None) == ""
    remark = check_shares(Inventory(2.0, 8000), 4, 0.1, None)
    assert remark == "MAX_JOBS=4 is more than this machine's 2 cores: each job gets 0.47"
