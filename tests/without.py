"""A worker without one of its standing rules (FAULTS.md, J1 to J9), to see that a test notices.

`pytest --without J3 ...` runs tests on a product that breaks the rule; tests/test_standing_rules.py does so once for
each rule, with the test that must fail then. There is no switch for it in the product itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import pytest

from jobfetcher import ending
from jobfetcher.core.errors import Verdict, WorkerFault, WorkerReason
from jobfetcher.core.run import Exit
from jobfetcher.engine.docker import DockerEngine
from jobfetcher.heartbeat import Pulse
from jobfetcher.journal import Journal
from jobfetcher.outbox import Outbox
from jobfetcher.sources.worker_api import deadline, source
from jobfetcher.transfer import replies
from jobfetcher.watching import Watcher


@dataclass(frozen=True)
class Rule:
    """One rule: `drop` makes the product break it, `proof` is the test that fails then."""

    drop: Callable[[pytest.MonkeyPatch], None]
    proof: str


def _write_after_speaking(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Journal, "settling", lambda self, job_id, outcome: outcome)


def _never_adopt(patch: pytest.MonkeyPatch) -> None:
    def refuse(self: DockerEngine, *_: object) -> NoReturn:
        raise WorkerFault(WorkerReason.ENGINE, "there is one of that name already")

    patch.setattr(DockerEngine, "_adopt", refuse)


def _end_without_joining(patch: pytest.MonkeyPatch) -> None:
    def stop(self: Any) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify()

    patch.setattr(Pulse, "stop", stop)


def _leases_for_ever(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(source, "LEASE_S", float("inf"))


def _blame_the_job(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ending, "verdict", lambda error: Verdict.FAIL_JOB)


def _trust_every_exit(patch: pytest.MonkeyPatch) -> None:
    real = Watcher.wait

    def wait(self: Watcher, *arguments: Any) -> Exit:
        return replace(real(self, *arguments), genuine=True)

    patch.setattr(Watcher, "wait", wait)


def _deadlines_per_read(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(deadline, "_left", lambda timeout, error: timeout)


def _try_again_whatever_was_said(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(replies, "is_later", lambda reply: reply.status >= 400)


def _clean_up_first(patch: pytest.MonkeyPatch) -> None:
    real = Outbox.settle

    def settle(self: Any, lease: Any, outcome: Any) -> Any:
        self._base.job(lease.job_id).remove()
        return real(self, lease, outcome)

    patch.setattr(Outbox, "settle", settle)


_RUNNER = "tests/unit/test_runner.py::test_"

RULES = {
    "J1": Rule(_write_after_speaking, f"{_RUNNER}the_journal_is_written_before_the_source_hears"),
    "J2": Rule(_never_adopt, "tests/docker/test_docker_engine.py::test_a_lost_answer_does_not_make_a_second_container"),
    "J3": Rule(
        _end_without_joining,
        "tests/unit/test_heartbeat.py::test_nothing_is_said_after_the_end_even_when_a_beat_is_under_way",
    ),
    "J4": Rule(_leases_for_ever, "tests/faults/test_lease.py::test_a_beat_after_a_long_silence_asks_first"),
    "J5": Rule(_blame_the_job, f"{_RUNNER}an_exit_that_nobody_vouches_for_is_given_back"),
    "J6": Rule(_trust_every_exit, f"{_RUNNER}an_exit_that_nobody_vouches_for_is_given_back"),
    "J7": Rule(
        _deadlines_per_read,
        "tests/unit/test_api_client.py::test_a_call_ends_in_time_however_slowly_the_server_speaks",
    ),
    "J8": Rule(
        _try_again_whatever_was_said,
        "tests/faults/test_transfer_faults.py::test_a_missing_object_is_named_at_once",
    ),
    "J9": Rule(_clean_up_first, f"{_RUNNER}an_undeliverable_end_stays_on_record_with_its_files_and_is_told_later"),
}
