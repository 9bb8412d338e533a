"""A small job image, without an image registry where Debian's busybox-static is installed: imported into the engine.

Used by the demo and by the tests (tests may import from demo, never the other way round). It promises an image
with `/bin/sh`, every applet that this busybox has, `/tmp`, and the users root and nobody; the same busybox always gives
the same layer, byte for byte.
"""

import io
import re
import subprocess
import tarfile
from pathlib import Path

import docker

_BUSYBOX = Path("/bin/busybox")
IMAGE = "jobfetcher-test/busybox:latest"

_USERS = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"
_GROUPS = "root:x:0:\nnogroup:x:65534:\n"
_DIRECTORIES = {"bin": 0o755, "etc": 0o755, "root": 0o700, "tmp": 0o1777, "usr": 0o755, "var": 0o755, "var/tmp": 0o1777}
# `#!/usr/bin/env sh` and `/sbin/...` are common enough in job scripts to be worth three links.
_LINKS = {"sbin": "bin", "usr/bin": "../bin", "usr/sbin": "../bin"}


def ensure_busybox_image(client: docker.APIClient) -> str:
    """Return the image's reference; where the engine lacks it, import this machine's busybox, or else pull Docker's.

    Raises docker.errors.DockerException when the engine or the registry says no.
    """
    if client.images(name=IMAGE):
        return IMAGE
    repository, tag = IMAGE.split(":")
    if busybox := local_busybox():
        client.import_image_from_data(root_tar(busybox), repository, tag, changes=['CMD ["/bin/sh"]', "ENV PATH=/bin"])
    else:
        client.pull("busybox", "stable")
        client.tag("busybox:stable", repository, tag)
    return IMAGE


def local_busybox() -> Path | None:
    """This machine's busybox when it is statically linked, as that of busybox-static is: alone in an image it runs."""
    if not _BUSYBOX.exists() or re.search(rb"/lib\w*/ld-", _BUSYBOX.read_bytes()):  # a loader's path: dynamic
        return None
    return _BUSYBOX


def root_tar(busybox: Path) -> bytes:
    """The image's root file system as a tar archive: owner root, time 0, sorted, nothing taken from the clock."""
    applets = subprocess.run([busybox, "--list"], check=True, capture_output=True, text=True).stdout.split()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, mode in _DIRECTORIES.items():
            _add(archive, name, tarfile.DIRTYPE, mode)
        _add(archive, "bin/busybox", tarfile.REGTYPE, 0o755, content=busybox.read_bytes())
        for applet in sorted(set(applets) - {"busybox"}):
            _add(archive, f"bin/{applet}", tarfile.SYMTYPE, 0o777, target="busybox")
        for name, target in _LINKS.items():
            _add(archive, name, tarfile.SYMTYPE, 0o777, target=target)
        _add(archive, "etc/passwd", tarfile.REGTYPE, 0o644, content=_USERS.encode())
        _add(archive, "etc/group", tarfile.REGTYPE, 0o644, content=_GROUPS.encode())
    return buffer.getvalue()


def _add(
    archive: tarfile.TarFile, name: str, kind: bytes, mode: int, *, content: bytes = b"", target: str = ""
) -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode, entry.size, entry.linkname = kind, mode, len(content), target
    archive.addfile(entry, io.BytesIO(content))
