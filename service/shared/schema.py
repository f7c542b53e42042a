"""The database's schema: brought to the newest migration, or compared with it. The migrations: migrations/versions."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, text

MIGRATIONS = Path(__file__).resolve().parents[2] / "migrations"
UPGRADE_LOCK = 20_261_123  # any number that no other program uses on this PostgreSQL


def upgrade(engine: Engine, revision: str = "head") -> None:
    """Run what is missing, all in one transaction; several programs may call this at once."""
    _run(engine, command.upgrade, revision)


def downgrade(engine: Engine, revision: str) -> None:
    _run(engine, command.downgrade, revision)


def check(engine: Engine) -> None:
    """Raise when the tables differ from the models (`alembic check`)."""
    with engine.begin() as connection:
        config = _config()
        config.attributes["connection"] = connection
        command.check(config)


def is_current(engine: Engine) -> bool:
    with engine.begin() as connection:
        return is_current_on(connection)


def is_current_on(connection: Connection) -> bool:
    """Within the caller's transaction."""
    return MigrationContext.configure(connection).get_current_revision() == _head()


@cache
def _head() -> str | None:
    return ScriptDirectory.from_config(_config()).get_current_head()


def _run(engine: Engine, verb: object, revision: str) -> None:
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": UPGRADE_LOCK})
        config = _config()
        config.attributes["connection"] = connection
        verb(config, revision)  # type: ignore[operator]  # alembic.command has no common protocol


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    return config
