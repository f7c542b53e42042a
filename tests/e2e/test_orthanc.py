"""The way with Orthanc as the PACS: it sends the study, takes the report, and forwards everything back to us."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydicom import dcmread

from service.report.gate import Severity, check_any
from tests.running import PATIENCE_S, Pacs, Service, Story, data_set_of, kinds
from tests.servers import Modality, Orthanc, free_port, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def pacs_and_service(
    tmp_path_factory: pytest.TempPathFactory, random_model: Path, body_ct: Path
) -> Iterator[tuple[Orthanc, Service]]:
    """Orthanc that holds the study and forwards whatever else arrives, and the service it forwards to."""
    folder, port = tmp_path_factory.mktemp("orthanc"), free_port()
    modalities = {"medpruner": Modality("MEDPRUNER", port)}
    with Orthanc(folder) as archive:  # the study is there before the forwarding begins
        archive.upload_folder(body_ct)
        archive.stop()
    orthanc = Orthanc(folder, modalities=modalities, forward_to="medpruner")
    service = Service(
        tmp_path_factory.mktemp("service"), random_model, pacs=[Pacs(orthanc.port)], port=port, quiet_period_s=2
    )
    with orthanc, service:
        yield orthanc, service


@pytest.fixture(scope="module")
def study_uid(body_ct: Path) -> str:
    return str(dcmread(next(body_ct.glob("*.dcm")), stop_before_pixels=True).StudyInstanceUID)


@pytest.fixture(scope="module")
def story(pacs_and_service: tuple[Orthanc, Service], study_uid: str) -> Story:
    """What is on record once the report went to Orthanc and came back."""
    orthanc, service = pacs_and_service
    orthanc.send_study(study_uid, to="medpruner")
    service.wait_for_end(study_uid)
    return service.wait_for(study_uid, lambda story: "result-returned" in kinds(story), "the report comes back")


def test_orthanc_holds_exactly_one_report(
    pacs_and_service: tuple[Orthanc, Service], story: Story, study_uid: str
) -> None:
    """One study in, one Structured Report of that study back."""
    orthanc, _ = pacs_and_service

    (report,) = orthanc.reports()

    assert report.StudyInstanceUID == study_uid
    assert str(report.SOPInstanceUID) == story["analyses"][0]["results"][0]["sop_instance_uid"]


def test_the_returned_report_starts_nothing(pacs_and_service: tuple[Orthanc, Service], story: Story) -> None:
    """Our own result is recorded as returned; the study keeps its revision and its one analysis."""
    orthanc, _ = pacs_and_service

    assert kinds(story).count("result-returned") == 1
    assert story["study"]["revision"] == 1
    assert story["study"]["state"] == "complete"
    assert [one["state"] for one in story["analyses"]] == ["done"]
    assert kinds(story).count("study-opened") == 1
    assert "study-reopened" not in kinds(story)
    assert len(orthanc.find("Instance", Modality="SR")) == 1


def test_orthanc_holds_the_bytes_of_the_outbox(pacs_and_service: tuple[Orthanc, Service], story: Story) -> None:
    """The data set that Orthanc stores is the one we built, and dciodvfy finds no error in Orthanc's file."""
    orthanc, service = pacs_and_service
    (result,) = story["analyses"][0]["results"]
    (instance,) = orthanc.find("Instance", Modality="SR")

    stored = orthanc.file(instance)

    assert data_set_of(stored) == data_set_of(service.outbox(result))
    assert [str(one) for one in check_any(stored) if one.severity is Severity.ERROR] == []


def test_a_forwarded_copy_of_the_study_starts_nothing(
    pacs_and_service: tuple[Orthanc, Service], story: Story, study_uid: str
) -> None:
    """Orthanc sends the study and the report once more: acknowledged, recorded, and nothing is read again."""
    orthanc, service = pacs_and_service
    before = kinds(story).count("instances-received-again")

    orthanc.send_study(study_uid, to="medpruner")

    # the study's images and the report that is among them by now
    after = service.wait_for(
        study_uid, lambda story: kinds(story).count("instances-received-again") > before, "the copy is recorded"
    )
    wait_for(
        lambda: not list((service.settings.data.path / "spool" / "incoming").glob("*.dcm")), "all ingested", PATIENCE_S
    )
    assert after["study"]["revision"] == 1
    assert len(service.story(study_uid)["analyses"]) == 1
    assert len(orthanc.find("Instance", Modality="SR")) == 1
