"""The bytes of an archive: its part files found by name and read as one, and the stream inside of gzip."""

import os
import re
import string
import threading
import zlib
from bisect import bisect_right
from collections import deque
from itertools import accumulate
from pathlib import Path
from typing import Any

from medmax_fast.runtime import InputError

_PART = r"([._-]?(?:part)?[._-]?)([0-9]{1,5}|[a-z]{2,})"
_NAME = re.compile(rf"(.+\.(?i:tar\.gz|tar|tgz))(?:{_PART})?")
# The letters that split writes: two by default (after yz it goes on with zaaa), longer ones by its option -a.
_LETTERS = re.compile(r"[a-z]{2}|a[a-z]{2}|aa[a-z]{2,3}|z[a-z]{3,}")
# Suffixes of files that lie beside archives and look like a part's letters.
_COMPANIONS = {"asc", "br", "bz", "gz", "lz", "md", "xz", "zstd"}

MIB = 1 << 20
_INPUT, _OUTPUT = MIB // 4, MIB
# How far back gzip data stays at hand: threads that take members in order may reach them a little out of order.
_WINDOW = 32 * MIB


def is_archive(path: str | Path) -> bool:
    """Whether a name is that of a tar archive (.tar, .tar.gz, .tgz) or of a part of one (.aa, .00, .part0, _aa, ..)."""
    match = _NAME.fullmatch(Path(path).name)
    if not match:
        return False
    label = match[3]
    return label is None or label.isdigit() or bool(_LETTERS.fullmatch(label)) and label not in _COMPANIONS


def find_parts(path: str | Path) -> list[Path]:
    """The files that make up an archive, in order: the one file, or all parts that lie in its folder.

    path: the archive, any of its parts, or the name that the parts have in common. InputError: nothing there, a gap
    in the sequence of parts, or two sequences to choose from. That the last part is there shows only on reading.
    """
    path = Path(path)
    match = _NAME.fullmatch(path.name)
    if not match:
        raise InputError(f"{path}: not the name of an archive, expected .tar, .tar.gz, .tgz or a part of one")
    whole, joint, label = match.groups()
    if label is None and path.is_file():
        return [path]
    found: dict[tuple[str, bool], list[str]] = {}
    for name in os.listdir(path.parent) if path.parent.is_dir() else ():
        part = re.fullmatch(_PART, name[len(whole) :]) if name.startswith(whole) else None
        if part and (part[2].isdigit() or _LETTERS.fullmatch(part[2])):
            found.setdefault((part[1], part[2].isdigit()), []).append(part[2])
    if label is None:
        found = {key: labels for key, labels in found.items() if not _COMPANIONS.issuperset(labels)}
    elif label in found.get((joint, label.isdigit()), ()):
        found = {(joint, label.isdigit()): found[joint, label.isdigit()]}
    else:
        raise InputError(f"{path}: no such file")
    if not found:
        raise InputError(f"{path}: no such file, nor parts of it ({whole}.aa, .00, .part0 or the like)")
    if len(found) > 1:
        names = " and ".join(sorted(f"{whole}{joint}{labels[0]}" for (joint, _), labels in found.items()))
        raise InputError(f"{path}: several sequences of parts ({names}), name one of the files")
    ((joint, _), labels) = found.popitem()
    return [path.parent / f"{whole}{joint}{label}" for label in _sequence(path, labels)]


def _sequence(path: Path, labels: list[str]) -> list[str]:
    # By length first: 9 before 10, and yz before zaaa.
    ordered = sorted(labels, key=lambda label: (len(label), label))
    sequence: list[str] = []
    for label in ordered:
        if label in _successors(sequence[-1]) if sequence else re.fullmatch("a+|0*[01]", label):
            sequence.append(label)
        elif label not in _COMPANIONS:
            place = f"between {sequence[-1]!r} and" if sequence else "before"
            raise InputError(f"{path}: parts are missing {place} {label!r}")
    if not sequence:
        raise InputError(f"{path}: parts are missing before {ordered[0]!r}")
    return sequence


