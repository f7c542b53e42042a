"""Data set -> Part 10 bytes, always the same ones for the same content. Knows nothing of what is in it."""

from __future__ import annotations

import hashlib
from io import BytesIO
from pathlib import Path

from pydicom import dcmread, dcmwrite
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian

from service.report.identity import (
    IMPLEMENTATION_CLASS_UID,
    IMPLEMENTATION_VERSION_NAME,
    derived_uid,
)
from service.report.validation_mode import strict_writing

_UNNAMED = "2.25.0"


def encode(dataset: Dataset, transfer_syntax_uid: UID = ExplicitVRLittleEndian) -> bytes:
    """Write `dataset` as a Part 10 file.

    Raises what pydicom raises when a text does not fit the character set: none is ever written with losses.
    """
    meta = FileMetaDataset()
    meta.FileMetaInformationVersion = b"\x00\x01"
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    meta.TransferSyntaxUID = transfer_syntax_uid
    meta.ImplementationClassUID = UID(IMPLEMENTATION_CLASS_UID)
    meta.ImplementationVersionName = IMPLEMENTATION_VERSION_NAME
    dataset.file_meta = meta
    buffer = BytesIO()
    with strict_writing():
        dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


def name_by_content(dataset: Dataset, *parts: str, transfer_syntax_uid: UID = ExplicitVRLittleEndian) -> Dataset:
    """Give `dataset` a SOP Instance UID that is another one whenever any of its bytes is another one."""
    dataset.SOPInstanceUID = _UNNAMED
    content = hashlib.sha256(encode(dataset, transfer_syntax_uid)).hexdigest()
    dataset.SOPInstanceUID = derived_uid("instance", *parts, content)
    return dataset


def transcoded(file: Path, transfer_syntax_uid: UID) -> Dataset:
    """The content of a stored result in another transfer syntax, for a destination that takes its own not.

    The SOP Instance UID stays: only lossless syntaxes are ever written, so the pixels are the same.
    """
    dataset = dcmread(file)
    if dataset.file_meta.TransferSyntaxUID.is_compressed:
        dataset.decompress(generate_instance_uid=False)
    if transfer_syntax_uid.is_compressed:
        dataset.compress(transfer_syntax_uid, encoding_plugin="pylibjpeg", generate_instance_uid=False)
    elements = Dataset()  # not bound to the encoding that it was read in
    elements.update(dataset)
    elements.file_meta = FileMetaDataset()
    elements.file_meta.TransferSyntaxUID = transfer_syntax_uid
    return elements
