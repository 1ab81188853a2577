"""The queue: priorities, places, jobs that start again by themselves; memory taken by attempts."""

from alembic import op

revision = "v0002_queue"
down_revision = "v0001_first"

STATEMENTS = """
ALTER TABLE job ADD COLUMN priority INTEGER NOT NULL DEFAULT 0;
ALTER TABLE job ADD COLUMN place INTEGER NOT NULL DEFAULT 0;
ALTER TABLE job ADD COLUMN restarts_left INTEGER NOT NULL DEFAULT 3;
ALTER TABLE job ADD COLUMN is_restarting BOOLEAN NOT NULL DEFAULT 0;
ALTER TABLE job ADD COLUMN waiting_for VARCHAR;
ALTER TABLE attempt ADD COLUMN reason VARCHAR;
ALTER TABLE attempt ADD COLUMN message VARCHAR;
ALTER TABLE attempt ADD COLUMN peak_bytes INTEGER;
ALTER TABLE attempt ADD COLUMN peak_device_bytes INTEGER;
UPDATE job SET place = id
"""


def upgrade() -> None:
    for statement in STATEMENTS.split(";"):
        op.execute(statement)
