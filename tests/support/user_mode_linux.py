"""A second kernel, run as a process (Debian's user-mode-linux), for what this machine's own kernel was built without.

It sees this machine's files, and what a test runs there is the same Python with the same packages; file systems that it
mounts are its own. It is up in two seconds and has no network and no container engine.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

from tests.support.services import REPOSITORY, require, require_program

_LIMIT_S = 120.0

#: Modules are not found by themselves there, so they are loaded in this order. 313: finit_module(2) on amd64.
_INIT = """
import ctypes, os, subprocess, sys, traceback
def sh(*words): subprocess.run(words, check=True)
sh("mount", "-t", "proc", "proc", "/proc")
sh("mount", "-t", "sysfs", "sysfs", "/sys")
libc = ctypes.CDLL(None, use_errno=True)
for wanted in {modules!r}:
    for folder, _, names in os.walk("/usr/lib/uml/modules"):
        if wanted in names:
            with open(os.path.join(folder, wanted), "rb") as module:
                libc.syscall(313, module.fileno(), b"", 0)
sys.path[:0] = [{repository!r}]
os.chdir({folder!r})
try:
{body}
except BaseException:
    print("FAILED", traceback.format_exc())
else:
    print("PASSED")
sys.stdout.flush()
with open("/proc/sysrq-trigger", "w") as trigger:
    trigger.write("o")
import time
time.sleep(30)
"""


def run_there(folder: Path, body: str, *modules: str) -> None:
    """Run the statements of `body` there as root, in `folder`; AssertionError with what was printed if one raises.

    `modules`: files of kernel modules that are wanted. Skips (in CI fails) where there is no such kernel.
    """
    require("root" if os.geteuid() == 0 else None, "root rights, which the files of this machine need there, too")
    kernel = require_program("linux.uml", "user-mode-linux")
    script = folder / "guest.py"
    filled = _INIT.format(
        modules=modules, repository=str(REPOSITORY), folder=str(folder), body=textwrap.indent(body.strip(), "    ")
    )
    script.write_text(filled)
    init = folder / "init"
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    init.write_text(f"#!/bin/sh\nexport PATH={path} HOME=/root PYTHONUTF8=1\nexec {sys.executable} {script}\n")
    init.chmod(0o755)
    command = [kernel, "mem=256M", "rootfstype=hostfs", "rootflags=/", "rw", f"init={init}", "quiet"]
    done = subprocess.run(
        [*command, "con=null", "con0=fd:0,fd:1"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=_LIMIT_S,
        check=False,
        cwd=folder,
    )
    assert "PASSED" in done.stdout, done.stdout[-6000:]
