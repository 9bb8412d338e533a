"""Who vouches for an exit: the rules of `engine.vouch`, on events and times as engines tell them."""

from typing import Any

import pytest

from jobfetcher.engine.vouch import Memory, engine_is_older, genuine

MINE, OTHER = "a" * 64, "b" * 64


def events(*told: str) -> list[dict[str, Any]]:
    """Events such as `die` (of the container) or `other:create` (of another one), oldest first."""
    names = [name.rpartition(":") for name in told]
    return [{"Action": action, "Actor": {"ID": OTHER if other else MINE}} for other, _, action in names]


def vouched(*told: str, code: int = 0, present: bool = False, older: bool = False, by_us: bool = False) -> bool:
    return genuine(Memory.of(events(*told), MINE), code, present=present, older=older, by_us=by_us)


def test_an_engine_that_remembers_the_whole_run_vouches() -> None:
    assert vouched("create", "start", "die")
    assert vouched("create", "start", "die", code=3)


def test_another_containers_create_says_as_well_that_the_api_was_open() -> None:
    assert vouched("other:create", "other:start", "die")
    assert not vouched("other:start", "die"), "a start may be by a restart policy"
    assert not vouched("die", "other:create"), "it came after the end"


def test_the_end_alone_is_none_of_the_engines_own_start() -> None:
    assert not vouched("kill", "die", code=143)
    assert not vouched("die")
    assert not vouched()
    assert vouched("die", present=True)
    assert not vouched(present=True), "who saw it end has gone since, and took the memory along: it may have ended it"


def test_an_engine_that_is_older_than_the_run_needs_no_memory() -> None:
    assert vouched(older=True)


@pytest.mark.parametrize("witness", [{"present": True}, {"older": True}, {}])
def test_exit_0_after_a_signal_from_outside_is_no_success(witness: dict[str, bool]) -> None:
    run = ("create", "start", "kill", "die")
    assert not vouched(*run, code=0, **witness)
    assert vouched(*run, code=137, **witness), "it did not end well anyway; the job's owner is told"
    assert vouched(*run, code=0, by_us=True, **witness)


@pytest.mark.parametrize(
    "told",
    [
        ("create", "start", "die", "start", "die"),
        ("start", "start", "die"),
        ("die", "start", "die"),
    ],
)
def test_a_run_that_somebody_started_again_is_not_ours(told: tuple[str, ...]) -> None:
    assert not vouched(*told, present=True, older=True)


def test_older_means_started_before_the_container_was() -> None:
    bridge, start, end = "2026-01-01T10:00:00.1Z", "2026-01-01T10:00:00.123456789Z", "2026-01-01T11:00:00Z"
    assert engine_is_older(bridge, False, start, end)
    assert engine_is_older("2026-01-01T12:00:00.1+02:00", False, start, end)
    assert not engine_is_older("2026-01-01T10:00:00.2Z", False, start, end)
    assert not engine_is_older(bridge, True, start, end), "with live-restore a bridge outlives its engine"
    assert engine_is_older(bridge, False, end, start), "a short run: containerd notes the end, dockerd the start, late"
    assert not engine_is_older(end, False, "2026-01-01T12:00:00Z", start), "the clock was set back before the restart"
