"""The story that the recorded answers tell, told again to the mock: pull, beats, uploads, release, another account, the
end, a late beat, a deletion by the user.

Only answers that once differed are recorded. What happened between them, and was answered alike, stands here by the
name of the record that it comes before.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx

from tests.interop.shapes import HEADERS, Answer
from tests.mock_api.calls import put
from tests.support.mock_server import MockServer, job_spec

RECORDS = Path(__file__).with_name("worker_api_answers.jsonl")

S3 = "S3 storage"
LOCAL_DISK = "local-disk storage"

#: The job that the recorded servers handed out.
CMD = [
    "mkdir -p /files/out/sub /files/log /files/model/ep1 &&",
    "find /files/config /files/data /files/artifact -type f -exec wc -c {} + > /files/out/sub/all.txt &&",
    "ls -R /files > /files/log/ls.log &&",
    "echo model > /files/model/ep1/w.bin &&",
    "echo hello from job $NAME",
]

#: Of records without a request: who asks for jobs.
_ASKS_FOR_JOBS = {
    "jobs no token": "nobody",
    "jobs garbage token": "Bearer abc",
    "jobs basic": "Basic YTpi",
    "jobs empty bearer": "Bearer",
    "jobs not in group": "account without the group workers",
}

#: Which file a record's `{f}` is, below the folder of the inputs; the others mean `data/d1/a.txt`.
_FILES = {
    "file url of a prefix (a.t)": "data/d1/a.t",
    "download of prefix": "data/d1/a.t",
    "file url of folder": "data/d1",
}


@dataclass(frozen=True)
class Record:
    """One recorded answer, and the request that it was to."""

    case: str
    server: str
    request: dict[str, Any]
    answer: Answer


def records() -> Iterator[Record]:
    """Everything recorded, in order."""
    for line in RECORDS.read_text().splitlines():
        entry = json.loads(line)
        asked = {"method": "GET", "path": "/jobs", "params": {"memory": 1}, "who": _ASKS_FOR_JOBS.get(entry["case"])}
        headers = {name: _from_path(value) for name, value in entry["headers"].items()}
        answer = Answer(entry["status"], entry["content_type"], headers, entry["body"])
        yield Record(entry["case"], entry["server"], entry.get("request", asked), answer)


class Story:
    """The mock, the accounts, and the job that the story is at."""

    def __init__(self, mock: MockServer, clients: ExitStack) -> None:
        self._mock = mock
        self._file = mock.put_input("data/d1/a.txt", b"A" * 1000)
        self._client = clients.enter_context(httpx.Client(base_url=mock.url, trust_env=False))
        self._tokens: dict[str, str] = {"nobody": ""}
        for who, groups in (
            ("holder", ["workers"]),
            ("another worker account", ["workers"]),
            ("account without the group workers", ["users"]),
        ):
            name = who.replace(" ", "-")
            mock.add_account(name, "a-password", groups=groups, token=f"token-of-{name}")
            self._tokens[who] = f"Bearer token-of-{name}"
        self._holder, self._other = (
            clients.enter_context(httpx.Client(base_url=mock.url, headers=self._as(who), trust_env=False))
            for who in ("holder", "another worker account")
        )
        self._job = 0
        self._before: dict[str, Callable[[], None]] = {
            "put status of queued job by stranger": self._submit,
            "pull by other": self._release,
            "files url after finished": self._finish,
            "pull (2)": self._submit,
            "status get of deleted": self._delete,
            "pull limit 5": self._submit,
        }

    def tell(self, record: Record) -> Answer:
        """Do what came before the record, send its request, and return the mock's answer."""
        self._before.get(record.case, lambda: None)()
        asked = record.request
        path = asked["path"].replace("{id}", str(self._job)).replace("{f}", self._file_id(record.case))
        files = {"file": ("u.txt", b"abc")} if "files" in asked else None
        answer = self._client.request(
            asked["method"], path, params=asked.get("params"), headers=self._as(asked["who"]), files=files
        )
        headers = {name: _from_path(answer.headers[name]) for name in HEADERS if name in answer.headers}
        return Answer(answer.status_code, answer.headers.get("content-type"), headers, answer.text)

    def _as(self, who: str) -> dict[str, str]:
        token = self._tokens.get(who, who)
        return {"Authorization": token} if token else {}

    def _file_id(self, case: str) -> str:
        file_id = self._file.replace("data/d1/a.txt", _FILES.get(case, "data/d1/a.txt"))
        return file_id if case == "file url unquoted colon" else quote(file_id)

    def _submit(self) -> None:
        handler = {"image_url": "busybox", "files_up": {"output": "out", "log": "log", "artifact": "model"}}
        app = {"cmd": CMD, "env": {"NAME": "x"}}
        self._job = self._mock.submit(job_spec(app=app, handler=handler, hardware={"memory": 1, "cpu_cores": 1}))

    def _release(self) -> None:
        assert put(self._holder, self._job, "queued") == 204

    def _finish(self) -> None:
        for state in ("preprocessing", "running", "postprocessing", "finished"):
            assert put(self._other, self._job, state) == 204

    def _delete(self) -> None:
        self._mock.delete(self._job)


def _from_path(value: str) -> str:
    parts = urlsplit(value)
    return f"{parts.path}?{parts.query}" if parts.netloc else value
