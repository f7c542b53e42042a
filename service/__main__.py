"""The command line of the service, and its only wiring: settings, logs, database and spool meet the roles here."""

from __future__ import annotations

import getpass
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Annotated

import structlog
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, sessionmaker

from service import (
    alerts,
    assembly,
    audit_feed,
    chain,
    commands,
    conformance,
    delivery,
    dispatch,
    doctor,
    explain,
    export,
    history,
    notify,
    printing,
    probes,
    receive,
    refusal_feed,
    requestor,
    results,
    retention,
    sender,
    stats,
    supervisor,
    tally,
)
from service.atna import Node
from service.broker import NoRedisServer
from service.certificates import CertificateError
from service.demo import run_demo
from service.report import validation
from service.shared import VERSION, audit, delivery_transitions, schema
from service.shared.audit import AuditKind
from service.shared.db import Study, open_engine, open_sessions
from service.shared.log import set_up_logging
from service.shared.settings import (
    ConfigurationError,
    Settings,
    database_url,
    heads_file,
    leaves,
    load,
    resolve,
    spool_folder,
)
from service.spool import Spool
from service.web.accounts_cli import make_user_app

SCHEMA_WAIT_S = 0.5
STATS_OF = timedelta(days=7)
MOST_PROCESSES = 4  # of `audit verify`; the database works as hard as they do

log = structlog.get_logger(__name__)
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
config_app = typer.Typer(no_args_is_help=True, help="Look at the configuration.")
app.add_typer(config_app, name="config")
audit_app = typer.Typer(no_args_is_help=True, help="Check the audit, and take it out.")
app.add_typer(audit_app, name="audit")

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", envvar="MEDPRUNER_CONFIG", help="Configuration file; without it, ./config.toml if any."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON for other programs, instead of tables.")]


TIMES = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%d %H:%M:%S"]
SinceOption = Annotated[datetime | None, typer.Option("--since", formats=TIMES, help="Only from this time on (UTC).")]

UntilOption = Annotated[datetime | None, typer.Option("--until", formats=TIMES, help="Only before this time (UTC).")]


class Role(StrEnum):
    RECEIVE = "receive"  # associations -> spool
    INGEST = "ingest"  # spool -> rows; complete studies
    DISPATCH = "dispatch"  # complete studies -> queue
    DELIVER = "deliver"  # worker's output -> results -> destinations
    WEB = "web"  # dashboard, REST API, health


# --- run ------------------------------------------------------------------------------------------------------------


@app.command()
def serve(
    config: ConfigOption = None,
    role: Annotated[Role | None, typer.Option(help="Run one part only.")] = None,
    no_worker: Annotated[bool, typer.Option("--no-worker", help="Workers run elsewhere.")] = False,
) -> None:
    """Run the service in the foreground until SIGTERM, with one worker."""
    settings = _load(config)
    set_up_logging(settings.log, role=role or "serve")
    settings.data.path.mkdir(parents=True, exist_ok=True, mode=0o700)
    if role is Role.RECEIVE:
        _receive(settings)
        return
    stop = _stop_on_signal()
    if role is None:
        _serve_all(settings, config, stop, with_worker=not no_worker)
    else:
        sessions = _sessions_when_ready(settings, stop)
        if sessions is not None:
            _LOOPS[role](settings, sessions, stop)


def _serve_all(settings: Settings, config: Path | None, stop: Event, *, with_worker: bool) -> None:
    """Every role under one supervisor; the receiver at once, the others when the database is there and upgraded."""
    try:
        wanted = supervisor.commands(settings, config, with_worker=with_worker)
    except NoRedisServer as error:
        raise _fail(str(error)) from error
    ready = Event()
    with ThreadPoolExecutor(1) as pool:
        upgraded = pool.submit(_made_ready, settings, stop, ready)
        try:
            supervisor.supervise(wanted, stop, ready)
        finally:
            stop.set()
    sessions = upgraded.result()
    if sessions is None:
        return
    if with_worker:
        dispatch.hand_back_of_the_dead(sessions, settings.data.path, datetime.now(UTC))
    _note(sessions, AuditKind.SERVICE_STOPPED)


