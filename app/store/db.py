"""The database: one writing thread, many readers, and a signal at every change."""

import asyncio
import errno
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.exc import DBAPIError
from sqlmodel import Session

from app.store import rollups

T = TypeVar("T")

MIGRATIONS = Path(__file__).parent / "migrations"
DAMAGE = ("malformed", "is not a database", "unsupported file format")


class DatabaseFull(OSError):
    """The disk has no room for what was to be stored; nothing of it was."""


class DatabaseDamaged(RuntimeError):
    """The file is not what SQLite wrote; str() says what to do."""


class DatabaseFromTheFuture(RuntimeError):
    """A newer Frostline wrote the file; str() says what to do."""


class Database:
    """The open file, brought to this version's schema.

    Writes run one after the other in one thread, each in one transaction: several writing
    connections starve SQLite's checkpoints and raise "database is locked".

    Raises:
        DatabaseFromTheFuture: the file's schema is newer than this version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        upgrade_schema(path)
        self._writer = _open_engine(path, "BEGIN IMMEDIATE")
        self._readers = _open_engine(path, "BEGIN", "PRAGMA query_only = ON")
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="database-writer")
        self._changed = threading.Condition()
        self._waiters: set[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = set()
        self.version = 0

    def write(self, change: Callable[[Session], T]) -> T:
        """Run `change` in the writing thread in one transaction; commit, or roll back if it raises.

        Blocks until done. What it returns stays readable after the commit.

        Raises:
            DatabaseFull: there is no room on the disk.
            DatabaseDamaged: what is in the file cannot be read.
        """
        try:
            result = self._thread.submit(self._commit, change).result()
        except DBAPIError as error:
            raise self._in_words(error) from error
        return result

    def _commit(self, change: Callable[[Session], T]) -> T:
        with Session(self._writer, expire_on_commit=False) as session, session.begin():
            result = change(session)
        with self._changed:
            self.version += 1
            self._changed.notify_all()
            waiters, self._waiters = self._waiters, set()
        for loop, future in waiters:
            if not loop.is_closed():
                loop.call_soon_threadsafe(_wake, future)
        return result

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session that sees one moment of the database and cannot write."""
        try:
            with Session(self._readers, expire_on_commit=False) as session:
                yield session
        except DBAPIError as error:
            raise self._in_words(error) from error

    def _in_words(self, error: DBAPIError) -> Exception:
        """What a full disk or a damaged file makes SQLite say, as an error of ours; else the same.

        Damage is noted beside the file, so that the next start mends it.
        """
        said = str(error.orig)
        has_room = shutil.disk_usage(self.path.parent).free > 0
        if "disk is full" in said or ("disk I/O error" in said and not has_room):
            message = f"The disk of {self.path} is full, so nothing was stored"
            return DatabaseFull(errno.ENOSPC, message)
        if any(words in said for words in DAMAGE):
            with suppress(OSError):
                self.path.with_name(f"{self.path.name}.is-damaged").write_text(said, "utf-8")
            return DatabaseDamaged(
                f"{self.path} is damaged ({said}). Restart the server: it sets the file aside and "
                "rebuilds jobs and metrics from their folders."
            )
        return error

    def wait_for_change(self, last: int, timeout: float) -> int:
        """Block until the version differs from `last`, `timeout` seconds at most; the version."""
        with self._changed:
            self._changed.wait_for(lambda: self.version != last, timeout)
            return self.version

    async def async_wait(self, last: int, timeout: float) -> int:
        """The same for coroutines, holding no thread."""
        loop = asyncio.get_running_loop()
        waiter = (loop, loop.create_future())
        with self._changed:
            if self.version != last:
                return self.version
            self._waiters.add(waiter)
        try:
            await asyncio.wait((waiter[1],), timeout=timeout)
        finally:
            with self._changed:
                self._waiters.discard(waiter)
        return self.version

    def close(self) -> None:
        """Finish the writes that wait, then close every connection."""
        self._thread.shutdown()
        self._readers.dispose()
        self._writer.dispose()


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _open_engine(path: Path, begin: str, *pragmas: str) -> Engine:
    engine = create_engine(
        f"sqlite:///{path}", pool_size=4, max_overflow=60, connect_args={"check_same_thread": False}
    )

    @event.listens_for(engine, "connect")
    def prepare(connection: sqlite3.Connection, _: Any) -> None:
        connection.isolation_level = None  # sqlite3 begins nothing by itself; `begin` below does
        for pragma in (
            "PRAGMA busy_timeout = 10000",  # first: switching to WAL needs a lock too
            "PRAGMA auto_vacuum = INCREMENTAL",  # takes effect in a new file only
            "PRAGMA journal_mode = WAL",
            "PRAGMA synchronous = NORMAL",
            "PRAGMA foreign_keys = ON",
            *pragmas,
        ):
            connection.execute(pragma).close()

    @event.listens_for(engine, "begin")
    def begin_transaction(connection: Any) -> None:
        connection.exec_driver_sql(begin)

    return engine


def upgrade_schema(path: Path, schema: str = "head") -> None:
    """Bring the file to this version's schema, keeping a copy of an older one beside it.

    Args:
        schema: one before this version's, for whoever needs an old file.

    Raises:
        DatabaseFromTheFuture: its schema is one that this version does not know.
    """
    known = sorted(file.stem for file in (MIGRATIONS / "versions").glob("v[0-9]*.py"))
    current = _schema_version(path)
    if current == known[-1]:
        return
    if current is not None:
        if current not in known:
            raise DatabaseFromTheFuture(
                f"{path} has the schema {current!r}; this version of Frostline knows "
                f"{known[-1]!r} at most. Update Frostline, or choose another data folder."
            )
        with closing(sqlite3.connect(path)) as source:
            copy = path.with_name(f"{path.name}.{current}")
            with closing(sqlite3.connect(copy)) as target:
                source.backup(target)
            shutil.copymode(path, copy)
    # Half a second to import, so only where a migration runs.
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    engine = _open_engine(path, "BEGIN IMMEDIATE")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, schema)
        if current is not None and schema == "head":
            rollups.rebuild(connection)
    engine.dispose()


def _schema_version(path: Path) -> str | None:
    """The file's migration, None for a file that is missing or empty."""
    if not path.exists():
        return None
    with closing(sqlite3.connect(path)) as connection:
        query = "SELECT name FROM sqlite_master WHERE name = 'alembic_version'"
        if connection.execute(query).fetchone() is None:
            return None
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    return None if row is None else str(row[0])
