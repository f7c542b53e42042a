"""Receiving, durably, against storescp, Orthanc and pynetdicom, which are interleaved in one run.

`./run bench receive [--rounds N] [--objects CT,MR,small] [--senders replay,storescu,tls] [--associations 1,4,8]` prints
Markdown tables, each row as soon as it is measured; a long run may be cut into several by these options. Every receiver
gets each object once. Ours acknowledges what is durable, while ingest takes it into a database; Orthanc syncs each
file, storescp and pynetdicom's application sync nothing. *sink* is no DICOM at all: a TCP server that writes each
object to a file, flushes file and folder, and answers one byte: what the disk allows. For the replay dcmtk's
receivers run without Nagle's algorithm (TCP_NODELAY=1), their best; for storescu everything runs as Debian ships it.

Two things make a run too slow, ours most. ext4 without a journal looks for a new inode past all that were freed in the
last minute (six, where they are not written back), one by one: run `sync`, and wait, after another run's files were
removed. And memory that a virtual machine never touched costs when it becomes page cache: touch it once before.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from multiprocessing.synchronize import Barrier
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Any

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

from service import assembly
from service.receive import run
from service.receiver import Receiver
from service.shared.db import open_engine, open_sessions
from service.shared.durable import sync_folder
from service.shared.log import set_up_logging
from service.shared.schema import upgrade
from service.shared.settings import LogSettings, ScpSettings, Settings
from service.spool import Spool, waiting
from tests.certificates import authority, issue
from tests.receiving import encode, p_data, store_command

OURS, STORESCP, ORTHANC, PYNETDICOM, SINK = "ours", "storescp", "Orthanc", "pynetdicom", "sink"
ASSOCIATIONS = (1, 4, 8)
OBJECTS = {  # name -> class, rows and columns, how many for the replay in all, how many for all storescu
    "CT": (CTImageStorage, 512, 128, 56),
    "MR": (MRImageStorage, 256, 256, 56),
    "small": (MRImageStorage, 70, 960, 56),
}
SENDERS = ("replay", "storescu", "tls")
MAX_PDU_BYTES = 131072
PATIENCE_S = 120.0  # for the slowest receiver to take everything
ROOT_UID = "1.2.826.0.1.3680043.10.1.5"


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


def command(name: str, folder: Path, port: int, pair: str | None) -> list[str]:
    """pair: for TLS, the path of key and certificate without its ending."""
    if name in (OURS, SINK):
        return [
            sys.executable,
            "-m",
            "tests.bench.receive",
            "serve" if name == OURS else "sink",
            str(folder),
            str(port),
        ]
    if name == STORESCP:
        tls = tls_options(pair) if pair else []
        return ["/usr/bin/storescp", *tls, "--fork", "+B", "-pdu", str(MAX_PDU_BYTES), "-od", str(folder), str(port)]
    if name == PYNETDICOM:
        return [sys.executable, "-m", "pynetdicom", "storescp", str(port), "-q", "-od", str(folder)]
    settings = {"StorageDirectory": str(folder), "DicomPort": port, "HttpPort": free_port(), "Name": "bench"}
    (folder / "orthanc.json").write_text(json.dumps(settings), encoding="utf-8")
    return ["/usr/sbin/Orthanc", str(folder / "orthanc.json")]


def serve(folder: str, port: str) -> None:
    """Our receiver, and ingest beside it in a process of its own, as `./run serve` has them."""
    set_up_logging(LogSettings(level="WARNING"), role="bench")
    spool = Spool(Path(folder) / "spool", 0)
    ports: dict[str, Any] = {"port": int(port)}
    if pair := os.environ.get("BENCH_TLS"):
        ports = {"port": 0, "tls_port": int(port), "tls_certificate": f"{pair}.pem", "tls_key": f"{pair}.key"}
    scp = ScpSettings(ae_title="ANY-SCP", accept_unknown_sources=True, max_pdu_bytes=MAX_PDU_BYTES, **ports)
    subprocess.Popen([sys.executable, "-m", "tests.bench.receive", "ingest", folder, str(os.getpid())])
    receiver = Receiver(scp, (), spool)
    receiver.listen()
    run(receiver, scp.processes, Event().wait)


def take_in(folder: str, parent: str) -> None:
    """Ingest, for as long as its receiver lives."""
    set_up_logging(LogSettings(level="WARNING"), role="bench")
    stop = Event()

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(0.2)
        stop.set()

    Thread(target=watch, daemon=True).start()
    engine = open_engine(f"sqlite:///{folder}/bench.sqlite")
    upgrade(engine)
    assembly.ingest_for_ever(Settings(), open_sessions(engine), Spool(Path(folder) / "spool", 0), stop)


def sink(folder: str, port: str) -> None:
    """Length (4 bytes) and object in, one byte out once file and folder were flushed; a thread per connection."""
    numbers = itertools.count()

    def take(connection: socket.socket) -> None:
        buffer = memoryview(bytearray(1 << 20))
        with connection, suppress(ConnectionError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while True:
                left = struct.unpack(">L", read(connection, 4))[0]
                descriptor = os.open(f"{folder}/{next(numbers)}", os.O_WRONLY | os.O_CREAT, 0o600)
                while left:
                    count = connection.recv_into(buffer[: min(left, len(buffer))])
                    if not count:
                        return
                    os.write(descriptor, buffer[:count])
                    left -= count
                os.fsync(descriptor)
                os.close(descriptor)
                sync_folder(Path(folder))
                connection.sendall(b".")

    with socket.create_server(("127.0.0.1", int(port)), backlog=64) as server:
        while True:
            Thread(target=take, args=(server.accept()[0],), daemon=True).start()


@contextmanager
def receivers(folder: Path, environment: dict[str, str], names: Sequence[str]) -> Iterator[dict[str, int]]:
    """These of them, by name and port."""
    folder.mkdir()
    with ExitStack() as stack:
        ports = {}
        for name in names:
            own = folder / name
            own.mkdir()
            port = ports[name] = free_port()
            process = subprocess.Popen(
                command(name, own, port, environment.get("BENCH_TLS")),
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


def tls_options(pair: str) -> list[str]:
    """dcmtk's."""
    return ["+tls", f"{pair}.key", f"{pair}.pem", "-ic"]


