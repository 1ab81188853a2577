"""The first schema: tables, and the two views that keep their names and columns for good."""

from alembic import op

revision = "v0001_first"
down_revision = None

STATEMENTS = """
CREATE TABLE model (
    id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    spec JSON NOT NULL,
    state VARCHAR NOT NULL,
    error_reason VARCHAR,
    error_message VARCHAR,
    parameter_count INTEGER,
    tensor_count INTEGER,
    module_count INTEGER,
    fingerprint VARCHAR,
    weights_digest VARCHAR,
    created_at VARCHAR NOT NULL
);

CREATE TABLE freeze_config (
    id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    model_id INTEGER NOT NULL,
    document JSON NOT NULL,
    created_at VARCHAR NOT NULL,
    updated_at VARCHAR NOT NULL,
    FOREIGN KEY(model_id) REFERENCES model (id)
);

CREATE INDEX ix_freeze_config_model_id ON freeze_config (model_id);

CREATE TABLE task (
    id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    kind VARCHAR NOT NULL,
    model_id INTEGER,
    state VARCHAR NOT NULL,
    spec JSON NOT NULL,
    pid INTEGER,
    error_reason VARCHAR,
    error_message VARCHAR,
    created_at VARCHAR NOT NULL,
    started_at VARCHAR,
    ended_at VARCHAR
);

CREATE INDEX ix_task_model_id ON task (model_id);

CREATE INDEX ix_task_state ON task (state);

CREATE TABLE job (
    id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    version INTEGER NOT NULL,
    kind VARCHAR NOT NULL,
    state VARCHAR NOT NULL,
    model_id INTEGER NOT NULL,
    config_id INTEGER,
    name VARCHAR NOT NULL,
    notes VARCHAR NOT NULL,
    spec JSON NOT NULL,
    config JSON NOT NULL,
    wish VARCHAR NOT NULL,
    wish_seq INTEGER NOT NULL,
    attempt INTEGER NOT NULL,
    step INTEGER NOT NULL,
    total_steps INTEGER,
    epoch FLOAT NOT NULL,
    step_ms FLOAT,
    train_size INTEGER,
    device_name VARCHAR,
    device_bytes INTEGER,
    warnings JSON NOT NULL,
    verdict VARCHAR,
    error_reason VARCHAR,
    error_message VARCHAR,
    queued_at VARCHAR NOT NULL,
    created_at VARCHAR NOT NULL,
    started_at VARCHAR,
    ended_at VARCHAR,
    FOREIGN KEY(model_id) REFERENCES model (id)
);

CREATE INDEX ix_job_model_id ON job (model_id);

CREATE INDEX ix_job_state ON job (state);

CREATE INDEX ix_job_version ON job (version);

CREATE TABLE attempt (
    job_id INTEGER NOT NULL,
    number INTEGER NOT NULL,
    device VARCHAR NOT NULL,
    resume_step INTEGER,
    pid INTEGER,
    spool_offset INTEGER NOT NULL,
    sequence INTEGER NOT NULL,
    edits JSON NOT NULL,
    started_at VARCHAR NOT NULL,
    ended_at VARCHAR,
    outcome VARCHAR,
    PRIMARY KEY (job_id, number),
    FOREIGN KEY(job_id) REFERENCES job (id)
);

CREATE TABLE proof (
    job_id INTEGER NOT NULL,
    document JSON NOT NULL,
    PRIMARY KEY (job_id),
    FOREIGN KEY(job_id) REFERENCES job (id)
);

CREATE TABLE layer (
    job_id INTEGER NOT NULL,
    position INTEGER NOT NULL,
    path VARCHAR NOT NULL,
    PRIMARY KEY (job_id, position),
    FOREIGN KEY(job_id) REFERENCES job (id)
);

CREATE TABLE layer_stat (
    job_id INTEGER NOT NULL,
    position INTEGER NOT NULL,
    step INTEGER NOT NULL,
    grad_norm FLOAT,
    update_norm FLOAT,
    weight_norm FLOAT,
    PRIMARY KEY (job_id, position, step)
) WITHOUT ROWID;

CREATE TABLE metric (
    id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT,
    job_id INTEGER NOT NULL,
    name VARCHAR NOT NULL,
    step INTEGER NOT NULL,
    value FLOAT
);

CREATE UNIQUE INDEX metric_of_job ON metric (job_id, name, step);

CREATE TABLE login (
    digest VARCHAR NOT NULL,
    kind VARCHAR NOT NULL,
    expires_at VARCHAR NOT NULL,
    PRIMARY KEY (digest)
);

CREATE TABLE revision (
    id INTEGER NOT NULL,
    value INTEGER NOT NULL,
    PRIMARY KEY (id)
);

CREATE VIEW layer_stats AS
SELECT s.job_id, s.step, l.path AS layer, s.grad_norm, s.update_norm, s.weight_norm
FROM layer_stat AS s JOIN layer AS l ON l.job_id = s.job_id AND l.position = s.position;

CREATE VIEW metrics AS SELECT job_id, step, name, value FROM metric;

INSERT INTO revision (id, value) VALUES (1, 0)
"""


def upgrade() -> None:
    for statement in STATEMENTS.split(";"):
        op.execute(statement)
