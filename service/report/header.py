"""What all our results have in common: patient, study, series, equipment, SOP Common. Knows nothing of content."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

from pydicom import config
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code

from service.report import codes
from service.report.identity import RunIdentity, derived_uid
from service.report.source import Checked, SourceStudy
from service.shared.messages import AnalysisOutput
from service.shared.settings import ReportSettings

MODEL_NAME = "medpruner-pacs"
_LO_CHARACTERS = 64
# Defined terms of PS3.16 Annex L that name no paired structure
_UNPAIRED = frozenset(
    {
        "ABDOMEN", "ABDOMENPELVIS", "AORTA", "BLADDER", "BRAIN", "CHEST", "CHESTABDOMEN", "CHESTABDPELVIS", "COLON",
        "CSPINE", "ESOPHAGUS", "HEAD", "HEADNECK", "HEART", "JAW", "LIVER", "LSPINE", "LSSPINE", "MEDIASTINUM",
        "NECK", "NECKCHEST", "NECKCHESTABDOMEN", "NECKCHESTABDPELV", "PANCREAS", "PELVIS", "PROSTATE", "SKULL",
        "SPINE", "SPLEEN", "SSPINE", "STERNUM", "STOMACH", "TLSPINE", "TSPINE", "THYROID", "UTERUS", "WHOLEBODY",
    }
)  # fmt: skip


def common_header(
    output: AnalysisOutput,
    source: SourceStudy,
    settings: ReportSettings,
    run: RunIdentity,
    *,
    sop_class_uid: str,
    modality: str,
    kind: str,
    series_number: int,
    series_description: str,
) -> Dataset:
    """A data set without content and without SOP Instance UID, all text in UTF-8.

    kind: of object; each kind of each run is a series of its own.
    """
    dataset = Dataset()
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.SOPClassUID = sop_class_uid
    copy_into(dataset, source.attributes)
    copy_into(dataset, {"StudyInstanceUID": source.study_uid})
    moment = local_time(source, run)
    for prefix in ("InstanceCreation", "Series", "Content"):
        setattr(dataset, f"{prefix}Date", f"{moment:%Y%m%d}")
        setattr(dataset, f"{prefix}Time", dicom_time(moment))
    dataset.Modality = modality
    dataset.SeriesInstanceUID = run.uid("series", kind)
    dataset.SeriesNumber = series_number
    dataset.SeriesDescription = clipped(series_description)
    dataset.InstanceNumber = 1
    dataset.Manufacturer = clipped(settings.manufacturer)
    dataset.ManufacturerModelName = MODEL_NAME
    dataset.DeviceSerialNumber = clipped(settings.device_serial_number)
    dataset.SoftwareVersions = [clipped(run.software_version), *filter(None, [output.model.weights_sha256])]
    if settings.institution:
        dataset.InstitutionName = clipped(settings.institution)
    dataset.ContributingEquipmentSequence = [
        *_acquisition(source),
        _processing(output, settings, run),
    ]
    return dataset


def device_uid(output: AnalysisOutput) -> str:
    """Of the reading device: another one for every other model, weights or software version (IHE AI Results)."""
    return derived_uid("device", output.model.name, output.model.weights_sha256, output.software_version)


def private_scheme() -> Dataset:
    """The item of Coding Scheme Identification Sequence that declares our codes."""
    item = Dataset()
    item.CodingSchemeDesignator = codes.SCHEME
    item.CodingSchemeName = codes.SCHEME_NAME
    item.CodingSchemeResponsibleOrganization = MODEL_NAME
    return item


def code_item(code: Code) -> Dataset:
    item = Dataset()
    item.CodeValue = code.value
    item.CodingSchemeDesignator = code.scheme_designator
    item.CodeMeaning = code.meaning
    return item


def copy_into(dataset: Dataset, attributes: Checked) -> None:
    """Write checked attributes as they stand; invalid UIDs of the source pass, everything else was checked."""
    for keyword, value in attributes.items():
        tag = tag_for_keyword(keyword)
        assert tag is not None, keyword
        if isinstance(value, str):
            element = DataElement(tag, dictionary_VR(tag), value, validation_mode=config.IGNORE)
        else:
            items = [Dataset() for _ in value]
            for item, content in zip(items, value, strict=True):
                copy_into(item, content)
            element = DataElement(tag, "SQ", items)
        dataset.add(element)


def copy_series_of_source(dataset: Dataset, source: SourceStudy) -> None:
    """Body part, side and frame of reference of the images that `dataset` was derived from.

    Laterality (Type 2C) is absent for an unpaired part, and empty, which means unknown, where nobody says.
    """
    copied = ("BodyPartExamined", "FrameOfReferenceUID", "Laterality")
    copy_into(dataset, {keyword: source.series[keyword] for keyword in copied if keyword in source.series})
    if dataset.get("BodyPartExamined") in _UNPAIRED:
        dataset.pop("Laterality", None)
    elif "Laterality" not in dataset:
        dataset.Laterality = ""
    if "FrameOfReferenceUID" in dataset:
        dataset.PositionReferenceIndicator = ""


def local_time(source: SourceStudy, run: RunIdentity) -> datetime:
    """The run's time at the source's own offset from UTC where it states one, else in the site's zone.

    Timezone Offset From UTC is about every date of an object, copied ones too: it is never ours to add.
    """
    offset = source.attributes.get("TimezoneOffsetFromUTC")
    if not isinstance(offset, str):
        return run.content_time.astimezone(run.timezone)
    minutes = int(offset[1:3]) * 60 + int(offset[3:5])
    return run.content_time.astimezone(timezone(timedelta(minutes=-minutes if offset[0] == "-" else minutes)))


def dicom_time(moment: datetime) -> str:
    return f"{moment:%H%M%S}" + (f".{moment.microsecond:06d}" if moment.microsecond else "")


def decimal(value: float) -> str:
    """A DS of at most 16 characters."""
    text = repr(float(value))
    return text if len(text) <= 16 else f"{value:.10g}"


def clipped(text: str) -> str:
    """A configured or model's name as LO: without what LO cannot hold, cut at 64 characters, never empty."""
    printable = "".join(" " if character < " " or character in "\\\x7f" else character for character in text)
    return printable.strip()[:_LO_CHARACTERS].strip() or "unnamed"


def _acquisition(source: SourceStudy) -> list[Dataset]:
    """The scanner; left out where the source does not name its manufacturer (Type 1 here)."""
    if "Manufacturer" not in source.equipment:
        return []
    item = Dataset()
    copy_into(item, source.equipment)
    item.PurposeOfReferenceCodeSequence = [code_item(codes.ACQUISITION_EQUIPMENT)]
    return [item]


def _processing(output: AnalysisOutput, settings: ReportSettings, run: RunIdentity) -> Dataset:
    """The model, as IHE AI Results asks for each algorithm."""
    item = Dataset()
    item.PurposeOfReferenceCodeSequence = [code_item(codes.PROCESSING_EQUIPMENT)]
    item.Manufacturer = clipped(settings.manufacturer)
    item.ManufacturerModelName = clipped(output.model.name)
    item.SoftwareVersions = [clipped(output.software_version), *filter(None, [output.model.weights_sha256])]
    item.DeviceSerialNumber = clipped(settings.device_serial_number)
    item.DeviceUID = device_uid(output)
    moment = run.content_time.astimezone(run.timezone)
    item.ContributionDateTime = f"{moment:%Y%m%d}{dicom_time(moment)}{moment:%z}"[:26]
    item.ContributionDescription = "Read the images and wrote the text"
    return item
