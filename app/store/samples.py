"""Samples: what a job measured, from its spool into rows, and from rows into series and matrices.

NaN is kept as the text 'NaN', since SQLite would turn it into NULL; as a text it is greater than
every number, so that a maximum shows it. What leaves here for JSON has "NaN", "Infinity" and
"-Infinity" in the place of numbers that JSON lacks.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from sqlalchemy import Connection, text
from sqlmodel import Session, col, select

from app.store import jobs
from app.store.tables import Attempt, Job, Layer, Proof, utc_now

STATS: Mapping[str, str] = {
    "grad_norm": "grad_norm",
    "update_norm": "update_norm",
    "weight_norm": "weight_norm",
    # A text divides as 0 and infinity by itself as NULL: both are NaN.
    "update_ratio": """CASE
        WHEN update_norm IS NULL OR weight_norm IS NULL OR weight_norm = 0 THEN NULL
        WHEN typeof(update_norm) = 'text' OR typeof(weight_norm) = 'text' THEN 'NaN'
        ELSE coalesce(update_norm / weight_norm, 'NaN') END""",
}
REDUCTIONS = ("max", "min", "last")
MAX_CELLS = 1_000_000


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
    metrics: list[tuple[int, str, int, Any]] = []
    layers: list[tuple[Any, ...]] = []
    progress: dict[str, Any] = {}
    for record in new:
        payload = record.payload
        match record.kind:
            case "start":
                progress |= _begin(session, job.id, payload)
            case "metrics":
                step = payload["step"]
                metrics += [
                    (job.id, name, step, _storable(value))
                    for name, value in payload["values"].items()
                ]
                # Without a duration it is no completed step: an evaluation, or a loss that is not
                # a number and that the optimizer did not take.
                if payload.get("step_ms") is not None:
                    before = progress.get("step_ms", job.step_ms)
                    progress |= {"step": step, "epoch": payload["epoch"]}
                    progress["step_ms"] = _smooth(before, payload["step_ms"])
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
            case "state":
                _acknowledge(session, job, payload["state"])
    _insert_metrics(connection, metrics)
    _insert_layers(connection, job.id, layers)
    attempt.spool_offset = offset
    if new:
        attempt.sequence = new[-1].sequence
    session.add(attempt)
    if new:  # also where nothing but a log line came: whoever follows all jobs hears of it
        jobs.update_job(session, job, **progress)
    session.flush()


def _begin(session: Session, job_id: int, payload: Mapping[str, Any]) -> dict[str, Any]:
    """What an attempt says first. What older ones recorded after its first step is superseded."""
    connection = session.connection()
    for table in ("metric", "layer_stat"):
        connection.execute(
            text(f"DELETE FROM {table} WHERE job_id = :job AND step > :step"),  # noqa: S608
            {"job": job_id, "step": payload["step"]},
        )
    for position, path in enumerate(payload["layers"]):
        session.merge(Layer(job_id=job_id, position=position, path=path))
    known = ("total_steps", "step", "device_name", "device_bytes", "train_size", "warnings")
    return {key: payload[key] for key in known if key in payload} | {"step_ms": None}


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


def _smooth(before: float | None, now: float) -> float:
    return now if before is None else 0.9 * before + 0.1 * now


def _storable(value: float | None) -> Any:
    return "NaN" if value != value else value


def _storables(values: Iterable[float | None]) -> list[Any]:
    return ["NaN" if value != value else value for value in values]


def _insert_metrics(connection: Connection, rows: list[tuple[int, str, int, Any]]) -> None:
    if rows:
        connection.exec_driver_sql(
            "INSERT INTO metric (job_id, name, step, value) VALUES (?, ?, ?, ?)"
            " ON CONFLICT (job_id, name, step) DO UPDATE SET value = excluded.value",
            rows,
        )


def _insert_layers(connection: Connection, job_id: int, columns: list[tuple[Any, ...]]) -> None:
    """Insert layer by layer, which is the order of the table's tree."""
    if columns:
        count = len(columns[0][1])
        rows = [
            (job_id, position, step, grad[position], update[position], weight[position])
            for position in range(count)
            for step, grad, update, weight in columns
        ]
        connection.exec_driver_sql(
            "INSERT OR REPLACE INTO layer_stat VALUES (?, ?, ?, ?, ?, ?)", rows
        )


