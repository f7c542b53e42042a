"""Data set -> Part 10 bytes, always the same ones for the same content. Knows nothing of what is in it."""

from __future__ import annotations

import hashlib
from io import BytesIO

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


def uncompressed(content: bytes) -> bytes:
    """The same object in explicit VR little endian, for a destination that refuses its transfer syntax.

    The SOP Instance UID stays: only lossless syntaxes are written here, so the pixels are the same.
    """
    dataset = dcmread(BytesIO(content))
    dataset.decompress(as_rgb=False, generate_instance_uid=False)
    return encode(dataset)
