"""refusals: each one in a row makes the next wait longer; a day, or being let in, ends the row."""

from pathlib import Path

from jobfetcher import refusals


def test_waits_grow_up_to_a_quarter_of_an_hour(tmp_path: Path) -> None:
    waits = [refusals.another(tmp_path, lambda: 1000.0) for _ in range(10)]
    assert waits == [5, 10, 20, 40, 80, 160, 320, 640, 900, 900]
    assert [path.name for path in tmp_path.iterdir()] == [refusals.NAME]


def test_a_row_ends_after_a_day_with_being_let_in_and_where_the_clock_went_back(tmp_path: Path) -> None:
    moments = iter([0.0, 86_000.0, 172_500.0])
    assert [refusals.another(tmp_path, lambda: next(moments)) for _ in range(3)] == [5, 10, 5]
    assert refusals.another(tmp_path, lambda: 0.0) == 5
    assert refusals.another(tmp_path, lambda: 1.0) == 10
    refusals.forget(tmp_path)
    refusals.forget(tmp_path)
    assert refusals.another(tmp_path, lambda: 2.0) == 5


def test_a_note_that_cannot_be_read_or_written_stops_nothing(tmp_path: Path) -> None:
    for nonsense in ("", "[]", "{}", '{"count": "x", "at": null}', "\x00"):
        (tmp_path / refusals.NAME).write_text(nonsense)
        assert refusals.another(tmp_path, lambda: 0.0) == 5
    assert refusals.another(tmp_path / "nowhere", lambda: 0.0) == 900
