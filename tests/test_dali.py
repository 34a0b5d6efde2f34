"""The DALI decoder gives Pillow's pixels or nothing: never what Pillow refuses, and one file never changes another."""

import io
import random
import struct
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from medmax_fast.data import dali
from medmax_fast.data.dali import DaliDecoder, admits, available, is_whole
from medmax_fast.runtime import InputError

SIZES = ((1, 1), (2, 1), (1, 3), (7, 9), (8, 8), (16, 15), (17, 33), (100, 75))


@pytest.fixture(scope="module")
def decoder():
    pytest.importorskip("nvidia.nvimgcodec", reason="DALI is not installed: pip install 'medmax_fast[dali]'")
    return DaliDecoder()


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with noise, so that chroma interpolation and clipping are exercised."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    smooth = 128 + 120 * np.sin(np.stack([x / 9 + y / 5, x / 4 - y / 11, x * y / 300], 2))
    return Image.fromarray((smooth + draw.integers(-25, 26, smooth.shape)).clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, format: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def by_pillow(data: bytes) -> np.ndarray | None:
    """Pillow's RGB pixels, None where it refuses the file."""
    try:
        return np.asarray(opened(data).convert("RGB"))
    except (OSError, SyntaxError, ValueError, LookupError, TypeError, EOFError, struct.error, zlib.error):
        return None


def png(pixels: np.ndarray, interlaced: bool = False) -> bytes:
    """An RGB PNG of 8 or 16 bits a channel, by hand: Pillow writes neither 16 bits in colour nor Adam7."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, _ = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8 * pixels.itemsize, 2, 0, 0, interlaced)
    adam7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    parts = [pixels[top::down, left::right] for left, top, right, down in adam7] if interlaced else [pixels]
    rows = b"".join(b"\0" + row.tobytes() for part in parts if part.size for row in part)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def admitted_files() -> dict[str, bytes]:
    """One file of every kind that is admitted, in every size."""
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {}
    for size in SIZES:
        rgb, grey = picture(*size), picture(*size).convert("L")
        deep = np.random.default_rng(1).integers(0, 65536, (*size[::-1], 3)).astype(">u2")
        for sampling in ("4:4:4", "4:2:2", "4:2:0"):
            for progressive in (False, True):
                content = encode(rgb, "JPEG", subsampling=sampling, progressive=progressive, quality=90)
                files[f"{sampling} {progressive=} {size}.jpg"] = content
        files |= {
            f"restart {size}.jpg": encode(rgb, "JPEG", restart_marker_blocks=1),
            f"rough {size}.jpg": encode(rgb, "JPEG", quality=5, optimize=True),
            f"kept as RGB {size}.jpg": encode(rgb, "JPEG", keep_rgb=True),
            f"turned {size}.jpg": encode(rgb, "JPEG", exif=turned, icc_profile=b"no profile", comment=b"\xff\xd9"),
            f"grey {size}.jpg": encode(grey, "JPEG"),
            f"grey progressive {size}.jpg": encode(grey, "JPEG", progressive=True),
            f"rgb {size}.png": encode(rgb, "PNG"),
            f"turned {size}.png": encode(rgb, "PNG", exif=turned),
            f"one transparent colour {size}.png": encode(rgb, "PNG", transparency=rgb.getpixel((0, 0))),
            f"interlaced {size}.png": png(np.asarray(rgb), interlaced=True),
            f"16 bits {size}.png": png(deep),
            f"16 bits interlaced {size}.png": png(deep, interlaced=True),
            f"lossy {size}.webp": encode(rgb, "WEBP"),
            f"lossless {size}.webp": encode(rgb, "WEBP", lossless=True),
        }
    return files


def test_equals_pillow_to_the_bit(decoder):
    files = admitted_files()
    assert len(files) == 20 * len(SIZES)
    for name, data in files.items():
        assert admits(opened(data)) and is_whole(data), name
        pixels = decoder.decode([data])[0]
        assert pixels is not None and pixels.dtype == np.uint8, name
        np.testing.assert_array_equal(pixels, by_pillow(data), name)


def test_chroma_layouts_that_pillow_cannot_write(decoder):
    from nvidia import nvimgcodec

    encoder = nvimgcodec.Encoder(device_id=nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY)
    for sampling in (nvimgcodec.ChromaSubsampling.CSS_411, nvimgcodec.ChromaSubsampling.CSS_440):
        options = nvimgcodec.EncodeParams(chroma_subsampling=sampling)
        for size in SIZES:
            data = bytes(encoder.encode(nvimgcodec.as_image(np.array(picture(*size))), "jpeg", params=options))
            assert opened(data).layer[0][1:3] in ((4, 1), (1, 2))
            np.testing.assert_array_equal(decoder.decode([data])[0], by_pillow(data))


def test_golden_images(golden, decoder):
    files = {path.name: path.read_bytes() for path in sorted((golden / "images").iterdir())}
    taken = {name for name, data in files.items() if admits(opened(data))}
    assert set(files) - taken == {
        *("alpha.png", "gray_alpha.png", "palette.png", "bilevel.png", "cell.png", "microaneurysms.png"),
        *("bitmap.bmp", "cmyk.jpg", "image.tif"),
    }
    for name, pixels in zip(sorted(taken), decoder.decode([files[name] for name in sorted(taken)]), strict=True):
        np.testing.assert_array_equal(pixels, by_pillow(files[name]), name)


def test_admits_nothing_that_the_policies_or_pillow_decide_otherwise():
    rgb = picture(20, 10)
    glass = rgb.copy()
    glass.putalpha(100)
    left = [encode(rgb.convert(mode), "PNG") for mode in ("1", "L", "LA", "P", "RGBA", "I;16")]
    left += [encode(rgb.convert(mode), "TIFF") for mode in ("L", "RGB", "CMYK", "F")]
    left += [encode(rgb, "BMP"), encode(rgb, "GIF"), encode(rgb, "PPM"), encode(rgb.convert("CMYK"), "JPEG")]
    left += [encode(glass, "WEBP"), encode(rgb.quantize(), "PNG", transparency=0)]
    for format in ("GIF", "PNG", "WEBP", "TIFF", "MPO"):
        left.append(encode(rgb, format, save_all=True, append_images=[picture(20, 10, seed=1)]))
    for data in left:
        assert not admits(opened(data)), opened(data)


def test_structure_of_jpeg():
    baseline, progressive = (encode(picture(64, 48), "JPEG", progressive=flag) for flag in (False, True))
    scan = baseline.index(b"\xff\xda") + 200
    for data in (baseline, progressive, baseline + b"trailing bytes \xff\xc0\xff"):
        assert is_whole(data)
    # No end, an end in the header, a marker that libjpeg stops at while OpenCV goes on, a second frame or scan.
    assert not is_whole(baseline[:-2]) and not is_whole(progressive[:-2]) and not is_whole(b"\xff\xd8\xff\xd9")
    for marker in (0x01, 0x37, 0xC0, 0xC2, 0xC4, 0xC9, 0xD8, 0xDA, 0xDC, 0xE0):
        assert not is_whole(baseline[:scan] + bytes((0xFF, marker)) + baseline[scan:]), hex(marker)
    for harmless in (b"\xff\x00", b"\xff\xff\x00", b"\xff\xd3"):
        assert is_whole(baseline[:scan] + harmless + baseline[scan:])
    frame = baseline.index(b"\xff\xc0")
    for marker in (0xC3, 0xC9, 0xCA):
        assert not is_whole(baseline[: frame + 1] + bytes((marker,)) + baseline[frame + 2 :])


def test_structure_of_webp():
    data = encode(picture(64, 48), "WEBP")
    assert is_whole(data)
    for other in (data[:-1], data + b"\0", data[:15], data[:20], data[:12] + b"VP8X" + data[16:]):
        assert not is_whole(other)


def test_files_that_are_no_images(decoder):
    junk = [b"", b"\xff", b"\xff\xd8", b"RIFF", b"<!DOCTYPE html>\n<html><body>404</body></html>", b"\0" * 1000]
    junk += [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0 not really", random.Random(0).randbytes(2000)]
    assert decoder.decode(junk) == [None] * len(junk) and decoder.decode([]) == []


def damaged(data: bytes, kind: str, draw: random.Random) -> bytes:
    content, place = bytearray(data), draw.randrange(len(data))
    if kind.endswith("%"):
        return data[: len(data) * int(kind[:-1]) // 100]
    if kind == "cut":
        return data[:place]
    if kind == "cut, then an end":
        return data[:place] + data[-12:]
    if kind == "cut, then zeros":
        return data[:place].ljust(len(data), b"\0")
    if kind == "bytes":
        for place in draw.sample(range(len(data)), draw.choice((1, 8))):
            content[place] = draw.randrange(256)
    elif kind == "marker":
        content[place : place + 2] = bytes((0xFF, draw.choice((0xC0, 0xC4, 0xD0, 0xD9, 0xDA, draw.randrange(256)))))
    elif kind == "inserted":
        content[place:place] = draw.randbytes(draw.randrange(1, 50))
    elif kind == "repeated":
        content[place:place] = data[draw.randrange(len(data)) :][:300]
    return bytes(content)


def test_what_pillow_refuses_is_never_let_through(decoder):
    draw = random.Random(0)
    rgb = picture(90, 70)
    files = [encode(rgb, "JPEG", progressive=flag, subsampling=mode) for flag in (0, 1) for mode in (0, 2)]
    files += [encode(rgb.convert("L"), "JPEG"), encode(rgb, "JPEG", restart_marker_blocks=3), encode(rgb, "PNG")]
    files += [encode(rgb, "WEBP"), encode(rgb, "WEBP", lossless=True)]
    kinds = ["10%", "50%", "90%", "99%"] + 12 * ["cut", "cut, then an end", "cut, then zeros", "bytes", "marker"]
    kinds += 12 * ["inserted", "repeated"]
    equal = refused = 0
    for data in files:
        for kind in kinds:
            broken = damaged(data, kind, draw)
            pixels = decoder.decode([broken])[0]
            if pixels is None:
                refused += by_pillow(broken) is None
                continue
            np.testing.assert_array_equal(pixels, by_pillow(broken))
            equal += 1
    assert refused > 200 and equal > 200, (refused, equal)


def test_a_broken_file_leaves_the_others_of_a_batch_alone(decoder):
    good = [encode(picture(80 + n, 60, seed=n), ("JPEG", "PNG", "WEBP")[n % 3]) for n in range(24)]
    alone = [decoder.decode([data])[0] for data in good]
    # Some fall to the structure rule, some only to the library: the damage of a PNG's third quarter is in its pixels.
    broken = {
        1: good[1][:-40],
        5: b"",
        9: good[9][:200] + b"\xff\x37" + good[9][200:],
        16: b"<html>",
        22: good[22][:300],
    }
    broken[13] = good[13][: len(good[13]) * 3 // 4] + bytes(20) + good[13][len(good[13]) * 3 // 4 + 20 :]
    assert is_whole(broken[13])
    for threads in (1, 2):
        found = DaliDecoder(threads).decode([broken.get(n, data) for n, data in enumerate(good)])
        for n, (pixels, expected) in enumerate(zip(found, alone, strict=True)):
            if n in broken:
                assert pixels is None, n
            else:
                np.testing.assert_array_equal(pixels, expected)


def test_many_threads_share_one_decoder(decoder):
    files = [encode(picture(200 + n, 150, seed=n), ("JPEG", "PNG", "WEBP")[n % 3]) for n in range(12)]
    files.insert(5, files[0][:-30])
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda data: decoder.decode([data])[0], files * 20))
    for n, pixels in enumerate(found):
        if n % len(files) == 5:
            assert pixels is None
        else:
            np.testing.assert_array_equal(pixels, by_pillow(files[n % len(files)]))


def test_memory_stays_flat(decoder):
    def resident() -> float:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * 4096 / 1e6

    data = encode(picture(500, 400), "JPEG")
    batch = [data, data[:-100], data]
    for _ in range(20):
        decoder.decode(batch)
    before = resident()
    for _ in range(200):
        decoder.decode(batch)
    # A leak of the pixels would be 240 MB, one of the files about 20.
    assert resident() - before < 15


def test_a_missing_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia", None)
    monkeypatch.setitem(sys.modules, "nvidia.nvimgcodec", None)
    assert available("cpu").endswith("pip install 'medmax_fast[dali]'") and "\n" not in available("cpu")
    with pytest.raises(InputError, match="dali"):
        DaliDecoder()


def test_a_library_that_is_too_old_is_refused(decoder, monkeypatch):
    from nvidia import nvimgcodec

    monkeypatch.delattr(nvimgcodec, "NVIMGCODEC_DEVICE_CPU_ONLY")
    with pytest.raises(InputError, match="expected 0.9 or newer .* pip install -U"):
        DaliDecoder()


def test_mixed_needs_a_gpu(decoder, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert available("cpu") == "" and "torch sees none" in available("mixed")
    with pytest.raises(InputError, match="torch sees none"):
        DaliDecoder(1, "mixed", 0)


@pytest.mark.gpu
def test_mixed_is_close_and_keeps_broken_files_apart(decoder):
    if reason := dali.available("mixed"):
        pytest.skip(reason)
    good = [encode(picture(400, 300, seed=n), ("JPEG", "PNG")[n % 2]) for n in range(8)]
    files = [*good[:3], good[4][:-50], *good[3:]]
    mixed = DaliDecoder(4, "mixed", 0)
    alone = [mixed.decode([data])[0] for data in good]
    found = mixed.decode(files)
    assert found.pop(3) is None
    for data, pixels, expected in zip(good, found, alone, strict=True):
        assert pixels.is_cuda and pixels.equal(expected)
        difference = np.abs(pixels.cpu().numpy().astype(int) - by_pillow(data))
        assert difference.mean() < 1 if opened(data).format == "JPEG" else not difference.any()
