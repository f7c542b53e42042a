"""The SR: what it says in words and codes, what it refers to, and that the same input gives the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any, get_args

import pytest
from highdicom.sr import srread
from pydicom import dcmread
from pydicom.dataset import Dataset

from service.report import codes
from service.report.encoding import encode
from service.report.identity import PriorDocument, RunIdentity
from service.report.readable import walk
from service.report.source import SourceStudy, read_source
from service.report.structured_report import SOP_CLASSES, build_sr
from service.shared.messages import AnalysisOutput, Flag, SourceInstance, SourceState
from service.shared.settings import PruningMethod, PruningSettings, ReportSettings, SrSopClass
from tests.report_samples import RUN, ct_header, output_for, output_of, write

SETTINGS = ReportSettings()


@pytest.fixture
def source(tmp_path: Path) -> SourceStudy:
    """Four CT slices."""
    return read_source(write(tmp_path, [ct_header(number) for number in range(1, 5)]))


def build(
    output: AnalysisOutput,
    source: SourceStudy,
    sop_class: SrSopClass = SrSopClass.COMPREHENSIVE_3D,
    run: RunIdentity = RUN,
    settings: ReportSettings = SETTINGS,
) -> Dataset:
    """The SR as a receiver reads it."""
    return dcmread(BytesIO(encode(build_sr(output, source, settings, sop_class, run=run))))


def values(document: Dataset, name: Any) -> list[Any]:
    """Values of the content items under concept `name`, in document order."""
    found = []
    for item in walk(document):
        concepts = item.get("ConceptNameCodeSequence")
        if not concepts or concepts[0].CodeValue != name.value:
            continue
        if item.ValueType == "CODE":
            found.append(item.ConceptCodeSequence[0].CodeValue)
        elif item.ValueType == "NUM":
            found.append(str(item.MeasuredValueSequence[0].NumericValue))
        elif item.ValueType in ("TEXT", "UIDREF"):
            found.append(item.TextValue if item.ValueType == "TEXT" else item.UID)
        elif item.ValueType == "IMAGE":
            found.append(item.ReferencedSOPSequence[0].ReferencedSOPInstanceUID)
    return found


def listed(document: Dataset) -> list[str]:
    """SOP Instance UIDs of the evidence."""
    return [
        reference.ReferencedSOPInstanceUID
        for study in document.CurrentRequestedProcedureEvidenceSequence
        for series in study.ReferencedSeriesSequence
        for reference in series.ReferencedSOPSequence
    ]


def test_findings_stand_paragraph_by_paragraph(source: SourceStudy) -> None:
    """Each paragraph is one TEXT item under Finding."""
    document = build(output_for(source), source)

    texts = [value for value in values(document, codes.FINDING) if value != codes.MODEL_INPUT_SELECTION.value]
    assert texts == ["The lungs are clear.", "No pleural effusion."]


def test_the_impression_begins_by_saying_that_it_is_unverified(source: SourceStudy) -> None:
    """No viewer can show the impression without these words."""
    (text,) = values(build(output_for(source), source), codes.IMPRESSION)

    assert text == "UNVERIFIED machine output, not for diagnosis.\r\nNo acute finding."


def test_the_document_is_unverified_preliminary_and_complete(source: SourceStudy) -> None:
    """Nobody has looked at it, all of it is there."""
    document = build(output_for(source), source)

    assert (document.VerificationFlag, document.PreliminaryFlag) == ("UNVERIFIED", "PRELIMINARY")
    assert document.CompletionFlag == "COMPLETE"
    assert "VerifyingObserverSequence" not in document


@pytest.mark.parametrize("flag", list(Flag))
def test_every_flag_is_said_in_words_and_in_a_code(source: SourceStudy, flag: Flag) -> None:
    """Nothing given up, cut or guessed is hidden from the radiologist."""
    from service.report.words import NOTICES

    document = build(output_for(source, flags=[flag]), source)

    text = "\n".join(values(document, codes.IMPRESSION) + values(document, codes.COMMENT))
    assert NOTICES[flag] in text
    assert values(document, codes.CAUTION) == [codes.CAUTIONS[flag].value]


@pytest.mark.parametrize(
    ("flag", "words"),
    [(Flag.RANDOM_WEIGHTS, "RANDOM WEIGHTS: the text is noise"), (Flag.DEMONSTRATION_WEIGHTS, "DEMONSTRATION MODEL")],
)
def test_untrained_weights_are_named_before_the_impression(source: SourceStudy, flag: Flag, words: str) -> None:
    """The reader learns it before reading a word of the model's."""
    (text,) = values(build(output_for(source, flags=[flag]), source), codes.IMPRESSION)

    assert text.startswith("UNVERIFIED machine output, not for diagnosis. " + words)


