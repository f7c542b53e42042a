"""Copied attributes: character sets are decoded as declared, values are written only when they are valid."""

from __future__ import annotations

import pytest

from service.report.attributes import Charset, decoded, uid_is_valid, valid

# PS3.5 annexes H, I, J, K and the single-byte sets of 6.1.2.3; with the name as it must arrive
NAMES = [
    (["ISO_IR 100"], "Buc^J\xe9r\xf4me".encode("latin-1"), "Buc^Jérôme"),
    (["ISO_IR 101"], "Wa\xb3\xeasa".encode("latin-1"), "Wałęsa"),
    (["ISO_IR 126"], b"\xc4\xe9\xef\xed\xf5\xf3\xe9\xef\xf2", "Διονυσιος"),
    (["ISO_IR 127"], b"\xe2\xc8\xc7\xe6\xea^\xe4\xe6\xd2\xc7\xd1", "قباني^لنزار"),
    (["ISO_IR 138"], b"\xf9\xf8\xe5\xef^\xe3\xe1\xe5\xf8\xe4", "שרון^דבורה"),
    (["ISO_IR 144"], b"\xbb\xee\xda\x63\x65\xdc\xd1\x79\x70\xd3", "Люкceмбypг"),
    (["ISO_IR 148"], "\xd6zt\xfcrk".encode("latin-1"), "Öztürk"),
    (["ISO_IR 166"], b"\xca\xc1\xaa\xd2\xc2", "สมชาย"),
    (["GB18030"], b"Wang^XiaoDong=\xcd\xf5^\xd0\xa1\xb6\xab=", "Wang^XiaoDong=王^小东"),
    (["GBK"], b"Wang^XiaoDong=\xcd\xf5^\xd0\xa1\xb6\xab", "Wang^XiaoDong=王^小东"),
    (["ISO_IR 192"], "Wang^XiaoDong=王^小東".encode(), "Wang^XiaoDong=王^小東"),
    (
        ["", "ISO 2022 IR 87"],
        b"Yamada^Tarou=\x1b$B;3ED\x1b(B^\x1b$BB@O:\x1b(B=\x1b$B$d$^$@\x1b(B^\x1b$B$?$m$&\x1b(B",
        "Yamada^Tarou=山田^太郎=やまだ^たろう",
    ),
    (
        ["ISO 2022 IR 13", "ISO 2022 IR 87"],
        b"\xd4\xcf\xc0\xde^\xc0\xdb\xb3=\x1b$B;3ED\x1b(J^\x1b$BB@O:\x1b(J=\x1b$B$d$^$@\x1b(J^\x1b$B$?$m$&\x1b(J",
        "ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎=やまだ^たろう",
    ),
    (
        ["", "ISO 2022 IR 149"],
        b"Hong^Gildong=\x1b$)C\xfb\xf3^\x1b$)C\xd1\xce\xd4\xd7=\x1b$)C\xc8\xab^\x1b$)C\xb1\xe6\xb5\xbf",
        "Hong^Gildong=洪^吉洞=홍^길동",
    ),
    (
        ["", "ISO 2022 IR 58"],
        b"Zhang^XiaoDong=\x1b$)A\xd5\xc5^\x1b$)A\xd0\xa1\xb6\xab=",
        "Zhang^XiaoDong=张^小东",
    ),
]


@pytest.mark.parametrize(("declared", "content", "name"), NAMES, ids=[",".join(case[0]) for case in NAMES])
def test_names_of_every_character_set_arrive_intact(declared: list[str], content: bytes, name: str) -> None:
    """A person name is decoded by its declared sets, code extensions and component groups included."""
    text, assumed = decoded(content, "PN", Charset.of(declared, "ISO_IR 100"))

    assert text is not None
    assert valid("PN", text) == name
    assert not assumed


