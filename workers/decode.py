"""Compressed or native frames -> stored pixel values, in a child process with limits on memory and time.

The child may die of a hostile code stream; the worker may not. A Celery child must not start multiprocessing
children, so it is `python -m workers.decode` through subprocess. Knows nothing of geometry or Hounsfield units.

The child answers one line per frame, so the parent knows which frame killed it: that frame is given up and a fresh
child goes on with the next one. Only the time limit of the whole series is a fault and may be retried.
"""

from __future__ import annotations

import json
import math
import os
import resource
import select
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom import Dataset, dcmread
from pydicom.encaps import get_frame
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import UID

from workers.errors import Refusal, RefusalCode

MAX_FRAME_PIXELS = 4096 * 4096  # no CT or MR matrix comes near
MAX_VOXELS = 2**30  # 4 GiB of float32: 4096 slices of 512 x 512
FRAME_TIMEOUT_S = 30.0  # a slice takes 10 to 50 ms, the start of a child 1 s; the rest is a busy machine
MAX_DEATHS = 8  # of children in one series; then the rest is given up

# The decoder named first is the one measured to be right and fast; the others are tried when it refuses.
PLUGINS: dict[str, tuple[str, ...]] = {
    "1.2.840.10008.1.2.4.50": ("gdcm", "pillow"),  # JPEG baseline, 8 bit
    "1.2.840.10008.1.2.4.51": ("gdcm", "pillow"),  # JPEG extended: 12 bit is refused by both
    "1.2.840.10008.1.2.4.57": ("gdcm",),  # JPEG lossless
    "1.2.840.10008.1.2.4.70": ("gdcm",),  # JPEG lossless, first-order prediction
    "1.2.840.10008.1.2.4.80": ("pyjpegls", "gdcm"),  # JPEG-LS lossless
    "1.2.840.10008.1.2.4.81": ("pyjpegls", "gdcm"),  # JPEG-LS near-lossless
    "1.2.840.10008.1.2.4.90": ("pylibjpeg", "gdcm", "pillow"),  # JPEG 2000 lossless
    "1.2.840.10008.1.2.4.91": ("pylibjpeg", "gdcm", "pillow"),  # JPEG 2000
    "1.2.840.10008.1.2.4.201": ("pylibjpeg",),  # HTJ2K lossless
    "1.2.840.10008.1.2.4.202": ("pylibjpeg",),  # HTJ2K lossless, RPCL
    "1.2.840.10008.1.2.4.203": ("pylibjpeg",),  # HTJ2K
    "1.2.840.10008.1.2.5": ("pylibjpeg", "pydicom"),  # RLE
}
NATIVE = (
    "1.2.840.10008.1.2",  # implicit VR little endian
    "1.2.840.10008.1.2.1",  # explicit VR little endian
    "1.2.840.10008.1.2.1.99",  # deflated explicit VR little endian
    "1.2.840.10008.1.2.2",  # explicit VR big endian
)
_RLE = "1.2.840.10008.1.2.5"


@dataclass(frozen=True, slots=True)
class EncodedFrame:
    """Where the pixels of one slice are; `index` counts the frames of the instance from 0."""

    path: Path
    index: int


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """stored: (N, rows, columns) int32, stored values as in the data set; zeros where the frame failed.

    faults: index of a frame that failed -> the reason, fit for the audit.
    """

    stored: NDArray[np.int32]
    faults: dict[int, str]


class DecoderFault(RuntimeError):
    """The decoding process could not be started or ran out of its time; a retry may do better."""


class _Unreadable(Exception):
    """The reason, in our own words: exceptions of decoders quote values."""


def require_size(frames: int, rows: int, columns: int) -> None:
    """Raise Refusal before anything is decoded that would not fit; the header's own sizes are the measure."""
    if rows * columns > MAX_FRAME_PIXELS:
        raise Refusal(RefusalCode.TOO_LARGE, f"{columns} x {rows} pixels per slice; {MAX_FRAME_PIXELS} are allowed")
    if frames * rows * columns > MAX_VOXELS:
        raise Refusal(
            RefusalCode.TOO_LARGE, f"{frames} slices of {columns} x {rows} pixels; {MAX_VOXELS} voxels are allowed"
        )


