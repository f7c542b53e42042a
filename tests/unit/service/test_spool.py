"""The spool alone: names, durability, receipts, heartbeats, recovery, retention."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from service.spool import Arrival, NoSpace, OpenAssociation, Receipt, ReceiptError, Spool, SpoolInUse, key
from tests.receiving import (
    STUDY_UID,
    as_version_0_1,
    data_set_bytes,
    encode,
    instance,
    place,
    rewrite_receipt,
    wait_until,
)

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


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

    (path,) = spool.incoming()
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
        lambda text: re.sub(r'"size_bytes": \d+', '"size_bytes": "no"', text),
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
    rewrite_receipt(path, change)

    with pytest.raises(ReceiptError, match=path.name) as refusal:
        spool.read(path)
    assert STUDY_UID not in str(refusal.value)


def test_same_bytes_again_make_no_second_copy(spool: Spool) -> None:
    """An identical re-send is acknowledged; of two copies that wait, one is kept."""
    first = spool.store(arrival(), encode(instance()), NOW)
    again = spool.store(arrival(), encode(instance()), NOW)

    assert again.path == first.path
    place(spool)
    for path in spool.incoming():
        spool.settle(path, spool.read(path))
    assert len(spool.instances(STUDY_UID)) == len(list(spool.settled())) == 1


def test_other_bytes_under_the_same_uid_are_kept_beside_the_first(spool: Spool) -> None:
    """Different content never replaces what was acknowledged."""
    changed = instance()
    changed.InstanceNumber = 99
    first = spool.store(arrival(), encode(instance()), NOW)
    second = spool.store(arrival(), encode(changed), NOW)

    place(spool)
    assert data_set_bytes(spool.path / first.path) == encode(instance())
    assert data_set_bytes(spool.path / second.path) == encode(changed)


def test_damaged_copy_is_replaced_when_the_instance_is_sent_again(spool: Spool) -> None:
    """A file of another length than the one received is not taken for it."""
    receipt = spool.store(arrival(), encode(instance()), NOW)
    place(spool)
    spool.incoming()[0].unlink()
    path = spool.path / receipt.path
    path.write_bytes(path.read_bytes()[:-10])

    spool.store(arrival(), encode(instance()), NOW)
    place(spool)

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


@pytest.mark.parametrize("step", ["fsync", "fdatasync", "rename"])
@pytest.mark.parametrize(
    ("number", "expected"), [(errno.ENOSPC, NoSpace), (errno.EDQUOT, NoSpace), (errno.EIO, OSError)]
)
def test_failed_step_acknowledges_nothing(
    spool: Spool, monkeypatch: pytest.MonkeyPatch, step: str, number: int, expected: type[Exception]
) -> None:
    """Whichever flush or name fails, there is nothing to take for acknowledged; sent again, it is stored."""

    def fail(*_: object) -> None:
        raise OSError(number, "a fault of the disk")

    with monkeypatch.context() as broken:
        broken.setattr(os, step, fail)
        with pytest.raises(expected):
            spool.store(arrival(), encode(instance()), NOW)

    assert spool.incoming() == []
    assert [path for path in files(spool) if path.stat().st_size] == []
    spool.store(arrival(), encode(instance()), NOW)
    assert data_set_bytes(spool.incoming()[0]) == encode(instance())


def test_write_that_is_cut_short_is_continued(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write() that takes fewer bytes than offered loses none."""
    really = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: really(descriptor, bytes(content[:100])))

    spool.store(arrival(), encode(instance()), NOW)

    assert data_set_bytes(spool.incoming()[0]) == encode(instance())


