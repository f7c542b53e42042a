"""Valid conversations with a receiver as trees, and seeded mutations of their structure. Sends nothing.

A tree's lengths are right until a mutation makes one wrong. `random.Random` and hypothesis' `randoms()` both drive it.
"""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
)

from service.commitment_answers import PUSH_MODEL, PUSH_MODEL_INSTANCE

SYNTAXES = (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    JPEG2000Lossless,
)
VERIFICATION = "1.2.840.10008.1.1"
COMMITMENT_CONTEXTS = {13: "implicit", 15: "explicit"}  # presentation context -> how a data set is encoded there
UNDEFINED = 0xFFFFFFFF
SHORT_VRS = ("UI", "CS", "LO", "PN", "DA", "US", "IS", "DS", "SH", "UL", "AT", "FD", "AE", "TM")
LONG_VRS = ("OB", "OW", "UN", "UT", "SQ", "OF", "UC", "UR")
LENGTHS = (0, 1, 2, 0xFF, 0x7FFF, 0xFFFE, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFE, UNDEFINED)
TEXTS = (
    b"",
    b"\0",
    b" ",
    b"../../x",
    b"/etc/passwd",
    b"1." * 40,
    b"1" * 65,
    b"9" * 1000,
    b"0.00.1",
    b".1.2.",
    b"1..2",
    b"\xff\xfe\xfd",
    b"1.2\0.3",
    b"1.2\n.3",
    b"1.2\\1.3",
    "1.２".encode(),
    b"%s%n",
)


@dataclass(slots=True)
class Node:
    """One length-prefixed thing: a PDU, an item of one, a data element, an item of a sequence."""

    form: str  # pdu, item, implicit, explicit, big
    tag: int  # PDU or item type; group << 16 | element
    body: bytes = b""  # what stands before the children, or all there is
    children: list[Node] = field(default_factory=list)
    vr: str = ""
    length: int | None = None  # instead of the right one


def encode(node: Node) -> bytes:
    content = node.body + b"".join(encode(child) for child in node.children)
    length = len(content) if node.length is None else node.length
    if node.form == "pdu":
        return struct.pack(">BBL", node.tag & 0xFF, 0, length & UNDEFINED) + content
    if node.form == "item":
        return struct.pack(">BBH", node.tag & 0xFF, 0, length & 0xFFFF) + content
    order = ">" if node.form == "big" else "<"
    tag = struct.pack(order + "HH", node.tag >> 16 & 0xFFFF, node.tag & 0xFFFF)
    if node.form == "implicit" or not node.vr:
        return tag + struct.pack(order + "L", length & UNDEFINED) + content
    if node.vr in LONG_VRS:
        return tag + node.vr.encode() + b"\0\0" + struct.pack(order + "L", length & UNDEFINED) + content
    return tag + node.vr.encode("ascii", "replace")[:2] + struct.pack(order + "H", length & 0xFFFF) + content


# --- valid things ----------------------------------------------------------------------------------------------------


def association(calling_ae: bytes = b"FUZZ", called_ae: bytes = b"MEDPRUNER") -> Node:
    """An A-ASSOCIATE-RQ: context 1 for C-ECHO, then one for CT in each of SYNTAXES, then two for storage commitment
    (PS3.8 9.3.2, PS3.7 annex D)."""
    contexts = [_context(1, VERIFICATION, [ImplicitVRLittleEndian])]
    contexts += [_context(3 + 2 * number, CTImageStorage, [syntax]) for number, syntax in enumerate(SYNTAXES)]
    contexts += [
        _context(13, PUSH_MODEL, [ImplicitVRLittleEndian]),
        _context(15, PUSH_MODEL, [ExplicitVRLittleEndian]),
    ]
    user = [
        Node("item", 0x51, struct.pack(">L", 16382)),
        Node("item", 0x52, b"1.2.826.0.1.3680043.10.9"),
        Node("item", 0x53, struct.pack(">HH", 1, 1)),
        Node("item", 0x54, struct.pack(">H", len(CTImageStorage)) + CTImageStorage.encode() + b"\1\0"),
        Node("item", 0x55, b"FUZZ_1"),
        Node("item", 0x58, b"\1\0" + struct.pack(">H", 4) + b"user" + struct.pack(">H", 0)),
    ]
    fixed = struct.pack(">HH", 1, 0) + called_ae.ljust(16)[:16] + calling_ae.ljust(16)[:16] + bytes(32)
    return Node(
        "pdu", 1, fixed, [Node("item", 0x10, b"1.2.840.10008.3.1.1.1"), *contexts, Node("item", 0x50, b"", user)]
    )


