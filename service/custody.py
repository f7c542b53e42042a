"""A request for storage commitment -> what we vouch for, and the report of it. Storage commitment as SCP.

Ingest decides (`decide`), delivery tells (`Reporter`): an N-EVENT-REPORT on an association that we open to the
requester as the provider of the Push Model (PS3.4 J.3.3, PS3.7 D.3.3.4). Between them lies a file. Order of writing,
each step may be the last before a kill: the studies are marked as committed, the audit has it, the report is durable,
the request goes; the requester has taken the report, the audit has it, the report goes. So a request may be decided and
reported twice, never lost; and nothing is vouched for that age could still remove.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import structlog
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import build_context, build_role
from pynetdicom.association import Association
from sqlalchemy import select
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.orm import Session, sessionmaker

from service import commitment_answers, commitment_requests
from service.commitment_answers import PUSH_MODEL, PUSH_MODEL_INSTANCE
from service.commitment_requests import Report, Request
from service.requestor import Absence, associate
from service.shared import audit
from service.shared.audit import AuditKind
from service.shared.backoff import try_again_at
from service.shared.db import Instance
from service.shared.log import explain_exception
from service.shared.settings import DestinationSettings, ScpSettings, Settings, SourceSettings
from service.spool import Spool

ACTOR = "service/custody"
PROCESSING_FAILURE, NO_SUCH_INSTANCE, CLASS_CONFLICT = 0x0110, 0x0112, 0x0119  # Failure Reason, PS3.3 C.14.1.1
UIDS_PER_QUERY = 500
TIMEOUT_S = 10.0
FIRST_DELAY_S, LONGEST_DELAY_S = 5.0, 3600.0  # between two attempts to report
GIVEN_UP_AFTER = timedelta(days=7)
WARNINGS = (0x0107, 0x0116)  # the report was taken all the same (PS3.7 annex C)

log = structlog.get_logger(__name__)


# --- decisions ------------------------------------------------------------------------------------------------------


def verdict(sop_class_uid: str, known: Iterable[str], *, intact: bool, there: bool) -> int | None:
    """Why an instance is not committed, as a Failure Reason; None when it is.

    known: SOP classes of what was received under its UID. there: a file of it lies in the spool; intact: as it came.
    """
    classes = set(known)
    if not classes:
        return NO_SUCH_INSTANCE
    if sop_class_uid not in classes:
        return CLASS_CONFLICT
    if intact:
        return None
    return PROCESSING_FAILURE if there else NO_SUCH_INSTANCE


def next_attempt(attempts: int, now: datetime, jitter: float) -> datetime:
    """When to report again after `attempts` tries: doubling, less up to a quarter (`jitter` 0 to 1)."""
    return try_again_at(now, attempts - 1, first_s=FIRST_DELAY_S, longest_s=LONGEST_DELAY_S, jitter=jitter)


def address_of(request: Request, sources: Sequence[SourceSettings], scp: ScpSettings) -> DestinationSettings | None:
    """Where the report goes: to the requester's commitment_port, at its host; at the address that it called from where
    its [[source]] names no host or a network. None where the configuration knows no port."""
    known = [one for one in sources if one.ae_title == request.calling_ae and one.commitment_port is not None]
    if not known:
        return None
    source = next((one for one in known if one.host == request.address), known[0])
    host = source.host if source.host is not None and "/" not in source.host else request.address
    return DestinationSettings.model_validate(
        {
            "name": "requester",
            "ae_title": request.calling_ae,
            "host": host,
            "port": source.commitment_port,
            "calling_ae_title": request.called_ae,
            "timeout_s": TIMEOUT_S,
        }
        | (_tls(scp) if source.commitment_tls else {})
    )


def _tls(scp: ScpSettings) -> dict[str, object]:
    """As when senders call us: who they are is vouched for by [scp] tls_ca, whatever name their certificate has."""
    return {
        "tls": True,
        "tls_ca": scp.tls_ca,
        "tls_certificate": scp.tls_certificate,
        "tls_key": scp.tls_key,
        "tls_minimum": scp.tls_minimum,
        "tls_verify_host": False,
    }


# --- what we vouch for ----------------------------------------------------------------------------------------------


def decide(
    waiting: Iterable[tuple[Path, Request | None]], sessions: sessionmaker[Session], spool: Spool, now: datetime
) -> int:
    """Turn requests into reports; how many. Every instance that was acknowledged before them must be in the rows.

    One that fails is tried again at the next call, for a week, and holds up no other. Raises OperationalError or
    InterfaceError where the database is away.
    """
    done = 0
    for path, request in waiting:
        if request is None:
            log.error(
                "commitment_request_unusable", file=path.name, remedy="kept as *.unusable; the requester asks again"
            )
            commitment_answers.set_aside(path)
            continue
        try:
            with spool.removing_or_committing():
                report = _decide_one(request, sessions, spool, now)
                commitment_requests.keep_report(spool.path, report)
            path.unlink(missing_ok=True)
        except (OperationalError, InterfaceError):
            raise
        except Exception as error:  # noqa: BLE001  # of this request; what went wrong is logged and tried again
            _undecided(path, request, explain_exception(error), now)
            continue
        done += 1
        log.info(
            "commitment_decided",
            calling_ae=request.calling_ae,
            committed=len(request.references) - len(report.failed),
            failed=len(report.failed),
        )
    return done


def _undecided(path: Path, request: Request, fault: str, now: datetime) -> None:
    if now - request.requested_at > GIVEN_UP_AFTER:
        log.error("commitment_request_given_up", file=path.name, calling_ae=request.calling_ae, error=fault)
        commitment_answers.set_aside(path)
    else:
        log.error(
            "commitment_undecided", file=path.name, calling_ae=request.calling_ae, error=fault, remedy="tried again"
        )


def _decide_one(request: Request, sessions: sessionmaker[Session], spool: Spool, now: datetime) -> Report:
    received: dict[str, list[Instance]] = {}
    with sessions() as session:
        uids = [one.sop_instance_uid for one in request.references]
        for start in range(0, len(uids), UIDS_PER_QUERY):
            some = uids[start : start + UIDS_PER_QUERY]
            for row in session.scalars(select(Instance).where(Instance.sop_instance_uid.in_(some))):
                received.setdefault(row.sop_instance_uid, []).append(row)
    failed, kept = {}, []
    for one in request.references:
        rows = received.get(one.sop_instance_uid, [])
        fitting = [row for row in rows if row.sop_class_uid == one.sop_class_uid]
        intact = [row for row in fitting if spool.holds(row.path, sha256=row.sha256, size_bytes=row.size_bytes)]
        reason = verdict(
            one.sop_class_uid,
            (row.sop_class_uid for row in rows),
            intact=bool(intact),
            there=any((spool.path / row.path).exists() for row in fitting),
        )
        if reason is not None:
            failed[one.sop_instance_uid] = reason
        kept += intact
    for path in {row.path for row in kept}:
        spool.commit(path)
    who: dict[str, Any] = {
        "calling_ae": request.calling_ae,
        "peer_address": request.address,
        "association_id": request.association_id,
    }
    with sessions.begin() as session:
        for study_id, instances in sorted(Counter(row.study_id for row in kept).items()):
            audit.append(
                session,
                AuditKind.INSTANCES_COMMITTED,
                now=now,
                actor=ACTOR,
                study_id=study_id,
                instances=instances,
                **who,
            )
        if failed:
            reasons = {f"0x{code:04X}": count for code, count in sorted(Counter(failed.values()).items())}
            audit.append(
                session,
                AuditKind.COMMITMENT_FAILED,
                now=now,
                actor=ACTOR,
                instances=len(failed),
                reasons=reasons,
                **who,
            )
    return Report(request=request, failed=failed)


# --- telling --------------------------------------------------------------------------------------------------------


@dataclass
class Reporter:
    """Sends what was decided, over one association to each requester. How often it failed is forgotten at a restart:
    then everything is tried at once."""

    settings: Settings
    sessions: sessionmaker[Session]
    spool: Path
    _failures: dict[str, tuple[int, datetime]] = field(default_factory=dict)  # by file: how often, and when next

    def report_due(self, now: datetime) -> int:
        """Every report that is due; how many were taken."""
        by_requester: dict[tuple[str, str, str], list[tuple[Path, Report]]] = {}
        for path, report in commitment_requests.reports(self.spool):
            if report is None:
                log.error("commitment_report_unusable", file=path.name, remedy="kept as *.unusable")
                commitment_answers.set_aside(path)
            elif path.name not in self._failures or self._failures[path.name][1] <= now:
                request = report.request
                by_requester.setdefault((request.calling_ae, request.called_ae, request.address), []).append(
                    (path, report)
                )
        return sum(self._report_to(due, now) for due in by_requester.values())

    def _report_to(self, due: Sequence[tuple[Path, Report]], now: datetime) -> int:
        request = due[0][1].request
        address = address_of(request, self.settings.source, self.settings.scp)
        if address is None:
            remedy = f'[[source]] ae_title = "{request.calling_ae}", commitment_port = the port that it listens on'
            self._failed(due, "the configuration knows no address any more", remedy, now)
            return 0
        context = build_context(PUSH_MODEL, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
        association = associate(
            address,
            self.settings.scp,
            [context],
            roles=[build_role(PUSH_MODEL, scp_role=True)],
            section="[[source]]",
        )
        remedy = f"see commitment_port of [[source]] {request.calling_ae}, and that it knows {request.called_ae}"
        if isinstance(association, Absence):
            self._failed(due, association.reason, remedy, now)
            return 0
        taken = 0
        try:
            for path, report in due:
                fault = _send(association, report)
                if fault is not None:
                    self._failed([(path, report)], fault, remedy, now)
                    continue
                taken += 1
                self._taken(path, report, now)
        finally:
            if association.is_established:
                association.release()
        return taken

    def _taken(self, path: Path, report: Report, now: datetime) -> None:
        request = report.request
        committed = len(request.references) - len(report.failed)
        with self.sessions.begin() as session:
            audit.append(
                session,
                AuditKind.COMMITMENT_REPORTED,
                now=now,
                actor=ACTOR,
                calling_ae=request.calling_ae,
                instances=committed,
                failed=len(report.failed),
            )
        path.unlink(missing_ok=True)
        self._failures.pop(path.name, None)
        log.info("commitment_reported", calling_ae=request.calling_ae, committed=committed, failed=len(report.failed))

    def _failed(self, reports: Iterable[tuple[Path, Report]], reason: str, remedy: str, now: datetime) -> None:
        for path, report in reports:
            names = {"calling_ae": report.request.calling_ae, "reason": reason, "remedy": remedy}
            attempts = self._failures.get(path.name, (0, now))[0] + 1
            if now - report.request.requested_at > GIVEN_UP_AFTER:
                log.error("commitment_report_given_up", file=path.name, **names)
                commitment_answers.set_aside(path)
                self._failures.pop(path.name, None)
            else:
                at = next_attempt(attempts, now, random.random())
                self._failures[path.name] = attempts, at
                log.warning("commitment_report_waits", next_attempt_at=at.isoformat(timespec="seconds"), **names)


def _send(association: Association, report: Report) -> str | None:
    """One N-EVENT-REPORT; None once it was taken, else why not."""
    try:
        status, _ = association.send_n_event_report(
            report.event_information(), report.event_type, PUSH_MODEL, PUSH_MODEL_INSTANCE
        )
    except ValueError:  # no accepted context in which we are the provider
        return "it does not let us be the provider of the Push Model (role selection)"
    except RuntimeError:  # it ended meanwhile
        return "the association ended before the report was answered"
    code = status.get("Status")
    if code is None:
        return "no answer to the report"
    return None if code == 0x0000 or code in WARNINGS else f"it answered the report with 0x{code:04X}"
