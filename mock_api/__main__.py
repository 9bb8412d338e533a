"""The command `jobfetcher-mock-api` (or `python -m mock_api`): start the server and print its URL."""

import argparse
import contextlib
import errno
import os
import socket
import sys
from collections.abc import Sequence
from typing import Any

import uvicorn
from pydantic.fields import FieldInfo

from mock_api.app import DATABASE, create_app
from mock_api.database import Database
from mock_api.settings import Settings

_EXAMPLE = """\
A first round, with the server on port 8000:

  curl -T demo/cell.pgm localhost:8000/user/files/cell.pgm        # store an input: prints its file_id
  curl localhost:8000/user/jobs --json '{"app": {"cmd": ["wc -c /files/data/cell.pgm > /files/out/size"]},
      "handler": {"image_url": "busybox", "files_down": {"data/cell.pgm": "s3://mock-api/inputs/cell.pgm"},
                  "files_up": {"output": "out"}}}'
  API_URL=http://localhost:8000 ACCESS_TOKEN=mock-token jobfetcher run --once
  curl localhost:8000/user/jobs/1                            # state, details, history
  curl localhost:8000/user/jobs/1/files/output/out/size      # the result

The page http://localhost:8000/ lists the jobs; /openapi.json every call; /_mock/events the record;
/_mock/violations what the worker did wrong. A worker uses the token `mock-token`, or signs in as `worker`
with the password `worker-password` where AWS_ENDPOINT_URL is the address of this server. Every option can
also be set as MOCK_API_<OPTION>; MOCK_API_S3_SECRET_KEY only so, since others can read a command line.
It is a test server: its user side asks for no password."""


_BANNER = """\
  in a worker's .env:  API_URL={url}  and ACCESS_TOKEN=mock-token
  or, to sign in:      API_URL={url}  AWS_ENDPOINT_URL={url}  USERNAME=worker  PASSWORD=worker-password
  {elsewhere}
  jobs on a page:      {url}/     a first round to type: jobfetcher-mock-api --help
"""
_ANY_ADDRESS = ("0.0.0.0", "::", "")  # noqa: S104 - compared with what the user asked for


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the server until Ctrl-C. Exits 2, with one line on stderr, on a bad setting or an address in use."""
    given = vars(_parser().parse_args(arguments))
    host, port = given.pop("host"), given.pop("port")
    try:
        settings = Settings.from_env(os.environ, **{name: value for name, value in given.items() if value is not None})
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        Database(settings.data_dir / DATABASE).close()
        listener = _listen(host, port)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"jobfetcher-mock-api: {error}\n")
        raise SystemExit(2) from None
    _say(host, listener.getsockname()[1], settings)
    server = uvicorn.Server(uvicorn.Config(create_app(settings), log_level="warning", ws="none"))
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn passes Ctrl-C on after it has stopped
        server.run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A listening socket for uvicorn, made here so that port 0 is known before the start. Raises `OSError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=512)
    # connections inherit it; asyncio sets it only where a socket names its protocol, as this one does not. Without it
    # Nagle's algorithm and delayed acknowledgements hold the body of each answer back for 40 ms
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _listen(host: str, port: int) -> socket.socket:
    try:
        return listen(host, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise OSError(
                f"port {port} is taken: name another, --port {port + 1}, or --port 0 for a free one"
            ) from None
        why = (error.strerror or str(error)).partition(" (while")[0]
        raise OSError(f"cannot listen on {host} port {port}: {why}") from None


def _say(host: str, port: int, settings: Settings) -> None:
    """What was started and how to reach it: addresses that work when typed, which that of all interfaces is not."""
    everywhere = host in _ANY_ADDRESS
    near = "127.0.0.1" if everywhere else host
    url = f"http://{f'[{near}]' if ':' in near else near}:{port}"
    elsewhere = (
        f"in a container:      API_URL=http://host.docker.internal:{port}     elsewhere: this machine's name"
        if everywhere
        else "for a worker in a container or on another machine start this with --host 0.0.0.0"
    )
    sys.stdout.write(f"mock API on {url}  files: {settings.file_mode}, data: {settings.data_dir.resolve()}\n")
    sys.stdout.write(_BANNER.format(url=url, elsewhere=elsewhere))
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jobfetcher-mock-api",
        usage="%(prog)s [options]",
        description="A faithful server of the worker-facing job API, to try a worker on.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--host", metavar="ADDRESS", default="127.0.0.1", help="to listen on (default: %(default)s)")
    parser.add_argument(
        "--port", metavar="NUMBER", type=int, default=8000, help="0 takes a free one (default: %(default)s)"
    )
    for name, field in Settings.model_fields.items():
        if name == "s3_secret_key":
            continue
        parser.add_argument(f"--{name.replace('_', '-')}", **_option(name, field))
    return parser


#: What the value of an option is, where its type does not say it.
_WORDS = {
    "data_dir": "DIRECTORY",
    "public_url": "URL",
    "storage_url": "URL",
    "s3_endpoint": "URL",
    "accounts": "LIST",
    "tokens": "LIST",
    "max_object_bytes": "BYTES",
    "file_mode": "local|signed|s3",
    "upload_method": "post|put",
}


def _option(name: str, field: FieldInfo) -> dict[str, Any]:
    default = {"accounts": "worker:worker-password:workers", "tokens": "mock-token:worker"}.get(name, field.default)
    if isinstance(default, bool):
        default = "yes" if default else "no"
    text = f"{field.description}{'' if default is None else f' (default: {default})'}".replace("%", "%%")
    by_type = {"bool": "yes|no", "int": "NUMBER", "float": "SECONDS"}.get(getattr(field.annotation, "__name__", ""))
    return {"help": text, "metavar": _WORDS.get(name) or by_type or "TEXT"}


if __name__ == "__main__":
    main()
