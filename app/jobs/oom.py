"""How often the kernel has ended a process beside us because memory ran out. Linux alone tells."""

import re
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def count_oom_kills(
    memberships: Path = Path("/proc/self/cgroup"), system: Path = Path("/proc/vmstat")
) -> int:
    """Such ends in our own group of processes, else in the whole system; 0 where nobody counts."""
    lines = _read(memberships).splitlines()
    groups = [line.split(":", 2)[1:] for line in lines if line.count(":") >= 2]
    for controllers, path in groups:
        if controllers == "":
            file = CGROUPS / path.lstrip("/") / "memory.events"
        elif "memory" in controllers.split(","):
            file = CGROUPS / "memory" / path.lstrip("/") / "memory.oom_control"
        else:
            continue
        counted = _find_count(_read(file))
        if counted is not None:
            return counted
    return _find_count(_read(system)) or 0


def _find_count(text: str) -> int | None:
    found = re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
