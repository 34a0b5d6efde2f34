"""Rows of a chunk to ids: checked, their text encoded, images found, all expanded in one call.

An Assembler is called by several threads at once. Most of its time is spent outside the GIL (parsing of ids, the
tokenizers library, Arrow, csrc/expand), so threads share the work without copies of the tokenizer and the codes.
"""

import itertools
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from medmax_fast.config import BuildConfig
from medmax_fast.data.chunks import Chunk, ParsedRows, parse_chunk
from medmax_fast.data.codes import CodeTable
from medmax_fast.data.rows import place, typed, unicode_text
from medmax_fast.data.sequences import ExpandedRows, expand, expand_rows, integer_array, ready_ids
from medmax_fast.runtime import InputError
from medmax_fast.vocab import IMAGE_CODES, TextTokenizer

COLUMNS = ("text", "tokens", "image_path", "image_tokens", "task", "source", "credential")
_NO_CODES = np.zeros((0, IMAGE_CODES), np.uint16)
_TEXTS = 512


class NoCodes(Exception):
    """A well-formed row whose images have no codes."""


@dataclass
class RowImages:
    """Images of one chunk: row i takes images `which[i]`, counted through `blocks()`."""

    table: np.ndarray
    parsed: np.ndarray
    listed: list[np.ndarray]
    which: dict[int, list[int]]

    def blocks(self) -> list[np.ndarray]:
        return [self.table, self.parsed, np.stack(self.listed) if self.listed else _NO_CODES]

    def add(self, codes: np.ndarray) -> int:
        self.listed.append(codes)
        return len(self.table) + len(self.parsed) + len(self.listed) - 1


