"""What a power cut may leave of a folder: the calls of a trace, and every state that drops what was not flushed.

Reads what `strace -f -y -xx` wrote. Data and names are flushed apart, as POSIX has it: fsync of a file makes its
content durable and not its name, fsync of a folder the names in it. A rename is a new name and the end of an old one;
the end may be lost, the new name alone may not. Knows nothing of DICOM.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

CALLS = (
    "openat,open,creat,write,pwrite64,writev,lseek,ftruncate,fallocate,fsync,fdatasync,"
    "rename,renameat,renameat2,link,linkat,mkdir,mkdirat,unlink,unlinkat,rmdir,sendto"
)
_TOKEN = re.compile(r'"((?:\\x[0-9a-f]{2})*)"|(-?\w+)<((?:\\x[0-9a-f]{2})*)>|([\w|]+)')
_WHOLE = re.compile(r"(\w+\(.*)\)\s+= (-?\d+|\?).*")
_UNKNOWN = {"writev", "fallocate", "creat"}  # effects that this model does not have: better to fail than to overlook


class NotModelled(Exception):
    """The traced program changed the folder by a call that this model does not know."""


@dataclass(frozen=True, slots=True)
class Call:
    """One finished system call. `began` counts the calls before it that had finished when it was entered."""

    name: str
    arguments: tuple[str | bytes, ...]  # text and paths as bytes, numbers and flags as text; for fds their paths
    descriptor: str  # the first argument's number, where it is one
    result: int
    process: str
    began: int


def read_trace(lines: Iterator[str]) -> Iterator[Call]:
    """The calls in the order in which they returned; `sendto` where it was entered: from then on its peer may know."""
    begun: dict[str, tuple[str, int]] = {}
    told = 0
    for line in lines:
        process, _, rest = line.rstrip("\n").partition(" ")
        rest = rest.lstrip()
        if rest.endswith("<unfinished ...>"):
            text = rest.removesuffix("<unfinished ...>").rstrip()
            begun[process] = (text, told)
            if text.startswith("sendto("):
                yield _call(process, text, "0", told)
                told += 1
            continue
        began = told
        if rest.startswith("<... "):
            text, began = begun.pop(process, ("", 0))
            rest = text + " " + rest.partition(" resumed>")[2]
            if text.startswith("sendto(") or not text:
                continue
        whole = _WHOLE.fullmatch(rest)
        if whole is None:
            continue  # signals, exits
        yield _call(process, whole[1], whole[2], began)
        told += 1


def _call(process: str, text: str, result: str, began: int) -> Call:
    name, _, rest = text.partition("(")
    arguments: list[str | bytes] = []
    descriptor = ""
    for quoted, number, path, word in _TOKEN.findall(rest):
        if number:
            descriptor = descriptor or number
            arguments.append(_bytes(path))
        elif word:
            arguments.append(word)
        else:
            arguments.append(_bytes(quoted))
    return Call(name, tuple(arguments), descriptor, int(result) if result.lstrip("-").isdigit() else 0, process, began)


def _bytes(escaped: str) -> bytes:
    return bytes.fromhex(escaped.replace("\\x", ""))


@dataclass(slots=True)
class Effect:
    """One change that a power cut may undo as long as it is not durable."""

    at: int  # number of its call
    durable: bool = False


@dataclass(slots=True)
class Write(Effect):
    offset: int = 0
    content: bytes = b""  # with truncate: none
    truncate: bool = False


@dataclass(slots=True)
class Name(Effect):
    """A name in a folder appears (target) or goes (None)."""

    folder: str = ""
    name: str = ""
    target: int | None = None
    only_after: Name | None = None  # the end of an old name never survives without the new one


class Keep(Enum):
    """What becomes of the unflushed bytes of a file whose write is kept."""

    ALL = "all"
    ZEROS = "zeros"  # the length and not the bytes
    HALF = "half"  # the first half of each write


class Disk:
    """The files and folders under `root`, with everything that is not durable yet."""

    def __init__(self, root: Path) -> None:
        self._root = str(root)
        self._folders: dict[int, list[Name]] = {0: []}
        self._current: dict[str, int] = {"": 0}  # relative path -> file or folder, as a running program sees it
        self._is_folder = {0}
        self._next = 1
        self._content: dict[int, list[Write]] = {}
        self._offsets: dict[tuple[str, int], int] = {}  # (descriptor, file)

    def apply(self, number: int, call: Call) -> bool:
        """Carry out a call that succeeded; whether it changed anything under the root, or made it durable."""
        if call.result < 0:
            return False
        paths = [path for one in call.arguments if isinstance(one, bytes) and (path := self._inside(one)) is not None]
        if not paths and call.name not in ("write", "lseek"):
            return False
        handler: Callable[[int, Call, list[str]], bool] | None = getattr(self, f"_{call.name}", None)
        if handler is None:
            if call.name in _UNKNOWN and paths:
                raise NotModelled(f"{call.name} of {paths[0]}")
            return False
        return handler(number, call, paths)

    def _inside(self, path: bytes) -> str | None:
        text = path.decode("utf-8", "replace").removesuffix(" (deleted)")
        if text == self._root:
            return ""
        return text.removeprefix(self._root + "/") if text.startswith(self._root + "/") else None

    # --- calls ---

    def _openat(self, number: int, call: Call, paths: list[str]) -> bool:
        path, flags = paths[0], next(one for one in call.arguments if isinstance(one, str) and one.startswith("O_"))
        changed = False
        if path not in self._current and "O_CREAT" in flags:
            self._add_name(number, path, self._new_file())
            changed = True
        target = self._current.get(path)
        if target is None:
            return changed
        self._offsets[str(call.result), target] = 0
        if "O_TRUNC" in flags and self._content.get(target):
            self._content[target].append(Write(number, truncate=True))
            changed = True
        return changed

    _open = _openat

    def _write(self, number: int, call: Call, paths: list[str]) -> bool:
        if not paths or self._inside(_path_of(call)) is None:
            return False
        target = self._current.get(paths[0])
        if target is None:
            return False  # it was removed meanwhile; nobody can find these bytes
        place = self._offsets.get((call.descriptor, target), 0)
        content = next(one for one in call.arguments[1:] if isinstance(one, bytes))[: call.result]
        self._content[target].append(Write(number, offset=place, content=content))
        self._offsets[call.descriptor, target] = place + len(content)
        return True

    def _pwrite64(self, number: int, call: Call, paths: list[str]) -> bool:
        target = self._current.get(paths[0])
        if target is None:
            return False
        content = next(one for one in call.arguments[1:] if isinstance(one, bytes))[: call.result]
        self._content[target].append(Write(number, offset=int(str(call.arguments[-1])), content=content))
        return True

    def _lseek(self, _number: int, call: Call, paths: list[str]) -> bool:
        if paths and (target := self._current.get(paths[0])) is not None:
            self._offsets[call.descriptor, target] = call.result
        return False

    def _ftruncate(self, number: int, call: Call, paths: list[str]) -> bool:
        if int(str(call.arguments[-1])) != 0:
            raise NotModelled("ftruncate to another length than 0")
        self._content[self._current[paths[0]]].append(Write(number, truncate=True))
        return True

    def _fsync(self, _number: int, call: Call, paths: list[str]) -> bool:
        target = self._current.get(paths[0])
        if target is None:
            return False
        effects: list[Write] | list[Name] = (
            self._folders[target] if target in self._is_folder else self._content[target]
        )
        for effect in effects:
            effect.durable = effect.durable or effect.at < call.began  # what was done before the flush began
        return True

    _fdatasync = _fsync

    def _rename(self, number: int, _call: Call, paths: list[str]) -> bool:
        old, new = paths
        target = self._current[old]
        added = self._add_name(number, new, target)
        self._remove_name(number, old, only_after=added)
        return True

    _renameat = _renameat2 = _rename

    def _link(self, number: int, _call: Call, paths: list[str]) -> bool:
        self._add_name(number, paths[-1], self._current[paths[-2]])
        return True

    _linkat = _link

    def _mkdir(self, number: int, _call: Call, paths: list[str]) -> bool:
        folder = self._next
        self._next += 1
        self._is_folder.add(folder)
        self._folders[folder] = []
        self._add_name(number, paths[-1], folder)
        return True

    _mkdirat = _mkdir

    def _unlink(self, number: int, _call: Call, paths: list[str]) -> bool:
        self._remove_name(number, paths[-1])
        return True

    _unlinkat = _rmdir = _unlink

    def _new_file(self) -> int:
        file = self._next
        self._next += 1
        self._content[file] = []
        return file

    def _add_name(self, number: int, path: str, target: int) -> Name:
        folder, _, name = path.rpartition("/")
        effect = Name(number, folder=folder, name=name, target=target)
        self._folders[self._current[folder]].append(effect)
        self._current[path] = target
        return effect

    def _remove_name(self, number: int, path: str, only_after: Name | None = None) -> None:
        folder, _, name = path.rpartition("/")
        ends = Name(number, folder=folder, name=name, only_after=only_after)
        self._folders[self._current[folder]].append(ends)
        self._current.pop(path, None)

    # --- after a power cut ---

    def pending(self) -> list[Effect]:
        """Everything that a power cut right now may undo."""
        names = [one for names in self._folders.values() for one in names if not one.durable]
        writes = [one for writes in self._content.values() for one in writes if not one.durable]
        return [*names, *writes]

    def leave(self, folder: Path, survives: Callable[[Effect], bool], keep: Keep = Keep.ALL) -> None:
        """Make in `folder` what would be found after a power cut that these effects survive, and the durable ones."""
        made: dict[int, Path] = {}

        def is_kept(effect: Effect) -> bool:
            if isinstance(effect, Name) and effect.only_after is not None and not is_kept(effect.only_after):
                return False
            return effect.durable or survives(effect)

        def fill(number: int, place: Path) -> None:
            place.mkdir(exist_ok=True)
            names: dict[str, int] = {}
            for effect in self._folders[number]:
                if is_kept(effect):
                    if effect.target is None:
                        names.pop(effect.name, None)
                    else:
                        names[effect.name] = effect.target
            for name, target in names.items():
                if target in self._is_folder:
                    fill(target, place / name)
                elif target in made:
                    (place / name).hardlink_to(made[target])
                else:
                    made[target] = place / name
                    made[target].write_bytes(self._bytes_of(target, is_kept, keep))

        fill(0, folder)

    def _bytes_of(self, file: int, is_kept: Callable[[Effect], bool], keep: Keep) -> bytes:
        content = bytearray()
        for write in self._content[file]:
            if not is_kept(write):
                continue
            if write.truncate:
                content.clear()
                continue
            new = write.content
            if not write.durable and keep is Keep.ZEROS:
                new = bytes(len(new))
            if not write.durable and keep is Keep.HALF:
                new = new[: len(new) // 2]
            if len(content) < write.offset:
                content.extend(bytes(write.offset - len(content)))
            content[write.offset : write.offset + len(new)] = new
        return bytes(content)


def _path_of(call: Call) -> bytes:
    """Of the descriptor that the call is about."""
    first = call.arguments[0] if call.arguments else b""
    return first if isinstance(first, bytes) else b""
