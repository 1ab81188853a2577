"""What became of a checkpoint's optimizer state when an attempt went on from it."""

from alembic import op

revision = "v0005_resumed"
down_revision = "v0004_sweeps"


def upgrade() -> None:
    op.execute("ALTER TABLE attempt ADD COLUMN resumed JSON")
