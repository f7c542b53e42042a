"""Instances of the chosen series -> one volume in HU, in order, in standard orientation. Knows nothing of models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.shared.messages import Flag, SourceInstance, SourceState
from service.shared.settings import SeriesSettings
from workers.decode import EncodedFrame, decode, require_size
from workers.errors import Refusal, RefusalCode
from workers.headers import InstanceHeader
from workers.stack import TILT_DEG, Slice, Stack, arrange, gaps, require_complete, spacing_mm

AIR_HU = -1024.0
NOT_YET_SAMPLED = SourceState.SAMPLED_OUT  # of a slice of the volume, until preprocessing has chosen the inputs


@dataclass(frozen=True, slots=True, eq=False)
class Volume:
    """One stack of slices.

    voxels: (S, rows, columns) float32; HU for CT, rescaled stored values for MR. Slice 0 is nearest to the head
        (axial; front for coronal, right for sagittal). Rows and columns are turned, never resampled, so that a row
        runs to the patient's left and a column to the back (axial; coronal: left, feet; sagittal: back, feet).
    positions_mm: (S,) along `normal`, strictly increasing; for an axial stack minus the patient's z.
    spacing_mm: median between slices, between rows, between columns.
    orientation: 6 direction cosines of the turned rows and columns.
    source_from_voxel: (2, 3) float64; (column, row, 1) of the turned slice to (x, y) of the source frame, where the
        centre of the first pixel is (0.5, 0.5) in both.
    sources: every instance (or frame) of the series, in stack order; what has no place in it stands at the end.
    slice_sources: (S,) index into sources of the instance that slice s was made of.
    notes: sentences for the report, without patient data.
    """

    voxels: NDArray[np.float32]
    positions_mm: NDArray[np.float64]
    spacing_mm: tuple[float, float, float]
    orientation: tuple[float, ...]
    normal: tuple[float, ...]
    source_from_voxel: NDArray[np.float64]
    modality: str
    series_uid: str
    frame_of_reference_uid: str | None
    sources: tuple[SourceInstance, ...]
    slice_sources: tuple[int, ...]
    flags: tuple[Flag, ...]
    notes: tuple[str, ...]


def load(headers: Sequence[InstanceHeader], settings: SeriesSettings) -> Volume:
    """Load the chosen series from its headers (all of them, of this series alone).

    Raises Refusal where the series is no complete stack, is too large, has too few readable slices or no content;
    DecoderFault or OSError where another attempt may do better.
    """
    stack = arrange(headers)
    reference = stack.reference
    rows, columns = reference.rows or 0, reference.columns or 0
    require_size(len(stack.slices), rows, columns)
    require_complete(stack.positions_mm, settings)
    used, voxels, faults = _decode(stack, rows, columns, settings)
    sources, slice_sources = _sources(stack, used, faults)
    positions = np.array([entry.position_mm for entry, header in zip(stack.slices, used, strict=True) if header])
    if len(positions) < len(stack.slices):
        _require_readable(positions, len(stack.slices), faults, settings)
    if not np.isfinite(voxels).all() or voxels.min() == voxels.max():
        raise Refusal(RefusalCode.NO_CONTENT, "every voxel has the same value, or values are not finite")
    turn = _Turn.of(reference)
    row_mm, column_mm = reference.pixel_spacing or (0.0, 0.0)
    flags, notes = _remarks(stack, positions, [header for header in used if header], faults, turn)
    return Volume(
        voxels=turn.apply(voxels),
        positions_mm=positions,
        spacing_mm=(spacing_mm(positions), *((column_mm, row_mm) if turn.transposed else (row_mm, column_mm))),
        orientation=turn.orientation,
        normal=stack.normal,
        source_from_voxel=turn.source_from_voxel(rows, columns),
        modality=reference.modality,
        series_uid=reference.series_uid,
        frame_of_reference_uid=reference.frame_of_reference_uid,
        sources=sources,
        slice_sources=slice_sources,
        flags=flags,
        notes=notes,
    )


def _decode(
    stack: Stack, rows: int, columns: int, settings: SeriesSettings
) -> tuple[list[InstanceHeader | None], NDArray[np.float32], dict[InstanceHeader, str]]:
    """Decode one image per position; where it fails, the next one at the same position.

    Returns the header used at each position (None: no image there could be read), the slices that could be read as
    (S, rows, columns) in rescaled values, and the reason for every image that failed.
    """
    used: list[InstanceHeader | None] = [None] * len(stack.slices)
    voxels = np.empty((len(stack.slices), rows, columns), np.float32)
    faults: dict[InstanceHeader, str] = {}
    choices = max(len(entry.headers) for entry in stack.slices)
    for choice in range(choices):
        missing = [i for i, entry in enumerate(stack.slices) if used[i] is None and choice < len(entry.headers)]
        tried = [stack.slices[i].headers[choice] for i in missing]
        if not tried:
            break
        decoded = decode(
            [EncodedFrame(header.path, (header.frame_number or 1) - 1) for header in tried],
            rows,
            columns,
            timeout_s=settings.decode_timeout_s,
            memory_bytes=int(settings.decode_memory_gb * 2**30),
        )
        for number, (i, header) in enumerate(zip(missing, tried, strict=True)):
            if number in decoded.faults:
                faults[header] = decoded.faults[number]
            else:
                used[i] = header
                voxels[i] = rescale(decoded.stored[number], header)
    readable = [header is not None for header in used]
    return used, voxels if all(readable) else voxels[readable], faults


def rescale(stored: NDArray[np.int32], header: InstanceHeader) -> NDArray[np.float32]:
    """Stored values to HU (CT) or to rescaled values (MR), padding to air (PS3.3 C.7.5.1.1.2, C.11.1.1.2)."""
    padding = _padding(stored, header)
    if header.modality != "CT" and header.photometric_interpretation == "MONOCHROME1":
        low, high = _stored_range(header)
        stored = (low + high - stored.astype(np.int64)).astype(
            np.int32
        )  # HU are HU however they are to be displayed, so CT is not inverted
    slope, intercept = np.float32(header.rescale_slope or 1), np.float32(header.rescale_intercept or 0)
    with np.errstate(over="ignore", invalid="ignore"):  # an absurd slope ends as a refusal: not finite
        values = stored.astype(np.float32) * slope + intercept
    if padding.any():
        values[padding] = AIR_HU if header.modality == "CT" else values[~padding].min(initial=values.max())
    return values


def _padding(stored: NDArray[np.int32], header: InstanceHeader) -> NDArray[np.bool_]:
    """Where there is no image: outside the reconstruction circle."""
    value = _as_stored(header.pixel_padding_value, header)
    if value is None:
        return np.zeros(stored.shape, bool)
    limit = _as_stored(header.pixel_padding_range_limit, header)
    low, high = sorted((value, value if limit is None else limit))
    return (stored >= low) & (stored <= high)


def _as_stored(value: int | None, header: InstanceHeader) -> int | None:
    """A padding value as the pixels hold it: -2000 is often written as 63536, in the VR of the other sign."""
    if value is None:
        return None
    low, high = _stored_range(header)
    return (value - low) % (high - low + 1) + low


def _stored_range(header: InstanceHeader) -> tuple[int, int]:
    half: int = 1 << ((header.bits_stored or 16) - 1)
    return (-half, half - 1) if header.pixel_representation == 1 else (0, 2 * half - 1)


def _require_readable(
    positions: NDArray[np.float64], expected: int, faults: dict[InstanceHeader, str], settings: SeriesSettings
) -> None:
    try:
        require_complete(positions, settings)
    except Refusal as refusal:
        readable = f"{len(positions)} of {expected} slices could be decoded ({_listed(faults.values())})"
        raise Refusal(refusal.code, f"{readable}; {refusal.reason}") from refusal


def _sources(
    stack: Stack, used: Sequence[InstanceHeader | None], faults: dict[InstanceHeader, str]
) -> tuple[tuple[SourceInstance, ...], tuple[int, ...]]:
    """Every image of the series with its state so far, and for each slice of the volume which one it is."""
    sources: list[SourceInstance] = []
    slice_sources: list[int] = []
    for entry, header in zip(stack.slices, used, strict=True):
        if header is not None:
            slice_sources.append(len(sources))
            sources.append(_source(header, NOT_YET_SAMPLED, entry.position_mm))
        sources += _not_used(entry, header, faults)
    same = "belongs to another volume at the same positions (acquisition, phase, echo or b-value)"
    for header in stack.other_volumes:
        position = float(np.dot(stack.normal, header.position or ()))
        sources.append(_source(header, SourceState.DUPLICATE, position, same))
    for header, reason in stack.left_out:
        if header.sop_instance_uid:
            sources.append(_source(header, SourceState.UNREADABLE, None, reason))
    return tuple(sources), tuple(slice_sources)


def _not_used(entry: Slice, used: InstanceHeader | None, faults: dict[InstanceHeader, str]) -> list[SourceInstance]:
    found = []
    for header in entry.headers:
        if header in faults:
            found.append(_source(header, SourceState.UNREADABLE, entry.position_mm, faults[header]))
        elif header is not used:
            reason = "another image at the same position was used"
            found.append(_source(header, SourceState.DUPLICATE, entry.position_mm, reason))
    return found


def _source(
    header: InstanceHeader, state: SourceState, position_mm: float | None, reason: str | None = None
) -> SourceInstance:
    return SourceInstance(
        sop_instance_uid=header.sop_instance_uid,
        frame_number=header.frame_number,
        position_mm=position_mm,
        state=state,
        reason=reason,
    )


def _remarks(
    stack: Stack,
    positions: NDArray[np.float64],
    used: Sequence[InstanceHeader],
    faults: dict[InstanceHeader, str],
    turn: _Turn,
) -> tuple[tuple[Flag, ...], tuple[str, ...]]:
    """What the geometry makes us say, in codes and in words."""
    flags: list[Flag] = []
    notes: list[str] = []
    if wide := gaps(positions):
        flags.append(Flag.MISSING_SLICES)
        places = [f"{positions[i + 1] - positions[i]:.1f} mm {_between(used[i], used[i + 1], i)}" for i in wide[:3]]
        more = f" and {len(wide) - 3} more" if len(wide) > 3 else ""
        notes.append(f"Slices are missing: {', '.join(places)}{more}, where {spacing_mm(positions):.1f} mm is usual.")
    if faults:
        flags.append(Flag.UNREADABLE_SLICES)
        notes.append(f"{_count(len(faults), 'image')} could not be decoded: {_listed(faults.values())}.")
    repeated = sum(len(entry.headers) - 1 for entry in stack.slices)
    if repeated or stack.other_volumes:
        flags.append(Flag.DUPLICATE_POSITIONS)
    if stack.other_volumes:
        notes.append(
            "The series holds several volumes at the same positions; one was read. "
            f"Not read: {_count(len(stack.other_volumes), 'image')} of the others."
        )
    if repeated:
        notes.append(f"One image per position was used; not used: {_count(repeated, 'image')} at the same positions.")
    if stack.tilt_deg > TILT_DEG:
        flags.append(Flag.GANTRY_TILT)
        notes.append(f"The slices are tilted by {stack.tilt_deg:.1f} degrees against their stack; not corrected.")
    if stack.left_out:
        reasons = _listed(reason for _, reason in stack.left_out)
        notes.append(f"Not part of the stack: {_count(len(stack.left_out), 'object')} of the series ({reasons}).")
    if not turn.is_identity:
        notes.append("The images were turned into the standard orientation before they were read.")
    if any(header.compressed_with_loss for header in used):
        notes.append("The images had been compressed with loss before they were received.")
    return tuple(flags), tuple(notes)


def _between(above: InstanceHeader, below: InstanceHeader, index: int) -> str:
    if above.instance_number is None or below.instance_number is None or above.frame_number is not None:
        return f"after slice {index + 1}"
    return f"between images {above.instance_number} and {below.instance_number}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _listed(reasons: Iterable[str]) -> str:
    counts = Counter(reasons).most_common()
    return ", ".join(f"{count} x {reason}" for reason, count in counts)


@dataclass(frozen=True, slots=True)
class _Turn:
    """How slices are turned into the standard orientation: transposed first, then flipped."""

    transposed: bool
    flip_rows: bool  # the order of rows is reversed
    flip_columns: bool
    orientation: tuple[float, ...]

    @classmethod
    def of(cls, header: InstanceHeader) -> _Turn:
        """The turn after which a row runs to the left (sagittal: back) and a column to the back (else: feet).

        A prone or feet-first acquisition may be stored the other way round, and a model would take left for right.
        """
        cosines = np.array(header.orientation).reshape(2, 3)
        axis = int(np.argmax(np.abs(np.cross(*cosines))))
        back, left, feet = np.array((0, 1, 0)), np.array((1, 0, 0)), np.array((0, 0, -1))
        across, down = {2: (left, back), 1: (left, feet), 0: (back, feet)}[axis]
        transposed = abs(cosines[0] @ across) < abs(cosines[1] @ across)
        row, column = cosines[::-1] if transposed else cosines
        flip_columns, flip_rows = bool(row @ across < 0), bool(column @ down < 0)
        turned = np.concatenate([-row if flip_columns else row, -column if flip_rows else column])
        return cls(bool(transposed), flip_rows, flip_columns, tuple(float(value) for value in turned))

    @property
    def is_identity(self) -> bool:
        return not (self.transposed or self.flip_rows or self.flip_columns)

    def apply(self, voxels: NDArray[np.float32]) -> NDArray[np.float32]:
        turned = voxels.swapaxes(1, 2) if self.transposed else voxels
        turned = turned[:, :: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]
        return np.ascontiguousarray(turned)

    def source_from_voxel(self, rows: int, columns: int) -> NDArray[np.float64]:
        """rows, columns: of the source frame."""
        width, height = (rows, columns) if self.transposed else (columns, rows)
        unflip = np.array(
            [
                [-1.0, 0.0, width] if self.flip_columns else [1.0, 0.0, 0.0],
                [0.0, -1.0, height] if self.flip_rows else [0.0, 1.0, 0.0],
            ]
        )
        return unflip[::-1] if self.transposed else unflip
