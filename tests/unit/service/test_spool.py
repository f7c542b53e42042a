"""The spool alone: names, durability, receipts, heartbeats, recovery, retention."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from service import spool as spool_module
from service.spool import Arrival, NoSpace, OpenAssociation, Receipt, ReceiptError, Spool, SpoolInUse, key
from tests.receiving import STUDY_UID, data_set_bytes, encode, instance

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
LATER = NOW + timedelta(days=400)  # after the modification time of anything a test writes


def arrival(number: int = 1, **changes: str) -> Arrival:
    fields = {
        "study_uid": STUDY_UID,
        "series_uid": f"{STUDY_UID}.1",
        "sop_class_uid": str(CTImageStorage),
        "sop_instance_uid": f"{STUDY_UID}.1.{number}",
        "transfer_syntax_uid": str(ExplicitVRLittleEndian),
        "modality": "CT",
        "calling_ae": "SENDER",
        "called_ae": "MEDPRUNER",
        "peer_address": "192.0.2.1",
        "association_id": "association-1",
    }
    return Arrival(**(fields | changes))


def association(*study_uids: str) -> OpenAssociation:
    return OpenAssociation(
        association_id="association-1",
        calling_ae="SENDER",
        called_ae="MEDPRUNER",
        peer_address="192.0.2.1",
        opened_at=NOW,
        study_keys=tuple(key(uid) for uid in study_uids),
    )


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool", min_free_bytes=0)


def test_instance_is_a_part_10_file_with_the_received_bytes_in_it(spool: Spool) -> None:
    """Behind the file meta information stands the data set as it came, bit for bit, and pydicom reads it."""
    sent = encode(instance(1))

    receipt = spool.store(arrival(1), sent, NOW)

    path = spool.path / receipt.path
    assert data_set_bytes(path) == sent
    assert receipt.sha256 == sha256(sent).hexdigest()
    assert receipt.size_bytes == len(sent)
    read = pydicom.dcmread(path)
    assert read.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    assert read.file_meta.MediaStorageSOPInstanceUID == read.SOPInstanceUID == f"{STUDY_UID}.1.1"


def test_receipts_come_in_order_of_arrival(spool: Spool) -> None:
    """Ingest sees instances in the order in which they were acknowledged."""
    for number in (3, 1, 2):
        spool.store(arrival(number), encode(instance(number)), NOW + timedelta(microseconds=3 - number))

    uids = [spool.read(path).sop_instance_uid for path in spool.incoming()]

    assert uids == [f"{STUDY_UID}.1.{number}" for number in (3, 2, 1)]


def test_receipts_of_one_moment_keep_their_order(spool: Spool) -> None:
    """Instances of the same microsecond keep the order in which they were stored."""
    for number in range(12, 0, -1):
        spool.store(arrival(number), encode(instance(number)), NOW)

    uids = [spool.read(path).sop_instance_uid for path in spool.incoming()]

    assert uids == [f"{STUDY_UID}.1.{number}" for number in range(12, 0, -1)]


def test_receipt_survives_json(spool: Spool) -> None:
    """What is read back is what was returned."""
    receipt = spool.store(arrival(), encode(instance()), NOW)

    assert spool.read(spool.incoming()[0]) == receipt


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace('"version": 1', '"version": 2'),
        lambda text: text.replace('"version": 1,', ""),
        lambda text: text.replace('"modality"', '"modalities"'),
        lambda text: text.replace('"duplicate": false', '"duplicate": "no"'),
        lambda text: text.replace('"studies/', '"../studies/'),
        lambda text: text.replace("+00:00", ""),
        lambda text: "[1]",
        lambda text: text[:40],
    ],
    ids=["version", "no-version", "unknown-key", "wrong-type", "path", "naive-time", "no-object", "cut"],
)
def test_receipt_that_is_not_understood_is_refused_by_name(spool: Spool, change: Callable[[str], str]) -> None:
    """Another version, key, type or path is an error that names the file and quotes nothing of it."""
    spool.store(arrival(), encode(instance()), NOW)
    path = spool.incoming()[0]
    path.write_text(change(path.read_text()))

    with pytest.raises(ReceiptError, match=path.name) as refusal:
        spool.read(path)
    assert STUDY_UID not in str(refusal.value)


def test_same_bytes_again_make_no_second_copy(spool: Spool) -> None:
    """An identical re-send is acknowledged as a duplicate and writes no instance."""
    first = spool.store(arrival(), encode(instance()), NOW)
    again = spool.store(arrival(), encode(instance()), NOW)

    assert (first.duplicate, again.duplicate) == (False, True)
    assert again.path == first.path
    assert len(spool.instances(STUDY_UID)) == 1


def test_duplicate_is_known_after_its_receipt_was_settled_and_the_receiver_restarted(spool: Spool) -> None:
    """The receipt beside the instance tells that it is acknowledged already."""
    spool.store(arrival(), encode(instance()), NOW)
    path = spool.incoming()[0]
    spool.settle(path, spool.read(path))

    again = Spool(spool.path, 0).store(arrival(), encode(instance()), NOW)

    assert again.duplicate


def test_instance_without_a_receipt_is_not_taken_for_a_duplicate(spool: Spool) -> None:
    """What a killed receiver left unacknowledged counts as new when it is sent again."""
    spool.store(arrival(), encode(instance()), NOW)
    spool.incoming()[0].unlink()

    again = Spool(spool.path, 0).store(arrival(), encode(instance()), NOW)

    assert not again.duplicate


def test_other_bytes_under_the_same_uid_are_kept_beside_the_first(spool: Spool) -> None:
    """Different content never replaces what was acknowledged."""
    changed = instance()
    changed.InstanceNumber = 99
    first = spool.store(arrival(), encode(instance()), NOW)
    second = spool.store(arrival(), encode(changed), NOW)

    assert not second.duplicate
    assert data_set_bytes(spool.path / first.path) == encode(instance())
    assert data_set_bytes(spool.path / second.path) == encode(changed)


def test_damaged_copy_is_replaced_when_the_instance_is_sent_again(spool: Spool) -> None:
    """A file of another length than the one received is not taken for it."""
    receipt = spool.store(arrival(), encode(instance()), NOW)
    path = spool.path / receipt.path
    path.write_bytes(path.read_bytes()[:-10])

    spool.store(arrival(), encode(instance()), NOW)

    assert data_set_bytes(path) == encode(instance())


def test_names_are_made_of_digests_alone(spool: Spool) -> None:
    """A UID that looks like a path leads nowhere."""
    sent = encode(instance())

    receipt = spool.store(arrival(study_uid="../../../etc", sop_instance_uid="/tmp/x"), sent, NOW)

    assert (spool.path / receipt.path).resolve().is_relative_to(spool.path.resolve() / "studies")
    assert set(receipt.path.removeprefix("studies/").removesuffix(".dcm")) <= set("0123456789abcdef/-")


def test_everything_is_for_the_owner_alone(spool: Spool) -> None:
    """No file or folder can be read by another user."""
    spool.store(arrival(), encode(instance()), NOW)
    spool.beat(association(STUDY_UID))

    assert {path for path in spool.path.rglob("*") if path.stat().st_mode & 0o077} == set()


def test_below_the_floor_nothing_is_written(tmp_path: Path) -> None:
    """An instance that would take the disk below min_free_bytes leaves no trace."""
    spool = Spool(tmp_path / "spool", min_free_bytes=1 << 60)

    with pytest.raises(NoSpace):
        spool.store(arrival(), encode(instance()), NOW)
    assert files(spool) == []


def files(spool: Spool) -> list[Path]:
    return sorted(path for path in spool.path.rglob("*") if path.is_file())


@pytest.mark.parametrize("step", range(5))
@pytest.mark.parametrize(
    ("number", "expected"), [(errno.ENOSPC, NoSpace), (errno.EDQUOT, NoSpace), (errno.EIO, OSError)]
)
def test_failed_sync_acknowledges_nothing(
    spool: Spool, monkeypatch: pytest.MonkeyPatch, step: int, number: int, expected: type[Exception]
) -> None:
    """Whichever flush fails, there is no receipt and no half-written file; sent again, it is stored."""
    calls = iter(range(100))
    really = os.fsync

    def fail_once(descriptor: int) -> None:
        if next(calls) == step:
            raise OSError(number, "a fault of the disk")
        really(descriptor)

    monkeypatch.setattr(os, "fsync", fail_once)
    with pytest.raises(expected):
        spool.store(arrival(), encode(instance()), NOW)

    assert spool.incoming() == []
    assert [path for path in files(spool) if path.suffix != ".dcm"] == []
    assert list((spool.path / "tmp").iterdir()) == []
    receipt = spool.store(arrival(), encode(instance()), NOW)
    assert data_set_bytes(spool.path / receipt.path) == encode(instance())


def test_write_that_is_cut_short_is_continued(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write() that takes fewer bytes than offered loses none."""
    really = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: really(descriptor, bytes(content[:100])))

    receipt = spool.store(arrival(), encode(instance()), NOW)

    assert data_set_bytes(spool.path / receipt.path) == encode(instance())


