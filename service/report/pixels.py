"""Source slices as 8-bit grey with their geometry, for pictures of them. Decoded in a child with limits.

Pixel data is hostile until proven otherwise: sizes are checked before decoding, memory and time are bounded,
and what cannot be decoded is one slice less, never a fault. Knows nothing of what the pictures show.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Timer
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_rescale
from pydicom.pixels.utils import pixel_array

from service.report.source import MALFORMED

_MAX_PIXELS = 64 * 1024 * 1024  # of one frame; 8192 x 8192
_CT_WINDOW_HU = (40.0, 400.0)  # centre, width; where the source has none
_PERCENTILES = (1, 99)  # of a frame of another modality without a window


@dataclass(frozen=True, slots=True)
class PixelLimits:
    """Of the child, for all frames together."""

    memory_gb: float = 8
    timeout_s: float = 300


@dataclass(frozen=True, slots=True, eq=False)
class SourceFrame:
    """One slice as it is shown to people.

    grey: (rows, columns) uint8 by the source's own window; None when it could not be decoded.
    position: of the centre of the first pixel, mm; orientation: row then column cosines; spacing: between rows,
    then columns, mm. All three None when the header does not say.
    """

    sop_instance_uid: str
    frame_number: int | None
    grey: NDArray[np.uint8] | None
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    spacing: tuple[float, ...] | None


Wanted = tuple[str, int | None, Path]  # SOP Instance UID, frame number of a multi-frame instance, its file


def read_frames(wanted: Sequence[Wanted], limits: PixelLimits) -> Iterator[SourceFrame]:
    """Decode each wanted frame, in order, one at a time; those that a dying child leaves come without pixels."""
    job = json.dumps([(number, str(path.resolve())) for _, number, path in wanted])
    child = subprocess.Popen(
        [sys.executable, "-m", "service.report.pixels", str(limits.memory_gb)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parents[2],
    )
    assert child.stdin is not None
    assert child.stdout is not None
    end = Timer(limits.timeout_s, child.kill)
    end.daemon = True
    end.start()
    try:
        try:
            child.stdin.write(job.encode())
            child.stdin.close()
        except BrokenPipeError:
            pass  # it died at once; every frame comes without pixels
        for uid, number, _ in wanted:
            yield _receive(child.stdout, uid, number)
    finally:
        end.cancel()
        child.kill()
        child.wait()
        child.stdout.close()


class DecodedOnce:
    """The frames of `wanted`, decoded once for every companion: one looks at all pixels, the others at few or none.

    Iterate over it at most once; what was passed by is kept without pixels, except those that `keep` names.
    """

    def __init__(self, wanted: Sequence[Wanted], limits: PixelLimits, *, keep: Collection[int] = ()) -> None:
        """keep: places in `wanted` whose pixels are wanted again."""
        self._frames = enumerate(read_frames(wanted, limits))
        self._keep = frozenset(keep)
        self._placed: list[SourceFrame] = []
        self._kept: dict[int, SourceFrame] = {}
        self._shapes: set[tuple[int, ...]] = set()

    def __iter__(self) -> Iterator[SourceFrame]:
        for place, frame in self._frames:
            if frame.grey is not None:
                self._shapes.add(frame.grey.shape)
            if place in self._keep:
                self._kept[place] = frame
            self._placed.append(replace(frame, grey=None))
            yield frame

    @property
    def placed(self) -> list[SourceFrame]:
        """Every frame in order, without its pixels."""
        for _ in self:
            pass
        return self._placed

    @property
    def kept(self) -> dict[int, SourceFrame]:
        """The frames that `keep` names, by their place."""
        return self._kept if self.placed else {}

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of every frame; ValueError when none could be decoded, or they differ."""
        if not self.placed or len(self._shapes) != 1:
            raise ValueError("no slice could be decoded, or they differ in size")
        (shape,) = self._shapes
        return shape[0], shape[1]


def _receive(stream: IO[bytes], uid: str, number: int | None) -> SourceFrame:
    line = stream.readline()
    if not line.endswith(b"\n"):
        return SourceFrame(uid, number, None, None, None, None)
    said = json.loads(line)
    grey = None
    if said["shape"] is not None:
        rows, columns = said["shape"]
        content = stream.read(rows * columns)
        if len(content) == rows * columns:
            grey = np.frombuffer(content, np.uint8).reshape(rows, columns)
    geometry = [None if part is None else tuple(part) for part in said["geometry"]]
    return SourceFrame(uid, number, grey, *geometry)


