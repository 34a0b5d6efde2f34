"""Images straight out of tar files: .tar, .tar.gz and .tgz, whole or cut into parts by `split`, nothing unpacked.

An archive is listed once, from end to end, and the listing (name, offset, size of each member) can be kept in an
index file, so that the next process need not stream it again. The listing is also the check: an archive that is cut
off, damaged or short of a part is an InputError there, because its rows would otherwise be lost without a word.
Nothing is written to disk and members' names are never used as paths, so `../x` or `/x` is a name like any other.

Plain tar is read at random. Gzip can only be read forwards, at the speed of one core's inflate; going back by more
than the last 32 MiB means decompressing from the start again. Memory is constant apart from the listing.
"""

import functools
import hashlib
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from medmax_fast.data.parts import MIB, Gunzip, Parts, find_parts, is_archive
from medmax_fast.files import atomic_path
from medmax_fast.progress import progress
from medmax_fast.runtime import InputError, log, rank_and_world

__all__ = ["Archive", "find_parts", "is_archive"]

# tarfile reads a header's long names at once; a damaged size must not fill the memory.
_MAX_HEADER = 64 * MIB
_INDEX_KEY, _INDEX_FORMAT = b"medmax_archive", 1
# What tarfile raises on headers that lie about themselves, from its source and by fuzzing.
_TAR_ERRORS = (tarfile.TarError, ValueError, LookupError, TypeError, OverflowError, RecursionError)


class _Cursor:
    """What tarfile needs of a file: tell, seek and read over something with `pread`."""

    def __init__(self, source: Parts | Gunzip):
        self._source = source
        self._position = self._start = 0
        self._data = b""

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        self._position = position

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_HEADER:
            raise tarfile.ReadError(f"header of {size} bytes at byte {self._position}")
        begin = self._position - self._start
        if begin < 0 or begin + size > len(self._data):
            # A little more than asked, because tarfile looks at the byte before a header first.
            self._start, begin = self._position, 0
            self._data = self._source.pread(self._position, max(size, 4096))
        data = self._data[begin : begin + size]
        self._position += len(data)
        return data


class Archive:
    """The regular files in a tar archive; make one with `Archive.open`.

    names: list[str] in archive order, a leading `./` dropped; of several members of one name the last one counts, as
    when tar unpacks them. Links, folders and devices are left out. offsets, sizes: int64 [N], of each member's data
    in the uncompressed stream. sha256: of names and sizes, in order. sequential: whether it is gzip, to be read
    with ascending i. restarts: how often gzip had to be decompressed from the start again.
    """

    def __init__(self, source: Parts | Gunzip, names: list[str], offsets: np.ndarray, sizes: np.ndarray):
        self._source = source
        self.names, self.offsets, self.sizes = names, offsets, sizes
        digest = hashlib.sha256(np.ascontiguousarray(sizes, "<i8").data)
        digest.update("\0".join(names).encode("utf-8", "surrogateescape"))
        self.sha256 = digest.hexdigest()
        self.sequential = isinstance(source, Gunzip)

    @classmethod
    def open(cls, path: str | Path, index: str | Path | None = None) -> "Archive":
        """Find an archive's parts and list it, or take the listing from the file `index` if that is of this archive.

        path: see find_parts. index: a Parquet file, written here if it is missing, unreadable or of an archive with
        other part names, sizes or modification times. Whether data is gzip is seen from its first bytes, not from
        its name. InputError: no archive, missing parts, cut off or damaged data, a sparse member.
        """
        parts = Parts(find_parts(path))
        source = Gunzip(parts) if parts.pread(0, 2) == b"\x1f\x8b" else parts
        listing = _read_index(index, parts.identity) if index is not None else None
        if listing is None:
            listing = _list(source, parts.size)
            if index is not None:
                _write_index(index, parts.identity, *listing)
        return cls(source, *listing)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def restarts(self) -> int:
        return self._source.restarts if isinstance(self._source, Gunzip) else 0

    def find(self, path: str) -> int | None:
        """Number of the member of that name, a leading `./` apart; None if there is none."""
        return self._numbers.get(path.removeprefix("./"))

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    def read(self, i: int) -> bytes:
        """The bytes of member i, from any thread. InputError if the archive's files have changed or are damaged.

        Plain tar: any order, in parallel. Gzip: one thread at a time, in ascending order; a member that lies more
        than 32 MiB before what was last read starts the decompression from the beginning of the archive.
        """
        if not 0 <= i < len(self.names):
            raise IndexError(f"member {i} of an archive of {len(self.names)}")
        size = int(self.sizes[i])
        data = self._source.pread(int(self.offsets[i]), size)
        if len(data) != size:
            raise InputError(f"{self._source.name}: {self.names[i]!r}: {len(data)} bytes left, expected {size}")
        return data


