"""A fuzzer that knows the structure of PDUs, command sets and data sets, against a receiver amid 250 dead connections.

`./run prove hostile [--cases 1000000] [--seed N] [--folder DIR]`. Case N of a seed is always the same bytes; with a
folder a run that was ended goes on where it was. Exit status 1 when the receiver died, hung, grew above 300 MB, kept
a new association waiting for more than a second, ran into a fault of its own, or lost what it acknowledged.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from threading import Event, Thread
from typing import Self

from service import commitment_requests
from service.spool import Receipt, Spool
from tests.prove.load import A_ASSOCIATE_AC, P_DATA_TF, read_pdu
from tests.prove.mutation import Conversation, converse
from tests.receiving import association_request
from tests.running import DIES_WITH_US, PROJECT, data_set_of, listens
from tests.servers import LOOPBACK, free_port, wait_for

IDLE, STALLED = 200, 50
ELSEWHERE = ("127.0.0.2", "127.0.0.3")  # where the dead connections come from; each address has its own limit
PEERS = 4
BATCH = 500  # cases between two looks at the receiver
MAX_RSS_MB = 300.0
ANSWER_S = 60.0  # by then the receiver must have ended a conversation whose peer has nothing more to say
PROBE_EVERY_S = 0.5
STORE_ANSWER, ACTION_ANSWER = 0x8001, 0x8130

CONFIGURATION = """\
[data]
path = "{folder}/data"
[scp]
port = {port}
accept_unknown_sources = true
storage_commitment = true
[[source]]
ae_title = "FUZZ"
commitment_port = 104
[spool]
min_free_gb = 0.01
[log]
level = "ERROR"
"""


@dataclass(slots=True)
class State:
    """How far a run has come; kept in its folder."""

    seed: int
    done: int = 0
    acknowledged: int = 0
    requested: int = 0  # commitments of storage
    probes: int = 0
    late_probes: int = 0
    worst_probe_s: float = 0.0
    peak_rss_mb: float = 0.0
    statuses: dict[str, int] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)


class Receiving:
    """The receiver as `serve` starts it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.port = free_port()
        self.log = folder / "receiver.log"
        self.config = folder / "config.toml"
        self.config.write_text(CONFIGURATION.format(folder=folder, port=self.port))
        self.spool = Spool(folder / "data" / "spool", 0)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(*DIES_WITH_US, sys.executable, "-m", "service.receive", "--config", str(self.config)),
                ],
                cwd=PROJECT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_for(lambda: listens(self.port), f"the receiver listens; its log: {self.log}", 180)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def peak_rss_mb(self) -> float:
        """The most it ever held, from /proc/PID/status."""
        assert self._process is not None
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))

    def faults(self) -> list[str]:
        """What it has logged as a fault of its own."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [line for line in lines if "association_failed" in line or "Traceback" in line]


class Crowd:
    """IDLE connections that never ask for an association and STALLED ones inside a PDU; dropped ones come again."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._over = Event()
        self._thread = Thread(target=self._stand_around, daemon=True)
        self._connections: list[tuple[bool, socket.socket]] = []

    def __enter__(self) -> Self:
        self._fill()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        for _, connection in self._connections:
            connection.close()

    def _stand_around(self) -> None:
        while not self._over.wait(5):
            kept = []
            for stalled, connection in self._connections:
                if _is_open(connection):
                    kept.append((stalled, connection))
                else:
                    connection.close()
            self._connections = kept
            self._fill()

    def _fill(self) -> None:
        stalled = sum(1 for is_stalled, _ in self._connections if is_stalled)
        for number in range(STALLED - stalled):
            with contextlib.suppress(OSError, EOFError):
                connection = socket.create_connection((LOOPBACK, self._port), 20, (ELSEWHERE[number % 2], 0))
                self._connections.append((True, connection))
                connection.sendall(association_request())
                read_pdu(connection)
                connection.sendall(struct.pack(">BxL", P_DATA_TF, 10_000) + bytes(100))
        for _ in range(IDLE - (len(self._connections) - STALLED)):
            with contextlib.suppress(OSError):
                self._connections.append(
                    (False, socket.create_connection((LOOPBACK, self._port), 20, (ELSEWHERE[0], 0)))
                )


def _is_open(connection: socket.socket) -> bool:
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


