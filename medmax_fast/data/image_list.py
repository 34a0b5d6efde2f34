"""The images that a command is asked to read: a column of paths in a table, or a folder."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from medmax_fast.data.images import list_images
from medmax_fast.data.rows import column_names, place, read_rows, typed
from medmax_fast.runtime import InputError, hash_file

DEFAULT_KEYS = ("img_path", "image_path")


@dataclass(frozen=True)
class ImageList:
    """paths: as given, one per image ("" where a row has none). base: absolute folder that relative ones start from.

    key: the column they come from ("" for a folder). sha256: of the table's bytes, or of the folder's listing.
    """

    paths: list[str]
    base: str
    key: str
    sha256: str

    def file(self, index: int) -> str:
        """The file of one image, "" where the row has none."""
        return self.paths[index] and os.path.join(self.base, self.paths[index])


def read_image_list(source: str | Path, key: str = "") -> ImageList:
    """Paths of a table (CSV, Parquet, JSONL; a cell may be a list of paths) or of a folder, searched recursively.

    In a table relative paths start from the table's folder; for a folder `img_path` is what one would write in a
    table in the working directory. InputError: missing or empty input, no such column, a cell of another type.
    """
    if Path(source).is_dir():
        if key:
            raise InputError(f"--image-key {key}: {source} is a folder, which has no columns")
        return _from_folder(source)
    names = column_names(source)
    key = _choose_key(source, names, key)
    paths: list[str] = []
    for row, values in read_rows(source, (key,)):
        try:
            cell = typed(values, key, str, list)
            cells = cell if isinstance(cell, list) else [cell or ""]
            if not all(isinstance(path, str) for path in cells):
                raise InputError(f"{key} holds a list of something else than paths")
        except InputError as error:
            raise InputError(f"{source}: {place(source, row)}: {error}") from error
        paths += cells
    if not paths:
        raise InputError(f"{source}: no rows, expected one image path per row")
    return ImageList(paths, os.path.realpath(Path(source).parent), key, hash_file(source))


def _choose_key(source: str | Path, names: list[str], key: str) -> str:
    wanted = (key,) if key else DEFAULT_KEYS
    for name in wanted:
        if name in names:
            return name
    found = ", ".join(names) or "none"
    raise InputError(f"{source}: no column {' or '.join(map(repr, wanted))}, found {found}; see --image-key")


def _from_folder(source: str | Path) -> ImageList:
    paths = [os.path.join(source, name) for name in list_images(source)]
    if not paths:
        raise InputError(f"{source}: no image files in this folder")
    digest = hashlib.sha256("\n".join(paths).encode("utf-8", "surrogateescape")).hexdigest()
    return ImageList(paths, os.getcwd(), "", digest)
