"""Alerts -> people: by mail and by webhook, once, again after a while, and once more when it is over.

What was told is kept in a small file per channel; what could not be told is told in the next round. Nothing else in
the service waits for a mail server.
"""

from __future__ import annotations

import json
import smtplib
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from email.message import EmailMessage
from email.utils import format_datetime, make_msgid
from pathlib import Path
from threading import Event

import structlog
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.orm import Session, sessionmaker

from service.alerts import Alert, AlertKind, Severity, current
from service.shared.durable import make_folder, write_durably
from service.shared.log import explain_exception
from service.shared.settings import AlertSettings, Settings

SETTLED = timedelta(minutes=5)  # an alert that comes back sooner was never over
TIMEOUT_S = 20.0

log = structlog.get_logger(__name__)


class NotTold(Exception):
    """The channel did not take it; the message says why, without a secret."""


@dataclass(frozen=True, slots=True)
class Told:
    """An alert that people know of."""

    key: str
    kind: str
    severity: str
    summary: str
    first_at: datetime
    last_at: datetime
    gone_at: datetime | None = None  # since when it does not hold any more


@dataclass(frozen=True, slots=True)
class News:
    """What one message says."""

    firing: tuple[Alert, ...]
    resolved: tuple[Told, ...]

    def __bool__(self) -> bool:
        return bool(self.firing or self.resolved)


A_TEST = News((Alert("test", AlertKind.TEST, Severity.WARNING, "this is a test", "nothing needs to be done"),), ())


def decide(
    told: Mapping[str, Told], alerts: Sequence[Alert], *, now: datetime, repeat: timedelta
) -> tuple[News, dict[str, Told], dict[str, Told]]:
    """What to tell, what is known once it is told, and what is known whether or not it is told.

    An alert is news when nobody was told, when it became more severe, or when `repeat` has passed. It is over when it
    has not held for SETTLED.
    """
    firing, resolved = [], []
    after: dict[str, Told] = {}
    kept: dict[str, Told] = {}
    for alert in alerts:
        known = told.get(alert.key)
        if known is not None:
            kept[alert.key] = replace(known, gone_at=None)
        worse = known is not None and alert.severity.value == "critical" != known.severity
        if known is not None and not worse and now - known.last_at < repeat:
            after[alert.key] = kept[alert.key]
            continue
        firing.append(alert)
        first = known.first_at if known else alert.since or now
        after[alert.key] = Told(alert.key, alert.kind.value, alert.severity.value, alert.summary, first, now)
    for key, known in told.items():
        if key in after:
            continue
        gone = replace(known, gone_at=known.gone_at or now)
        kept[key] = gone
        if gone.gone_at is not None and now - gone.gone_at >= SETTLED:
            resolved.append(gone)
        else:
            after[key] = gone
    return News(tuple(firing), tuple(resolved)), after, kept


# --- the loop -------------------------------------------------------------------------------------------------------


Channel = Callable[[AlertSettings, News, str, datetime], None]


def channels(settings: AlertSettings) -> dict[str, Channel]:
    """The configured ways to tell people."""
    found: dict[str, Channel] = {}
    if settings.mail_to:
        found["mail"] = send_mail
    if settings.webhook_url.get_secret_value():
        found["webhook"] = post_webhook
    return found


def notify_for_ever(settings: Settings, sessions: sessionmaker[Session], stop: Event) -> None:
    """Look and tell until `stop`; does nothing where no channel is configured."""
    away: set[str] = set()
    while channels(settings.alerts) and not stop.is_set():
        try:
            now = datetime.now(UTC)
            with sessions() as session:
                alerts = current(session, settings, now)
            for name in channels(settings.alerts):
                _tell(settings, name, alerts, now, away)
        except (OperationalError, InterfaceError) as error:
            log.error("database_unreachable", error=type(error).__name__, remedy="see [database] url")
        except Exception as error:  # noqa: BLE001  # this loop must live; what went wrong is logged and tried again
            log.error("notify_fault", error=explain_exception(error))
        stop.wait(settings.alerts.interval_s)


def _tell(settings: Settings, name: str, alerts: Sequence[Alert], now: datetime, away: set[str]) -> None:
    try:
        if notify(settings, name, alerts, now) and name in away:
            log.info("alert_channel_back", channel=name)
            away.discard(name)
    except NotTold as error:
        if name not in away:
            log.error("alert_channel_away", channel=name, reason=str(error))
        away.add(name)


def notify(settings: Settings, name: str, alerts: Sequence[Alert], now: datetime) -> bool:
    """Tell what is news over one channel; whether anything was told. Raises NotTold, and then it stays news."""
    path = told_file(settings, name)
    told = read_told(path)
    news, after, kept = decide(told, alerts, now=now, repeat=timedelta(hours=settings.alerts.repeat_hours))
    if news:
        try:
            channels(settings.alerts)[name](settings.alerts, news, node_of(settings), now)
        except NotTold:
            _write_told(path, told, kept)
            raise
        log.info("alerts_told", channel=name, firing=len(news.firing), resolved=len(news.resolved))
    _write_told(path, told, after)
    return bool(news)


def told_file(settings: Settings, name: str) -> Path:
    """What people were told over this channel; removing it tells everything again."""
    return settings.data.path / "alerts" / f"{name}.json"


