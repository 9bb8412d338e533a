"""The demo's own parts: two at once do not meet, its pictures, and rights that are looked at before anything else."""

import os
import shutil
import socket
import struct
import subprocess
import tempfile
import zlib
from pathlib import Path

import pytest

from demo import run

ENGINE = Path(__file__).parents[2] / "scripts" / "engine"
NOBODY = 65534


def test_two_demos_at_once_have_a_directory_each_and_the_next_one_has_the_first_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "BUILD", tmp_path / "build")
    with run._directory() as first:
        (first / "results" / "x").touch()
        with run._directory() as second, run._directory() as third:
            assert [path.name for path in (first, second, third)] == ["demo", "demo-2", "demo-3"]
            assert (first / "results" / "x").exists()
    with run._directory() as again:
        assert again == first
        assert list((again / "results").iterdir()) == []


def test_the_result_is_the_picture_beside_its_mask() -> None:
    picture = run._read_pgm(b"P5\n# a comment\n2 2\n255\n\x01\x02\x03\x04")
    mask = run._read_pgm(b"P5\n2 2\n255\n\xff\x00\x00\xff")
    png = run._side_by_side(picture, mask)
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", png[16:24]) == (2 + run.BAR_PIXELS + 2, 2)
    start = png.index(b"IDAT") + 4
    rows = zlib.decompress(png[start : start + struct.unpack(">I", png[start - 8 : start - 4])[0]])
    bar = b"\xff" * run.BAR_PIXELS
    assert rows == b"\0\x01\x02" + bar + b"\xff\x00" + b"\0\x03\x04" + bar + b"\x00\xff"


@pytest.mark.parametrize("content", [b"P5\n2 2\n255\n\x00", b"P6\n2 2\n255\n\x00\x00\x00\x00", b""])
def test_what_is_no_picture_is_said(content: bytes) -> None:
    with pytest.raises(run.DemoError, match=r"mask\.pgm is not a picture"):
        run._read_pgm(content)


def engine_script(top: Path, python: str = "") -> "subprocess.CompletedProcess[str]":
    """Run the script in a checkout at `top` whose .venv is missing, or has `python` as its Python; a dockerd that it
    starts is a stand-in that leaves `top/started`."""
    (top / "scripts").mkdir()
    script = shutil.copy(ENGINE, top / "scripts")
    programs = {top / "bin" / "dockerd": f"touch {top}/started"}
    if python:
        programs[top / ".venv" / "bin" / "python"] = python
    for program, does in programs.items():
        program.parent.mkdir(parents=True)
        program.write_text(f"#!/bin/sh\n{does}\n")
        program.chmod(0o755)
    environ = {"PATH": f"{top / 'bin'}:{os.environ['PATH']}"}  # and no DOCKER_HOST: the engine of this machine
    return subprocess.run(["bash", script], env=environ, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["start"], [""], ["--rights", "--rights"]])
def test_the_script_of_the_engine_does_nothing_for_words_that_it_does_not_know(words: list[str]) -> None:
    environ = {"PATH": os.environ["PATH"], "DOCKER_HOST": "unix:///nowhere.sock"}
    ended = subprocess.run(
        ["bash", str(ENGINE), *words], env=environ, capture_output=True, text=True, timeout=30, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", "usage: scripts/engine [--rights]\n")


@pytest.mark.docker
def test_no_second_engine_is_started_where_there_is_no_virtual_environment(tmp_path: Path) -> None:
    ended = engine_script(tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
    assert not (tmp_path / "started").exists()


@pytest.mark.docker
@pytest.mark.skipif(os.geteuid() != 0, reason="only root starts an engine")
def test_no_second_engine_is_started_beside_one_that_does_not_answer(tmp_path: Path) -> None:
    ended = engine_script(tmp_path, python="echo timed out >&2; exit 1")
    assert ended.returncode == 1
    assert "holds /var/run/docker.sock and does not answer, so no second one is started: timed out\n" in ended.stderr
    assert not (tmp_path / "started").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_rights_to_the_engine_are_looked_at_without_anything_installed() -> None:
    """With the system's own Python, and none of the checkout's."""
    with tempfile.TemporaryDirectory() as name, socket.socket(socket.AF_UNIX) as listening:
        top = Path(name)
        top.chmod(0o755)
        (top / "scripts").mkdir()
        script = Path(shutil.copy(ENGINE, top / "scripts"))  # others may not be let into the checkout
        path = top / "engine.sock"
        listening.bind(str(path))
        listening.listen()
        path.chmod(0o600)

        def ask(user: int) -> "subprocess.CompletedProcess[str]":
            command = ["bash", str(script), "--rights"]
            environ = {"PATH": os.environ["PATH"], "DOCKER_HOST": f"unix://{path}"}
            return subprocess.run(
                command, env=environ, user=user, capture_output=True, text=True, timeout=30, check=False, cwd="/"
            )

        assert ask(0).returncode == 0
        refused = ask(NOBODY)
        assert refused.returncode == 1
        assert f"DOCKER_HOST=unix://{path} does not answer: Permission denied" in refused.stderr
        path.chmod(0o666)
        assert ask(NOBODY).returncode == 0
