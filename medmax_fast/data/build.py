"""`medmax build`: rows of text and images to a token store, or to JSONL with `tokens`.

One pass in constant memory: rows are read, checked, their text encoded in batches on all cores, images put in, and
the ids written to a temporary name that becomes the output when everything is done. Two kinds of bad rows: a
malformed one (wrong type, another number of `<image>` than images, an id outside the vocabulary) is a mistake to
mend and ends the run unless --max-rejected is given; one that merely lacks codes (its image was rejected, or its
owner has not given access) is left out, named in rejected.jsonl and counted per source.
"""

import itertools
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from medmax_fast.config import BuildConfig
from medmax_fast.data.codes import CodeTable, codes_fingerprint
from medmax_fast.data.rows import column_names, parquet_rows, place, read_rows, table_kind, typed
from medmax_fast.data.sequences import count_images, expand, integer_array, open_tokenizer, ready_ids
from medmax_fast.data.store import StoreWriter, TokenStore
from medmax_fast.runtime import (
    SETTINGS_FILE,
    InputError,
    TooManyRejected,
    atomic_path,
    hash_file,
    open_output,
    progress,
    require_new,
)
from medmax_fast.vocab import TextTokenizer

COLUMNS = ("text", "tokens", "image_path", "image_tokens", "task", "source", "credential")
REJECTED_FILE = "rejected.jsonl"
_BATCH = 512


class NoCodes(Exception):
    """A well-formed row whose images have no codes."""


def build(config: BuildConfig) -> dict:
    """Run the command; returns its summary. Raises InputError, or TooManyRejected once the output is complete."""
    start = time.monotonic()
    output = Path(config.output)
    if config.max_rejected is not None and config.max_rejected < 0:
        raise InputError(f"--max-rejected {config.max_rejected}: expected 0 or more")
    _check_input(config)
    tokenizer = open_tokenizer(config.ckpt)
    if config.format == "jsonl":
        summary = _build_jsonl(config, output, tokenizer)
    else:
        summary = _build_store(config, output, tokenizer)
    summary["seconds"] = round(time.monotonic() - start, 3)
    limit = config.max_rejected or 0
    if summary["rejected"] > limit:
        raise TooManyRejected(summary, limit)
    return summary


def _check_input(config: BuildConfig) -> None:
    kind = table_kind(config.input)
    if kind == "csv":
        raise InputError(f"{config.input}: a CSV table, expected rows as JSONL or Parquet")
    # Rows of JSONL each have columns of their own, and are checked one by one.
    names = column_names(config.input) if kind == "parquet" else ["text"]
    if "text" not in names and "tokens" not in names:
        raise InputError(f"{config.input}: no column 'text' or 'tokens', found {', '.join(names) or 'none'}")


def _build_store(config: BuildConfig, output: Path, tokenizer: TextTokenizer) -> dict:
    settings = {
        "input_sha256": hash_file(config.input),
        "tokenizer_sha256": tokenizer.sha256(),
        "codes_sha256": codes_fingerprint(config.codes) if config.codes else "",
    }
    if (output / SETTINGS_FILE).exists():
        open_output(output, "build", settings)
        return {"output": str(output), **TokenStore(output).manifest["summary"]}
    require_new(output)
    with atomic_path(output) as temporary:
        open_output(temporary, "build", settings)
        with (
            open(temporary / REJECTED_FILE, "w", encoding="utf-8") as rejected,
            StoreWriter(temporary, tokenizer.layout) as writer,
        ):
            rows = RowBuilder(config, tokenizer, rejected, scratch=temporary)
            for row, values, ids in rows.run():
                key = f"{Path(config.input).name}:{row}"
                writer.append(ids, key, values.get("task") or "", values.get("source") or "")
            summary = rows.summary()
            writer.close(tokenizer_sha256=settings["tokenizer_sha256"], settings=settings, summary=summary)
    return {"output": str(output), **summary}


def _build_jsonl(config: BuildConfig, output: Path, tokenizer: TextTokenizer) -> dict:
    if output.is_dir():
        raise InputError(f"{output}: a folder, expected the JSONL file to write")
    if output.resolve() == Path(config.input).resolve():
        raise InputError(f"{output}: --output is the --input file; choose another name")
    # Beside the rows, under their name, since train.jsonl and validation.jsonl usually share a folder.
    rejected_path = output.with_name(f"{output.stem}.{REJECTED_FILE}")
    with atomic_path(rejected_path) as bad, atomic_path(output) as temporary:
        with open(bad, "w", encoding="utf-8") as rejected, open(temporary, "w", encoding="utf-8") as file:
            rows = RowBuilder(config, tokenizer, rejected, scratch=output.parent)
            for _, values, ids in rows.run():
                file.write(json.dumps({**values, "tokens": ids.tolist()}, default=str) + "\n")
        return {"output": str(output), "rejected_file": str(rejected_path), **rows.summary()}


