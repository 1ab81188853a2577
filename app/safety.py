"""Examines what protects an installation: address, host names, token, permissions."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from app.settings import Settings

Finding = tuple[bool, str]

OTHERS = stat.S_IRWXG | stat.S_IRWXO
SHORTEST_TOKEN = 16


def examine_safety(settings: Settings) -> Iterator[tuple[str, Finding]]:
    """Each thing by its name: whether it protects what it should, and what to do where not."""
    yield "address", _examine_address(settings)
    yield "host names", _examine_hosts(settings.allowed_hosts)
    yield "token", _examine_token(settings)
    if settings.data_dir.is_dir():
        yield "data is private", _examine_data(settings.data_dir)
    for folder in settings.code_dirs:
        yield "code is yours", _examine_code(folder)


def _examine_address(settings: Settings) -> Finding:
    from app.web.guard import is_loopback

    if is_loopback(settings.host):
        return True, f"{settings.host}: only this machine reaches it"
    if settings.behind_proxy:
        return (
            True,
            f"{settings.host}: behind a proxy, which must speak TLS and set the Host header",
        )
    why = "in clear text" if settings.insecure_http else "and would refuse to start"
    return False, (
        f"{settings.host} can be reached from other machines {why}: put a TLS proxy in front and "
        "say --behind-proxy, or use 127.0.0.1"
    )


def _examine_hosts(names: tuple[str, ...]) -> Finding:
    if globs := [name for name in names if "*" in name or "?" in name]:
        return False, f"{', '.join(globs)}: names are compared exactly, a glob matches nothing"
    return True, ", ".join(("loopback names", *names))


def _examine_token(settings: Settings) -> Finding:
    if settings.token is not None:
        if len(settings.token) < SHORTEST_TOKEN:
            return False, (
                f"FROSTLINE_TOKEN has {len(settings.token)} characters; use at least "
                f"{SHORTEST_TOKEN} random ones, or none: one is made then"
            )
        return True, "from FROSTLINE_TOKEN"
    path = settings.data_dir / "token"
    if not path.exists():
        return True, "not there yet, the first start makes it"
    if _mode(path) & OTHERS:
        return False, f"other users can read {path}: delete it, the next start makes a new one"
    return True, f"{path}: readable by you alone"


def _examine_data(folder: Path) -> Finding:
    if _mode(folder) & OTHERS:
        return False, f"other users can read {folder} (weights, logs, sessions): chmod 700 {folder}"
    return True, f"{folder}: readable by you alone"


def _examine_code(folder: Path) -> Finding:
    """Whoever can write where `python:` entry points lie can run code as the server's user."""
    if folder.is_dir() and _mode(folder) & stat.S_IWOTH:
        return False, f"anybody can write to {folder}, and jobs run code from it: chmod o-w"
    return True, f"{folder}: jobs may run code from it, with your rights"


def _mode(path: Path) -> int:
    """Permissions as far as others than its owner are concerned; none where they mean nothing."""
    return stat.S_IMODE(path.stat().st_mode) if os.name == "posix" else 0
