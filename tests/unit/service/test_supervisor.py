"""Every role as a process of its own: started, started again, ended; with real processes, and without waiting."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Thread

import pytest

from service import supervisor
from service.shared.settings import Settings
from service.supervisor import FIRST_WAIT_S, LONGEST_WAIT_S, SETTLED_S, Supervised, commands, supervise
from tests.receiving import wait_until

PROJECT = Path(__file__).parents[3]
SLEEP = ["/bin/sleep", "600"]


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def one() -> Iterator[Supervised]:
    """A process under supervision; ended after the test."""
    one = Supervised("sleeper", SLEEP)
    yield one
    supervisor._end([one])


def kept(one: Supervised, now: float) -> subprocess.Popen[bytes] | None:
    """One look at it."""
    supervisor._keep(one, now)
    return one.process


def ended(one: Supervised) -> None:
    """It dies, as a crash does."""
    assert one.process is not None
    one.process.kill()
    one.process.wait()


# --- what is run ----------------------------------------------------------------------------------------------------


def names(settings: Settings, **how: bool) -> list[str]:
    return [name for name, _ in commands(settings, None, **({"with_worker": True} | how))]


def test_every_role_the_worker_and_the_embedded_queue_are_run(tmp_path: Path) -> None:
    """A configured Redis is somebody else's to run; the web only where it is enabled; the worker where it is wanted."""
    embedded = Settings.model_validate({"data": {"path": tmp_path}})
    foreign = Settings.model_validate(
        {"data": {"path": tmp_path}, "queue": {"url": "redis://h"}, "web": {"enabled": False}}
    )

    roles = ["receive", "ingest", "dispatch", "deliver"]
    assert names(embedded) == [*roles, "web", "worker", "redis"]
    assert names(foreign, with_worker=False) == roles


def test_every_part_reads_the_same_configuration(tmp_path: Path) -> None:
    """The file that was given to `serve`."""
    settings = Settings.model_validate({"data": {"path": tmp_path}, "queue": {"url": "redis://queue/0"}})

    for name, command in commands(settings, Path("/etc/medpruner.toml"), with_worker=True):
        assert command[0] == sys.executable
        assert command[-2:] == ["--config", "/etc/medpruner.toml"]
        assert name in " ".join(command)


# --- one process ----------------------------------------------------------------------------------------------------


def test_process_is_started_once(one: Supervised) -> None:
    """A second look finds it running."""
    process = kept(one, 100.0)

    assert process is not None
    assert kept(one, 101.0) is process


def test_dead_process_is_started_again_after_a_wait_that_doubles(one: Supervised) -> None:
    """A role that dies at once must not take the machine with it; ten seconds are the longest."""
    now, waits = 100.0, []
    for _ in range(8):
        kept(one, now)
        ended(one)
        assert kept(one, now) is None
        waits.append(one.not_before - now)
        assert kept(one, one.not_before - 0.001) is None
        now = one.not_before

    assert waits == [FIRST_WAIT_S * 2**number for number in range(3)] + [LONGEST_WAIT_S] * 5


def test_process_that_lived_long_starts_again_soon(one: Supervised) -> None:
    """The wait is for those that do not come up."""
    kept(one, 100.0)
    one.wait_s = LONGEST_WAIT_S
    ended(one)

    kept(one, 100.0 + SETTLED_S + 1)

    assert one.not_before == 100.0 + SETTLED_S + 1 + FIRST_WAIT_S


def with_a_child(one: Supervised, tmp_path: Path, *, trap: str = "") -> int:
    """Start a shell that starts a process; the process id of the latter."""
    note = tmp_path / "child"
    one.command = ["/bin/sh", "-c", f"{trap} sleep 600 & echo $! > {note}.part; mv {note}.part {note}; wait; wait"]
    kept(one, 100.0)
    wait_until(note.exists)
    return int(note.read_text())


def test_what_a_dead_process_left_behind_is_ended(one: Supervised, tmp_path: Path) -> None:
    """A worker's child would hold the GPU's memory beside its successor."""
    child = with_a_child(one, tmp_path)
    ended(one)
    assert is_alive(child)

    kept(one, 101.0)

    wait_until(lambda: not is_alive(child))


