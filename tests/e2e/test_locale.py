"""Names on disk are UTF-8, whatever LANG says; and another spelling of the API's address is the same server."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.services import REPOSITORY, require, require_program
from tests.support.worker import UNTIL_LET_GO, Lab, command

NAME = "größe-ß.txt"


@pytest.fixture(scope="module")
def latin(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of somebody whose locale is the old German one, compiled for this test."""
    require_program("localedef", "libc-bin")
    require(Path("/usr/share/i18n/locales/de_DE").exists() or None, "the sources of locales (package locales)")
    folder = tmp_path_factory.mktemp("locales")
    done = subprocess.run(
        ["localedef", "-i", "de_DE", "-f", "ISO-8859-1", str(folder / "de_DE.ISO-8859-1")],
        capture_output=True,
        text=True,
    )
    assert (folder / "de_DE.ISO-8859-1").is_dir(), done.stderr  # it may warn and exit 1 all the same
    env = {"LOCPATH": str(folder), "LC_ALL": "de_DE.ISO-8859-1"}
    said = subprocess.run(
        [sys.executable, "-c", "import sys; print(sys.getfilesystemencoding())"],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.strip() == "iso8859-1"
    return env


@pytest.mark.docker
def test_an_input_has_its_name_in_utf_8_and_comes_back_under_it(
    lab: Lab, tmp_path: Path, latin: dict[str, str]
) -> None:
    file_id = lab.server.put_input("in.txt", b"content")
    job = lab.submit(
        UNTIL_LET_GO,
        f"; cp '/files/data/{NAME}' '/files/out/{NAME}'",
        files_down={f"data/{NAME}": file_id},
        files_up={"output": "out"},
    )
    with command(["run", "--once"], {**lab.env(), **latin}, tmp_path) as run:
        lab.server.wait_for_state(job, "running")
        assert os.listdir(os.fsencode(lab.files(job) / "data")) == [NAME.encode()]
        lab.let_go(job)
        assert run.wait() == 0
    assert lab.server.results(job)[f"output/out/{NAME}"] == b"content"


@pytest.mark.docker
@pytest.mark.parametrize("how", ["-m", "script"])
def test_the_process_stays_the_same(lab: Lab, tmp_path: Path, how: str) -> None:
    """It starts anew in the same process, so that whoever supervises it sees one; also where it is a script."""
    env = {**lab.env(timeout_job="60"), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    script = Path(sys.executable).with_name("jobfetcher")
    prefix = [] if how == "-m" else ["/bin/sh", "-c", f'exec "{script}" run', "sh"]
    with command(["run"], env, tmp_path, prefix=prefix) as run:
        run.wait_for("the server answers")
        arguments = Path(f"/proc/{run.pid}/cmdline").read_bytes().split(b"\0")
        assert arguments[1:3] == [b"-X", b"utf8"]
        run.send(signal.SIGTERM)
        assert run.wait(10.0) == 0


def test_who_uses_the_package_by_itself_is_told() -> None:
    code = (
        "from jobfetcher import build, settings\n"
        "from jobfetcher.core.errors import ConfigError\n"
        "try:\n"
        "    build.make_transfer(settings.Settings(api_url='https://h', path_base='/nowhere'))\n"
        "except ConfigError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "set PYTHONUTF8=1" in done.stdout


@pytest.mark.docker
def test_another_spelling_of_the_address_is_the_same_server(lab: Lab, tmp_path: Path) -> None:
    job = lab.submit(UNTIL_LET_GO)
    port = lab.server.url.rpartition(":")[2]
    with command(["run"], lab.env(stop_mode="detach", api_url=f"http://LOCALHOST:{port}//"), tmp_path) as run:
        lab.server.wait_for_state(job, "running")
        run.send(signal.SIGTERM)
        assert run.wait(10.0) == 0
    with command(["run", "--exit-when-idle", "0.3"], lab.env(api_url=f"HTTP://localhost:{port}"), tmp_path) as run:
        run.wait_for("going on with it where it was left")
        lab.let_go(job)
        assert run.wait() == 0
    assert lab.ended(job) == ("finished", "")
