"""What a worker's records and its result may say, checked before it is believed. Knows no row.

User code lives in the worker's process, and can write to its spool. What no loop writes ends that
one job; it reaches no table, no page and no other job.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from app.freezing.config import parse_config
from app.jobs import folder as job_folder
from app.jobs.folder import OUTCOMES, REASONS
from app.jobs.spool import BadRecord, Record, read_spool

SHOWN = 200  # characters of the place of what does not fit
Count = Annotated[int, Field(ge=0, lt=2**53)]
Name = Annotated[str, Field(max_length=1000)]
Text = Annotated[str, Field(max_length=2**20)]
Item = str | dict[str, str | float | bool | None]


class _Shape(BaseModel):
    """Members that must fit; more of them may be there, which a newer worker wrote."""

    model_config = ConfigDict(strict=True)


class _Resumed(_Shape):
    step: Count
    kept: list[str]
    fresh: list[str]
    dropped: list[str]


class _Start(_Shape):
    step: Count
    layers: list[str]
    estimated: list[bool] | None = None
    total_steps: Count | None = None
    device_name: Name | None = None
    device_bytes: Count | None = None
    train_size: Count | None = None
    warnings: list[Text] = []
    resumed: _Resumed | None = None

    @model_validator(mode="after")
    def _is_even(self) -> Self:
        if self.estimated is not None and len(self.estimated) != len(self.layers):
            raise ValueError("layers and estimated differ in length")
        return self


class _State(_Shape):
    state: Name


class _Metrics(_Shape):
    step: Count
    epoch: float
    values: dict[Name, float]
    step_ms: float | None = None
    measure_ms: float | None = None


class _Layers(_Shape):
    step: Count


class _Checked(_Shape):
    checked: Count
    identical: Count
    changed: list[Item] = []
    allowed: list[str] = []


class _Trained(_Shape):
    checked: Count
    moved: Count
    still: list[Item] = []


class _Proof(_Shape):
    verdict: Literal["holds", "broken"]
    step: Count
    frozen: _Checked
    trained: _Trained
    buffers: _Checked
    cost: dict[str, float] = {}
    peak_bytes: Count | None = None


class _Freeze(_Shape):
    step: Count
    seq: Count
    config: dict[str, Any]

    @model_validator(mode="after")
    def _has_a_schedule(self) -> Self:
        parse_config({"schedule": self.config.get("schedule")})
        return self


class _Inspection(_Shape):
    unreached: list[bool]
    lost: list[float | None]

    @model_validator(mode="after")
    def _is_even(self) -> Self:
        if len(self.unreached) != len(self.lost):
            raise ValueError("unreached and lost differ in length")
        return self


class _Result(_Shape):
    outcome: Annotated[str, Field(pattern=f"^({'|'.join(OUTCOMES)})$")]
    step: Count
    reason: Annotated[str, Field(pattern=f"^({'|'.join(REASONS)})$")] | None
    message: Text | None
    traceback: Text | None = None


_HEAD = TypeAdapter(Count)
_SHAPES: Mapping[str, type[_Shape]] = {
    "start": _Start,
    "state": _State,
    "metrics": _Metrics,
    "layers": _Layers,
    "proof": _Proof,
    "freeze": _Freeze,
    "inspection": _Inspection,
}


class RecordCheck:
    """Refuses records that no loop writes; one for each portion of a spool."""

    def __init__(self) -> None:
        self._layer_count: int | None = None

    def __call__(self, record: Record) -> None:
        """Look at the next record.

        Raises:
            BadRecord: it lacks a member, or one is of another type, too large or of another length.
        """
        try:
            _HEAD.validate_python(record.sequence)
            if (shape := _SHAPES.get(record.kind)) is not None:
                shape.model_validate(record.payload)
        except ValidationError as error:
            raise BadRecord(record.sequence, record.kind, _first(error)) from error
        if record.kind == "layers":
            count = len(record.payload["grad_norm"])
            if count != (self._layer_count or count):
                why = f"it is of {count} layers, the one before of {self._layer_count}"
                raise BadRecord(record.sequence, record.kind, why)
            self._layer_count = count


def read_records(directory: Path, offset: int) -> tuple[list[Record], int]:
    """What an attempt has recorded from `offset` on, a portion of it, and the offset behind that.

    Raises:
        BadRecord: the record at `offset` is nothing that a loop writes.
    """
    return read_spool(directory / "telemetry.spool", offset, check=RecordCheck())


def read_result(directory: Path) -> dict[str, Any] | None:
    """How the worker of an attempt says that it ended, None where it does not (yet).

    Raises:
        ValueError: what it says is nothing that a worker writes.
    """
    document = job_folder.read_result(directory)
    try:
        if document is not None:
            _Result.model_validate(document)
    except ValidationError as error:
        raise ValueError(f"{directory}: result.json: {_first(error)}") from error
    return document


def _first(error: ValidationError) -> str:
    first = error.errors(include_input=False, include_url=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place[:SHOWN] or 'the whole'}: {first['msg']}"