def _successors(label: str) -> list[str]:
    """What may follow a part's label: the next one of its width, a digit more, or GNU split's next width."""
    symbols = string.digits if label.isdigit() else string.ascii_lowercase
    zero, last = symbols[0], symbols[-1]
    head = label.rstrip(last)
    turned = len(label) - len(head)
    found = []
    if head:
        found.append(head[:-1] + symbols[symbols.index(head[-1]) + 1] + zero * turned)
    elif label.isdigit():
        found.append("1" + zero * turned)
    # Without -a, split goes from yz to zaaa and from zyzz to zzaaaa (from 89 to 9000), so that names stay sorted.
    level = len(label) // 2 - 1
    if level >= 0 and label == last * level + symbols[-2] + last * (level + 1):
        found.append(last * (level + 1) + zero * (level + 3))
    return found


class Parts:
    """Part files as one: `pread(offset, size)` from any thread, short only at the end.

    A part is opened for each read, which costs no more than an image in a file of its own would, and leaves
    nothing open, however many parts and processes there are.
    """

    def __init__(self, files: list[Path]):
        try:
            stats = [file.stat() for file in files]
        except OSError as error:
            raise InputError(f"{error.filename}: {error.strerror}") from error
        self.name = str(files[0]) if len(files) == 1 else f"{files[0]} .. {files[-1].name}"
        self.identity = [[f.name, s.st_size, s.st_mtime_ns] for f, s in zip(files, stats, strict=True)]
        self._files = files
        self._starts = [0, *accumulate(s.st_size for s in stats)]
        self.size = self._starts[-1]
        self.consumed = 0

    def pread(self, offset: int, size: int) -> bytes:
        pieces = []
        end = min(offset + size, self.size)
        while offset < end:
            part = bisect_right(self._starts, offset) - 1
            pieces.append(self._read(part, offset - self._starts[part], min(end, self._starts[part + 1]) - offset))
            offset += len(pieces[-1])
        self.consumed = max(self.consumed, end)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _read(self, part: int, offset: int, size: int) -> bytes:
        file = self._files[part]
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                data = os.pread(descriptor, size, offset)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise InputError(f"{file}: {error.strerror}") from error
        if not data:
            raise InputError(f"{file}: ends at byte {offset}, it was longer when it was opened")
        return data


class Gunzip:
    """The decompressed stream of gzip data (of one or several gzip members), with checksums verified by zlib.

    `pread` as that of Parts, for any thread, one at a time: cheap going forwards and within the window.
    """

    def __init__(self, parts: Parts):
        self.name = parts.name
        self.restarts = -1
        self._parts = parts
        self._lock = threading.Lock()
        self._restart()

    @property
    def consumed(self) -> int:
        return self._position

    def _restart(self) -> None:
        self.restarts += 1
        self._position = 0
        self._input = b""
        # None between two gzip members and at both ends.
        self._inflate: Any = None
        self._chunks: deque[bytes] = deque()
        self._start = self._end = 0

    def pread(self, offset: int, size: int) -> bytes:
        with self._lock:
            if offset < self._start:
                self._restart()
            while self._end < offset + size and self._more():
                while self._chunks and self._start + len(self._chunks[0]) <= min(offset, self._end - _WINDOW):
                    self._start += len(self._chunks.popleft())
            pieces, start = [], self._start
            for chunk in self._chunks:
                if start < offset + size and start + len(chunk) > offset:
                    pieces.append(memoryview(chunk)[max(offset - start, 0) : offset + size - start])
                start += len(chunk)
            return b"".join(pieces)

    def _more(self) -> bool:
        """Decompress one chunk more; False at the end of the data."""
        while self._input or self._fill():
            if self._inflate is None:
                # Some writers pad with zeros after a gzip member.
                self._input = self._input.lstrip(b"\0")
                if not self._input:
                    continue
                self._inflate = zlib.decompressobj(zlib.MAX_WBITS | 16)
            try:
                chunk = self._inflate.decompress(self._input, _OUTPUT)
            except zlib.error as error:
                place = self._position
                self._restart()
                raise InputError(f"{self.name}: corrupt gzip data before byte {place} ({error})") from error
            self._input = self._inflate.unconsumed_tail
            if self._inflate.eof:
                self._input, self._inflate = self._inflate.unused_data, None
            if chunk:
                self._chunks.append(chunk)
                self._end += len(chunk)
                return True
        if self._inflate is not None:
            raise InputError(f"{self.name}: gzip data is cut off, expected more (incomplete, or parts are missing)")
        return False

    def _fill(self) -> bool:
        self._input = self._parts.pread(self._position, _INPUT)
        self._position += len(self._input)
        return bool(self._input)
