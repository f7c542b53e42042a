"""Modalities that never stop sending, and the ledger of what was acknowledged to them.

Every study is a small phantom of its own. A modality sends again what was not acknowledged, as scanners do, until
all of the study is; now and then it repeats an instance or cuts its connection in the middle of a data set.
"""

from __future__ import annotations

import itertools
import random
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from threading import Event, Lock, Thread

from pydicom.dataset import Dataset

from tests.phantom_series import PhantomSeries
from tests.receiving import association_request, encode, p_data, store_command
from tests.servers import LOOPBACK

PDU_BYTES = 16_000  # of data set per P-DATA-TF
ANSWER_S = 20.0  # a modality's patience with one answer
AGAIN_S = 0.2  # before it tries again
SLICES = 8
REPEATED, CUT = 0.05, 0.02  # share of instances that are sent twice, or cut off in the middle first
RELEASE_REQUEST = struct.pack(">BxLxxxx", 5, 4)
A_ASSOCIATE_AC, P_DATA_TF = 2, 4

Key = tuple[str, str]  # Study Instance UID, SOP Instance UID


@dataclass(slots=True)
class Ledger:
    """What senders know: the instances that were answered with Success, and the SHA-256 of their data sets."""

    acknowledged: dict[Key, str] = field(default_factory=dict)
    refused: Counter[int] = field(default_factory=Counter)  # by DIMSE status
    successes: int = 0  # also of instances that were sent again
    begun: int = 0  # studies
    finished: int = 0  # studies of which every instance was acknowledged
    lost_connections: int = 0
    lock: Lock = field(default_factory=Lock)

    def copy(self) -> dict[Key, str]:
        with self.lock:
            return dict(self.acknowledged)


class Load:
    """A thread for every AE title, from `start` to `stop`; `stop` lets each finish the study that it has begun.

    pause_s: a modality's rest between two studies. may_begin: asked before each study, to bound the backlog.
    """

    def __init__(
        self,
        port: int,
        ae_titles: Sequence[str],
        seed: int,
        *,
        pause_s: float = 0.5,
        may_begin: Callable[[], bool] = lambda: True,
        slices: int = SLICES,
    ) -> None:
        self.ledger = Ledger()
        self._port = port
        self._pause_s = pause_s
        self.may_begin = may_begin
        self._slices = slices
        self._numbers = itertools.count(seed * 1_000_000)
        self._stop = Event()
        self._give_up = Event()
        self._faults: list[BaseException] = []
        self._threads = [
            Thread(target=self._send_for_ever, args=(ae_title, random.Random(f"{seed} {ae_title}")), daemon=True)
            for ae_title in ae_titles
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self, patience_s: float = 120) -> None:
        """Begin no further study; AssertionError when one cannot be finished in time."""
        self._stop.set()
        end = time.monotonic() + patience_s
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        late = sum(thread.is_alive() for thread in self._threads)
        self._give_up.set()
        for thread in self._threads:
            thread.join(ANSWER_S)
        if self._faults:
            raise self._faults[0]
        if late:
            raise AssertionError(f"{late} modalities could not send what they had begun within {patience_s:g} s")

    # --- one modality ---

    def _send_for_ever(self, ae_title: str, chance: random.Random) -> None:
        try:
            while not self._stop.is_set():
                if not self.may_begin():
                    self._stop.wait(AGAIN_S)
                    continue
                number = next(self._numbers)
                phantom = PhantomSeries(
                    study=number, patient_id=f"P-{number}", rows=32, columns=32, slices=self._slices
                )
                with self.ledger.lock:
                    self.ledger.begun += 1
                self._send_study(ae_title, phantom.datasets(), chance)
                self._stop.wait(self._pause_s * chance.uniform(0.5, 1.5))
        except BaseException as error:
            self._faults.append(error)
            raise

    def _send_study(self, ae_title: str, datasets: Sequence[Dataset], chance: random.Random) -> None:
        waiting = [(dataset, encode(dataset)) for dataset in datasets]
        while waiting and not self._give_up.is_set():
            try:
                with socket.create_connection((LOOPBACK, self._port), timeout=ANSWER_S) as connection:
                    self._send_over(connection, ae_title, waiting, chance)
            except (OSError, EOFError):
                with self.ledger.lock:
                    self.ledger.lost_connections += 1
            if waiting:
                self._give_up.wait(AGAIN_S)
        if not waiting:
            with self.ledger.lock:
                self.ledger.finished += 1

    def _send_over(
        self, connection: socket.socket, ae_title: str, waiting: list[tuple[Dataset, bytes]], chance: random.Random
    ) -> None:
        """Send over one association; what was acknowledged leaves `waiting`."""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(association_request(calling_ae=ae_title))
        if read_pdu(connection)[0] != A_ASSOCIATE_AC:
            raise EOFError
        for dataset, content in list(waiting):
            uid = str(dataset.SOPInstanceUID)
            whole = message(uid, content)
            if chance.random() < CUT:
                connection.sendall(whole[: len(whole) // 2])
                raise EOFError
            for _ in range(2 if chance.random() < REPEATED else 1):
                connection.sendall(whole)
                status = read_status(connection)
                if status != 0x0000:
                    with self.ledger.lock:
                        self.ledger.refused[status] += 1
                    raise EOFError
                with self.ledger.lock:
                    self.ledger.successes += 1
                    self.ledger.acknowledged[str(dataset.StudyInstanceUID), uid] = sha256(content).hexdigest()
            waiting.remove((dataset, content))
        connection.sendall(RELEASE_REQUEST)
        read_pdu(connection)


def message(sop_instance_uid: str, content: bytes) -> bytes:
    """A whole C-STORE of a CT, as P-DATA-TF PDUs."""
    pieces = [content[start : start + PDU_BYTES] for start in range(0, len(content), PDU_BYTES)]
    return p_data(store_command(sop_instance_uid=sop_instance_uid), command=True, last=True) + b"".join(
        p_data(piece, command=False, last=number == len(pieces)) for number, piece in enumerate(pieces, 1)
    )


def read_status(connection: socket.socket) -> int:
    """(0000,0900) of the next answer; EOFError when something else comes."""
    answer = read_pdu(connection)
    place = answer.find(struct.pack("<HHL", 0, 0x0900, 2))
    if answer[0] != P_DATA_TF or place < 0:
        raise EOFError
    return int.from_bytes(answer[place + 8 : place + 10], "little")


def read_pdu(connection: socket.socket) -> bytes:
    header = _read(connection, 6)
    return header + _read(connection, struct.unpack(">2xL", header)[0])


def _read(connection: socket.socket, size: int) -> bytes:
    content = b""
    while len(content) < size:
        part = connection.recv(size - len(content))
        if not part:
            raise EOFError
        content += part
    return content