def _context(context_id: int, abstract_syntax: str, syntaxes: list[str]) -> Node:
    items = [Node("item", 0x30, abstract_syntax.encode())] + [Node("item", 0x40, uid.encode()) for uid in syntaxes]
    return Node("item", 0x20, bytes([context_id, 0, 0, 0]), items)


def store_command(uid: str, message_id: int) -> list[Node]:
    """The elements of a C-STORE-RQ (PS3.7 9.3.1.1), without the group length."""
    return [
        _command(0x0002, _even(CTImageStorage)),
        _command(0x0100, b"\1\0"),
        _command(0x0110, struct.pack("<H", message_id)),
        _command(0x0700, b"\0\0"),
        _command(0x0800, b"\1\0"),
        _command(0x1000, _even(uid)),
    ]


def echo_command(message_id: int) -> list[Node]:
    return [
        _command(0x0002, _even(VERIFICATION)),
        _command(0x0100, b"\x30\0"),
        _command(0x0110, struct.pack("<H", message_id)),
        _command(0x0800, b"\1\1"),
    ]


def action_command(message_id: int) -> list[Node]:
    """The elements of an N-ACTION-RQ that asks for storage commitment (PS3.7 10.3.5.1, PS3.4 J.3.2)."""
    return [
        _command(0x0003, _even(PUSH_MODEL)),
        _command(0x0100, b"\x30\1"),
        _command(0x0110, struct.pack("<H", message_id)),
        _command(0x0800, b"\1\0"),
        _command(0x1001, _even(PUSH_MODEL_INSTANCE)),
        _command(0x1008, b"\1\0"),
    ]


def action_information(form: str, transaction_uid: str, uids: Sequence[str]) -> list[Node]:
    """A request for the commitment of these CT images (PS3.4 table J.3-1)."""

    def element(tag: int, vr: str, value: bytes, children: Sequence[Node] = ()) -> Node:
        return Node(form, tag, value, list(children), "" if form == "implicit" else vr)

    items = [
        Node(
            form,
            0xFFFEE000,
            children=[element(0x00081150, "UI", _even(CTImageStorage)), element(0x00081155, "UI", _even(uid))],
        )
        for uid in uids
    ]
    return [element(0x00081195, "UI", _even(transaction_uid)), element(0x00081199, "SQ", b"", items)]


def _command(element: int, value: bytes) -> Node:
    return Node("implicit", element, value)


def data_set(form: str, study_uid: str, uid: str, *, long_header: bool, encapsulated: bool) -> list[Node]:
    """A small CT; with a long header the UIDs of study and series lie beyond what is read at first."""

    def element(tag: int, vr: str, value: bytes) -> Node:
        return Node(form, tag, value, [], "" if form == "implicit" else vr)

    referenced = Node(form, 0xFFFEE000, b"", [element(0x00081150, "UI", _even(CTImageStorage))], "")
    nested = Node(form, 0x00081140, b"", [referenced], "" if form == "implicit" else "SQ")
    order = ">" if form == "big" else "<"
    number = [struct.pack(order + "H", value) for value in (1, 8, 16, 15, 0)]
    elements = [
        element(0x00080016, "UI", _even(CTImageStorage)),
        element(0x00080018, "UI", _even(uid)),
        element(0x00080060, "CS", b"CT"),
        nested,
        element(0x00090010, "LO", b"FUZZ"),
        element(0x00091001, "UN", bytes(20_000 if long_header else 8)),
        element(0x00100010, "PN", b"Fuzz^Patient"),
        element(0x00100020, "LO", b"FUZZ-1"),
        element(0x0020000D, "UI", _even(study_uid)),
        element(0x0020000E, "UI", _even(study_uid + ".1")),
        element(0x00280002, "US", number[0]),
        element(0x00280010, "US", number[1]),
        element(0x00280011, "US", number[1]),
        element(0x00280100, "US", number[2]),
    ]
    if encapsulated:
        items = [Node(form, 0xFFFEE000, b"", [], ""), Node(form, 0xFFFEE000, bytes(64), [], "")]
        end = Node(form, 0xFFFEE0DD, b"", [], "")
        return [*elements, Node(form, 0x7FE00010, b"", [*items, end], "OB", UNDEFINED)]
    return [*elements, element(0x7FE00010, "OW", bytes(128))]


def _even(text: str) -> bytes:
    value = text.encode()
    return value + b"\0" * (len(value) % 2)


# --- mutations -------------------------------------------------------------------------------------------------------


def mutate(nodes: list[Node], chance: random.Random) -> None:
    """Change one node of the forest, or its place."""
    places = _places(nodes)
    if not places:
        return
    siblings, index = chance.choice(places)
    chance.choice(_MUTATIONS)(siblings, index, chance)


