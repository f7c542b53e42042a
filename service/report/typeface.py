"""Text of any script -> runs that an embedded font can show, in the order in which they are read on paper.

A character that no font here holds is written as its code point, [U+0E2A], never as `?` or an empty box. Scripts that
need shaping beyond Arabic's joining (Devanagari and its like) are written so too. Knows nothing of reports.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path
from xml.sax.saxutils import escape

import arabic_reshaper
from reportlab.pdfbase import pdfmetrics
from reportlab.pdfbase.ttfonts import TTFError, TTFont

# In order of preference: Latin, Greek, Cyrillic, Hebrew, Arabic; Han, Kana, Hangul; Thai
_FILES = {
    "Sans": "/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf",
    "SansBold": "/usr/share/fonts/truetype/dejavu/DejaVuSans-Bold.ttf",
    "Asian": "/usr/share/fonts-droid-fallback/truetype/DroidSansFallback.ttf",
    "Thai": "/usr/share/fonts/truetype/noto/NotoSansThai-Regular.ttf",
}
# Debian's; Bitstream Vera licence, Apache-2.0, OFL
_PACKAGES = {
    "Sans": "fonts-dejavu-core",
    "SansBold": "fonts-dejavu-core",
    "Asian": "fonts-droid-fallback",
    "Thai": "fonts-noto-core",
}
_WITH_THE_LIBRARY = {"Sans": "Vera.ttf", "SansBold": "VeraBd.ttf"}  # Latin-1 alone
_RIGHT_TO_LEFT = ("R", "AL")


@cache
def fonts() -> dict[str, frozenset[int]]:
    """The fonts found on this machine, registered, each with the code points that it holds."""
    found = {}
    for name, path in _FILES.items():
        for file in (path, _WITH_THE_LIBRARY.get(name, "")):
            if not file or (file == path and not Path(path).is_file()):
                continue
            try:
                font = TTFont(name, file)
            except (TTFError, OSError):
                continue
            pdfmetrics.registerFont(font)
            found[name] = frozenset(font.face.charToGlyph)
            break
    pdfmetrics.registerFontFamily("Sans", normal="Sans", bold="SansBold", italic="Sans", boldItalic="SansBold")
    return found


def missing_packages() -> list[str]:
    """Debian's packages for want of which some script will be written as code points."""
    return list(dict.fromkeys(_PACKAGES[name] for name, path in _FILES.items() if not Path(path).is_file()))


@lru_cache(maxsize=4096)
def markup(text: str, *, bold: bool = False) -> str:
    """`text` for a Paragraph of reportlab in the font `Sans`, other fonts named where it lacks a glyph."""
    parts = []
    for font, run in _runs(_in_reading_order(text), bold):
        escaped = escape(run)
        parts.append(escaped if font == "Sans" else f'<font name="{font}">{escaped}</font>')
    return "".join(parts)


def _runs(text: str, bold: bool) -> Iterator[tuple[str, str]]:
    for font, characters in groupby(text, key=lambda character: _font_of(character, bold)):
        run = "".join(characters)
        if font:
            yield font, run
        else:
            yield ("SansBold" if bold else "Sans"), "".join(f"[U+{ord(character):04X}]" for character in run)


def _font_of(character: str, bold: bool) -> str:
    if bold and ord(character) in fonts().get("SansBold", ()):
        return "SansBold"
    return next((name for name, held in fonts().items() if name != "SansBold" and ord(character) in held), "")


def _in_reading_order(text: str) -> str:
    """Runs from right to left turned round, Arabic letters joined; numbers in them stay as they are.

    A plain form of the Unicode Bidirectional Algorithm (UAX 9) for lines of one direction with names in another.
    """
    if not any(unicodedata.bidirectional(character) in _RIGHT_TO_LEFT for character in text):
        return text
    joined = str(_joiner().reshape(text))
    kinds = [_direction(character) for character in joined]
    # What has no direction of its own between two letters of one direction has theirs
    for place, kind in enumerate(kinds):
        if not kind:
            before = next((one for one in reversed(kinds[:place]) if one), "L")
            after = next((one for one in kinds[place + 1 :] if one), "L")
            kinds[place] = "R" if before[0] == after[0] == "R" else "L"
    turned = []
    for right_to_left, members in groupby(zip(joined, kinds, strict=True), key=lambda one: one[1] == "R"):
        characters = [character for character, _ in members]
        turned.append("".join(_mirrored(one) for one in reversed(characters)) if right_to_left else "".join(characters))
    return "".join(turned)


def _direction(character: str) -> str:
    kind = unicodedata.bidirectional(character)
    if kind in _RIGHT_TO_LEFT or kind == "NSM":
        return "R"
    return "L" if kind in ("L", "EN", "AN") else ""


def _mirrored(character: str) -> str:
    return {"(": ")", ")": "(", "[": "]", "]": "[", "<": ">", ">": "<"}.get(character, character)


@cache
def _joiner() -> arabic_reshaper.ArabicReshaper:
    return arabic_reshaper.ArabicReshaper(configuration={"delete_harakat": False, "support_ligatures": True})
