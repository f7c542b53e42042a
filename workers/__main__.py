"""The command line of the worker's side: the worker itself, and the commands that need torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from service.shared.log import set_up_logging
from service.shared.settings import ConfigurationError, load

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", envvar="MEDPRUNER_CONFIG", help="Configuration file; without it, ./config.toml if any."),
]


@app.command()
def worker(config: ConfigOption = None) -> None:
    """Run one Celery worker in the foreground until SIGTERM; it finishes what it is reading."""
    from workers.app import run_worker

    try:
        settings = load(config, os.environ)
    except ConfigurationError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(2) from error
    set_up_logging(settings.log, role="worker")
    run_worker(settings)


@app.command()
def phantom(
    seed: Annotated[int, typer.Option(min=0, help="The phantom; the same seed gives the same study.")],
    out: Annotated[Path, typer.Option(help="Folder for the CT series; must not exist yet.")],
) -> None:
    """Write a generated chest CT with known findings as a DICOM series that any PACS takes."""
    from workers.demo_model.dicom_series import write_phantom

    typer.echo(write_phantom(seed, out))


def main() -> None:
    os.umask(0o077)
    app()


if __name__ == "__main__":
    main()