class Probe:
    """Asks for an association twice a second and remembers how long that took at worst."""

    def __init__(self, port: int, state: State, within_s: float) -> None:
        self._port, self._state, self._within_s = port, state, within_s
        self._over = Event()
        self._thread = Thread(target=self._ask, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _ask(self) -> None:
        while not self._over.wait(PROBE_EVERY_S):
            begun = time.monotonic()
            try:
                is_accepted = asked_for_association(self._port)
            except (OSError, EOFError) as error:
                self._state.broken.append(f"no new association near case {self._state.done}: {type(error).__name__}")
                continue
            took_s = time.monotonic() - begun
            self._state.probes += 1
            self._state.late_probes += took_s > self._within_s
            self._state.worst_probe_s = max(self._state.worst_probe_s, took_s)
            if not is_accepted:
                self._state.broken.append(f"a new association was refused near case {self._state.done}")


def asked_for_association(port: int) -> bool:
    """Whether a new association is accepted; OSError or EOFError when there is no answer within 30 s."""
    with socket.create_connection((LOOPBACK, port), timeout=30) as connection:
        connection.sendall(association_request())
        is_accepted = read_pdu(connection)[0] == A_ASSOCIATE_AC
        connection.sendall(struct.pack(">BxLxxxx", 5, 4))
        return is_accepted


@dataclass(frozen=True, slots=True)
class Answers:
    """What came back in one conversation: (status, Affected SOP Instance UID) of each C-STORE, the status of each
    N-ACTION."""

    stored: tuple[tuple[int, str], ...]
    actions: tuple[int, ...]
    is_over: bool  # the receiver ended it, as it must when its peer has nothing more to say


def hold(port: int, conversation: Conversation) -> Answers:
    """Say all of it, then listen to the end."""
    with socket.create_connection((LOOPBACK, port), timeout=ANSWER_S) as connection:
        with contextlib.suppress(OSError):  # the receiver may have hung up already
            connection.sendall(conversation.content)
            connection.shutdown(socket.SHUT_WR)
        received, is_over = b"", True
        try:
            while part := connection.recv(1 << 16):
                received += part
        except TimeoutError:
            is_over = False
        except OSError:
            pass
    answers = list(answers_in(received))
    return Answers(
        tuple((status, uid) for field, status, uid in answers if field == STORE_ANSWER),
        tuple(status for field, status, _ in answers if field == ACTION_ANSWER),
        is_over,
    )


def answers_in(received: bytes) -> Iterator[tuple[int, int, str]]:
    """Command field, status and Affected SOP Instance UID of each."""
    command = b""
    for pdu_type, content in _pdus(received):
        place = 0
        while pdu_type == P_DATA_TF and len(content) - place >= 6:
            length, _, control = struct.unpack_from(">LBB", content, place)
            command += content[place + 6 : place + 4 + length]
            place += 4 + length
            if control & 2:
                elements = _elements(command)
                command = b""
                field, status = (int.from_bytes(elements.get(tag, b""), "little") for tag in (0x0100, 0x0900))
                yield field, status, elements.get(0x1000, b"").strip(b"\0 ").decode()


def _pdus(received: bytes) -> Iterator[tuple[int, bytes]]:
    place = 0
    while len(received) - place >= 6:
        pdu_type, length = struct.unpack_from(">BxL", received, place)
        yield pdu_type, received[place + 6 : place + 6 + length]
        place += 6 + length


def _elements(command: bytes) -> dict[int, bytes]:
    found, place = {}, 0
    while len(command) - place >= 8:
        _, element, length = struct.unpack_from("<HHL", command, place)
        found[element] = command[place + 8 : place + 8 + length]
        place += 8 + length
    return found


class Fuzzer:
    """Conversations with one receiver, and what is found out about it."""

    def __init__(self, receiving: Receiving, state: State) -> None:
        self._receiving = receiving
        self._state = state
        self._pool = ThreadPoolExecutor(PEERS)

    def close(self) -> None:
        self._pool.shutdown()

    def run(self, conversations: dict[int, Conversation]) -> None:
        """Hold them, several at a time, then look at the receiver and at what it kept."""
        port = self._receiving.port
        held = dict(
            zip(conversations, self._pool.map(lambda one: hold(port, one), conversations.values()), strict=True)
        )
        state = self._state
        for number, heard in held.items():
            if not heard.is_over:
                state.broken.append(f"case {number}: the receiver did not end the conversation")
            for status, _ in heard.stored:
                name = f"0x{status:04X}"
                state.statuses[name] = state.statuses.get(name, 0) + 1
                if 0xA700 <= status <= 0xA7FF:
                    state.broken.append(f"case {number}: status {name}, and the disk has room")
        state.done += len(conversations)
        state.peak_rss_mb = self._receiving.peak_rss_mb() if self._receiving.is_alive() else state.peak_rss_mb
        if not self._receiving.is_alive():
            state.broken.append(f"the receiver died before case {state.done}")
        if state.peak_rss_mb > MAX_RSS_MB:
            state.broken.append(f"the receiver held {state.peak_rss_mb:.0f} MB before case {state.done}")
        state.broken += [fault for fault in self._receiving.faults() if fault not in state.broken]
        self._check_kept(conversations, held)
        self._check_requests(conversations, held)

    def _check_kept(self, conversations: dict[int, Conversation], held: dict[int, Answers]) -> None:
        """Every acknowledged instance lies in the spool with the bytes that were sent; then make room."""
        spool = self._receiving.spool
        receipts = [(path, spool.read(path)) for path in spool.incoming()]
        spool.place(receipts)
        by_uid: dict[str, list[Receipt]] = {}
        for _, receipt in receipts:
            by_uid.setdefault(receipt.sop_instance_uid, []).append(receipt)
        digests = {
            receipt.path: sha256(data_set_of((spool.path / receipt.path).read_bytes())).hexdigest()
            for _, receipt in receipts
        }
        for number, answers in held.items():
            conversation = conversations[number]
            sent = {sha256(one).hexdigest() for one in conversation.data_sets}
            for uid in [uid for status, uid in answers.stored if status == 0x0000]:
                self._state.acknowledged += 1
                kept = [one for one in by_uid.get(uid, []) if digests[one.path] == one.sha256]
                if not kept or (conversation.is_intact and not any(one.sha256 in sent for one in kept)):
                    self._state.broken.append(f"case {number}: {uid} was acknowledged and is not kept as it was sent")
        for path, receipt in receipts:
            spool.settle(path, receipt)
        for study_uid in {receipt.study_uid for _, receipt in receipts}:
            spool.remove_study(study_uid)

    def _check_requests(self, conversations: dict[int, Conversation], held: dict[int, Answers]) -> None:
        """Every request for storage commitment that was taken is kept as it was sent; then make room."""
        kept: dict[str, tuple[str, ...]] = {}
        for path, request in commitment_requests.requests(self._receiving.spool.path):
            if request is None:
                self._state.broken.append(f"{path.name}: a request for storage commitment was kept and cannot be read")
            else:
                kept[request.transaction_uid] = tuple(one.sop_instance_uid for one in request.references)
            path.unlink()
        for number, answers in held.items():
            conversation = conversations[number]
            for status in answers.actions:
                name = f"commitment 0x{status:04X}"
                self._state.statuses[name] = self._state.statuses.get(name, 0) + 1
                if status == 0x0213:
                    self._state.broken.append(f"case {number}: status {name}, and the disk has room")
            taken = answers.actions.count(0x0000)
            self._state.requested += taken
            if conversation.is_intact and taken == conversation.actions:  # of the others nobody knows which
                for transaction_uid, uids in conversation.asked.items():
                    if kept.get(transaction_uid) != uids:
                        self._state.broken.append(
                            f"case {number}: request {transaction_uid} is not kept as it was sent"
                        )


def case(seed: int, number: int) -> Conversation:
    """The bytes of one case, always the same."""
    return converse(number, random.Random(f"{seed}/{number}"))


def fuzz(folder: Path, seed: int, cases: int, *, within_s: float, tell: Callable[[State, float], None]) -> State:
    """Run all cases that the folder's state has not seen yet, and return the state."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "state.json"
    state = State(**json.loads(kept.read_text())) if kept.exists() else State(seed)
    if state.seed != seed:
        raise SystemExit(f"{folder} holds a run of seed {state.seed}; choose another --folder")
    begun, first = time.monotonic(), state.done
    with (
        Receiving(folder) as receiving,
        Crowd(receiving.port),
        Probe(receiving.port, state, within_s),
        contextlib.closing(Fuzzer(receiving, state)) as fuzzer,
    ):
        while state.done < cases and receiving.is_alive():
            numbers = range(state.done, min(cases, state.done + BATCH))
            fuzzer.run({number: case(seed, number) for number in numbers})
            part = kept.with_suffix(".part")
            part.write_text(json.dumps(asdict(state)))
            part.rename(kept)
            tell(state, (state.done - first) / (time.monotonic() - begun))
    return state


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="./run prove hostile", description=__doc__)
    parser.add_argument("--cases", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="keep the state here, and go on from it")
    parser.add_argument("--within-s", type=float, default=1.0, help="the longest wait for an association")
    options = parser.parse_args(arguments)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="medpruner-hostile-"))
    print(f"seed {options.seed}, {options.cases} cases, in {folder}", flush=True)  # noqa: T201
    told = Counter[str]()

    def tell(state: State, per_second: float) -> None:
        for line in state.broken[told["broken"] :]:
            print(f"BROKEN: {line}", flush=True)  # noqa: T201
        told["broken"] = len(state.broken)
        if state.done % (BATCH * 10) == 0 or state.done >= options.cases:
            print(  # noqa: T201
                f"{state.done} of {options.cases} cases, {per_second:.0f}/s; {state.acknowledged} acknowledged, "
                f"{state.requested} commitments requested; peak "
                f"{state.peak_rss_mb:.0f} MB; association within {state.worst_probe_s:.2f} s at worst, "
                f"{state.late_probes} of {state.probes} late; load {os.getloadavg()[0]:.1f}; {state.statuses}",
                flush=True,
            )

    state = fuzz(folder, options.seed, options.cases, within_s=options.within_s, tell=tell)
    return 1 if state.broken or state.late_probes or state.done < options.cases else 0
