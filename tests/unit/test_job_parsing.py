"""core.job: what is refused, with which words, and that what is accepted comes back from JSON unchanged."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from jobfetcher.core.job import (
    MAX_FILES,
    Job,
    JobPath,
    Needs,
    OutputKind,
    OutputTree,
    check_distinct,
    parse_file_ref,
    parse_job_id,
    parse_job_path,
    parse_output_path,
)
from tests.support.jobs import make_job


@pytest.mark.parametrize("text", ["7", "a", "A-1_b", "0" * 64])
def test_plain_ids_are_job_ids(text: str) -> None:
    assert parse_job_id(text) == text


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("/etc/passwd", "absolute"),
        ("a/../b", "'..'"),
        ("./a", "'.'"),
        ("a//b", "empty"),
        ("", "empty"),
        ("a\\b", "backslash"),
        ("a\nb", "control"),
        ("a\u2028b", "control"),
        ("a\udc80", "control"),
        ("x" * 256, "255 bytes"),
        ("ä" * 128, "255 bytes"),
        ("/".join(["x" * 200] * 21), "4096 bytes"),
    ],
)
def test_the_reason_for_refusing_a_path_is_said(text: str, why: str) -> None:
    with pytest.raises(ValueError, match="path") as refused:
        parse_job_path(text)
    assert why in str(refused.value)
    assert str(refused.value).isprintable()


def test_the_longest_lawful_segment_and_path_are_taken() -> None:
    path = "/".join(["x" * 255] * 16)
    assert len(path) == 4095
    assert parse_job_path(path) == path


def test_an_output_directory_may_be_written_as_people_write_directories() -> None:
    assert parse_output_path("out/") == "out"
    assert parse_output_path("./out/b") == "out/b"
    for whole in (".", "./"):
        assert parse_output_path(whole) == "."
        assert OutputTree(kind=OutputKind.OUTPUT, path=parse_output_path(whole)).parts == ()
    assert OutputTree(kind=OutputKind.OUTPUT, path=parse_output_path("a/b")).parts == ("a", "b")
    for text in ("out//", "/", "", "..", "./..", ".//out", "././out", "out/.", "./.", "../."):
        with pytest.raises(ValueError, match="path"):
            parse_output_path(text)


@pytest.mark.parametrize("text", ["s3://bucket/key", "/data/user/a.tif", "a", "a//b", "s3://b/%2e%2e/x", "...", "ä ö"])
def test_file_ids_of_real_servers_are_taken_as_they_are(text: str) -> None:
    assert parse_file_ref(text) == text


def test_many_deep_paths_are_compared_in_time() -> None:
    paths = [JobPath(f"{number}/" + "/".join("a" * 1500)) for number in range(500)]
    check_distinct(paths)  # 500 * 1,500 parents; the test's own time limit is the assertion


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("a", "a"),
        ("Data/x", "data/X"),
        ("stra\u00dfe", "STRASSE"),
        ("caf\u00e9", "cafe\u0301"),  # composed and decomposed e with acute
        ("\u0390", "\u03aa\u0301"),  # equal only when folded and composed again
        ("\ufb01le", "FILE"),  # the ligature fi folds to two letters
    ],
)
def test_names_that_some_filesystem_confuses_are_one_file(first: str, second: str) -> None:
    with pytest.raises(ValueError, match="same file"):
        check_distinct([parse_job_path(first), parse_job_path(second)])


@pytest.mark.parametrize(("outer", "inner"), [("a", "a/b"), ("A", "a/b/c"), ("x/Y", "X/y/z")])
def test_a_file_cannot_be_a_folder_of_another(outer: str, inner: str) -> None:
    for pair in ([outer, inner], [inner, outer]):
        with pytest.raises(ValueError, match="file and a directory"):
            check_distinct(map(parse_job_path, pair))


def test_neighbours_are_fine() -> None:
    check_distinct(map(parse_job_path, ["a/b", "a/c", "ab", "a.b", "a b"]))


def test_outputs_may_nest_and_coincide() -> None:
    job = make_job(outputs={"output": "out", "artifact": "out", "log": "out/logs/"})
    assert [(tree.kind, tree.path) for tree in job.outputs] == [
        (OutputKind.OUTPUT, "out"),
        (OutputKind.ARTIFACT, "out"),
        (OutputKind.LOG, "out/logs"),
    ]


@pytest.mark.fault("B15")
def test_more_than_ten_thousand_files_are_refused() -> None:
    make_job(inputs={f"in/{n}": "s3://b/k" for n in range(MAX_FILES)})
    with pytest.raises(ValidationError, match=str(MAX_FILES)):
        make_job(inputs={f"in/{n}": "s3://b/k" for n in range(MAX_FILES + 1)})


@pytest.mark.parametrize(
    "changes",
    [
        {"env": {"": "x"}},
        {"env": {"A=B": "x"}},
        {"env": {"A\0": "x"}},
        {"env": {"A": "x\0"}},
        {"env": {"A": "\ud800"}},
        {"env": {"\udfff": "x"}},
        {"command": ["a\0b"]},
        {"command": ["\ud800"]},
        {"labels": {"entrypoint": "\0"}},
        {"labels": {"\udc00": "fit"}},
        {"user_job_id": "\udc00"},
        {"image": ""},
        {"image": "x" * 1025},
        {"image": "\ud800"},
        {"needs": {"gpu_model": "\ud800"}},
        {"needs": {"gpu_archi": "\0"}},
        {"needs": {"cpu_cores": float("nan")}},
        {"needs": {"cpu_cores": 0}},
        {"needs": {"memory_mib": 0}},
        {"needs": {"gpu_mem_mib": -1}},
        {"surprise": 1},
    ],
)
def test_what_no_machine_could_run_is_no_job(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        make_job(**changes)


def test_needs_tell_no_gpu_from_no_opinion() -> None:
    assert Needs().gpu is None
    assert Needs(gpu_mem_mib=0).gpu is False
    assert Needs(gpu_mem_mib=1).gpu is True
    assert Needs(gpu_model="x").gpu is True
    assert Needs(gpu_mem_mib=0, gpu_archi="8.6").gpu is True


_texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)


@given(
    command=st.none() | st.lists(_texts, max_size=4),
    label=st.none() | _texts,
    env=st.dictionaries(_texts.filter(lambda name: name != "" and "=" not in name), _texts, max_size=4),
    names=st.lists(st.from_regex(r"[a-z]{1,8}(/[a-z]{1,8}){0,3}", fullmatch=True), unique=True, max_size=1),
)
def test_every_job_comes_back_from_the_journals_json(
    command: list[str] | None, label: str | None, env: dict[str, str], names: list[str]
) -> None:
    labels = {} if label is None else {"entrypoint": label}
    job = make_job(command=command, labels=labels, user_job_id=label, env=env, inputs=dict.fromkeys(names, "s3://b/k"))
    assert Job.model_validate_json(job.model_dump_json()) == job


@pytest.mark.fault("F12")
@pytest.mark.parametrize(("label", "labels"), [("fit", {"entrypoint": "fit"}), (None, {})])
def test_a_journal_that_holds_the_label_as_a_field_of_its_own_is_read(
    label: str | None, labels: dict[str, str]
) -> None:
    older = make_job().model_dump() | {"entrypoint": label}
    del older["labels"], older["user_job_id"]
    assert Job.model_validate_json(json.dumps(older)) == make_job(labels=labels)
