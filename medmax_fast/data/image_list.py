"""The images that a command is asked to read: a column of paths in a table, a folder, or a tar archive."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from medmax_fast.data.archive import Archive, is_archive
from medmax_fast.data.images import SUFFIXES, ImageError, list_images, read_file
from medmax_fast.data.rows import column_names, place, read_rows, typed
from medmax_fast.files import hash_file
from medmax_fast.runtime import InputError

DEFAULT_KEYS = ("img_path", "image_path")


@dataclass(frozen=True)
class ImageList:
    """paths: as given, one per image ("" where a row has none). base: absolute folder that relative ones start from.

    key: the column they come from ("" without a table). sha256: of the table's bytes, or of the folder's or archive's
    listing. archive: where the images lie, if not in files of their own.
    """

    paths: list[str]
    base: str
    key: str
    sha256: str
    archive: Archive | None = None

    def read(self, index: int) -> bytes:
        """The bytes of one image, from any thread; ImageError if it cannot be read."""
        path = self.paths[index]
        if self.archive is None or not path:
            return read_file(path and os.path.join(self.base, path))
        if (member := self.archive.find(path)) is None:
            raise ImageError(path, "not in the archive")
        return self.archive.read(member)


def read_image_list(
    source: str | Path, key: str = "", archive: str | Path = "", archive_index: str | Path | None = None
) -> ImageList:
    """Paths of a table (CSV, Parquet, JSONL; a cell may be a list of paths), of a folder, or of a tar archive.

    In a table relative paths start from the table's folder, or are names in `archive` if one is given; for a folder,
    which is searched recursively, `img_path` is what one would write in a table in the working directory. Images in
    a gzip archive are put into its order, the only one it can be read in at speed. archive_index: see Archive.open.
    InputError: missing or empty input, no such column, a cell of another type, a broken archive.
    """
    if not Path(source).is_dir() and is_archive(source):
        if key or archive:
            flag = f"--image-key {key}" if key else f"--archive {archive}"
            raise InputError(f"{flag}: {source} is an archive, expected a table")
        return _from_archive(source, archive_index)
    if Path(source).is_dir():
        if key or archive:
            flag = f"--image-key {key}" if key else f"--archive {archive}"
            raise InputError(f"{flag}: {source} is a folder, expected a table")
        return _from_folder(source)
    names = column_names(source)
    key = _choose_key(source, names, key)
    paths: list[str] = []
    for row, values in read_rows(source, (key,)):
        try:
            cell = typed(values, key, str, list)
            cells = cell if isinstance(cell, list) else [cell or ""]
            if not all(isinstance(path, str) for path in cells):
                raise InputError(f"{key} is a list that holds something other than paths")
        except InputError as error:
            raise InputError(f"{source}: {place(source, row)}: {error}") from error
        paths += cells
    if not paths:
        raise InputError(f"{source}: no rows, expected one image path per row")
    base, digest = os.path.realpath(Path(source).parent), hash_file(source)
    if not archive:
        return ImageList(paths, base, key, digest)
    listing = Archive.open(archive, archive_index)
    if listing.sequential:
        paths.sort(key=lambda path: len(listing) if (member := listing.find(path)) is None else member)
    return ImageList(paths, base, key, f"{digest} {listing.sha256}", listing)


def _choose_key(source: str | Path, names: list[str], key: str) -> str:
    wanted = (key,) if key else DEFAULT_KEYS
    for name in wanted:
        if name in names:
            return name
    found = ", ".join(names) or "none"
    raise InputError(f"{source}: no column {' or '.join(map(repr, wanted))}, found {found}; see --image-key")


def _from_archive(source: str | Path, index: str | Path | None) -> ImageList:
    archive = Archive.open(source, index)
    paths = [name for name in archive.names if name.lower().endswith(SUFFIXES)]
    if not paths:
        raise InputError(f"{source}: no image files in this archive")
    return ImageList(paths, os.path.realpath(Path(source).parent), "", archive.sha256, archive)


def _from_folder(source: str | Path) -> ImageList:
    paths = [os.path.join(source, name) for name in list_images(source)]
    if not paths:
        raise InputError(f"{source}: no image files in this folder")
    digest = hashlib.sha256("\n".join(paths).encode("utf-8", "surrogateescape")).hexdigest()
    return ImageList(paths, os.getcwd(), "", digest)
