"""Samples: what a job measured, from its spool into rows, and what is new in them or all of it.

NaN is kept as the text 'NaN', since SQLite would turn it into NULL; as a text it is greater than
every number, so that a maximum shows it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from sqlalchemy import Connection, text
from sqlmodel import Session, col, select

from app.store import jobs, rollups
from app.store.charts import mark_one
from app.store.tables import Attempt, Job, Layer, Proof, utc_now


class Record(Protocol):
    """A spool's record, as far as the database is concerned."""

    @property
    def sequence(self) -> int: ...
    @property
    def kind(self) -> str: ...
    @property
    def payload(self) -> dict[str, Any]: ...


# ---------------------------------------------------------------------------------------- ingesting


def ingest(
    session: Session, job: Job, attempt: Attempt, records: Sequence[Record], offset: int
) -> None:
    """Store records of an attempt and, in the same transaction, how far its spool is read.

    Args:
        offset: bytes of the spool that these records end at. A record that is in the database
            already is passed over, so that each arrives exactly once.
    """
    new = [record for record in records if record.sequence > attempt.sequence]
    connection = session.connection()
    assert job.id is not None
    metrics: list[tuple[str, int, Any]] = []
    layers: list[tuple[Any, ...]] = []
    progress: dict[str, Any] = {}
    for record in new:
        payload = record.payload
        match record.kind:
            case "start":
                progress |= _begin(session, job.id, payload)
                attempt.resumed = payload.get("resumed")
            case "metrics":
                step = payload["step"]
                metrics += [
                    (name, step, _storable(value)) for name, value in payload["values"].items()
                ]
                # Without a duration it is no completed step: an evaluation, or a loss that is not
                # a number and that the optimizer did not take.
                if payload.get("step_ms") is not None:
                    progress |= {"step": step, "epoch": payload["epoch"]}
                    for name in ("step_ms", "measure_ms"):
                        before = progress.get(name, getattr(job, name))
                        progress[name] = _smooth(before, payload.get(name))
            case "layers":
                layers.append(
                    (
                        payload["step"],
                        _storables(payload["grad_norm"]),
                        _storables(payload["update_norm"]),
                        _storables(payload["weight_norm"]),
                    )
                )
            case "proof":
                session.merge(Proof(job_id=job.id, document=payload))
                progress["verdict"] = payload["verdict"]
            case "freeze":
                progress |= _follow_edit(job, attempt, progress, payload)
            case "inspection":
                _mark_layers(connection, job.id, payload)
            case "state":
                _acknowledge(session, job, payload["state"])
    _insert_metrics(connection, job.id, metrics)
    _insert_layers(connection, job, layers)
    attempt.spool_offset = offset
    if new:
        attempt.sequence = new[-1].sequence
        jobs.update_job(session, job, **progress)  # a new version is the signal to read
    session.add(attempt)
    session.flush()


def _begin(session: Session, job_id: int, payload: Mapping[str, Any]) -> dict[str, Any]:
    """What an attempt says first. What older ones recorded after its first step is superseded."""
    connection = session.connection()
    step, layers = payload["step"], payload["layers"]
    estimated = payload.get("estimated", [False] * len(layers))
    connection.exec_driver_sql(
        "DELETE FROM layer_stat WHERE job_id = :job AND step > :step"
        " AND position IN (SELECT position FROM layer WHERE job_id = :job)",
        {"job": job_id, "step": step},
    )
    connection.exec_driver_sql(
        "DELETE FROM metric WHERE series_id IN (SELECT id FROM series WHERE job_id = :job)"
        " AND step > :step",
        {"job": job_id, "step": step},
    )
    rollups.take_back(connection, job_id, step)
    if layers:
        connection.exec_driver_sql(
            "INSERT INTO layer (job_id, position, path, estimated, unreached)"
            " VALUES (?, ?, ?, ?, 0) ON CONFLICT (job_id, position) DO UPDATE"
            " SET path = excluded.path, estimated = excluded.estimated, unreached = 0, lost = NULL",
            [(job_id, i, *one) for i, one in enumerate(zip(layers, estimated, strict=True))],
        )
    known = ("total_steps", "step", "device_name", "device_bytes", "train_size", "warnings")
    told = {key: payload[key] for key in known if key in payload}
    return told | {"step_ms": None, "measure_ms": None}


def _mark_layers(connection: Connection, job_id: int, payload: Mapping[str, Any]) -> None:
    """What an exact pass found out about each layer, in the place of what the one before found."""
    marks = zip(payload["unreached"], payload["lost"], strict=True)
    connection.exec_driver_sql(
        "UPDATE layer SET unreached = ?, lost = ? WHERE job_id = ? AND position = ?",
        [(unreached, lost, job_id, i) for i, (unreached, lost) in enumerate(marks)],
    )