def test_stopped_process_is_asked_first(one: Supervised, tmp_path: Path) -> None:
    """SIGTERM lets the receiver finish its associations and the worker its study."""
    asked = tmp_path / "asked"
    child = with_a_child(one, tmp_path, trap=f"trap 'touch {asked}; exit' TERM;")

    supervisor._end([one])

    assert asked.exists()
    wait_until(lambda: not is_alive(child))


def test_process_that_ignores_the_request_is_killed_with_its_children(
    one: Supervised, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the grace period."""
    monkeypatch.setattr(supervisor, "TERM_GRACE_S", 0.2)
    child = with_a_child(one, tmp_path, trap="trap '' TERM;")
    assert one.process is not None

    supervisor._end([one])

    assert one.process.returncode == -signal.SIGKILL
    wait_until(lambda: not is_alive(child))


def test_process_that_never_started_needs_no_end() -> None:
    """`serve` may be stopped while it comes up."""
    supervisor._end([Supervised("none", SLEEP)])


# --- all of them ----------------------------------------------------------------------------------------------------


def test_queue_is_stopped_after_those_that_use_it(tmp_path: Path) -> None:
    """What finishes its work meanwhile can still acknowledge its message."""
    note = tmp_path / "order"
    script = f"trap 'echo {{}} >> {note}; exit' TERM; echo up >> {note}; while :; do sleep 0.05; done"
    wanted = [(name, ["/bin/sh", "-c", script.format(name)]) for name in ("worker", "redis")]
    stop = Event()
    loop = Thread(target=supervise, args=(wanted, stop), daemon=True)
    loop.start()
    wait_until(lambda: note.exists() and note.read_text().count("up") == 2)

    stop.set()
    loop.join(20)

    assert note.read_text().split() == ["up", "up", "worker", "redis"]


def test_killed_process_comes_back_and_all_end_together(tmp_path: Path) -> None:
    """The loop with two real processes: one is killed, one goes on."""
    wanted = [
        (name, ["/bin/sh", "-c", f"echo $$ >> {tmp_path / name}; exec sleep 600"]) for name in ("first", "second")
    ]

    def started(name: str) -> list[int]:
        path = tmp_path / name
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    stop = Event()
    loop = Thread(target=supervise, args=(wanted, stop), daemon=True)
    loop.start()
    wait_until(lambda: len(started("first")) == len(started("second")) == 1)
    os.kill(started("first")[0], signal.SIGKILL)
    wait_until(lambda: len(started("first")) == 2)
    assert is_alive(started("second")[0])

    stop.set()
    loop.join(20)

    assert not loop.is_alive()
    assert not any(is_alive(pid) for name in ("first", "second") for pid in started(name))


def test_receiver_waits_for_no_database(tmp_path: Path) -> None:
    """Senders find it while the database is away; the others start when that is ready."""
    wanted = [
        (name, ["/bin/sh", "-c", f"echo up > {tmp_path / name}; exec sleep 600"]) for name in ("ingest", "receive")
    ]
    stop, ready = Event(), Event()
    loop = Thread(target=supervise, args=(wanted, stop, ready), daemon=True)
    loop.start()
    wait_until((tmp_path / "receive").exists)
    assert not (tmp_path / "ingest").exists()

    ready.set()
    wait_until((tmp_path / "ingest").exists)

    stop.set()
    loop.join(20)
    assert not loop.is_alive()


def test_command_that_cannot_be_run_ends_everything(tmp_path: Path) -> None:
    """An installation that is not whole is said at once, and nothing is left running."""
    note = tmp_path / "pid"
    wanted = [("good", ["/bin/sh", "-c", f"echo $$ > {note}; exec sleep 600"]), ("bad", ["/nonexistent"])]

    with pytest.raises(FileNotFoundError, match="/nonexistent"):
        supervise(wanted, Event())

    assert not note.exists() or not is_alive(int(note.read_text() or 0))


def test_killed_supervisor_takes_its_processes_with_it(tmp_path: Path) -> None:
    """The next one finds ports, sockets and locks free."""
    note = tmp_path / "pid"
    shell = f"echo $$ > {note}.part; mv {note}.part {note}; exec sleep 600"
    code = (
        "from threading import Event; from service.supervisor import supervise; "
        f"supervise([('one', ['/bin/sh', '-c', {shell!r}])], Event())"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=PROJECT, stderr=subprocess.DEVNULL)
    wait_until(note.exists)
    child = int(note.read_text())
    assert is_alive(child)

    process.kill()
    process.wait()

    wait_until(lambda: not is_alive(child))
