"""Who is told what, when: once, again, and when it is over; over a real mail server and a real web server."""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from email import message_from_bytes, policy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult, LoginPassword
from pydantic import SecretStr, ValidationError

from service import notify
from service.alerts import Alert, AlertKind, Severity
from service.notify import NotTold, channels, decide, read_told, told_file
from service.shared.settings import AlertSettings, DataSettings, Settings
from tests.certificates import authority, issue
from tests.rows import NOW, add_study, open_database
from tests.servers import free_port, wait_for

DAY = timedelta(days=1)
STUCK = Alert("stuck", AlertKind.STUCK, Severity.CRITICAL, "an analysis is not finished", "look", NOW)
DISK = Alert("disk:spool", AlertKind.DISK, Severity.WARNING, "little room", "make room")


def minutes(number: float) -> datetime:
    return NOW + timedelta(minutes=number)


# --- what is news ---------------------------------------------------------------------------------------------------


def test_alert_is_told_once_and_again_after_a_while() -> None:
    """As long as it holds, once per repeat interval."""
    news, told, _ = decide({}, [STUCK], now=NOW, repeat=DAY)
    assert news.firing == (STUCK,)

    news, told, _ = decide(told, [STUCK], now=minutes(10), repeat=DAY)
    assert not news

    news, told, _ = decide(told, [STUCK], now=NOW + DAY, repeat=DAY)
    assert news.firing == (STUCK,)
    assert told["stuck"].first_at == NOW


def test_end_of_an_alert_is_told_once() -> None:
    """After it has not held for a while; then it is forgotten, and would be news again."""
    _, told, _ = decide({}, [STUCK], now=NOW, repeat=DAY)
    news, told, _ = decide(told, [], now=minutes(1), repeat=DAY)
    assert not news

    news, told, _ = decide(told, [], now=minutes(7), repeat=DAY)

    assert [one.key for one in news.resolved] == ["stuck"]
    assert told == {}


def test_alert_that_flickers_was_never_over() -> None:
    """A disk at its limit does not send two mails a minute."""
    _, told, _ = decide({}, [DISK], now=NOW, repeat=DAY)
    for minute in range(1, 30):
        news, told, _ = decide(told, [DISK] if minute % 2 else [], now=minutes(minute), repeat=DAY)
        assert not news


def test_alert_that_becomes_critical_is_told_at_once() -> None:
    """A warning that was told is another thing."""
    _, told, _ = decide({}, [DISK], now=NOW, repeat=DAY)
    worse = Alert(DISK.key, DISK.kind, Severity.CRITICAL, "no room", "make room")

    news, told, _ = decide(told, [worse], now=minutes(1), repeat=DAY)

    assert news.firing == (worse,)
    assert not decide(told, [worse], now=minutes(2), repeat=DAY)[0]


# --- channels -------------------------------------------------------------------------------------------------------


class Inbox:
    """A mail server's handler that keeps what it gets."""

    def __init__(self) -> None:
        self.mails: list[Any] = []
        self.signed_in: list[LoginPassword] = []

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # aiosmtpd's name
        self.mails.append(message_from_bytes(envelope.content, policy=policy.default))
        return "250 taken"

    def __call__(self, server: Any, session: Any, envelope: Any, mechanism: str, data: LoginPassword) -> AuthResult:
        self.signed_in.append(data)
        return AuthResult(success=data.password == b"secret")


def text_of(mail: Any) -> str:
    return str(mail.get_content()).replace("\r\n", "\n")


@contextmanager
def mail_server(inbox: Inbox, port: int | None = None, **more: Any) -> Iterator[int]:
    controller = Controller(inbox, hostname="127.0.0.1", port=port or free_port(), **more)
    controller.start()
    try:
        yield controller.port
    finally:
        controller.stop()


