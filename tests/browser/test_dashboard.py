"""The dashboard in a real browser: what a person does, from signing in to sending a report again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from sqlalchemy.orm import Session, sessionmaker

from service.shared import delivery_transitions, transitions
from service.shared.db import Delivery, Role
from service.shared.settings import DataSettings, DestinationSettings, Settings, WebSettings, database_url
from service.web.app import serve_web
from tests.rows import (
    ACTOR,
    NOW,
    add_analysis,
    add_study,
    claimed,
    event,
    finish,
    kinds,
    open_database,
    output,
)
from tests.servers import free_port
from tests.web_study import ACCESSION, add_real_study
from tests.web_visits import PASSWORD, add_user

expect.set_options(timeout=20_000)  # a busy or cold machine is slow, not wrong
pytestmark = pytest.mark.browser

CHROMIUM = "/usr/bin/chromium"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
AXE = Path(__file__).parent / "axe" / "axe.min.js"
DESKTOP, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}
SCREENSHOTS = os.environ.get("SCREENSHOTS")  # a folder to keep pictures in


class Served:
    """A web server on loopback with one real study, and the addresses that a page asked for."""

    def __init__(self, sessions: sessionmaker[Session], port: int) -> None:
        self.sessions = sessions
        self.site = f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("web")
    port = free_port()
    pacs = DestinationSettings(name="pacs", ae_title="PACS", host="192.0.2.9", port=104)
    settings = Settings(data=DataSettings(path=folder), destination=(pacs,), web=WebSettings(port=port))
    with open_database(database_url(settings)) as sessions:
        for name, role in (("olga", Role.OPERATOR), ("vera", Role.VIEWER), ("adam", Role.AUDITOR)):
            add_user(sessions, name, role)
        add_real_study(sessions, settings, Path(__file__).parents[1] / "data" / "real-ct" / "head-philips")
        stop = Event()
        thread = Thread(target=serve_web, args=(settings, sessions, stop))
        thread.start()
        try:
            yield Served(sessions, port)
        finally:
            stop.set()
            thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


def signed_in(
    browser: Browser, served: Served, viewport: dict[str, int], scheme: str, name: str = "olga"
) -> tuple[Page, list[str]]:
    """A page on `/studies`, and every address outside the site that any page asked for; faults fail the test."""
    context: Any = browser.new_context(viewport=viewport, color_scheme=scheme, base_url=served.site)
    page = context.new_page()
    outside: list[str] = []
    page.on("request", lambda request: None if request.url.startswith(served.site) else outside.append(request.url))
    page.on("pageerror", lambda error: outside.append(f"script error: {error}"))
    page.on("console", lambda said: outside.append(f"console: {said.text}") if said.type == "error" else None)
    page.goto("/studies")
    page.get_by_label("Name").fill(name)
    page.get_by_label("Password").fill(PASSWORD)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("heading", name="Studies")).to_be_visible()
    return page, outside


def picture(page: Page, name: str) -> None:
    if SCREENSHOTS:
        page.evaluate("scrollTo(0, 0)")
        page.screenshot(path=f"{SCREENSHOTS}/{name}.png", full_page=True)


def serious_faults(page: Page) -> list[str]:
    """What axe-core finds of impact serious or critical."""
    page.evaluate(AXE.read_text(encoding="utf-8"))  # evaluated by the debugger: the page's own policy stays as it is
    found = page.evaluate("async () => (await axe.run()).violations")
    return [
        f"{one['id']}: {one['nodes'][0]['html'][:160]}" for one in found if one["impact"] in ("serious", "critical")
    ]


@pytest.mark.parametrize(("viewport", "scheme", "name"), [(DESKTOP, "light", "desktop"), (PHONE, "dark", "phone")])
def test_report_is_found_read_and_sent_again(
    browser: Browser, served: Served, viewport: dict[str, int], scheme: str, name: str
) -> None:
    """By accession number to the study, through its slices, to the report, and a re-send that the audit shows."""
    page, outside = signed_in(browser, served, viewport, scheme)
    page.get_by_label("Search").fill(ACCESSION)
    page.get_by_role("link", name="DOE, JANE").click()

    expect(page.get_by_text("Slice 15 of 28")).to_be_visible()  # the middle of the stack
    page.locator("#viewer[data-slice='15']").wait_for()  # drawn: the viewer listens
    canvas = page.locator("#picture")
    canvas.focus()
    page.keyboard.press("ArrowDown")
    expect(page.get_by_text("Slice 16 of 28")).to_contain_text("Slice 15 stands for it")
    page.get_by_role("button", name="Go to slice 15, which was read").click()
    page.locator("#viewer[data-slice='15']").wait_for()
    canvas.hover()
    page.mouse.wheel(0, 100)
    page.locator("#viewer[data-slice='16']").wait_for()
    page.mouse.wheel(0, 100)
    page.locator("#viewer[data-slice='17']").wait_for()
    grey = page.evaluate(
        "() => { const c = document.getElementById('picture');"
        " const p = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
        " return new Set(p.filter((_, i) => i % 4 === 0)).size }"
    )
    page.get_by_text("Structured Report as sent").click()
    expect(page.locator(".sr-text")).to_contain_text("The lungs are clear.")
    picture(page, f"{name}-study")
    page.get_by_role("button", name="Re-send sr-comprehensive3d to pacs").click()
    page.get_by_role("button", name="Yes").click()

    expect(page.locator("#toast")).to_contain_text("on its way to pacs again")
    expect(page.locator(".deliveries .badge")).to_have_text("pending")
    expect(page.locator(".timeline")).to_contain_text("delivery requeued")
    page.goto("/events?kind=delivery-requeued")
    expect(page.locator("tbody tr").first).to_contain_text("web/olga")
    assert grey > 50, "the slice is drawn in greys"
    assert outside == []
    assert kinds(served.sessions, kind="study-viewed")
    _deliver_again(served)


def test_viewer_shows_what_was_dropped_and_hides_it(browser: Browser, served: Served) -> None:
    """The map darkens what was not given; its opacity and its switch, a preset and a drag change the picture."""
    page, outside = signed_in(browser, served, DESKTOP, "light")
    page.goto("/studies/1")
    page.locator("#viewer[data-slice='15']").wait_for()
    pictures = [_picture_of(page)]
    page.get_by_label("Opacity").fill("20")
    pictures.append(_picture_of(page))
    page.locator("#picture").focus()
    page.keyboard.press("t")
    expect(page.get_by_label("Token map")).not_to_be_checked()
    pictures.append(_picture_of(page))
    page.keyboard.press("3")
    expect(page.get_by_role("button", name="Bone")).to_have_attribute("aria-pressed", "true")
    pictures.append(_picture_of(page))
    box = page.locator("#picture").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 100, box["y"] + 100)
    page.mouse.down()
    page.mouse.move(box["x"] + 160, box["y"] + 140, steps=3)
    page.mouse.up()
    pictures.append(_picture_of(page))

    assert len(set(pictures)) == len(pictures), "every step changes the picture"
    assert outside == []


def test_each_role_sees_its_own(browser: Browser, served: Served) -> None:
    """A viewer has no commands; an auditor has events, the map, and neither a name nor an image."""
    viewer, _ = signed_in(browser, served, DESKTOP, "light", name="vera")
    viewer.goto("/studies/1")
    expect(viewer.get_by_role("heading", name="DOE, JANE")).to_be_visible()
    expect(viewer.get_by_role("button", name="Re-send")).to_have_count(0)
    expect(viewer.get_by_role("link", name="Events")).to_have_count(0)
    auditor, _ = signed_in(browser, served, DESKTOP, "light", name="adam")
    auditor.goto("/studies/1")
    expect(auditor.get_by_text("Images are not part of your role")).to_be_visible()
    assert "DOE" not in auditor.content()
    auditor.goto("/events")

    expect(auditor.get_by_role("heading", name="Events")).to_be_visible()


@pytest.mark.parametrize(
    ("viewport", "scheme", "name"),
    [(size, scheme, name) for size, name in ((DESKTOP, "desktop"), (PHONE, "phone")) for scheme in ("light", "dark")],
)
def test_pages_are_accessible_and_fit(
    browser: Browser, served: Served, viewport: dict[str, int], scheme: str, name: str
) -> None:
    """axe-core finds nothing serious, nothing is wider than the screen, and nothing comes from elsewhere."""
    page, outside = signed_in(browser, served, viewport, scheme)
    faults = {}
    for path in ("/", "/studies", "/studies/1", "/charts?days=366", "/events", "/configuration"):
        page.goto(path)
        page.wait_for_load_state("networkidle")
        width = page.evaluate("document.documentElement.scrollWidth")
        if path == "/studies/1":
            page.locator("#viewer[data-slice]").wait_for()
        faults[path] = serious_faults(page) + ([f"{width} pixels wide"] if width > viewport["width"] else [])
        picture(page, f"{name}-{scheme}{path.split('?')[0].replace('/', '-')}")

    assert [fault for fault in faults.items() if fault[1]] == []
    assert outside == []


def test_destination_is_paused_from_the_first_page(browser: Browser, served: Served) -> None:
    """By keyboard alone: the button, the question, and the new standing."""
    page, _ = signed_in(browser, served, DESKTOP, "light")
    page.goto("/")
    page.get_by_role("button", name="Pause pacs").press("Enter")
    page.get_by_role("button", name="Yes").press("Enter")

    expect(page.get_by_role("button", name="Resume pacs")).to_be_visible()
    assert event(served.sessions, "destination-paused").actor == "web/olga"


def _picture_of(page: Page) -> str:
    """The canvas as it is now."""
    return str(page.evaluate("() => document.getElementById('picture').toDataURL()"))


def _deliver_again(served: Served) -> None:
    """The delivery as it was, for the next test."""
    with served.sessions.begin() as session:
        delivery = session.get_one(Delivery, 1)
        assert delivery_transitions.close_delivered(session, delivery, status=0, note=None, now=NOW, actor=ACTOR)


def test_charts_show_weeks_and_a_drift(browser: Browser, served: Served) -> None:
    """Every analysis of the period in steps of six hours, and a line for each scanner with its protocol."""
    now = datetime.now(UTC)
    for number in range(60):
        scanner = ("Somatom Force, CT01", "Revolution, CT02")[number % 2]
        kept = 96 if number % 2 and number > 40 else 280 + 7 * (number % 5)  # the second one drifts
        _read_one(served, f"2.25.88{number}", now - timedelta(hours=11 * (60 - number)), scanner, kept)
    page, outside = signed_in(browser, served, DESKTOP, "light")
    page.goto("/charts?days=30")

    expect(page.locator(".chart canvas")).to_have_count(4)
    expect(page.locator("#drift .u-legend")).to_contain_text("Revolution, CT02, Thorax")
    expect(page.locator("#drift-hint")).to_contain_text("mean of every 6 hours")
    assert outside == []
    picture(page, "desktop-charts-of-weeks")


def _read_one(served: Served, study_uid: str, at: datetime, scanner: str, kept: int) -> None:
    """A study that was read and done then."""
    analysis_id = add_analysis(served.sessions, add_study(served.sessions, study_uid, first_received_at=at), now=at)
    held = claimed(served.sessions, analysis_id, now=at)
    said = output(analysis_id=analysis_id, scanner=scanner, protocol="Thorax")
    said = said.model_copy(update={"counts": said.counts.model_copy(update={"tokens_in": 1000, "tokens_kept": kept})})
    with served.sessions.begin() as session:
        assert transitions.close_read(
            session, held, said, output_path="x", output_sha256="0", now=at + timedelta(seconds=40), actor=ACTOR
        )
    assert finish(served.sessions, analysis_id, now=at)


def test_sign_in_is_throttled_in_words(browser: Browser, served: Served) -> None:
    """After five wrong passwords the page asks for patience, also with the right one.

    The last test of this file: the address has to wait as well, so nobody else could sign in right after it.
    """
    page = browser.new_context(base_url=served.site).new_page()
    page.goto("/login")
    for password in ["wrong password"] * 5 + [PASSWORD]:
        page.get_by_label("Name").fill("throttled")
        page.get_by_label("Password").fill(password)
        page.get_by_role("button", name="Sign in").click()

    expect(page.get_by_role("alert")).to_contain_text("Too many failed attempts")
    assert serious_faults(page) == []
