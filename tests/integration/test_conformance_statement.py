"""The conformance statement against what is live: associations, objects as built from real studies, codes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import UID, CTImageStorage
from pynetdicom import AE, ALL_TRANSFER_SYNTAXES, build_context, evt
from pynetdicom.association import Association
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelFind  # type: ignore[attr-defined]

from service import conformance, delivery, receiver
from service.report import codes
from service.report.encapsulated import build_pdf
from service.report.encoding import encode
from service.report.identity import IMPLEMENTATION_CLASS_UID
from service.report.key_objects import build_key_objects
from service.report.parametric_map import build_parametric_map
from service.report.pixels import PixelLimits, read_frames
from service.report.readable import walk
from service.report.retention_map import build_secondary_capture, wanted_frames
from service.report.segmentation import build_segmentation
from service.report.source import read_source
from service.report.structured_report import build_sr
from service.report.text_report import build_text_report
from service.shared.db import Delivery, Result
from service.shared.durable import digest
from service.shared.messages import Flag
from service.shared.settings import DestinationSettings, ReportSettings, ScpSettings, Settings, SrSopClass
from tests import audit_schema
from tests.receiving import SENDER, accepting, running
from tests.report_samples import BODY, HEAD, RUN, arrays_of, output_for

CONTEXTS = 128


def associate(port: int, contexts: Sequence[tuple[str, list[str]]]) -> Association:
    application = AE(ae_title=SENDER)
    proposed = [build_context(abstract, syntaxes) for abstract, syntaxes in contexts]
    association = application.associate("127.0.0.1", port, contexts=proposed, ae_title="MEDPRUNER")
    assert association.is_established
    return association


def test_every_class_of_the_statement_is_accepted(tmp_path: Path) -> None:
    """By the live receiver, and nothing that is no storage."""
    classes = conformance.accepted_classes()
    accepted = set()

    with running(tmp_path) as live:
        for start in range(0, len(classes), CONTEXTS):
            association = associate(
                live.port, [(uid, ["1.2.840.10008.1.2.1"]) for uid in classes[start : start + CONTEXTS]]
            )
            accepted |= {context.abstract_syntax for context in association.accepted_contexts}
            association.release()
        other = associate(
            live.port,
            [
                (StudyRootQueryRetrieveInformationModelFind, ["1.2.840.10008.1.2.1"]),
                (CTImageStorage, ["1.2.840.10008.1.2.1"]),
            ],
        )
        refused = {context.abstract_syntax for context in other.rejected_contexts}
        other.release()

    assert accepted == set(classes)
    assert refused == {StudyRootQueryRetrieveInformationModelFind}


def test_every_transfer_syntax_of_the_statement_is_accepted(tmp_path: Path) -> None:
    """Each proposed alone; those that the statement does not name are refused."""
    with running(tmp_path) as live:
        association = associate(live.port, [(CTImageStorage, [syntax]) for syntax in ALL_TRANSFER_SYNTAXES])
        accepted = {context.transfer_syntax[0] for context in association.accepted_contexts}
        announced = association.acceptor.implementation_class_uid
        association.release()

    text = conformance.statement(Settings())
    assert accepted == set(receiver.TRANSFER_SYNTAXES)
    assert all(f"| {uid} |" in text for uid in accepted)
    assert announced == IMPLEMENTATION_CLASS_UID


@pytest.fixture
def pacs() -> Iterator[tuple[int, list[tuple[str, tuple[str, ...]]]]]:
    """A storage SCP that notes what is proposed to it."""
    proposed: list[tuple[str, tuple[str, ...]]] = []

    def note(event: evt.Event) -> None:
        proposed.extend(
            (context.abstract_syntax, tuple(context.transfer_syntax))
            for context in event.assoc.requestor.requested_contexts
        )

    application = AE(ae_title="PACS")
    for uid in conformance.SENT:
        application.add_supported_context(uid, ALL_TRANSFER_SYNTAXES)
    handlers = [(evt.EVT_REQUESTED, note), (evt.EVT_C_STORE, lambda event: 0x0000)]
    with accepting(application, ("127.0.0.1", 0), handlers) as port:
        yield port, proposed


def test_what_is_proposed_as_scu_is_what_the_statement_says(
    pacs: tuple[int, list[tuple[str, tuple[str, ...]]]], tmp_path: Path
) -> None:
    """One association per object, as a delivery makes it."""
    port, proposed = pacs
    destination = DestinationSettings(name="pacs", ae_title="PACS", host="127.0.0.1", port=port)
    said: dict[str, set[str]] = {}

    for number, dataset in enumerate((*documents(HEAD), *objects(HEAD).values())):
        content = encode(dataset, dataset.file_meta.TransferSyntaxUID)
        path = tmp_path / f"{number}.dcm"
        path.write_bytes(content)
        result = Result(sop_class_uid=str(dataset.SOPClassUID), sha256=digest(content), path=path.name)
        (answer,) = delivery.send(destination, ScpSettings(), tmp_path, [delivery.Consignment(Delivery(), result)])
        assert answer.verdict is delivery.Verdict.STORED
    for abstract, syntaxes in proposed:
        said.setdefault(abstract, set()).update(syntaxes)

    assert said == {uid: set(syntaxes) for uid, syntaxes in conformance.SENT.items()}


def documents(folder: Path) -> Iterator[Dataset]:
    """The report in every class."""
    source = read_source(sorted(folder.glob("*.dcm"))[:4])
    for sop_class in conformance.SOP_CLASSES:
        yield build_sr(output_for(source), source, ReportSettings(), sop_class, run=RUN)


def objects(folder: Path) -> dict[str, Dataset]:
    """Every kind of object, from a real study."""
    source = read_source(sorted(folder.glob("*.dcm"))[:4])
    output = output_for(source, flags=list(Flag), tokens=(4, 4))
    arrays = arrays_of(output.retention.inputs, (4, 4))
    settings = ReportSettings()
    frames = list(read_frames(wanted_frames(output, source), PixelLimits()))
    sr = build_sr(output, source, settings, SrSopClass.COMPREHENSIVE_3D, run=RUN)
    return {
        "Structured Report (TID 1500)": sr,
        "Basic Text SR (TID 2000)": build_text_report(output, source, settings, run=RUN),
        "Key objects": build_key_objects(output, source, settings, run=RUN),
        "Printed report": build_pdf(output, arrays, source, dict(enumerate(frames)), settings, run=RUN),
        "Retention map": build_secondary_capture(output, arrays, source, frames, settings, run=RUN),
        "Attention map": build_parametric_map(output, arrays, source, frames, settings, run=RUN),
        "Retention mask": build_segmentation(output, arrays, source, frames, (512, 512), settings, run=RUN),
    }


def names(dataset: Dataset, depth: int = 0) -> Iterator[str]:
    """Attributes as the statement names them; the content tree has its own section."""
    for element in dataset:
        if element.keyword == "ContentSequence":
            continue
        yield ">" * depth + element.name
        if element.VR == "SQ":
            for item in element.value:
                yield from names(item, depth + 1)


@pytest.mark.parametrize("folder", [BODY, HEAD], ids=["body", "head"])
def test_objects_hold_what_the_statement_says(folder: Path) -> None:
    """Nothing that it does not name, and everything that it says is always there."""
    tables = conformance.object_tables()

    for kind, dataset in objects(folder).items():
        found = set(names(dataset))
        conditional = {"Laterality", "Lossy Image Compression"}  # of what the source says about itself
        assert found - {row.name for row in tables[kind]} <= conditional
        top = {row.name for row in tables[kind] if row.presence in ("ALWAYS", "VNAP", "EMPTY") and row.name[0] != ">"}
        assert top <= found


def test_the_content_tree_holds_what_the_statement_says() -> None:
    """Concepts of a real report are all in the table of content items."""
    listed = {name for name, _, _ in conformance.content_items()}

    report = objects(HEAD)["Structured Report (TID 1500)"]

    assert {item.ConceptNameCodeSequence[0].CodeMeaning for item in walk(report)} <= listed


def test_private_codes_are_listed_once_and_all() -> None:
    """No code has two meanings, no meaning two codes."""
    listed = conformance.private_codes()

    assert len({code.value for code in listed}) == len({code.meaning for code in listed}) == len(listed)
    used = {
        item.CodeValue
        for dataset in objects(HEAD).values()
        for element in dataset.iterall()
        if element.VR == "SQ"
        for item in element.value
        if item.get("CodingSchemeDesignator") == codes.SCHEME and "CodeValue" in item
    }
    assert used <= {code.value for code in listed}


def test_the_statement_is_always_the_same() -> None:
    """So that a change of it is a change of the code."""
    assert conformance.statement(Settings()) == conformance.statement(Settings())


def test_every_class_that_we_build_is_named() -> None:
    """Sent or not yet sent."""
    text = conformance.statement(Settings())

    assert all(UID(uid).name in text for uid in conformance.SENT)


def test_audit_messages_that_are_sent_are_named_by_their_sections() -> None:
    """Those of the grammar that every message is held against, and no other."""
    text = conformance.statement(Settings())
    used = {line.split(" | ")[1] for line in text.splitlines() if line.startswith("| ") and " | Y | `" in line}

    assert used == {one.section for one in audit_schema.MESSAGES.values()}