def read_told(path: Path) -> dict[str, Told]:
    """What people know; nothing where the file is missing or unreadable, for telling twice is better than never."""
    try:
        rows = json.loads(path.read_bytes())
        return {row["key"]: Told(**row | {name: _time(row[name]) for name in _TIMES}) for row in rows}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError):
        log.warning("told_alerts_unreadable", file=str(path), remedy="they are told again")
        return {}


_TIMES = ("first_at", "last_at", "gone_at")


def _write_told(path: Path, before: Mapping[str, Told], told: Mapping[str, Told]) -> None:
    if before == told:
        return
    make_folder(path.parent)
    write_durably(path, json.dumps([asdict(one) for one in told.values()], default=datetime.isoformat).encode())


def _time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)


def node_of(settings: Settings) -> str:
    return f"{settings.scp.ae_title} on {socket.gethostname()}"


# --- channels -------------------------------------------------------------------------------------------------------


def text_of(news: News, node: str) -> str:
    """The message for people."""
    lines = [f"medpruner-pacs, {node}.", ""]
    for alert in news.firing:
        lines += [f"{alert.severity.value.upper()}: {alert.summary}", f"  {alert.remedy}"]
        lines += [f"  since {alert.since:%Y-%m-%d %H:%M} UTC"] if alert.since else []
    if news.resolved:
        lines += ["", "No longer:"] if news.firing else ["No longer:"]
        lines += [f"  {one.summary} (since {one.first_at:%Y-%m-%d %H:%M} UTC)" for one in news.resolved]
    lines += ["", "`./run alerts` shows what holds now. Research software, not a medical device."]
    return "\n".join(lines) + "\n"


def subject_of(news: News, node: str) -> str:
    parts = [f"{len(news.firing)} alert{'s' * (len(news.firing) != 1)}"] if news.firing else []
    parts += [f"{len(news.resolved)} resolved"] if news.resolved else []
    kinds = dict.fromkeys([*(one.kind.value for one in news.firing), *(one.kind for one in news.resolved)])
    return f"[medpruner-pacs] {node}: {', '.join(parts)} ({', '.join(kinds)})"


def send_mail(settings: AlertSettings, news: News, node: str, now: datetime) -> None:
    """One mail to everybody. Raises NotTold, also when one of them was refused."""
    message = EmailMessage()
    message["Subject"] = subject_of(news, node)
    message["From"] = settings.mail_from or f"medpruner-pacs@{socket.getfqdn()}"
    message["To"] = ", ".join(settings.mail_to)
    message["Date"] = format_datetime(now)
    message["Message-ID"] = make_msgid(domain=socket.getfqdn())
    message["Auto-Submitted"] = "auto-generated"  # RFC 3834: no out-of-office answers
    message.set_content(text_of(news, node))
    try:
        with smtplib.SMTP(settings.smtp_host or "", settings.smtp_port, timeout=TIMEOUT_S) as server:
            if settings.smtp_starttls:
                server.starttls(context=_tls(settings.smtp_ca))
            if settings.smtp_user is not None and settings.smtp_password_file is not None:
                server.login(settings.smtp_user, _secret(settings.smtp_password_file))
            refused = server.send_message(message)
    except smtplib.SMTPResponseException as error:
        raise NotTold(f"the mail server answered {error.smtp_code}") from error
    except smtplib.SMTPException as error:  # their texts may quote what the server said of the addresses
        raise NotTold(f"the mail server refused ({type(error).__name__})") from error
    except (OSError, ValueError) as error:
        raise NotTold(f"{settings.smtp_host}:{settings.smtp_port}: {_why(error)}") from error
    if refused:
        raise NotTold(f"the mail server refused {len(refused)} of {len(settings.mail_to)} addresses")


def post_webhook(settings: AlertSettings, news: News, node: str, now: datetime) -> None:
    """POST one JSON document; `text` is what Slack, Mattermost and their like show. Raises NotTold unless 2xx."""
    document = {
        "version": 1,
        "at": now.isoformat(),
        "node": node,
        "text": text_of(news, node),
        "firing": [asdict(one) for one in news.firing],
        "resolved": [asdict(one) for one in news.resolved],
    }
    headers = {"Content-Type": "application/json", "User-Agent": "medpruner-pacs"}
    try:
        if settings.webhook_token_file is not None:
            headers["Authorization"] = f"Bearer {_secret(settings.webhook_token_file)}"
        request = urllib.request.Request(
            settings.webhook_url.get_secret_value(),
            data=json.dumps(document, default=datetime.isoformat).encode(),
            headers=headers,
            method="POST",
        )
        with _NO_REDIRECTS.open(request, timeout=TIMEOUT_S) as answer:
            status = int(answer.status)
    except urllib.error.HTTPError as error:
        status = int(error.code)
        error.close()
    except (OSError, ValueError) as error:  # URLError is an OSError; its text never quotes the URL's secret
        raise NotTold(f"the webhook cannot be reached ({_why(error)})") from error
    if not 200 <= status < 300:
        raise NotTold(f"the webhook answered {status}")


class _Refuse(urllib.request.HTTPRedirectHandler):
    """A redirection would carry the token to a host that nobody configured."""

    def redirect_request(self, *_: object, **__: object) -> None:
        return None


_NO_REDIRECTS = urllib.request.build_opener(_Refuse)


def _tls(ca: Path | None) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=None if ca is None else str(ca))


def _secret(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip()


def _why(error: Exception) -> str:
    reason = getattr(error, "reason", None)
    inner = reason if isinstance(reason, OSError) else error
    return getattr(inner, "strerror", None) or type(inner).__name__
