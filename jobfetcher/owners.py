"""Files that say what the worker does, and who else might change or read them (FAULTS.md T32).

Whoever writes `.env` names the server that jobs come from; whoever writes a file of certificates may stand in the
middle; whoever writes keys signs jobs; whoever writes docker's configuration names the program that is asked for a
password. As ssh does, the worker looks at owner and mode of each, the directory that it lies in included:

    everybody may write                               refused; on a read-only mount warned of
    a group may write (that is not its owner's alone) warned of
    belongs to neither root nor the worker's user     warned of: in a container this is how a file of the host's user
                                                      looks that is mounted there, which is fine
    a secret that everybody may read                  warned of

Used by settings.
"""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

from jobfetcher.core.errors import ConfigError

#: File systems without modes, as mountinfo names them (proc(5)): FAT, NTFS, shares of Windows, and its drives in WSL.
_WITHOUT_MODES = frozenset({"9p", "cifs", "drvfs", "exfat", "fuseblk", "msdos", "ntfs", "ntfs3", "smb3", "vfat"})


def check(path: Path, name: str = "", *, secret: bool = False) -> Iterator[str]:
    """What should be mended about a file or directory, which the setting `name` names: warnings, as sentences.

    Raises ConfigError where everybody could change it. What is not there, or not for us to see, is none of this room's
    business. `secret`: nobody else should read it either.
    """
    intro = f"{name}: " if name else ""
    is_said = False
    try:
        for place in _places(path):
            seen = place.lstat()
            yield from (f"{intro}{why}" for why in _writers(place, seen, intro))
            if seen.st_uid not in {0, os.geteuid()} and not is_said:
                is_said = True  # one sentence for a file and the directory that it lies in
                yield f"{intro}{_foreign(place, seen)}"
        if secret and path.stat().st_mode & stat.S_IROTH:
            yield f"{intro}{path} holds a secret and can be read by everybody; run `chmod 600 {path}`"
    except OSError:
        return


def _places(path: Path) -> Iterator[Path]:
    """The file, each link that leads to it, and the directories that these lie in: all that decides what is read."""
    here = path.absolute()
    for _ in range(40):  # as many links as the kernel follows
        yield here
        yield here.parent
        if not here.is_symlink():
            break
        here = here.parent / here.readlink()
    if here.is_dir():
        yield from sorted(here.iterdir())


def _writers(place: Path, seen: os.stat_result, intro: str) -> Iterator[str]:
    is_guarded = stat.S_ISDIR(seen.st_mode) and seen.st_mode & stat.S_ISVTX  # nobody replaces another one's files there
    if stat.S_ISLNK(seen.st_mode) or is_guarded:  # the mode of a link says nothing
        return
    if seen.st_mode & stat.S_IWOTH:
        why = f"{place} can be changed by everybody, who could then decide what the worker does"
        if _knows_no_modes(seen.st_dev):
            yield f"{why}, as far as that disk says, which knows no modes; keep it on one that does"
        elif os.statvfs(place).f_flag & os.ST_RDONLY:
            yield f"{why}, though not through this read-only mount; run `chmod go-w` where it lies"
        else:
            raise ConfigError(f"{intro}{why}; run `chmod go-w {place}`")
    elif seen.st_mode & stat.S_IWGRP and seen.st_gid != seen.st_uid:
        yield f"{place} can be changed by its group; run `chmod g-w {place}`"


def _knows_no_modes(device: int, mounts: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether a disk shows one mode for all files, which chmod does not change: those of Windows, in WSL2 as well."""
    ours = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = mounts.read_text(errors="replace").splitlines()
    except OSError:
        return False
    return any(line.split()[2] == ours and line.rpartition(" - ")[2].split()[0] in _WITHOUT_MODES for line in lines)


def _foreign(place: Path, seen: os.stat_result) -> str:
    why = f"{place} belongs to another user ({_user(seen.st_uid)})"
    if stat.S_ISDIR(seen.st_mode):
        return f"{why}, who can put another file there at any time; unless that is you, keep it in a place of root's"
    return (
        f"{why}, who can change it at any time; run `chown {_user(os.geteuid())} {place}`, unless that is you (a file "
        "of yours that is mounted into a container)"
    )


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)
