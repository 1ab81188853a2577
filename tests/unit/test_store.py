"""The database: its schema, its one writer, its signal at changes, and the lock beside it."""

import asyncio
import fcntl
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy.exc import OperationalError
from sqlmodel import SQLModel

from app.store import files
from app.store.db import Database, DatabaseFromTheFuture, _schema_version, upgrade_schema
from app.store.lock import DataFolderHeld, hold_data_folder, read_holder
from app.store.tables import Model


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "frostline.db")
    yield database
    database.close()


def test_the_migrations_lead_to_the_tables(db: Database) -> None:
    with db.read() as session:
        context = MigrationContext.configure(session.connection())
        assert compare_metadata(context, SQLModel.metadata) == []


def test_a_database_of_this_version_is_opened_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "frostline.db"
    first = Database(path)
    first.write(lambda s: s.add(Model(spec={"uri": "demo:digits"})))
    first.close()
    second = Database(path)
    with second.read() as session:
        assert session.get_one(Model, 1).spec == {"uri": "demo:digits"}
    second.close()
    assert [file.name for file in tmp_path.iterdir()] == ["frostline.db"]


def test_a_copy_is_kept_of_a_database_that_is_migrated(tmp_path: Path) -> None:
    path = tmp_path / "frostline.db"
    upgrade_schema(path, "v0001_first")
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            "INSERT INTO model (spec, state, created_at) VALUES ('{}', 'ready', '2026-01-01')"
        )
    path.chmod(0o600)
    Database(path).close()
    copy = tmp_path / "frostline.db.v0001_first"
    for file in (path, copy):
        with closing(sqlite3.connect(file)) as connection:
            assert connection.execute("SELECT state FROM model").fetchall() == [("ready",)]
            assert (_schema_version(file) == "v0001_first") == (file == copy)
        assert file.stat().st_mode & 0o777 == 0o600


def test_a_database_from_the_future_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "frostline.db"
    Database(path).close()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v9999_flying_cars'")
    with pytest.raises(DatabaseFromTheFuture, match="Update Frostline"):
        Database(path)


def test_a_write_that_raises_leaves_nothing(db: Database) -> None:
    def half(session: object) -> None:
        session.add(Model(spec={}))  # type: ignore[attr-defined]
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        db.write(half)
    with db.read() as session:
        assert session.get(Model, 1) is None
    assert db.version == 0


def test_readers_cannot_write(db: Database) -> None:
    with db.read() as session:
        session.add(Model(spec={}))
        with pytest.raises(OperationalError, match="readonly"):
            session.flush()


def test_writes_of_many_threads_follow_each_other(db: Database) -> None:
    threads = [
        threading.Thread(target=lambda: db.write(lambda s: s.add(Model(spec={}))))
        for _ in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with db.read() as session:
        assert session.get(Model, 20) is not None
    assert db.version == 20


def test_a_change_wakes_those_who_wait(db: Database) -> None:
    async def wait_and_write() -> int:
        seen = db.version
        waiting = asyncio.create_task(db.async_wait(seen, timeout=60))
        await asyncio.sleep(0)
        await asyncio.to_thread(db.write, lambda s: s.add(Model(spec={})))
        return await waiting

    assert asyncio.run(wait_and_write()) == 1
    assert db.wait_for_change(0, timeout=60) == 1


def test_waiting_ends_after_its_time(db: Database) -> None:
    assert db.wait_for_change(0, timeout=0) == 0
    assert asyncio.run(db.async_wait(0, timeout=0)) == 0


def test_a_waiter_that_gives_up_is_forgotten(db: Database) -> None:
    async def give_up() -> None:
        waiting = asyncio.create_task(db.async_wait(0, timeout=60))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    asyncio.run(give_up())
    assert not db._waiters


def test_a_held_data_folder_names_its_holder(tmp_path: Path) -> None:
    assert read_holder(tmp_path) is None
    with hold_data_folder(tmp_path, "http://127.0.0.1:8000"):
        holder = read_holder(tmp_path)
        assert holder is not None
        assert holder.address == "http://127.0.0.1:8000"
        with (
            pytest.raises(DataFolderHeld, match=r"serves it at http://127\.0\.0\.1:8000"),
            hold_data_folder(tmp_path, "http://127.0.0.1:8001"),
        ):
            pass
        assert read_holder(tmp_path) == holder
    assert read_holder(tmp_path) is None


def test_logs_of_all_attempts_are_one_text(tmp_path: Path) -> None:
    for number, text in ((1, "one\n"), (2, "two\n"), (10, "ten\n")):
        directory = tmp_path / "attempts" / str(number)
        directory.mkdir(parents=True)
        (directory / "log.txt").write_text(text)
    assert files.read_logs(tmp_path) == b"one\ntwo\nten\n"
    assert files.read_logs(tmp_path, after=2) == b"e\ntwo\nten\n"
    assert files.read_logs(tmp_path, after=5, limit=4) == b"wo\nt"
    assert files.read_logs(tmp_path, after=99) == b""
    assert files.log_size(tmp_path) == 12


def test_logs_may_go_while_they_are_read(tmp_path: Path) -> None:
    """As a task's do, whose page is looked at in the moment in which it ends."""
    is_seen = threading.Event()

    def come_and_go() -> None:
        while not is_seen.is_set():
            for number in (1, 2):
                directory = tmp_path / "1" / "attempts" / str(number)
                directory.mkdir(parents=True)
                (directory / "log.txt").write_text("a word\n")
            files.remove_folder(tmp_path / "1")

    coming = threading.Thread(target=come_and_go)
    coming.start()
    sizes = []
    try:
        while coming.is_alive() and (len(sizes) < 200 or len(set(sizes)) < 2):
            sizes.append(files.log_size(tmp_path / "1"))
            assert files.read_logs(tmp_path / "1") in (b"", b"a word\n", b"a word\na word\n")
        assert coming.is_alive()
    finally:
        is_seen.set()
        coming.join()


def test_a_look_at_the_lock_is_in_nobodys_way(tmp_path: Path) -> None:
    with hold_data_folder(tmp_path, "http://127.0.0.1:1"):
        pass
    path = tmp_path / "writer.lock"
    assert path.read_text() == ""
    look = path.open()
    fcntl.flock(look, fcntl.LOCK_SH)
    timer = threading.Timer(0.2, look.close)
    timer.start()
    with hold_data_folder(tmp_path, "http://127.0.0.1:2"):
        assert read_holder(tmp_path) is not None
    timer.join()
