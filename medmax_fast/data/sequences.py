"""One row of text and images as vocabulary ids: [bos] + encode(text) + [eos], each `<image>` replaced by its image.

The k-th placeholder becomes [boi] + 1024 image ids + [eoi] of the row's k-th image; another number of images than
placeholders is an error (the published tool put one image in for all of them). Text is encoded in batches, because
the tokenizers library then uses all cores. `expand_rows` does all rows of a batch in one call of csrc/expand (threads,
no GIL, no copies of what goes in); `expand` says the same in NumPy, a row at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medmax_fast.files import hash_file, read_text
from medmax_fast.runtime import InputError
from medmax_fast.vocab import IMAGE_IDS, IdLayout, TextTokenizer

_TOKENIZER_FILES = ("tokenizer/text_tokenizer_modified.json", "tokenizer/text_tokenizer.json", "tokenizer.json")


def open_tokenizer(checkpoint: str | Path) -> TextTokenizer:
    """The text tokenizer of a checkpoint folder in either layout, its checksum verified; needs no weights."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "no such folder"
        raise InputError(f"{folder}: {found}, expected the folder of a checkpoint")
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            _verify(folder / name)
            return TextTokenizer(folder / name)
    raise InputError(f"{folder}: no tokenizer file, expected {' or '.join(_TOKENIZER_FILES)}")


def _verify(path: Path) -> None:
    checklist = path.parent / "checklist.chk"
    lines = read_text(checklist).splitlines() if checklist.exists() else []
    for line in lines:
        expected, _, name = line.partition(" ")
        if name.strip().lstrip("*") == path.name and hash_file(path, "md5") != expected:
            raise InputError(f"{path}: md5 {hash_file(path, 'md5')}, expected {expected} ({checklist.name})")


def count_images(text_ids: Sequence[int], layout: IdLayout) -> int:
    """Number of image placeholders in encoded text."""
    return sum(i == layout.placeholder for i in text_ids)


def expand(text_ids: Sequence[int], images: Sequence[np.ndarray], layout: IdLayout) -> np.ndarray:
    """Ids int64 of a row: encoded text without bos and eos, and one array of 1024 codes per placeholder.

    Raises InputError (without a place, which the caller knows) for another number of images, of codes, a code
    outside the codebook, or text that spells the name of an image id or goes beyond the vocabulary.
    """
    text = np.asarray(text_ids, dtype=np.int64)
    outside = text[(text < 0) | (text >= layout.vocab_size)]
    if len(outside):
        raise InputError(f"id {outside[0]} of the text, expected 0..{layout.vocab_size - 1}")
    at = np.flatnonzero(text == layout.placeholder)
    if len(at) != len(images):
        raise InputError(f"{len(at)} <image> in the text but {len(images)} images, expected equal numbers")
    inside = text[(text >= layout.image_start) & (text <= layout.boi)]
    if len(inside):
        raise InputError(f"the text spells id {inside[0]}, which only an image may hold; write <image> instead")
    ids = np.empty(2 + len(text) + len(at) * (IMAGE_IDS - 1), dtype=np.int64)
    ids[0], ids[-1] = layout.bos, layout.eos
    end, start = 1, 0
    for place, codes in zip(at, images, strict=True):
        end = _put(ids, end, text[start:place])
        try:
            end = _put(ids, end, layout.image_span(codes))
        except ValueError as error:
            raise InputError(str(error)) from error
        start = place + 1
    end = _put(ids, end, text[start:])
    assert end == len(ids) - 1, (end, len(ids))
    return ids


@dataclass(frozen=True)
class ExpandedRows:
    """N rows of ids: uint16 (uint32 where the vocabulary needs it) [M], row i at offsets[i]:offsets[i + 1].

    kinds uint8 [N]: 0, or the number of what is wrong with a row, which then has no ids. values int64 [N]: what was
    found. offsets int64 [N + 1].
    """

    ids: np.ndarray
    offsets: np.ndarray
    kinds: np.ndarray
    values: np.ndarray

    def error(self, row: int, images: int, layout: IdLayout, ready: bool = False) -> InputError | None:
        """What is wrong with a row of so many images, in the words of `expand`, or of `ready_ids` for a ready one."""
        value = self.values[row]
        outside = "in tokens" if ready else "of the text"
        words = (
            "",
            f"{value} <image> in the text but {images} images, expected equal numbers",
            f"the text spells id {value}, which only an image may hold; write <image> instead",
            f"image code {value} is outside 0..{layout.num_codes - 1}",
            f"id {value} {outside}, expected 0..{layout.vocab_size - 1}",
        )[self.kinds[row]]
        return InputError(words) if words else None


def expand_rows(
    text: np.ndarray,
    text_offsets: np.ndarray,
    codes: Sequence[np.ndarray],
    images: np.ndarray,
    image_offsets: np.ndarray,
    layout: IdLayout,
    *,
    ready: np.ndarray | None = None,
    threads: int = 0,
) -> ExpandedRows:
    """`expand` for N rows in one call; what a bad row has wrong stands in the result instead of an exception.

    text: int32, int64, uint16 or uint32 [T], the encoded texts end to end; text_offsets: int64 [N + 1]. codes: blocks
    uint16 [n, 1024], all contiguous, may be memory-mapped. images: int64 [K], which image each placeholder takes,
    counted through the blocks; image_offsets: int64 [N + 1], where a row's images lie in `images`. ready: bool [N],
    rows whose text is their ids already, which are checked and taken. threads: 0 chooses by size.
    IndexError: offsets or images outside their arrays. TypeError: another dtype, or an array that is not contiguous.
    """
    from medmax_fast import _csrc

    image_ids = (layout.image_start, layout.num_codes, layout.eoi, layout.boi, layout.placeholder)
    special = np.array([layout.bos, layout.eos, *image_ids, layout.vocab_size], dtype=np.int64)
    flags = np.zeros(len(text_offsets) - 1, np.uint8) if ready is None else np.ascontiguousarray(ready, np.uint8)
    wide = layout.vocab_size > 1 << 16
    parts = _csrc.expand_rows(
        text, text_offsets, flags, list(codes), images, image_offsets, special, wide=wide, threads=threads
    )
    return ExpandedRows(*parts)


def _put(ids: np.ndarray, end: int, values: np.ndarray) -> int:
    ids[end : end + len(values)] = values
    return end + len(values)


def ready_ids(tokens, layout: IdLayout) -> np.ndarray:
    """Ids int64 of a row that is tokenized already; InputError for an empty list or an id outside the vocabulary."""
    ids = integer_array(tokens, "tokens")
    if not len(ids):
        raise InputError("tokens is an empty list, expected ids")
    outside = ids[(ids < 0) | (ids >= layout.vocab_size)]
    if len(outside):
        raise InputError(f"id {outside[0]} in tokens, expected 0..{layout.vocab_size - 1}")
    return ids


def integer_array(values, name: str) -> np.ndarray:
    """A flat list of integers as int64; InputError if it is anything else."""
    if not isinstance(values, list | tuple | np.ndarray):
        raise InputError(f"{name} is {type(values).__name__}, expected a list of integers")
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise InputError(f"{name} holds lists of different lengths, expected integers") from error
    if array.size == 0:
        return np.zeros(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu" or array.max() > np.iinfo(np.int64).max:
        raise InputError(f"{name} holds {array.dtype} values in {array.ndim} dimensions, expected integers in one")
    return array.astype(np.int64)