@contextmanager
def web_server(status: int = 200) -> Iterator[tuple[str, list[tuple[str | None, dict[str, Any]]]]]:
    """URL, and what was posted: Authorization and document."""
    posted: list[tuple[str | None, dict[str, Any]]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # the standard library's name
            content = self.rfile.read(int(self.headers["Content-Length"]))
            posted.append((self.headers["Authorization"], json.loads(content)))
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "/elsewhere")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/hook?token=hunter2", posted
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def mailing(folder: Path, port: int, **more: Any) -> Settings:
    alerts = AlertSettings(mail_to=("a@h.example", "b@h.example"), smtp_host="127.0.0.1", smtp_port=port, **more)
    return Settings(data=DataSettings(path=folder), alerts=alerts)


def hooking(folder: Path, url: str, **more: Any) -> Settings:
    return Settings(data=DataSettings(path=folder), alerts=AlertSettings(webhook_url=SecretStr(url), **more))


def test_mail_says_what_holds_and_what_is_over(tmp_path: Path) -> None:
    """One mail a round, to everybody, that no program answers; its end is another one."""
    inbox = Inbox()
    with mail_server(inbox) as port:
        settings = mailing(tmp_path, port)
        assert notify.notify(settings, "mail", [STUCK, DISK], NOW)
        assert not notify.notify(settings, "mail", [STUCK, DISK], minutes(1))
        notify.notify(settings, "mail", [DISK], minutes(2))
        notify.notify(settings, "mail", [DISK], minutes(8))

    first, second = inbox.mails
    assert first["Subject"].startswith("[medpruner-pacs] MEDPRUNER on ")
    assert first["Subject"].endswith(": 2 alerts (stuck, disk)")
    assert first["To"] == "a@h.example, b@h.example"
    assert first["Auto-Submitted"] == "auto-generated"
    assert "CRITICAL: an analysis is not finished\n  look\n  since 2026-03-01 12:00 UTC\n" in text_of(first)
    assert second["Subject"].endswith(": 1 resolved (stuck)")
    assert "No longer:\n  an analysis is not finished" in text_of(second)


def test_mail_goes_over_tls_with_a_password(tmp_path: Path) -> None:
    """STARTTLS with a certificate that is checked, then sign in; a wrong authority is no mail."""
    ca = authority(tmp_path)
    pair = issue(ca, tmp_path, "mail")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.certificate, pair.key)
    password = tmp_path / "password"
    password.write_text("secret\n")
    inbox = Inbox()
    with mail_server(inbox, tls_context=context, authenticator=inbox, auth_required=True) as port:
        more = {"smtp_starttls": True, "smtp_user": "pruner", "smtp_password_file": password}
        notify.notify(mailing(tmp_path, port, smtp_ca=ca.certificate, **more), "mail", [STUCK], NOW)
        with pytest.raises(NotTold, match=r"certificate|SSL"):
            notify.notify(mailing(tmp_path / "x", port, **more), "mail", [STUCK], NOW)

    assert len(inbox.mails) == 1
    assert [one.login for one in inbox.signed_in] == [b"pruner"]


def test_outage_of_the_mail_server_loses_no_news(tmp_path: Path) -> None:
    """What could not be told is news in the next round, with the end of what was told before."""
    inbox, port = Inbox(), free_port()
    settings = mailing(tmp_path, port)
    with mail_server(inbox, port):
        notify.notify(settings, "mail", [STUCK], NOW)
    for minute in (1, 8):
        if minute == 1:
            with pytest.raises(NotTold, match=f"127.0.0.1:{port}: Connection refused"):
                notify.notify(settings, "mail", [STUCK, DISK], minutes(minute))
        else:
            with pytest.raises(NotTold):
                notify.notify(settings, "mail", [DISK], minutes(minute))
    with mail_server(inbox, port):
        notify.notify(settings, "mail", [DISK], minutes(20))

    assert inbox.mails[1]["Subject"].endswith(": 1 alert, 1 resolved (disk, stuck)")


def test_mail_server_that_refuses_is_named_by_its_code(tmp_path: Path) -> None:
    """Not by its words, which may quote anything."""

    class Full(Inbox):
        async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
            return "452 Zqxname's box is full"

    with mail_server(Full()) as port, pytest.raises(NotTold, match=r"^the mail server answered 452$"):
        notify.notify(mailing(tmp_path, port), "mail", [STUCK], NOW)


