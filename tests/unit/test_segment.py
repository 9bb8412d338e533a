"""demo/segment.sh, the demo's job, on small images whose answer is known."""

import csv
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "demo" / "segment.sh"

# Three sets of bright pixels. The largest is a hook whose arms meet in the last row only, so that its runs are joined
# late; the one at the right touches it at a corner, which does not count.
PICTURE = """
.......
##.....
......#
...#.#.
...#.#.
...###.
"""


def pgm(picture: str) -> bytes:
    rows = picture.split()
    pixels = bytes(200 if mark == "#" else 10 for row in rows for mark in row)
    return b"P5\n# a comment, 12 34\n%d %d\n255\n" % (len(rows[0]), len(rows)) + pixels


def segment(tmp_path: Path, image: bytes, scale: str = "0.5") -> subprocess.CompletedProcess[str]:
    (tmp_path / "image.pgm").write_bytes(image)
    return subprocess.run(
        ["sh", SCRIPT, tmp_path / "image.pgm", tmp_path / "out", tmp_path / "log", scale],
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_largest_connected_set_is_measured_and_masked(tmp_path: Path) -> None:
    done = segment(tmp_path, pgm(PICTURE))
    assert done.returncode == 0, done.stderr
    with (tmp_path / "out" / "measurements.csv").open() as file:
        found = {row["quantity"]: row["value"] for row in csv.DictReader(file)}
    assert found == {
        "width": "7",
        "height": "6",
        "otsu_threshold": "10",
        "pixels_above_threshold": "10",
        "area_above_threshold": "2.5",
        "diameter_above_threshold": "1.78",  # 2 * sqrt(2.5 / pi)
        "objects": "3",
        "cell_pixels": "7",
        "cell_area": "1.8",  # 7 * 0.5 * 0.5 = 1.75
        "cell_diameter": "1.49",
        "cell_centroid_x": "4.0",
        "cell_centroid_y": "4.1",  # (2 * 3 + 2 * 4 + 3 * 5) / 7
        "cell_left": "3",
        "cell_top": "3",
        "cell_right": "5",
        "cell_bottom": "5",
    }
    mask = "".join("#" if mark == "#" and row > 2 else "." for row, line in enumerate(PICTURE.split()) for mark in line)
    expected = bytes(255 if mark == "#" else 0 for mark in mask)
    assert (tmp_path / "out" / "mask.pgm").read_bytes() == b"P5\n7 6\n255\n" + expected
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["mask.pgm", "measurements.csv"]
    assert "the largest has 7 pixels" in (tmp_path / "log" / "segment.log").read_text()


@pytest.mark.parametrize(
    ("image", "why"),
    [
        (pgm("....\n...."), "all pixels have the same value"),
        (pgm(PICTURE)[:-1], "7 x 6 pixels and has 41"),
        (b"P6\n1 1\n255\n\0\0\0", "not a binary PGM"),
        (b"", "no header"),
    ],
)
def test_an_image_that_cannot_be_segmented_is_refused_with_a_reason(tmp_path: Path, image: bytes, why: str) -> None:
    done = segment(tmp_path, image)
    assert done.returncode != 0
    assert why in done.stderr
    assert why in (tmp_path / "log" / "segment.log").read_text()
