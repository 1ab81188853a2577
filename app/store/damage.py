"""A database file that is not what SQLite wrote: found, set aside, and what can be read saved."""

import sqlite3
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path

from sqlmodel import Session, SQLModel

from app.store.db import DAMAGE

THOROUGH_BYTES = 256 * 2**20  # beyond it a whole look takes seconds; the doctor takes it
# What the job folders tell better, or what is nothing without it.
NOT_SAVED = frozenset({"job", "attempt", "proof", "layer", "task", "revision"})


def marker_of(path: Path) -> Path:
    """A file beside the database that says that a running server has found it damaged."""
    return path.with_name(f"{path.name}.is-damaged")


def find_damage(path: Path, is_thorough: bool = False) -> str | None:
    """What is wrong with a database file, None where nothing is (or there is no file).

    Args:
        is_thorough: look at every page, however many there are.
    """
    if marker_of(path).exists():
        return marker_of(path).read_text("utf-8").strip() or "a server found it damaged"
    if not path.exists() or path.stat().st_size == 0:
        return None
    try:
        with closing(sqlite3.connect(path)) as connection:
            if is_thorough or path.stat().st_size <= THOROUGH_BYTES:
                (said,) = connection.execute("PRAGMA quick_check(1)").fetchone()
                return None if said == "ok" else str(said)
            for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type='table'"):
                connection.execute(f'SELECT * FROM "{table}" LIMIT 1').fetchone()  # noqa: S608
    except sqlite3.DatabaseError as error:
        if any(words in str(error) for words in DAMAGE):
            return str(error)
        raise
    return None


def set_aside(path: Path) -> Path:
    """Rename a damaged database, with its journal, so that a new one can take its place."""
    moment = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
    aside = path.with_name(f"{path.name}.damaged-{moment}")
    for suffix in ("-wal", "-shm", ""):  # the file itself last: until then it is found damaged
        with suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(aside.with_name(aside.name + suffix))
    marker_of(path).unlink(missing_ok=True)
    return aside


def save_rows(session: Session, aside: Path) -> dict[str, int]:
    """Copy what can be read of a damaged database's small tables into this one.

    Models, saved configs and logins are nowhere else; a row that is there already stays.

    Returns:
        Table → how many rows it has now that it did not have.
    """
    saved: dict[str, int] = {}
    own = session.connection().connection.driver_connection
    assert own is not None
    with suppress(sqlite3.DatabaseError), closing(sqlite3.connect(aside)) as source:
        source.row_factory = sqlite3.Row
        for table in SQLModel.metadata.sorted_tables:
            if table.name in NOT_SAVED or "job_id" in table.columns:
                continue
            with suppress(sqlite3.DatabaseError):
                saved[table.name] = 0
                for row in source.execute(f'SELECT * FROM "{table.name}"'):  # noqa: S608
                    names = [name for name in row.keys() if name in table.columns]  # noqa: SIM118
                    columns, marks = ", ".join(names), ", ".join("?" * len(names))
                    done = own.execute(
                        f'INSERT OR IGNORE INTO "{table.name}" ({columns}) VALUES ({marks})',  # noqa: S608
                        [row[name] for name in names],
                    )
                    saved[table.name] += done.rowcount
    return {name: count for name, count in saved.items() if count}
