"""What a worker records or says that no worker would: it ends that job, in a sentence, alone."""

import re
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from app.jobs import folder as job_folder
from app.store.tables import Attempt
from tests.contract import bad_inputs as bad
from tests.worker.silly_house import House, loss


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    house = House(tmp_path_factory.mktemp("house"), cpu_slots=2)
    house.add_model()
    house.tick()
    yield house
    house.db.close()


def append(house: House, job: int, record: bytes) -> None:
    with (house.directory(job) / "telemetry.spool").open("ab") as file:
        file.write(record)


def start(house: House) -> int:
    """A job whose worker has recorded two steps."""
    job = house.launch()
    house.tick()
    spool = house.play_start(job)
    spool.append("metrics", loss(1))
    spool.append("metrics", loss(2))
    spool.close()
    return job


@pytest.mark.parametrize("name", bad.SPOOL_RECORDS)
def test_a_record_that_no_loop_writes_fails_its_job_and_keeps_what_was_before(
    house: House, name: str
) -> None:
    job = start(house)
    append(house, job, bad.SPOOL_RECORDS[name])
    house.play_end(job_id=job)
    house.tick()
    error = house.job(job)["error"]
    assert (house.job(job)["state"], error["reason"]) == ("failed", "user_code")
    assert re.fullmatch(r"Record \d+ \([a-z_0-9]+\) of telemetry\.spool: [^\n]+", error["message"])
    assert len(error["message"]) < 500
    assert house.service.read_metrics(job)["loss"]["steps"] == [1, 2]
    assert house.runner.troubles() == {}


def test_records_that_a_loop_writes_are_taken(house: House) -> None:
    job = start(house)
    good: list[tuple[int, Any]] = [
        (1, bad.START),
        (3, bad.METRICS),
        (5, bad.PROOF),
        (8, bad.FREEZE),
    ]
    for number, (kind, payload) in enumerate(good, start=5):
        append(house, job, bad.record(kind, payload, number))
    job_folder.write_result(house.directory(job), "succeeded", 1)
    house.play_end(job_id=job)
    house.tick()
    assert house.job(job)["state"] == "succeeded"
    assert house.service.read_proof(job)["verdict"] == "holds"


@pytest.mark.parametrize("name", bad.RESULTS)
def test_a_result_that_no_worker_writes_counts_as_none(house: House, name: str) -> None:
    job = start(house)
    (house.directory(job) / "result.json").write_bytes(bad.RESULTS[name])
    house.play_end(job_id=job)
    house.tick()
    assert house.job(job)["state"] == "failed"
    assert "without a result" in house.job(job)["error"]["message"]
    assert house.runner.troubles() == {}


def test_a_living_worker_that_records_such_a_thing_is_ended_and_others_go_on(
    house: House, deaf_worker: Any
) -> None:
    job = house.launch()
    house.tick()
    worker = deaf_worker(house.directory(job))
    append(house, job, bad.SPOOL_RECORDS["of kind 200"])
    other = start(house)
    house.tick()
    assert worker.wait(timeout=10) == -signal.SIGKILL
    assert house.job(other)["state"] == "running"
    assert house.job(other)["step"] == 2
    job_folder.write_exit(house.directory(job), code=None, signal_number=9)
    house.tick()
    assert "there is no such kind" in house.job(job)["error"]["message"]
    house.play_end(job_id=other)
    house.tick()


def test_a_database_made_anew_from_such_folders_has_what_was_before(house: House) -> None:
    job = start(house)
    append(house, job, bad.SPOOL_RECORDS["a list"])
    house.play_end(job_id=job)
    house.tick()

    def forget(session: Any) -> None:  # as after a restart that finds the database rebuilt
        attempt = session.get_one(Attempt, (job, 1))
        attempt.spool_offset = attempt.sequence = 0
        session.add(attempt)

    house.db.write(forget)
    house.runner = house.new_runner()
    house.tick()
    assert house.runner.troubles() == {}
    assert house.service.read_metrics(job)["loss"]["steps"] == [1, 2]