@pytest.mark.parametrize("flag", [Flag.MISSING_SLICES, Flag.UNREADABLE_SLICES, Flag.TRUNCATED, Flag.REPETITION])
def test_what_is_not_all_there_is_partial(source: SourceStudy, flag: Flag) -> None:
    """Missing slices and cut text make the document PARTIAL."""
    assert build(output_for(source, flags=[flag]), source).CompletionFlag == "PARTIAL"


def test_evidence_is_every_analysed_instance_and_the_library_what_was_shown(source: SourceStudy) -> None:
    """A dropped slice was analysed, and was not shown."""
    document = build(output_for(source, keep_every=2), source)

    assert listed(document) == [one.sop_instance_uid for one in source.instances]
    assert values(document, codes.SOURCE) == ["2.25.1001", "2.25.1003"]
    assert values(document, codes.SOURCE_OF_MEASUREMENT) == ["2.25.1001"]  # of each series one: the library has all


def test_an_analysed_instance_without_readable_header_is_said(source: SourceStudy) -> None:
    """It cannot be listed as evidence, so words, a code and PARTIAL say so."""
    uids = [*(one.sop_instance_uid for one in source.instances), "2.25.9999"]

    document = build(output_of(uids), source)

    assert "2.25.9999" not in listed(document)
    assert document.CompletionFlag == "PARTIAL"
    assert values(document, codes.CAUTION) == [codes.INSTANCES_NOT_LISTED.value]
    assert "Not listed, for want of a readable header: 1 instance of the series." in values(document, codes.COMMENT)


def test_without_any_known_instance_nothing_is_built(source: SourceStudy) -> None:
    """A report about other instances than those of the source is a fault."""
    with pytest.raises(ValueError, match="none of the 1 analysed instances"):
        build(output_of(["2.25.9999"]), source)


def test_frames_of_a_multi_frame_instance_are_referenced_by_number(source: SourceStudy) -> None:
    """One reference with the shown frames, one entry of evidence."""
    uid = source.instances[0].sop_instance_uid
    output = output_of([uid] * 4, keep_every=2)
    frames = tuple(
        one.model_copy(update={"frame_number": number}) for number, one in enumerate(output.retention.sources, 1)
    )
    output = output.model_copy(update={"retention": output.retention.model_copy(update={"sources": frames})})

    document = build(output, source)

    images = [item for item in walk(document) if item.get("ValueType") == "IMAGE"]
    assert [list(item.ReferencedSOPSequence[0].ReferencedFrameNumber) for item in images] == [[1, 3], [1, 3]]
    assert listed(document) == [uid]


def test_counts_and_settings_stand_as_numbers_and_codes(source: SourceStudy) -> None:
    """Pruning provenance can be read by a machine."""
    document = build(output_for(source, keep_every=2), source)

    assert values(document, codes.COUNTS["slices_in_series"][0]) == ["4"]
    assert values(document, codes.COUNTS["inputs_kept"][0]) == ["2"]
    assert values(document, codes.COUNTS["tokens_kept"][0]) == ["16"]
    assert values(document, codes.TOKEN_FRACTION) == ["0.25"]
    assert values(document, codes.SLICES_SHOWN[0]) == ["2"]
    assert values(document, codes.SERIES_NOT_READ[0]) == ["1"]
    assert values(document, codes.PRUNING_NUMBERS["gamma"][0]) == ["0.05"]
    method, methods = codes.PRUNING_CHOICES["method"]
    assert values(document, method) == [methods["medpruner"].value]
    assert values(document, codes.PRUNING_SWITCHES["token_stage"]) == [codes.YES.value]