# ------------------------------------------------------------------------------------------ reading


def read_series(
    session: Session,
    job_id: int,
    name: str | None = None,
    points: int | None = None,
    first: int | None = None,
    last: int | None = None,
) -> dict[str, dict[str, list[Any]]]:
    """Every metric (or one) over the steps `first` to `last`, in at most `points` buckets.

    Returns:
        name → ``steps``, ``min``, ``max``, ``values``; a bucket's value and step are its last.
    """
    where, given = _range(job_id, first, last)
    chosen = where if name is None else f"{where} AND name = :name"
    connection = session.connection()
    found = connection.execute(
        text(
            f"SELECT name, count(*), min(step), max(step) FROM metric WHERE {chosen}"  # noqa: S608
            " GROUP BY name ORDER BY min(id)"
        ),
        {**given, "name": name},
    ).all()
    where += " AND name = :name"
    return {
        row[0]: _read_one_series(connection, where, {**given, "name": row[0]}, row, points)
        for row in found
    }


def _read_one_series(
    connection: Connection,
    where: str,
    given: dict[str, Any],
    found: Sequence[Any],
    points: int | None,
) -> dict[str, list[Any]]:
    _, count, low, high = found
    if points is None or count <= points:
        rows = connection.execute(
            text(f"SELECT step, value FROM metric WHERE {where} ORDER BY step"),  # noqa: S608
            given,
        ).all()
        values = mark([value for _, value in rows])
        return {"steps": [s for s, _ in rows], "min": values, "max": values, "values": values}
    rows = connection.execute(
        text(
            f"""SELECT b.last, b.low, b.high, m.value FROM (
                    SELECT max(step) AS last, min(value) AS low, max(value) AS high
                    FROM metric WHERE {where} GROUP BY {_bucket(low, high, points)}
                ) AS b JOIN metric AS m ON m.job_id = :job AND m.name = :name AND m.step = b.last
                ORDER BY b.last"""  # noqa: S608
        ),
        given,
    ).all()
    steps, lows, highs, values = (list(column) for column in zip(*rows, strict=True))
    return {"steps": steps, "min": mark(lows), "max": mark(highs), "values": mark(values)}


