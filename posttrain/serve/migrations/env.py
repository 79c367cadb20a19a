"""Run by alembic, on the connection that `posttrain.serve.store` hands over."""

from alembic import context

from posttrain.serve.tables import Table

context.configure(connection=context.config.attributes["connection"], target_metadata=Table.metadata)
with context.begin_transaction():
    context.run_migrations()
