"""P3, P4, P5 and P13: the worker's transfer, as `build.make_transfer` makes it, against curl at the same server.

Both sides move the same files between the same nginx and the same directory in memory, so that no disk has a say; the
URLs are known beforehand, since curl does not sign. The transfer's part of a job begins and ends here with the call of
`download` or `upload`; it makes new connections each time, as curl does. Of one file curl's time is what it says of the
transfer itself (`time_total`); of many files it is that of the command, whose start and end are some 20 ms.

What the worker does on top, and is not taken off: it hashes every byte that comes in (SHA-256). What goes out is hashed
only for an S3, which says the MD5 of what it got; nginx says none.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from benchmarks.frame import GIB, MIB, Bench, Row, in_turns, in_words, seconds
from benchmarks.jobs import running_api
from benchmarks.link import running_link
from benchmarks.servers import Nginx, curl, curl_config, curl_seconds, running_nginx
from jobfetcher import build, staging
from jobfetcher.core.halt import Halt
from jobfetcher.core.machine import Offer
from jobfetcher.core.ports import Download, Transfer
from jobfetcher.core.urls import Method, SignedRequest
from jobfetcher.settings import Settings
from jobfetcher.transfer.cache import Cache
from jobfetcher.transfer.presigned import PresignedTransfer
from jobfetcher.tree import Reader
from jobfetcher.workspace import Workspace
from tests.support.mock_server import job_spec
from tests.support.services import wait_until
from tests.support.transfers import Recorder, getting, produced

#: P4.
_SMALL = 4096
_MANY = 2000
_FOLDERS = 4

#: P5: what one connection passes in a second, and how far away the server is.
_PER_CONNECTION = 20 * MIB
_ROUND_TRIP_S = 0.05

#: P13.
_LINK = 100 * MIB


def large(bench: Bench) -> Iterator[Row]:
    """P3. One file of 1 GiB each way, by each kind of request, with and without TLS."""
    size = 8 * MIB if bench.short else GIB
    with _store(bench) as nginx:
        source = _random_file(nginx.served / "large", size)
        for name, origin in (("http", nginx.http), ("https", nginx.https)):
            coming, least_in = f"{origin}/_storage/large", 1.0
            going, least_out = f"{origin}/stored/large", 0.95
            form = f"{origin}/_storage"
            target = bench.memory / "target"
            for what, ours, peer, least in (
                (
                    f"{name} in",
                    partial(_fetch, nginx, [(coming, target)]),
                    partial(curl_seconds, "--cacert", str(nginx.ca), "--output", str(target), coming),
                    least_in,
                ),
                (
                    f"{name} out, PUT",
                    partial(_send, nginx, [(source, SignedRequest(Method.PUT, going))]),
                    partial(curl_seconds, "--cacert", str(nginx.ca), "--upload-file", str(source), going),
                    least_out,
                ),
                (
                    f"{name} out, POST form",
                    partial(_send, nginx, [(source, _form(form))]),
                    partial(curl_seconds, "--cacert", str(nginx.ca), "--form", _KEY, "--form", f"file=@{source}", form),
                    least_out,
                ),
            ):
                clean = partial(_remove, [target, nginx.stored / "large"])
                peer()  # not measured: memory that a virtual machine has never touched is slow once
                mine, theirs = in_turns(partial(_after, clean, ours), partial(_after, clean, peer), bench.many)
                clean()
                mib = size / MIB
                yield bench.faster("P3", f"{in_words(size)}, {what}", mib / mine, "MiB/s", "curl", mib / theirs, least)


def small(bench: Bench) -> Iterator[Row]:
    """P4. Many small files each way; and how many calls of the API it takes to send them."""
    count = 40 if bench.short else _MANY
    with _store(bench) as nginx:
        names = [f"f{number}" for number in range(count)]
        sources = [_random_file(nginx.served / "small" / name, _SMALL) for name in names]
        target = bench.memory / "targets"
        gets = [(f"{nginx.http}/_storage/small/{name}", target / name) for name in names]
        puts = [(source, SignedRequest(Method.PUT, f"{nginx.http}/stored/{source.name}")) for source in sources]
        posts = [(source, _form(f"{nginx.http}/_storage")) for source in sources]
        get_config = [f'url = "{url}"\noutput = "{path}"' for url, path in gets]
        put_config = [f'upload-file = "{source}"\nurl = "{request.url}"' for source, request in puts]
        post_config = [f'form = "{_KEY}"\nform = "file=@{source}"\nurl = "{request.url}"' for source, request in posts]
        for what, ours, config in (
            ("in", partial(_fetch, nginx, gets), get_config),
            ("out, PUT", partial(_send, nginx, puts), put_config),
            # each form is a part of its own in a config file, and keeps no option of the last one
            ("out, POST form", partial(_send, nginx, posts), ["\nnext\nsilent\n".join(post_config)]),
        ):
            peer = partial(curl, "--config", str(curl_config(bench.memory / "curl.config", config)))

            def clean() -> None:
                _remove([target, nginx.stored])
                target.mkdir()
                nginx.stored.mkdir()

            mine, theirs = in_turns(
                partial(_after, clean, ours), partial(_after, clean, partial(seconds, peer)), bench.many
            )
            clean()
            against = "curl --parallel --parallel-max 16"
            yield bench.faster(
                "P4", f"{count} files of 4 KiB, {what}", count / mine, "files/s", against, count / theirs, 0.9
            )
    yield _calls(bench, count)


def _calls(bench: Bench, count: int) -> Row:
    """What staging out costs the API, whose own record counts."""
    with running_api(bench.memory / "api") as api:
        settings = _settings(api_url=api.url)
        job_id = api.submit(job_spec(handler={"image_url": "none", "files_up": {"output": "out"}}))
        with (
            contextlib.closing(build.make_source(settings, lambda *_, **__: None)) as source,
            contextlib.closing(build.make_transfer(settings)) as transfer,
        ):
            claim = source.fetch(Offer(cpu_cores=8, memory_mib=8192), 0)
            if claim is None:
                raise AssertionError(f"job {job_id} was not handed out")
            workspace = Workspace(bench.memory / "job")
            workspace.create()
            for number in range(count):
                folder = workspace.files / "out" / f"folder{number % _FOLDERS}"
                _random_file(folder / f"f{number}", _SMALL)
            before = len(_requests(api.events()))
            staged = staging.stage_out(
                claim.job,
                claim.lease,
                workspace,
                transfer,
                halt=Halt(),
                have={},
                mark=lambda _: None,
                progress=staging.Progress(),
            )
            calls = len(_requests(api.events())) - before
    if len(staged.stored) != count:
        raise AssertionError(f"{len(staged.stored)} of {count} files were sent")
    limit = f"value <= {_FOLDERS} folders + 2"
    ok = bench.judge(calls <= _FOLDERS + 2)
    what = f"{count} files of 4 KiB in {_FOLDERS} folders, out"
    return Row("P4", what, calls, "API calls", "folders", _FOLDERS, calls / _FOLDERS, limit, ok)


def _requests(events: Sequence[dict[str, object]]) -> list[dict[str, object]]:
    """Requests to the API in the mock API's record; what reached its storage is there, too, and is none."""
    return [event for event in events if event["kind"] != "stored"]


