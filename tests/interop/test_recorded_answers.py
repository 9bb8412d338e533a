"""The mock answers as deployed servers did: same status, type and headers, and a body of the same kind.

The records are of two servers of the deployed version, one with S3 storage and PostgreSQL, one with local-disk storage
and SQLite. They hold the answers in which the mock once differed; what still differs is listed here, with its reason.
"""

from collections import Counter
from contextlib import ExitStack

import pytest

from tests.interop.shapes import Answer, differences
from tests.interop.story import LOCAL_DISK, S3, Record, Story, records
from tests.support.mock_server import running_mock_api

#: What differs on purpose: in which respects, and why.
DIFFERENT: dict[tuple[str, str], tuple[set[str], str]] = {
    (S3, "jobs memory 2^63"): (
        {"status", "content type", "body"},
        "The mock keeps its jobs in SQLite, which knows no number beyond 64 bits: it answers as the deployed server on"
        " SQLite does; PostgreSQL compares it.",
    ),
    (S3, "status get huge id"): ({"status", "content type", "body"}, "As before: PostgreSQL finds no such job."),
    (LOCAL_DISK, "upload dotdot"): (
        {"status", "body"},
        "The deployed server lets `..` in a base_path out of its directory, which is a hole; the mock runs on people's"
        " own machines and refuses to write there.",
    ),
}

FILE_MODES = {S3: "signed", LOCAL_DISK: "local"}
RECORDS = list(records())


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Answer]:
    """The mock's answer to every recorded request, each server's story told once and in order."""
    answers: dict[tuple[str, str], Answer] = {}
    for server, mode in FILE_MODES.items():
        with ExitStack() as clients:
            mock = clients.enter_context(running_mock_api(tmp_path_factory.mktemp(mode), file_mode=mode))
            story = Story(mock, clients)
            for record in RECORDS:
                if record.server == server:
                    answers[record.server, record.case] = story.tell(record)
    return answers


@pytest.mark.fault("S20")
@pytest.mark.parametrize("record", RECORDS, ids=lambda record: f"{record.server}: {record.case}")
def test_the_mock_answers_as_the_deployed_server_did(record: Record, told: dict[tuple[str, str], Answer]) -> None:
    mock = told[record.server, record.case]
    expected, _ = DIFFERENT.get((record.server, record.case), (set(), ""))
    assert differences(record.answer, mock) == expected, f"recorded {record.answer}, the mock {mock}"


def test_every_difference_is_of_a_record_and_has_a_reason() -> None:
    assert set(DIFFERENT) <= {(record.server, record.case) for record in RECORDS}
    assert all(aspects and reason.endswith(".") for aspects, reason in DIFFERENT.values())


def test_all_130_records_are_there_each_once() -> None:
    assert len(RECORDS) == 130
    assert set(Counter((record.server, record.case) for record in RECORDS).values()) == {1}
