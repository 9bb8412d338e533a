"""Make jobfetcher/engine/seccomp.json, the filter of system calls that jobs run under, of the headers of Linux.

    python scripts/seccomp_profile.py       (package linux-libc-dev)

The filter names what is allowed: all that the headers of 64-bit and 32-bit x86 and the generic ones (arm64) name, but
for what is closed below, each with its reason. What is neither allowed nor closed, because no header here knows it yet,
is answered with ENOSYS, as by a kernel that does not have it: C libraries then take the older way, which they do not on
EPERM. What was closed in engines' own filters all along is answered with EPERM, so that a job hears the same.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROFILE = ROOT / "jobfetcher" / "engine" / "seccomp.json"

HEADERS = (
    "/usr/include/x86_64-linux-gnu/asm/unistd_64.h",
    "/usr/include/x86_64-linux-gnu/asm/unistd_32.h",
    "/usr/include/asm-generic/unistd.h",
)

EPERM, ENOSYS = 1, 38

#: What headers of Linux 6.1 do not have yet, up to 6.17, and what 32-bit ARM has of its own.
NEWER = (
    "cachestat fchmodat2 map_shadow_stack futex_wake futex_wait futex_requeue statmount listmount lsm_get_self_attr "
    "lsm_set_self_attr lsm_list_modules mseal setxattrat getxattrat listxattrat removexattrat open_tree_attr "
    "file_getattr file_setattr uretprobe uprobe breakpoint cacheflush set_tls usr26 usr32 get_tls arm_fadvise64_64 "
    "arm_sync_file_range sync_file_range2 recv send"
)

#: Closed: what it is answered with, the capability that opens it (JOB_CAP_ADD), if any, the calls, and why.
CLOSED: tuple[tuple[int, str, str, str], ...] = (
    (
        ENOSYS,
        "",
        "io_uring_setup io_uring_enter io_uring_register",
        "a second way to nearly all of the kernel's files "
        "and sockets, past this filter, and the source of many of its holes",
    ),
    (ENOSYS, "", "socketcall", "32-bit programs' way to sockets, whose family a filter cannot see"),
    (ENOSYS, "", "modify_ldt vm86 vm86old", "16-bit programs; a way to change segments of the processor"),
    (EPERM, "", "userfaultfd", "stops the kernel at a moment of one's choice, which makes races easy to win"),
    (EPERM, "", "add_key request_key keyctl", "the kernel's keys know no containers"),
    (
        EPERM,
        "SYS_ADMIN",
        "mount umount umount2 move_mount open_tree open_tree_attr fsopen fsconfig fsmount fspick "
        "mount_setattr pivot_root statmount listmount",
        "mounts",
    ),
    (EPERM, "SYS_ADMIN", "unshare setns", "namespaces, and with one of users all that root may do in it"),
    (
        ENOSYS,
        "SYS_ADMIN",
        "clone3",
        "makes namespaces as well, and its flags lie where a filter cannot see them; C libraries then use clone",
    ),
    (
        EPERM,
        "SYS_ADMIN",
        "bpf perf_event_open fanotify_init lookup_dcookie quotactl quotactl_fd file_setattr sethostname setdomainname",
        "the machine's, not the job's",
    ),
    (EPERM, "SYS_PTRACE", "ptrace kcmp process_madvise pidfd_getfd", "looks into other processes and stops them"),
    (
        EPERM,
        "SYS_NICE",
        "mbind get_mempolicy set_mempolicy set_mempolicy_home_node move_pages migrate_pages",
        "where memory lies on the machine",
    ),
    (EPERM, "DAC_READ_SEARCH", "open_by_handle_at", "opens files that no mount of the container has"),
    (
        EPERM,
        "SYS_MODULE",
        "init_module finit_module delete_module create_module query_module get_kernel_syms",
        "modules of the kernel",
    ),
    (EPERM, "SYS_BOOT", "reboot kexec_load kexec_file_load", "another kernel"),
    (EPERM, "SYS_TIME", "settimeofday clock_settime clock_settime64 stime", "the machine's clock"),
    (EPERM, "SYS_RAWIO", "iopl ioperm", "ports of the processor"),
    (EPERM, "SYS_PACCT", "acct", "the machine's accounts"),
    (EPERM, "SYS_CHROOT", "chroot", "another root directory"),
    (EPERM, "SYS_TTY_CONFIG", "vhangup", "terminals of others"),
    (EPERM, "SYSLOG", "syslog", "the kernel's log, which names its addresses"),
    (EPERM, "", "swapon swapoff nfsservctl _sysctl sysfs uselib ustat bdflush vserver", "the machine's, or gone"),
    (
        ENOSYS,
        "",
        "afs_syscall break ftime getpmsg gtty idle lock mpx prof profil putpmsg security stty tuxcall ulimit "
        "lsm_get_self_attr lsm_set_self_attr lsm_list_modules uretprobe uprobe",
        "not there, or for the kernel's own use",
    ),
)

#: Of clone(2) the flags that make namespaces: CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID and NEWNET.
NEW_NAMESPACES = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000

#: What programs talk through: AF_UNIX, AF_INET, AF_INET6, AF_NETLINK (which addresses are there). Others are ways into
#: the machine (AF_VSOCK: the host of a virtual one; AF_ALG: the kernel's ciphers) or to networks that a job has not.
FAMILIES = (1, 2, 10, 16)
AF_PACKET = 17

#: ioctl(2), of a file: the kind and number (lower 16 bits) of FS_IOC_FSSETXATTR, by which a job would take its files
#: out of the project whose disk quota holds them (jobfetcher/quota.py). The kernel looks at the lower 32 bits only, so
#: that "is not this number" would let the same one with a bit above them through. What is allowed differs in one of
#: these bits: 16 rules, of which the first two or three decide about nearly all calls.
FSSETXATTR = 0x5820

#: personality(2): PER_LINUX, PER_LINUX32, the two with UNAME26, and 0xffffffff, which asks.
PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)


def known_names() -> set[str]:
    """What the headers name."""
    names = set(NEWER.split())
    for header in HEADERS:
        names |= set(re.findall(r"^#define __NR(?:3264)?_([a-z0-9_]+)\s", Path(header).read_text(), re.MULTILINE))
    return names - {"syscalls", "arch_specific_syscall"}


def profile(names: set[str]) -> dict[str, object]:
    """The filter, in the words of moby's profiles (which all versions since 20.10 read)."""
    closed = {name for _, _, calls, _ in CLOSED for name in calls.split()}
    by_argument = {"clone", "socket", "personality", "ioctl"}
    rules: list[dict[str, object]] = [
        {"names": sorted(names - closed - by_argument), "action": "SCMP_ACT_ALLOW"},
        _when(["clone"], NEW_NAMESPACES, "SCMP_CMP_MASKED_EQ", excludes={"caps": ["CAP_SYS_ADMIN"]}),
        {"names": ["clone"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
        *(_when(["socket"], family, "SCMP_CMP_EQ") for family in FAMILIES),
        _when(["socket"], AF_PACKET, "SCMP_CMP_EQ", includes={"caps": ["CAP_NET_RAW"]}),
        *(_when(["personality"], value, "SCMP_CMP_EQ") for value in PERSONALITIES),
        *(_other_bit("ioctl", 1, FSSETXATTR, 1 << bit) for bit in range(16)),
    ]
    for errno, capability, calls, why in CLOSED:
        rule: dict[str, object] = {"names": calls.split(), "comment": why}
        denied = {**rule, "action": "SCMP_ACT_ERRNO", "errnoRet": errno}
        if capability:
            caps = {"caps": [f"CAP_{capability}"]}
            rules.append({**denied, "excludes": caps})
            rules.append({**rule, "action": "SCMP_ACT_ALLOW", "includes": caps})
        else:
            rules.append(denied)
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": ENOSYS,
        "archMap": [
            {"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]},
            {"architecture": "SCMP_ARCH_AARCH64", "subArchitectures": ["SCMP_ARCH_ARM"]},
        ],
        "syscalls": rules,
    }


def _other_bit(name: str, index: int, value: int, bit: int) -> dict[str, object]:
    """Allow a call whose argument has another value in this bit."""
    # MASKED_EQ compares (argument & value) with valueTwo.
    argument = {"index": index, "value": bit, "valueTwo": ~value & bit, "op": "SCMP_CMP_MASKED_EQ"}
    return {"names": [name], "action": "SCMP_ACT_ALLOW", "args": [argument]}


def _when(names: list[str], value: int, compare: str, **conditions: object) -> dict[str, object]:
    # MASKED_EQ compares (argument & value) with valueTwo.
    argument = {"index": 0, "value": value, "valueTwo": 0, "op": compare}
    return {"names": names, "action": "SCMP_ACT_ALLOW", "args": [argument], **conditions}


if __name__ == "__main__":
    PROFILE.write_text(json.dumps(profile(known_names()), indent=1) + "\n")
    sys.stdout.write(f"{PROFILE.relative_to(ROOT)} is made\n")
