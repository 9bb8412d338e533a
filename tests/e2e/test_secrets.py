"""Where a worker's secrets must not appear: its log at DEBUG, the job's box, the journal, details, stored files."""

import json
import re
from pathlib import Path

import pytest

from tests.support.services import wait_until
from tests.support.worker import DEADLINE_S, UNTIL_LET_GO, Lab, command

pytestmark = [pytest.mark.docker, pytest.mark.fault("T10")]

TOKEN, PASSWORD = "planted-token-3f1c", "planted-password-9d2e"
SERVER = {"accounts": f"worker:{PASSWORD}:workers", "tokens": f"{TOKEN}:worker"}

#: Both secrets; a JSON web token, which begins with the code of '{"alg":'; the value of a URL's signature.
SECRET = re.compile(rb"planted-(?:token|password)|eyJhbGciOi|signature=[0-9a-f]{16}")


@pytest.mark.parametrize(
    "lab", [{**SERVER, "file_mode": mode} for mode in ("signed", "local")], ids=["signed", "local"], indirect=True
)
@pytest.mark.parametrize("way", ["token", "password"])
def test_secrets_stay_with_the_worker(lab: Lab, tmp_path: Path, way: str) -> None:
    job = lab.submit(
        "env > /files/out/env; tr '\\0' '\\n' < /proc/1/environ; ls -R /files;",
        UNTIL_LET_GO,
        "; exit 5",
        files_down={"in/x": lab.server.put_input("x", b"x")},
        files_up={"output": "out"},
    )
    missing = lab.server.put_input("y.bak", b"y").removesuffix(".bak")
    failing = lab.submit("true", files_down={"y": missing})  # an error that is about a signed URL
    if way == "token":
        env = lab.env(access_token=TOKEN, log_level="debug")
    else:
        env = lab.env(username="worker", password=PASSWORD, aws_endpoint_url=lab.server.url, log_level="debug")
    with command(["run", "--exit-when-idle", "0.5"], env, tmp_path) as run:
        lab.server.wait_for_state(job, "running")
        wait_until((lab.files(job) / "out" / "env").exists, "the job began", DEADLINE_S)
        (container,) = lab.containers()
        looked_at = {
            "inspect": json.dumps(lab.engine.inspect_container(container["Id"])).encode(),
            "top": json.dumps(lab.engine.top(container["Id"], "-ef")).encode(),
            **{path.name: path.read_bytes() for path in lab.base.iterdir() if path.is_file()},
        }
        if way == "password":
            lab.server.expire_tokens()  # a refresh shows its tokens, too
            wait_until(lambda: len(lab.server.events("sign_in")) == 2, "it signs in again", DEADLINE_S)
        lab.let_go(job)
        assert run.wait() == 0
        looked_at |= {"log": run.errors.encode(), "output": run.output.encode()}
    assert [lab.server.state(one) for one in (job, failing)] == ["error", "error"]
    looked_at |= {f"job {one}": json.dumps(lab.server.job(one)).encode() for one in (job, failing)}
    looked_at |= {f"stored {name}": content for name, content in lab.server.results(job).items()}
    looked_at |= {f"later {path.name}": path.read_bytes() for path in lab.base.iterdir() if path.is_file()}
    looked_at["mails"] = json.dumps(lab.server.outbox()).encode()
    assert {
        "journal.db",
        "journal.db-wal",
        "stored output/out/env",
        "stored log/jobfetcher/container.log",
    } <= looked_at.keys()
    assert b"no job for this machine" in looked_at["log"]  # a line of DEBUG
    found = {where: match[0] for where, content in looked_at.items() if (match := SECRET.search(content))}
    assert found == {}
