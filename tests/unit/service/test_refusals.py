"""The file of refusals: counted, bounded, readable after any accident."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from service import refusals
from service.refusals import Refusals, Refused, last_day, recent

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)
REFUSED = Refused(
    at=NOW,
    calling_ae="CT01",
    called_ae="MEDPRUNER",
    address="10.0.0.17",
    reason="calling AE title is not a source",
    remedy='[[source]] ae_title = "CT01"',
)


def test_refusal_is_found_again(tmp_path: Path) -> None:
    """What was recorded is read back, without its like from before the time asked for."""
    writer = Refusals(tmp_path)
    old = replace(REFUSED, at=NOW - timedelta(days=2), calling_ae="OLD")
    writer.record(old)
    writer.record(REFUSED)

    assert last_day(tmp_path, NOW) == [REFUSED]
    assert recent(tmp_path, NOW - timedelta(days=3)) == [REFUSED, old]


def test_repetitions_are_counted_in_few_lines(tmp_path: Path) -> None:
    """A sender that tries again every second for five minutes makes a handful of lines and the right count."""
    writer = Refusals(tmp_path)
    for second in range(300):
        writer.record(replace(REFUSED, at=NOW + timedelta(seconds=second)))
    writer.flush(NOW + timedelta(seconds=300), at_least_s=0)

    assert len((tmp_path / "state" / refusals.FILE).read_text().splitlines()) == 6
    assert recent(tmp_path, NOW) == [replace(REFUSED, at=NOW + timedelta(seconds=300), count=300)]


def test_reasons_of_one_peer_stay_apart(tmp_path: Path) -> None:
    """The same peer with two reasons is two entries, the newest first."""
    writer = Refusals(tmp_path)
    other = replace(REFUSED, at=NOW + timedelta(seconds=1), reason="as many associations as allowed are open")
    writer.record(REFUSED)
    writer.record(other)

    assert recent(tmp_path, NOW) == [other, REFUSED]


def test_file_stays_small_whoever_knocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of invented AE titles: two files of bounded size, and the newest are kept."""
    monkeypatch.setattr(refusals, "MAX_FILE_BYTES", 20_000)
    writer = Refusals(tmp_path)
    for number in range(3000):
        writer.record(replace(REFUSED, at=NOW + timedelta(milliseconds=number), calling_ae=f"X{number}"))

    sizes = [path.stat().st_size for path in (tmp_path / "state").iterdir()]
    assert len(sizes) == 2
    assert max(sizes) < 21_000
    assert recent(tmp_path, NOW)[0].calling_ae == "X2999"


def test_cut_line_hides_no_other(tmp_path: Path) -> None:
    """A line that a power cut left half written is skipped."""
    writer = Refusals(tmp_path)
    writer.record(REFUSED)
    with (tmp_path / "state" / refusals.FILE).open("a") as stream:
        stream.write('{"at": "2026-11-25T12:00:0\n[1]\n')
    writer.record(replace(REFUSED, calling_ae="CT02"))

    assert {refused.calling_ae for refused in recent(tmp_path, NOW)} == {"CT01", "CT02"}


def test_full_disk_stops_no_refusal(tmp_path: Path) -> None:
    """Where nothing can be written, recording returns, and there is nothing to read."""
    (tmp_path / "state").write_text("a file where the folder would be")

    Refusals(tmp_path).record(REFUSED)

    assert recent(tmp_path, NOW) == []
