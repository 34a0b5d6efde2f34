"""Image decoding with nvImageCodec, the decoder library of DALI, to the same pixels as Pillow or not at all.

DALI's image operator hands its work to this library. It is called here without the operator: on one core a
one-megapixel JPEG takes 3.5 ms instead of 3.9, resident memory is 70 MB instead of 340, and a file of a batch that
cannot be decoded comes back as None where the operator gives up on the whole batch. (Pillow: 3.6 ms, and 4.4 with the
copy to three bytes a pixel.)

What may be decoded is decided before the library sees it, in two steps.

- `admits`: the format and mode that Pillow found in the header. On the CPU all of these are equal to Pillow's pixels
  to the bit, whatever the chroma subsampling, interlacing, bit depth or size; EXIF orientation is ignored.
- `is_whole`: the file's own structure. Where libjpeg refuses a file, the library tries OpenCV, which fills the missing
  part with grey; and nvJPEG has rules of its own. Pillow decides on all files that could come to that.
"""

import os
import re
import struct
import threading
from collections.abc import Sequence

import numpy as np
from PIL import Image

from medmax_fast.runtime import InputError

DEVICES = ("cpu", "mixed")

# Left to Pillow because it is faster: BMP, TIFF and palettes (by up to 40 %), grey PNG (equal). Because the pixels or
# the policies of data/modes.py differ: alpha, 16-bit grey, CMYK, oriented TIFF. Because the library cannot: GIF, AVIF.
_ADMITTED = frozenset({("JPEG", "L"), ("JPEG", "RGB"), ("PNG", "RGB"), ("WEBP", "RGB")})

# A JPEG marker; in compressed data FF 00 is the byte FF, FF FF is padding and D0..D7 restart the decoder.
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])", re.DOTALL)
_EOI, _SOS = b"\xd9", b"\xda"
# Baseline, extended and progressive Huffman coding; arithmetic and lossless files are Pillow's.
_PROGRESSIVE = b"\xc2"
_FRAMES = frozenset({b"\xc0", b"\xc1", _PROGRESSIVE})
_TABLES = frozenset({b"\xc4", b"\xdb", b"\xdd", b"\xfe", *(bytes([code]) for code in range(0xE0, 0xF0))})


def available(device: str) -> str:
    """Empty if `DaliDecoder` works for this device here, else one line: why not, and what to install."""
    assert device in DEVICES, device
    # Its own lines about files that it refuses; the caller reports those by name.
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
    try:
        from nvidia import nvimgcodec
    except ImportError as error:
        return f"decoding with DALI needs its codec library ({error}): pip install 'medmax_fast[dali]'"
    # Before it had this name, the library asked for a driver even to decode on the CPU.
    if not hasattr(nvimgcodec, "NVIMGCODEC_DEVICE_CPU_ONLY"):
        found = nvimgcodec.__version__
        return f"nvImageCodec {found}, expected 0.9 or newer (DALI 2.3): pip install -U 'medmax_fast[dali]'"
    if device == "mixed":
        import torch

        if not torch.cuda.is_available():
            return "decoding on the GPU needs one, and torch sees none: decode on the CPU"
    return ""


def admits(image: Image.Image) -> bool:
    """Whether an image that Pillow has opened (not necessarily loaded) is of a kind for `DaliDecoder`."""
    return (image.format, image.mode) in _ADMITTED and getattr(image, "n_frames", 1) == 1


def is_whole(data: bytes) -> bool:
    """Whether a file is a JPEG, PNG or WebP whose structure leaves no room for two opinions on its pixels.

    True does not say that it can be decoded; False says that Pillow should look at it.
    """
    if data.startswith(b"\xff\xd8"):
        return _is_whole_jpeg(data)
    if data.startswith(b"RIFF"):
        return _is_whole_webp(data)
    # Every part of a PNG has a checksum, and libpng is stricter than Pillow about them.
    return data.startswith(b"\x89PNG\r\n\x1a\n")


