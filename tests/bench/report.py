"""How large the results of 200 slices of 512 x 512 pixels are, and how long they take to build.

./run bench report [SLICES]
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pydicom import dcmread
from pydicom.uid import ExplicitVRLittleEndian, RLELossless

from service.report import gate
from service.report.encapsulated import build_pdf, key_places
from service.report.encoding import encode, transcoded
from service.report.key_objects import build_key_objects
from service.report.parametric_map import build_parametric_map
from service.report.pixels import DecodedOnce, PixelLimits
from service.report.retention_map import TRANSFER_SYNTAX, build_secondary_capture, wanted_frames
from service.report.segmentation import build_segmentation
from service.report.source import SourceStudy, read_source
from service.report.structured_report import build_sr
from service.shared.messages import TOKEN_CODES, AnalysisOutput, RetentionArrays, TokenState
from service.shared.settings import ReportSettings, Settings, SrSopClass
from tests.report_samples import BODY, RUN, arrays_of, output_for

TOKENS = (16, 16)


def write_source(folder: Path, count: int, *, compressed: bool) -> SourceStudy:
    """The real body CT repeated to `count` slices with UIDs as long as they come."""
    paths = sorted(BODY.glob("*.dcm"))
    for number in range(count):
        dataset = dcmread(paths[number % len(paths)])
        dataset.SOPInstanceUID = f"1.3.6.1.4.1.14519.5.2.1.7009.2403.334240657131972136850343{100000 + number}"
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.ImagePositionPatient = [*dataset.ImagePositionPatient[:2], 3.0 * number]
        if not compressed:
            dataset.decompress(generate_instance_uid=False)
            assert dataset.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
        dataset.save_as(folder / f"{number:04d}.dcm")
    return read_source(folder.glob("*.dcm"))


class Clock:
    """Wall and processor seconds since the last look, this process and its children."""

    def __init__(self) -> None:
        self._last = self._now()

    def lap(self) -> tuple[float, float]:
        before, self._last = self._last, self._now()
        return self._last[0] - before[0], self._last[1] - before[1]

    def _now(self) -> tuple[float, float]:
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return time.perf_counter(), sum(one.ru_utime + one.ru_stime for one in used)


def rows(
    source: SourceStudy, output: AnalysisOutput, arrays: RetentionArrays
) -> Iterator[tuple[str, float, float, int]]:
    """(what, wall seconds, processor seconds, bytes) of each object."""
    settings = ReportSettings()
    clock = Clock()
    report = encode(build_sr(output, source, settings, SrSopClass.COMPREHENSIVE_3D, run=RUN))
    yield ("SR", *clock.lap(), len(report))
    gate.check(report, verbatim=source.uids)
    yield ("gate of the SR", *clock.lap(), 0)
    wanted = wanted_frames(output, source)
    frames = DecodedOnce(wanted, PixelLimits(), keep=key_places(wanted))
    capture = build_secondary_capture(output, arrays, source, frames, settings, run=RUN)
    picture = encode(capture, TRANSFER_SYNTAX)
    yield ("SC, with reading the pixels", *clock.lap(), len(picture))
    with tempfile.NamedTemporaryFile() as stored:
        stored.write(picture)
        stored.flush()
        clock.lap()
        smaller = encode(transcoded(Path(stored.name), RLELossless), RLELossless)
    yield ("SC in RLE, from JPEG 2000", *clock.lap(), len(smaller))
    gate.check(picture, verbatim=source.uids)
    yield ("gate of the SC", *clock.lap(), 0)
    for name, build in (
        ("SEG", lambda: build_segmentation(output, arrays, source, frames.placed, frames.shape, settings, run=RUN)),
        ("PM", lambda: build_parametric_map(output, arrays, source, frames.placed, settings, run=RUN)),
        ("PDF", lambda: build_pdf(output, arrays, source, frames.kept, settings, run=RUN)),
        ("KOS", lambda: build_key_objects(output, source, settings, run=RUN)),
    ):
        made = encode(build())
        yield (name, *clock.lap(), len(made))


def read_by_default(source: SourceStudy) -> tuple[AnalysisOutput, RetentionArrays]:
    """What the demonstration model was shown under the settings as shipped: `guarded`, slabs, a budget of tokens."""
    from workers.pipeline import Request, read
    from workers.vlm import open_model

    settings = Settings()
    paths = tuple(one.path for one in source.instances)
    request = Request(1, source.study_uid, paths, settings.report.prompt, settings)
    output, arrays = read(request, open_model(settings.model, None))
    return output, RetentionArrays.from_npz(arrays)


def decoding(source: SourceStudy, output: AnalysisOutput) -> tuple[float, float]:
    clock = Clock()
    for _ in DecodedOnce(wanted_frames(output, source), PixelLimits()):
        pass
    return clock.lap()


def main(arguments: list[str]) -> int:
    count = int(arguments[0]) if arguments else 200
    out = sys.stdout

    def say(title: str, source: SourceStudy, output: AnalysisOutput, arrays: RetentionArrays) -> None:
        out.write(f"{count} slices, {title}\n")
        for name, wall, processor, size in rows(source, output, arrays):
            out.write(f"  {name:28} {wall:7.2f} s {processor:7.2f} CPU-s {size / 1e6:9.3f} MB\n")
            out.flush()

    with tempfile.TemporaryDirectory() as native, tempfile.TemporaryDirectory() as packed:
        source = write_source(Path(native), count, compressed=False)
        say("by default settings", source, *read_by_default(source))
        for said, keep_every, all_tokens in (
            ("nothing pruned", 1, True),
            ("every slice given, every second patch", 1, False),
            ("every second slice, every second patch", 2, False),
        ):
            output = output_for(source, keep_every=keep_every, tokens=TOKENS)
            arrays = arrays_of(output.retention.inputs, TOKENS)
            if all_tokens:
                arrays.tokens[arrays.tokens == TOKEN_CODES[TokenState.DROPPED]] = TOKEN_CODES[TokenState.KEPT]
            say(said, source, output, arrays)
        output = output_for(source, tokens=TOKENS)
        wall, processor = decoding(source, output)
        out.write(f"reading alone, uncompressed      {wall:7.2f} s {processor:7.2f} CPU-s\n")
        compressed = write_source(Path(packed), count, compressed=True)
        syntax = dcmread(compressed.instances[0].path, stop_before_pixels=True).file_meta.TransferSyntaxUID.name
        wall, processor = decoding(compressed, output_for(compressed, tokens=TOKENS))
        out.write(f"reading alone, {syntax} {wall:7.2f} s {processor:7.2f} CPU-s\n")
    return 0