def decode(
    frames: Sequence[EncodedFrame],
    rows: int,
    columns: int,
    *,
    timeout_s: float,
    memory_bytes: int,
    command: Sequence[str] | None = None,
) -> Decoded:
    """Decode every frame that can be decoded; all must measure `rows` x `columns`.

    timeout_s: for all frames together; DecoderFault when it passes. memory_bytes: what the child may
    take beside its own code.
    command: what to start instead of this module, for tests.
    """
    require_size(len(frames), rows, columns)
    deadline = time.monotonic() + timeout_s
    faults: dict[int, str] = {}
    with tempfile.TemporaryFile() as store:  # without a name: nothing stays behind, whoever is killed
        size_bytes = len(frames) * rows * columns * 4
        os.posix_fallocate(store.fileno(), 0, max(1, size_bytes))  # a full disk is a fault here, not of a frame
        request = {
            "rows": rows, "columns": columns, "store": store.fileno(),
            "memory_bytes": memory_bytes, "cpu_s": math.ceil(timeout_s) + 1,
        }  # fmt: skip
        pending, deaths = list(range(len(frames))), 0
        while pending:
            numbered = [(number, str(frames[number].path), frames[number].index) for number in pending]
            child = _start(request | {"frames": numbered}, store.fileno(), command)
            ending = _follow(child, pending, faults, deadline)
            if not pending:
                break
            deaths += 1
            faults[pending.pop(0)] = ending
            if deaths >= MAX_DEATHS:
                faults |= dict.fromkeys(pending, "given up: the decoder had died too often on this series")
                break
        if not frames:
            return Decoded(np.zeros((0, rows, columns), np.int32), {})
        return Decoded(np.memmap(store, "<i4", "r", shape=(len(frames), rows, columns)), faults)


def _start(request: dict[str, Any], store: int, command: Sequence[str] | None) -> subprocess.Popen[bytes]:
    """Start one child. It inherits no secret of our environment, and has no stderr: decoders quote values."""
    root = Path(__file__).resolve().parent.parent
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "TMPDIR") if name in os.environ}
    with tempfile.TemporaryFile() as question:
        question.write(json.dumps(request).encode())
        question.seek(0)
        return subprocess.Popen(
            command or [sys.executable, "-P", "-m", "workers.decode"],
            stdin=question,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=(store,),
            env=kept | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )


def _follow(child: subprocess.Popen[bytes], pending: list[int], faults: dict[int, str], deadline: float) -> str:
    """Take answers until the child ends or hangs; remove what is answered from `pending`.

    Returns what to say of the frame that was being decoded when the child ended.
    """
    assert child.stdout is not None
    ready, ending = False, "the decoder died on it"
    try:
        for line in _lines(child.stdout.fileno(), deadline):
            if line is None:
                if time.monotonic() >= deadline:
                    raise DecoderFault(f"series.decode_timeout_s passed with {len(pending)} frames left")
                ending = f"not decoded within {FRAME_TIMEOUT_S:g} s"
                break
            answer = json.loads(line)
            ready = True
            if "frame" in answer:
                pending.remove(answer["frame"])
                if answer["fault"] is not None:
                    faults[answer["frame"]] = answer["fault"]
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    if not ready:
        raise DecoderFault(f"the decoding process did not start (exit status {child.returncode})")
    return ending


def _lines(descriptor: int, deadline: float) -> Iterator[bytes | None]:
    """Lines as they come; None when there was none for too long, the end of the stream ends it."""
    rest = b""
    while True:
        wait = min(FRAME_TIMEOUT_S, deadline - time.monotonic())
        if wait <= 0 or not select.select([descriptor], [], [], wait)[0]:
            yield None
            return
        chunk = os.read(descriptor, 65536)
        if not chunk:
            return
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines


def main() -> None:
    """The child: read the request from stdin, write each frame to its place in the store and a line to stdout."""
    request = json.load(sys.stdin)
    frames = request["frames"]
    _limit(resource.RLIMIT_CORE, 0)  # a core dump would hold a patient's images
    _limit(resource.RLIMIT_AS, _address_space_bytes() + request["memory_bytes"])
    _limit(resource.RLIMIT_CPU, request["cpu_s"])  # ends a child whose parent was killed while it hung
    _answer(ready=True)
    opened: tuple[str, Dataset] | None = None
    shape = (request["rows"], request["columns"])
    for number, path, index in frames:
        fault = None
        try:
            if opened is None or opened[0] != path:
                opened = None  # let go of the last one before the next is read
                opened = (path, dcmread(path))
            stored = _decode(opened[1], index, shape)
        except _Unreadable as error:
            fault = str(error)
        except Exception as error:  # noqa: BLE001 - one bad frame must not cost the others
            fault = f"pixel data could not be decoded ({type(error).__name__})"
        else:
            os.pwrite(request["store"], stored.tobytes(), number * stored.nbytes)
        _answer(frame=number, fault=fault)