def read_matrix(
    session: Session,
    job_id: int,
    stat: str,
    positions: Sequence[int],
    points: int | None = None,
    first: int | None = None,
    last: int | None = None,
    reduce: str = "max",
) -> tuple[list[int], list[list[Any]]]:
    """One measure of some layers over the steps, in at most `points` buckets.

    Args:
        positions: of the layers, in the order in which their rows are wanted.
        reduce: what stands for a bucket: its ``max``, ``min`` or ``last``.

    Returns:
        The last step of every bucket, and a row a layer; None where there is no value.
    """
    if not positions:
        return [], []
    where, given = _range(job_id, first, last)
    connection = session.connection()
    # Every record has all layers, so one layer tells the steps.
    on_one = f"FROM layer_stat WHERE {where} AND position = :position"
    given_one = {**given, "position": positions[0]}
    count, low, high = connection.execute(
        text(f"SELECT count(*), min(step), max(step) {on_one}"),
        given_one,
    ).one()
    if count == 0:
        return [], [[] for _ in positions]
    points = min(points or count, max(1, MAX_CELLS // len(positions)))
    group = "step" if count <= points else _bucket(low, high, points)
    ends = f"SELECT max(step) {on_one} GROUP BY {group}"
    steps = list(connection.execute(text(f"{ends} ORDER BY 1"), given_one).scalars())
    columns = {step: index for index, step in enumerate(steps)}
    rows = {position: [None] * len(steps) for position in positions}
    wanted = f"{where} AND position IN ({', '.join(str(int(p)) for p in positions)})"
    if group == "step" or reduce == "last":
        query = f"SELECT position, step, {STATS[stat]} FROM layer_stat WHERE {wanted}"  # noqa: S608
        if group != "step":
            query += f" AND step IN ({ends})"
            given = given_one
    else:
        query = (
            f"SELECT position, max(step), {reduce}({STATS[stat]}) FROM layer_stat"  # noqa: S608
            f" WHERE {wanted} GROUP BY position, {group}"
        )
    for position, step, value in connection.execute(text(query), given):
        rows[position][columns[step]] = value
    return steps, [mark(rows[position]) for position in positions]


def read_layers(session: Session, job_id: int) -> list[str]:
    """Paths of a job's layers; the index of each is its position."""
    query = select(Layer.path).where(Layer.job_id == job_id).order_by(col(Layer.position))
    return list(session.exec(query).all())


def read_metrics_since(
    session: Session, job_id: int, metric_id: int, limit: int = 10_000
) -> tuple[dict[str, dict[str, list[Any]]], int]:
    """Metrics stored after the one with that id, as series, and the id of the last of them."""
    rows = session.connection().execute(
        text(
            "SELECT id, name, step, value FROM metric WHERE job_id = :job AND id > :id"
            " ORDER BY id LIMIT :limit"
        ),
        {"job": job_id, "id": metric_id, "limit": limit},
    )
    series: dict[str, dict[str, list[Any]]] = {}
    for row_id, name, step, value in rows:
        metric_id = row_id
        one = series.setdefault(name, {"steps": [], "min": [], "max": [], "values": []})
        one["steps"].append(step)
        for key in ("min", "max", "values"):
            one[key].append(_mark_one(value))
    return series, metric_id


def last_metric(session: Session, job_id: int) -> int:
    """The id of the job's last stored metric, 0 before the first."""
    query = "SELECT coalesce(max(id), 0) FROM metric WHERE job_id = :job"
    return int(session.connection().execute(text(query), {"job": job_id}).scalar_one())


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
            "SELECT min(step), max(step) FROM (SELECT step FROM layer_stat"  # noqa: S608
            " WHERE job_id = :job AND position = 0 AND step > :after"
            f" ORDER BY step {order} LIMIT :limit)"
        ),
        {"job": job_id, "after": after, "limit": limit},
    )
    first, last = rows.one()
    return None if first is None else (first, last)


def iterate_samples(session: Session, job_id: int) -> Iterator[tuple[int, str, str, Any]]:
    """Every value as (step, layer, name, value): metrics first, whose layer is "", then layers."""
    connection = session.connection()
    query = "SELECT step, '', name, value FROM metric WHERE job_id = :job ORDER BY step, id"
    for step, layer, name, value in connection.execute(text(query), {"job": job_id}):
        yield step, layer, name, _mark_one(value)
    for stat in ("grad_norm", "update_norm", "weight_norm"):
        query = f"SELECT step, layer, {stat} FROM layer_stats WHERE job_id = :job"  # noqa: S608
        for step, layer, value in connection.execute(text(query), {"job": job_id}):
            yield step, layer, stat, _mark_one(value)


def mark(values: list[Any]) -> list[Any]:
    """The values as JSON can hold them: a number that is not finite becomes its name."""
    return [_mark_one(value) for value in values]


def _mark_one(value: Any) -> Any:
    if type(value) is float and not math.isfinite(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value


def _range(job_id: int, first: int | None, last: int | None) -> tuple[str, dict[str, Any]]:
    where, given = "job_id = :job", {"job": job_id}
    for given_name, sign, step in (("first", ">=", first), ("last", "<=", last)):
        if step is not None:
            where, given = f"{where} AND step {sign} :{given_name}", {**given, given_name: step}
    return where, given


def _bucket(low: int, high: int, points: int) -> str:
    """SQL for a step's bucket: `points` ranges of equal length between two steps."""
    return f"(step - {int(low)}) * {int(points)} / {int(high) - int(low) + 1}"
