"""The peers' side: nginx as a store that is no bottleneck, and `curl`. Used by transfers.py and memory.py.

nginx listens on loopback, http and https, and knows no signatures: it serves whatever is asked for, so neither side
signs. Its URLs are those of mock_api's signed storage, so that with MOCK_API_STORAGE_URL it moves the files of jobs.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.services import answers, free_port, require_program, running
from tests.support.transfers import Authority

# One worker per core, files straight from and to the page cache, bodies in pieces of 1 MiB instead of 16 KiB. A form is
# spooled to a file as a store must, and then thrown away: the second server is only there to say 204 with an ETag.
_CONFIG = """\
{user} worker_processes auto; daemon off; pid {folder}/pid; error_log {folder}/errors;
events {{ worker_connections 1024; }}
http {{
  log_format bytes "$request_method $status $body_bytes_sent"; access_log {folder}/requests bytes;
  sendfile on; tcp_nodelay on; keepalive_requests 10000000; client_max_body_size 0; client_body_buffer_size 1m;
  client_body_temp_path {folder}/bodies; proxy_temp_path {folder}/t1; fastcgi_temp_path {folder}/t2;
  uwsgi_temp_path {folder}/t3; scgi_temp_path {folder}/t4; default_type application/octet-stream;
  server {{
    listen 127.0.0.1:{http}; listen 127.0.0.1:{https} ssl;
    ssl_certificate {certificate}; ssl_certificate_key {certificate};
    location / {{ return 200; }}
    location /_storage/ {{ alias {served}/; }}
    location = /_storage {{ client_body_in_file_only clean; proxy_pass http://127.0.0.1:{done}; proxy_set_body off; }}
    location /stored/ {{ root {folder}; dav_methods PUT; }}
  }}
  server {{ listen 127.0.0.1:{done}; access_log off; location / {{ add_header ETag '"stored"'; return 204; }} }}
}}
"""


@dataclass(frozen=True)
class Nginx:
    """A running nginx. `http` and `https` are origins; `ca` is the file to trust for the second.

    GET `/_storage/NAME` is a file of `served`; PUT `/stored/NAME` is kept in `stored`; POST `/_storage` takes a form.
    """

    http: str
    https: str
    ca: Path
    served: Path
    stored: Path
    _log: Path

    @property
    def port(self) -> int:
        """Of http."""
        return int(self.http.rpartition(":")[2])

    def requests(self) -> list[tuple[str, int, int]]:
        """Method, status and bytes of body sent, of every request that has ended."""
        lines = (line.split() for line in self._log.read_text().splitlines())
        return [(method, int(status), int(size)) for method, status, size in lines]


@contextlib.contextmanager
def running_nginx(folder: Path, served: Path) -> Iterator[Nginx]:
    """nginx with all its files below `folder` (made here), for the length of the block."""
    program = require_program("nginx", "nginx-light")
    (folder / "stored").mkdir(parents=True)
    authority = Authority(folder)
    authority.server()
    (certificate,) = folder.glob("server*.pem")
    http, https, done = free_port(), free_port(), free_port()
    user = "user root;" if os.geteuid() == 0 else ""  # else its workers are `nobody`, who may read nothing here
    config = folder / "nginx.conf"
    config.write_text(
        _CONFIG.format(
            user=user, folder=folder, http=http, https=https, done=done, certificate=certificate, served=served
        )
    )
    argv = [program, "-c", str(config), "-p", str(folder), "-e", str(folder / "errors")]
    origin = f"http://127.0.0.1:{http}"
    with running(argv, folder / "output", lambda: answers(origin)):
        yield Nginx(
            origin, f"https://127.0.0.1:{https}", authority.file, served, folder / "stored", folder / "requests"
        )


def curl(*arguments: str) -> str:
    """Run curl with its own defaults (no .curlrc, no proxy), and return what it prints. Raises when it fails."""
    program = require_program("curl", "curl")
    command = [
        program,
        "--disable",
        "--silent",
        "--no-progress-meter",
        "--show-error",
        "--fail",
        "--noproxy",
        "*",
        *arguments,
    ]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def curl_seconds(*arguments: str) -> float:
    """How long curl says that one transfer took: without its own start and end, which a worker has not either."""
    return float(curl("--write-out", "%{time_total}", *arguments))


def curl_config(path: Path, entries: Sequence[str]) -> Path:
    """A config file that makes curl move many files at once, 16 at a time, and say nothing."""
    path.write_text("\n".join(["parallel", "parallel-max = 16", 'write-out = ""', *entries]) + "\n")
    return path
