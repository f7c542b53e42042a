"""Headers of one series -> one stack of slices in order, or a refusal. Pure geometry of PS3.3 C.7.6.2.

Stack order is head to feet for axial slices, front to back for coronal, right to left for sagittal ones; positions
are measured along the normal that points that way, so they always increase.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.shared.settings import SeriesSettings
from workers.errors import Refusal, RefusalCode
from workers.headers import InstanceHeader

STRAY_FRACTION = 0.1  # above this share of images that do not fit, the series is not one stack
SAME_ORIENTATION_COS = np.cos(np.radians(1.0))
SAME_POSITION_MM = 0.02  # scanners write positions with two or three decimals
GAP_FACTOR = 1.5  # of the median spacing; more than that is a missing slice
TILT_DEG = 1.0  # shear of 1 degree moves 300 mm of body by 5 mm

IMAGE_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.2": "CT",
    "1.2.840.10008.5.1.4.1.1.2.1": "Enhanced CT",
    "1.2.840.10008.5.1.4.1.1.2.2": "Legacy Converted Enhanced CT",
    "1.2.840.10008.5.1.4.1.1.4": "MR",
    "1.2.840.10008.5.1.4.1.1.4.1": "Enhanced MR",
    "1.2.840.10008.5.1.4.1.1.4.4": "Legacy Converted Enhanced MR",
}
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
# Words of ImageType (0008,0008), beside the Standard's own, as Siemens, GE, Philips and Canon write them.
_LOCALIZER = re.compile(r"LOCALI[ZS]ER|SCOUT|TOPOGRAM|SURVEY|SCANOGRAM|SURVIEW|SCANPLAN")
_SCREEN = re.compile(r"SCREEN|DOSE[ _]?(INFO|REPORT|SHEET)|PROT(OCOL)?\b|CAPTURE|BOLUS|SMARTPREP")
_DERIVED = re.compile(
    r"\b(MPR|CPR|MIP|MINIP|MNIP|AVERAGE IP|PROJECTION IMAGE|REFORMATTED|VOLREND|VRT|SSD|RENDERING|SUBTRACTION"
    r"|ADC|TRACEW|CBF|CBV|MTT|TTP|TMAX|PASTED|COMPOSED)\b"
)
_HOUNSFIELD_TYPES = ("", "HU", "HU_MOD", "US")  # US: unspecified, yet HU in every original CT image (C.8.2.1)


@dataclass(frozen=True, slots=True)
class Slice:
    """One position of the stack; the first header is the one to use, the others are there too."""

    position_mm: float
    headers: tuple[InstanceHeader, ...]


@dataclass(frozen=True, slots=True)
class Stack:
    """What of a series can be stacked, in order, and why the rest cannot."""

    slices: tuple[Slice, ...]
    other_volumes: tuple[InstanceHeader, ...]  # of another phase, echo, b-value ... at the same positions
    left_out: tuple[tuple[InstanceHeader, str], ...]
    normal: tuple[float, ...]  # unit vector in patient coordinates, the way the stack runs

    @property
    def reference(self) -> InstanceHeader:
        """A header whose size, orientation and pixel spacing hold for every slice."""
        return self.slices[0].headers[0]

    @property
    def positions_mm(self) -> NDArray[np.float64]:
        return np.array([entry.position_mm for entry in self.slices])

    @property
    def off_axial_deg(self) -> float:
        return float(np.degrees(np.arccos(min(1.0, abs(self.normal[2])))))

    @property
    def tilt_deg(self) -> float:
        """Angle between the normal and the line on which the slices lie; 0 when they are not sheared."""
        first, last = (np.array(self.slices[end].headers[0].position) for end in (0, -1))
        along = last - first
        length = float(np.linalg.norm(along))
        if length < SAME_POSITION_MM:
            return 0.0
        return float(np.degrees(np.arccos(np.clip(along @ np.array(self.normal) / length, -1, 1))))


def arrange(headers: Iterable[InstanceHeader]) -> Stack:
    """Sort out what is no slice of the series' main stack and put the rest in order; raise Refusal if there is none.

    Localizers, screen captures and derived images are left out in any number. Images with another size, orientation
    or scale, or without them, are left out up to a tenth of the images; above that the series is refused.
    """
    images, left_out = _without(headers, _foreign)
    if not images:
        raise _refusal(RefusalCode.NO_SUITABLE_SERIES, left_out)
    for test, code in (
        (_misplaced, RefusalCode.NOT_A_STACK),
        (_unscaled, RefusalCode.NO_HOUNSFIELD_UNITS),
    ):
        fitting, strays = _without(images, test)
        if len(strays) > STRAY_FRACTION * len(images):
            raise _refusal(code, strays)
        images, left_out = fitting, left_out + strays
    groups = _by_geometry(images)
    if len(images) - len(groups[0]) > STRAY_FRACTION * len(images):
        raise Refusal(
            RefusalCode.NOT_A_STACK,
            f"{len(groups)} different orientations, image sizes or frames of reference in one series",
        )
    strays = [(header, "other orientation or size than the series") for group in groups[1:] for header in group]
    normal = _normal(groups[0][0])
    chosen, others = _one_volume([(float(np.dot(normal, h.position or ())), h) for h in groups[0]])
    return Stack(_slices(chosen), others, tuple(left_out + strays), tuple(float(n) for n in normal))


def require_complete(positions_mm: NDArray[np.float64], settings: SeriesSettings) -> None:
    """Raise Refusal for too few slices, or for a gap through which a whole organ could be missed."""
    if len(positions_mm) < settings.min_slices:
        raise Refusal(
            RefusalCode.TOO_FEW_SLICES,
            f"{len(positions_mm)} slices at distinct positions, series.min_slices asks for {settings.min_slices}",
        )
    widest = float(np.diff(positions_mm).max(initial=0))
    if widest > settings.max_gap_mm:
        raise Refusal(
            RefusalCode.MISSING_SLICES,
            f"a gap of {widest:.0f} mm in the stack, series.max_gap_mm allows {settings.max_gap_mm:g}",
        )


def spacing_mm(positions_mm: NDArray[np.float64]) -> float:
    """The median distance between neighbours; 0 for a single slice."""
    return float(np.median(np.diff(positions_mm))) if len(positions_mm) > 1 else 0.0


def gaps(positions_mm: NDArray[np.float64]) -> tuple[int, ...]:
    """Indices i such that slices are missing between i and i + 1."""
    wide = np.diff(positions_mm) > GAP_FACTOR * spacing_mm(positions_mm)
    return tuple(int(index) for index in np.flatnonzero(wide))


def _foreign(header: InstanceHeader) -> str | None:
    """Why an object is not an image of a stack at all."""
    words = " ".join(header.image_type).upper()
    if not header.readable:
        return "not readable as DICOM"
    if header.sop_class_uid.startswith(_SECONDARY_CAPTURE) or _SCREEN.search(words):
        return "screen capture or dose sheet"
    if header.sop_class_uid not in IMAGE_CLASSES:
        return "not a CT or MR image object"
    if (header.samples_per_pixel or 1) != 1:
        return "colour image"
    if _LOCALIZER.search(words):
        return "localizer"
    original = not header.image_type or header.image_type[0] == "ORIGINAL" or _only_compressed(header)
    if not original or "SECONDARY" in header.image_type[1:2] or _DERIVED.search(words):
        return "derived image (reformat, projection or map)"
    return None


def _only_compressed(header: InstanceHeader) -> bool:
    """Lossy compression alone turns ORIGINAL into DERIVED (PS3.3 C.7.6.1.1.2) and leaves the slice where it was."""
    return header.compressed_with_loss and header.image_type[1:3] == ("PRIMARY", "AXIAL")


def _misplaced(header: InstanceHeader) -> str | None:
    if header.frame_number is None and header.number_of_frames > 1:
        return "multi-frame object without a position for each frame"
    if header.position is None or header.orientation is None:
        return "no slice position or orientation in the header"
    if not header.rows or not header.columns or header.pixel_spacing is None:
        return "no image size or pixel spacing in the header"
    return None


def _unscaled(header: InstanceHeader) -> str | None:
    if header.modality != "CT":
        return None
    if not header.rescale_slope or header.rescale_intercept is None:
        return "no rescale to Hounsfield units in the header"
    if header.rescale_type not in _HOUNSFIELD_TYPES:
        return "pixel values are not Hounsfield units"
    return None


def _without(
    headers: Iterable[InstanceHeader], test: Callable[[InstanceHeader], str | None]
) -> tuple[list[InstanceHeader], list[tuple[InstanceHeader, str]]]:
    fitting, strays = [], []
    for header in headers:
        reason = test(header)
        if reason is None:
            fitting.append(header)
        else:
            strays.append((header, reason))
    return fitting, strays


def _refusal(code: RefusalCode, strays: Sequence[tuple[InstanceHeader, str]]) -> Refusal:
    """The reasons with their counts, the most frequent first."""
    counts = Counter(reason for _, reason in strays).most_common()
    if len(counts) == 1:
        return Refusal(code, counts[0][0])
    return Refusal(code, ", ".join(f"{count} x {reason}" for reason, count in counts) or "no images")


def _by_geometry(headers: Sequence[InstanceHeader]) -> list[list[InstanceHeader]]:
    """Groups of the same size, spacing, frame of reference and orientation; the largest first."""
    groups: dict[object, list[tuple[NDArray[np.float64], list[InstanceHeader]]]] = {}
    for header in headers:
        spacing = tuple(round(value, 3) for value in header.pixel_spacing or ())
        key = (header.rows, header.columns, spacing, header.frame_of_reference_uid)
        cosines = np.array(header.orientation).reshape(2, 3)
        for reference, members in groups.setdefault(key, []):
            if np.all((reference * cosines).sum(axis=1) >= SAME_ORIENTATION_COS):
                members.append(header)
                break
        else:
            groups[key].append((cosines, [header]))
    found = [members for alike in groups.values() for _, members in alike]
    return sorted(found, key=len, reverse=True)


def _normal(header: InstanceHeader) -> NDArray[np.float64]:
    """Row x column, turned to run to the feet, the back or the left, whichever it follows most (LPS axes)."""
    cosines = np.array(header.orientation)
    normal = np.cross(cosines[:3], cosines[3:])
    axis = int(np.argmax(np.abs(normal)))
    way = -1.0 if axis == 2 else 1.0
    return normal if normal[axis] * way > 0 else -normal


_VolumeKey = tuple[tuple[bool, Any], ...]
_Placed = tuple[float, InstanceHeader]


def _volume_key(header: InstanceHeader) -> _VolumeKey:
    """What tells several volumes of one series apart; sorts, with absent values last."""
    hints = (
        header.acquisition_number, header.temporal_position, header.stack_id, header.echo_time_ms,
        header.b_value, header.image_type,
    )  # fmt: skip
    return tuple((hint is None, 0 if hint is None else hint) for hint in hints)


def _one_volume(placed: Sequence[_Placed]) -> tuple[list[_Placed], tuple[InstanceHeader, ...]]:
    """Take one volume of a series that holds several over the same range (phases, echoes, b-values).

    A series whose positions never crowd is one volume, whatever its numbers say: sequential CT counts an acquisition
    per table position, interleaved MR one per package. Otherwise volumes are told apart by their acquisition
    attributes; of those that span the range the one with most slices is taken, the first of equals, and with it
    what continues it beyond its ends. Where none spans the range, only repeated positions are told apart.
    """
    everything = sorted(placed, key=lambda entry: entry[0])
    volumes: dict[_VolumeKey, list[_Placed]] = {}
    for entry in everything:
        volumes.setdefault(_volume_key(entry[1]), []).append(entry)
    extent = everything[-1][0] - everything[0][0]
    spanning = [
        (-len(_slices(volume)), key)
        for key, volume in volumes.items()
        if volume[-1][0] - volume[0][0] >= (1 - STRAY_FRACTION) * extent
    ]
    if len(volumes) == 1 or not spanning or not _crowds(everything):
        return everything, ()
    best = volumes[min(spanning)[1]]
    top, bottom = best[0][0] - SAME_POSITION_MM, best[-1][0] + SAME_POSITION_MM
    beyond = [v for v in volumes.values() if v[-1][0] < top or v[0][0] > bottom]
    chosen = sorted((entry for volume in (best, *beyond) for entry in volume), key=lambda entry: entry[0])
    taken = {id(header) for _, header in chosen}
    return chosen, tuple(header for _, header in everything if id(header) not in taken)


def _crowds(placed: Sequence[_Placed]) -> bool:
    """Whether positions repeat, or lie so unevenly that two volumes may interleave."""
    steps = np.diff([position for position, _ in placed])
    return len(steps) > 0 and bool(steps.min() < 0.6 * np.quantile(steps, 0.9))


def _slices(placed: Sequence[_Placed]) -> tuple[Slice, ...]:
    """Merge what lies at one position; the lowest volume and instance number is the one to use."""
    merged: list[list[_Placed]] = []
    for entry in placed:
        if merged and entry[0] - merged[-1][0][0] <= SAME_POSITION_MM:
            merged[-1].append(entry)
        else:
            merged.append([entry])
    return tuple(
        Slice(alike[0][0], tuple(sorted((header for _, header in alike), key=_preference))) for alike in merged
    )


def _preference(header: InstanceHeader) -> tuple[Any, ...]:
    number = header.instance_number
    return (
        *_volume_key(header), number is None, number or 0, header.sop_instance_uid, header.frame_number or 0,
        str(header.path),
    )  # fmt: skip