def _made_ready(settings: Settings, stop: Event, ready: Event) -> sessionmaker[Session] | None:
    """As _upgraded, and sets `ready`; a database that cannot be upgraded ends everything."""
    try:
        sessions = _upgraded(settings, stop)
        if sessions is not None:
            _note(sessions, AuditKind.SERVICE_STARTED)
            log.info("serving", ae_title=settings.scp.ae_title, host=settings.scp.host, port=settings.scp.port)
            ready.set()
    except BaseException:
        stop.set()
        raise
    return sessions


def _receive(settings: Settings) -> None:
    try:
        receive.receive(settings, receive.wait_for_signals())
    except receive.CannotReceive as error:
        raise _fail(str(error)) from error


def _ingest(settings: Settings, sessions: sessionmaker[Session], stop: Event) -> None:
    spool = Spool(spool_folder(settings), 0)

    def chained() -> None:
        chain.chain_for_ever(settings.audit, heads_file(settings), sessions, stop)

    def removed() -> None:
        retention.remove_for_ever(settings, sessions, spool, stop)

    def tallied() -> None:
        tally.tally_for_ever(settings, sessions, stop)

    def notified() -> None:
        notify.notify_for_ever(settings, sessions, stop)

    def refused() -> None:
        refusal_feed.record_for_ever(spool_folder(settings), sessions, stop)

    loops = [chained, removed, tallied, notified, refused]
    if settings.audit.syslog_host is not None:
        loops.append(lambda: audit_feed.feed_for_ever(settings, sessions, _audit_node(settings), stop))
    with _beside(stop, *loops):
        assembly.ingest_for_ever(settings, sessions, spool, stop)


def _audit_node(settings: Settings) -> Node:
    return Node(
        ae_title=settings.scp.ae_title,
        process=f"{settings.audit.source_id}/{os.getpid()}",
        host=socket.gethostname(),
        source_id=settings.audit.source_id,
        enterprise_site_id=settings.audit.enterprise_site_id,
    )


def _dispatch(settings: Settings, sessions: sessionmaker[Session], stop: Event) -> None:
    dispatch.dispatch_for_ever(settings, sessions, spool_folder(settings), stop)


def _deliver(settings: Settings, sessions: sessionmaker[Session], stop: Event) -> None:
    with results.building(settings, sessions, stop):
        delivery.deliver_for_ever(settings, sessions, stop)


def _web(settings: Settings, sessions: sessionmaker[Session], stop: Event) -> None:
    from service.web.app import serve_web  # here: no other command waits for a web framework to load

    serve_web(settings, sessions, stop)


_LOOPS: dict[Role, Callable[[Settings, sessionmaker[Session], Event], None]] = {
    Role.INGEST: _ingest,
    Role.DISPATCH: _dispatch,
    Role.DELIVER: _deliver,
    Role.WEB: _web,
}


@app.command()
def demo(
    study: Annotated[Path | None, typer.Option(help="Send this folder instead of the example study.")] = None,
    stay: Annotated[bool, typer.Option("--stay", help="Keep everything up until Ctrl-C.")] = False,
) -> None:
    """Receive, read and report an example CT study on this machine, with embedded defaults, from nothing."""
    raise SystemExit(run_demo(study, stay=stay, console=Console(), stop=_stop_on_signal()))


# --- talk to a PACS -------------------------------------------------------------------------------------------------


@app.command()
def echo(
    name: Annotated[str | None, typer.Argument(help="A [[destination]] name; all and ourselves without it.")] = None,
    config: ConfigOption = None,
) -> None:
    """C-ECHO our own receiver and the destinations; exit 1 when one does not answer."""
    settings = _load(config)
    ourselves = {one.name: one for one in probes.ourselves(settings)}
    known = ourselves | {one.name: one for one in settings.destination}
    if name is not None and name not in known:
        raise _fail(f"no [[destination]] is called {name!r}; known: {', '.join(known)}")
    answered = True
    for one in [known[name]] if name else known.values():
        section = "[scp]" if one.name in ourselves else "[[destination]]"
        well, sentence = requestor.echo(one, settings.scp, section=section)
        answered &= well
        typer.echo(f"{'ok  ' if well else 'FAIL'} {one.name}: {sentence}")
    raise SystemExit(0 if answered else 1)


