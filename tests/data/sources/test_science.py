"""Pictures of science: DICOM written by pydicom, 16-bit and floating-point files, and their windows."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from picture_files import as_bytes, make_picture
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    RLELossless,
    generate_uid,
)

from pipeline.data.dataset import open_dataset
from pipeline.data.shard_reader import iterate

GRAY = ("--size", 32, "--channels", 1, "--workers", 1)
SECRET = "Doe^Jane"


def ct(first: int = 0, **fields: Any) -> FileDataset:
    """Return a slice of a CT: stored values 0 to 4095, of which 1024 are taken off, as scanners write it."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    file.PatientName, file.PatientID, file.Modality = SECRET, "4711", "CT"
    file.Rows = file.Columns = 32
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
    file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 16, 12, 11, 0
    file.RescaleSlope, file.RescaleIntercept = 1, -1024
    file.WindowCenter, file.WindowWidth = [40, 600], [400, 1600]
    file.PixelData = stored(first).tobytes()
    for name, value in fields.items():
        setattr(file, name, value)
    return file


def stored(first: int = 0) -> NDArray[np.uint16]:
    return (np.arange(1024).reshape(32, 32) * 4 + first).astype(np.uint16)


def images(out: Path) -> NDArray[np.uint8]:
    return next(iter(iterate(open_dataset(out))))[..., 0]


def windowed(values: NDArray[Any], low: float, high: float) -> NDArray[np.float64]:
    return np.clip((values.astype(np.float64) - low) / (high - low), 0, 1) * 255


def test_a_ct_is_seen_through_its_window(dcgan_data: Any, tmp_path: Path) -> None:
    src = tmp_path / "src"
    src.mkdir()
    ct().save_as(src / "a.dcm")
    ct().save_as(src / "IM0001")  # as PACS name them
    units = stored().astype(int) - 1024
    for window, low, high in (
        ("-1000,400", -1000, 400),
        ("file", 40 - 0.5 - 399 / 2, 40 - 0.5 + 399 / 2),
        ("percentile:1,99", *np.percentile(units, [1, 99])),
    ):
        out = tmp_path / window.replace(":", "")
        done = dcgan_data("build", "folder", src, out, *GRAY, "--window", window)
        assert done.code == 0, done.err
        found = images(out)
        assert len(found) == 2
        assert np.abs(found - windowed(units, low, high)).max() <= 0.51
        assert json.loads((out / "dataset.json").read_text())["source"]["window"] == window


def test_no_field_of_a_patient_is_copied(dcgan_data: Any, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    ct().save_as(tmp_path / "src" / "a.dcm")
    done = dcgan_data("build", "folder", tmp_path / "src", tmp_path / "out", *GRAY, "--window", "file")
    assert done.code == 0, done.err
    for path in (tmp_path / "out").iterdir():
        assert b"Doe" not in path.read_bytes()
        assert b"4711" not in path.read_bytes()


def test_other_dicoms(dcgan_data: Any, tmp_path: Path) -> None:
    """Larger is darker; 8 bits and color, which need no window; RLE; several frames, of which the first is taken."""
    picture = make_picture(1, 32, 32)
    eight: dict[str, Any] = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "RescaleIntercept": 0}
    color: dict[str, Any] = {
        **eight,
        "SamplesPerPixel": 3,
        "PhotometricInterpretation": "RGB",
        "PlanarConfiguration": 0,
    }
    rle = ct()
    rle.compress(RLELossless)
    cases: dict[str, tuple[FileDataset, NDArray[Any], int]] = {
        "inverted": (ct(PhotometricInterpretation="MONOCHROME1"), 255 - windowed(stored(), 1024, 3024), 1),
        "eight": (ct(**eight, PixelData=picture[..., 0].tobytes()), picture[..., 0], 1),
        "color": (ct(**color, PixelData=picture.tobytes()), picture, 3),
        "rle": (rle, windowed(stored(), 1024, 3024), 1),
        "frames": (
            ct(NumberOfFrames=2, PixelData=stored().tobytes() + stored(9).tobytes()),
            windowed(stored(), 1024, 3024),
            1,
        ),
    }
    for name, (file, expected, channels) in cases.items():
        (tmp_path / name).mkdir()
        file.save_as(tmp_path / name / "a.dcm")
        options = ("--size", 32, "--channels", channels, "--workers", 1, "--window", "0,2000")
        done = dcgan_data("build", "folder", tmp_path / name, tmp_path / f"{name}-out", *options)
        assert done.code == 0, (name, done.err)
        found = next(iter(iterate(open_dataset(tmp_path / f"{name}-out"))))[0]
        assert np.abs(found - expected.reshape(found.shape)).max() <= 0.51, name


def test_sixteen_bits_and_floats_have_windows_too(dcgan_data: Any, tmp_path: Path) -> None:
    values = stored(500)
    files = {
        "a.png": as_bytes(Image.fromarray(values), "PNG"),
        "a.tiff": as_bytes(Image.fromarray(values.astype(np.float32)), "TIFF"),
    }
    for name, data in files.items():
        src = tmp_path / name.rpartition(".")[2]
        src.mkdir()
        (src / name).write_bytes(data)
        done = dcgan_data("build", "folder", src, tmp_path / f"{name}-out", *GRAY, "--window", "500,4592")
        assert done.code == 0, done.err
        assert np.abs(images(tmp_path / f"{name}-out")[0] - windowed(values, 500, 4592)).max() <= 0.51
        done = dcgan_data("build", "folder", src, tmp_path / "no", *GRAY, "--window", "file", "--max-bad", 1)
        assert (done.code, "states no window" in done.err) == (65, True), done.err


