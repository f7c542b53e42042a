"""`./run user`: who may sign in to the dashboard and the API. Passwords are typed or piped, never arguments."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from sqlalchemy.orm import Session, sessionmaker

from service.shared.db import Role
from service.web import accounts
from service.web.accounts import AccountError

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", envvar="MEDPRUNER_CONFIG", help="Configuration file; without it, ./config.toml if any."),
]
NameArgument = Annotated[str, typer.Argument(help="User name: a-z 0-9 . _ @ -")]
RoleOption = Annotated[Role, typer.Option("--role", help="viewer: reads; operator: also commands; auditor: events.")]


def make_user_app(
    open_sessions: Callable[[Path | None], sessionmaker[Session]], actor: Callable[[], str]
) -> typer.Typer:
    """The commands, on sessions that the wiring opens for a command's `--config`."""
    app = typer.Typer(no_args_is_help=True, help="Who may sign in to the dashboard and the API.")

    def change(config: Path | None, what: Callable[[Session, datetime], str]) -> str:
        try:
            with open_sessions(config).begin() as session:
                return what(session, datetime.now(UTC))
        except AccountError as error:
            typer.echo(f"error: {error}", err=True)
            raise SystemExit(2) from error

    @app.command()
    def add(name: NameArgument, role: RoleOption = Role.VIEWER, config: ConfigOption = None) -> None:
        """Make a user; the password is asked for, or read as one line from standard input."""
        password = ask_password()

        def run(session: Session, now: datetime) -> str:
            accounts.add_user(session, name, password, role, now=now, actor=actor())
            return f"{name} may sign in as {role.value}"

        typer.echo(change(config, run))

    @app.command("list")
    def list_command(config: ConfigOption = None) -> None:
        """Everybody who may sign in."""
        with open_sessions(config)() as session:
            users = accounts.list_users(session)
        for user in users:
            at = f", signs in at {user.issuer}" if user.issuer else ""
            typer.echo(f"{user.name:<24} {user.role.value:<9} since {user.created_at:%Y-%m-%d}{at}")
        if not users:
            typer.echo("No users: the web answers on loopback only and shows no patient identifiers.")

    @app.command()
    def remove(name: NameArgument, config: ConfigOption = None) -> None:
        """The user may not sign in any more; sessions and tokens end at once."""

        def run(session: Session, now: datetime) -> str:
            accounts.remove_user(session, name, now=now, actor=actor())
            return f"{name} is removed"

        typer.echo(change(config, run))

    @app.command()
    def password(name: NameArgument, config: ConfigOption = None) -> None:
        """Set a new password; the user's sessions and tokens end."""
        new = ask_password()

        def run(session: Session, now: datetime) -> str:
            accounts.change_user(session, name, password=new, now=now, actor=actor())
            return f"{name} has a new password"

        typer.echo(change(config, run))

    @app.command("role")
    def role_command(name: NameArgument, role: Annotated[Role, typer.Argument()], config: ConfigOption = None) -> None:
        """Give the user another role; the user's sessions and tokens end."""

        def run(session: Session, now: datetime) -> str:
            accounts.change_user(session, name, role=role, now=now, actor=actor())
            return f"{name} is {role.value} now"

        typer.echo(change(config, run))

    @app.command()
    def token(name: NameArgument, config: ConfigOption = None) -> None:
        """Print a token with which a program acts as this user for a year; it is not shown again."""
        typer.echo(change(config, lambda session, now: accounts.make_token(session, name, now=now, actor=actor())))

    return app


def ask_password() -> str:
    if sys.stdin.isatty():
        return str(typer.prompt("Password", hide_input=True, confirmation_prompt=True))
    return sys.stdin.readline().rstrip("\n")