@pytest.fixture
def trace(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is flushed and named, in order."""
    calls: list[str] = []

    def watch(owner: Any, name: str, words: str, place: Callable[..., Path]) -> None:
        really = getattr(owner, name)

        def call(*arguments: Any) -> Any:
            where = _place(spool, place(*arguments))
            result = really(*arguments)
            calls.append(words + where)
            return result

        monkeypatch.setattr(owner, name, call)

    for name in ("fsync", "fdatasync"):
        watch(os, name, "sync ", lambda descriptor: Path(os.readlink(f"/proc/self/fd/{descriptor}")))
    watch(os, "link", "link to ", lambda _, target: Path(target))
    watch(os, "rename", "rename to ", lambda _, target: Path(target))
    return calls


def test_one_flush_makes_an_instance_durable(spool: Spool, trace: list[str]) -> None:
    """The slot's name before; then the instance with its receipt in it, and only then the name that ingest sees."""
    spool.store(arrival(), encode(instance()), NOW)

    assert trace == ["sync incoming", "sync incoming/*", "rename to incoming/*"]


def test_slots_made_ahead_need_no_flush_of_their_folder(spool: Spool, trace: list[str]) -> None:
    """Many are made at a time, and their folder is flushed once for all of them, before anything comes."""
    spool.make_ahead()
    wait_until(lambda: trace.count("sync incoming") == 2)  # half of them and half of them
    trace.clear()
    spool.store(arrival(), encode(instance()), NOW)
    spool.release()

    assert trace[:2] == ["sync incoming/*", "rename to incoming/*"]
    assert [path.suffix for path in (spool.path / "incoming").iterdir()] == [".dcm"]


def test_folders_are_flushed_before_an_instance_waits_no_longer(spool: Spool, trace: list[str]) -> None:
    """Ingest makes the name under studies/, and it and its folder's durable, before the one in incoming/ goes."""
    spool.store(arrival(), encode(instance()), NOW)
    trace.clear()

    (receipt,) = place(spool)

    assert trace == ["link to studies/*/*", "sync studies/*", "sync studies"]
    assert data_set_bytes(spool.path / receipt.path) == encode(instance())


def _place(spool: Spool, path: Path) -> str:
    first, *rest = path.relative_to(spool.path).parts
    return "/".join([first, *("*" for _ in rest)])


def test_settled_receipt_lies_beside_its_instance(spool: Spool) -> None:
    """After ingest nothing waits, and the rows can be rebuilt from what lies beside the instances."""
    receipts = [spool.store(arrival(number), encode(instance(number)), NOW) for number in (1, 2)]
    place(spool)
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
    place(spool)
    paths = spool.incoming()
    for path, receipt in [(paths[0], first), (paths[1], again), (paths[0], first), (paths[1], again)]:
        spool.settle(path, receipt)

    assert spool.incoming() == []
    assert [spool.read(path) for path in spool.settled()] == [first]


def test_removed_study_leaves_nothing_but_what_came_meanwhile(spool: Spool) -> None:
    """Retention takes settled instances; one that waits for ingest stays."""
    spool.store(arrival(1), encode(instance(1)), NOW)
    place(spool)
    path = spool.incoming()[0]
    spool.settle(path, spool.read(path))
    late = spool.store(arrival(2), encode(instance(2)), NOW)
    place(spool)

    assert spool.remove_study(STUDY_UID) == 1
    assert spool.instances(STUDY_UID) == [spool.path / late.path]


def test_study_can_come_again_after_its_removal(spool: Spool) -> None:
    """The folder that retention removed is made again, and is synced again."""
    for _ in range(2):
        receipt = spool.store(arrival(), encode(instance()), NOW)
        place(spool)
        assert spool.instances(STUDY_UID) == [spool.path / receipt.path]
        path = spool.incoming()[0]
        spool.settle(path, receipt)
        spool.remove_study(STUDY_UID)

    assert not (spool.path / receipt.path).parent.exists()
    assert spool.remove_study(STUDY_UID) == 0


def test_starting_receiver_clears_what_was_never_acknowledged(spool: Spool) -> None:
    """Unfinished files and old heartbeats go; acknowledged instances stay, settled or not."""
    waiting = spool.store(arrival(1), encode(instance(1)), NOW)
    settled = spool.store(arrival(2), encode(instance(2)), NOW)
    place(spool)
    spool.settle(spool.incoming()[1], settled)
    spool.beat(association(STUDY_UID))
    (spool.path / "tmp" / "1-1.dcm").write_bytes(b"half")
    (spool.path / "incoming" / "1.json.part").write_bytes(b"half")
    (spool.path / "incoming" / "empty.slot").touch()
    half = spool.begin(sop_class_uid=CTImageStorage, sop_instance_uid="1.2.3", transfer_syntax_uid="1.2.840.10008.1.2")
    half.write(b"half")

    found = spool.recover()

    assert (found.unfinished, found.adopted) == (3, 0)
    assert spool.instances(STUDY_UID) == sorted(spool.path / receipt.path for receipt in (waiting, settled))
    assert len(list((spool.path / "incoming").iterdir())) == 1
    assert list((spool.path / "associations").iterdir()) == []


def _killed(spool: Spool) -> Receipt:
    """Store an instance, and undo what comes after the flush."""
    receipt = spool.store(arrival(), encode(instance()), NOW)
    waiting = spool.incoming()[0]
    waiting.rename(waiting.with_suffix(".slot"))
    return receipt


def test_whole_instance_of_a_killed_receiver_is_adopted(spool: Spool) -> None:
    """Killed between flush and answer, or after it: it may have been acknowledged, so it is kept."""
    receipt = _killed(spool)

    found = spool.recover()

    assert (found.unfinished, found.adopted) == (0, 1)
    assert place(spool) == [receipt]
    assert data_set_bytes(spool.path / receipt.path) == encode(instance())
    spool.settle(spool.incoming()[0], receipt)
    assert len(list(spool.settled())) == 1


@pytest.mark.parametrize("damage", ["cut", "hole", "other receipt"])
def test_instance_that_its_receipt_does_not_fit_is_not_adopted(spool: Spool, damage: str) -> None:
    """A power cut before the flush may leave a receipt over half a data set: that was never acknowledged."""
    _killed(spool)
    (slot,) = (spool.path / "incoming").iterdir()
    content = slot.read_bytes()
    if damage == "cut":
        slot.write_bytes(content[:-1])
    elif damage == "hole":
        slot.write_bytes(content[:-4096] + bytes(4096))
    else:
        rewrite_receipt(slot, lambda text: text[:-20])

    assert spool.recover().adopted == 0
    assert list((spool.path / "incoming").iterdir()) == []


# --- what version 0.1 left ---


def test_waiting_receipt_of_version_0_1_is_read_and_settled(spool: Spool) -> None:
    """An upgrade in the middle of a study loses nothing: old and new wait side by side."""
    old = spool.store(arrival(1), encode(instance(1)), NOW)
    beside = as_version_0_1(spool, spool.incoming()[0])
    new = spool.store(arrival(2), encode(instance(2)), NOW + timedelta(seconds=1))

    assert list(spool.settled()) == []
    assert place(spool) == [old, new]
    for path in spool.incoming():
        spool.settle(path, spool.read(path))
    assert not beside.exists()
    assert [spool.read(path) for path in spool.settled()] == sorted((old, new), key=lambda receipt: receipt.path)


def test_instance_of_version_0_1_is_known_when_it_comes_again(spool: Spool) -> None:
    """Its receipt lies beside it; its data set is compared, not its header."""
    spool.store(arrival(), encode(instance()), NOW)
    beside = as_version_0_1(spool, spool.incoming()[0])
    spool.settle(beside, spool.read(beside))

    again = spool.store(arrival(), encode(instance()), NOW)
    place(spool)
    spool.settle(spool.incoming()[0], again)

    assert len(spool.instances(STUDY_UID)) == 1
    assert spool.remove_study(STUDY_UID) == 1
    assert list((spool.path / "studies").iterdir()) == []


def test_what_was_set_aside_is_found_by_its_study(spool: Spool) -> None:
    """So that a study can be forgotten: by its receipt, or by its data set when the receipt cannot be read."""
    for number in (1, 2, 3):
        spool.store(arrival(number), encode(instance(number)), NOW)
    spool.store(arrival(4, study_uid="1.2.3"), encode(instance(4)), NOW)
    rewrite_receipt(spool.incoming()[1], lambda text: text[:40])
    aside = [spool.set_aside(path) for path in (*spool.incoming()[:2], spool.incoming()[3])]

    assert sorted(spool.set_aside_of(STUDY_UID)) == sorted(aside[:2])


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


def test_memoryview_of_a_stream_is_stored_without_a_copy(spool: Spool) -> None:
    """The receiver hands over the buffer in which the data set came."""
    sent = encode(instance())

    with BytesIO(sent).getbuffer() as view:
        spool.store(arrival(), view, NOW)

    assert data_set_bytes(spool.incoming()[0]) == sent


def test_receipt_holds_no_name_of_a_patient(spool: Spool) -> None:
    """Receipts are read by programs that have no business with patients."""
    spool.store(arrival(), encode(instance()), NOW)

    content = spool.incoming()[0].read_bytes()
    assert b"Planted" not in content[: -len(encode(instance()))]


def test_longest_receipt_fits_its_place(spool: Spool) -> None:
    """Every UID of 64 characters, and AE titles that JSON has to escape."""
    longest = "1." + "2" * 62
    changes = dict.fromkeys(("study_uid", "series_uid", "sop_class_uid", "sop_instance_uid"), longest)
    names = {"calling_ae": "\x01" * 16, "called_ae": "\x7f" * 16, "peer_address": "f" * 60, "modality": "M" * 16}

    receipt = spool.store(arrival(**changes, **names), b"x" * 100, NOW)

    assert spool.read(spool.incoming()[0]) == receipt
