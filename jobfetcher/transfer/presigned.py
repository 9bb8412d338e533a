"""Files by requests that a server signed for us: S3 and its kin, GCS, Azure, and plain HTTP servers.

The adapter of `core.ports.Transfer` that `build` makes, one for the whole worker. All jobs share its one loop thread
and its connections; each call has its own window and its own signers, so a job whose source hangs holds up no other
(but for one that waits for an input which that job is just putting into the cache, `flights`).
"""

from __future__ import annotations

import resource
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

from jobfetcher.core.addresses import OwnHost, Resolver
from jobfetcher.core.ports import Download, Upload, Watch
from jobfetcher.core.urls import SignedRequest, UrlPolicy
from jobfetcher.transfer import batch, download, upload
from jobfetcher.transfer.exchange import NetSettings
from jobfetcher.transfer.flights import Flights
from jobfetcher.transfer.guard import AddressGuard, resolve
from jobfetcher.transfer.multi import TransferLoop
from jobfetcher.transfer.patience import Rules
from jobfetcher.transfer.wire import Wire

if TYPE_CHECKING:
    from jobfetcher.transfer.cache import Cache

#: FAULTS.md C2: an input out of reach for this long is the machine's trouble, and another worker may do better.
DOWNLOAD_BUDGET_S = 6 * 3600.0

#: FAULTS.md C8: a finished job's outputs are worth waiting for.
UPLOAD_BUDGET_S = 7 * 86_400.0

#: PROTOCOL.md S13: one object sent by one PUT or POST has at most 5 GiB.
MAX_UPLOAD_BYTES = 5 * 1024**3

#: A connection takes two descriptors, its socket and its file; the other half is for the API, the engine and the rest.
_FILES_PER_CONNECTION = 4


class PresignedTransfer:
    """Moves files as `policy` allows.

    `concurrency`: requests signed at the same time in one call. How many small files are on their way is bounded by the
    connections, `max_host_connections` to one origin each way and `max_connections` in all: a file of 4 KiB is on the
    wire for a few hundred microseconds, and eight at a time would leave the wire idle. There are fewer where the
    process may open few files. `ranges`: connections that one large download may use. `bandwidth_limit`: bytes a second
    each way, of all calls together; None: no limit. `cache`: where inputs are kept for later jobs. Budgets: seconds
    without success before a file is given up.
    """

    def __init__(
        self,
        policy: UrlPolicy,
        *,
        concurrency: int = 8,
        ranges: int = 8,
        bandwidth_limit: float | None = None,
        cache: Cache | None = None,
        max_host_connections: int = 16,
        max_connections: int = 64,
        net: NetSettings | None = None,
        resolver: Resolver = resolve,
        own: OwnHost | None = None,
        rules: Rules | None = None,
        download_budget_s: float = DOWNLOAD_BUDGET_S,
        upload_budget_s: float = UPLOAD_BUDGET_S,
        max_upload_bytes: int = MAX_UPLOAD_BYTES,
    ) -> None:
        net = net or NetSettings()
        rules = rules or Rules()
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if files != resource.RLIM_INFINITY:
            max_connections = min(max_connections, max(1, files // _FILES_PER_CONNECTION))
        max_host_connections = min(max_host_connections, max_connections)
        self._loop = TransferLoop(
            net,
            max_host_connections=max_host_connections,
            max_connections=max_connections,
            bandwidth_limit=bandwidth_limit,
        )
        self._guard = AddressGuard(policy, resolver, own or OwnHost(policy.api.host, resolver, rules.clock))
        wire = Wire(policy, self._guard, proxies=net.proxies)
        # One signed request for each signer lies ready while the connections are busy.
        self._run = partial(batch.run, loop=self._loop, signers=concurrency, window=concurrency + max_host_connections)
        self._fetch = partial(
            download.fetch,
            wire=wire,
            rules=rules,
            budget_s=download_budget_s,
            ranges=ranges,
            cache=cache,
            flights=Flights(),
        )
        self._send = partial(upload.send, wire=wire, rules=rules, budget_s=upload_budget_s)
        self._max_upload_bytes = max_upload_bytes

    def download(self, items: Iterable[Download], watch: Watch) -> None:
        """Fetch all; ends at the first failure. See `core.ports.Transfer`."""
        self._run(items, self._sign_input, self._fetch, watch, go_on=False)

    def upload(self, items: Iterable[Upload], watch: Watch) -> None:
        """Send all that can be sent, then raise the first failure. See `core.ports.Transfer`."""
        self._run(items, self._sign_output, self._send, watch, go_on=True)

    def _sign_input(self, item: Download) -> SignedRequest:
        self._guard.learn()
        return item.sign()

    def _sign_output(self, item: Upload) -> SignedRequest:
        self._guard.learn()
        return upload.sign(item, self._max_upload_bytes)

    def close(self) -> None:
        """End the loop thread and all connections."""
        self._loop.close()