def _decode_all() -> None:
    """The child: a job on stdin, one JSON line and the pixels per frame on stdout."""
    limit = int(float(sys.argv[1]) * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    warnings.simplefilter("ignore")
    for number, path in json.load(sys.stdin):
        try:
            header = dcmread(path, stop_before_pixels=True, force=True)
            geometry = _geometry(header, number)
        except MALFORMED:
            header, geometry = None, (None, None, None)
        grey = None if header is None else _decode(header, Path(path), number)
        said = {"shape": None if grey is None else grey.shape, "geometry": geometry}
        sys.stdout.buffer.write(json.dumps(said).encode() + b"\n")
        if grey is not None:
            sys.stdout.buffer.write(grey.tobytes())
        sys.stdout.buffer.flush()


def _decode(header: Dataset, path: Path, number: int | None) -> NDArray[np.uint8] | None:
    try:
        if int(header.Rows) * int(header.Columns) > _MAX_PIXELS or int(header.get("SamplesPerPixel", 1)) != 1:
            return None
        stored = pixel_array(path, index=None if number is None else number - 1)
        values = _modality_values(stored, header, number)
        return _windowed(values, header, number)
    except (*MALFORMED, RuntimeError, MemoryError, TypeError, IndexError, OSError):
        return None


def _modality_values(stored: NDArray[Any], header: Dataset, number: int | None) -> NDArray[np.float32]:
    transformation = _group(header, number, "PixelValueTransformationSequence") or header
    values = apply_rescale(stored, transformation).astype(np.float32)
    return -values if header.get("PhotometricInterpretation") == "MONOCHROME1" else values


def _windowed(values: NDArray[np.float32], header: Dataset, number: int | None) -> NDArray[np.uint8]:
    window = _group(header, number, "FrameVOILUTSequence") or header
    centre, width = (_first(window.get(keyword)) for keyword in ("WindowCenter", "WindowWidth"))
    inverse = header.get("PhotometricInterpretation") == "MONOCHROME1"
    if centre is not None and width is not None and width >= 1 and not inverse:
        low, high = centre - width / 2, centre + width / 2
    elif header.get("Modality") == "CT" and not inverse:
        low, high = _CT_WINDOW_HU[0] - _CT_WINDOW_HU[1] / 2, _CT_WINDOW_HU[0] + _CT_WINDOW_HU[1] / 2
    else:
        low, high = (float(part) for part in np.percentile(values, _PERCENTILES))
    scaled = (values - low) / max(high - low, 1e-6)
    return np.asarray(np.rint(np.clip(scaled, 0, 1) * 255), np.uint8)


def _geometry(header: Dataset, number: int | None) -> tuple[list[float] | None, ...]:
    places = (
        ("PlanePositionSequence", "ImagePositionPatient", 3),
        ("PlaneOrientationSequence", "ImageOrientationPatient", 6),
        ("PixelMeasuresSequence", "PixelSpacing", 2),
    )
    found = []
    for sequence, keyword, length in places:
        value = (_group(header, number, sequence) or header).get(keyword)
        usable = value is not None and not isinstance(value, str | bytes) and len(value) == length
        found.append([float(part) for part in value] if usable else None)
    return tuple(found)


def _group(header: Dataset, number: int | None, keyword: str) -> Dataset | None:
    """A functional group of one frame, else the shared one (PS3.3 C.7.6.16); None in a classic image."""
    frames = header.get("PerFrameFunctionalGroupsSequence") or []
    own = [frames[number - 1]] if number is not None and number <= len(frames) else []
    for groups in (*own, *(header.get("SharedFunctionalGroupsSequence") or [])):
        if groups.get(keyword):
            item: Dataset = groups[keyword][0]
            return item
    return None


def _first(value: Any) -> float | None:
    if value is None or value == "":
        return None
    return float(value if isinstance(value, int | float | str) else value[0])


if __name__ == "__main__":
    _decode_all()