def _acknowledge(session: Session, job: Job, state: str) -> None:
    """The loop runs or holds. A job that is being stopped stays so, whatever its loop says."""
    if job.state == state or state not in jobs.TRANSITIONS[job.state]:
        return
    started = {} if job.started_at is not None else {"started_at": utc_now()}
    jobs.move_job(session, job, state, **started)


def _follow_edit(
    job: Job, attempt: Attempt, progress: Mapping[str, Any], payload: Mapping[str, Any]
) -> dict[str, Any]:
    """A live change took effect: its entries of the schedule are part of the config as trained."""
    config, spec = progress.get("config", job.config), progress.get("spec", job.spec)
    schedule = payload["config"]["schedule"]
    # Every edit has rules, so that one which added no entry was refused by the loop.
    is_refused = len(schedule) == len(config["schedule"])
    told = {"is_refused": True} if is_refused else {"step": payload["step"] + 1}
    attempt.edits = [
        {**edit, **told} if edit["seq"] == payload["seq"] else edit for edit in attempt.edits
    ]
    return {
        "config": {**config, "schedule": schedule},
        "spec": {**spec, "config": {**spec["config"], "schedule": schedule}},
    }


def _smooth(before: float | None, now: float | None) -> float | None:
    if before is None or now is None:
        return before if now is None else now
    return 0.9 * before + 0.1 * now


def _storable(value: float | None) -> Any:
    return "NaN" if value != value else value


def _storables(values: Iterable[float | None]) -> list[Any]:
    return ["NaN" if value != value else value for value in values]


def _insert_metrics(
    connection: Connection, job_id: int, rows: Sequence[tuple[str, int, Any]]
) -> None:
    if not rows:
        return
    connection.exec_driver_sql(
        "INSERT INTO series (job_id, name) VALUES (?, ?) ON CONFLICT DO NOTHING",
        [(job_id, name) for name in dict.fromkeys(name for name, _, _ in rows)],
    )
    listed = connection.exec_driver_sql("SELECT name, id FROM series WHERE job_id = ?", (job_id,))
    ids: dict[str, int] = dict(tuple(row) for row in listed)
    before = max(_last_step(connection, f"metric WHERE series_id = {i:d}") for i in ids.values())
    connection.exec_driver_sql(
        "INSERT INTO metric (series_id, step, value) VALUES (?, ?, ?)"
        " ON CONFLICT (series_id, step) DO UPDATE SET value = excluded.value",
        [(ids[name], step, value) for name, step, value in rows],
    )
    rollups.extend_metrics(connection, job_id, before, rows[-1][1])


def _insert_layers(connection: Connection, job: Job, columns: Sequence[tuple[Any, ...]]) -> None:
    """Insert layer by layer, which is the order of the table's tree."""
    if not columns:
        return
    assert job.id is not None
    before = _last_step(connection, f"layer_stat WHERE job_id = {job.id:d} AND position = 0")
    connection.exec_driver_sql(
        "INSERT OR REPLACE INTO layer_stat VALUES (?, ?, ?, ?, ?, ?)",
        [
            (job.id, position, step, grad[position], update[position], weight[position])
            for position in range(len(columns[0][1]))
            for step, grad, update, weight in columns
        ],
    )
    stats_every = job.spec.get("training", {}).get("stats_every", 1)
    rollups.extend_layers(connection, job.id, before, columns[-1][0], stats_every)


def _last_step(connection: Connection, owned: str) -> int:
    query = f"SELECT coalesce(max(step), 0) FROM {owned}"
    return int(connection.exec_driver_sql(query).scalar_one())


# ------------------------------------------------------------------------------------------ reading


def read_layers(session: Session, job_id: int) -> list[str]:
    """Paths of a job's layers; the index of each is its position."""
    query = select(Layer.path).where(Layer.job_id == job_id).order_by(col(Layer.position))
    return list(session.exec(query).all())


def read_marks(session: Session, job_id: int) -> Sequence[Layer]:
    """A job's layers with what the newest exact pass found, by position."""
    query = select(Layer).where(Layer.job_id == job_id).order_by(col(Layer.position))
    return session.exec(query).all()


def count_steps(session: Session, job_id: int) -> tuple[int, int]:
    """The first step with layer statistics, and how many have some."""
    query = (
        "SELECT coalesce(min(step), 0), count(*) FROM layer_stat WHERE job_id = ? AND position = 0"
    )
    first, count = session.connection().exec_driver_sql(query, (job_id,)).one()
    return first, count


