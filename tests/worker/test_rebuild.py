"""The database is lost or damaged: the folders bring jobs, models and metrics back."""

import contextlib
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from sqlmodel import Session

from app.jobs import folder as job_folder
from app.store import damage
from app.store.db import Database, DatabaseDamaged
from app.store.tables import Model
from tests.worker.silly_house import House, loss


def play_history(house: House) -> None:
    """Three jobs: one succeeded on its second attempt, one that runs, one that waits."""
    house.add_model()
    house.tick()
    house.launch()
    house.service.edit_job(1, {"name": "first", "notes": "of three", "priority": 3})
    house.tick()
    spool = house.play_start()
    for step in (1, 2, 3):
        spool.append("metrics", loss(step))
    spool.close()
    house.play_end(code=None, signal_number=9)
    house.tick()
    house.service.resume_job(1)
    house.tick()
    spool = house.play_start(attempt=2, step=0)
    for step in (1, 2):
        spool.append("metrics", loss(step))
    spool.close()
    job_folder.write_result(house.directory(attempt=2), "succeeded", 2)
    house.play_end(attempt=2)
    house.launch()
    house.launch()
    house.tick()
    spool = house.play_start(2)
    spool.append("metrics", loss(1))
    house.tick()
    spool.append("metrics", loss(2))  # while no server is there
    spool.close()


def documents(house: House) -> list[dict[str, Any]]:
    """All that can be asked about jobs and models, but for what only a server's memory held."""
    found = []
    for number in (1, 2, 3):
        job = house.job(number)
        for key in ("worker_pid", "ended_at", "epoch", "peak_bytes", "peak_memory_bytes"):
            del job[key]
        metrics = house.service.read_metrics(number)
        found.append({**job, "metrics": metrics, "config": house.service.read_job_config(number)})
    model = house.service.get_model(1)
    return [*found, {key: model[key] for key in ("spec", "state", "created_at")}]


@pytest.fixture
def lived_in(tmp_path: Path) -> House:
    house = House(tmp_path, restart_seconds=3600)
    play_history(house)
    return house


def reopen(house: House) -> House:
    """Another server on the same folder, whose worker of job 2 still runs."""
    house.db.close()
    again = House(house.settings.data_dir, restart_seconds=3600)
    again.locks = house.locks
    again.now = house.now
    return again


def test_a_deleted_database_is_rebuilt_from_the_folders(lived_in: House) -> None:
    house = reopen(lived_in)
    house.tick()
    before = documents(house)
    assert [job["state"] for job in before[:3]] == ["succeeded", "running", "queued"]
    assert before[0]["metrics"]["loss"]["steps"] == [1, 2]
    house.db.close()
    for file in house.settings.data_dir.glob("frostline.db*"):
        file.unlink()
    house = reopen(house)
    house.tick()
    assert documents(house) == before
    assert [one["outcome"] for one in house.service.list_attempts(1)] == [
        "interrupted",
        "succeeded",
    ]
    job_folder.write_result(house.directory(2), "succeeded", 2)
    house.play_end(job_id=2)
    house.tick()
    assert house.job(2)["state"] == "succeeded"
    assert house.job(3)["state"] == "starting"  # and life goes on
    assert house.launch() == 4
    house.db.close()


@pytest.mark.parametrize("how", ["not a database", "torn in the middle", "cut off"])
def test_a_damaged_database_is_set_aside_and_rebuilt(lived_in: House, how: str) -> None:
    lived_in.service.save_config({"model_id": 1, "name": "kept", "rules": []})
    house = reopen(lived_in)
    house.tick()
    before = documents(house)
    house.db.close()
    path = house.settings.data_dir / "frostline.db"
    whole = path.read_bytes()
    harmed = {
        "not a database": b"something else" * 1000,
        "torn in the middle": whole[: len(whole) // 2] + bytes(20_000) + whole[len(whole) // 2 :],
        "cut off": whole[: len(whole) // 2],
    }
    path.write_bytes(harmed[how])
    assert damage.find_damage(path)
    house = reopen(house)
    house.tick()
    assert documents(house) == before
    (aside,) = (p for p in path.parent.glob("frostline.db.damaged-*") if p.suffix != ".wal")
    assert aside.read_bytes()[:1000] == harmed[how][:1000]
    assert damage.find_damage(path) is None
    house.play_end(job_id=2)
    house.db.close()


def test_what_a_damaged_database_still_tells_is_saved(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.add_model()
    config = house.service.save_config({"model_id": 1, "name": "kept", "rules": []})
    house.db.close()
    path = tmp_path / "frostline.db"
    damage.marker_of(path).write_text("somebody saw it")
    again = House(tmp_path)
    assert again.service.get_config(config["id"])["name"] == "kept"
    assert not damage.marker_of(path).exists()
    again.db.close()


def test_damage_that_a_running_server_meets_is_told_and_mended_at_its_next_start(
    tmp_path: Path,
) -> None:
    house = House(tmp_path)
    house.add_model()
    house.db.close()
    path = tmp_path / "frostline.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        query = "SELECT rootpage FROM sqlite_master WHERE name = 'model'"
        ((page,),) = connection.execute(query).fetchall()
        ((size,),) = connection.execute("PRAGMA page_size").fetchall()
    db = Database(path)
    with path.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)
    with pytest.raises(DatabaseDamaged, match="Restart the server"), db.read() as session:
        session.get_one(Model, 1)
    db.close()
    again = House(tmp_path)
    assert again.service.list_models()
    again.db.close()


def test_folders_of_before_there_were_cards_are_jobs_too(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.add_model()
    house.tick()
    house.launch()
    house.tick()
    house.play_start().close()
    job_folder.write_result(house.directory(), "failed", 0, reason="nonfinite", message="NaN.")
    house.play_end(code=1)
    house.tick()
    house.db.close()
    (house.directory().parents[1] / "about.json").unlink()
    (tmp_path / "jobs" / "notes").mkdir()
    (tmp_path / "jobs" / "7").mkdir()
    for file in tmp_path.glob("frostline.db*"):
        file.unlink()
    again = House(tmp_path)
    (job,) = again.service.list_jobs()
    assert (job["id"], job["state"], job["error"]["reason"]) == (1, "failed", "nonfinite")
    again.db.close()


def test_an_ordinary_start_rebuilds_nothing(tmp_path: Path) -> None:
    house = House(tmp_path)
    house.add_model()
    house.tick()

    def rename(session: Session) -> None:
        session.get_one(Model, 1).state = "failed"

    house.db.write(rename)
    house.db.close()
    again = House(tmp_path)
    assert again.service.get_model(1)["state"] == "failed"
    again.db.close()
