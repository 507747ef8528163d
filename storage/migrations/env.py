"""Alembic runs this; the connection is handed in by `storage.migrate`."""

from alembic import context

from storage import billing_tables  # noqa: F401 (adds its tables to the metadata)
from storage.tables import metadata

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=metadata, render_as_batch=True, transactional_ddl=True)
context.run_migrations()
