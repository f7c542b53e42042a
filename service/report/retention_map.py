"""What the model was shown, as pictures for any viewer: one multi-frame true-colour Secondary Capture.

Every source slice on its own pixel grid: kept patches clear, merged ones blue, dropped ones dark red, slices that the
model never got dark red within an orange frame that names what stands for them. Patches given, never an explanation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels.encoders.base import JPEG2000LosslessEncoder
from pydicom.uid import JPEG2000Lossless, MultiFrameTrueColorSecondaryCaptureImageStorage

from service.report import codes, words
from service.report.coverage import Cover, cover, is_shown
from service.report.encoding import name_by_content
from service.report.header import (
    code_item,
    common_header,
    copy_into,
    copy_series_of_source,
    decimal,
)
from service.report.identity import RunIdentity
from service.report.pixels import SourceFrame, Wanted
from service.report.source import SourceStudy
from service.shared.messages import (
    AnalysisOutput,
    Retention,
    RetentionArrays,
    SliceOperation,
    SourceInstance,
    SourceState,
)
from service.shared.settings import ReportSettings

SERIES_DESCRIPTION = "AI model input, not for diagnosis"
# Grey written three times costs nothing in it; RLE, 2 to 3 times as long, is what delivery falls back to
TRANSFER_SYNTAX = JPEG2000Lossless
BANNER = "NOT FOR DIAGNOSIS. Patches given to the model, not an explanation."
COLOURS = "Clear: given. Blue: merged into others. Red, orange frame: not given."
_ORANGE = np.array([255, 140, 0], np.uint8)
_OPPOSITE = {"L": "R", "R": "L", "P": "A", "A": "P", "H": "F", "F": "H", "": ""}
_SMALLEST_WITH_TEXT = 128  # rows and columns
_STEP = 64  # grey levels in dark parts are few, so that they compress in RLE too

RGB = NDArray[np.uint8]  # (rows, columns, 3)


def wanted_frames(output: AnalysisOutput, source: SourceStudy) -> list[Wanted]:
    """What `read_frames` is to decode, in stack order: slices with a readable header and a known place."""
    paths = {one.sop_instance_uid: one.path for one in source.instances}
    return [
        (one.sop_instance_uid, one.frame_number, paths[one.sop_instance_uid])
        for one in output.retention.sources
        if one.sop_instance_uid in paths
    ]


def build_secondary_capture(
    output: AnalysisOutput,
    arrays: RetentionArrays,
    source: SourceStudy,
    frames: Iterable[SourceFrame],
    settings: ReportSettings,
    *,
    run: RunIdentity,
) -> Dataset:
    """One SC for `encode(..., TRANSFER_SYNTAX)`; `frames` as `wanted_frames` asks for them, taken one by one.

    A slice that could not be decoded is a black frame that says so; ValueError when none could be.
    """
    pictures = _Pictures(output, arrays)
    encoded = [_encoded(picture) for picture in pictures.of(frames)]
    dataset = common_header(
        output,
        source,
        settings,
        run,
        sop_class_uid=MultiFrameTrueColorSecondaryCaptureImageStorage,
        modality="OT",
        kind="SC",
        series_number=settings.series_number + 1,
        series_description=SERIES_DESCRIPTION,
    )
    copy_series_of_source(dataset, source)
    lossy = {keyword: value for keyword, value in source.series.items() if keyword.startswith("LossyImage")}
    copy_into(dataset, lossy)
    dataset.PatientOrientation = _patient_orientation(pictures.drawn[0])
    dataset.ConversionType = "WSD"
    dataset.ImageType = ["DERIVED", "SECONDARY"]
    dataset.BurnedInAnnotation = source.series.get("BurnedInAnnotation", "NO")
    dataset.ImageComments = words.LEGEND
    dataset.SourceImageSequence = list(_source_images(pictures.drawn, source))
    _describe_pixels(dataset, pictures.shape, len(encoded))
    _place_frames(dataset, pictures.drawn)
    dataset.PixelData = encapsulate(encoded)
    dataset["PixelData"].VR = "OB"
    return name_by_content(dataset, "SC", *run.analysis_key, transfer_syntax_uid=TRANSFER_SYNTAX)


class _Pictures:
    """Paints frames one after another; keeps what the header needs to know of them, not their pixels."""

    def __init__(self, output: AnalysisOutput, arrays: RetentionArrays) -> None:
        self._retention = output.retention
        self._arrays = arrays
        self._sources = {(one.sop_instance_uid, one.frame_number): one for one in output.retention.sources}
        self._numbers = {key: number for number, key in enumerate(self._sources, 1)}
        self.drawn: list[SourceFrame] = []  # without pixels
        self.shape = (0, 0)

    def of(self, frames: Iterable[SourceFrame]) -> Iterator[RGB]:
        """One picture per frame; frames before the first decodable one wait for its size."""
        waiting: list[SourceFrame] = []
        for frame in frames:
            if self.shape == (0, 0):
                if frame.grey is None:
                    waiting.append(frame)
                    continue
                self.shape = (frame.grey.shape[0], frame.grey.shape[1])
                yield from (self._paint(one) for one in waiting)
                waiting = []
            yield self._paint(frame)
        if waiting or self.shape == (0, 0):
            raise ValueError("none of the slices could be decoded; there is no picture to draw on")

    def _paint(self, frame: SourceFrame) -> RGB:
        key = frame.sop_instance_uid, frame.frame_number
        source = self._sources[key]
        grey = frame.grey
        readable = grey is not None and grey.shape == self.shape
        said = caption(self._retention, source, self._numbers[key]) + ("" if readable else " - PIXELS UNREADABLE")
        if grey is None or not readable:
            grey = np.zeros(self.shape, np.uint8)
        self.drawn.append(
            SourceFrame(
                frame.sop_instance_uid, frame.frame_number, None, frame.position, frame.orientation, frame.spacing
            )
        )
        covers = cover(self._retention, self._arrays, source, self.shape)
        return paint(grey, covers, said, is_shown(source), sides(frame))


def caption(retention: Retention, source: SourceInstance, number: int) -> str:
    """What became of slice `number` (from 1, in stack order), in a line."""
    place = f"Slice {number} of {len(retention.sources)}"
    anchor = None if source.input_index is None else retention.inputs[source.input_index]
    anchors = "" if anchor is None else _numbers(anchor.source_instances)
    operation = "maximum" if anchor is not None and anchor.operation is SliceOperation.MIP else "mean"
    match source.state:
        case SourceState.SHOWN:
            return f"{place}: given to the model"
        case SourceState.IN_SLAB:
            return f"{place}: given as part of the {operation} of {anchors}"
        case SourceState.REPRESENTED:
            return f"{place}: NOT GIVEN, represented by {anchors}"
        case SourceState.SAMPLED_OUT:
            return f"{place}: NOT GIVEN, left out by sampling"
        case SourceState.DUPLICATE:
            return f"{place}: NOT GIVEN, another slice at this position was"
        case SourceState.UNREADABLE:
            return f"{place}: NOT GIVEN, unreadable"


def _numbers(indices: Sequence[int]) -> str:
    if len(indices) == 1:
        return f"slice {indices[0] + 1}"
    return f"slices {min(indices) + 1} to {max(indices) + 1}"


def paint(
    grey: NDArray[np.uint8], covers: NDArray[np.uint8], said: str, given: bool, sides: tuple[str, str] = ("", "")
) -> RGB:
    """One picture on the grid of its source slice.

    grey, covers: (rows, columns); said: the caption; given: False draws the orange frame. sides: of the patient, at
    the left and the right edge. Words stand within the frame and cover nothing beside their own strokes.
    """
    picture: RGB = _palette()[covers, grey]
    rows, columns = grey.shape
    frame = max(1, min(rows, columns) // 128)
    if not given:
        for edge in (np.s_[:frame], np.s_[-frame:], np.s_[:, :frame], np.s_[:, -frame:]):
            picture[edge] = _ORANGE
    if min(rows, columns) >= _SMALLEST_WITH_TEXT:
        inside = picture[frame:-frame, frame:-frame]
        height, width = rows // 28, columns - 2 * frame
        _write(inside[:height], _strokes(BANNER, width, height))
        _write(inside[height : 2 * height], _strokes(COLOURS, width, height))
        _write(inside[-height:], _strokes(said, width, height))
        left, right = (_strokes(side, height, height) for side in sides)
        middle = np.s_[rows // 2 : rows // 2 + height]
        _write(inside[middle, :height], left)
        _write(inside[middle, -height:], right)
    return picture


@lru_cache(maxsize=1)
def _palette() -> NDArray[np.uint8]:
    """(5, 256, 3): the colour of a grey level under each Cover."""
    grey = np.arange(256)
    dark = np.zeros((256, 3))
    dark[:, 0] = grey // _STEP * _STEP * 0.4  # in one channel alone: the two others compress to nothing
    palette = np.zeros((len(Cover), 256, 3))
    palette[Cover.KEPT] = grey[:, None]
    # Tints begin above black, so that a patch of air tells its state too
    palette[Cover.MERGED] = dark[:, ::-1] + np.array([20, 60, 100])
    for cover_ in (Cover.DROPPED, Cover.NOT_SHOWN, Cover.OUTSIDE):
        palette[cover_] = dark + np.array([36, 12, 12])
    return np.rint(palette).astype(np.uint8)


def _write(place: RGB, strokes: tuple[NDArray[np.bool_], NDArray[np.bool_]]) -> None:
    outline, letters = strokes
    place[outline] = 0
    place[letters] = 255


@lru_cache(maxsize=512)
def _strokes(text: str, columns: int, height: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Where the outline and the letters of `text` are in a strip; smaller where it would not fit."""
    size, outline = height * 0.8, max(1, height // 12)
    while size > 6 and ImageFont.load_default(size).getlength(text) > columns - 2 * (outline + 2):
        size -= 0.5
    drawn = []
    for stroke in (outline, 0):
        strip = Image.new("L", (columns, height))
        font = ImageFont.load_default(size)
        at = outline + 2, height / 2
        ImageDraw.Draw(strip).text(at, text, fill=255, font=font, anchor="lm", stroke_width=stroke)
        drawn.append(np.asarray(strip) > 110)  # without shades, which do not compress
    return drawn[0], drawn[1]


def _encoded(picture: RGB) -> bytes:
    """By one encoder always: another one may write other bytes for the same pixels."""
    rows, columns, _ = picture.shape
    return JPEG2000LosslessEncoder.encode(
        np.ascontiguousarray(picture),
        encoding_plugin="pylibjpeg",
        rows=rows,
        columns=columns,
        number_of_frames=1,
        samples_per_pixel=3,
        photometric_interpretation="YBR_RCT",
        planar_configuration=0,
        bits_allocated=8,
        bits_stored=8,
        pixel_representation=0,
    )


def _describe_pixels(dataset: Dataset, shape: tuple[int, int], count: int) -> None:
    dataset.Rows, dataset.Columns = shape
    dataset.NumberOfFrames = count
    dataset.SamplesPerPixel = 3
    dataset.PhotometricInterpretation = "YBR_RCT"
    dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = 8
    dataset.BitsStored = 8
    dataset.HighBit = 7
    dataset.PixelRepresentation = 0
    dataset.FrameIncrementPointer = 0x00182001
    dataset.PageNumberVector = list(range(1, count + 1))


def _place_frames(dataset: Dataset, frames: Sequence[SourceFrame]) -> None:
    """Plane groups, so that viewers can put the pictures beside their slices; only where all slices have a place.

    A place is one in a frame of reference: without a valid one of the source there is none.
    """
    first = frames[0]
    placed = "FrameOfReferenceUID" in dataset and all(frame.position is not None for frame in frames)
    if not placed or len({(frame.orientation, frame.spacing) for frame in frames}) != 1:
        return
    if first.orientation is None or first.spacing is None:
        return
    shared, orientation, measures = Dataset(), Dataset(), Dataset()
    orientation.ImageOrientationPatient = [decimal(part) for part in first.orientation]
    measures.PixelSpacing = [decimal(part) for part in first.spacing]
    shared.PlaneOrientationSequence = [orientation]
    shared.PixelMeasuresSequence = [measures]
    dataset.SharedFunctionalGroupsSequence = [shared]
    groups = []
    for frame in frames:
        group, position = Dataset(), Dataset()
        position.ImagePositionPatient = [decimal(part) for part in frame.position or ()]
        group.PlanePositionSequence = [position]
        groups.append(group)
    dataset.PerFrameFunctionalGroupsSequence = groups


def _patient_orientation(frame: SourceFrame) -> list[str]:
    """The directions of rows and columns by their main axis (PS3.3 C.7.6.1.1.1); empty where unknown."""
    if frame.orientation is None:
        return []
    directions = []
    for cosines in (frame.orientation[:3], frame.orientation[3:]):
        axis = max(range(3), key=lambda index: abs(cosines[index]))
        directions.append(("LR", "PA", "HF")[axis][cosines[axis] < 0])
    return directions


def sides(frame: SourceFrame) -> tuple[str, str]:
    """The sides of the patient at the left and the right edge; empty where unknown."""
    right = next(iter(_patient_orientation(frame)), "")
    return _OPPOSITE[right], right


def _source_images(frames: Sequence[SourceFrame], source: SourceStudy) -> Iterator[Dataset]:
    """One item per instance, with its frames where it has several."""
    numbers: dict[str, list[int]] = {}
    for frame in frames:
        of_instance = numbers.setdefault(frame.sop_instance_uid, [])
        if frame.frame_number is not None:
            of_instance.append(frame.frame_number)
    classes = {one.sop_instance_uid: one.sop_class_uid for one in source.instances}
    for uid, of_instance in numbers.items():
        item = Dataset()
        copy_into(item, {"ReferencedSOPClassUID": classes[uid], "ReferencedSOPInstanceUID": uid})
        if of_instance:
            item.ReferencedFrameNumber = sorted(of_instance)
        item.PurposeOfReferenceCodeSequence = [code_item(codes.SOURCE_IMAGE)]
        yield item