@app.command()
def send(
    folder: Path,
    config: ConfigOption = None,
    host: Annotated[str | None, typer.Option(help="Receiver; our own without it.")] = None,
    port: Annotated[int | None, typer.Option()] = None,
    called_ae: Annotated[str | None, typer.Option("--called")] = None,
    calling_ae: Annotated[str | None, typer.Option("--calling", help="The first [[source]] without it.")] = None,
) -> None:
    """Send a folder of DICOM files by C-STORE."""
    settings = _load(config)
    calling = calling_ae or (settings.source[0].ae_title if settings.source else "MEDPRUNER-SEND")
    ourselves = probes.ourselves(settings)[0]
    secured = ourselves.tls and host is None and port is None
    try:
        sent = sender.send_study(
            folder,
            host=host or ourselves.host,
            port=port or ourselves.port,
            called_ae=called_ae or ourselves.ae_title,
            calling_ae=calling,
            tls=requestor.tls_context(ourselves) if secured else None,
        )
    except (sender.CannotSend, CertificateError) as error:
        raise _fail(str(error)) from error
    refused = [one for one in sent if not one.stored]
    for one in refused:
        status = "no answer" if one.status is None else f"0x{one.status:04X}"
        typer.echo(f"{one.file}: {status}", err=True)
    typer.echo(f"{len(sent) - len(refused)} of {len(sent)} instances stored")
    raise SystemExit(1 if refused else 0)


@app.command("doctor")
def doctor_command(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Look at everything that the service needs, and say what would help; exit 1 when something is broken."""
    settings = _load(config)
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)  # what it says stands in the findings, in our words
    if as_json:
        findings = list(probes.examine(settings, datetime.now(UTC)))
        printing.print_json([asdict(one) for one in findings])
    else:
        with Console(stderr=True).status("looking ...") as progress:
            findings = []
            for one in probes.examine(settings, datetime.now(UTC)):
                progress.update(f"{one.subject} ...")
                findings.append(one)
        printing.print_findings(Console(), [asdict(one) for one in findings])
    raise SystemExit(0 if doctor.is_well(findings) else 1)


# --- look -----------------------------------------------------------------------------------------------------------


@app.command()
def status(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Counts by state, the oldest unfinished work, and what waits for which destination."""
    settings = _load(config)
    with _reading(settings)() as session:
        found = history.status(session, settings.destination, datetime.now(UTC))
    printing.print_json(found) if as_json else printing.print_status(Console(), found)


@app.command("history")
def history_command(
    config: ConfigOption = None,
    limit: Annotated[int, typer.Option(min=1)] = 20,
    state: Annotated[
        str | None, typer.Option(help="Only studies, newest analyses or deliveries in this state.")
    ] = None,
    since: SinceOption = None,
    until: UntilOption = None,
    sender: Annotated[str | None, typer.Option(help="Only from this calling AE title.")] = None,
    accession: Annotated[str | None, typer.Option(help="Only this accession number.")] = None,
    patient: Annotated[str | None, typer.Option(help="Only this patient ID.")] = None,
    route: Annotated[str | None, typer.Option(help="Only what this [[route]] took.")] = None,
    destination: Annotated[str | None, typer.Option(help="Only what goes or went to this [[destination]].")] = None,
    as_json: JsonOption = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="CSV for a spreadsheet, instead of a table.")] = False,
) -> None:
    """The newest studies with what became of them."""
    settings = _load(config)
    with _reading(settings, read_only=True)() as session:
        rows = history.recent(
            session,
            limit=limit,
            state=state,
            since=_utc(since),
            until=_utc(until),
            sender=sender,
            accession=accession,
            patient_id=patient,
            route=route,
            destination=destination,
        )
    if as_csv:
        printing.print_history_csv(sys.stdout, rows)
    elif as_json:
        printing.print_json(rows)
    else:
        printing.print_history(Console(), rows)