def ranges(bench: Bench) -> Iterator[Row]:
    """P5. One file over a link that gives every connection 20 MiB/s and takes 50 ms there and back."""
    size = 8 * MIB if bench.short else 512 * MIB
    with _store(bench) as nginx:
        _random_file(nginx.served / "large", size)
        target = bench.memory / "target"
        clean = partial(_remove, [target])
        with running_link(bench.memory, nginx.port, round_trip_s=_ROUND_TRIP_S) as port:
            url = f"http://127.0.0.1:{port}/_storage/large"
            speed = size / curl_seconds("--output", str(target), url)
            bench.say(f"the link itself, without a limit: {speed / MIB:.0f} MiB/s")
            if not bench.short and speed < 9 * _PER_CONNECTION:
                raise AssertionError("the link is too slow on this machine to say anything of eight connections")
        with running_link(bench.memory, nginx.port, round_trip_s=_ROUND_TRIP_S, per_connection=_PER_CONNECTION) as port:
            url = f"http://127.0.0.1:{port}/_storage/large"
            mine, theirs = in_turns(
                partial(_after, clean, partial(_fetch, nginx, [(url, target)])),
                partial(_after, clean, partial(curl_seconds, "--output", str(target), url)),
                bench.repeats,
            )
        what = f"{in_words(size)} in, 50 ms round trip, 20 MiB/s per connection"
        yield bench.faster("P5", what, size / MIB / mine, "MiB/s", "one curl", size / MIB / theirs, 4.0)


