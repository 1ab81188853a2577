"""Tables: one class a table, columns only. What the rows mean to each other is said elsewhere."""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import JSON, Column, Index, Integer
from sqlmodel import Field, SQLModel


def utc_now() -> str:
    """Now as ISO 8601 in UTC with milliseconds; texts of this form sort by time."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


# AUTOINCREMENT: an id names a folder and a place in a stream, so a deleted one never comes back.
_NEVER_REUSED = {"sqlite_autoincrement": True}


class Model(SQLModel, table=True):
    """A model by its spec, and what its inspection found out."""

    __tablename__ = "model"
    __table_args__ = _NEVER_REUSED

    id: int | None = Field(default=None, primary_key=True)
    spec: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))
    state: str = "inspecting"
    error_reason: str | None = None
    error_message: str | None = None
    parameter_count: int | None = None
    tensor_count: int | None = None
    module_count: int | None = None
    fingerprint: str | None = None
    weights_digest: str | None = None
    created_at: str = Field(default_factory=utc_now)


class FreezeConfigRow(SQLModel, table=True):
    """A saved freeze config of one model, expanded on it."""

    __tablename__ = "freeze_config"
    __table_args__ = _NEVER_REUSED

    id: int | None = Field(default=None, primary_key=True)
    model_id: int = Field(foreign_key="model.id", index=True)
    document: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))
    created_at: str = Field(default_factory=utc_now)
    updated_at: str = Field(default_factory=utc_now)


class Task(SQLModel, table=True):
    """One inspection or preview: its own queue and slot, a single attempt."""

    __tablename__ = "task"
    __table_args__ = _NEVER_REUSED

    id: int | None = Field(default=None, primary_key=True)
    kind: str = "inspect"
    model_id: int | None = Field(default=None, index=True)
    state: str = Field(default="queued", index=True)
    spec: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))
    pid: int | None = None
    error_reason: str | None = None
    error_message: str | None = None
    created_at: str = Field(default_factory=utc_now)
    started_at: str | None = None
    ended_at: str | None = None


class Job(SQLModel, table=True):
    """One training run or evaluation.

    Attributes:
        version: larger than every version any job had before; grows with every change of the row.
        spec: what the worker is told, without the config.
        config: the freeze config as trained, with its names expanded.
        wish: what the user wants of the living attempt: running, hold, release or stop.
        sweep_set: the name of its freeze set in the sweep that it belongs to.
        attempt: number of the newest attempt, 0 before the first.
        priority: jobs with a higher one start first; among equals the lower `place` does.
        place: the version with which it was queued: grows with time, whatever the clock does.
        restarts_left: how often it may still be queued again without anybody asking.
        is_restarting: it was cut short, and is queued again as soon as that makes sense.
        waiting_for: what it waits for, in words; None where it does not.
    """

    __tablename__ = "job"
    __table_args__ = _NEVER_REUSED

    id: int | None = Field(default=None, primary_key=True)
    version: int = Field(index=True)
    kind: str
    state: str = Field(default="queued", index=True)
    model_id: int = Field(foreign_key="model.id", index=True)
    config_id: int | None = None
    sweep_id: int | None = Field(default=None, foreign_key="sweep.id", index=True)
    sweep_set: str | None = None
    name: str = ""
    notes: str = ""
    spec: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))
    config: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))
    wish: str = "running"
    wish_seq: int = 0
    attempt: int = 0
    step: int = 0
    total_steps: int | None = None
    epoch: float = 0.0
    step_ms: float | None = None
    measure_ms: float | None = None
    train_size: int | None = None
    device_name: str | None = None
    device_bytes: int | None = None
    warnings: list[str] = Field(default_factory=list, sa_column=Column(JSON, nullable=False))
    verdict: str | None = None
    error_reason: str | None = None
    error_message: str | None = None
    priority: int = 0
    place: int = 0
    restarts_left: int = 3
    is_restarting: bool = False
    waiting_for: str | None = None
    queued_at: str = Field(default_factory=utc_now)
    created_at: str = Field(default_factory=utc_now)
    started_at: str | None = None
    ended_at: str | None = None


class Sweep(SQLModel, table=True):
    """Several jobs that differ in what they freeze alone; which they are, their rows say."""

    __tablename__ = "sweep"
    __table_args__ = _NEVER_REUSED

    id: int | None = Field(default=None, primary_key=True)
    name: str = ""
    notes: str = ""
    model_id: int = Field(foreign_key="model.id")
    created_at: str = Field(default_factory=utc_now)


class Attempt(SQLModel, table=True):
    """One start of a job; an ended one never changes.

    Attributes:
        spool_offset: bytes of its spool that are in the database.
        sequence: number of the last record that is in the database, 0 before the first.
        edits: live changes of what is frozen, each with the number of its wish, its rules and the
            first step that it holds for, None until the worker said so.
        resumed: which tensors ``kept`` their optimizer state, started ``fresh`` and were
            ``dropped`` when it went on from a checkpoint, by name; None where it did not.
        peak_bytes, peak_device_bytes: the most memory that its processes were seen to take, on
            the host and on the device; None where nobody could tell.
    """

    __tablename__ = "attempt"

    job_id: int = Field(primary_key=True, foreign_key="job.id")
    number: int = Field(primary_key=True)
    device: str
    resume_step: int | None = None
    pid: int | None = None
    spool_offset: int = 0
    sequence: int = 0
    edits: list[dict[str, Any]] = Field(
        default_factory=list, sa_column=Column(JSON, nullable=False)
    )
    resumed: dict[str, Any] | None = Field(default=None, sa_column=Column(JSON(none_as_null=True)))
    started_at: str = Field(default_factory=utc_now)
    ended_at: str | None = None
    outcome: str | None = None
    reason: str | None = None
    message: str | None = None
    peak_bytes: int | None = None
    peak_device_bytes: int | None = None


class Proof(SQLModel, table=True):
    """The newest check of a job's frozen tensors."""

    __tablename__ = "proof"

    job_id: int = Field(primary_key=True, foreign_key="job.id")
    document: dict[str, Any] = Field(sa_column=Column(JSON, nullable=False))


