"""The gate over a folder of DICOM objects, of whatever origin -> one verdict per file, and a table of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydicom import dcmread
from pydicom.errors import InvalidDicomError
from pydicom.uid import UID
from rich.markup import escape
from rich.table import Table

from service.report.gate import GateFinding, Severity, check_any
from service.report.source import MALFORMED
from service.report.validation_mode import values_as_they_are

_STYLES = {Severity.ERROR: "red", Severity.WARNING: "yellow", Severity.SOURCE: "yellow", Severity.ALLOWED: "dim"}


@dataclass(frozen=True, slots=True)
class Validated:
    """One file: what it is and what was found; no value of its data set."""

    path: Path  # relative to the folder
    kind: str  # name of the SOP class; "not DICOM" for a file without the Part 10 prefix
    findings: tuple[GateFinding, ...]

    def count(self, severity: Severity) -> int:
        return sum(finding.severity is severity for finding in self.findings)

    @property
    def is_dicom(self) -> bool:
        return self.kind != "not DICOM"


def validate_folder(folder: Path) -> Iterator[Validated]:
    """Check every file below `folder` (or the one file), in order of path; files that are no DICOM are named only."""
    files = [folder] if folder.is_file() else sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        shown = Path(path.name) if path == folder else path.relative_to(folder)
        kind = _kind(path)
        yield Validated(shown, kind, () if kind == "not DICOM" else check_any(path.read_bytes()))


def passed(validated: Iterable[Validated]) -> bool:
    """Without any error."""
    return not any(one.count(Severity.ERROR) for one in validated)


def table(validated: Iterable[Validated], *, show_allowed: bool = False) -> Table:
    """A row per file and, under it, each distinct finding with how often it was made."""
    printed = Table("File", "Object", "Errors", "Warnings", "Findings")
    for one in validated:
        if not one.is_dicom:
            printed.add_row(str(one.path), "not DICOM", "", "", "", style="dim")
            continue
        told = Counter(finding for finding in one.findings if show_allowed or finding.severity is not Severity.ALLOWED)
        lines = [f"[{_STYLES[finding.severity]}]{escape(finding.text)}[/]" + _times(n) for finding, n in told.items()]
        errors, warned = one.count(Severity.ERROR), one.count(Severity.WARNING) + one.count(Severity.SOURCE)
        printed.add_row(str(one.path), one.kind, str(errors), str(warned), "\n".join(lines) or "-")
    return printed


def _times(count: int) -> str:
    return f" ({count} times)" if count > 1 else ""


def _kind(path: Path) -> str:
    with values_as_they_are():  # warnings would quote values
        try:
            header = dcmread(path, specific_tags=["SOPClassUID"], stop_before_pixels=True)
            uid = header.get("SOPClassUID") or header.file_meta.get("MediaStorageSOPClassUID", "")
            return UID(str(uid)).name or "no SOP class"
        except InvalidDicomError:
            return "not DICOM"
        except MALFORMED:
            return "unreadable"
