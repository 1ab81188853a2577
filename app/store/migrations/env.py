"""What Alembic runs: the migrations, on the connection that db.py hands over."""

from alembic import context
from sqlmodel import SQLModel

from app.store import tables  # noqa: F401  (its classes fill the metadata)

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=SQLModel.metadata,
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
