"""What a power cut may leave of the spool is recovered from, and the model of such states can tell right from wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.prove.disk import CALLS, Disk, Effect, Keep, Name, read_trace
from tests.prove.power_cuts import prove
from tests.servers import find_program

PROGRAM = """
import os, sys
from pathlib import Path
root = Path(sys.argv[1])
(root / "in").mkdir()
(root / "out").mkdir()
descriptor = os.open(root / "in" / "a", os.O_WRONLY | os.O_CREAT)
os.write(descriptor, b"first ")
os.write(descriptor, b"second")
os.pwrite(descriptor, b"F", 0)
if "flush" in sys.argv:
    os.fsync(descriptor)
os.close(descriptor)
(root / "in" / "a").rename(root / "out" / "b")
if "flush" in sys.argv:
    for folder in (root, root / "in", root / "out"):
        opened = os.open(folder, os.O_RDONLY)
        os.fsync(opened)
        os.close(opened)
"""


def traced(folder: Path, *words: str) -> Disk:
    """What the program above did, as strace saw it."""
    root, trace = folder / "root", folder / "trace"
    root.mkdir()
    subprocess.run(
        [
            *(find_program("strace"), "-f", "-y", "-xx", "-qq", "-s", "100000", "-e", f"trace={CALLS}"),
            *("-o", str(trace), sys.executable, "-c", PROGRAM, str(root), *words),
        ],
        check=True,
    )
    disk = Disk(root)
    with trace.open() as lines:
        for number, call in enumerate(read_trace(iter(lines))):
            disk.apply(number, call)
    return disk


def everything(_: Effect) -> bool:
    return True


def found(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_without_a_flush_nothing_need_be_left(tmp_path: Path) -> None:
    """Every effect may be lost; all of them kept give what the program saw."""
    disk = traced(tmp_path)

    disk.leave(tmp_path / "nothing", lambda _: False)
    disk.leave(tmp_path / "everything", everything)

    assert found(tmp_path / "nothing") == {}
    assert found(tmp_path / "everything") == {"out/b": b"First second"}


def test_after_the_flushes_nothing_can_be_lost(tmp_path: Path) -> None:
    """fsync of the file and of every folder: the worst power cut leaves all of it."""
    disk = traced(tmp_path, "flush")

    disk.leave(tmp_path / "left", lambda _: False)

    assert disk.pending() == []
    assert found(tmp_path / "left") == {"out/b": b"First second"}


def test_contents_and_names_are_lost_apart(tmp_path: Path) -> None:
    """A name may survive without its bytes, with zeros in their place, or with half of them."""
    disk = traced(tmp_path)

    disk.leave(tmp_path / "names", lambda one: isinstance(one, Name))
    disk.leave(tmp_path / "zeros", everything, Keep.ZEROS)
    disk.leave(tmp_path / "half", everything, Keep.HALF)

    assert found(tmp_path / "names") == {"out/b": b""}
    assert found(tmp_path / "zeros") == {"out/b": bytes(12)}
    assert found(tmp_path / "half") == {"out/b": b"fir\0\0\0sec"}


def test_a_rename_may_leave_both_names_and_never_none(tmp_path: Path) -> None:
    """The end of the old name never survives alone."""
    disk = traced(tmp_path)
    (ends,) = [one for one in disk.pending() if isinstance(one, Name) and one.target is None]
    begins = ends.only_after

    disk.leave(tmp_path / "both", lambda one: one is not ends)
    disk.leave(tmp_path / "old", lambda one: one is not begins)

    assert set(found(tmp_path / "both")) == {"in/a", "out/b"}
    assert set(found(tmp_path / "old")) == {"in/a"}


@pytest.mark.kills
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_acknowledged_instances_survive_every_power_cut(tmp_path: Path) -> None:
    """Recovery and ingest bring back what was acknowledged, byte for byte, and believe nothing half-written; at full
    size: `./run prove power_cuts`."""
    outcome = prove(tmp_path, instances=8, states=300, seed=1)

    assert outcome.broken == []
    assert outcome.acknowledged == 8
    assert outcome.states >= 250