def _places(nodes: list[Node]) -> list[tuple[list[Node], int]]:
    found: list[tuple[list[Node], int]] = []
    waiting = [nodes]
    while waiting:
        siblings = waiting.pop()
        for index, node in enumerate(siblings):
            found.append((siblings, index))
            if node.children:
                waiting.append(node.children)
    return found


def _wrong_length(siblings: list[Node], index: int, chance: random.Random) -> None:
    siblings[index].length = chance.choice(LENGTHS)


def _length_off(siblings: list[Node], index: int, chance: random.Random) -> None:
    node = siblings[index]
    node.length = max(0, len(encode(Node("implicit", 0, node.body, node.children))) - 8 + chance.randint(-9, 9))


def _other_tag(siblings: list[Node], index: int, chance: random.Random) -> None:
    node = siblings[index]
    node.tag = chance.choice([node.tag ^ (1 << chance.randint(0, 31)), chance.getrandbits(32), 0xFFFEE00D, 0xFFFEE000])


def _other_vr(siblings: list[Node], index: int, chance: random.Random) -> None:
    siblings[index].vr = chance.choice([*SHORT_VRS, *LONG_VRS, "??", "zz", ""])


def _other_form(siblings: list[Node], index: int, chance: random.Random) -> None:
    siblings[index].form = chance.choice(["implicit", "explicit", "big"])


def _remove(siblings: list[Node], index: int, _: random.Random) -> None:
    del siblings[index]


def _repeat(siblings: list[Node], index: int, chance: random.Random) -> None:
    """The copies share their children: to copy what was nested again and again would go too deep."""
    siblings[index:index] = [
        replace(siblings[index], children=list(siblings[index].children)) for _ in range(chance.choice([1, 1, 2, 130]))
    ]


def _swap(siblings: list[Node], index: int, chance: random.Random) -> None:
    other = chance.randrange(len(siblings))
    siblings[index], siblings[other] = siblings[other], siblings[index]


def _other_text(siblings: list[Node], index: int, chance: random.Random) -> None:
    siblings[index].body = chance.choice(TEXTS)


def _noise(siblings: list[Node], index: int, chance: random.Random) -> None:
    node = siblings[index]
    node.body = bytes(chance.getrandbits(8) for _ in range(min(len(node.body), 64) or chance.randint(1, 16)))


def _cut(siblings: list[Node], index: int, chance: random.Random) -> None:
    node = siblings[index]
    node.body = node.body[: chance.randint(0, len(node.body))]


def _flip(siblings: list[Node], index: int, chance: random.Random) -> None:
    node = siblings[index]
    if node.body:
        place = chance.randrange(len(node.body))
        changed = bytes([node.body[place] ^ (1 << chance.randint(0, 7))])
        node.body = node.body[:place] + changed + node.body[place + 1 :]


def _nest(siblings: list[Node], index: int, chance: random.Random) -> None:
    """Wrap it in sequences within sequences, of undefined or of right length."""
    inner = siblings[index]
    form = inner.form if inner.form in ("implicit", "explicit", "big") else "explicit"
    length = chance.choice([None, UNDEFINED])
    for _ in range(chance.choice([1, 3, 40])):
        item = Node(form, 0xFFFEE000, b"", [inner], "", length)
        inner = Node(form, 0x00081115, b"", [item], "" if form == "implicit" else "SQ", length)
    siblings[index] = inner


def _inflate(siblings: list[Node], index: int, chance: random.Random) -> None:
    siblings[index].body += bytes(chance.choice([100, 5_000, 70_000]))


_MUTATIONS: list[Callable[[list[Node], int, random.Random], None]] = [
    _wrong_length,
    _length_off,
    _other_tag,
    _other_vr,
    _other_form,
    _remove,
    _repeat,
    _swap,
    _other_text,
    _noise,
    _cut,
    _flip,
    _nest,
    _inflate,
]


# --- a conversation --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Conversation:
    """All that one peer sends, and the data sets in it as far as its bytes were not touched afterwards."""

    content: bytes
    data_sets: tuple[bytes, ...]
    is_intact: bool  # the bytes are those of the trees: what is acknowledged is one of `data_sets`
    actions: int  # how many requests for storage commitment are in it, whatever became of them
    asked: dict[str, tuple[str, ...]]  # of those whose data set is as it should be: transaction -> instances


