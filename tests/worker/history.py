"""A small history checker: whatever was killed when, this must hold of a data folder."""

import contextlib
import hashlib
import json
import math
import os
import sqlite3
from collections import defaultdict
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.jobs import folder as job_folder
from app.jobs.leftovers import find_processes
from app.jobs.spool import Record, read_spool
from app.store.jobs import TRANSITIONS
from app.training.places import checkpoint_path, checkpoint_steps
from tests.worker.silly_jobs import eventually

ENDED = ("stopped", "failed", "interrupted", "succeeded")


@dataclass
class History:
    """What was seen of a data folder so far, to compare with what is seen later."""

    data_dir: Path
    attempts: dict[tuple[int, int], tuple[Any, ...]] = field(default_factory=dict)

    def look(self) -> None:
        """Check what must hold at any moment: call it as often as you like."""
        jobs = self._query("SELECT id, state, attempt FROM job")
        assert {state for _, state, _ in jobs} <= TRANSITIONS.keys()
        columns = "job_id, number, device, resume_step, outcome, reason, message, ended_at"
        live: dict[int, int] = defaultdict(int)
        for row in self._query(f"SELECT {columns} FROM attempt"):
            key, ended_at = row[:2], row[7]
            live[key[0]] += ended_at is None
            before = self.attempts.get(key)
            assert before is None or before == row, f"an ended attempt changed: {before} → {row}"
            if ended_at is not None:
                self.attempts[key] = row
        assert max(live.values(), default=0) <= 1, f"more than one live attempt: {dict(live)}"
        held = [
            path.parents[2].name
            for path in self.data_dir.glob("jobs/*/attempts/*/lock")
            if job_folder.is_held(path.parent)
        ]
        assert len(held) == len(set(held)), f"two workers of one job live: {held}"

    def check_end(self) -> None:
        """Check what must hold when nothing runs any more."""
        self.look()
        for folder in self.data_dir.glob("jobs/[0-9]*"):
            self._check_records(int(folder.name), folder)
            check_checkpoints(folder)
            check_leftovers(folder)

    def _check_records(self, job_id: int, folder: Path) -> None:
        """The database holds what a naive replay of the spools gives: nothing lost or doubled."""
        metrics, layers = replay(folder)
        rows = self._query("SELECT name, step, value FROM metrics WHERE job_id = ?", job_id)
        assert len(rows) == len({row[:2] for row in rows}), "a metric stands there twice"
        assert {row[:2]: row[2] for row in rows} == metrics, f"metrics of job {job_id}"
        query = "SELECT DISTINCT step FROM layer_stats WHERE job_id = ?"
        assert {step for (step,) in self._query(query, job_id)} == layers

    def _query(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        address = f"{(self.data_dir / 'frostline.db').as_uri()}?mode=ro"
        with closing(sqlite3.connect(address, uri=True, timeout=30)) as database:
            return database.execute(query, values).fetchall()


def read_attempts(folder: Path) -> dict[int, list[Record]]:
    """Attempt → its records, which are whole and numbered from 1 on, in order."""
    found = {}
    numbers = sorted(int(p.name) for p in folder.glob("attempts/*") if p.name.isdecimal())
    for number in numbers:
        path = folder / "attempts" / str(number) / "telemetry.spool"
        records, _ = read_spool(path, limit_bytes=2**30)
        assert [record.sequence for record in records] == list(range(1, len(records) + 1))
        assert {record.attempt for record in records} <= {number}
        found[number] = records
    return found


def replay(folder: Path) -> tuple[dict[tuple[str, int], Any], set[int]]:
    """What all attempts of a job add up to: metrics by (name, step), and the steps with layers."""
    metrics: dict[tuple[str, int], Any] = {}
    layers: set[int] = set()
    for records in read_attempts(folder).values():
        for record in records:
            step = record.payload.get("step", 0)
            if record.kind == "start":
                metrics = {key: value for key, value in metrics.items() if key[1] <= step}
                layers = {one for one in layers if one <= step}
            elif record.kind == "metrics":
                for name, value in record.payload["values"].items():
                    metrics[name, step] = "NaN" if math.isnan(value) else value
            elif record.kind == "layers":
                layers.add(step)
    return metrics, layers


def check_checkpoints(folder: Path) -> list[int]:
    """Every published checkpoint is what its manifest says; their steps."""
    checkpoints = folder / "checkpoints"
    steps = checkpoint_steps(checkpoints)
    for step in steps:
        path = checkpoint_path(checkpoints, step)
        manifest = json.loads((path / "manifest.json").read_text())
        assert manifest["step"] == step
        names = {file.name for file in path.iterdir()} - {"manifest.json"}
        assert names == manifest["files"].keys()
        for name, told in manifest["files"].items():
            data = (path / name).read_bytes()
            assert hashlib.sha256(data).hexdigest() == told["sha256"], path / name
    return steps


def check_leftovers(folder: Path) -> None:
    """No half-written document, no process, no lock that is held.

    A living server tells a job's end before it writes the job's card; that draft goes by itself.
    """
    with contextlib.suppress(AssertionError):  # the next line names them
        eventually(lambda: not find_drafts(folder), seconds=10)
    assert find_drafts(folder) == []
    for attempt in folder.glob("attempts/[0-9]*"):
        assert not job_folder.is_held(attempt), f"{attempt} is still held"
        assert not find_processes(attempt), f"{attempt} left processes behind"


def find_drafts(folder: Path) -> list[str]:
    """Half-written documents and attempts; only the next attempt tidies checkpoints."""
    return [
        name
        for top, below, files in os.walk(folder)
        for name in (*below, *files)
        if name.startswith(".") and Path(top).name != "checkpoints"
    ]
