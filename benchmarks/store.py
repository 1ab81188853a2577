"""The store at 100 layers × 100,000 steps, beside TensorBoard event files and trackio: one run.

Run alone: python -m benchmarks.store [steps]. TensorBoard and trackio are optional (the group
`bench`), and do a tenth of the work at most: their rates are what is compared.
"""

import importlib
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sqlmodel import Session

from app.jobs.spool import Record, SpoolWriter, read_spool
from app.store import charts, jobs, samples
from app.store.db import Database
from app.store.tables import Attempt, Job, Model

LAYERS, STEPS, PORTION, POINTS = 100, 100_000, 500, 1000
SPIKE = 1e6
NAMES = [f"encoder.layer.{i // 8}.part{i % 8}" for i in range(LAYERS)]
METRICS = ("loss", "lr", "grad_norm_total")


def make_steps(steps: int) -> Iterator[tuple[int, dict[str, float], list[list[float]]]]:
    """Numbers that look like a training run, with one gradient that explodes for one step."""
    rng = random.Random(0)
    pool = [rng.lognormvariate(0, 1) for _ in range(10_007)]
    for step in range(1, steps + 1):
        begin = step * 300 % 9_000
        columns = [pool[begin + i * LAYERS : begin + (i + 1) * LAYERS] for i in range(3)]
        if step == steps * 617 // 1000:
            columns[0][41] = SPIKE
        yield step, dict(zip(METRICS, pool[begin : begin + 3], strict=True)), columns


def fill(db: Database, steps: int) -> tuple[float, float]:
    """Seconds (wall, CPU) that storing the records took, as the runner hands them over."""

    def add(session: Session) -> None:
        session.add(Model(spec={}))
        session.flush()
        job = jobs.add_job(session, kind="train", model_id=1, spec={}, config={})
        jobs.start_attempt(session, job, "cpu", None)

    db.write(add)
    records = [Record(1, 1, "start", {"layers": NAMES, "step": 0, "total_steps": steps})]
    taken = busy = 0.0
    for step, values, (grad, update, weight) in make_steps(steps):
        told = {"step": step, "epoch": 0.0, "values": values, "step_ms": 1.0}
        norms = {"step": step, "grad_norm": grad, "update_norm": update, "weight_norm": weight}
        records += [Record(1, 2 * step, "metrics", told), Record(1, 2 * step + 1, "layers", norms)]
        if step % PORTION == 0 or step == steps:
            portion, records = records, []

            def store(session: Session, portion: list[Record] = portion) -> None:
                rows = session.get_one(Job, 1), session.get_one(Attempt, (1, 1))
                samples.ingest(session, *rows, portion, 0)

            before, busy_before = time.perf_counter(), time.process_time()
            db.write(store)
            taken += time.perf_counter() - before
            busy += time.process_time() - busy_before
    return taken, busy