def _answer(**values: object) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def _address_space_bytes() -> int:
    """What Python and the decoders take before any image is read."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value, value) if hard == resource.RLIM_INFINITY else (min(value, hard), hard))


def _decode(dataset: Dataset, index: int, shape: tuple[int, int]) -> NDArray[np.int32]:
    """Return one frame as int32; what the header promises is checked before a decoder sees the data."""
    _check_header(dataset, index, shape)
    syntax = str(dataset.file_meta.get("TransferSyntaxUID", ""))
    if syntax in NATIVE:
        plugins: tuple[str, ...] = ("",)
    elif syntax in PLUGINS:
        plugins = PLUGINS[syntax]
        if syntax != _RLE:
            _check_codestream(_codestream(dataset, index), shape)
    else:
        raise _Unreadable(f"no decoder for transfer syntax {UID(syntax).name}" if syntax else "no transfer syntax")
    pixels = _first_success([partial(_frame, dataset, syntax, index, plugin) for plugin in plugins])
    if pixels.shape != shape:
        raise _Unreadable("decoded to another size than the header's")
    if pixels.dtype.kind not in "iu" or pixels.max(initial=0) > np.iinfo(np.int32).max:
        raise _Unreadable("pixel values do not fit 32 bits")
    return pixels.astype("<i4")


def _frame(dataset: Dataset, syntax: str, index: int, plugin: str) -> NDArray[Any]:
    pixels, _ = get_decoder(syntax).as_array(dataset, index=index, raw=True, decoding_plugin=plugin)
    return pixels


def _first_success(attempts: Sequence[Callable[[], NDArray[Any]]]) -> NDArray[Any]:
    for attempt in attempts[:-1]:
        with suppress(Exception):
            return attempt()
    return attempts[-1]()


def _check_header(dataset: Dataset, index: int, shape: tuple[int, int]) -> None:
    if not len(dataset.get("PixelData", b"") or b""):
        raise _Unreadable("no pixel data")
    if (dataset.Rows, dataset.Columns) != shape:
        raise _Unreadable("another image size than the series")
    if dataset.get("SamplesPerPixel", 1) != 1:
        raise _Unreadable("colour image")
    if dataset.get("PhotometricInterpretation", "MONOCHROME2") not in ("MONOCHROME1", "MONOCHROME2"):
        raise _Unreadable("not a greyscale image")
    if dataset.BitsAllocated not in (8, 16, 32) or not 1 <= dataset.BitsStored <= dataset.BitsAllocated:
        raise _Unreadable("bits allocated and stored do not make sense")
    if dataset.get("HighBit", dataset.BitsStored - 1) != dataset.BitsStored - 1:
        raise _Unreadable("pixels are not right-aligned in their words (HighBit)")
    if index >= int(dataset.get("NumberOfFrames", 1) or 1):
        raise _Unreadable("fewer frames than positions")


def _codestream(dataset: Dataset, index: int) -> bytes:
    frames = int(dataset.get("NumberOfFrames", 1) or 1)
    return bytes(get_frame(dataset.PixelData, index, number_of_frames=frames))


def _check_codestream(encoded: bytes, shape: tuple[int, int]) -> None:
    """Compare the size inside the compressed data with the header's: decoders allocate by the former.

    A JPEG-LS stream without its end keeps CharLS busy for ten seconds, so that is looked for here.
    """
    if encoded.startswith(b"\xff\xd8") and b"\xff\xd9" not in encoded[-16:]:
        raise _Unreadable("the compressed data are cut off")
    size = jpeg2000_size(encoded) or jpeg_size(encoded)
    if size is None:
        raise _Unreadable("compressed data without an image size")
    if size != shape:
        raise _Unreadable("the compressed data have another image size than the header")


def jpeg2000_size(encoded: bytes) -> tuple[int, int] | None:
    """Rows and columns of a JPEG 2000 code stream, bare or in a JP2 file (ISO/IEC 15444-1 A.5.1); else None."""
    start = encoded[:4096].find(b"\xff\x4f\xff\x51")
    if start < 0 or len(encoded) < start + 24:
        return None
    right, bottom, left, top = struct.unpack(">4I", encoded[start + 8 : start + 24])
    return bottom - top, right - left


def jpeg_size(encoded: bytes) -> tuple[int, int] | None:
    """Rows and columns of a JPEG or JPEG-LS code stream, from its frame header (ISO/IEC 10918-1 B.2.2); else None."""
    place = 2 if encoded[:2] == b"\xff\xd8" else len(encoded)
    while place + 9 <= len(encoded) and encoded[place] == 0xFF:
        marker = encoded[place + 1]
        if marker == 0xFF:  # fill byte
            place += 1
            continue
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            rows, columns = struct.unpack(">2H", encoded[place + 5 : place + 9])
            return rows, columns
        place += 2 + struct.unpack(">H", encoded[place + 2 : place + 4])[0]
    return None


if __name__ == "__main__":
    main()
