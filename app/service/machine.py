"""Verbs on the machine: what runs, what waits, what takes space, and what is wrong, in words."""

import importlib.metadata
import platform
import re
import shutil
from pathlib import Path

import psutil

from app import __version__
from app.service.documents import Document
from app.service.ground import Ground
from app.store import damage, files, jobs
from app.training.places import checkpoint_steps

LARGEST = 10  # job folders that are named when somebody asks where the space went
COPIES = (
    (r"frostline\.db\.v\d+_\w+", "a copy from before an update; delete it when all is well"),
    (r"frostline\.db\.damaged-.*", "a damaged database that was rebuilt; delete it"),
)


class Machine(Ground):
    """Verbs on the machine."""

    def health(self) -> Document:
        """`workers` is how many jobs can run at once; 0 while no worker can be started."""
        slots = self._runner.slots()
        total = slots["cpu"]["total"] + slots["cuda"]["total"]
        is_ready = self._runner.keeper()["ready"]
        return {"status": "ok", "version": __version__, "workers": total if is_ready else 0}

    def system_report(self) -> Document:
        """Everything about the machine that somebody asks for who wonders what goes on."""
        with self._db.read() as session:
            counts = jobs.count_by_state(session)
        disk, memory = shutil.disk_usage(self._settings.data_dir), psutil.virtual_memory()
        python = self._settings.worker_python
        doing = self._runner.measure_devices()
        report: Document = {
            "version": __version__,
            "python": platform.python_version(),
            "torch": importlib.metadata.version("torch"),
            "data_dir": str(self._settings.data_dir),
            "database_bytes": self._db.path.stat().st_size,
            "devices": [{**one, **doing.get(one["id"], {})} for one in self._runner.devices()],
            "slots": self._runner.slots(),
            "keeper": self._runner.keeper(),
            "disk": {"free": disk.free, "total": disk.total},
            "memory": {
                "server": psutil.Process().memory_info().rss,
                "available": memory.available,
                "total": memory.total,
            },
            "jobs": counts,
            "running": self._describe_running(),
            "queue": self._describe_queue(),
            "space": self._describe_space(),
            "code_dirs": [str(path) for path in self._settings.code_dirs],
            "file_dirs": [str(path) for path in self._settings.file_dirs],
            "worker_python": None if python is None else str(python),
        }
        return {**report, "findings": [*self._find(report)]}

    def _describe_running(self) -> list[Document]:
        """Each live attempt: job, state, device, process, and the memory that it takes."""
        usage = self._runner.usage()
        with self._db.read() as session:
            live = jobs.live_attempts(session)
        nothing = {"memory_bytes": None, "device_memory_bytes": None}
        return [
            {
                "id": job.id,
                "name": job.name,
                "state": job.state,
                "device": attempt.device,
                "worker_pid": attempt.pid,
                "attempt": attempt.number,
                "peak_memory_bytes": attempt.peak_bytes,
                **usage.get(attempt.job_id, nothing),
            }
            for job, attempt in live
        ]

    def _describe_queue(self) -> list[Document]:
        """Who waits, in the order in which they are to start, and what for."""
        with self._db.read() as session:
            waiting = [*jobs.queued_jobs(session), *jobs.restarting_jobs(session)]
        return [
            {
                "id": job.id,
                "name": job.name,
                "state": job.state,
                "priority": job.priority,
                "waiting_for": job.waiting_for,
            }
            for job in waiting
        ]

    def _describe_space(self) -> Document:
        """Where the space of the data folder went, the largest job folders first."""
        data_dir = self._settings.data_dir
        folders = [path for path in data_dir.glob("jobs/*") if path.name.isdecimal()]
        sizes = sorted(((files.folder_bytes(path), path) for path in folders), reverse=True)
        copies = [
            {"name": path.name, "bytes": path.stat().st_size, "what": what}
            for path in sorted(data_dir.glob("frostline.db.*"))
            for pattern, what in COPIES
            if re.fullmatch(pattern, path.name) and path.suffix not in (".wal", ".shm")
        ]
        return {
            "jobs_bytes": sum(size for size, _ in sizes),
            "largest": [_describe_folder(size, path) for size, path in sizes[:LARGEST]],
            "copies": copies,
        }

    def _find(self, report: Document) -> list[Document]:
        """What there is to say about the state of things: (is_well, subject, words)."""
        found = [
            ("workers", *_say_workers(report)),
            ("queue", True, _say_queue(report)),
            ("disk", *_say_disk(report, self._settings.min_free_bytes)),
            ("database", *_say_database(self._db.path, report["database_bytes"])),
        ]
        found += [(what, False, f"{why}. It is tried again.") for what, why in self._troubles()]
        return [{"subject": what, "is_well": good, "words": words} for what, good, words in found]

    def _troubles(self) -> list[tuple[str, str]]:
        return [(what, why.rstrip(".")) for what, why in self._runner.troubles().items()]


def _describe_folder(size: int, path: Path) -> Document:
    checkpoints = path / "checkpoints"
    return {
        "id": int(path.name),
        "bytes": size,
        "checkpoints": len(checkpoint_steps(checkpoints)),
        "checkpoint_bytes": files.folder_bytes(checkpoints),
    }


def _say_workers(report: Document) -> tuple[bool, str]:
    keeper = report["keeper"]
    if keeper["ready"]:
        return True, f"Ready: process {keeper['pid']} has torch loaded and starts them at once."
    if keeper["error"]:
        return False, f"No job can start: {keeper['error']}"
    return True, "The process that starts them is still importing torch; jobs wait for it."


def _say_queue(report: Document) -> str:
    running, queue = len(report["running"]), report["queue"]
    if not queue:
        return f"{_count(running, 'job')} running, nobody waits."
    first = queue[0]
    why = first["waiting_for"] or "It starts in a moment."
    return (
        f"{_count(running, 'job')} running, {len(queue)} waiting. Next is job {first['id']}: {why}"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _say_disk(report: Document, least: int) -> tuple[bool, str]:
    free, total = report["disk"]["free"], report["disk"]["total"]
    words = f"{free / 1e9:,.1f} of {total / 1e9:,.0f} GB free."
    if free < least:
        return False, f"{words} No job starts below {least / 1e6:,.0f} MB: delete something."
    if free < 10 * least:
        return False, f"{words} That is little: delete checkpoints or jobs that are not needed."
    return True, words


def _say_database(path: Path, size: int) -> tuple[bool, str]:
    marker = damage.marker_of(path)
    if marker.exists():
        words = "It is damaged. Restart the server: it is rebuilt from the job folders."
        return False, words
    return True, f"Well, {size / 1e6:,.1f} MB."