def test_webhook_gets_a_document_and_the_token(tmp_path: Path) -> None:
    """JSON with every alert, and `text` for chat programs."""
    token = tmp_path / "token"
    token.write_text("hunter3\n")
    with web_server() as (url, posted):
        notify.notify(hooking(tmp_path, url, webhook_token_file=token), "webhook", [STUCK], NOW)

    ((authorization, document),) = posted
    assert authorization == "Bearer hunter3"
    assert document["firing"][0] | {"summary": ""} == {
        "key": "stuck",
        "kind": "stuck",
        "severity": "critical",
        "summary": "",
        "remedy": "look",
        "since": NOW.isoformat(),
    }
    assert "CRITICAL: an analysis is not finished" in document["text"]


@pytest.mark.parametrize("status", [302, 404, 500])
def test_webhook_that_does_not_take_it_is_tried_again(tmp_path: Path, status: int) -> None:
    """Only 2xx is an answer, and a redirection is not followed; the message holds no secret of the URL."""
    with web_server(status) as (url, posted):
        settings = hooking(tmp_path, url)
        for _ in range(2):
            with pytest.raises(NotTold, match=rf"^the webhook answered {status}$"):
                notify.notify(settings, "webhook", [STUCK], NOW)

    assert len(posted) == 2


def test_channels_know_nothing_of_each_other(tmp_path: Path) -> None:
    """An outage of one leaves the other as it is."""
    with web_server() as (url, posted):
        alerts = AlertSettings(
            mail_to=("a@h.example",), smtp_host="127.0.0.1", smtp_port=free_port(), webhook_url=SecretStr(url)
        )
        settings = Settings(data=DataSettings(path=tmp_path), alerts=alerts)
        assert list(channels(alerts)) == ["mail", "webhook"]
        with pytest.raises(NotTold):
            notify.notify(settings, "mail", [STUCK], NOW)
        notify.notify(settings, "webhook", [STUCK], NOW)

    assert len(posted) == 1
    assert list(read_told(told_file(settings, "webhook"))) == ["stuck"]


def test_damaged_file_of_what_was_told_tells_again(tmp_path: Path) -> None:
    """Twice is better than never."""
    path = tmp_path / "mail.json"
    path.write_text('[{"key": "x"}]')

    assert read_told(path) == {}


def test_loop_tells_of_what_the_database_holds(tmp_path: Path, sqlite_url: str) -> None:
    """A study whose instances name two patients is a mail by itself, with its number and nothing of the patients."""
    inbox, stop = Inbox(), Event()
    with mail_server(inbox) as port, open_database(sqlite_url) as sessions:
        now = datetime.now(NOW.tzinfo)
        study_id = add_study(sessions, patient_mismatch=True, last_image_at=now)
        settings = mailing(tmp_path, port, interval_s=0.1)
        thread = Thread(target=notify.notify_for_ever, args=(settings, sessions, stop))
        thread.start()
        try:
            wait_for(lambda: inbox.mails, "a mail")
        finally:
            stop.set()
            thread.join()

    assert "patient-mismatch" in inbox.mails[0]["Subject"]
    assert f"study {study_id}" in text_of(inbox.mails[0])


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"mail_to": ("a@h",)}, "mail_to and smtp_host"),
        ({"smtp_host": "h", "mail_to": ("a b@h",)}, "pattern"),
        ({"smtp_host": "h", "mail_to": ("a@h\r\nBcc: x@y",)}, "pattern"),
        ({"smtp_host": "h", "mail_to": ("a@h",), "smtp_user": "u"}, "smtp_password_file"),
        (
            {"smtp_host": "h", "mail_to": ("a@h",), "smtp_user": "u", "smtp_password_file": Path("p")},
            "needs smtp_starttls",
        ),
        ({"webhook_url": "file:///etc/passwd"}, "https://"),
    ],
)
def test_settings_that_cannot_work_are_refused(keys: dict[str, Any], said: str) -> None:
    """At the start, not when the first alert is lost."""
    with pytest.raises(ValidationError, match=said):
        AlertSettings(**keys)
