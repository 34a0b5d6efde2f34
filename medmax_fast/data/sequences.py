"""One row of text and images as vocabulary ids: [bos] + encode(text) + [eos], each `<image>` replaced by its image.

The k-th placeholder becomes [boi] + 1024 image ids + [eoi] of the row's k-th image; another number of images than
placeholders is an error (the published tool put one image in for all of them). Text is encoded in batches, because
the tokenizers library then uses all cores; expansion is one allocation and a copy per image.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medmax_fast.runtime import InputError, hash_file, require_file
from medmax_fast.vocab import IMAGE_IDS, IdLayout, TextTokenizer

_TOKENIZER_FILES = ("tokenizer/text_tokenizer_modified.json", "tokenizer/text_tokenizer.json", "tokenizer.json")


def open_tokenizer(checkpoint: str | Path) -> TextTokenizer:
    """The text tokenizer of a checkpoint folder in either layout, its checksum verified; needs no weights."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such checkpoint folder")
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            _verify(folder / name)
            return TextTokenizer(folder / name)
    raise InputError(f"{folder}: no tokenizer file, expected {' or '.join(_TOKENIZER_FILES)}")


def _verify(path: Path) -> None:
    checklist = path.parent / "checklist.chk"
    lines = require_file(checklist).read_text().splitlines() if checklist.exists() else []
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
    outside the codebook, or text that spells the name of an image id.
    """
    text = np.asarray(text_ids, dtype=np.int64)
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
