"""A folder of DICOM files -> C-STORE to a receiver: for `send`, the demo and people who try things out."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydicom import dcmread
from pynetdicom import AE, _config, build_context
from pynetdicom.association import Association

from service.answers import keep_answers

HEADER = ("SOPClassUID", "SOPInstanceUID")
MAX_CONTEXTS = 128

_config.STORE_SEND_CHUNKED_DATASET = True  # a file's data set goes out as it lies there, never encoded again


class CannotSend(Exception):
    """The study cannot be sent; the message says why and what would help."""


@dataclass(frozen=True, slots=True)
class Sent:
    """One file and the status it was answered with; None: no answer."""

    file: Path
    status: int | None

    @property
    def stored(self) -> bool:
        return self.status is not None and (self.status == 0 or 0xB000 <= self.status <= 0xBFFF)


def dicom_files(folder: Path) -> list[tuple[Path, str, str]]:
    """(file, SOP class, transfer syntax) of every Part 10 file below `folder`, by name; others are passed over."""
    return list(_dicom_files(folder))


def send_study(
    folder: Path,
    *,
    host: str,
    port: int,
    called_ae: str,
    calling_ae: str,
    tls: ssl.SSLContext | None = None,
    on_sent: Callable[[Sent], None] = lambda sent: None,
) -> list[Sent]:
    """Send every DICOM file of `folder` over one association, each in the transfer syntax it has."""
    files = dicom_files(folder)
    if not files:
        raise CannotSend(f"{folder}: no DICOM files (Part 10, with the DICM prefix) in it")
    pairs = sorted({(sop_class, syntax) for _, sop_class, syntax in files})
    if len(pairs) > MAX_CONTEXTS:
        raise CannotSend(f"{folder}: more than {MAX_CONTEXTS} pairs of SOP class and transfer syntax")
    application = AE(ae_title=calling_ae)
    contexts = [build_context(*pair) for pair in pairs]
    try:
        association = application.associate(
            host, port, contexts=contexts, ae_title=called_ae, tls_args=None if tls is None else (tls, host)
        )
    except (OSError, UnicodeError) as error:  # from the resolver
        raise CannotSend(f"{host}: no such host") from error
    if not association.is_established:
        raise CannotSend(
            f"{called_ae} at {host}:{port} does not accept an association from {calling_ae}; "
            f'is it running, and does [[source]] ae_title = "{calling_ae}" (or [scp] accept_unknown_sources) allow it?'
        )
    keep_answers(association)
    sent = []
    for file, _, _ in files:
        sent.append(Sent(file, _store(association, file)))
        on_sent(sent[-1])
    if association.is_established:
        association.release()
    return sent


def _store(association: Association, file: Path) -> int | None:
    """The status of one C-STORE; None when there was no answer, or no presentation context for this file."""
    if not association.is_established:
        return None
    try:
        status: int | None = association.send_c_store(file).get("Status")
    except (RuntimeError, ValueError, OSError):
        return None
    return status


def _dicom_files(folder: Path) -> Iterator[tuple[Path, str, str]]:
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        try:
            header = dcmread(file, specific_tags=list(HEADER), stop_before_pixels=True)
            found = (file, str(header.SOPClassUID), str(header.file_meta.TransferSyntaxUID))
        except Exception:  # noqa: BLE001  # not DICOM, or so broken that pydicom raises whatever it meets
            continue
        yield found