def median_ms(read: Callable[[], Any], times: int = 5) -> tuple[float, float]:
    """Of the wall, and of the CPU, which a busy machine does not disturb."""
    wall, cpu = [], []
    for _ in range(times):
        before, busy = time.perf_counter(), time.process_time()
        read()
        wall.append((time.perf_counter() - before) * 1e3)
        cpu.append((time.process_time() - busy) * 1e3)
    return statistics.median(wall), statistics.median(cpu)


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def run_ours(folder: Path, steps: int) -> None:
    count = steps * (3 * LAYERS + len(METRICS))
    db = Database(folder / "frostline.db")
    seconds, busy = fill(db, steps)
    print(f"frostline      {count:,} values, one row a layer and step, with roll-ups")
    print(
        f"  ingest       {count / seconds:12,.0f} values/s, {count / busy:,.0f} a CPU second"
        " (target 300,000)"
    )
    print(f"  on disk      {size_of(folder) / count:12.1f} bytes a value, WAL and all (target 20)")

    def matrix(layers: int, **given: Any) -> list[list[Any]]:
        with db.read() as session:
            return charts.read_matrix(session, 1, "grad_norm", range(layers), **given)[1]

    def series(**given: Any) -> dict[str, Any]:
        with db.read() as session:
            return charts.read_series(session, 1, **given)

    half = {"first": steps // 4, "last": steps * 3 // 4}
    for what, read in {
        "1 layer in 1,000 buckets (target 20)": lambda: matrix(1, points=POINTS),
        "100 layers in 1,000 (target 400)": lambda: matrix(LAYERS, points=POINTS),
        "100 layers in 1,000, half the steps": lambda: matrix(LAYERS, points=POINTS, **half),
        "100 layers in 200": lambda: matrix(LAYERS, points=200),
        "100 layers in 1,000, each one's last": lambda: matrix(
            LAYERS, points=POINTS, reduce="last"
        ),
        "all metrics in 1,000": lambda: series(points=POINTS),
    }.items():
        wall, cpu = median_ms(read)
        print(f"  read         {wall:12.1f} ms, {cpu:.1f} of the CPU: {what}")
    seen = [
        points for points in (1, 10, 100, 1000, 5000) if SPIKE in matrix(LAYERS, points=points)[41]
    ]
    print(f"  a spike of one step shows in {seen} buckets")
    before = time.perf_counter()
    db.write(lambda session: jobs.delete_job(session, session.get_one(Job, 1)))
    slowest, portions, more = 0.0, 0, True
    while more:
        began = time.perf_counter()
        more = db.write(jobs.delete_leftovers)
        slowest, portions = max(slowest, time.perf_counter() - began), portions + 1
    taken = time.perf_counter() - before
    db.close()
    print(
        f"  delete       {taken:12.1f} s in {portions} portions of {slowest * 1e3:,.0f} ms at most;"
        f" {size_of(folder) / 2**20:.1f} MiB are left"
    )


def run_spool(folder: Path) -> None:
    """What recording costs the training loop: one record of 200 values a step."""
    writer = SpoolWriter(folder / "telemetry.spool", 1)
    taken = []
    for step in range(20_000):
        third = [float(step + i) for i in range(67)]
        norms = {"step": step, "grad_norm": third, "update_norm": third, "weight_norm": third}
        before = time.perf_counter()
        writer.append("layers", norms)
        taken.append((time.perf_counter() - before) * 1e3)
    writer.close()
    p50, p99 = statistics.median(taken), statistics.quantiles(taken, n=100)[98]
    size = (folder / "telemetry.spool").stat().st_size / (20_000 * 201)
    before, offset, count = time.perf_counter(), 0, 0
    while (found := read_spool(folder / "telemetry.spool", offset))[0]:
        count, offset = count + len(found[0]), found[1]
    rate = count * 201 / (time.perf_counter() - before)
    print(f"  record 200   {p50:12.3f} ms at the median, {p99:.3f} ms at p99 (target 0.5)")
    print(f"  spool        {size:12.1f} bytes a value; read back at {rate:,.0f} values/s")


def run_tensorboard(folder: Path, steps: int) -> None:
    writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(folder)
    loader = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    before = time.perf_counter()
    for step, values, columns in make_steps(steps):
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        for stat, column in zip(("grad", "update", "weight"), columns, strict=True):
            for layer, value in zip(NAMES, column, strict=True):
                writer.add_scalar(f"{stat}/{layer}", value, step)
    writer.close()
    _report_other("tensorboard", folder, steps, time.perf_counter() - before)
    before = time.perf_counter()
    found = loader.EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    found.Scalars("grad/" + NAMES[41])
    taken = time.perf_counter() - before
    print(f"  read         {taken * 1e3:12.1f} ms  one chart, or all: the whole file is read")
    shown = loader.EventAccumulator(str(folder), size_guidance={"scalars": 1000}).Reload()
    kept = {event.value for event in shown.Scalars("grad/" + NAMES[41])}
    print(f"  a spike of one step shows in 1,000 points: {SPIKE in kept}")


def run_trackio(folder: Path, steps: int) -> None:
    storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
    before, batch = time.perf_counter(), []
    for step, values, columns in make_steps(steps):
        logged: dict[str, Any] = dict(values)
        for stat, column in zip(("grad", "update", "weight"), columns, strict=True):
            logged |= {f"{stat}/{layer}": v for layer, v in zip(NAMES, column, strict=True)}
        batch.append(logged)
        if step % PORTION == 0 or step == steps:
            numbers = list(range(step - len(batch) + 1, step + 1))
            storage.bulk_log(project="bench", run="one", metrics_list=batch, steps=numbers)
            batch = []
    _report_other("trackio", folder, steps, time.perf_counter() - before)
    before = time.perf_counter()
    storage.get_logs("bench", "one")
    taken = time.perf_counter() - before
    print(f"  read         {taken * 1e3:12.1f} ms  one chart, or all: every row is read")


def _report_other(name: str, folder: Path, steps: int, seconds: float) -> None:
    count = steps * (3 * LAYERS + len(METRICS))
    print(f"{name:14} {count:,} values")
    print(f"  ingest       {count / seconds:12,.0f} values/s")
    print(f"  on disk      {size_of(folder) / count:12.1f} bytes a value")


def main(steps: int = STEPS) -> None:
    with tempfile.TemporaryDirectory() as name:
        ours = Path(name) / "ours"
        ours.mkdir()
        run_ours(ours, steps)
        run_spool(Path(name))
    for other, run in (("tensorboard", run_tensorboard), ("trackio", run_trackio)):
        folder = Path(tempfile.mkdtemp())
        try:
            run(folder, max(100, steps // 50))
        except ImportError as error:
            print(f"{other}: not compared, {error}; pip install -e '.[bench]' brings it")
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