def read_metrics_since(
    session: Session, job_id: int, metric_id: int, limit: int = 10_000
) -> tuple[dict[str, dict[str, list[Any]]], int]:
    """Metrics stored after the one with that id, as series, and the id of the last of them."""
    end = last_metric(session, job_id)
    rows = session.connection().execute(
        text(
            "SELECT m.id, s.name, m.step, m.value FROM metric AS m CROSS JOIN series AS s"
            " WHERE m.id > max(:id, :begin) AND m.id <= :end"
            " AND s.id = m.series_id AND s.job_id = :job ORDER BY m.id LIMIT :limit"
        ),
        {
            "job": job_id,
            "id": metric_id,
            "begin": _first_metric(session, job_id) - 1,
            "end": end,
            "limit": limit,
        },
    )
    series: dict[str, dict[str, list[Any]]] = {}
    for row_id, name, step, value in rows:
        metric_id = row_id
        one = series.setdefault(name, {"steps": [], "min": [], "max": [], "values": []})
        one["steps"].append(step)
        for key in ("min", "max", "values"):
            one[key].append(mark_one(value))
    return series, metric_id


def last_metric(session: Session, job_id: int) -> int:
    """The id of the job's last stored metric, 0 before the first."""
    return _outermost_metric(session, job_id, "max")


def _first_metric(session: Session, job_id: int) -> int:
    return _outermost_metric(session, job_id, "min")


def _outermost_metric(session: Session, job_id: int, which: str) -> int:
    """The lowest or highest id: within a series ids grow with steps, which have an index."""
    query = f"""SELECT coalesce({which}(m.id), 0) FROM series AS s CROSS JOIN metric AS m
        ON m.series_id = s.id
        AND m.step = (SELECT {which}(step) FROM metric WHERE series_id = s.id)
        WHERE s.job_id = ?"""
    return int(session.connection().exec_driver_sql(query, (job_id,)).scalar_one())


def find_steps(
    session: Session, job_id: int, after: int, limit: int, newest: bool
) -> tuple[int, int] | None:
    """The first and last step with layer statistics after `after`: `limit` of them at most.

    Args:
        newest: take the newest ones, else those that come next.
    """
    order = "DESC" if newest else "ASC"
    rows = session.connection().execute(
        text(
            "SELECT min(step), max(step) FROM (SELECT step FROM layer_stat"
            " WHERE job_id = :job AND position = 0 AND step > :after"
            f" ORDER BY step {order} LIMIT :limit)"
        ),
        {"job": job_id, "after": after, "limit": limit},
    )
    first, last = rows.one()
    return None if first is None else (first, last)


@dataclass(frozen=True)
class Column:
    """Consecutive values of one name, at these steps; `layer` is None for a metric."""

    layer: str | None
    name: str
    steps: list[int]
    values: list[Any]


def iterate_columns(
    read: Callable[[], AbstractContextManager[Session]], job_id: int, limit: int = 10_000
) -> Iterator[Column]:
    """Every value of a job: metrics in their order, then layers in model order, by step.

    Each portion of `limit` rows is a read of its own, so that a slow reader holds nothing up.
    """
    with read() as session:
        query = "SELECT id, name FROM series WHERE job_id = ? ORDER BY id"
        series = session.connection().exec_driver_sql(query, (job_id,)).all()
        layers = read_layers(session, job_id)
    for series_id, name in series:
        owned = f"metric WHERE series_id = {series_id:d}"
        for steps, values in _iterate_rows(read, owned, "value", limit):
            yield Column(None, name, steps, values)
    names = ("grad_norm", "update_norm", "weight_norm")
    for position, layer in enumerate(layers):
        owned = f"layer_stat WHERE job_id = {job_id:d} AND position = {position:d}"
        for steps, *columns in _iterate_rows(read, owned, ", ".join(names), limit):
            for name, values in zip(names, columns, strict=True):
                yield Column(layer, name, steps, values)


def _iterate_rows(
    read: Callable[[], AbstractContextManager[Session]], owned: str, columns: str, limit: int
) -> Iterator[list[list[Any]]]:
    query = f"SELECT step, {columns} FROM {owned} AND step > ? ORDER BY step LIMIT ?"
    after = -1
    while True:
        with read() as session:
            rows = session.connection().exec_driver_sql(query, (after, limit)).all()
        if not rows:
            return
        yield [list(column) for column in zip(*rows, strict=True)]
        after = rows[-1][0]
