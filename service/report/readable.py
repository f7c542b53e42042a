"""SR document -> plain text for people at a terminal. Reads any SR; knows nothing of how ours are built."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pydicom.dataset import Dataset

_TITLES = {"111028", "126010"}  # image library, imaging measurements: tables, after the text


def walk(item: Dataset) -> Iterator[Dataset]:
    """The item and everything below it, in document order."""
    yield item
    for child in item.get("ContentSequence") or []:
        yield from walk(child)


def readable(document: Dataset) -> str:
    """Title, header, text, then who observed what, then measurements and codes; nothing is wrapped."""
    lines = [_meaning(document).upper() or "STRUCTURED REPORT", ""]
    lines += [f"{name:<14}{value}".rstrip() for name, value in _header(document)]
    children = list(document.get("ContentSequence") or [])
    for item in children:
        if item.ValueType == "CONTAINER" and _code(item) not in _TITLES:
            lines += _section(item)
    context = [line for item in children if item.ValueType != "CONTAINER" for line in _line(item, 0)]
    lines += _headed("Context", context) if context else []
    for item in children:
        if item.ValueType == "CONTAINER" and _code(item) in _TITLES:
            lines += _section(item)
    return "\n".join(lines) + "\n"


def _header(document: Dataset) -> Iterator[tuple[str, str]]:
    yield "Patient", f"{document.get('PatientName', '')} ({document.get('PatientID', '')})".strip()
    study = " ".join(str(document.get(part) or "") for part in ("StudyDate", "StudyTime", "StudyDescription"))
    yield "Study", study.strip()
    yield "Accession", str(document.get("AccessionNumber") or "-")
    yield "Report", f"{document.get('ContentDate', '')} {document.get('ContentTime', '')}".strip()
    flags = ("VerificationFlag", "PreliminaryFlag", "CompletionFlag")
    yield "Status", ", ".join(str(document.get(flag)) for flag in flags if document.get(flag))
    yield "Instance", str(document.get("SOPInstanceUID", ""))


def _section(container: Dataset) -> Iterator[str]:
    yield from _headed(_meaning(container), _items(container))


def _headed(heading: str, lines: Iterable[str]) -> Iterator[str]:
    yield ""
    yield heading
    yield "-" * len(heading)
    yield from lines


def _items(container: Dataset) -> Iterator[str]:
    """The items of a section; texts under the same heading stand together."""
    previous = ""
    for item in container.get("ContentSequence") or []:
        if item.ValueType == "TEXT":
            heading = _meaning(item)
            if heading != previous:
                yield f"{heading}:"
            yield from (f"  {line}" for line in str(item.TextValue).splitlines())
            previous = heading
        else:
            yield from _line(item, 0)


def _line(item: Dataset, depth: int) -> Iterator[str]:
    """One item with its children below it; images are counted, not listed."""
    indent = "  " * depth
    children = list(item.get("ContentSequence") or [])
    images = [child for child in children if child.ValueType in ("IMAGE", "COMPOSITE")]
    if item.ValueType == "CONTAINER":
        yield f"{indent}{_meaning(item)}"
    elif item.ValueType not in ("IMAGE", "COMPOSITE"):
        first, *rest = _value(item).splitlines() or [""]
        yield f"{indent}{_meaning(item)}: {first}"
        yield from (f"{indent}  {line}" for line in rest)
    for child in children:
        if child not in images:
            yield from _line(child, depth + 1)
    if images:
        noun = "image" if len(images) == 1 else "images"
        yield f"{indent}  {_meaning(images[0])}: {len(images)} {noun}"


def _value(item: Dataset) -> str:
    match item.ValueType:
        case "CODE":
            return _text_of(item.ConceptCodeSequence[0])
        case "NUM":
            if not item.get("MeasuredValueSequence"):
                return "-"
            measured = item.MeasuredValueSequence[0]
            unit = measured.MeasurementUnitsCodeSequence[0]
            name = "" if unit.CodeValue == "1" else f" {unit.CodeMeaning}"
            return f"{measured.NumericValue}{name}"
        case "TEXT":
            return str(item.TextValue)
        case "UIDREF":
            return str(item.UID)
        case "PNAME":
            return str(item.PersonName)
        case "DATETIME" | "DATE" | "TIME" as kind:
            return str(item.get({"DATETIME": "DateTime", "DATE": "Date", "TIME": "Time"}[kind], ""))
        case _:
            return str(item.ValueType)


def _text_of(code: Dataset) -> str:
    return str(code.get("CodeMeaning", "") or code.get("CodeValue", ""))


def _meaning(item: Dataset) -> str:
    names = item.get("ConceptNameCodeSequence")
    return _text_of(names[0]) if names else ""


def _code(item: Dataset) -> str:
    names = item.get("ConceptNameCodeSequence")
    return str(names[0].get("CodeValue", "")) if names else ""
