"""Receiving, durably, against storescp, Orthanc and pynetdicom, which are interleaved in one run.

`./run bench receive [ROUNDS]` prints Markdown tables. Every receiver gets each object once. Ours acknowledges what is
durable; Orthanc syncs each file, storescp and pynetdicom's application sync nothing. For the replay dcmtk's receivers
run without Nagle's algorithm (TCP_NODELAY=1), their best; for storescu everything runs as Debian ships it.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Barrier, Event, Thread

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.filewriter import dcmwrite
from pydicom.uid import (
    UID,
    CTImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    MRImageStorage,
)
from pynetdicom import StoragePresentationContexts, build_context
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RQ
from pynetdicom.pdu_primitives import A_ASSOCIATE, ImplementationClassUIDNotification, MaximumLengthNotification

from service.receiver import Receiver
from service.shared.log import set_up_logging
from service.shared.settings import LogSettings, ScpSettings
from service.spool import Spool
from tests.receiving import encode, p_data, store_command

OURS, STORESCP, ORTHANC, PYNETDICOM = "ours", "storescp", "Orthanc", "pynetdicom"
ASSOCIATIONS = (1, 4, 8)
OBJECTS = {  # name -> class, rows and columns, how many for the replay in all, how many for each storescu
    "CT": (CTImageStorage, 512, 48, 8),
    "MR": (MRImageStorage, 256, 96, 8),
    "small": (MRImageStorage, 70, 160, 8),
}
MAX_PDU_BYTES = 131072
ROOT_UID = "1.2.826.0.1.3680043.10.1.5"


Sender = Callable[[int, "list[list[Sample]]", Path], float]


@dataclass(frozen=True)
class Sample:
    sop_class_uid: str
    sop_instance_uid: str
    data_set: Dataset


def samples(kind: str, number: int, study: str) -> list[Sample]:
    """Instances of one study that no other study has."""
    sop_class_uid, side, *_ = OBJECTS[kind]
    made = []
    for place in range(number):
        dataset = Dataset()
        dataset.SOPClassUID, dataset.SOPInstanceUID = sop_class_uid, f"{study}.1.{place}"
        dataset.StudyDate, dataset.StudyTime, dataset.AccessionNumber = "20260101", "120000", ""
        dataset.Modality = "CT" if kind == "CT" else "MR"
        dataset.PatientName, dataset.PatientID = "Bench^Receive", "BENCH"
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study, f"{study}.1"
        dataset.StudyID = dataset.PatientBirthDate = dataset.PatientSex = ""
        dataset.InstanceNumber = place
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.Rows = dataset.Columns = side
        dataset.BitsAllocated = dataset.BitsStored = 16
        dataset.HighBit, dataset.PixelRepresentation = 15, 0
        dataset.PixelData = os.urandom(1024) * (side * side * 2 // 1024) + bytes(side * side * 2 % 1024)
        dataset["PixelData"].VR = "OW"
        made.append(Sample(sop_class_uid, dataset.SOPInstanceUID, dataset))
    return made


# --- receivers ---


def command(name: str, folder: Path, port: int) -> list[str]:
    if name == OURS:
        return [sys.executable, "-m", "tests.bench.receive", "serve", str(folder), str(port)]
    if name == STORESCP:
        return ["storescp", "--fork", "+B", "-pdu", str(MAX_PDU_BYTES), "-od", str(folder), str(port)]
    if name == PYNETDICOM:
        return [sys.executable, "-m", "pynetdicom", "storescp", str(port), "-q", "-od", str(folder)]
    settings = {"StorageDirectory": str(folder), "DicomPort": port, "HttpPort": free_port(), "Name": "bench"}
    (folder / "orthanc.json").write_text(json.dumps(settings), encoding="utf-8")
    return ["/usr/sbin/Orthanc", str(folder / "orthanc.json")]


def serve(folder: str, port: str) -> None:
    set_up_logging(LogSettings(level="WARNING"), role="bench")
    scp = ScpSettings(port=int(port), ae_title="ANY-SCP", accept_unknown_sources=True, max_pdu_bytes=MAX_PDU_BYTES)
    Receiver(scp, (), Spool(Path(folder) / "spool", 0)).start()
    Event().wait()


@contextmanager
def receivers(folder: Path, environment: dict[str, str]) -> Iterator[dict[str, int]]:
    """All of them, by name and port."""
    folder.mkdir()
    with ExitStack() as stack:
        ports = {}
        for name in (OURS, STORESCP, ORTHANC, PYNETDICOM):
            own = folder / name
            own.mkdir()
            port = ports[name] = free_port()
            process = subprocess.Popen(
                command(name, own, port),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=os.environ | environment,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            wait_for(port)
        yield ports


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def wait_for(port: int) -> None:
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            time.sleep(0.1)
        else:
            return
    raise TimeoutError("a receiver did not start")


# --- senders: seconds that it took to have everything acknowledged ---


def storescu(port: int, groups: list[list[Sample]], folder: Path) -> float:
    """One unmodified storescu per group, Nagle's algorithm on; the time includes its start."""
    commands = []
    for number, group in enumerate(groups):
        own = folder / str(number)
        if not own.exists():
            own.mkdir(parents=True)
            for sample in group:
                dcmwrite(own / f"{sample.sop_instance_uid}.dcm", with_meta(sample), enforce_file_format=True)
        commands.append(["storescu", "-R", "-aec", "ANY-SCP", "+sd", "127.0.0.1", str(port), str(own)])
    begun = time.perf_counter()
    running = [subprocess.Popen(each, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for each in commands]
    if any(process.wait() for process in running):
        raise RuntimeError("storescu failed")
    return time.perf_counter() - begun


def with_meta(sample: Sample) -> Dataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UID(sample.sop_class_uid)
    meta.MediaStorageSOPInstanceUID = UID(sample.sop_instance_uid)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    sample.data_set.file_meta = meta
    return sample.data_set


def replay(port: int, groups: list[list[Sample]], _folder: Path) -> float:
    """One association per group with everything encoded before the clock starts."""
    begin = Barrier(len(groups) + 1)
    failures: list[BaseException] = []

    def send(group: list[Sample]) -> None:
        try:
            with associated(port) as (connection, max_pdu_bytes):
                messages = [message(sample, max_pdu_bytes) for sample in group]
                begin.wait()
                for each in messages:
                    connection.sendall(each)
                    if not is_success(read_pdu(connection)):
                        raise RuntimeError("an instance was refused")
        except BaseException as error:
            failures.append(error)
            begin.abort()
            raise

    threads = [Thread(target=send, args=(group,)) for group in groups]
    for thread in threads:
        thread.start()
    begin.wait()
    begun = time.perf_counter()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return time.perf_counter() - begun


@contextmanager
def associated(port: int) -> Iterator[tuple[socket.socket, int]]:
    """The connection, and the longest PDU that the peer takes (128 KiB where it has no limit)."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(request([CTImageStorage, MRImageStorage]))
        accepted = A_ASSOCIATE_AC()
        accepted.decode(read_pdu(connection))
        limit = accepted.to_primitive().maximum_length_received or MAX_PDU_BYTES
        yield connection, min(limit, MAX_PDU_BYTES)
        connection.sendall(struct.pack(">BxLxxxx", 5, 4))
        read_pdu(connection)


def request(sop_class_uids: list[str]) -> bytes:
    primitive = A_ASSOCIATE()
    primitive.application_context_name = "1.2.840.10008.3.1.1.1"
    primitive.calling_ae_title, primitive.called_ae_title = "BENCH", "ANY-SCP"
    contexts = [
        build_context(uid, [ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless])
        if len(sop_class_uids) > 2
        else build_context(uid, [ExplicitVRLittleEndian])
        for uid in sop_class_uids
    ]
    for number, context in enumerate(contexts):
        context.context_id = 2 * number + 1
    primitive.presentation_context_definition_list = contexts
    length = MaximumLengthNotification()
    length.maximum_length_received = 16384
    implementation = ImplementationClassUIDNotification()
    implementation.implementation_class_uid = UID("1.2.826.0.1.3680043.10.9")
    primitive.user_information = [length, implementation]
    return bytes(A_ASSOCIATE_RQ(primitive).encode())


def message(sample: Sample, max_pdu_bytes: int) -> bytes:
    context_id = 1 if sample.sop_class_uid == CTImageStorage else 3
    content = encode(sample.data_set)
    size = max_pdu_bytes - 6
    instance = store_command(sop_class_uid=sample.sop_class_uid, sop_instance_uid=sample.sop_instance_uid)
    return p_data(instance, command=True, last=True, context_id=context_id) + b"".join(
        p_data(content[start : start + size], command=False, last=start + size >= len(content), context_id=context_id)
        for start in range(0, len(content), size)
    )


def is_success(answer: bytes) -> bool:
    """Whether the P-DATA-TF holds (0000,0900) Status 0x0000."""
    return struct.pack("<HHLH", 0, 0x0900, 2, 0) in answer


def read_pdu(connection: socket.socket) -> bytes:
    header = read(connection, 6)
    return header + read(connection, struct.unpack(">2xL", header)[0])


def read(connection: socket.socket, size: int) -> bytes:
    content = b""
    while len(content) < size:
        part = connection.recv(size - len(content))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        if not part:
            raise ConnectionError("the receiver closed the connection")
        content += part
    return content


# --- the tables ---


def measure_rates(ports: dict[str, int], sender: str, send: Sender, rounds: int, folder: Path) -> None:
    """Instances per second, median and range of the rounds."""
    for kind, (_, _, replayed, sent_by_each) in OBJECTS.items():
        for associations in ASSOCIATIONS:
            rates: dict[str, list[float]] = {name: [] for name in ports}
            for turn in range(rounds):
                each = replayed // associations if send is replay else sent_by_each
                groups = [samples(kind, each, f"{ROOT_UID}.{time.time_ns()}") for _ in range(associations)]
                own = folder / f"files-{time.time_ns()}"
                names = list(ports)
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    rates[name].append(each * associations / send(ports[name], groups, own))
            say(f"| {sender} | {kind} | {associations} | {row(rates)} |")


def row(rates: dict[str, list[float]]) -> str:
    medians = {name: statistics.median(found) for name, found in rates.items()}
    cells = [f"{medians[name]:.0f} ({min(found):.0f}-{max(found):.0f})" for name, found in rates.items()]
    ratios = [f"{medians[OURS] / medians[name]:.2f}" for name in (STORESCP, ORTHANC)]
    return " | ".join((*cells, *ratios))


def measure_set_up(ports: dict[str, int], turns: int = 20) -> None:
    """Milliseconds from the connection to the A-ASSOCIATE-AC."""
    classes = [str(context.abstract_syntax) for context in StoragePresentationContexts]
    say("\n| association set-up, ms | " + " | ".join(ports) + " |\n|---|" + "---:|" * len(ports))
    for number in (2, 64):
        pdu = request(classes[:number])
        taken: dict[str, list[float]] = {name: [] for name in ports}
        for _ in range(turns):
            for name, port in ports.items():
                begun = time.perf_counter()
                with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
                    connection.sendall(pdu)
                    read_pdu(connection)
                    taken[name].append((time.perf_counter() - begun) * 1000)
                    connection.sendall(struct.pack(">BxLxxxx", 5, 4))
                    read_pdu(connection)
        cells = [f"{statistics.median(found):.1f}" for found in taken.values()]
        say(f"| {number} presentation contexts | " + " | ".join(cells) + " |")


def measure_flush(folder: Path, turns: int = 60) -> None:
    """What one fsync of a small new file costs here: every acknowledged instance waits for some of them."""
    taken = []
    for number in range(turns):
        with (folder / f"flush-{number}").open("wb") as stream:
            stream.write(bytes(10_000))
            begun = time.perf_counter()
            os.fsync(stream.fileno())
            taken.append((time.perf_counter() - begun) * 1000)
    say(f"fsync of a new file of 10 kB: {statistics.median(taken):.2f} ms ({min(taken):.2f}-{max(taken):.2f})\n")


def say(line: str) -> None:
    print(line, flush=True)  # noqa: T201  its purpose


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["serve"]:
        serve(*arguments[1:])
        return 0
    rounds = int(arguments[0]) if arguments else 3
    begun = time.perf_counter()
    with TemporaryDirectory(prefix="bench-receive-") as name:
        folder = Path(name)
        load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
        say(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {os.cpu_count()} CPUs, load {load}, {rounds} rounds\n")
        measure_flush(folder)
        names = (OURS, STORESCP, ORTHANC, PYNETDICOM)
        say("| sender | objects | associations | " + " | ".join(names) + " | to storescp | to Orthanc |")
        say("|---|---|---:|" + "---:|" * (len(names) + 2))
        with receivers(folder / "quick", {"TCP_NODELAY": "1"}) as ports:
            measure_rates(ports, "replay", replay, rounds, folder)
        with receivers(folder / "as-shipped", {}) as ports:
            measure_rates(ports, "storescu", storescu, rounds, folder)
            measure_set_up(ports)
    say(f"\n{time.perf_counter() - begun:.0f} s in all; load at the end {os.getloadavg()[0]:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