class Layer(SQLModel, table=True):
    """A job's layers, numbered from 0 in model order.

    Attributes:
        estimated: its update and weight norms are estimates between two exact passes.
        unreached: trainable, and at the newest measured step no gradient came.
        lost: of its sampled elements that had a gradient, the share whose value the newest measured
            step left as it was: the update was rounded away.
    """

    __tablename__ = "layer"

    job_id: int = Field(primary_key=True, foreign_key="job.id")
    position: int = Field(primary_key=True)
    path: str
    estimated: bool = False
    unreached: bool = False
    lost: float | None = None


class LayerStat(SQLModel, table=True):
    """Three measures of one layer at one step; NULL where there is none, the text NaN for NaN.

    Clustered by layer, since charts read a layer over many steps.
    """

    __tablename__ = "layer_stat"
    __table_args__ = {"sqlite_with_rowid": False}

    job_id: int = Field(primary_key=True)
    position: int = Field(primary_key=True)
    step: int = Field(primary_key=True)
    grad_norm: float | None = None
    update_norm: float | None = None
    weight_norm: float | None = None


class LayerRollup(SQLModel, table=True):
    """What one layer's measures came to in `width` steps, from step block * width on.

    Attributes:
        last_step: the last recorded one of them.
        grad_low, …, ratio_high: lowest and highest, as SQL compares: the text NaN is highest.
        grad_bad, …: how many were not finite.
    """

    __tablename__ = "layer_rollup"
    __table_args__ = {"sqlite_with_rowid": False}

    job_id: int = Field(primary_key=True)
    width: int = Field(primary_key=True)
    position: int = Field(primary_key=True)
    block: int = Field(primary_key=True)
    last_step: int
    grad_low: float | None = None
    grad_high: float | None = None
    grad_bad: int = 0
    update_low: float | None = None
    update_high: float | None = None
    update_bad: int = 0
    weight_low: float | None = None
    weight_high: float | None = None
    weight_bad: int = 0
    ratio_low: float | None = None
    ratio_high: float | None = None


class Series(SQLModel, table=True):
    """One metric of one job, by its name."""

    __tablename__ = "series"
    __table_args__ = (Index("series_of_job", "job_id", "name", unique=True), _NEVER_REUSED)

    id: int | None = Field(default=None, primary_key=True)
    job_id: int
    name: str


class Metric(SQLModel, table=True):
    """One value of one metric; the id is a place in the event stream."""

    __tablename__ = "metric"
    __table_args__ = (
        Index("metric_of_series", "series_id", "step", unique=True),
        _NEVER_REUSED,
    )

    id: int | None = Field(default=None, primary_key=True)
    series_id: int
    step: int
    value: float | None = None


class MetricRollup(SQLModel, table=True):
    """What one metric came to in `width` steps, from step block * width on; as `LayerRollup`."""

    __tablename__ = "metric_rollup"
    __table_args__ = {"sqlite_with_rowid": False}

    series_id: int = Field(primary_key=True)
    width: int = Field(primary_key=True)
    block: int = Field(primary_key=True)
    last_step: int
    low: float | None = None
    high: float | None = None
    bad: int = 0


class Login(SQLModel, table=True):
    """A one-time link or a browser session, by the SHA-256 of its secret."""

    __tablename__ = "login"

    digest: str = Field(primary_key=True)
    kind: str
    expires_at: str


class Revision(SQLModel, table=True):
    """One row: the last version given to any job."""

    __tablename__ = "revision"

    id: int = Field(default=1, sa_column=Column(Integer, primary_key=True, autoincrement=False))
    value: int = 0
