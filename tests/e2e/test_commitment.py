"""Storage commitment both ways through the whole service, over TLS alone: a modality asks us, we ask the PACS."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, build_context, evt
from pynetdicom.sop_class import Comprehensive3DSRStorage, StorageCommitmentPushModel, Verification

from service.answers import keep_answers
from service.certificates import client_context, server_context
from service.commitment_answers import PUSH_MODEL_INSTANCE
from service.retention import remove_instances
from service.spool import Spool
from tests.certificates import Pair, authority, issue
from tests.phantom_series import PhantomSeries
from tests.receiving import accepting, after_answer
from tests.running import PATIENCE_S, SENDER, Pacs, Service, deliveries, kinds
from tests.servers import free_port, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SYNTAXES = [ExplicitVRLittleEndian, ImplicitVRLittleEndian]


@dataclass
class Peer:
    """pynetdicom as the PACS, which stores and vouches, and as the modality, which asks and is told."""

    pacs_port: int
    modality_port: int
    certificates: Pair
    ca: Pair
    reports: list[tuple[int, Dataset]] = field(default_factory=list)  # that the modality got

    @contextmanager
    def pacs(self) -> Iterator[None]:
        entity = AE("PACS")
        entity.add_supported_context(Comprehensive3DSRStorage, SYNTAXES)
        entity.add_supported_context(StorageCommitmentPushModel, SYNTAXES)
        entity.add_supported_context(Verification)
        handlers: list[Any] = [(evt.EVT_C_STORE, lambda event: 0x0000), (evt.EVT_N_ACTION, self._vouch)]
        with accepting(entity, ("127.0.0.1", self.pacs_port), handlers):
            yield

    @contextmanager
    def modality(self) -> Iterator[None]:
        entity = AE(SENDER)
        entity.add_supported_context(StorageCommitmentPushModel, SYNTAXES, scu_role=False, scp_role=True)
        tls = server_context(self.certificates.certificate, self.certificates.key, ca=self.ca.certificate)
        with accepting(entity, ("127.0.0.1", self.modality_port), [(evt.EVT_N_EVENT_REPORT, self._told)], tls):
            yield

    def send_and_ask(self, port: int, datasets: list[Dataset], transaction_uid: str) -> None:
        """C-STORE each, then one N-ACTION for all on the same association; each must be answered with Success."""
        entity = AE(SENDER)
        context = client_context(
            ca=self.ca.certificate, certificate=self.certificates.certificate, key=self.certificates.key
        )
        contexts = [
            build_context(datasets[0].SOPClassUID, ExplicitVRLittleEndian),
            build_context(StorageCommitmentPushModel, SYNTAXES),
        ]
        association = entity.associate(
            "127.0.0.1", port, contexts=contexts, ae_title="MEDPRUNER", tls_args=(context, "127.0.0.1")
        )
        assert association.is_established
        keep_answers(association)
        request = Dataset()
        request.TransactionUID = transaction_uid
        request.ReferencedSOPSequence = []
        for dataset in datasets:
            assert association.send_c_store(dataset).Status == 0x0000
            item = Dataset()
            item.ReferencedSOPClassUID = dataset.SOPClassUID
            item.ReferencedSOPInstanceUID = dataset.SOPInstanceUID
            request.ReferencedSOPSequence.append(item)
        status, _ = association.send_n_action(request, 1, StorageCommitmentPushModel, PUSH_MODEL_INSTANCE)
        assert status.Status == 0x0000
        association.release()

    def _told(self, event: evt.Event) -> tuple[int, None]:
        self.reports.append((event.event_type, event.event_information))
        return 0x0000, None

    def _vouch(self, event: evt.Event) -> tuple[int, None]:
        request = event.action_information
        answer = Dataset()
        answer.TransactionUID = request.TransactionUID
        answer.ReferencedSOPSequence = request.ReferencedSOPSequence
        association = keep_answers(event.assoc)

        def report() -> None:
            association.send_n_event_report(answer, 1, StorageCommitmentPushModel, PUSH_MODEL_INSTANCE)

        after_answer(association, report)
        return 0x0000, None


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Peer:
    folder = tmp_path_factory.mktemp("certificates")
    ca = authority(folder)
    return Peer(free_port(), free_port(), issue(ca, folder, "modality"), ca)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, random_model: Path, peer: Peer) -> Iterator[Service]:
    """It listens with TLS alone, and wants certificates."""
    folder, port = tmp_path_factory.mktemp("service"), free_port()
    own = issue(peer.ca, folder, "server", days=365)
    running = Service(folder, random_model, pacs=[Pacs(peer.pacs_port)], port=port, web_port=free_port())
    content = running.config.read_text()
    for before, after in (
        (
            f"[scp]\nport = {port}\n",
            f"[scp]\nport = 0\ntls_port = {port}\nstorage_commitment = true\n"
            f'tls_certificate = "{own.certificate}"\ntls_key = "{own.key}"\ntls_ca = "{peer.ca.certificate}"\n',
        ),
        (f'"{SENDER}"\n', f'"{SENDER}"\ncommitment_port = {peer.modality_port}\ncommitment_tls = true\n'),
        ('name = "pacs"\n', 'name = "pacs"\nstorage_commitment = true\n'),
    ):
        assert before in content
        content = content.replace(before, after, 1)
    running.config.write_text(content)
    with peer.pacs(), running:
        yield running


def phantom(folder: Path, study: int) -> tuple[str, list[Dataset]]:
    series = PhantomSeries(study=study)
    return series.study_uid, [dcmread(path) for path in series.write(folder)]


def test_modality_and_pacs_both_have_their_promise(service: Service, peer: Peer, tmp_path: Path) -> None:
    """The modality is told that every instance is kept, which then no age removes; the report ends as committed."""
    study_uid, datasets = phantom(tmp_path, 71)
    with peer.modality():
        peer.send_and_ask(service.port, datasets, "2.25.71")
        wait_for(lambda: peer.reports, "the modality is told", PATIENCE_S)
    story = service.wait_for(
        study_uid,
        lambda story: [one["state"] for one in deliveries(story)] == ["committed"],
        "the PACS vouches for the report",
    )
    spool = Spool(service.settings.data.path / "spool", 0)
    later = datetime.now(UTC) + timedelta(days=4000)
    removed = remove_instances(service.sessions, spool, service.settings.data.path, keep_days=0, now=later)

    ((event_type, content),) = peer.reports
    assert (event_type, content.TransactionUID) == (1, "2.25.71")
    assert {one.ReferencedSOPInstanceUID for one in content.ReferencedSOPSequence} == {
        one.SOPInstanceUID for one in datasets
    }
    assert kinds(story).count("instances-committed") == 1
    assert kinds(story).count("delivery-committed") == 1
    assert (removed, len(spool.instances(study_uid))) == (0, len(datasets))


def test_promise_survives_the_death_of_the_service(service: Service, peer: Peer, tmp_path: Path) -> None:
    """Killed as a whole after it took the request and before anybody was told; started again, it tells."""
    peer.reports.clear()
    study_uid, datasets = phantom(tmp_path, 72)
    for name in ("ingest", "deliver"):
        os.kill(service.process(name), signal.SIGSTOP)
    peer.send_and_ask(service.port, datasets, "2.25.72")

    service.kill()

    wait_for(lambda: service.processes() == [], "every process died with the supervisor")
    assert peer.reports == []
    with peer.modality():
        service.start()
        wait_for(lambda: peer.reports, "the modality is told", PATIENCE_S)
    ((event_type, content),) = peer.reports
    assert (event_type, len(content.ReferencedSOPSequence)) == (1, len(datasets))
    assert kinds(service.wait_for_end(study_uid)).count("instances-committed") == 1


def test_doctor_finds_a_running_service_well(service: Service) -> None:
    """Every part of it, over TLS alone; certificates with their days, and nobody among the refused, itself included."""
    service.wait_for_model()

    found = {one["subject"]: one for one in json.loads(service.cli("doctor", "--json"))}

    assert [one for one in found.values() if one["state"] == "fault"] == []
    well = ("receiver over TLS", "web", "destination pacs", "certificate scp.tls_certificate", "queue", "database")
    parts = (*well, "backlog", "audit chain", "model", "weights", "refused")
    assert {name: found[name]["state"] for name in parts} == dict.fromkeys(parts, "ok")
    assert "ok   ourselves-tls: " in service.cli("echo")