# --- senders: seconds that it took to have everything acknowledged ---


def storescu(port: int, groups: list[list[Sample]], folder: Path, options: Sequence[str] = ()) -> float:
    """One unmodified storescu per group, Nagle's algorithm on; the time includes its start."""
    commands = []
    for number, group in enumerate(groups):
        own = folder / str(number)
        if not own.exists():
            own.mkdir(parents=True)
            for sample in group:
                dcmwrite(own / f"{sample.sop_instance_uid}.dcm", with_meta(sample), enforce_file_format=True)
        commands.append(
            ["/usr/bin/storescu", "-R", *options, "-aec", "ANY-SCP", "+sd", "127.0.0.1", str(port), str(own)]
        )
    begun = time.perf_counter()
    running = [subprocess.Popen(each, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for each in commands]
    said = [process.communicate()[0] for process in running]  # errors alone, so no pipe fills while another is read
    taken_s = time.perf_counter() - begun
    for process, words in zip(running, said, strict=True):
        if process.returncode:
            raise RuntimeError(f"storescu to port {port} ended with {process.returncode}: {words[-1000:]}")
    return taken_s


def with_meta(sample: Sample) -> Dataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UID(sample.sop_class_uid)
    meta.MediaStorageSOPInstanceUID = UID(sample.sop_instance_uid)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    sample.data_set.file_meta = meta
    return sample.data_set


def replay(port: int, groups: list[list[Sample]], _folder: Path) -> float:
    """One association per group with everything encoded before the clock starts."""

    def send(group: list[Sample], turn: Barrier) -> None:
        with associated(port) as (connection, max_pdu_bytes):
            messages = [message(sample, max_pdu_bytes) for sample in group]
            turn.wait(PATIENCE_S)
            for each in messages:
                connection.sendall(each)
                if not is_success(read_pdu(connection)):
                    raise RuntimeError("an instance was refused")
            turn.wait(PATIENCE_S)

    return at_once(groups, send)


def pour(port: int, groups: list[list[Sample]], _folder: Path) -> float:
    """The same objects into the sink, a connection per group."""

    def send(group: list[Sample], turn: Barrier) -> None:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            messages = [struct.pack(">L", len(content)) + content for content in (encode(s.data_set) for s in group)]
            turn.wait(PATIENCE_S)
            for each in messages:
                connection.sendall(each)
                read(connection, 1)
            turn.wait(PATIENCE_S)

    return at_once(groups, send)


def at_once(groups: list[list[Sample]], send: Callable[[list[Sample], Barrier], None]) -> float:
    """Seconds from the moment when all are ready to the last answer.

    Each sends from a process of its own: in one, Python would let them take turns, and be what is measured.
    """
    context = multiprocessing.get_context("fork")
    turn = context.Barrier(len(groups) + 1)

    def run(group: list[Sample]) -> None:
        try:
            send(group, turn)
        except BaseException:
            turn.abort()
            raise

    senders = [context.Process(target=run, args=(group,)) for group in groups]
    for sender in senders:
        sender.start()
    turn.wait(PATIENCE_S)
    begun = time.perf_counter()
    turn.wait(PATIENCE_S)
    taken_s = time.perf_counter() - begun
    for sender in senders:
        sender.join()
    return taken_s


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
    """The next PDU, of a peer that sends no second one before it is answered."""
    content = read(connection, 6, at_most=1 << 16)
    return content + read(connection, 6 + struct.unpack_from(">2xL", content)[0] - len(content))


def read(connection: socket.socket, size: int, at_most: int | None = None) -> bytes:
    """So many bytes, or what came with them."""
    content = b""
    while len(content) < size:
        part = connection.recv((at_most or size) - len(content))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        if not part:
            raise ConnectionError("the receiver closed the connection")
        content += part
    return content


# --- the tables ---


def measure_rates(
    ports: dict[str, int],
    sender: str,
    wanted: argparse.Namespace,
    folder: Path,
    spool: Path,
    options: Sequence[str] = (),
) -> None:
    """Instances per second, median and range of the rounds. spool: ours."""
    for kind in wanted.objects:
        _, _, replayed, by_storescu = OBJECTS[kind]
        for associations in wanted.associations:
            rates: dict[str, list[float]] = {name: [] for name in ports}
            for turn in range(wanted.rounds):
                each = (replayed if sender == "replay" else by_storescu) // associations
                groups = [samples(kind, each, f"{ROOT_UID}.{time.time_ns()}") for _ in range(associations)]
                own = folder / f"files-{time.time_ns()}"
                names = list(ports)
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    os.sync()  # what others have not flushed would be written in the next one's time
                    send = (
                        pour if name == SINK else replay if sender == "replay" else partial(storescu, options=options)
                    )
                    rates[name].append(each * associations / send(ports[name], groups, own))
                    while waiting(spool):  # what ingest does now would be the next receiver's loss
                        time.sleep(0.1)
            say(f"| {sender} | {kind} | {associations} | {row(rates)} |")


def row(rates: dict[str, list[float]]) -> str:
    medians = {name: statistics.median(found) for name, found in rates.items()}
    cells = [f"{medians[name]:.0f} ({min(found):.0f}-{max(found):.0f})" for name, found in rates.items()]
    ratios = [f"{medians[OURS] / medians[name]:.2f}" for name in rates if name != OURS]
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
    if arguments[:1] in (["serve"], ["sink"], ["ingest"]):
        {"serve": serve, "sink": sink, "ingest": take_in}[arguments[0]](*arguments[1:])
        return 0
    parser = argparse.ArgumentParser(prog="./run bench receive")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--objects", type=listed(OBJECTS), default=list(OBJECTS))
    parser.add_argument("--senders", type=listed(SENDERS), default=list(SENDERS))
    parser.add_argument(
        "--associations", type=lambda text: [int(each) for each in text.split(",")], default=ASSOCIATIONS
    )
    wanted = parser.parse_args(arguments)
    begun = time.perf_counter()
    with TemporaryDirectory(prefix="bench-receive-") as name:
        folder = Path(name)
        load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
        say(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {os.cpu_count()} CPUs, load {load}, {wanted.rounds} rounds\n")
        measure_flush(folder)
        if "replay" in wanted.senders:
            names = (OURS, SINK, STORESCP, ORTHANC, PYNETDICOM)
            with receivers(folder / "quick", {"TCP_NODELAY": "1"}, names) as ports:
                head(names)
                measure_rates(ports, "replay", wanted, folder, folder / "quick" / OURS / "spool")
        if "storescu" in wanted.senders:
            names = (OURS, STORESCP, ORTHANC, PYNETDICOM)
            with receivers(folder / "as-shipped", {}, names) as ports:
                head(names)
                measure_rates(ports, "storescu", wanted, folder, folder / "as-shipped" / OURS / "spool")
                measure_set_up(ports)
        if "tls" in wanted.senders:
            pair = str(issue(authority(folder), folder, "server").key.with_suffix(""))
            names = (OURS, STORESCP)
            with receivers(folder / "tls", {"BENCH_TLS": pair}, names) as ports:
                head(names)
                spool = folder / "tls" / OURS / "spool"
                measure_rates(ports, "storescu +tls", wanted, folder, spool, tls_options(pair))
    say(f"\n{time.perf_counter() - begun:.0f} s in all; load at the end {os.getloadavg()[0]:.1f}")
    return 0


def head(names: Sequence[str]) -> None:
    compared = [f"to {name}" for name in names if name != OURS]
    say("\n| sender | objects | associations | " + " | ".join((*names, *compared)) + " |")
    say("|---|---|---:|" + "---:|" * (len(names) + len(compared)))


def listed(known: Collection[str]) -> Callable[[str], list[str]]:
    """An argument of names with commas between them, whatever their case."""
    names = {each.lower(): each for each in known}

    def parse(text: str) -> list[str]:
        try:
            return [names[each.lower()] for each in text.split(",")]
        except KeyError:
            raise argparse.ArgumentTypeError(f"known are {', '.join(known)}") from None

    return parse


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
