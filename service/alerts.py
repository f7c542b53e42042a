"""What a person should know of now: situation -> alerts. Pure but for `current`; names no patient.

An alert has a key that stays the same while it holds, so that whoever tells people about it can tell once.
Studies are named by their numbers in `history`, never by anything of the patient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum

from sqlalchemy.orm import Session

from service.shared.durable import digest
from service.shared.settings import AlertSettings, Settings
from service.situation import Situation, look

MOST_PROTOCOLS = 20  # drifting protocols that one round tells of


class Severity(StrEnum):
    CRITICAL = "critical"  # studies wait or will be refused
    WARNING = "warning"  # look at it today


class AlertKind(StrEnum):
    STUCK = "stuck"  # received or queued, and not finished in time
    FAILED = "failed"  # analyses out of attempts
    QUARANTINE = "quarantine"  # a result did not pass the gate
    MISMATCH = "patient-mismatch"  # one study, different patients
    UNDELIVERED = "undelivered"  # a destination does not take results
    REJECTED = "rejected"  # a destination refused results for good
    REFUSED = "refused"  # many senders are turned away
    DISK = "disk"  # little room for what arrives
    CERTIFICATE = "certificate"  # ends soon, has ended, or cannot be read
    CHAIN = "audit-chain"  # events wait for their place
    DRIFT = "keep-ratio-drift"  # pruning keeps another share than it used to
    TEST = "test"  # sent by hand to try the channels


@dataclass(frozen=True, slots=True)
class Alert:
    """One thing that holds now."""

    key: str
    kind: AlertKind
    severity: Severity
    summary: str  # one line
    remedy: str
    since: datetime | None = None  # where the rows say it


def current(session: Session, settings: Settings, now: datetime) -> list[Alert]:
    """What holds now, the most severe first."""
    return decide(look(session, settings, now, with_shares=True), settings)


def decide(now: Situation, settings: Settings) -> list[Alert]:
    """What holds in this situation, the most severe first."""
    rules = settings.alerts
    found = [
        *_stuck(now, rules),
        *_failed(now),
        *_undelivered(now, settings),
        *_refused(now, rules),
        *_disk(now, settings),
        *_certificates(now, rules),
        *_chain(now, rules),
        *_drift(now, rules),
    ]
    return sorted(found, key=lambda alert: (alert.severity is not Severity.CRITICAL, alert.key))


def _stuck(now: Situation, rules: AlertSettings) -> Iterator[Alert]:
    limit = timedelta(minutes=rules.stuck_min)
    oldest = now.oldest_unfinished_at
    if oldest is not None and now.now - oldest > limit:
        waiting = ", ".join(f"{count} {state}" for state, count in now.analyses.items() if count)
        yield Alert(
            "stuck",
            AlertKind.STUCK,
            Severity.CRITICAL,
            f"an analysis is not finished after {_minutes(now.now - oldest)} ({waiting}; "
            f"{now.workers} workers are there)",
            f"see `./run explain` for {_studies(now.oldest_unfinished_ids)}; is a worker running?",
            oldest,
        )
    since = now.oldest_receipt_at
    if since is not None and now.now - since > limit:
        yield Alert(
            "ingest",
            AlertKind.STUCK,
            Severity.CRITICAL,
            f"{now.receipts_waiting} received instances are not taken, the oldest for {_minutes(now.now - since)}",
            "see the log of the role ingest",
            since,
        )


def _failed(now: Situation) -> Iterator[Alert]:
    if now.failed:
        yield Alert(
            "failed",
            AlertKind.FAILED,
            Severity.CRITICAL,
            f"{now.failed} analyses failed within a day",
            f"see `./run explain` for {_studies(now.failed_ids)}; `./run requeue` tries again",
        )
    if now.quarantined:
        yield Alert(
            "quarantine",
            AlertKind.QUARANTINE,
            Severity.CRITICAL,
            f"{now.quarantined} studies have a result that did not pass the gate and is not sent",
            f"see `./run show` for {_studies(now.quarantined_ids)}",
        )
    if now.mismatched_ids:
        yield Alert(
            "patient-mismatch",
            AlertKind.MISMATCH,
            Severity.CRITICAL,
            f"{len(now.mismatched_ids)} studies received within a day hold instances of different patients",
            f"correct them at their source: {_studies(now.mismatched_ids)}",
        )


def _undelivered(now: Situation, settings: Settings) -> Iterator[Alert]:
    limit = timedelta(minutes=settings.alerts.undelivered_min)
    configured = {one.name for one in settings.destination}
    for (name, state), waiting in sorted(now.deliveries.items()):
        known = name if name in configured else f"{name} (no longer configured)"
        oldest = waiting.oldest_at
        if state == "pending" and oldest is not None and now.now - oldest > limit:
            paused = "it is paused: `./run resume`" if name in now.paused else "`./run echo` tries it"
            yield Alert(
                f"undelivered:{name}",
                AlertKind.UNDELIVERED,
                Severity.CRITICAL,
                f"{waiting.count} results wait for {known}, the oldest for {_minutes(now.now - oldest)}",
                f"{paused}; the stored bytes go by themselves once it answers",
                oldest,
            )
        if state == "rejected":
            yield Alert(
                f"rejected:{name}",
                AlertKind.REJECTED,
                Severity.CRITICAL,
                f"{waiting.count} results were rejected by {known} for good",
                "`./run history --state rejected` names them; `./run requeue` sends them again",
                oldest,
            )


def _refused(now: Situation, rules: AlertSettings) -> Iterator[Alert]:
    if now.refused >= rules.refused_per_hour:
        yield Alert(
            "refused",
            AlertKind.REFUSED,
            Severity.WARNING,
            f"{now.refused} associations or instances were refused within an hour",
            "the log's association_refused names the sender and the line that would let it in",
        )


def _disk(now: Situation, settings: Settings) -> Iterator[Alert]:
    wanted = settings.spool.min_free_gb * 1e9
    for name, folder in sorted(now.folders.items()):
        if folder.free_bytes >= 2 * wanted:
            continue
        full = folder.free_bytes < wanted
        yield Alert(
            f"disk:{name}",
            AlertKind.DISK,
            Severity.CRITICAL if full else Severity.WARNING,
            f"{folder.free_bytes / 1e9:.1f} GB are free for the {name} folder; below {wanted / 1e9:g} GB "
            + ("instances are refused, as now" if full else "instances are refused"),
            "make room, or lower [spool] keep_days",
        )


def _certificates(now: Situation, rules: AlertSettings) -> Iterator[Alert]:
    for key, days in sorted(now.certificates.items()):
        if days is None:
            yield Alert(
                f"certificate:{key}",
                AlertKind.CERTIFICATE,
                Severity.CRITICAL,
                f"the certificate of {key} cannot be read",
                "it must be a PEM file that this user may read",
            )
        elif days < rules.certificate_days:
            ended = days < 0
            yield Alert(
                f"certificate:{key}",
                AlertKind.CERTIFICATE,
                Severity.CRITICAL if days < 3 else Severity.WARNING,
                f"the certificate of {key} " + ("has ended" if ended else f"ends in {days:.0f} days"),
                "put a new one in its place and restart",
            )


def _chain(now: Situation, rules: AlertSettings) -> Iterator[Alert]:
    since = now.chain_waiting_since
    if since is not None and now.now - since > timedelta(minutes=rules.chain_lag_min):
        yield Alert(
            "audit-chain",
            AlertKind.CHAIN,
            Severity.WARNING,
            f"{now.chain_waiting} events of the audit have no place in its chain, the oldest for "
            f"{_minutes(now.now - since)}",
            "see the log of the role ingest for chain_fault",
            since,
        )


def _drift(now: Situation, rules: AlertSettings) -> Iterator[Alert]:
    told = 0
    for one in now.shares:
        enough = min(one.recent_analyses, one.before_analyses) >= rules.drift_min_analyses
        if not enough or not one.before or abs(one.recent / one.before - 1) <= rules.drift_share:
            continue
        told += 1
        if told > MOST_PROTOCOLS:
            return
        which = digest("\0".join((one.scanner, one.protocol)).encode())[:8]
        yield Alert(
            f"drift:{one.method}:{which}",
            AlertKind.DRIFT,
            Severity.WARNING,
            # neither is named: a technologist can type a patient's name into both
            f"pruning ({one.method}) keeps {one.recent:.1%} of the tokens of one scanner and protocol, those of study "
            f"{one.study_id}; {one.before:.1%} before ({one.recent_analyses} and {one.before_analyses} analyses)",
            "the charts name both. Did the scanner, its protocol or [pruning] change? Compare two studies in the "
            "retention viewer",
        )


def _studies(ids: Sequence[int]) -> str:
    return ("study " if len(ids) == 1 else "studies ") + ", ".join(map(str, ids)) if ids else "the studies"


def _minutes(age: timedelta) -> str:
    minutes = age.total_seconds() / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.0f} h"