def test_every_setting_stands_in_the_algorithm_parameters(source: SourceStudy) -> None:
    """One text names every knob, also one that has no code of its own, and the digests; no path, no prompt."""
    pruning = {"method": "experimental", "tau": 0.8, "anchor": {"max_gap_mm": 9.0}}

    document = build(output_for(source, pruning=pruning), source)

    (text,) = values(document, codes.ALGORITHM_PARAMETERS)
    assert 'pruning.anchor={"max_gap_mm": 9.0}; pruning.method=experimental; pruning.tau=0.8' in text
    assert "weights=sha256:" in text
    assert "prompt=sha256:" in text
    assert "/models/medgemma" not in text
    assert "Read the slices" not in text
    assert values(document, codes.PRUNING_CHOICES["method"][0]) == [codes.OTHER_CHOICE.value]


def test_every_knob_of_pruning_has_a_code(source: SourceStudy) -> None:
    """A setting that is new to the configuration must be coded too."""
    settings = PruningSettings()
    coded = {*codes.PRUNING_NUMBERS, *codes.PRUNING_SWITCHES, *codes.PRUNING_CHOICES}

    document = build(output_for(source, pruning=settings.model_dump(mode="json")), source)

    assert coded == set(PruningSettings.model_fields)
    for key, (name, _) in codes.PRUNING_NUMBERS.items():
        assert [float(value) for value in values(document, name)] == [getattr(settings, key)]
    for key, (name, choices) in codes.PRUNING_CHOICES.items():
        assert values(document, name) == [choices[getattr(settings, key)].value]


def test_every_choice_of_pruning_has_a_code() -> None:
    """And no code stands for a choice that nobody can make."""
    choices = {key: set(values_) for key, (_, values_) in codes.PRUNING_CHOICES.items()}

    assert choices.pop("method") == {method.value for method in PruningMethod}
    assert choices == {
        key: set(get_args(PruningSettings.model_fields[key].annotation)) for key in ("slab_operation", "dropped_slices")
    }


def test_series_that_were_not_read_are_named_with_the_reason(source: SourceStudy) -> None:
    """The reader learns what was left aside."""
    comments = values(build(output_for(source), source), codes.COMMENT)

    assert "Series not read: CT, 1 instance: localizer" in comments
    assert "Series read: the axial series with most slices" in comments


def test_slices_that_were_not_shown_are_counted_in_words(source: SourceStudy) -> None:
    """The funnel in one sentence, by reason."""
    output = output_for(source, keep_every=1)
    first, second, third, fourth = output.retention.sources
    sources = (
        first,
        second.model_copy(update={"state": SourceState.IN_SLAB}),
        third.model_copy(update={"state": SourceState.SAMPLED_OUT}),
        SourceInstance(
            sop_instance_uid=fourth.sop_instance_uid, position_mm=None, state=SourceState.UNREADABLE, reason="cut"
        ),
    )
    output = output.model_copy(update={"retention": output.retention.model_copy(update={"sources": sources})})

    comments = values(build(output, source), codes.COMMENT)

    assert comments[0] == (
        "The model was shown 2 of 4 slices (1 of them in slabs with neighbours) and 32 of 64 image tokens. "
        "Slices not shown: 1 left out by sampling, 1 unreadable."
    )


def test_text_that_cannot_be_written_is_replaced_visibly(source: SourceStudy) -> None:
    """Control characters go, a lost character is said to be lost."""
    document = build(output_for(source, findings="A\x00B \ufffd \ud800\tC\x85D", impression=""), source)

    texts = [value for value in values(document, codes.FINDING) if value != codes.MODEL_INPUT_SELECTION.value]
    assert texts == ["A B [unreadable character] [unreadable character] C", "D"]


def test_an_empty_text_is_said_to_be_empty(source: SourceStudy) -> None:
    """A TEXT item is never empty."""
    document = build(output_for(source, findings=" \n", impression=""), source)

    assert "The model produced no text under this heading." in values(document, codes.FINDING)
    assert values(document, codes.IMPRESSION)[0].endswith("The model produced no text under this heading.")


def test_a_japanese_name_arrives_intact_beside_greek_text(tmp_path: Path) -> None:
    """Everything is written in UTF-8, whatever the source used."""
    header = ct_header(SpecificCharacterSet=["ISO 2022 IR 13", "ISO 2022 IR 87"])
    header.PatientName = "ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎=やまだ^たろう"
    source = read_source(write(tmp_path, [header]))

    document = build(output_for(source, findings="μ = 3 — “klar” 山"), source)

    assert document.SpecificCharacterSet == "ISO_IR 192"
    assert str(document.PatientName) == "ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎=やまだ^たろう"
    assert "μ = 3 — “klar” 山" in values(document, codes.FINDING)


