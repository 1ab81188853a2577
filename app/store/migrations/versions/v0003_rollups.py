"""Roll-ups of what was measured, metrics by number instead of by name, and marks on layers."""

from alembic import op

revision = "v0003_rollups"
down_revision = "v0002_queue"

STATEMENTS = """
ALTER TABLE job ADD COLUMN measure_ms FLOAT;

ALTER TABLE layer ADD COLUMN estimated BOOLEAN NOT NULL DEFAULT 0;

ALTER TABLE layer ADD COLUMN unreached BOOLEAN NOT NULL DEFAULT 0;

ALTER TABLE layer ADD COLUMN lost FLOAT;

CREATE TABLE layer_rollup (
    job_id INTEGER NOT NULL,
    width INTEGER NOT NULL,
    position INTEGER NOT NULL,
    block INTEGER NOT NULL,
    last_step INTEGER NOT NULL,
    grad_low FLOAT,
    grad_high FLOAT,
    grad_bad INTEGER NOT NULL,
    update_low FLOAT,
    update_high FLOAT,
    update_bad INTEGER NOT NULL,
    weight_low FLOAT,
    weight_high FLOAT,
    weight_bad INTEGER NOT NULL,
    ratio_low FLOAT,
    ratio_high FLOAT,
    PRIMARY KEY (job_id, width, position, block)
) WITHOUT ROWID;

CREATE TABLE series (
    id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    job_id INTEGER NOT NULL,
    name VARCHAR NOT NULL
);

CREATE UNIQUE INDEX series_of_job ON series (job_id, name);

INSERT INTO series (job_id, name) SELECT job_id, name FROM metric GROUP BY job_id, name ORDER BY min(id);

DROP VIEW metrics;

ALTER TABLE metric RENAME TO named_metric;

CREATE TABLE metric (
    id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    series_id INTEGER NOT NULL,
    step INTEGER NOT NULL,
    value FLOAT
);

INSERT INTO metric SELECT m.id, s.id, m.step, m.value
FROM named_metric AS m JOIN series AS s ON s.job_id = m.job_id AND s.name = m.name ORDER BY m.id;

UPDATE sqlite_sequence SET seq = (SELECT seq FROM sqlite_sequence WHERE name = 'named_metric')
WHERE name = 'metric';

DROP TABLE named_metric;

CREATE UNIQUE INDEX metric_of_series ON metric (series_id, step);

CREATE TABLE metric_rollup (
    series_id INTEGER NOT NULL,
    width INTEGER NOT NULL,
    block INTEGER NOT NULL,
    last_step INTEGER NOT NULL,
    low FLOAT,
    high FLOAT,
    bad INTEGER NOT NULL,
    PRIMARY KEY (series_id, width, block)
) WITHOUT ROWID;

CREATE VIEW metrics AS
SELECT s.job_id, m.step, s.name, m.value FROM metric AS m JOIN series AS s ON s.id = m.series_id
"""  # noqa: E501


def upgrade() -> None:
    for statement in STATEMENTS.split(";"):
        op.execute(statement)
