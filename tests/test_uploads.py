"""What users send as images: refused before it costs anything, kept privately, and gone at the end."""

import io
import os
import resource
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from medmax_fast.data.images import load_image
from medmax_fast.runtime import InputError
from medmax_fast.serving.uploads import Uploads


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """The folder in which private folders are made."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))


def packed(image: Image.Image, format: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format)
    return stream.getvalue()


def dicom(**elements) -> bytes:
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = elements.pop("syntax", ExplicitVRLittleEndian)
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
    dataset = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
    values = {"Rows": 4, "Columns": 6, "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2"}
    values |= {
        "BitsAllocated": 8,
        "BitsStored": 8,
        "HighBit": 7,
        "PixelRepresentation": 0,
        "PixelData": bytes(range(24)),
    }
    for name, value in (values | elements).items():
        setattr(dataset, name, value)
    stream = io.BytesIO()
    pydicom.dcmwrite(stream, dataset)
    return stream.getvalue()


def png_bomb(width: int, height: int) -> bytes:
    """A PNG of one grey level, small however large it is."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    pixels = zlib.compress(bytes(height * (width // 8 + 1)), 9)
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def test_what_is_an_image_is_kept_as_it_is(picture, temporary):
    with Uploads() as uploads:
        (folder,) = temporary.iterdir()
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        files = [packed(picture, format) for format in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")]
        files.append(dicom())
        paths = [uploads.add(data, "../../etc/passwd\0") for data in files]
        assert [path.read_bytes() for path in paths] == files
        assert {path.parent for path in paths} == {folder} and len(set(paths)) == len(paths) == len(uploads)
        assert all(path.name.isalnum() for path in paths)
        outside = temporary / "other.png"
        outside.write_bytes(files[0])
        uploads.drop([*paths[:2], outside, paths[0]])
        assert outside.exists() and sorted(folder.iterdir()) == sorted(paths[2:]) and len(uploads) == len(paths) - 2
    assert not folder.exists()
    with pytest.raises(RuntimeError, match="not open"):
        uploads.add(files[0], "late.png")


def test_of_a_large_image_only_what_a_model_sees_is_kept(fresh_seed):
    pixels = np.random.default_rng(fresh_seed).integers(0, 256, (1601, 2503, 4), dtype=np.uint8)
    data = packed(Image.fromarray(pixels).convert("RGBA"), "PNG")
    with Uploads() as uploads:
        path = uploads.add(data, "large.png")
        assert Image.open(path).size == (512, 512)
        np.testing.assert_array_equal(load_image(path), load_image(io.BytesIO(data)))


def test_a_full_disk_leaves_no_part_of_a_file(picture, temporary, monkeypatch):
    def fill(path, data):
        with open(path, "wb") as file:
            file.write(data[:7])
        raise OSError(28, "No space left on device")

    with Uploads() as uploads:
        monkeypatch.setattr("pathlib.Path.write_bytes", fill)
        with pytest.raises(OSError, match="No space left"):
            uploads.add(packed(picture, "PNG"), "a.png")
        (folder,) = temporary.iterdir()
        assert not list(folder.iterdir()) and not len(uploads)


def test_refusals_say_what_was_found_and_what_is_allowed(picture):
    png, jpeg = packed(picture, "PNG"), packed(picture, "JPEG")
    cases = [
        (b"", "a.png", "a.png: empty file; allowed are JPEG, PNG, "),
        (b"GIF89a", "a.gif", "a.gif: .*; allowed are JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "a.eps", "a.eps: not an image, or cut off in its header .*; allowed are"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "a.svg", "a.svg: not an image.*; allowed are"),
        (b"<!doctype html><p>", "a.png", "a.png: an HTML or XML page, not an image; allowed"),
        (png[: len(png) // 2], "cut.png", "cut.png: broken image .*; allowed"),
        (jpeg[: len(jpeg) // 2], "cut.jpg", "cut.jpg: broken image .*; allowed"),
        (dicom()[:-20], "cut.dcm", "cut.dcm: broken .*DICOM.*; allowed"),
        (png + bytes(100_001), "b.png", r"b.png: 0.1 MB; allowed are .*DICOM, up to 0.1 MB and 0.01 million pixels$"),
        (png_bomb(101, 100), "c.png", "c.png: 101 x 100 pixels, expected at most 10000; allowed"),
        (dicom(Rows=101, Columns=100), "c.dcm", "c.dcm: .*DICOM of 100 x 101 pixels, expected at most 10000"),
        (png_bomb(2, 4_000), "thin.png", "thin.png: 2 x 4000 pixels would be resized to 512 x 1024000, too thin"),
        (dicom(syntax="1.2.840.10008.1.2.1.99"), "z.dcm", "z.dcm: DICOM with transfer syntax Deflated Explicit VR"),
        (b"x", "a\nb\x1b[2J" + "c" * 200, r"^a b\?\[2Jc{70,80}\.\.\.: not an image"),
    ]
    with Uploads(0.1, 0.01) as uploads:
        for data, name, message in cases:
            with pytest.raises(InputError, match=message) as caught:
                uploads.add(data, name)
            assert str(caught.value).isprintable()
        assert len(uploads) == 0 and not any(uploads._folder.iterdir())


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_costs_nothing():
    bomb = png_bomb(20_000, 20_000)
    assert len(bomb) < 100_000
    deflated = dicom(syntax="1.2.840.10008.1.2.1.99", Rows=10_000, Columns=10_000, PixelData=bytes(100_000_000))
    large = png_bomb(13_000, 13_000)
    with Uploads() as uploads:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.process_time()
        for data, name, message in (
            (bomb, "bomb.png", "bomb.png: decompression bomb, expected at most 50000000 pixels; allowed"),
            (large, "large.png", "large.png: 13000 x 13000 pixels, expected at most 50000000; allowed"),
            (deflated, "bomb.dcm", "bomb.dcm: DICOM with transfer syntax Deflated"),
        ):
            with pytest.raises(InputError, match=message):
                uploads.add(data, name)
        assert time.process_time() - start < 0.5
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_limits_are_positive(value):
    with pytest.raises(InputError, match=f"--max-upload-mb {value:g}: expected a positive number"):
        Uploads(max_mb=value)
    with pytest.raises(InputError, match=f"--max-pixels {value:g}: expected a positive number"):
        Uploads(max_pixels=value)


def test_many_threads(picture, temporary):
    data, failed = packed(picture, "PNG"), []

    def send() -> None:
        for i in range(20):
            try:
                uploads.add(data[: len(data) - 100 * (i % 2)], "x")
            except InputError:
                failed.append(i)

    with Uploads() as uploads:
        threads = [threading.Thread(target=send) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (folder,) = temporary.iterdir()
        assert len(list(folder.iterdir())) == len(uploads) == len(failed) == 80
    assert not any(temporary.iterdir())


def test_everything_goes_with_an_exception(picture, temporary):
    with pytest.raises(ZeroDivisionError), Uploads() as uploads:
        uploads.add(packed(picture, "PNG"), "x")
        assert len(list(temporary.rglob("*"))) == 2
        raise ZeroDivisionError
    assert not any(temporary.iterdir())


def test_everything_goes_with_sigterm(picture, tmp_path):
    data = tmp_path / "a.png"
    data.write_bytes(packed(picture, "PNG"))
    folder = tmp_path / "private"
    folder.mkdir()
    program = (
        "import signal, sys, time\n"
        "from pathlib import Path\n"
        "from medmax_fast.serving.uploads import Uploads\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit('ended'))\n"
        "with Uploads() as uploads:\n"
        "    uploads.add(Path(sys.argv[1]).read_bytes(), 'x')\n"
        "    print('kept', flush=True)\n"
        "    time.sleep(60)\n"
    )
    environment = {**os.environ, "TMPDIR": str(folder)}
    command = [sys.executable, "-c", program, str(data)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        assert process.stdout.readline() == "kept\n"
        assert len([path for path in folder.rglob("*") if path.is_file()]) == 1
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=60) == ("", "ended\n")
    assert not any(folder.iterdir())
