"""workers.decode: stored values out of every transfer syntax, and a hostile code stream costs one slice."""

from __future__ import annotations

import os
import random
import struct
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

from tests.odd_series import write_changed, write_enhanced
from tests.phantom_series import PhantomSeries
from workers import decode as decoding
from workers.decode import DecoderFault, EncodedFrame, decode, jpeg2000_size, jpeg_size, require_size
from workers.errors import Refusal, RefusalCode

REAL = Path(__file__).parents[2] / "data" / "real-ct"
GIGABYTE = 2**30


def decoded(paths: list[Path], rows: int = 64, columns: int = 64, **limits: object) -> decoding.Decoded:
    options = {"timeout_s": 60.0, "memory_bytes": 2 * GIGABYTE} | limits
    return decode([EncodedFrame(path, 0) for path in paths], rows, columns, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1", JPEG2000Lossless, JPEGLSLossless, RLELossless]
)
def test_lossless_syntaxes_give_the_stored_values(tmp_path: Path, syntax: str) -> None:
    """What was compressed without loss comes out bit for bit."""
    series = PhantomSeries(slices=3, transfer_syntax=syntax)

    found = decoded(series.write(tmp_path))

    assert found.faults == {}
    assert np.array_equal(found.stored, series.voxels().astype(np.int32) + 1024)


def test_real_jpeg2000_slices_decode() -> None:
    """The Siemens body CT decodes without a fault to values of twelve bits."""
    found = decoded(sorted((REAL / "body-siemens").glob("*.dcm")), 512, 512)

    assert found.faults == {}
    assert found.stored.shape == (20, 512, 512)
    assert (found.stored.min(), found.stored.max()) == (0, 2863)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("CT_small.dcm", 128, 2191),
        ("MR_small_bigendian.dcm", 127, 2145),
        ("MR_small_RLE.dcm", 127, 2145),
        ("MR_small_jp2klossless.dcm", 127, 2145),
        ("MR_small_jpeg_ls_lossless.dcm", 127, 2145),
        ("JPEGLSNearLossless_16.dcm", 0, 65535),  # unsigned, all sixteen bits
        ("693_J2KI.dcm", -2971, 2836),  # signed, lossy
        ("J2K_pixelrep_mismatch.dcm", -2000, 1896),  # signed in the header, unsigned in the code stream
    ],
)
def test_signed_and_unsigned_values_of_other_encoders(name: str, low: int, high: int) -> None:
    """Files of other encoders give the values that their header describes."""
    path = Path(str(get_testdata_file(name)))
    dataset = dcmread(path)

    found = decoded([path], dataset.Rows, dataset.Columns)

    assert found.faults == {}
    assert (found.stored.min(), found.stored.max()) == (low, high)