def test_patient_and_study_are_copied(source: SourceStudy) -> None:
    """The PACS files the report under the same patient, study and order."""
    document = build(output_for(source), source)

    assert (document.PatientID, document.StudyInstanceUID, document.AccessionNumber) == ("P-1", "2.25.11", "A-1")
    assert (document.StudyDate, document.StudyTime, document.StudyID) == ("20261123", "101500", "S1")
    assert document.Modality == "SR"


def test_the_order_is_copied_from_the_request_attributes(tmp_path: Path) -> None:
    """Referenced Request Sequence has all of its attributes, empty ones included."""
    request = Dataset()
    request.RequestedProcedureID = "RP-1"
    source = read_source(write(tmp_path, [ct_header(RequestAttributesSequence=[request])]))

    (item,) = build(output_for(source), source).ReferencedRequestSequence

    assert (item.RequestedProcedureID, item.AccessionNumber, item.StudyInstanceUID) == ("RP-1", "A-1", "2.25.11")
    assert item.RequestedProcedureDescription == ""
    assert len(item.RequestedProcedureCodeSequence) == 0


def test_time_comes_from_the_job_in_the_zone_of_the_site(source: SourceStudy) -> None:
    """Content Date and Time are local; no offset is claimed for the copied study time."""
    document = build(output_for(source), source)

    assert (document.ContentDate, document.ContentTime) == ("20261123", "133015.250000")
    assert "TimezoneOffsetFromUTC" not in document
    assert document.ContributingEquipmentSequence[-1].ContributionDateTime == "20261123133015.250000+0100"


@pytest.mark.parametrize(("offset", "time"), [("-0500", "073015.250000"), ("+0530", "180015.250000")])
def test_time_is_written_at_the_offset_that_the_source_states(tmp_path: Path, offset: str, time: str) -> None:
    """The offset is about every time in the object, ours included."""
    source = read_source(write(tmp_path, [ct_header(TimezoneOffsetFromUTC=offset)]))

    document = build(output_for(source), source)

    assert (document.TimezoneOffsetFromUTC, document.ContentTime) == (offset, time)


def test_a_time_without_zone_is_refused() -> None:
    """A naive time means nothing across sites."""
    with pytest.raises(ValueError, match="content_time has no time zone"):
        RunIdentity(("1",), datetime(2026, 1, 1), "0.1")  # noqa: DTZ001  # the refusal is the subject


def test_predecessors_are_listed_by_study_and_series(source: SourceStudy) -> None:
    """A revision names the reports before it and says what is new."""
    earlier = PriorDocument("1.2.840.10008.5.1.4.1.1.88.34", "2.25.501", "2.25.500", "2.25.11")
    run = RunIdentity(
        RUN.analysis_key, RUN.content_time, "0.1.0", predecessors=(earlier,), revision_note="2 late slices."
    )

    document = build(output_for(source), source, run=run)

    (item,) = document.PredecessorDocumentsSequence
    assert item.StudyInstanceUID == "2.25.11"
    assert item.ReferencedSeriesSequence[0].ReferencedSOPSequence[0].ReferencedSOPInstanceUID == "2.25.501"
    assert "2 late slices." in values(document, codes.COMMENT)


def test_same_input_gives_the_same_bytes(source: SourceStudy) -> None:
    """A rebuilt report is the report."""
    first, second = (
        encode(build_sr(output_for(source), source, SETTINGS, SrSopClass.COMPREHENSIVE_3D, run=RUN)) for _ in "12"
    )

    assert first == second


def test_bytes_do_not_depend_on_the_process(tmp_path: Path) -> None:
    """Another process with another hash seed, clock and zone builds the same bytes."""
    write(tmp_path, [ct_header(number) for number in range(1, 5)])
    program = (
        "import sys, hashlib; from pathlib import Path\n"
        "from service.report.encoding import encode\n"
        "from service.report.source import read_source\n"
        "from service.report.structured_report import build_sr\n"
        "from service.shared.settings import PruningMethod, PruningSettings, ReportSettings, SrSopClass\n"
        "from tests.report_samples import RUN, output_for\n"
        "source = read_source(Path(sys.argv[1]).glob('*.dcm'))\n"
        "sr = build_sr(output_for(source), source, ReportSettings(), SrSopClass.COMPREHENSIVE_3D, run=RUN)\n"
        "sys.stdout.write(hashlib.sha256(encode(sr)).hexdigest())\n"
    )

    digests = {
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)],
            env=os.environ | {"PYTHONHASHSEED": seed, "TZ": zone},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed, zone in (("1", "UTC"), ("2", "Asia/Tokyo"))
    }

    assert len(digests) == 1


