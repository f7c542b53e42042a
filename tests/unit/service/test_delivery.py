"""What an answer means for a delivery, when it is tried again, and what is on record of it. No network in here."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from threading import Event, Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless, RLELossless
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, sessionmaker

from service import delivery, requestor
from service.delivery import Answer, Verdict, encodings, judge, next_attempt
from service.shared import delivery_transitions
from service.shared.db import Delivery, DeliveryState
from service.shared.settings import DestinationSettings, Settings
from tests.receiving import wait_until
from tests.rows import NOW, add_deliveries, add_study, event, get, kinds, open_database

# pynetdicom drops the socket of a refused connection without closing it; CPython closes it in the same moment
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

STORED, AGAIN, REFUSED = Verdict.STORED, Verdict.AGAIN, Verdict.REFUSED


def destination(**changes: object) -> DestinationSettings:
    fields = {"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": 1, "timeout_s": 1}
    return DestinationSettings.model_validate(fields | changes)


@pytest.mark.parametrize(
    ("own", "compression", "expected"),
    [
        (JPEG2000Lossless, ("jpeg2000", "rle"), [JPEG2000Lossless, RLELossless]),
        (JPEG2000Lossless, ("jpeg2000",), [JPEG2000Lossless]),
        (JPEG2000Lossless, ("rle",), [RLELossless]),
        (JPEG2000Lossless, (), []),
        (RLELossless, ("jpeg2000", "rle"), [RLELossless]),
        (RLELossless, ("jpeg2000",), []),
        (ExplicitVRLittleEndian, ("jpeg2000", "rle"), []),
    ],
)
def test_what_is_offered_is_what_the_destination_may_get(
    own: str, compression: tuple[str, ...], expected: list[str]
) -> None:
    """The stored bytes first, then smaller before larger; uncompressed always."""
    offered = encodings(own, destination(compression=compression))

    assert offered == [*expected, ExplicitVRLittleEndian, ImplicitVRLittleEndian]


@pytest.fixture
def sessions(database_url: str) -> Iterator[sessionmaker[Session]]:
    with open_database(database_url) as opened:
        yield opened


@pytest.fixture
def pending(sessions: sessionmaker[Session]) -> Delivery:
    (delivery_id,) = add_deliveries(sessions, add_study(sessions), "pacs")
    return get(sessions, Delivery, delivery_id)


# --- what a status means --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "verdict"),
    [
        (0x0000, STORED),
        (0x0001, STORED),
        (0x0107, STORED),
        (0x0111, STORED),
        (0x0116, STORED),
        (0xB000, STORED),
        (0xB006, STORED),
        (0xB007, STORED),
        (0xBFFF, STORED),
        (0xA700, AGAIN),
        (0xA701, AGAIN),
        (0xA7FF, AGAIN),
        (0xA900, REFUSED),
        (0xA6FF, REFUSED),
        (0xA800, REFUSED),
        (0xC000, REFUSED),
        (0xCFFF, REFUSED),
        (0x0110, REFUSED),
        (0x0122, REFUSED),
        (0x0124, REFUSED),
        (0x0210, REFUSED),
        (0x0212, REFUSED),
        (0xFE00, REFUSED),
        (0xFF00, REFUSED),
    ],
    ids=lambda value: f"0x{value:04X}" if isinstance(value, int) else value,
)
def test_status_decides_by_its_class(status: int, verdict: Verdict) -> None:
    """PS3.4 table B.2-1: only lack of resources passes by itself."""
    answer = judge(status)

    assert (answer.verdict, answer.status) == (verdict, status)


@given(st.integers(0, 0xFFFF))
def test_every_status_but_success_has_a_reason_that_names_it(status: int) -> None:
    """Whoever reads the history should be able to look it up."""
    answer = judge(status)

    assert (answer.reason is None) == (status == 0)
    assert status == 0 or f"0x{status:04X}" in str(answer.reason)


# --- when it is tried again -----------------------------------------------------------------------------------------


def test_delays_double_up_to_their_maximum() -> None:
    """30, 60, 120, ... seconds, and then every 15 minutes."""
    delays = [(next_attempt(destination(), attempts, NOW, 0) - NOW).total_seconds() for attempts in range(8)]

    assert delays == [30, 60, 120, 240, 480, 900, 900, 900]


@given(
    attempts=st.integers(0, 10_000),
    jitter=st.floats(0, 1),
    delay=st.floats(0.1, 1000),
    longest=st.floats(0.1, 100_000),
)
def test_delay_stays_within_its_bounds(attempts: int, jitter: float, delay: float, longest: float) -> None:
    """Never above the maximum, never less than three quarters of what doubling gives, whatever the attempt."""
    one = destination(retry_delay_s=delay, retry_max_delay_s=longest)

    waited = next_attempt(one, attempts, NOW, jitter) - NOW

    full = min(longest, delay * 2.0 ** min(attempts, 16))
    microsecond = timedelta(microseconds=1)
    assert timedelta(seconds=0.75 * full) - microsecond <= waited <= timedelta(seconds=full) + microsecond


def test_jitter_spreads_the_attempts() -> None:
    """A PACS that comes back is not asked by everybody at once."""
    earliest, latest = (next_attempt(destination(), 0, NOW, jitter) for jitter in (1, 0))

    assert (earliest - NOW, latest - NOW) == (timedelta(seconds=22.5), timedelta(seconds=30))


# --- what is on record ----------------------------------------------------------------------------------------------


def record(sessions: sessionmaker[Session], row: Delivery, answer: Answer, **changes: object) -> Delivery:
    with sessions.begin() as session:
        delivery.record(session, row, answer, destination(**changes), NOW)
    return get(sessions, Delivery, row.id)


@pytest.mark.parametrize(("status", "reason"), [(0x0000, None), (0xB007, "stored with warning 0xB007")])
def test_stored_result_is_delivered(
    sessions: sessionmaker[Session], pending: Delivery, status: int, reason: str | None
) -> None:
    """With the status, and the warning in words."""
    row = record(sessions, pending, judge(status))

    assert (row.state, row.status, row.reason, row.attempts) == (DeliveryState.DELIVERED, status, reason, 1)
    assert (row.delivered_at, row.next_attempt_at) == (NOW, None)
    assert event(sessions, "delivery-delivered").detail["status"] == status


def test_lack_of_resources_postpones(sessions: sessionmaker[Session], pending: Delivery) -> None:
    """Pending, one attempt older, due within the bounds of the first delay."""
    row = record(sessions, pending, judge(0xA700))

    assert (row.state, row.status, row.attempts) == (DeliveryState.PENDING, 0xA700, 1)
    assert row.next_attempt_at is not None
    assert timedelta(seconds=22.5) <= row.next_attempt_at - NOW <= timedelta(seconds=30)
    assert kinds(sessions)[-1] == "delivery-postponed"


def test_missing_answer_postpones_without_a_status(sessions: sessionmaker[Session], pending: Delivery) -> None:
    """The destination was away; the reason says so."""
    row = record(sessions, pending, Answer(AGAIN, None, "cannot be reached"))

    assert (row.state, row.status, row.reason) == (DeliveryState.PENDING, None, "cannot be reached")


def test_refusal_is_final_at_once(sessions: sessionmaker[Session], pending: Delivery) -> None:
    """The same bytes would be refused for ever; a person has to look."""
    row = record(sessions, pending, judge(0xC000))

    assert (row.state, row.status, row.next_attempt_at) == (DeliveryState.REJECTED, 0xC000, None)
    assert row.reason == "refused by the destination (0xC000)"
    assert kinds(sessions)[-1] == "delivery-rejected"


def test_spent_attempts_reject(sessions: sessionmaker[Session], pending: Delivery) -> None:
    """retry_max_attempts, and not one more; the last reason is kept."""
    for number in (1, 2):
        assert record(sessions, pending, judge(0xA700), retry_max_attempts=3).state is DeliveryState.PENDING
        pending = get(sessions, Delivery, pending.id)
        assert pending.attempts == number

    row = record(sessions, pending, judge(0xA700), retry_max_attempts=3)

    assert (row.state, row.attempts) == (DeliveryState.REJECTED, 3)
    assert row.reason == "gave up after 3 attempts: out of resources at the destination (0xA700)"


def test_success_of_the_last_attempt_counts(sessions: sessionmaker[Session], pending: Delivery) -> None:
    """Spent attempts reject only what was not stored."""
    assert record(sessions, pending, judge(0x0000), retry_max_attempts=1).state is DeliveryState.DELIVERED


# --- what is due ----------------------------------------------------------------------------------------------------


def deliver(sessions: sessionmaker[Session], *, seconds: float = 0, **changes: object) -> int:
    """Send what is due to a destination that nobody listens at."""
    return delivery.deliver_due(Settings(), destination(**changes), sessions, NOW + timedelta(seconds=seconds))


def test_only_what_is_due_for_the_destination_is_sent(sessions: sessionmaker[Session], pending: Delivery) -> None:
    """Not before its time, not to another one, not once it is delivered."""
    assert deliver(sessions, seconds=-1) == 0
    assert deliver(sessions, name="other") == 0
    assert deliver(sessions) == 1

    record(sessions, get(sessions, Delivery, pending.id), judge(0))
    assert deliver(sessions, seconds=10_000) == 0


def test_destination_that_is_away_is_tried_again_later(sessions: sessionmaker[Session], pending: Delivery) -> None:
    """No status, the address and the remedy in the reason, one attempt."""
    assert deliver(sessions) == 1

    row = get(sessions, Delivery, pending.id)
    assert (row.state, row.status, row.attempts) == (DeliveryState.PENDING, None, 1)
    assert row.reason == (
        "PACS at 127.0.0.1:1 cannot be reached; check [[destination]] host and port, and that the PACS is up"
    )


@pytest.mark.parametrize("host", ["no.such.host.invalid", "a..b"])
def test_host_that_has_no_address_is_tried_again_later(
    sessions: sessionmaker[Session], pending: Delivery, host: str
) -> None:
    """A resolver that is away must not keep the delivery from having its reason and its back-off."""
    assert deliver(sessions, host=host) == 1

    row = get(sessions, Delivery, pending.id)
    assert (row.state, row.attempts) == (DeliveryState.PENDING, 1)
    assert row.reason == f"PACS at {host}:1: no such host; check [[destination]] host"


def pause(sessions: sessionmaker[Session], paused: bool) -> None:
    change = delivery_transitions.pause_destination if paused else delivery_transitions.resume_destination
    with sessions.begin() as session:
        assert change(session, "pacs", now=NOW, actor="cli/somebody")


def test_paused_destination_gets_nothing_until_it_is_resumed(
    sessions: sessionmaker[Session], pending: Delivery
) -> None:
    """Its deliveries wait, without losing attempts; other destinations are not touched."""
    pause(sessions, True)
    assert deliver(sessions) == 0
    assert get(sessions, Delivery, pending.id).attempts == 0

    pause(sessions, False)
    assert deliver(sessions) == 1


def test_echo_to_nobody_says_what_to_check() -> None:
    """The same sentence as in a delivery's reason."""
    answered, sentence = requestor.echo(destination(), Settings().scp)

    assert not answered
    assert "check [[destination]] host and port" in sentence


# --- the loop -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [OperationalError("SELECT", {}, Exception("server closed")), RuntimeError("a fault of ours")], ids=repr
)
def test_loop_survives_what_goes_wrong(sqlite_url: str, error: Exception) -> None:
    """A database that is away, or a fault: logged, tried again, and the delivery is attempted in the end."""
    with open_database(sqlite_url) as sessions:
        (delivery_id,) = add_deliveries(sessions, add_study(sessions), "pacs")
        asked: list[int] = []

        class Away:
            def __call__(self) -> Session:
                asked.append(1)
                if len(asked) < 4:
                    raise error
                return sessions()

            begin = sessions.begin

        stop = Event()
        settings = Settings(destination=(destination(),)).model_copy(
            update={"assembly": Settings().assembly.model_copy(update={"sweep_s": 0.01})}
        )
        loop = Thread(target=delivery.deliver_for_ever, args=(settings, Away(), stop), daemon=True)
        loop.start()
        wait_until(lambda: get(sessions, Delivery, delivery_id).attempts == 1)
        stop.set()
        loop.join(20)

        assert not loop.is_alive()
