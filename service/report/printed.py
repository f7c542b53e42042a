"""AnalysisOutput, source headers and some pictures -> the report as PDF bytes, for people who see nothing else.

The same words as the Structured Report, the impression first. Same input and same fonts, same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Picture
from reportlab.lib import colors
from reportlab.lib.pagesizes import A4
from reportlab.lib.styles import ParagraphStyle
from reportlab.lib.units import mm
from reportlab.pdfgen.canvas import Canvas
from reportlab.platypus import (
    BaseDocTemplate,
    Flowable,
    Frame,
    Image,
    KeepTogether,
    PageBreak,
    PageTemplate,
    Paragraph,
    Spacer,
    Table,
)

from service.report import words
from service.report.header import MODEL_NAME, local_time
from service.report.identity import RunIdentity
from service.report.source import SourceStudy
from service.report.typeface import fonts, markup
from service.shared.messages import AnalysisOutput, Flag
from service.shared.settings import ReportSettings

BANNER = "UNVERIFIED machine output, not for diagnosis"
PICTURES = 12  # on the page of slices, at most
_COLUMNS = 3
_MARGIN = 16 * mm
_BAND = 9 * mm  # of the banner on every page
_WIDTH = A4[0] - 2 * _MARGIN
_RED = colors.HexColor("#8c1d18")
_GREY = colors.HexColor("#555555")
_LINE = colors.HexColor("#bbbbbb")
_TEXT = ParagraphStyle("text", fontName="Sans", fontSize=9.5, leading=13.5, spaceAfter=3)
_SMALL = ParagraphStyle("small", _TEXT, fontSize=7.5, leading=10)
_HEADING = ParagraphStyle("heading", _TEXT, fontName="SansBold", fontSize=11.5, leading=15, spaceBefore=9, spaceAfter=3)
_TITLE = ParagraphStyle("title", _HEADING, fontSize=16, leading=20, spaceBefore=0)
_STRONG = ParagraphStyle("strong", _TEXT, fontName="SansBold", fontSize=10.5, leading=15)

RGB = NDArray[np.uint8]  # (rows, columns, 3)
_FUNNEL = {
    "slices_in_series": "Slices in the series",
    "slices_readable": "of these readable",
    "slices_sampled": "of these in some input of the model",
    "inputs": "Model inputs before pruning",
    "inputs_kept": "Model inputs encoded",
    "tokens_in": "Image tokens before pruning",
    "tokens_kept": "Image tokens given to the language model",
    "tokens_merged": "Image tokens merged into those",
}


def print_report(
    output: AnalysisOutput,
    source: SourceStudy,
    settings: ReportSettings,
    pictures: Mapping[str, RGB],
    *,
    unlisted: int,
    run: RunIdentity,
) -> bytes:
    """The PDF. pictures: of the retention map, by caption, in stack order; `unlisted` as words.comments has it."""
    fonts()  # registers them
    buffer = BytesIO()
    title = settings.series_description
    document = BaseDocTemplate(
        buffer,
        pagesize=A4,
        invariant=1,  # no time of making, no chance
        title=title,
        author=MODEL_NAME,
        subject=BANNER,
        leftMargin=_MARGIN,
        rightMargin=_MARGIN,
    )
    frame = Frame(_MARGIN, _MARGIN + 4 * mm, _WIDTH, A4[1] - 2 * _MARGIN - _BAND, 0, 0, 0, 0)
    template = PageTemplate("page", [frame], onPage=lambda canvas, _: _draw_frame(canvas, source))
    document.addPageTemplates([template])
    flow: list[Flowable] = [_paragraph(title, _TITLE)]
    flow += [_facts(_header(source, output, run)), Spacer(0, 3 * mm)]
    flow += _text(output, unlisted, run)
    flow += _numbers(output)
    flow += _pictures(pictures)
    document.build(flow, canvasmaker=_Counted)
    return buffer.getvalue()


def _draw_frame(canvas: Canvas, source: SourceStudy) -> None:
    """Banner above and, below, whose report this is: pages get apart."""
    width, height = A4
    canvas.saveState()
    canvas.setFillColor(_RED)
    canvas.rect(0, height - _BAND, width, _BAND, stroke=0, fill=1)
    canvas.setFillColor(colors.white)
    canvas.setFont("SansBold", 11)
    canvas.drawCentredString(width / 2, height - _BAND + 2.9 * mm, BANNER)
    canvas.setStrokeColor(_LINE)
    canvas.line(_MARGIN, _MARGIN, width - _MARGIN, _MARGIN)
    name, number = _plain(source, "PatientName"), _plain(source, "PatientID")
    foot = _paragraph(f"{_person(name)} · {number} · {MODEL_NAME}, research software, not a medical device", _SMALL)
    _, height = foot.wrap(_WIDTH - 20 * mm, 10 * mm)
    foot.drawOn(canvas, _MARGIN, _MARGIN - 1.5 * mm - height)
    canvas.restoreState()


class _Counted(Canvas):  # type: ignore[misc]
    """Says on every page how many there are, which is known after the last one: pages are finished then."""

    def __init__(self, *arguments: Any, **names: Any) -> None:
        super().__init__(*arguments, **names)
        self._drawn: list[dict[str, Any]] = []

    def showPage(self) -> None:  # the library's name
        self._drawn.append(dict(self.__dict__))
        self._startPage()

    def save(self) -> None:
        for number, page in enumerate(self._drawn, 1):
            self.__dict__.update(page)
            self.setFillColor(_GREY)
            self.setFont("Sans", 7.5)
            self.drawRightString(A4[0] - _MARGIN, _MARGIN - 4 * mm, f"page {number} of {len(self._drawn)}")
            super().showPage()
        super().save()


def _header(source: SourceStudy, output: AnalysisOutput, run: RunIdentity) -> Iterator[tuple[str, str]]:
    read = local_time(source, run)
    yield "Patient", _person(_plain(source, "PatientName"))
    yield "Patient ID", _plain(source, "PatientID")
    born, sex = _date(_plain(source, "PatientBirthDate")), _plain(source, "PatientSex")
    yield "Born, sex", ", ".join(filter(None, (born, sex)))
    yield "Study", " ".join(filter(None, (_plain(source, "StudyDescription"), _date(_plain(source, "StudyDate")))))
    yield "Accession number", _plain(source, "AccessionNumber")
    yield "Referred by", _person(_plain(source, "ReferringPhysicianName"))
    if Flag.NOT_ANALYSED in output.flags:
        yield "Refused by", f"{MODEL_NAME} {output.software_version}, {read:%Y-%m-%d %H:%M}"
    else:
        yield "Read by", f"{output.model.name} with {MODEL_NAME} {output.software_version}, {read:%Y-%m-%d %H:%M}"


def _text(output: AnalysisOutput, unlisted: int, run: RunIdentity) -> Iterator[Flowable]:
    yield _paragraph("Impression", _HEADING)
    first, *rest = words.impression(output).split("\r\n")
    warning = Table([[_paragraph(first, _STRONG)]], colWidths=[_WIDTH])
    warning.setStyle([("BOX", (0, 0), (-1, -1), 1.2, _RED), ("LEFTPADDING", (0, 0), (-1, -1), 6)])
    yield warning
    yield Spacer(0, 2 * mm)
    yield from (_paragraph(text, _TEXT) for text in rest)
    yield _paragraph("Findings", _HEADING)
    yield from (_paragraph(text, _TEXT) for text in words.findings(output))
    if output.limitations:
        yield _paragraph("Limits of the model", _HEADING)
        yield from (_paragraph(text, _TEXT) for text in words.limitations(output))
    comments = words.comments(output, run.revision_note, unlisted)
    if comments:
        yield _paragraph("What was read", _HEADING)
        yield from (_paragraph(text, _TEXT) for text in comments)


def _numbers(output: AnalysisOutput) -> Iterator[Flowable]:
    if Flag.NOT_ANALYSED in output.flags:
        return
    counts = output.counts.model_dump()
    rows = [(said, f"{counts[field]}") for field, said in _FUNNEL.items()]
    yield KeepTogether([_paragraph("What the model was given", _HEADING), _facts(rows, narrow=True)])
    if output.retention.coverage:
        shown: list[Sequence[str]] = [("Region", "image tokens", "given to the language model", "share")]
        for one in output.retention.coverage:
            share = f"{one.tokens_kept / one.tokens_total:.0%}" if one.tokens_total else "-"
            shown.append((one.region, str(one.tokens_total), str(one.tokens_kept), share))
        yield KeepTogether([_paragraph("Coverage by region", _HEADING), _grid(shown)])
    settings = [(name, _said(value)) for name, value in sorted(output.pruning.items())]
    yield _paragraph("Settings of the pruning, as applied", _HEADING)
    yield _facts(settings, narrow=True)
    yield _paragraph("Everything else that decided the text", _HEADING)
    yield _paragraph(words.parameters(output), _SMALL)


def _pictures(pictures: Mapping[str, RGB]) -> Iterator[Flowable]:
    if not pictures:
        return
    width = _WIDTH / _COLUMNS
    cells = []
    for said, picture in pictures.items():
        rows, columns = picture.shape[:2]
        scale = min((width - 4 * mm) / columns, 48 * mm / rows)
        cells.append([_image(picture, columns * scale, rows * scale), _paragraph(said, _SMALL)])
    grid = [cells[start : start + _COLUMNS] for start in range(0, len(cells), _COLUMNS)]
    grid[-1] += [[] for _ in range(_COLUMNS - len(grid[-1]))]
    table = Table(grid, colWidths=[width] * _COLUMNS)
    table.setStyle([("VALIGN", (0, 0), (-1, -1), "TOP"), ("LEFTPADDING", (0, 0), (-1, -1), 0)])
    yield PageBreak()
    yield _paragraph("Slices, and what of them was given to the model", _HEADING)
    yield _paragraph(words.LEGEND, _SMALL)
    yield Spacer(0, 2 * mm)
    yield table


def _image(picture: RGB, width: float, height: float) -> Image:
    stored = BytesIO()
    Picture.fromarray(picture).save(stored, "JPEG", quality=85)
    stored.seek(0)
    return Image(stored, width, height)


def _facts(rows: Sequence[tuple[str, str]] | Iterator[tuple[str, str]], *, narrow: bool = False) -> Table:
    """Names and values in two columns."""
    style = _SMALL if narrow else _TEXT
    content = [[_paragraph(name, style), _paragraph(value or "-", style)] for name, value in rows]
    first = 62 * mm if narrow else 34 * mm
    table = Table(content, colWidths=[first, _WIDTH - first], hAlign="LEFT")
    padding = [("TOPPADDING", (0, 0), (-1, -1), 0), ("BOTTOMPADDING", (0, 0), (-1, -1), 0.6)]
    table.setStyle([*padding, ("LEFTPADDING", (0, 0), (0, -1), 0), ("VALIGN", (0, 0), (-1, -1), "TOP")])
    return table


def _grid(rows: Sequence[Sequence[str]]) -> Table:
    content: list[list[Any]] = [[_paragraph(cell, _SMALL) for cell in row] for row in rows]
    table = Table(content, colWidths=[_WIDTH * share for share in (0.34, 0.2, 0.3, 0.16)], hAlign="LEFT")
    table.setStyle([("LINEBELOW", (0, 0), (-1, -1), 0.4, _LINE), ("LINEBELOW", (0, 0), (-1, 0), 0.9, _GREY)])
    return table


def _paragraph(text: str, style: ParagraphStyle) -> Paragraph:
    return Paragraph(markup(text, bold=style.fontName == "SansBold"), style)


def _plain(source: SourceStudy, keyword: str) -> str:
    value = source.attributes.get(keyword, "")
    return value if isinstance(value, str) else ""


def _person(name: str) -> str:
    """Every component group, in the order of the DICOM name, without its delimiters."""
    groups = [" ".join(filter(None, group.split("^"))) for group in name.split("=")]
    return " / ".join(filter(None, groups)) or "-"


def _date(value: str) -> str:
    return f"{value[:4]}-{value[4:6]}-{value[6:]}" if len(value) == 8 else value


def _said(value: object) -> str:
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)
