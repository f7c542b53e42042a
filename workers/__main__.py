"""The command line of the worker's side: the worker itself, and the commands that need torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

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
def golden(folder: Annotated[Path, typer.Argument(help="Laid out as tests/golden/README.md says.")]) -> None:
    """Compare the hosts and both pruning stages with recorded outputs; exit 1 where a tolerance is passed."""
    from workers import golden as checks

    try:
        differences = checks.check(folder)
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(2) from error
    raise SystemExit(checks.print_table(differences, Console()))


@app.command()
def phantom(
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same study.")],
    out: Annotated[Path, typer.Option(help="Folder for the series; truth.json beside it says what is in it.")],
    thin: Annotated[bool, typer.Option("--thin", help="1.25 mm slices instead of 5 mm.")] = False,
) -> None:
    """Write a generated chest CT with known findings as a DICOM series that any PACS takes."""
    from workers.demo_model.dicom_series import write_series, write_truth
    from workers.demo_model.phantom import THICK, THIN, generate

    if out.exists() and any(out.iterdir()):
        typer.echo(f"error: {out} is not empty; two series in one folder would be sent as one study", err=True)
        raise SystemExit(2)
    made = generate(seed, THIN if thin else THICK)
    files = write_series(made, out)
    truth = out.with_name(f"{out.name}.truth.json")
    write_truth(made, truth)
    typer.echo(f"{len(files)} instances in {out}; what is in them: {truth}")


@app.command()
def reproduce(
    sop_instance_uid: Annotated[str, typer.Argument(help="SOP Instance UID of the SR; `show` prints it.")],
    config: ConfigOption = None,
) -> None:
    """Run the analysis behind a report again and compare; exit 1 where it differs, 2 where it cannot be run."""
    from service.shared.db import open_engine, open_sessions
    from service.shared.settings import database_url
    from workers import reproduce as again

    try:
        settings = load(config, os.environ)
        sessions = open_sessions(open_engine(database_url(settings), read_only=True))
        lines = again.reproduce(settings, sessions, sop_instance_uid)
    except (ConfigurationError, again.CannotReproduce) as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(2) from error
    for line in lines:
        typer.echo(f"same     {line.part}" if line.difference is None else f"DIFFERS  {line.part}: {line.difference}")
    differing = sum(line.difference is not None for line in lines)
    typer.echo(f"{differing} of {len(lines)} parts differ" if differing else "the same in every part")
    raise SystemExit(1 if differing else 0)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def train(context: typer.Context) -> None:
    """Train the demonstration model on phantoms; --help lists the stages."""
    from workers.demo_model.train import main as run

    raise SystemExit(run(context.args))


def main() -> None:
    os.umask(0o077)
    app()


if __name__ == "__main__":
    main()
