"""Every export, read back by those who read such files: the same numbers come out."""

import io
import json
import math
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest
from sqlmodel import Session

from app.service.event_files import begin_events, checksum, pack_scalars
from app.service.export import FORMATS, pack_rows
from app.store import jobs, samples
from app.store.db import Database
from app.store.tables import Attempt, Job, Model
from tests.unit.test_store_samples import layers, metrics, start

STEPS = 40
JOB = {
    "id": 1,
    "step": STEPS,
    "created_at": "2026-01-01T00:00:00Z",
    "started_at": "2026-01-01T00:00:00Z",
    "ended_at": "2026-01-01T00:00:40Z",
}


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    database = Database(tmp_path_factory.mktemp("export") / "frostline.db")
    records = [start()]
    for step in range(1, STEPS + 1):
        loss = math.nan if step == 7 else 1 / step
        records.append(metrics(len(records) + 1, step, loss=loss))
        columns = [1.5 * step, None, math.inf], [0.5, 0.0, 0.25], [2.0, 3.0, 4.0]
        records.append(layers(len(records) + 1, step, *columns))

    def add(session: Session) -> None:
        session.add(Model(spec={}))
        session.flush()
        job = jobs.add_job(session, kind="train", model_id=1, spec={}, config={})
        jobs.start_attempt(session, job, "cpu", None)
        rows = session.get_one(Job, 1), session.get_one(Attempt, (1, 1))
        samples.ingest(session, *rows, records, 0)

    database.write(add)
    yield database
    database.close()


def write(db: Database, name: str) -> bytes:
    return b"".join(FORMATS[name].write(db, JOB))


def read_frame(db: Database, name: str) -> Any:
    data = write(db, name)
    if name == "json":
        return pandas.DataFrame(json.loads(data)["samples"])
    return {"csv": pandas.read_csv, "parquet": pandas.read_parquet}[name](io.BytesIO(data))


@pytest.mark.parametrize("name", ["csv", "parquet", "json"])
def test_pandas_reads_back_what_was_stored(db: Database, name: str) -> None:
    frame = read_frame(db, name)
    assert list(frame.columns) == ["step", "layer", "name", "value"]
    assert len(frame) == STEPS * (1 + 3 * 3)
    frame["value"] = frame["value"].astype(float)
    loss = frame[frame["name"] == "loss"].set_index("step")["value"]
    assert math.isnan(loss[7])
    assert loss[9] == 1 / 9
    wide = frame[frame["name"] == "grad_norm"].pivot(index="step", columns="layer", values="value")
    assert wide["stem"].tolist() == [1.5 * step for step in range(1, STEPS + 1)]
    assert wide["body.0"].isna().all()
    assert (wide["head"] == math.inf).all()


def test_parquet_tells_null_from_nan(db: Database) -> None:
    from pyarrow import parquet

    rows = parquet.read_table(io.BytesIO(write(db, "parquet"))).to_pylist()
    by_key = {(row["step"], row["layer"], row["name"]): row["value"] for row in rows}
    assert math.isnan(by_key[7, None, "loss"])
    assert by_key[7, "body.0", "grad_norm"] is None


def read_events(data: bytes) -> Iterator[bytes]:
    """The records of an event file, each checksum examined by a plain second implementation."""
    place = 0
    while place < len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        body = data[place + 12 : place + 12 + length]
        for text, at in ((data[place : place + 8], place + 8), (body, place + 12 + length)):
            assert struct.unpack_from("<I", data, at) == (plain_mask(plain_crc(text)),)
        yield body
        place += 16 + length


def plain_crc(text: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in text:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def plain_mask(crc: int) -> int:
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def test_checksums_are_those_of_the_standard() -> None:
    texts = [b"123456789", b"12345678", bytes(32), bytes([255]) * 32, b"abcd"]
    assert checksum(texts)[0] == 0xE3069283
    assert checksum(texts)[2] == 0x8A9136AA
    assert checksum(texts) == [plain_crc(text) for text in texts]


def test_event_files_hold_a_record_for_each_number(db: Database) -> None:
    events = list(read_events(write(db, "tensorboard")))
    assert events[0].endswith(b"brain.Event:2")
    assert len(events) == 1 + STEPS * (1 + 3 * 3 - 1)  # what is NULL is left out
    wall, step = struct.unpack_from("<d", events[20], 1)[0], events[20][10]
    assert wall == 1767225600 + step
    assert sum(b"grad_norm/stem" in event for event in events) == STEPS


def test_numbers_beyond_float32_become_infinite() -> None:
    data = begin_events(0.0) + pack_scalars("x" * 300, [1, 2**40], [0.0, 1.0], [1e300, -1e300])
    assert [struct.unpack("<f", event[-4:])[0] for event in read_events(data)][1:] == [
        math.inf, -math.inf,
    ]  # fmt: skip


def test_tensorboard_reads_the_same_numbers(db: Database, tmp_path: Path) -> None:
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="needs tensorboard: pip install -e '.[bench]'",
    )
    (tmp_path / "events.out.tfevents.frostline-job-1").write_bytes(write(db, "tensorboard"))
    found = reader.EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload()
    assert len(found.Tags()["scalars"]) == 1 + 3 * 3 - 1
    told = [(event.step, event.value) for event in found.Scalars("grad_norm/stem")]
    assert told == [(step, 1.5 * step) for step in range(1, STEPS + 1)]


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_long_job_never_lies_in_memory(tmp_path: Path, name: str) -> None:
    database = Database(tmp_path / "frostline.db")
    steps = 60_000

    def add(session: Session) -> None:
        session.add(Model(spec={}))
        session.flush()
        job = jobs.add_job(session, kind="train", model_id=1, spec={}, config={})
        connection = session.connection()
        connection.exec_driver_sql("INSERT INTO layer (job_id, position, path) VALUES (1, 0, 'a')")
        connection.exec_driver_sql(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < ?)"
            " INSERT INTO layer_stat SELECT 1, 0, i, 1.0 / i, 2.0 / i, 3.0 / i FROM n",
            (steps,),
        )
        assert job.id == 1

    database.write(add)
    next(iter(FORMATS[name].write(database, JOB)))  # its libraries are imported
    tracemalloc.start()
    size = sum(len(piece) for piece in FORMATS[name].write(database, JOB))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    database.close()
    assert size > 1_000_000
    assert peak < 40 * 2**20


def test_a_matrix_is_packed_as_float32() -> None:
    packed = pack_rows([[1.5, None], ["NaN", "Infinity"], ["-Infinity", 0.0]])
    told = struct.unpack("<6f", packed)
    assert (told[0], *told[2:]) == (1.5, -1.0, math.inf, -math.inf, 0.0)
    assert math.isnan(told[1])