class Assembler:
    """Call it on a chunk for (bytes of its good rows, record of them and of the rejected ones); see `_record`.

    table: the codes to join by image path, or None. InputError: a malformed row, where such a row ends the run.
    """

    def __init__(self, config: BuildConfig, tokenizer: TextTokenizer, table: CodeTable | None):
        self.input = Path(config.input)
        self.tokenizer = tokenizer
        self.layout = tokenizer.layout
        self.table = table
        self.as_jsonl = config.format == "jsonl"
        self.columns = None if self.as_jsonl else COLUMNS
        self.malformed_ends_run = config.max_rejected is None

    def __call__(self, chunk: Chunk) -> tuple[bytes | np.ndarray, dict]:
        parsed = parse_chunk(chunk, self.columns, self.layout.vocab_size, keep_codes=self.as_jsonl)
        items = [self._item(parsed, i) for i in range(len(parsed.rows))]
        self._encode(items)
        images = RowImages(self.table.codes if self.table else _NO_CODES, parsed.codes, [], {})
        for i, item in enumerate(items):
            if isinstance(item, _Text):
                try:
                    images.which[i] = self._images(parsed, i, item, images)
                except (InputError, NoCodes) as error:
                    items[i] = error
        good = [i for i, item in enumerate(items) if not isinstance(item, Exception)]
        made = self._expand(parsed, items, good, images)
        for k in np.flatnonzero(made.kinds).tolist():
            i = good[k]
            ready = not isinstance(items[i], _Text)
            items[i] = made.error(k, len(images.which.get(i, ())), self.layout, ready)
        self._check(parsed, items)
        lengths = np.diff(made.offsets)
        good, lengths = [i for i, n in zip(good, lengths, strict=True) if n], lengths[lengths > 0].tolist()
        data = self._jsonl(parsed, good, made.ids, lengths) if self.as_jsonl else made.ids
        return data, _record(chunk, parsed, items, good, lengths)

    def _item(self, parsed: ParsedRows, i: int):
        """None for a row with plain ids, an array for one with other ids, _Text, or an error kept for later."""
        values = parsed.values[i]
        if isinstance(values, InputError):
            return values
        try:
            for name in ("task", "source"):
                unicode_text(typed(values, name, str), name)
            if parsed.ids_offsets[i + 1] > parsed.ids_offsets[i]:
                return None
            if values.get("tokens"):
                return ready_ids(values["tokens"], self.layout)
            text = typed(values, "text", str)
            if text is None:
                raise InputError("neither text nor tokens, expected one of them")
            unicode_text(text, "text")
            return _Text(text)
        except InputError as error:
            return error

    def _encode(self, items: list) -> None:
        texts = [item for item in items if isinstance(item, _Text)]
        encoded: list[list[int]] = []
        # Portions, because the library keeps a hundred bytes and more for each id until it is read.
        for start in range(0, len(texts), _TEXTS):
            encoded += self.tokenizer.encode_batch([item.text for item in texts[start : start + _TEXTS]])
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        ids = np.fromiter(itertools.chain.from_iterable(encoded), np.int64, lengths.sum())
        ends = np.cumsum(lengths)
        places = np.concatenate([[0], np.cumsum(ids == self.layout.placeholder)])
        wanted = (places[ends] - places[ends - lengths]).tolist()
        for item, length, end, count in zip(texts, lengths.tolist(), ends.tolist(), wanted, strict=True):
            item.ids, item.wanted = ids[end - length : end], count

    def _images(self, parsed: ParsedRows, i: int, item: "_Text", images: RowImages) -> list[int]:
        """The images of a row whose text has `item.wanted` placeholders, as numbers of RowImages."""
        values = parsed.row(i)
        protected = _is_protected(values)
        first, last = int(parsed.codes_offsets[i]), int(parsed.codes_offsets[i + 1])
        if last > first:
            return list(range(len(images.table) + first, len(images.table) + last))
        given = typed(values, "image_tokens", list)
        # An empty list says `no image` where the text has none, and `not tokenized yet` where it has some.
        if given or (given is not None and not item.wanted):
            return [images.add(codes) for codes in self._listed(given, item)]
        paths = typed(values, "image_path", str, list) or []
        paths = [paths] if isinstance(paths, str) else paths
        if not all(map(_is_path, paths)):
            raise InputError("image_path holds something other than paths")
        if protected and item.wanted and not paths:
            raise NoCodes("credential is yes, but there is neither image_path nor image_tokens")
        if len(paths) != item.wanted:
            raise InputError(f"{item.wanted} <image> in the text but {len(paths)} images, expected equal numbers")
        return [self._find(path) for path in paths]

    def _listed(self, given: list, item: "_Text") -> list[np.ndarray]:
        several = given and isinstance(given[0], list)
        codes = [integer_array(one, "image_tokens") for one in (given if several else [given] * bool(given))]
        if any(len(one) != IMAGE_CODES or one.min() < 0 or one.max() >= self.layout.num_codes for one in codes):
            expand(item.ids.tolist(), codes, self.layout)
        return [one.astype(np.uint16) for one in codes]

    def _find(self, path: str) -> int:
        if self.table is None:
            raise NoCodes(f"{path}: no image_tokens, and no --codes to look it up in")
        row = self.table.find_row(path, self.input.parent)
        if row is None:
            raise NoCodes(f"{path}: {self.table.reason(path)}")
        return row

    def _expand(self, parsed: ParsedRows, items: list, good: list[int], images: RowImages) -> ExpandedRows:
        pieces = []
        for i in good:
            item = items[i]
            if item is None:
                pieces.append(parsed.ids[parsed.ids_offsets[i] : parsed.ids_offsets[i + 1]])
            else:
                pieces.append(item.ids if isinstance(item, _Text) else item)
        offsets = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces], dtype=np.int64)]).astype(np.int64)
        # Where every row has plain ids, they lie end to end already.
        plain = all(items[i] is None for i in good) and offsets[-1] == len(parsed.ids)
        text = parsed.ids if plain else np.concatenate([np.zeros(0, np.int64), *pieces])
        which = [images.which.get(i, ()) for i in good]
        counts = np.concatenate([[0], np.cumsum([len(w) for w in which], dtype=np.int64)]).astype(np.int64)
        numbers = np.fromiter(itertools.chain.from_iterable(which), np.int64, counts[-1])
        ready = np.array([not isinstance(items[i], _Text) for i in good], dtype=np.uint8)
        # One thread, because chunks are what is shared among threads.
        return expand_rows(text, offsets, images.blocks(), numbers, counts, self.layout, ready=ready, threads=1)

    def _check(self, parsed: ParsedRows, items: list) -> None:
        if not self.malformed_ends_run:
            return
        for row, item in zip(parsed.rows, items, strict=True):
            if isinstance(item, InputError):
                raise InputError(f"{self.input}: {place(self.input, row)}: {item}") from item

    def _jsonl(self, parsed: ParsedRows, good: list[int], ids: np.ndarray, lengths: list[int]) -> bytes:
        lines, end = [], 0
        for i, length in zip(good, lengths, strict=True):
            row = ids[end : end + length].tolist()
            end += length
            lines.append(json.dumps({**parsed.row(i), "tokens": row}, default=str) + "\n")
        return "".join(lines).encode()


@dataclass
class _Text:
    """A row to be encoded: its text, then the ids of it and how many images they ask for."""

    text: str
    ids: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    wanted: int = 0


def _record(chunk: Chunk, parsed: ParsedRows, items: list, good: list[int], lengths: list[int]) -> dict:
    """What the journal keeps of a chunk: where to go on, its good rows by column, and its rejected ones.

    rejected: [row number, reason, source, whether it is for want of codes].
    """
    rejected = []
    for row, values, item in zip(parsed.rows, parsed.values, items, strict=True):
        if isinstance(item, Exception):
            source = values.get("source") if isinstance(values, dict) else ""
            source = source if isinstance(source, str) else ""
            rejected.append([row, str(item), source, isinstance(item, NoCodes)])
    return {
        "row": chunk.stop,
        "byte": chunk.byte,
        "rows": [parsed.rows[i] for i in good],
        "lengths": lengths,
        "tasks": _coded([parsed.row(i).get("task") or "" for i in good]),
        "sources": _coded([parsed.row(i).get("source") or "" for i in good]),
        "rejected": rejected,
    }


def _coded(names: list[str]) -> list[list]:
    """[different names, index of each], as there are few different ones."""
    index = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return [list(index), [index[name] for name in names]]


def _is_path(path) -> bool:
    try:
        return isinstance(path, str) and path != "" and b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False


def _is_protected(values: dict) -> bool:
    value = typed(values, "credential", str)
    if value is None or value.strip().lower() in ("", "no"):
        return False
    if value.strip().lower() == "yes":
        return True
    raise InputError(f"credential is {value!r}, expected yes or no")
