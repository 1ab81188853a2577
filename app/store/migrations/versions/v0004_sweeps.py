"""Sweeps: several jobs that differ in what they freeze alone."""

from alembic import op

revision = "v0004_sweeps"
down_revision = "v0003_rollups"

STATEMENTS = """
CREATE TABLE sweep (
    id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    name VARCHAR NOT NULL,
    notes VARCHAR NOT NULL,
    model_id INTEGER NOT NULL,
    created_at VARCHAR NOT NULL,
    FOREIGN KEY(model_id) REFERENCES model (id)
);
ALTER TABLE job ADD COLUMN sweep_id INTEGER REFERENCES sweep (id);
ALTER TABLE job ADD COLUMN sweep_set VARCHAR;
CREATE INDEX ix_job_sweep_id ON job (sweep_id)
"""


def upgrade() -> None:
    for statement in STATEMENTS.split(";"):
        op.execute(statement)
