"""Alembic's entry: the same tree on SQLite and PostgreSQL. Imports service.shared.db and nothing else of ours."""

from __future__ import annotations

from alembic import context

from service.shared.db import Base, open_engine

config = context.config


def migrate() -> None:
    """Run on the caller's connection, or open the database of `alembic -x url=...` or of `sqlalchemy.url`."""
    connection = config.attributes.get("connection")
    if connection is not None:
        _run(connection)
        return
    engine = open_engine(
        context.get_x_argument(as_dictionary=True).get("url") or config.get_main_option("sqlalchemy.url") or ""
    )
    with engine.connect() as opened:
        _run(opened)
        opened.commit()
    engine.dispose()


def _run(connection) -> None:  # type: ignore[no-untyped-def]
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=True,
        compare_type=True,
        user_module_prefix="db.",
    )
    with context.begin_transaction():
        context.run_migrations()


migrate()