def _is_whole_jpeg(data: bytes) -> bool:
    """One frame, then scans with nothing but tables and comments between them, then the end of the image.

    A baseline file has one scan: the library reads it row by row, and what is wrong behind it would go unnoticed.
    """
    frame, scanned = b"", False
    position = 2
    while match := _MARKER.search(data, position):
        code = match[1]
        if code == _EOI:
            return scanned
        if scanned and frame != _PROGRESSIVE:
            return False
        if code in _FRAMES and not frame:
            frame = code
        elif code == _SOS and frame:
            scanned = True
        elif code not in _TABLES:
            return False
        length = data[match.end() : match.end() + 2]
        if len(length) < 2:
            return False
        position = match.end() + max(struct.unpack(">H", length)[0], 2)
    return False


def _is_whole_webp(data: bytes) -> bool:
    """The simple layout: a RIFF header, and one chunk of picture that ends where the file ends."""
    if len(data) < 20 or data[8:12] != b"WEBP" or data[12:16] not in (b"VP8 ", b"VP8L"):
        return False
    whole, chunk = struct.unpack("<I", data[4:8])[0], struct.unpack("<I", data[16:20])[0]
    return whole + 8 == len(data) == 20 + chunk + chunk % 2


class DaliDecoder:
    """Decodes admitted images on the CPU, or on a GPU ("mixed") with nvJPEG and its slightly different pixels.

    Any number of threads may call `decode` of one object: each gets a library decoder of its own (they are not thread
    safe), with `threads` CPU threads, and works without the GIL. From a pool, use one thread and one file per call; on
    a GPU, call from one thread with whole batches, since every library decoder keeps memory there. device_id: the
    GPU's number, None for "cpu". Raises InputError if `available` has a reason.
    """

    def __init__(self, threads: int = 1, device: str = "cpu", device_id: int | None = None):
        assert threads >= 1 and (device_id is None) == (device == "cpu"), (threads, device, device_id)
        if reason := available(device):
            raise InputError(reason)
        from nvidia import nvimgcodec

        # The smoother chroma interpolation, as Pillow's; nvJPEG has a faster one.
        self._options = {"max_num_cpu_threads": threads, "options": ":fancy_upsampling=1"}
        if device == "cpu":
            # Without a word about backends the library looks for a driver, and decodes nothing where there is none.
            self._options["device_id"] = nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY
            self._options["backends"] = [nvimgcodec.Backend(nvimgcodec.BackendKind.CPU_ONLY)]
        else:
            self._options["device_id"] = device_id
        self._gpu = device_id
        self._params = nvimgcodec.DecodeParams(apply_exif_orientation=False, color_spec=nvimgcodec.ColorSpec.SRGB)
        self._local = threading.local()

    def decode(self, data: Sequence[bytes]) -> list:
        """Pixels of each file, RGB uint8 [H, W, 3], or None where Pillow is to decide.

        NumPy arrays on the CPU, torch tensors on the GPU (ready on torch's current stream). The files are taken to be
        `admits`-ted and of a size that fits into memory; whether one of them is broken changes nothing for the others.
        """
        from nvidia import nvimgcodec

        places, streams = [], []
        for place, content in enumerate(data):
            if is_whole(content):
                try:
                    streams.append(nvimgcodec.CodeStream(content))
                except RuntimeError:
                    continue
                places.append(place)
        pixels = [None] * len(data)
        if streams:
            for place, image in zip(places, self._run(streams), strict=True):
                pixels[place] = image
        return pixels

    def _run(self, streams: list) -> list:
        from nvidia import nvimgcodec

        if not hasattr(self._local, "decoder"):
            self._local.decoder = nvimgcodec.Decoder(**self._options)
        decode = self._local.decoder.decode
        if self._gpu is None:
            images = decode(streams, params=self._params)
            return [None if image is None else np.asarray(image) for image in images]
        import torch

        stream = torch.cuda.current_stream(self._gpu).cuda_stream
        images = decode(streams, params=self._params, cuda_stream=stream)
        return [None if image is None else torch.from_dlpack(image.to_dlpack(stream)) for image in images]