@pytest.mark.parametrize("declared", [[""], ["ISO_IR 6"], ["ISO_IR 9999"], ["", "ISO 2022 IR 87"]])
def test_undeclared_text_is_read_by_the_default_and_says_so(declared: list[str]) -> None:
    """8-bit bytes under no set, or an unknown one, are never guessed silently."""
    text, assumed = decoded("Müller".encode("latin-1"), "PN", Charset.of(declared, "ISO_IR 100"))

    assert (text, assumed) == ("Müller", True)


def test_text_that_breaks_its_declared_set_is_read_by_the_default() -> None:
    """Latin-1 bytes under a declared UTF-8 are read by the default, and say so."""
    assert decoded("Müller".encode("latin-1"), "LO", Charset.of(["ISO_IR 192"], "ISO_IR 100")) == ("Müller", True)


def test_text_that_no_set_explains_is_given_up() -> None:
    """Never a replacement character in its place."""
    assert decoded(b"M\xfcller", "PN", Charset.of([""], "ISO_IR 192")) == (None, True)


def test_plain_ascii_needs_no_character_set() -> None:
    """An unknown set harms nothing where no 8-bit byte stands."""
    assert decoded(b"Miller ", "PN", Charset.of(["nonsense"], "ISO_IR 100")) == ("Miller", False)


@pytest.mark.parametrize("spelling", ["ISO-IR 100", "ISO IR 100", "iso_ir 100"])
def test_common_misspellings_of_a_set_are_understood(spelling: str) -> None:
    """A misspelling with one possible meaning is not an assumption."""
    charset = Charset.of([spelling], "ISO_IR 192")

    assert decoded("Müller".encode("latin-1"), "PN", charset) == ("Müller", False)


VALUES = [
    ("DA", "20240229", "20240229"),
    ("DA", "", ""),
    ("DA", "1999.12.31", "19991231"),
    ("DA", "20230229", None),
    ("DA", "19991332", None),
    ("DA", "00010101", None),
    ("DA", "yesterday", None),
    ("TM", "1015", "1015"),
    ("TM", "101500.123456", "101500.123456"),
    ("TM", "10:15:00", "101500"),
    ("TM", "10:15", "1015"),
    ("TM", "2515", None),
    ("TM", "1015.5", None),
    ("CS", "m ", "M"),
    ("CS", "a-b", None),
    ("LO", "x" * 64, "x" * 64),
    ("LO", "ä" * 64, "ä" * 64),
    ("LO", "x" * 65, None),
    ("LO", "a\\b", None),
    ("LO", "a\nb", None),
    ("SH", "x" * 17, None),
    ("PN", "A^B^C^D^E", "A^B^C^D^E"),
    ("PN", "A^B^C^D^E^F", None),
    ("PN", "A=B=C=D", None),
    ("PN", "ä" * 65, None),
    ("PN", "A^B==", "A^B"),
    ("AS", "045Y", "045Y"),
    ("AS", "45", None),
    ("DS", "79.5", "79.5"),
    ("DS", "79,5", None),
    ("DS", "1" * 17, None),
    ("TZ", "+0100", "+0100"),
    ("TZ", "+1500", None),
    ("UI", "1.2.840", "1.2.840"),
    ("UI", "1.02", None),
]


@pytest.mark.parametrize(("vr", "text", "form"), VALUES)
def test_value_is_written_only_in_a_valid_form(vr: str, text: str, form: str | None) -> None:
    """A value that breaks its VR is given up; where today's form is certain, it is used."""
    assert valid(vr, text) == form


def test_enumerated_values_are_held() -> None:
    """Patient's Sex U is a CS, and still not one of M, F, O."""
    assert valid("CS", "U", frozenset({"M", "F", "O"})) is None


@pytest.mark.parametrize(
    ("uid", "is_valid"),
    [
        ("1.2.0", True),
        ("2.999.1", True),
        ("0.39", True),
        ("1.2.03", False),
        ("1..2", False),
        ("1.2." + "3" * 61, False),
        ("3.1.2", False),
        ("1.40.1", False),
        ("0.0", False),
    ],
)
def test_form_of_a_uid(uid: str, is_valid: bool) -> None:
    """PS3.5 9.1."""
    assert uid_is_valid(uid) is is_valid
