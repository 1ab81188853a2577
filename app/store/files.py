"""Where things lie in the data folder beside the database, and how they are removed."""

import contextlib
import os
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO


def job_folder(data_dir: Path, job_id: int) -> Path:
    return data_dir / "jobs" / str(job_id)


def task_folder(data_dir: Path, task_id: int) -> Path:
    return data_dir / "tasks" / str(task_id)


def graph_path(data_dir: Path, model_id: int) -> Path:
    return data_dir / "graphs" / f"{model_id}.json"


def model_card_path(data_dir: Path, model_id: int) -> Path:
    return data_dir / "graphs" / f"{model_id}.about.json"


def timing_path(data_dir: Path, model_id: int) -> Path:
    return data_dir / "graphs" / f"{model_id}.timing.json"


def assumed_graph_path(data_dir: Path, model_id: int, assumed: Mapping[str, Any]) -> Path:
    """Where the graph of a model lies that was traced at other sizes or at another precision."""
    words = ",".join(f"{name}={value}" for name, value in sorted(assumed.items()))
    return data_dir / "graphs" / f"{model_id}.{words}.json"


def assumed_graph_paths(data_dir: Path, model_id: int) -> list[Path]:
    """The graphs of a model beside its own, the oldest first."""
    written: list[tuple[int, Path]] = []
    for path in (data_dir / "graphs").glob(f"{model_id}.*=*.json"):
        with contextlib.suppress(FileNotFoundError):  # removed in this moment
            written.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(written)]


def read_logs(folder: Path, after: int = 0, limit: int = 2**24) -> bytes:
    """The logs of all attempts, one behind the other, from byte `after` on, `limit` at most."""
    pieces: list[bytes] = []
    for file in _open_logs(folder):
        size = file.seek(0, 2)
        if after < size and limit > 0:
            file.seek(after)
            pieces.append(file.read(limit))
            limit -= len(pieces[-1])
        after = max(0, after - size)
    return b"".join(pieces)


def log_size(folder: Path) -> int:
    """Bytes in the logs of all attempts."""
    return sum(file.seek(0, 2) for file in _open_logs(folder))


def _open_logs(folder: Path) -> Iterator[BinaryIO]:
    """The logs of all attempts, the first one first; what is removed meanwhile is left out."""
    attempts = folder / "attempts"
    numbers: list[int] = []
    with contextlib.suppress(FileNotFoundError):
        numbers = sorted(int(path.name) for path in attempts.iterdir() if path.name.isdecimal())
    for number in numbers:
        log = attempts / str(number) / "log.txt"
        with contextlib.suppress(FileNotFoundError), log.open("rb") as file:
            yield file


def remove_folder(path: Path) -> None:
    """Remove a folder that may be gone; by a rename first, so that no half of it is ever seen."""
    doomed = path.with_name(f".removed-{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):
        path.rename(doomed)
        shutil.rmtree(doomed)


def files_below(path: Path) -> Iterator[Path]:
    """Every file below a folder; what is removed meanwhile, folders too, is left out.

    `Path.rglob` raises where a folder goes between its being found and its being read.
    """
    for folder, _, names in os.walk(path):
        yield from (Path(folder, name) for name in names)


def folder_bytes(path: Path) -> int:
    """Bytes in all files below a folder; 0 where there is none."""
    total = 0
    for file in files_below(path):
        with contextlib.suppress(FileNotFoundError):  # removed in this moment
            found = file.lstat()
            total += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return total
