"""What the REST API answers: lists, pages, filters, ETags, commands, health."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import update
from sqlalchemy.orm import Session, sessionmaker

from service.refusals import Refusals, Refused
from service.shared import heartbeat
from service.shared.db import Delivery, DeliveryState, Result, Role
from service.shared.durable import digest
from service.web import accounts
from service.web.access import COOKIE
from tests.rows import add_analysis, add_study, after, claimed, event, get, kinds, open_database, presence
from tests.web_visits import Clock, add_named_study, add_user, sign_in, visit


@pytest.fixture
def sessions(database_url: str) -> Iterator[sessionmaker[Session]]:
    with open_database(database_url) as opened:
        add_user(opened, "olga", Role.OPERATOR)
        yield opened


@pytest.fixture
def client(sessions: sessionmaker[Session], tmp_path: Path) -> TestClient:
    visitor = visit(sessions, tmp_path)
    sign_in(visitor, "olga")
    return visitor


def found(client: TestClient, query: str) -> list[int]:
    answer = client.get(f"/api/v1/studies?{query}")
    assert answer.status_code == 200, answer.text
    return [item["id"] for item in answer.json()["items"]]


def test_pages_hold_every_study_once(sessions: sessionmaker[Session], client: TestClient) -> None:
    """Newest first; following `next` to the end misses none, also when one arrives meanwhile."""
    ids = [add_study(sessions, f"2.25.{number}") for number in range(1, 8)]
    first = client.get("/api/v1/studies?limit=3").json()
    add_study(sessions, "2.25.99")
    second = client.get(f"/api/v1/studies?limit=3&cursor={first['next']}").json()
    third = client.get(f"/api/v1/studies?limit=3&cursor={second['next']}").json()

    assert [one["id"] for page in (first, second, third) for one in page["items"]] == ids[::-1]
    assert third["next"] is None


@pytest.mark.parametrize("text", ["ACC2", "PID2", "ROE", "roe", "Roe, R", "2.25.772"])
def test_search_finds_a_study_by_what_names_it(sessions: sessionmaker[Session], client: TestClient, text: str) -> None:
    """Beginnings of accession number, patient ID and name, in either case; and the whole UID."""
    add_named_study(sessions, 1)
    wanted = add_named_study(sessions, 2, name="ROE^RICHARD")

    assert found(client, f"q={text}") == [wanted]


def test_search_takes_wildcards_as_they_are(sessions: sessionmaker[Session], client: TestClient) -> None:
    """A percent sign finds a percent sign."""
    add_named_study(sessions, 1)

    assert found(client, "q=%25") == []
    assert found(client, "q=_CC1") == []


def test_filters_narrow_the_list(sessions: sessionmaker[Session], client: TestClient) -> None:
    """By state of the newest analysis, by delivery, by sender and by time."""
    done = add_named_study(sessions, 1)
    running = add_study(sessions, "2.25.2", calling_ae="MR01")
    claimed(sessions, add_analysis(sessions, running))

    assert found(client, "state=done") == [done]
    assert found(client, "state=running") == [running]
    assert found(client, "state=undelivered") == [done]
    assert found(client, "sender=MR01") == [running]
    assert found(client, "since=2026-03-02T00:00:00Z") == []
    assert found(client, "until=2026-03-02T00:00:00Z") == [running, done]


def test_unchanged_answer_is_not_sent_again(sessions: sessionmaker[Session], client: TestClient) -> None:
    """304 for the same ETag, and a new one after a change."""
    add_named_study(sessions, 1)
    tag = client.get("/api/v1/studies/1").headers["etag"]
    unchanged = client.get("/api/v1/studies/1", headers={"If-None-Match": tag})
    client.put("/api/v1/destinations/pacs", json={"paused": True})
    with sessions.begin() as session:
        session.execute(update(Delivery).values(attempts=1))
    changed = client.get("/api/v1/studies/1", headers={"If-None-Match": tag})

    assert (unchanged.status_code, unchanged.content) == (304, b"")
    assert changed.status_code == 200


def test_delivered_result_is_sent_again_by_command(sessions: sessionmaker[Session], client: TestClient) -> None:
    """Pending again with fresh attempts, audited; a pending one is left alone."""
    add_named_study(sessions, 1)
    with sessions.begin() as session:
        session.execute(update(Delivery).values(state=DeliveryState.DELIVERED, attempts=3))
    answer = client.post("/api/v1/deliveries/1/resend")

    assert answer.status_code == 200
    delivery = get(sessions, Delivery, 1)
    assert (delivery.state, delivery.attempts) == (DeliveryState.PENDING, 0)
    assert event(sessions, "delivery-requeued").actor == "web/olga"
    assert client.post("/api/v1/deliveries/1/resend").status_code == 409


def test_queued_analysis_is_cancelled_by_command(sessions: sessionmaker[Session], client: TestClient) -> None:
    """And there is nothing left to cancel then."""
    study_id = add_study(sessions)
    add_analysis(sessions, study_id)

    assert client.post(f"/api/v1/studies/{study_id}/cancel").json() == {"done": ["1 analyses cancelled"]}
    assert client.post(f"/api/v1/studies/{study_id}/cancel").json() == {"done": []}


def test_requeue_reads_a_study_once_more(sessions: sessionmaker[Session], client: TestClient) -> None:
    """`again` makes the next run number."""
    add_named_study(sessions, 1)

    answer = client.post("/api/v1/studies/1/requeue", json={"again": True})

    assert answer.json() == {"done": ["route default queued as run 2"]}


def test_destination_shows_that_it_is_paused(sessions: sessionmaker[Session], client: TestClient) -> None:
    """Paused, then resumed; a name that is not configured is refused."""
    client.put("/api/v1/destinations/pacs", json={"paused": True})
    assert client.get("/api/v1/destinations").json()["items"][0]["paused"] is True
    client.put("/api/v1/destinations/pacs", json={"paused": False})
    assert client.get("/api/v1/destinations").json()["items"][0]["paused"] is False
    assert client.put("/api/v1/destinations/other", json={"paused": True}).status_code == 404


def test_stored_object_is_handed_out_byte_for_byte(
    sessions: sessionmaker[Session], client: TestClient, tmp_path: Path
) -> None:
    """Audited; and refused when it is gone or no longer what was recorded."""
    add_named_study(sessions, 1)
    path = tmp_path / get(sessions, Result, 1).path
    path.parent.mkdir()
    path.write_bytes(b"a DICOM file")
    altered = client.get("/api/v1/results/1/file")
    with sessions.begin() as session:
        session.execute(update(Result).values(sha256=digest(b"a DICOM file")))
    intact = client.get("/api/v1/results/1/file")
    path.unlink()
    gone = client.get("/api/v1/results/1/file")

    assert (altered.status_code, intact.status_code, gone.status_code) == (404, 200, 404)
    assert intact.content == b"a DICOM file"
    assert event(sessions, "result-read").result_id == 1


def test_events_are_filtered(sessions: sessionmaker[Session], client: TestClient) -> None:
    """By kind and by study."""
    study_id = add_named_study(sessions, 1)

    kinds = [one["kind"] for one in client.get("/api/v1/events?kind=result-built").json()["items"]]
    of_study = client.get(f"/api/v1/studies/{study_id}/events").json()["items"]

    assert kinds == ["result-built"]
    assert {one["study_id"] for one in of_study} == {study_id}


def test_overview_counts_what_is_there(sessions: sessionmaker[Session], client: TestClient) -> None:
    """Waiting, running, undelivered, and who reads."""
    add_named_study(sessions, 1)
    running = add_study(sessions, "2.25.2")
    claimed(sessions, add_analysis(sessions, running), worker="gpu01/7")
    add_analysis(sessions, add_study(sessions, "2.25.3"))
    glance = client.get("/api/v1/overview").json()

    assert (glance["waiting"], glance["running"], glance["undelivered"]) == (1, 1, 1)
    assert glance["workers"][0]["worker"] == "gpu01/7"


@pytest.mark.parametrize(
    ("query", "fits"),
    [
        ("patient_id=PID1", True),
        ("patient_id=PID", False),
        ("accession_number=ACC1", True),
        ("route=default", True),
        ("route=none", False),
        ("destination=pacs", True),
        ("destination=none", False),
        ("patient_id=PID1&destination=pacs&until=2027-01-01T00:00:00Z", True),
    ],
)
def test_list_is_narrowed_to_whole_values(
    sessions: sessionmaker[Session], client: TestClient, query: str, fits: bool
) -> None:
    """Patient ID, accession number, route and destination, alone and together; the page takes the last two as well."""
    study_id = add_named_study(sessions, 1)

    assert found(client, query) == [study_id] * fits
    if query.startswith(("route", "destination")):
        assert ("DOE, JANE" in client.get(f"/studies?{query}").text) is fits


def test_patient_is_not_looked_for_by_who_may_not_see_one(sessions: sessionmaker[Session], tmp_path: Path) -> None:
    """An auditor learns from no filter whether a patient was here."""
    add_named_study(sessions, 1)
    add_user(sessions, "adam", Role.AUDITOR)
    visitor = visit(sessions, tmp_path)
    sign_in(visitor, "adam", address="/charts")

    assert visitor.get("/api/v1/studies?patient_id=PID1").status_code == 403
    assert visitor.get("/api/v1/studies?accession_number=ACC1").status_code == 403


def test_events_are_narrowed_by_time_and_study(sessions: sessionmaker[Session], client: TestClient) -> None:
    """`until` itself is left out; following `next` misses none, also where many events share their time."""
    study_id = add_named_study(sessions, 1)
    other = add_analysis(sessions, add_study(sessions, "2.25.9"), now=after(60))
    asked = "/api/v1/events?limit=2&until=2026-03-01T12:00:30Z"

    first = client.get(asked).json()
    seen, page = [], first
    while page["next"]:
        seen += page["items"]
        page = client.get(f"{asked}&cursor={page['next']}").json()
    seen += page["items"]

    assert [one["id"] for one in seen] == sorted((one["id"] for one in seen), reverse=True)
    assert {one["study_id"] for one in seen} == {study_id}
    assert len(seen) == len(kinds(sessions, study_id=study_id))
    shown = client.get("/events?until=2026-03-01").text
    assert "analysis queued</b>" in shown
    assert "signed in</b>" not in shown, "that was today"
    assert f">{other}</a>" not in client.get(f"/events?study={study_id}").text
    assert "No event matches." in client.get("/events?until=2026-02-28").text


def test_charts_sum_up_every_analysis(database_url: str, tmp_path: Path) -> None:
    """In steps, together and by scanner and protocol; also what is too old to be a point of its own."""
    with open_database(database_url) as sessions:
        add_user(sessions, "olga", Role.OPERATOR)
        for number in range(3):
            add_named_study(sessions, number)
        clock = Clock()
        clock.pass_time(3 * 86_400)
        visitor = visit(sessions, tmp_path, clock=clock)
        sign_in(visitor, "olga")

        found = visitor.get("/api/v1/charts?days=7").json()
        nothing = visitor.get("/api/v1/charts?days=2").json()

    sums = {"inputs": 60, "inputs_kept": 36, "tokens_in": 960, "tokens_kept": 300}
    assert found["step_s"] == 6 * 3600
    assert found["steps"] == [{"at": "2026-03-01T12:00:00Z", "analyses": 3, **sums}]
    assert found["groups"] == [{"at": "2026-03-01T12:00:00Z", "analyses": 3, "scanner": "", "protocol": "", **sums}]
    assert (nothing["step_s"], nothing["steps"], nothing["points"]) == (3600, [], [])


def test_alerts_are_told_without_a_patient(sessions: sessionmaker[Session], client: TestClient) -> None:
    """What `./run alerts` shows; and the first page shows it too."""
    add_analysis(sessions, add_study(sessions))

    (told,) = (one for one in client.get("/api/v1/alerts").json()["items"] if one["kind"] == "stuck")

    assert told["severity"] == "critical"
    assert told["remedy"].startswith("see `./run explain` for study ")
    assert told["summary"] in client.get("/").text


def test_charts_give_the_shares_that_were_kept(sessions: sessionmaker[Session], tmp_path: Path) -> None:
    """One point per analysis that is done."""
    add_named_study(sessions, 1)
    visitor = visit(sessions, tmp_path, clock=Clock())
    sign_in(visitor, "olga")
    (point,) = visitor.get("/api/v1/charts?days=1").json()["points"]

    assert (point["tokens_kept"], point["slices_kept"], point["sender"]) == (0.3125, 0.6, "SENDER")


def test_configuration_masks_secrets(sessions: sessionmaker[Session], client: TestClient) -> None:
    """Every key, no password."""
    items = {one["key"]: one["value"] for one in client.get("/api/v1/configuration").json()["items"]}

    assert items["pruning.tau"] == 0.9
    assert "://" not in str(items["database.url"])


def test_ready_names_what_is_not_well(client: TestClient) -> None:
    """No Redis and no spool here: 503, each by itself, while the process is alive."""
    answer = client.get("/health/ready")
    checks = answer.json()["checks"]

    assert answer.status_code == 503
    assert checks["database"]["ok"] is True
    assert checks["queue"]["ok"] is False
    assert checks["spool"]["ok"] is False
    assert client.get("/health/live").json() == {"alive": True}


def test_ready_says_what_is_missing_and_not_needed(sessions: sessionmaker[Session], client: TestClient) -> None:
    """Without a worker studies wait, and the service receives all the same."""
    before = client.get("/health/ready").json()["checks"]["workers"]
    with sessions.begin() as session:
        heartbeat.beat(session, presence(), now=datetime.now(UTC))
    after = client.get("/health/ready").json()["checks"]["workers"]

    assert (before["ok"], before["needed"]) == (False, False)
    assert (after["ok"], after["detail"]) == (True, "1 there, 0 reading")


def test_refusals_are_shown_with_their_remedy(client: TestClient, tmp_path: Path) -> None:
    """Who, from where, why, and the line that lets them in."""
    refused = Refused(
        datetime.now(UTC), "SCANNER", "MEDPRUNER", "192.0.2.1", "not a [[source]]", '[[source]] ae_title = "SCANNER"'
    )
    (tmp_path / "spool").mkdir()
    Refusals(tmp_path / "spool").record(refused)
    (one,) = client.get("/api/v1/refusals").json()["items"]

    assert (one["calling_ae"], one["address"], one["count"]) == ("SCANNER", "192.0.2.1", 1)
    assert "ae_title" in one["remedy"]
    assert client.get("/health/ready").json()["refused_last_day"] == 1
    assert "SCANNER" in client.get("/").text


def test_result_goes_to_another_destination(
    sessions: sessionmaker[Session], client: TestClient, tmp_path: Path
) -> None:
    """For the first time, by a command with its user; not to one that is not configured."""
    add_named_study(sessions, 1)
    with sessions.begin() as session:
        session.execute(update(Delivery).values(destination="before"))
        session.execute(update(Result).values(sha256=digest(b"a DICOM file")))
    path = tmp_path / get(sessions, Result, 1).path
    path.parent.mkdir()
    path.write_bytes(b"a DICOM file")
    answer = client.post("/api/v1/results/1/resend", json={"destination": "pacs"})

    assert answer.json() == {"done": ["result 1 is on its way to pacs"]}
    assert get(sessions, Delivery, 2).destination == "pacs"
    assert client.post("/api/v1/results/1/resend", json={"destination": "other"}).status_code == 404


def test_token_of_a_program_needs_no_page(sessions: sessionmaker[Session], tmp_path: Path) -> None:
    """A bearer token reads and commands; as a cookie it is worth nothing."""
    with sessions.begin() as session:
        token = accounts.make_token(session, "olga", now=datetime.now(UTC), actor="cli/test")
    program = visit(sessions, tmp_path)

    paused = program.put(
        "/api/v1/destinations/pacs", json={"paused": True}, headers={"Authorization": f"Bearer {token}"}
    )
    program.cookies.set(COOKIE, token)

    assert paused.status_code == 200
    assert program.get("/api/v1/overview").status_code == 401


def test_every_page_is_there(sessions: sessionmaker[Session], client: TestClient) -> None:
    """For an operator, with a study on record."""
    add_named_study(sessions, 1)

    for path in ("/", "/studies", "/studies?q=ACC&state=done&since=2026-01-01", "/studies/1", "/charts", "/events"):
        assert client.get(path).status_code == 200, path
    assert client.get("/configuration").status_code == 200
    assert client.get("/studies/99").status_code == 404
    assert client.get("/studies/no").status_code == 422
