"""The way with dcmtk at both ends: echoscu and storescu send a JPEG 2000 study, storescp takes the report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydicom import dcmread

from service.report.gate import Severity, check_any
from tests.running import SENDER, Pacs, Service, Storescp, data_set_of
from tests.servers import echoscu, storescu

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, random_model: Path, storescp: Storescp) -> Iterator[Service]:
    with Service(tmp_path_factory.mktemp("service"), random_model, pacs=[Pacs(storescp.port)]) as running:
        yield running


def test_echoscu_is_answered_with_success(service: Service) -> None:
    """C-ECHO works without any study."""
    answer = echoscu(service.port, called="MEDPRUNER", calling=SENDER)

    assert answer.returncode == 0, answer.stderr
    assert "Received Echo Response (Success)" in answer.stdout + answer.stderr


def test_an_unknown_calling_ae_is_refused(service: Service) -> None:
    """Who is no [[source]] gets no association, and the log names the key that would let it in."""
    answer = echoscu(service.port, called="MEDPRUNER", calling="STRANGER")

    assert answer.returncode != 0
    assert '[[source]] ae_title = "STRANGER"' in service.log_text()


def test_doctor_finds_all_well_and_names_who_was_refused(service: Service) -> None:
    """Receiver, destination, queue, database, worker; and the line that would let the stranger in."""
    echoscu(service.port, called="MEDPRUNER", calling="NEW_CT")
    service.wait_for_model()

    found = {one["subject"]: one for one in json.loads(service.cli("doctor", "--json"))}

    assert [one for one in found.values() if one["state"] == "fault"] == []
    parts = ("receiver", "destination pacs", "queue", "database", "backlog", "audit chain", "model", "weights")
    assert {name: found[name]["state"] for name in parts} == dict.fromkeys(parts, "ok")
    refused = found["refused: NEW_CT from 127.0.0.1 to MEDPRUNER"]
    assert refused["remedy"] == '[[source]] ae_title = "NEW_CT", or [scp] accept_unknown_sources = true'


def test_a_jpeg_2000_study_comes_back_as_one_report(service: Service, storescp: Storescp, body_ct: Path) -> None:
    """storescu sends the compressed study as it is; storescp gets the bytes of the outbox, which dciodvfy passes."""
    study_uid = str(dcmread(next(body_ct.glob("*.dcm")), stop_before_pixels=True).StudyInstanceUID)

    sent = storescu([body_ct], service.port, called="MEDPRUNER", calling=SENDER, options=["--propose-j2k-lossless"])
    assert sent.returncode == 0, sent.stderr
    story = service.wait_for_end(study_uid)

    (analysis,) = story["analyses"]
    assert analysis["state"] == "done", analysis["reason"]
    assert analysis["counts"]["slices_readable"] == 20
    (result,) = analysis["results"]
    (arrived,) = storescp.files()
    assert data_set_of(arrived.read_bytes()) == data_set_of(service.outbox(result))
    assert [str(one) for one in check_any(service.outbox(result)) if one.severity is Severity.ERROR] == []
    assert dcmread(arrived).StudyInstanceUID == study_uid
    assert "JPEG 2000" not in service.log_text()  # nothing to say about what is ordinary


def test_only_the_child_of_the_worker_has_torch(service: Service) -> None:
    """The parent of the model's process never loads torch, so that a GPU is never touched before the fork."""
    parent = service.process("worker")
    service.wait_for_model()

    assert "libtorch" not in Path(f"/proc/{parent}/maps").read_text()
    assert "libtorch" in Path(f"/proc/{service.worker_child()}/maps").read_text()


def test_sigterm_ends_every_process(tmp_path: Path, random_model: Path) -> None:
    """A stopped service leaves nothing behind and exits with 0."""
    with Service(tmp_path, random_model) as running:
        running.process("worker")
        assert running.stop() == 0
        assert running.processes() == []
