"""`./run user`: accounts from the command line, passwords by standard input."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from service.__main__ import app
from service.shared import schema
from service.shared.db import open_engine


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.toml"
    path.write_text(f'[data]\npath = "{tmp_path}"\n', encoding="utf-8")
    engine = open_engine(f"sqlite:///{tmp_path / 'medpruner.sqlite'}")
    schema.upgrade(engine)
    engine.dispose()
    return str(path)


def user(config: str, *arguments: str, typed: str = "") -> tuple[int, str]:
    result = CliRunner().invoke(app, ["user", *arguments, "--config", config], input=typed)
    return result.exit_code, result.output


def test_users_come_and_go(config: str) -> None:
    """Added with a role, listed, changed, removed."""
    assert "no users" in user(config, "list")[1].lower()
    assert user(config, "add", "olga", "--role", "operator", typed="correct horse battery\n") == (
        0,
        "olga may sign in as operator\n",
    )
    assert "olga" in user(config, "list")[1]
    assert user(config, "role", "olga", "viewer")[1] == "olga is viewer now\n"
    assert user(config, "password", "olga", typed="another long password\n")[0] == 0
    assert len(user(config, "token", "olga")[1].strip()) > 40
    assert user(config, "remove", "olga") == (0, "olga is removed\n")


def test_refusal_says_why(config: str) -> None:
    """A short password and an unknown user: exit 2 with the reason."""
    assert user(config, "add", "olga", typed="short\n") == (2, "error: a password has 12 to 256 characters\n")
    assert user(config, "remove", "otto") == (2, "error: no user is called 'otto'; `user list` names them\n")