def _list(source: Parts | Gunzip, total: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    members: dict[str, tuple[int, int]] = {}
    steps = _scan(source, members)
    if rank_and_world()[0] == 0:
        steps = progress(steps, f"list {Path(source.name).name} (MiB)", total // MIB)
    for _ in steps:
        pass
    places = np.array(list(members.values()), np.int64).reshape(-1, 2)
    return list(members), places[:, 0].copy(), places[:, 1].copy()


def _scan(source: Parts | Gunzip, members: dict[str, tuple[int, int]]) -> Iterator[None]:
    """Fill `members` with (offset, size) by name, yielding once for each MiB of the files; checks all that it can."""
    done = links = 0
    cursor = _Cursor(source)
    try:
        # Of a file it needs reading and seeking only.
        archive = tarfile.TarFile(fileobj=cursor, encoding="utf-8", errors="surrogateescape")  # type: ignore[arg-type]
        while (member := archive.next()) is not None:
            # tarfile would keep a kilobyte for each, in a list that its types leave out.
            archive.members.clear()  # type: ignore[attr-defined]
            if member.size < 0 or archive.offset < cursor.tell():
                raise tarfile.ReadError(f"{member.name!r} has a size of {member.size} bytes")
            if member.issparse():
                raise InputError(f"{source.name}: {member.name!r} is a sparse member; pack it without --sparse")
            links += member.issym() or member.islnk()
            if member.isreg():
                name = member.name.removeprefix("./")
                # Out and in again, so that the order stays that of the offsets.
                members.pop(name, None)
                members[name] = member.offset_data, member.size
            while done < source.consumed // MIB:
                done += 1
                yield
    except InputError:
        raise
    except _TAR_ERRORS as error:
        where = f"damaged or cut off after byte {cursor.tell()}" if members else "not a tar archive, or damaged"
        raise InputError(f"{source.name}: {where} ({error})") from error
    _check_end(source, archive.offset)
    if links:
        log(f"{source.name}: {links} links left out")


def _check_end(source: Parts | Gunzip, end: int) -> None:
    """tarfile takes a damaged header for the end: only zeros may follow, and at least one block of them."""
    block = source.pread(end, tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise InputError(f"{source.name}: no end mark at byte {end}, the archive is incomplete or parts are missing")
    while block:
        if block.strip(b"\0"):
            raise InputError(
                f"{source.name}: neither a header nor the end at byte {end}, damaged or two archives joined"
            )
        end += len(block)
        block = source.pread(end, MIB)


def _read_index(index: str | Path, identity: list) -> tuple[list[str], np.ndarray, np.ndarray] | None:
    """The listing in an index file, or None if there is none of this archive."""
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(index)
        found = json.loads((table.schema.metadata or {})[_INDEX_KEY])
        if found != {"format": _INDEX_FORMAT, "parts": identity}:
            return None
        names = [name.decode("utf-8", "surrogateescape") for name in table.column("name").to_pylist()]
        return names, table.column("offset").to_numpy(), table.column("size").to_numpy()
    except (pyarrow.ArrowException, OSError, LookupError, ValueError, AttributeError):
        return None


def _write_index(index: str | Path, identity: list, names: list[str], offsets: np.ndarray, sizes: np.ndarray) -> None:
    import pyarrow
    from pyarrow import parquet

    # Binary, because names need not be UTF-8.
    binary = pyarrow.array([name.encode("utf-8", "surrogateescape") for name in names], pyarrow.binary())
    table = pyarrow.table({"name": binary, "offset": offsets, "size": sizes})
    metadata = {_INDEX_KEY: json.dumps({"format": _INDEX_FORMAT, "parts": identity})}
    with atomic_path(index) as temporary:
        parquet.write_table(table.replace_schema_metadata(metadata), temporary, compression="zstd")