def converse(number: int, chance: random.Random) -> Conversation:
    """Conversation `number`: an association, some messages, most of it valid, and now and then rubbish."""
    request = [association()]
    if chance.random() < 0.25:
        for _ in range(chance.randint(1, 4)):
            mutate(request, chance)
    pieces = [encode(node) for node in request]
    data_sets, actions, asked = [], 0, dict[str, tuple[str, ...]]()
    for message_id in range(chance.randint(1, 3)):
        uid, study_uid = f"1.2.826.0.1.3680043.10.7.{number}.{message_id}", f"1.2.826.0.1.3680043.10.7.{number % 50}"
        if chance.random() < 0.1:
            pieces += _fragments(_command_set(_mutated(echo_command(message_id), chance)), 1, True, chance)
            continue
        if chance.random() < 0.15:
            context_id, form = chance.choice(sorted(COMMITMENT_CONTEXTS.items()))
            uids = tuple(f"{uid}.{place}" for place in range(chance.choice([1, 2, 50])))
            information = action_information(form, uid, uids)
            valid = b"".join(encode(node) for node in information)
            content = b"".join(encode(node) for node in _mutated(information, chance))
            actions += 1
            if content == valid:
                asked[uid] = uids
            pieces += _fragments(_command_set(_mutated(action_command(message_id), chance)), context_id, True, chance)
            pieces += _fragments(content, context_id, False, chance)
            continue
        which = chance.randrange(len(SYNTAXES))
        form = {ImplicitVRLittleEndian: "implicit", ExplicitVRBigEndian: "big"}.get(SYNTAXES[which], "explicit")
        encapsulated = SYNTAXES[which] == JPEG2000Lossless
        elements = data_set(form, study_uid, uid, long_header=chance.random() < 0.1, encapsulated=encapsulated)
        content = b"".join(encode(node) for node in _mutated(elements, chance))
        if SYNTAXES[which] == DeflatedExplicitVRLittleEndian:
            content = zlib.compress(content)[2:-4]
            content += b"\0" * (len(content) % 2)
        data_sets.append(content)
        context_id = 3 + 2 * which if chance.random() < 0.97 else chance.randint(0, 255)
        pieces += _fragments(_command_set(_mutated(store_command(uid, message_id), chance)), context_id, True, chance)
        pieces += _fragments(content, context_id, False, chance)
    pieces.append(chance.choice([struct.pack(">BxLxxxx", 5, 4)] * 4 + [struct.pack(">BxLxxxx", 7, 4), b""]))
    is_intact = True
    if chance.random() < 0.3:
        is_intact = False
        pieces = _spoiled(pieces, chance)
    return Conversation(b"".join(pieces), tuple(data_sets), is_intact, actions, asked)


def _mutated(nodes: list[Node], chance: random.Random) -> list[Node]:
    if chance.random() < 0.5:
        for _ in range(chance.choice([1, 1, 1, 2, 4])):
            mutate(nodes, chance)
    return nodes


def _command_set(elements: list[Node]) -> bytes:
    content = b"".join(encode(node) for node in elements)
    return struct.pack("<HHLL", 0, 0, 4, len(content)) + content


def _fragments(content: bytes, context_id: int, is_command: bool, chance: random.Random) -> list[bytes]:
    """P-DATA-TF PDUs: whole, in two, or in many pieces, some of them empty; sometimes two values in one PDU."""
    size = chance.choice([len(content), len(content), max(1, len(content) // 2), 100, 16_000]) or 1
    parts = [content[start : start + size] for start in range(0, len(content), size)][:400] or [b""]
    if sum(map(len, parts)) < len(content):
        parts[-1] += content[sum(map(len, parts)) :]
    if chance.random() < 0.1:
        parts.insert(chance.randrange(len(parts)), b"")
    values = [
        struct.pack(">LBB", len(part) + 2, context_id, is_command | (number == len(parts)) << 1) + part
        for number, part in enumerate(parts, 1)
    ]
    if len(values) > 1 and len(values[0]) + len(values[1]) < 60_000 and chance.random() < 0.3:
        values[:2] = [values[0] + values[1]]
    return [struct.pack(">BxL", 4, len(value)) + value for value in values]


def _spoiled(pieces: list[bytes], chance: random.Random) -> list[bytes]:
    """Order, repetition, truncation and bits of the PDUs themselves."""
    how = chance.randrange(6)
    place = chance.randrange(len(pieces))
    if how == 0:
        chance.shuffle(pieces)
    elif how == 1:
        pieces.insert(place, pieces[chance.randrange(len(pieces))])
    elif how == 2:
        del pieces[place]
    elif how == 3:
        pieces[place] = pieces[place][: chance.randint(0, len(pieces[place]))]
    elif how == 4 and pieces[place]:
        spoiled = bytearray(pieces[place])
        for _ in range(chance.randint(1, 4)):
            spoiled[chance.randrange(min(len(spoiled), 40))] = chance.getrandbits(8)
        pieces[place] = bytes(spoiled)
    else:
        pieces.insert(place, bytes(chance.getrandbits(8) for _ in range(chance.randint(1, 40))))
    return pieces