def test_unused_high_bits_are_masked(tmp_path: Path) -> None:
    """Overlay bits above Bits Stored are no pixel values (PS3.5 8.1.1)."""
    series = PhantomSeries(slices=1)

    def overlay(_: int, dataset: object) -> None:
        pixels = np.frombuffer(dataset.PixelData, "<u2") | 0x8000  # type: ignore[attr-defined]
        dataset.PixelData = pixels.tobytes()  # type: ignore[attr-defined]

    found = decoded(write_changed(series, tmp_path, overlay))

    assert np.array_equal(found.stored, series.voxels().astype(np.int32) + 1024)


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.1", JPEG2000Lossless])
def test_frames_of_one_instance_decode_by_their_number(tmp_path: Path, syntax: str) -> None:
    """Frames of an enhanced object can be asked for in any order."""
    series = PhantomSeries(slices=4)
    path = write_enhanced(series, tmp_path / "enhanced.dcm", transfer_syntax=syntax)

    found = decode([EncodedFrame(path, i) for i in (3, 0, 2)], 64, 64, timeout_s=60, memory_bytes=2 * GIGABYTE)

    assert found.faults == {}
    assert np.array_equal(found.stored, series.voxels()[[3, 0, 2]].astype(np.int32) + 1024)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"PixelData": None}, "no pixel data"),
        ({"PixelData": b""}, "no pixel data"),
        ({"PixelData": bytes(100)}, "pixel data could not be decoded (ValueError)"),
        ({"Rows": 32}, "another image size than the series"),
        ({"SamplesPerPixel": 3}, "colour image"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "not a greyscale image"),
        ({"BitsAllocated": 12}, "bits allocated and stored do not make sense"),
        ({"HighBit": 15}, "pixels are not right-aligned in their words (HighBit)"),
        ({"BitsStored": None}, "pixel data could not be decoded (AttributeError)"),
    ],
)
def test_unreadable_instance_has_a_reason_and_costs_no_other(
    tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    """The middle one of three cannot be decoded; the others can, and it says why without quoting values."""

    def damage(index: int, dataset: object) -> None:
        for keyword, value in changes.items() if index == 1 else ():
            if value is None:
                delattr(dataset, keyword)
            else:
                setattr(dataset, keyword, value)

    series = PhantomSeries(slices=3)

    found = decoded(write_changed(series, tmp_path, damage))

    assert found.faults == {1: reason}
    assert np.array_equal(found.stored[[0, 2]], series.voxels()[[0, 2]].astype(np.int32) + 1024)
    assert not found.stored[1].any()


@pytest.mark.parametrize("keep", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless, RLELossless])
def test_cut_off_code_stream_is_unreadable(tmp_path: Path, syntax: str, keep: float) -> None:
    """Half an image is no image: no decoder of ours fills the rest with something."""

    def cut(_: int, dataset: object) -> None:
        frame = get_frame(dataset.PixelData, 0, number_of_frames=1)  # type: ignore[attr-defined]
        dataset.PixelData = encapsulate([frame[: int(len(frame) * keep) // 2 * 2]])  # type: ignore[attr-defined]

    found = decoded(write_changed(PhantomSeries(slices=1, transfer_syntax=syntax), tmp_path, cut))

    assert list(found.faults) == [0]
    if syntax == JPEGLSLossless:  # seen before CharLS spends ten seconds on it
        assert found.faults[0] == "the compressed data are cut off"


@pytest.mark.hostile
@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless])
def test_code_stream_that_claims_a_huge_image_is_not_decoded(tmp_path: Path, syntax: str) -> None:
    """The size in the compressed data is compared with the header before a decoder allocates by it."""

    def inflate(index: int, dataset: object) -> None:
        frame = bytearray(get_frame(dataset.PixelData, 0, number_of_frames=1))  # type: ignore[attr-defined]
        if syntax == JPEG2000Lossless:
            frame[8:16] = struct.pack(">2I", 2**31, 2**31)
        else:
            place = frame.index(b"\xff\xf7")
            frame[place + 5 : place + 9] = struct.pack(">2H", 65535, 65535)
        dataset.PixelData = encapsulate([bytes(frame)])  # type: ignore[attr-defined]

    found = decoded(write_changed(PhantomSeries(slices=1, transfer_syntax=syntax), tmp_path, inflate))

    assert found.faults == {0: "the compressed data have another image size than the header"}


@pytest.mark.hostile
def test_memory_of_the_child_is_limited(tmp_path: Path) -> None:
    """A file that needs more than the decoder's memory is unreadable; the next one is read."""
    big = PhantomSeries(slices=1).datasets()[0]
    big.PixelData = bytes(400 * 2**20)
    big_path = tmp_path / "big.dcm"
    big.save_as(big_path, enforce_file_format=True)
    small_path = PhantomSeries(slices=1).write(tmp_path)[0]

    found = decoded([big_path, small_path], memory_bytes=300 * 2**20)

    assert found.faults == {0: "pixel data could not be decoded (MemoryError)"}
    assert found.stored[1].any()


@pytest.mark.hostile
def test_damaged_files_cost_only_themselves(tmp_path: Path) -> None:
    """Two hundred files with random bytes changed or cut off are decoded or explained; the good ones are decoded."""
    chance = random.Random(2)
    paths = []
    for syntax in ("1.2.840.10008.1.2.1", JPEG2000Lossless, JPEGLSLossless, RLELossless):
        good = PhantomSeries(slices=1, transfer_syntax=syntax).write(tmp_path / syntax)[0]
        content = good.read_bytes()
        for number in range(50):
            damaged = bytearray(content[: chance.choice((len(content), chance.randrange(1000, len(content))))])
            for _ in range(chance.randrange(1, 20)):
                damaged[chance.randrange(132, len(damaged))] = chance.randrange(256)
            paths.append(tmp_path / syntax / f"{number}.dcm")
            paths[-1].write_bytes(damaged)
        paths.append(good)

    found = decoded(paths)

    assert not {50, 101, 152, 203} & set(found.faults)
    assert np.array_equal(found.stored[50], found.stored[203])
    assert len(found.faults) > 100


def test_folder_called_dl_in_the_working_directory_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """python-gdcm imports `dl`, so the child must not look for modules where it happens to run."""
    (tmp_path / "dl.py").write_text("raise SystemExit('not this one')")
    paths = PhantomSeries(slices=1).write(tmp_path)
    monkeypatch.chdir(tmp_path)

    assert decoded(paths).faults == {}


def child(behaviour: str) -> list[str]:
    """A child that does `behaviour` when it comes to the file called `bad`, and else what the real one does."""
    source = f"""
import os, signal, sys, time
import workers.decode as decoding
read = decoding.dcmread
def dcmread(path):
    if os.path.basename(path).startswith("bad"):
        {behaviour}
    return read(path)
decoding.dcmread = dcmread
decoding.main()
"""
    return [sys.executable, "-c", source]


@pytest.mark.kills
@pytest.mark.parametrize("place", [0, 1, 2])
def test_frame_that_kills_the_decoder_is_given_up_and_the_rest_decoded(tmp_path: Path, place: int) -> None:
    """A crash inside a decoder costs the frame it crashed on, wherever it stands."""
    paths = PhantomSeries(slices=2).write(tmp_path)
    paths.insert(place, paths[0].rename(tmp_path / "bad.dcm"))
    paths[0 if place else 1] = PhantomSeries(slices=1, series=2).write(tmp_path)[0]

    found = decoded(paths, command=child("os.kill(os.getpid(), signal.SIGSEGV)"))

    assert found.faults == {place: "the decoder died on it"}
    assert all(found.stored[i].any() for i in range(3) if i != place)


@pytest.mark.kills
def test_frame_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that never returns is ended, and a fresh one goes on with the next frame."""
    monkeypatch.setattr(decoding, "FRAME_TIMEOUT_S", 6.0)
    first, second = PhantomSeries(slices=2).write(tmp_path)

    found = decoded([first.rename(tmp_path / "bad.dcm"), second], command=child("time.sleep(1000)"))

    assert found.faults == {0: "not decoded within 6 s"}
    assert found.stored[1].any()


@pytest.mark.kills
def test_series_on_which_every_child_dies_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a few deaths the rest is not tried; each frame says what became of it."""
    monkeypatch.setattr(decoding, "MAX_DEATHS", 2)
    path = PhantomSeries(slices=1).write(tmp_path)[0].rename(tmp_path / "bad.dcm")

    found = decoded([path] * 4, command=child("os.abort()"))

    assert [found.faults[i] for i in range(4)] == [
        *["the decoder died on it"] * 2,
        *["given up: the decoder had died too often on this series"] * 2,
    ]


def test_time_limit_of_the_series_is_a_fault_not_a_refusal(tmp_path: Path) -> None:
    """A machine too slow today may do better tomorrow, so the time limit is retried and names its setting."""
    path = PhantomSeries(slices=1).write(tmp_path)[0].rename(tmp_path / "bad.dcm")

    with pytest.raises(DecoderFault, match=r"series\.decode_timeout_s"):
        decoded([path], command=child("time.sleep(1000)"), timeout_s=2.0)


def test_child_that_does_not_start_is_a_fault(tmp_path: Path) -> None:
    """A broken installation is no property of the images."""
    with pytest.raises(DecoderFault, match="did not start"):
        decoded(PhantomSeries(slices=1).write(tmp_path), command=[sys.executable, "-c", "raise SystemExit(3)"])


def test_child_gets_no_secrets_and_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that touches hostile data does not inherit the database's password; images leave no trace."""
    monkeypatch.setenv("MEDPRUNER__DATABASE__URL", "postgresql://user:hunter2@host/db")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (tmp_path / "scratch").mkdir()
    path = PhantomSeries(slices=1).write(tmp_path)[0].rename(tmp_path / "bad.dcm")
    leak = "assert not any('hunter2' in value for value in os.environ.values()), os._exit(1)"

    found = decoded([path], command=child(leak))

    assert found.faults == {}
    assert os.listdir(tmp_path / "scratch") == []


def test_nothing_to_decode_starts_no_child() -> None:
    """An empty list gives an empty array."""
    found = decode([], 64, 64, timeout_s=1, memory_bytes=GIGABYTE, command=["/nonexistent"])

    assert found.stored.shape == (0, 64, 64)


@pytest.mark.parametrize(("frames", "rows", "columns"), [(1, 5000, 5000), (5000, 512, 512)])
def test_volume_that_would_not_fit_is_refused_by_its_header(frames: int, rows: int, columns: int) -> None:
    """Rows x columns x frames is checked before a byte is decoded."""
    with pytest.raises(Refusal) as refused:
        require_size(frames, rows, columns)

    assert refused.value.code == RefusalCode.TOO_LARGE


@pytest.mark.parametrize(
    ("encoded", "jpeg2000", "jpeg"),
    [
        (b"", None, None),
        (b"\xff\xd8", None, None),
        (b"\xff\x4f\xff\x51\x00\x29", None, None),
        (b"\xff\x4f\xff\x51\x00\x29\x00\x00" + struct.pack(">4I", 30, 40, 10, 5), (35, 20), None),
        (b"\xff\xd8\xff\xe0\x00\x04\x00\x00\xff\xff\xc3\x00\x0b\x10\x00\x20\x00\x40", None, (32, 64)),
        (b"\xff\xd8\xff\xc4\x00\x04\x00\x00\xff\xf7\x00\x0b\x0c\x02\x00\x01\x00", None, (512, 256)),
        (b"\xff\xd8\x12\x34" + bytes(20), None, None),
    ],
)
def test_size_of_a_code_stream_is_read_from_its_header(
    encoded: bytes, jpeg2000: tuple[int, int] | None, jpeg: tuple[int, int] | None
) -> None:
    """Rows and columns of JPEG 2000, JPEG and JPEG-LS; None where the stream does not say."""
    assert (jpeg2000_size(encoded), jpeg_size(encoded)) == (jpeg2000, jpeg)