@app.command()
def show(
    study: Annotated[str, typer.Argument(help="Study Instance UID, number in `history`, or accession number.")],
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """One study: its series, analyses, report, results, deliveries and everything that happened."""
    settings = _load(config)
    with _reading(settings)() as session:
        try:
            story = history.study_story(session, history.study_named(session, study))
        except history.NotFound as error:
            raise _fail(str(error)) from error
    printing.print_json(story) if as_json else printing.print_study(Console(), story)


@app.command("explain")
def explain_command(
    study: Annotated[str, typer.Argument(help="Study Instance UID, number in `history`, or accession number.")],
    config: ConfigOption = None,
) -> None:
    """Why this study stands where it stands: its series, its state, and what happens next."""
    settings = _load(config)
    with _reading(settings, read_only=True)() as session:
        story = history.study_story(session, _study(session, study))
    for sentence in explain.explain(story, settings, datetime.now(UTC)):
        typer.echo(sentence)


@app.command("stats")
def stats_command(
    config: ConfigOption = None,
    since: SinceOption = None,
    sender: Annotated[str | None, typer.Option(help="Only from this calling AE title.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Numbers of the last week, or since: what came, what became of it, how long it took, how much pruning kept."""
    settings = _load(config)
    start = _utc(since) or datetime.now(UTC) - STATS_OF
    with _reading(settings, read_only=True)() as session:
        found = {"since": start} | stats.stats(session, since=start, sender=sender)
    printing.print_json(found) if as_json else printing.print_stats(Console(), found)


@app.command("alerts")
def alerts_command(
    config: ConfigOption = None,
    as_json: JsonOption = False,
    test: Annotated[bool, typer.Option("--test", help="Send a test message by every configured channel.")] = False,
) -> None:
    """What a person should know of now; exit 1 when there is anything. It names no patient."""
    settings = _load(config)
    if test:
        _test_channels(settings)
        return
    with _reading(settings, read_only=True)() as session:
        found = alerts.current(session, settings, datetime.now(UTC))
    if as_json:
        printing.print_json([asdict(one) for one in found])
    else:
        printing.print_alerts(Console(), [asdict(one) for one in found])
    raise SystemExit(1 if found else 0)


def _test_channels(settings: Settings) -> None:
    now = datetime.now(UTC)
    known = notify.channels(settings.alerts)
    if not known:
        raise _fail("no channel is configured: set [alerts] mail_to and smtp_host, or webhook_url")
    well = True
    for name, send_by in known.items():
        try:
            send_by(settings.alerts, notify.A_TEST, notify.node_of(settings), now)
            typer.echo(f"ok   {name}")
        except notify.NotTold as error:
            well = False
            typer.echo(f"FAIL {name}: {error}")
    raise SystemExit(0 if well else 1)


# --- change ---------------------------------------------------------------------------------------------------------


@app.command()
def requeue(
    study: Annotated[str, typer.Argument(help="Study Instance UID, number in `history`, or accession number.")],
    config: ConfigOption = None,
    again: Annotated[bool, typer.Option("--again", help="Run every route once more, also where it is done.")] = False,
) -> None:
    """Resume what failed, was rejected or is held; with --again, run the study once more."""
    settings = _load(config)
    with _reading(settings).begin() as session:
        try:
            found = history.study_named(session, study)
        except history.NotFound as error:
            raise _fail(str(error)) from error
        done = commands.requeue(session, found, settings, again=again, now=datetime.now(UTC), actor=_user())
    typer.echo("; ".join(done) or "nothing to resume; --again runs it once more")


@app.command()
def resend(
    study: Annotated[str, typer.Argument(help="Study Instance UID, number in `history`, or accession number.")],
    config: ConfigOption = None,
    to: Annotated[str | None, typer.Option(help="A [[destination]] name; where they went without it.")] = None,
) -> None:
    """Send a study's stored results once more, byte for byte; nothing is read or built again."""
    settings = _load(config)
    with _reading(settings).begin() as session:
        try:
            done = commands.resend(
                session, _study(session, study), settings, to=to, now=datetime.now(UTC), actor=_user()
            )
        except commands.CannotResend as error:
            raise _fail(str(error)) from error
    typer.echo("; ".join(done) or "it went to no destination that is still configured; --to names one")


@app.command()
def pause(
    destination: Annotated[str, typer.Argument(help="A [[destination]] name.")], config: ConfigOption = None
) -> None:
    """Stop sending to a destination, until `resume`; its deliveries wait, also over a restart."""
    _set_standing(destination, config, paused=True)


@app.command()
def resume(
    destination: Annotated[str, typer.Argument(help="A [[destination]] name.")], config: ConfigOption = None
) -> None:
    """Take up sending to a paused destination."""
    _set_standing(destination, config, paused=False)


def _set_standing(destination: str, config: Path | None, *, paused: bool) -> None:
    settings = _load(config)
    known = [one.name for one in settings.destination]
    if destination not in known:
        raise _fail(f"no [[destination]] is called {destination!r}; known: {', '.join(known) or 'none'}")
    change = delivery_transitions.pause_destination if paused else delivery_transitions.resume_destination
    with _reading(settings).begin() as session:
        changed = change(session, destination, now=datetime.now(UTC), actor=_user())
    word = "paused" if paused else "not paused"
    typer.echo(f"{destination} is {word}" if changed else f"{destination} was {word} already")


@app.command()
def cancel(
    study: Annotated[str, typer.Argument(help="Study Instance UID, number in `history`, or accession number.")],
    config: ConfigOption = None,
) -> None:
    """Cancel what is queued for a study; what runs is finished."""
    settings = _load(config)
    with _reading(settings).begin() as session:
        try:
            found = history.study_named(session, study)
        except history.NotFound as error:
            raise _fail(str(error)) from error
        count = commands.cancel(session, found, now=datetime.now(UTC), actor=_user())
    typer.echo(f"{count} analyses cancelled")


@app.command()
def forget(
    study: Annotated[str, typer.Argument(help="Study Instance UID, number in `history`, or accession number.")],
    config: ConfigOption = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Erase all that names or describes a study's patient here: images, reports, header. Cannot be undone."""
    settings = _load(config)
    sessions = _reading(settings)
    with sessions() as session:
        found = _study(session, study)
    if not yes:
        typer.confirm(f"Erase study {found.id} ({found.study_uid}) for good? Results at a PACS stay there", abort=True)
    spool = Spool(spool_folder(settings), 0)
    try:
        gone = retention.forget(sessions, spool, settings.data.path, found.id, now=datetime.now(UTC), actor=_user())
    except retention.CannotForget as error:
        raise _fail(str(error)) from error
    typer.echo(
        f"erased {gone.instances} instances, {gone.results} results, {gone.outputs} outputs, {gone.reports} texts"
        f"{', the header' if gone.header else ''}; backups and what was sent are not reached from here"
    )


# --- audit ----------------------------------------------------------------------------------------------------------


@audit_app.command("verify")
def audit_verify(
    config: ConfigOption = None,
    heads: Annotated[
        list[Path] | None, typer.Option(help="File of exported heads, as kept elsewhere; our own without it.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compute the hash chain over the audit again; exit 1 and name the first row that is not as it was."""
    settings = _load(config)
    try:
        known = [head for file in heads or [heads_file(settings)] for head in chain.read_heads(file)]
    except (OSError, ValueError) as error:
        raise _fail(f"the exported heads cannot be read: {error}") from error
    started = time.perf_counter()
    processes = min(MOST_PROCESSES, os.cpu_count() or 1)
    with (
        _reading(settings, read_only=True)() as session,
        Progress(console=Console(stderr=True), transient=True) as progress,
    ):
        task = progress.add_task("events", total=None)
        found = chain.verify(
            session.connection(),
            known,
            processes=processes,
            on_progress=lambda checked, total: progress.update(task, completed=checked, total=total),
        )
    rate = found.checked / max(time.perf_counter() - started, 1e-6)
    if as_json:
        printing.print_json(asdict(found))
    else:
        typer.echo(f"{found.checked} events checked ({rate:,.0f} a second), {found.heads_checked} exported heads")
        typer.echo(f"{found.not_chained} events not chained yet")
        typer.echo(
            f"FAULT: {found.fault}" if found.fault else f"the chain is whole; its head is {found.head or 'empty'}"
        )
    raise SystemExit(1 if found.fault else 0)


@audit_app.command("export")
def audit_export(
    config: ConfigOption = None,
    form: Annotated[export.Format, typer.Option("--format")] = export.Format.JSONL,
    since: SinceOption = None,
    until: Annotated[datetime | None, typer.Option(formats=TIMES, help="Only before this time (UTC).")] = None,
    study: Annotated[str | None, typer.Option(help="Only of this study.")] = None,
    sender: Annotated[str | None, typer.Option(help="Only of studies that this calling AE title sent.")] = None,
    destination: Annotated[str | None, typer.Option(help="Only about this [[destination]].")] = None,
    output: Annotated[Path | None, typer.Option(help="File to write; standard output without it.")] = None,
) -> None:
    """Every event of the audit for other programs; names no patient. The export itself is audited."""
    settings = _load(config)
    with _reading(settings, read_only=True)() as session:
        study_id = None if study is None else _study(session, study).id
        selection = export.Selection(
            since=_utc(since), until=_utc(until), study_id=study_id, sender=sender, destination=destination
        )
        rows = export.events(session, selection)
        try:
            with (
                nullcontext(sys.stdout) if output is None else output.open("w", encoding="utf-8", newline="") as stream
            ):
                count = export.write(rows, form, stream)
        except OSError as error:
            raise _fail(f"{output}: cannot be written: {error.strerror}") from error
    with _reading(settings).begin() as session:
        audit.append(
            session,
            AuditKind.AUDIT_EXPORTED,
            now=datetime.now(UTC),
            actor=_user(),
            study_id=study_id,
            events=count,
            format=form.value,
        )
    typer.echo(f"{count} events exported", err=True)


# --- configuration --------------------------------------------------------------------------------------------------


@config_app.command("check")
def config_check(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Say what is configured and where each value comes from; secrets are masked. Exit 2 when something is wrong."""
    try:
        settings, sources = resolve(config, os.environ)
        dispatch.check(settings)
    except ConfigurationError as error:
        raise _fail(str(error)) from error
    rows = [(key, value, sources.get(key, "default")) for key, value in leaves(settings)]
    if as_json:
        printing.print_json({key: {"value": value, "source": source} for key, value, source in rows})
        return
    table = Table("key", "value", "from", header_style="bold")
    for key, value, source in rows:
        table.add_row(key, str(value), source)
    console = Console()
    console.print(table)
    if not settings.source and not settings.scp.accept_unknown_sources:
        console.print("No [[source]]: every sender is refused; add one, or set [scp] accept_unknown_sources = true.")
    if not settings.destination:
        console.print("No [[destination]]: results are kept and sent nowhere.")


@app.command("conformance")
def conformance_command(config: ConfigOption = None) -> None:
    """Print the DICOM Conformance Statement, made from the code and this configuration."""
    typer.echo(conformance.statement(_load(config)), nl=False)


@app.command()
def validate(
    folder: Annotated[Path, typer.Argument(help="A folder of DICOM objects of any origin, or one file.")],
    show_allowed: Annotated[bool, typer.Option("--show-allowed", help="Also what is on the allow-list.")] = False,
) -> None:
    """Run the gate of our results (dciodvfy, own assertions) over DICOM files; exit 1 where there is an error."""
    if not folder.exists():
        raise _fail(f"{folder}: no such file or folder")
    validated = list(validation.validate_folder(folder))
    Console().print(validation.table(validated, show_allowed=show_allowed))
    raise SystemExit(0 if validation.passed(validated) else 1)


@app.command()
def migrate(config: ConfigOption = None) -> None:
    """Create the database or upgrade it; `serve` without --role does this by itself."""
    settings = _load(config)
    set_up_logging(settings.log, role="migrate")
    settings.data.path.mkdir(parents=True, exist_ok=True, mode=0o700)
    if _upgraded(settings, _stop_on_signal()) is None:
        raise SystemExit(1)
    typer.echo("the database is at the newest migration")


@app.command()
def version() -> None:
    """The version of this software."""
    typer.echo(f"medpruner-pacs {VERSION} (research software, not a medical device)")


# --- wiring ---------------------------------------------------------------------------------------------------------


@contextmanager
def _beside(stop: Event, *loops: Callable[[], None]) -> Iterator[None]:
    """Run loops that heed `stop` in threads of their own while the block runs; its end ends them."""
    threads = [Thread(target=loop) for loop in loops]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _load(config: Path | None) -> Settings:
    try:
        settings = load(config, os.environ)
        dispatch.check(settings)
    except ConfigurationError as error:
        raise _fail(str(error)) from error
    return settings


def _fail(message: str) -> SystemExit:
    typer.echo(f"error: {message}", err=True)
    return SystemExit(2)


def _stop_on_signal() -> Event:
    """Set by SIGTERM or SIGINT.

    By a thread of its own: a handler that sets it would wait for ever where it interrupts who is about to wait for it.
    """
    stop = Event()
    arrived: SimpleQueue[None] = SimpleQueue()  # which a handler may use wherever it interrupts

    def heed() -> None:
        arrived.get()
        stop.set()

    Thread(target=heed, name="signals", daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: arrived.put(None))
    return stop


def _upgraded(settings: Settings, stop: Event) -> sessionmaker[Session] | None:
    """The database at its newest migration; waits for one that is away. None: told to stop meanwhile."""
    engine = open_engine(database_url(settings))
    while not stop.is_set():
        try:
            schema.upgrade(engine)
        except DBAPIError as error:
            log.error("database_unreachable", error=type(error).__name__, remedy="see [database] url")
            stop.wait(2)
        else:
            return open_sessions(engine)
    return None


def _sessions_when_ready(settings: Settings, stop: Event) -> sessionmaker[Session] | None:
    """Sessions on a database that somebody has upgraded; None: told to stop meanwhile."""
    engine = open_engine(database_url(settings))
    said = False
    while not stop.is_set():
        try:
            if schema.is_current(engine):
                return open_sessions(engine)
            problem = "not upgraded yet; `migrate`, or `serve` without --role, does it"
        except DBAPIError as error:
            problem = f"{type(error).__name__}; see [database] url"
        if not said:
            log.warning("waiting_for_database", problem=problem)
            said = True
        stop.wait(SCHEMA_WAIT_S)
    return None


def _reading(settings: Settings, *, read_only: bool = False) -> sessionmaker[Session]:
    """Sessions for a command; exit 2 when there is no database to look at."""
    engine = open_engine(database_url(settings), read_only=read_only)
    try:
        if schema.is_current(engine):
            return open_sessions(engine)
    except DBAPIError as error:
        raise _fail(f"the database cannot be reached ({type(error).__name__}); see [database] url") from error
    raise _fail("the database is empty or of another version; `./run serve` creates and upgrades it")


def _note(sessions: sessionmaker[Session], kind: AuditKind) -> None:
    with sessions.begin() as session:
        audit.append(session, kind, now=datetime.now(UTC), actor="service/serve", version=VERSION)


def _study(session: Session, name: str) -> Study:
    try:
        return history.study_named(session, name)
    except history.NotFound as error:
        raise _fail(str(error)) from error


def _utc(at: datetime | None) -> datetime | None:
    return None if at is None else at.replace(tzinfo=UTC)


def _user() -> str:
    return f"cli/{getpass.getuser()}"


app.add_typer(make_user_app(lambda config: _reading(_load(config)), _user), name="user")


def main() -> None:
    os.umask(0o077)
    if not sys.stdout.isatty():
        os.environ.setdefault("COLUMNS", "160")  # tables in a pipe or a log keep their lines whole

    app()


if __name__ == "__main__":
    main()