def cached(bench: Bench) -> Iterator[Row]:
    """P13. The same input for two jobs, one after the other, over a link of 100 MiB/s; every turn has a new cache."""
    size = 8 * MIB if bench.short else GIB
    with _store(bench) as nginx, running_link(bench.memory, nginx.port, in_all=_LINK) as port:
        _random_file(nginx.served / "large", size)
        url = f"http://127.0.0.1:{port}/_storage/large"
        target, cache = bench.memory / "target", bench.memory / "base"
        moved = 0

        def sent() -> int:
            return sum(size for _, _, size in nginx.requests())

        def again() -> float:
            nonlocal moved
            _remove([target])
            before = sent()
            took = _fetch(nginx, [(url, target)], cache)
            moved += sent() - before
            return took

        def first() -> float:
            _remove([target, cache])
            cache.mkdir()
            wanted = sent() + size
            took = _fetch(nginx, [(url, target)], cache)
            wait_until(lambda: sent() >= wanted, "all of the first time is in the server's log")
            return took

        # The first job comes first in every turn; there is no other order.
        pairs = [(first(), again()) for _ in range(bench.repeats)]
        theirs, mine = (statistics.median(side) for side in zip(*pairs, strict=True))
    what = f"{in_words(size)} input again, over 100 MiB/s, cache on"
    yield Row("P13", what, moved, "bytes moved", "first time", size, moved / size, "value = 0", bench.judge(moved == 0))
    ratio, limit = mine / theirs, "ratio <= 0.2"
    yield Row("P13", what, mine, "s", "first time", theirs, ratio, limit, bench.judge(ratio <= 0.2))


_KEY = "key=${filename}"


def _form(url: str) -> SignedRequest:
    return SignedRequest(Method.POST, url, fields=(("key", "${filename}"),))


def _settings(**changes: object) -> Settings:
    """A worker's settings as shipped, with a server on this machine."""
    here = {"api_url": "http://127.0.0.1:1", "access_token": "mock-token", "path_base": "unused"}
    return Settings.model_validate(here | changes)


@contextlib.contextmanager
def _transfer(nginx: Nginx, cache: Path | None) -> Iterator[Transfer]:
    """What a worker has; with `cache` as a directory it keeps inputs there."""
    settings = _settings(ca_file=nginx.ca)
    if cache is None:
        made = build.make_transfer(settings)
    else:
        kept = Cache(cache, 2 * GIB, lambda *_, **__: None, room_for=lambda _: None)
        made = PresignedTransfer(
            build.make_policy(settings),
            concurrency=settings.transfers,
            ranges=settings.transfer_ranges,
            cache=kept,
        )
    with contextlib.closing(made) as transfer:
        yield transfer


def _fetch(nginx: Nginx, files: Sequence[tuple[str, Path]], cache: Path | None = None) -> float:
    """How long the worker's transfer takes to bring these URLs to these places."""
    items = [Download(path.name, getting(url), path) for url, path in files]
    watch = Recorder()
    with _transfer(nginx, cache) as transfer:
        took = seconds(lambda: transfer.download(items, watch))
    _check(watch, len(items))
    return took


def _send(nginx: Nginx, files: Sequence[tuple[Path, SignedRequest]]) -> float:
    """How long the worker's transfer takes to send these files."""
    watch = Recorder()
    with _transfer(nginx, None) as transfer, Reader(files[0][0].parent) as reader:
        items = [produced(path, partial(_signed, request), reader=reader) for path, request in files]
        took = seconds(lambda: transfer.upload(items, watch))
    _check(watch, len(items))
    return took


def _signed(request: SignedRequest, _: bool) -> SignedRequest:
    return request


def _check(watch: Recorder, count: int) -> None:
    if len(watch.stored) != count:
        raise AssertionError(f"{len(watch.stored)} of {count} files were moved")


@contextlib.contextmanager
def _store(bench: Bench) -> Iterator[Nginx]:
    served = bench.memory / "served"
    served.mkdir()
    with running_nginx(bench.memory / "nginx", served) as nginx:
        yield nginx


def _random_file(path: Path, size: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for start in range(0, size, MIB):
            file.write(os.urandom(min(MIB, size - start)))
    return path


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _after(clean: Callable[[], None], measure: Callable[[], float]) -> float:
    clean()
    return measure()