class RowBuilder:
    """Turns the rows of a table into ids, keeping count of what was made and what was rejected.

    rejected: open text file that gets one JSON line per rejected row. scratch: folder for the codes' scratch file.
    """

    def __init__(self, config: BuildConfig, tokenizer: TextTokenizer, rejected, scratch: Path):
        self.input = Path(config.input)
        self.tokenizer = tokenizer
        self.layout = tokenizer.layout
        self.keep_columns = None if config.format == "jsonl" else COLUMNS
        self.malformed_ends_run = config.max_rejected is None
        self.table = CodeTable(config.codes, self.layout.num_codes, scratch) if config.codes else None
        self._rejected = rejected
        self.made: Counter[tuple[str, str]] = Counter()
        self.bad: Counter[str] = Counter()
        self.no_codes = 0
        self.ids = 0

    def run(self) -> Iterator[tuple[int, dict, np.ndarray]]:
        """Yield (row number, values, ids int64) of every good row, in order."""
        on_bad = None if self.malformed_ends_run else (lambda row, reason: self._reject(row, {}, reason))
        total = parquet_rows(self.input) if table_kind(self.input) == "parquet" else None
        rows = iter(progress(read_rows(self.input, self.keep_columns, on_bad), "build", total))
        while batch := list(itertools.islice(rows, _BATCH)):
            yield from self._batch(batch)
        if not self.made and not self.bad:
            raise InputError(f"{self.input}: no rows")

    def _batch(self, batch: list[tuple[int, dict]]) -> Iterator[tuple[int, dict, np.ndarray]]:
        items = [self._text_or_ids(values) for _, values in batch]
        encoded = iter(self.tokenizer.encode_batch([item for item in items if isinstance(item, str)]))
        for (row, values), item in zip(batch, items, strict=True):
            try:
                if isinstance(item, InputError):
                    raise item
                if isinstance(item, str):
                    text_ids = next(encoded)
                    item = expand(text_ids, self._images(values, count_images(text_ids, self.layout)), self.layout)
            except InputError as error:
                if self.malformed_ends_run:
                    raise InputError(f"{self.input}: {place(self.input, row)}: {error}") from error
                self._reject(row, values, str(error))
            except NoCodes as error:
                self.no_codes += 1
                self._reject(row, values, str(error))
            else:
                self.ids += len(item)
                self.made[values.get("task") or "", values.get("source") or ""] += 1
                yield row, values, item

    def _text_or_ids(self, values: dict) -> str | np.ndarray | InputError:
        """The row's text, or its ids where it has `tokens`; an error is kept until its row's turn comes."""
        try:
            for name in ("task", "source"):
                typed(values, name, str)
            if values.get("tokens"):
                return ready_ids(values["tokens"], self.layout)
            text = typed(values, "text", str)
            if text is None:
                raise InputError("neither text nor tokens, expected one of them")
            text.encode()
            return text
        except UnicodeEncodeError:
            return InputError("text holds a lone surrogate, expected Unicode text")
        except InputError as error:
            return error

    def _images(self, values: dict, wanted: int) -> list[np.ndarray]:
        """Codes of each image of a row whose text has `wanted` placeholders."""
        protected = _is_protected(values)
        given = typed(values, "image_tokens", list)
        # An empty list says `no image` where the text has none, and `not tokenized yet` where it has some.
        if given or (given is not None and not wanted):
            several = given and isinstance(given[0], list)
            return [integer_array(codes, "image_tokens") for codes in (given if several else [given] * bool(given))]
        paths = typed(values, "image_path", str, list) or []
        paths = [paths] if isinstance(paths, str) else paths
        if any(not isinstance(path, str) or not path for path in paths):
            raise InputError("image_path holds something else than paths")
        if protected and wanted and not paths:
            raise NoCodes("credential yes without image_path or codes")
        if len(paths) != wanted:
            raise InputError(f"{wanted} <image> in the text but {len(paths)} images, expected equal numbers")
        return [self._codes(path) for path in paths]

    def _codes(self, path: str) -> np.ndarray:
        if self.table is None:
            raise NoCodes(f"{path}: no image_tokens, and no --codes to look it up in")
        codes = self.table.find(path, self.input.parent)
        if codes is None:
            raise NoCodes(f"{path}: {self.table.reason(path)}")
        return codes

    def _reject(self, row: int, values: dict, reason: str) -> None:
        source = values.get("source")
        source = source if isinstance(source, str) else ""
        self.bad[source] += 1
        self._rejected.write(json.dumps({"row": row, "reason": reason, "source": source}) + "\n")

    def summary(self) -> dict:
        """Counts for the command's result."""
        tasks, sources = Counter(), Counter()
        for (task, source), n in self.made.items():
            tasks[task] += n
            sources[source] += n
        return {
            "rows": self.made.total(),
            "ids": self.ids,
            "rejected": self.bad.total(),
            "rejected_without_codes": self.no_codes,
            "tasks": _table("task", {task: {"rows": n} for task, n in tasks.items()}),
            "sources": _table(
                "source", {s: {"rows": sources[s], "rejected": self.bad[s]} for s in sources.keys() | self.bad.keys()}
            ),
        }


def _table(name: str, rows: dict[str, dict]) -> list[dict]:
    return [{name: key, **rows[key]} for key in sorted(rows)]


def _is_protected(values: dict) -> bool:
    value = typed(values, "credential", str)
    if value is None or value.strip().lower() in ("", "no"):
        return False
    if value.strip().lower() == "yes":
        return True
    raise InputError(f"credential is {value!r}, expected yes or no")