def _changes(source: SourceStudy) -> dict[str, Dataset]:
    output = output_for(source)
    later = RunIdentity(RUN.analysis_key, datetime(2026, 11, 24, tzinfo=UTC), "0.1.0")
    return {
        "text": build(output_for(source, impression="Something else."), source),
        "flag": build(output_for(source, flags=[Flag.GANTRY_TILT]), source),
        "class": build(output, source, SrSopClass.ENHANCED),
        "time": build(output, source, run=later),
        "institution": build(output, source, settings=ReportSettings(institution="Elsewhere")),
    }


def test_other_bytes_never_carry_the_same_uid(source: SourceStudy) -> None:
    """Whatever changes the content changes the SOP Instance UID."""
    documents = [build(output_for(source), source), *_changes(source).values()]

    uids = {document.SOPInstanceUID for document in documents}
    assert len(uids) == len(documents)
    assert all(uid.startswith("2.25.") and len(uid) <= 64 for uid in uids)


def test_device_uid_changes_with_the_weights(source: SourceStudy) -> None:
    """Results of two models can be told apart (IHE AI Results)."""
    output = output_for(source)
    other = output.model_copy(update={"model": output.model.model_copy(update={"weights_sha256": "0" * 64})})

    first, second = (build(one, source) for one in (output, other))

    assert values(first, codes.DEVICE_OBSERVER_UID) != values(second, codes.DEVICE_OBSERVER_UID)
    assert first.ContributingEquipmentSequence[-1].DeviceUID == values(first, codes.DEVICE_OBSERVER_UID)[0]


@pytest.mark.parametrize(
    ("modality", "procedure"), [("CT", "25045-6"), ("MR", "25056-3"), ("US", codes.IMAGING_PROCEDURE.value)]
)
def test_procedure_reported_is_of_the_modality(source: SourceStudy, modality: str, procedure: str) -> None:
    """CID 100, by the modality that was read."""
    document = build(output_for(source, modality=modality), source)

    assert values(document, codes.PROCEDURE_REPORTED) == [procedure]


def test_two_hundred_slices_fit_in_100_kb(tmp_path: Path) -> None:
    """With UIDs as long as they come, and every slice shown."""
    prefix = "1.3.12.2.1107.5.1.4.60064.30000022120808113428000016573"
    headers = [ct_header(SOPInstanceUID=f"{prefix}.{number}") for number in range(10000, 10200)]
    source = read_source(write(tmp_path, headers))

    content = encode(build_sr(output_for(source, keep_every=1), source, SETTINGS, SrSopClass.COMPREHENSIVE_3D, run=RUN))

    assert len(content) < 100_000


@pytest.mark.parametrize("sop_class", list(SOP_CLASSES))
def test_highdicom_reads_the_report_back(source: SourceStudy, sop_class: SrSopClass) -> None:
    """A reader that knows TID 1500 finds the group, its algorithm and its images."""
    content = encode(build_sr(output_for(source), source, SETTINGS, sop_class, run=RUN))

    report = srread(BytesIO(content))

    (group,) = report.content.get_image_measurement_groups()
    assert group.tracking_identifier == "Model input"
    assert [image.referenced_sop_instance_uid for image in group.source_images] == ["2.25.1001"]
    assert len(report.get_evidence()) == 4


def test_long_names_are_cut_to_what_their_vr_holds(source: SourceStudy) -> None:
    """A model's name may be any text."""
    output = output_for(source)
    model = output.model.model_copy(update={"name": "m\\o\n" + "x" * 100})

    document = build(output.model_copy(update={"model": model}), source)

    assert len(document.ContributingEquipmentSequence[-1].ManufacturerModelName) == 64


def test_a_model_without_a_name_is_called_unnamed(source: SourceStudy) -> None:
    """A TEXT item is never empty."""
    output = output_for(source)
    model = output.model.model_copy(update={"name": " \n"})

    document = build(output.model_copy(update={"model": model}), source)

    assert values(document, codes.ALGORITHM_NAME) == ["unnamed"]
