"""Cores, disk space and memory of the machine, and its processes."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
from pathlib import Path


def core_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_bytes(path: Path) -> int:
    """Room on the disk that holds, or would hold, a path."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def physical_memory_bytes() -> int:
    """Main memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def machine_name() -> str:
    """Name of this machine in letters, digits and `_`; processes that see each other by number have the same one."""
    try:
        # Containers may share a host name, and number their processes apart.
        namespace = re.sub(r"\D", "", os.readlink("/proc/self/ns/pid"))
    except OSError:
        namespace = ""
    return re.sub(r"\W", "_", f"{socket.gethostname()}_{namespace}")


def is_alive(process: int) -> bool:
    """Whether a process with this number runs on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it runs, as another user
    with contextlib.suppress(OSError):  # a system without /proc
        # One that was killed keeps its number until its parent looks; its state comes after its name in parentheses.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return True