def test_what_gives_no_picture_is_one_line(dcgan_data: Any, tmp_path: Path) -> None:
    deflated, empty = ct(), ct()
    deflated.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    del empty.PixelData
    files = {
        "plain": (ct(), "floating-point pixels from -1e+03 to 3e+03, expected 0 to 1, or --window"),
        "deflated": (deflated, "deflated as a whole"),
        "without": (empty, "DICOM without pixels"),
        "huge": (ct(Rows=60_000, Columns=60_000), "too many pixels"),
        "short": (ct(PixelData=bytes(10)), "undecodable"),
    }
    for name, (file, words) in files.items():
        src = tmp_path / name
        src.mkdir()
        file.save_as(src / "a.dcm")
        window = () if name == "plain" else ("--window", "file")
        done = dcgan_data("build", "folder", src, tmp_path / "out", *GRAY, *window, "--max-bad", 1)
        assert (done.code, words in done.err) == (65, True), (name, done.err)
        assert "Traceback" not in done.err
        assert SECRET not in done.err
    (tmp_path / "cut").mkdir()
    ct().save_as(tmp_path / "cut" / "a.dcm")
    data = (tmp_path / "cut" / "a.dcm").read_bytes()
    for size in (132, 140, 200, 400, len(data) - 300):
        (tmp_path / "cut" / "a.dcm").write_bytes(data[:size])
        done = dcgan_data("build", "folder", tmp_path / "cut", tmp_path / "out", *GRAY, "--window", "file")
        assert (done.code, "Traceback" in done.err) == (65, False), (size, done.err)
    odd = bytearray(data)
    odd[odd.index(b"1.2.840.10008.5.1.4.1.1.2") + 3] = ord("x")
    (tmp_path / "cut" / "a.dcm").write_bytes(odd)
    done = dcgan_data("build", "folder", tmp_path / "cut", tmp_path / "odd", *GRAY, "--window", "file")
    assert "Warning" not in done.err


@pytest.mark.parametrize("window", ["1", "2,1", "a,b", "percentile:50,200", "percentile:9,1", "1,1", "nan,1"])
def test_a_wrong_window_is_refused(dcgan_data: Any, tmp_path: Path, window: str) -> None:
    (tmp_path / "src").mkdir()
    done = dcgan_data("build", "folder", tmp_path / "src", tmp_path / "out", "--window", window)
    assert (done.code, window in done.err) == (2, True), done.err


def test_every_frame_of_a_dicom_through_its_window(dcgan_data: Any, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    frames = [stored(), stored()[::-1], stored().T]
    ct(NumberOfFrames=3, PixelData=b"".join(frame.tobytes() for frame in frames)).save_as(tmp_path / "src" / "a.dcm")
    ct().save_as(tmp_path / "src" / "b.dcm")
    options = (*GRAY, "--window", "0,2000", "--all-frames")
    done = dcgan_data("build", "folder", tmp_path / "src", tmp_path / "out", *options)
    assert done.code == 0, done.err
    pixels, columns = next(iter(iterate(open_dataset(tmp_path / "out"), labels=True)))
    found = dict(zip(columns["key"], pixels[..., 0], strict=True))
    assert sorted(found) == ["a.dcm#0", "a.dcm#1", "a.dcm#2", "b.dcm"]
    for index, frame in enumerate(frames):
        assert np.abs(found[f"a.dcm#{index}"] - windowed(frame, 1024, 3024)).max() <= 0.51


@pytest.mark.parametrize("kind", ["int16", "uint16", "float32", "float64", "int32"])
def test_arrays_of_more_than_8_bits_have_windows(dcgan_data: Any, tmp_path: Path, kind: str) -> None:
    values = (stored().astype(np.int64) - (0 if kind == "uint16" else 1024)).astype(kind)
    np.savez(tmp_path / "a.npz", images=np.stack([values, values]))
    low = 24 if kind == "uint16" else -1000
    out = tmp_path / "out"
    done = dcgan_data("build", "arrays", tmp_path / "a.npz", out, *GRAY, "--window", f"{low},{low + 1400}")
    assert done.code == 0, done.err
    assert np.abs(images(out) - windowed(values, low, low + 1400)).max() <= 0.51
    if kind == "int16":
        done = dcgan_data("build", "arrays", tmp_path / "a.npz", tmp_path / "no", *GRAY, "--max-bad", 1)
        assert (done.code, "expected 0 to 255, or --window" in done.err) == (65, True), done.err


def test_a_window_that_changes_nothing_is_refused_or_said(dcgan_data: Any, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.stack([make_picture(index, 32, 32) for index in range(3)]))
    done = dcgan_data("build", "arrays", tmp_path / "a.npy", tmp_path / "out", *GRAY, "--window", "0,9")
    assert (done.code, "--window 0,9: has no effect" in done.err) == (2, True), done.err
    assert not (tmp_path / "out").exists()
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.png").write_bytes(as_bytes(Image.fromarray(make_picture(1)), "PNG"))
    done = dcgan_data("build", "folder", tmp_path / "src", tmp_path / "out", *GRAY, "--window", "0,9")
    assert (done.code, "note: --window 0,9 changes none of the first 1 pictures" in done.err) == (0, True), done.err
