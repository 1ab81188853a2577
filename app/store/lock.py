"""The writer's lock: one process owns a data folder, and the lock file says where it answers."""

import fcntl
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that owns a data folder; both None for the moment in which it writes them."""

    pid: int | None
    address: str | None


class DataFolderHeld(RuntimeError):
    """Another process owns the data folder; str() says which and what to do."""

    def __init__(self, data_dir: Path, holder: Holder) -> None:
        self.pid, self.address = holder.pid, holder.address
        super().__init__(
            f"{data_dir} belongs to process {holder.pid}, which serves it at {holder.address}. "
            "Use that one, end it, or choose another folder with --data-dir."
        )


@contextmanager
def hold_data_folder(data_dir: Path, address: str) -> Iterator[None]:
    """Own the folder for a while.

    Raises:
        DataFolderHeld: another process owns it.
    """
    data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Not truncated before the lock is ours: until then it holds the other's address.
    with os.fdopen(os.open(_path(data_dir), os.O_RDWR | os.O_CREAT, 0o600), "r+") as file:
        if not _take(file):
            raise DataFolderHeld(data_dir, _read(file))
        file.truncate(0)
        json.dump({"format": 1, "pid": os.getpid(), "address": address}, file)
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def _take(file: IO[str]) -> bool:
    """Lock the file, also where somebody who only looks at it (`read_holder`) is in the way."""
    never = threading.Event()
    for _ in range(20):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            never.wait(0.05)
    return False


def read_holder(data_dir: Path) -> Holder | None:
    """Who owns the folder, None where nobody does."""
    try:
        file = _path(data_dir).open("r+")
    except FileNotFoundError:
        return None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _read(file)
    return None


def _path(data_dir: Path) -> Path:
    return data_dir / "writer.lock"


def _read(file: IO[str]) -> Holder:
    try:
        document = json.load(file)
    except ValueError:  # it has just taken the lock and is about to write
        return Holder(None, None)
    return Holder(document["pid"], document["address"])
