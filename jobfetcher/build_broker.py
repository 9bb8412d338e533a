"""The composition root of the broker: the machine owner's settings in, a broker out. Used by `cli`.

A second root beside `build`, from which it takes what both processes must see alike: the policy of boxes, and the name
that a worker has on its engine.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

from jobfetcher import build
from jobfetcher.broker.boxes import Policy
from jobfetcher.broker.ledger import Ledger
from jobfetcher.broker.pins import ROOM, Pins
from jobfetcher.broker.rules import ImageRules, Rules
from jobfetcher.broker.server import Broker, connect
from jobfetcher.core.errors import ConfigError
from jobfetcher.core.ports import Emit
from jobfetcher.engine.api import DEFAULT_URL
from jobfetcher.engine.host_path import check_host_path, find_host_path
from jobfetcher.settings import Settings


@contextmanager
def broker(settings: Settings, emit: Emit, room: Path = ROOM) -> Iterator[Broker]:
    """A broker that listens. `room`: see `pins`.

    Raises ConfigError for what only a person can change, WorkerFault where the engine does not answer now.
    """
    url = settings.docker_host or DEFAULT_URL
    path = settings.broker_socket
    if url == f"unix://{path}":
        raise ConfigError("DOCKER_HOST: the broker needs the engine's own socket; only the worker's is BROKER_SOCKET")
    base = os.path.realpath(settings.path_base)
    with closing(build.make_engine(settings, "", emit)) as engine:
        engine.check()
        if kind := engine.flavour().kind:
            raise ConfigError(f"the broker speaks to Docker and not to {kind}; without root rights {kind} needs none")
        if settings.path_host_base is None:
            host_base = find_host_path(engine.api, base)
        else:
            host_base = check_host_path(engine.api, str(settings.path_host_base.expanduser()), base)
    instance = build.find_instance(host_base)
    policy = Policy(instance, host_base, build.make_box(settings), _gpus(settings))
    pins = Pins(Path(base), instance, room)
    pins.open()
    connected = partial(connect, url)
    images = ImageRules(settings.allowed_images, pulls=settings.pull_policy != "never")
    rules = Rules(policy, images, Ledger(settings.broker_state), pins, connected)
    uids = frozenset() if settings.broker_user is None else frozenset({_uid(settings.broker_user)})
    with Broker(path, uids, rules, connected, emit) as ready:
        who = f"user {settings.broker_user}" if uids else "its own user"
        where = f"listening at {path} for {who}"
        emit("broker", message=f"{where}; jobs of {host_base} are made by {url}", instance=instance)
        yield ready


def _gpus(settings: Settings) -> frozenset[str] | None:
    match settings.gpus.strip().lower():
        case "all":
            return None
        case "none":
            return frozenset()
    return frozenset(word.strip() for word in settings.gpus.split(",") if word.strip())


def _uid(user: str) -> int:
    if user.isdecimal():
        return int(user)
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        raise ConfigError(f"BROKER_USER: there is no user {user} here; a number may stand there, too") from None