def test_everything_is_synced_before_store_returns(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The instance before its name, then its folder and that folder's entry; the receipt likewise, and last."""
    trace: list[str] = []
    really_sync, really_rename = os.fsync, Path.rename

    def sync(descriptor: int) -> None:
        trace.append("sync " + _place(spool, Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        really_sync(descriptor)

    def rename(path: Path, target: Any) -> Path:
        trace.append("rename to " + _place(spool, Path(target)))
        return really_rename(path, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", rename)
    spool.store(arrival(), encode(instance()), NOW)

    assert trace == [
        "sync tmp/*",
        "sync studies",
        "rename to studies/*/*",
        "sync studies/*",
        "sync incoming/*",
        "rename to incoming/*",
        "sync incoming",
    ]


def _place(spool: Spool, path: Path) -> str:
    first, *rest = path.relative_to(spool.path).parts
    return "/".join([first, *("*" for _ in rest)])


def test_settled_receipt_lies_beside_its_instance(spool: Spool) -> None:
    """After ingest nothing waits, and the rows can be rebuilt from what lies beside the instances."""
    receipts = [spool.store(arrival(number), encode(instance(number)), NOW) for number in (1, 2)]
    for path in spool.incoming():
        spool.settle(path, spool.read(path))

    assert spool.incoming() == []
    settled = list(spool.settled())
    assert sorted(receipts, key=lambda receipt: receipt.path) == [spool.read(path) for path in settled]
    assert [path.with_suffix(".dcm") for path in settled] == spool.instances(STUDY_UID)


def test_settling_keeps_the_first_receipt_and_may_be_repeated(spool: Spool) -> None:
    """Receipts of duplicates go; settling the same one twice does no harm."""
    first = spool.store(arrival(), encode(instance()), NOW)
    again = spool.store(arrival(), encode(instance()), NOW + timedelta(seconds=1))
    paths = spool.incoming()
    for path, receipt in [(paths[0], first), (paths[1], again), (paths[0], first), (paths[1], again)]:
        spool.settle(path, receipt)

    assert spool.incoming() == []
    assert [spool.read(path) for path in spool.settled()] == [first]


def test_removed_study_leaves_nothing_but_what_came_meanwhile(spool: Spool) -> None:
    """Retention takes settled instances; one that waits for ingest stays."""
    spool.store(arrival(1), encode(instance(1)), NOW)
    path = spool.incoming()[0]
    spool.settle(path, spool.read(path))
    late = spool.store(arrival(2), encode(instance(2)), NOW)

    assert spool.remove_study(STUDY_UID) == 1
    assert spool.instances(STUDY_UID) == [spool.path / late.path]


def test_study_can_come_again_after_its_removal(spool: Spool) -> None:
    """The folder that retention removed is made again, and is synced again."""
    for _ in range(2):
        receipt = spool.store(arrival(), encode(instance()), NOW)
        assert not receipt.duplicate
        path = spool.incoming()[0]
        spool.settle(path, receipt)
        spool.remove_study(STUDY_UID)

    assert not (spool.path / receipt.path).parent.exists()
    assert spool.remove_study(STUDY_UID) == 0


def test_starting_receiver_clears_what_was_never_acknowledged(spool: Spool) -> None:
    """Unfinished files, old heartbeats and old orphans go; acknowledged instances stay, settled or not."""
    waiting = spool.store(arrival(1), encode(instance(1)), NOW)
    settled = spool.store(arrival(2), encode(instance(2)), NOW)
    spool.settle(spool.incoming()[1], settled)
    orphan = spool.store(arrival(3), encode(instance(3)), NOW)
    spool.incoming()[1].unlink()
    spool.beat(association(STUDY_UID))
    (spool.path / "tmp" / "1-1.dcm").write_bytes(b"half")
    (spool.path / "incoming" / "1.json.part").write_bytes(b"half")

    found = spool.recover(LATER)

    assert (found.unfinished, found.orphans, found.orphans_removed) == (2, 1, 1)
    assert spool.instances(STUDY_UID) == sorted(spool.path / receipt.path for receipt in (waiting, settled))
    assert not (spool.path / orphan.path).exists()
    assert list((spool.path / "associations").iterdir()) == []


def test_young_orphan_stays(spool: Spool) -> None:
    """An instance without a receipt may be about to get one."""
    spool.store(arrival(), encode(instance()), NOW)
    spool.incoming()[0].unlink()

    assert spool.recover(datetime.now(UTC)).orphans == 0
    assert len(spool.instances(STUDY_UID)) == 1


@pytest.mark.parametrize("aside", [False, True], ids=["waiting", "set-aside"])
def test_no_orphan_is_removed_while_a_receipt_cannot_be_read(spool: Spool, aside: bool) -> None:
    """An instance whose receipt is damaged was acknowledged, and is kept."""
    spool.store(arrival(), encode(instance()), NOW)
    path = spool.incoming()[0]
    path.write_text("damaged")
    if aside:
        assert spool.set_aside(path).exists()

    found = spool.recover(LATER)

    assert (found.orphans, found.orphans_removed) == (1, 0)
    assert len(spool.instances(STUDY_UID)) == 1


def test_instance_whose_receipt_was_set_aside_is_no_orphan(spool: Spool) -> None:
    """A receipt that ingest could not use still says that its instance was acknowledged."""
    spool.store(arrival(), encode(instance()), NOW)
    spool.set_aside(spool.incoming()[0])

    assert spool.orphans(LATER) == []
    assert spool.recover(LATER).orphans == 0
    assert len(spool.instances(STUDY_UID)) == 1


def test_second_receiver_is_kept_away(spool: Spool) -> None:
    """Two receivers on one spool would clear each other's unfinished files."""
    spool.claim()

    with pytest.raises(SpoolInUse, match=r"\[spool\] path"):
        Spool(spool.path, 0).claim()
    spool.release()
    other = Spool(spool.path, 0)
    other.claim()
    other.release()


def test_studies_of_an_open_association_are_seen_until_it_closes(spool: Spool) -> None:
    """A study is not complete while somebody is still sending it."""
    spool.beat(association(STUDY_UID, "1.2.3"))
    assert spool.open_studies(datetime.now(UTC)) == {key(STUDY_UID), key("1.2.3")}
    assert spool.open_associations(datetime.now(UTC)) == [association(STUDY_UID, "1.2.3")]

    spool.close_association("association-1")
    assert spool.open_studies(datetime.now(UTC)) == frozenset()


def test_heartbeat_that_nobody_touches_goes_stale(spool: Spool) -> None:
    """The association of a killed receiver holds its study for half a minute, not for ever."""
    spool.beat(association(STUDY_UID))
    path = spool.path / "associations" / "association-1.json"
    long_ago = datetime.now(UTC).timestamp() - 31
    os.utime(path, (long_ago, long_ago))
    assert spool.open_studies(datetime.now(UTC)) == frozenset()

    spool.touch_association("association-1")
    assert spool.open_studies(datetime.now(UTC)) == {key(STUDY_UID)}


def test_touching_or_closing_an_unknown_association_does_nothing(spool: Spool) -> None:
    """An association that brought no instance has no heartbeat."""
    spool.touch_association("none")
    spool.close_association("none")

    assert spool.open_associations(datetime.now(UTC)) == []


def test_memory_of_acknowledged_instances_is_bounded(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past its bound the spool forgets; a duplicate is then stored as new, without a second copy."""
    monkeypatch.setattr(spool_module, "REMEMBERED", 2)
    for number in (1, 2, 3):
        spool.store(arrival(number), encode(instance(number)), NOW)

    again = spool.store(arrival(1), encode(instance(1)), NOW)

    assert not again.duplicate
    assert len(spool.instances(STUDY_UID)) == 3


def test_memoryview_of_a_stream_is_stored_without_a_copy(spool: Spool) -> None:
    """The receiver hands over the buffer in which the data set came."""
    sent = encode(instance())

    with BytesIO(sent).getbuffer() as view:
        receipt = spool.store(arrival(), view, NOW)

    assert data_set_bytes(spool.path / receipt.path) == sent


def test_receipt_holds_no_name_of_a_patient(spool: Spool) -> None:
    """Receipts are read by programs that have no business with patients."""
    spool.store(arrival(), encode(instance()), NOW)

    assert b"Planted" not in spool.incoming()[0].read_bytes()
    assert Receipt.from_json(spool.incoming()[0].read_bytes()).modality == "CT"
