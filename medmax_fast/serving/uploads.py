"""Images that users send, checked before anything costs memory, in a private folder that goes when the program ends.

A file is looked at in the order of what it costs: its bytes, its type by content, its width and height from the header,
then all of its pixels, which are decoded once here so that a broken file is refused before it waits in a line. File
names are random; what a user calls an image stands in messages only.
"""

import contextlib
import math
import secrets
import shutil
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path

from medmax_fast.data.images import FORMATS, MAX_PIXELS, ImageError, decode
from medmax_fast.data.resize import fit
from medmax_fast.model.picture_decoder import png
from medmax_fast.runtime import InputError, one_line

# Images decoded at a time, which bounds memory: one of 50 million pixels takes 200 MB and more.
DECODERS = 2
# Of more pixels than this only the 512 x 512 that a model sees are kept, so that nothing large is decoded twice.
_LARGE = 4_000_000
# pydicom inflates such a file whole before anything of it can be looked at: a few kB may become GBs.
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_LABEL = 80


class Uploads:
    """A folder of checked images, for any thread; to be used as a context manager, which deletes it at the end."""

    def __init__(self, max_mb: float = 20.0, max_pixels: float = 50.0):
        """max_mb: most MB (10^6 bytes) of a file. max_pixels: most millions of pixels. InputError if not positive."""
        for flag, value in (("--max-upload-mb", max_mb), ("--max-pixels", max_pixels)):
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{flag} {value:g}: expected a positive number")
        self.max_bytes = int(max_mb * 1e6)
        self.max_pixels = min(int(max_pixels * 1e6), MAX_PIXELS)
        size = f"{max_mb:g} MB and {self.max_pixels / 1e6:g} million pixels"
        self._allowed = f"allowed are {', '.join(FORMATS)} and DICOM, up to {size}"
        self._folder: Path | None = None
        self._paths: set[Path] = set()
        self._decoding, self._writing = threading.BoundedSemaphore(DECODERS), threading.Lock()

    def add(self, data: bytes, name: str) -> Path:
        """Check the bytes of an image file and keep them, or what a model sees of a large one; the path of that.

        name: what the user calls it, for messages. InputError says what was found and what is allowed.
        """
        name = label(name)
        if len(data) > self.max_bytes:
            raise InputError(f"{name}: {len(data) / 1e6:.1f} MB; {self._allowed}")
        if data[128:132] == b"DICM" and _DEFLATED in data:
            raise InputError(f"{name}: DICOM with transfer syntax Deflated Explicit VR Little Endian; {self._allowed}")
        try:
            with self._decoding:
                picture = decode(data, name, max_pixels=self.max_pixels)
                assert picture.pixels is not None
                small = fit(picture.pixels) if math.prod(picture.size) > _LARGE else None
        except ImageError as error:
            raise InputError(f"{name}: {error.reason}; {self._allowed}") from error
        # Not while the folder is being deleted.
        with self._writing:
            if self._folder is None:
                raise RuntimeError("the folder of uploads is not open")
            path = self._folder / secrets.token_hex(16)
            try:
                path.write_bytes(data if small is None else png(small))
            except OSError:
                path.unlink(missing_ok=True)
                raise
            self._paths.add(path)
        return path

    def drop(self, paths: Iterable[Path]) -> None:
        """Delete files that `add` made; those that are gone, and others, are left alone."""
        for path in paths:
            if path in self._paths:
                self._paths.discard(path)
                path.unlink(missing_ok=True)

    def __len__(self) -> int:
        """Files that are kept at present."""
        return len(self._paths)

    def __enter__(self) -> "Uploads":
        # Readable by this user alone, as mkdtemp makes it.
        self._folder = Path(tempfile.mkdtemp(prefix="medmax-"))
        return self

    def __exit__(self, *_) -> None:
        with self._writing:
            folder, self._folder = self._folder, None
            self._paths.clear()
        assert folder is not None
        # A thread may be dropping a last file.
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)


def label(name: str) -> str:
    """A name from outside as part of a message: one short line of printable characters."""
    return "".join(c if c.isprintable() else "?" for c in one_line(name, _LABEL))
