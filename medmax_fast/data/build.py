"""`medmax build`: rows of text and images to a token store, or to JSONL with `tokens`.

One pass in constant memory: this thread reads the file in chunks and writes results in order, --workers threads turn
chunks into ids (assemble.py), and a bounded number of chunks is under way. What is finished stands in a journal in a
hidden folder beside the output, so that the same command continues after a kill; the output appears at the end, by one
rename, and its bytes depend neither on the number of workers nor on interruptions.

Two kinds of bad rows: a malformed one (wrong type, another number of `<image>` than images, an id outside the
vocabulary) is a mistake to mend and ends the run unless --max-rejected is given; one that merely lacks codes (its image
was rejected, or its owner has not given access) is left out, named in rejected.jsonl and counted per source.
"""

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from medmax_fast.config import BuildConfig
from medmax_fast.data.assemble import COLUMNS, Assembler
from medmax_fast.data.chunks import in_order, read_chunks
from medmax_fast.data.codes import CodeTable, code_files, codes_fingerprint
from medmax_fast.data.journal import Journal
from medmax_fast.data.rows import column_names, parquet_rows, table_kind
from medmax_fast.data.sequences import open_tokenizer
from medmax_fast.data.store import IDS_FILE, RowsWriter, TokenStore
from medmax_fast.files import SETTINGS_FILE, atomic_path, hash_file, open_output, remove, require_new, write_json
from medmax_fast.progress import Progress
from medmax_fast.runtime import InputError, TooManyRejected, info, kept, require_at_least, versions
from medmax_fast.vocab import TextTokenizer

REJECTED_FILE = "rejected.jsonl"
# In the hidden folder: what becomes the output.
_STORE, _JSONL = "store", "rows.jsonl"


def build(config: BuildConfig) -> dict:
    """Run the command; returns its summary. Raises InputError, or TooManyRejected once the output is complete."""
    start = time.monotonic()
    output = Path(config.output)
    require_at_least(config, 0, "workers")
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
    for name, count in Counter(names).items():
        if count > 1 and (name in COLUMNS or config.format == "jsonl"):
            raise InputError(f"{config.input}: column {name!r} appears {count} times, expected once")


def _build_store(config: BuildConfig, output: Path, tokenizer: TextTokenizer) -> dict:
    settings = _settings(config, tokenizer)
    if (output / SETTINGS_FILE).exists():
        return _finished(output, settings)
    require_new(output)
    with _open_journal(config, output, settings, f"{_STORE}/{IDS_FILE}") as journal:
        # Another process may have finished it while this one read the input.
        if (output / SETTINGS_FILE).exists():
            return _finished(output, settings)
        _append_chunks(config, tokenizer, journal)
        folder = journal.folder / _STORE
        for entry in folder.iterdir():
            if entry.name != IDS_FILE:
                remove(entry)
        write_json(folder / SETTINGS_FILE, {"command": "build", "settings": settings, "versions": versions()})
        with RowsWriter(folder, tokenizer.layout) as writer:
            summary = _summarize(journal.records(), config, folder / REJECTED_FILE, writer)
            hashes = {"tokenizer_sha256": settings["tokenizer_sha256"]}
            writer.finish(journal.digest.hexdigest(), **hashes, settings=settings, summary=summary)
        if output.is_dir() and not any(output.iterdir()):
            output.rmdir()
        os.replace(folder, output)
        journal.remove()
    return {"output": str(output), **summary}


def _finished(output: Path, settings: dict) -> dict:
    """The summary of a store that is there already; InputError if it was made of something else."""
    open_output(output, "build", settings)
    remove(_hidden(output))
    return {"output": str(output), **TokenStore(output).manifest["summary"]}


def _build_jsonl(config: BuildConfig, output: Path, tokenizer: TextTokenizer) -> dict:
    if output.is_dir():
        raise InputError(f"{output}: a folder, expected the JSONL file to write")
    if output.resolve() == Path(config.input).resolve():
        raise InputError(f"{output}: --output is the --input file; choose another name")
    # Beside the rows, under their name, since train.jsonl and validation.jsonl usually share a folder.
    rejected_path = output.with_name(f"{output.stem}.{REJECTED_FILE}")
    with _open_journal(config, output, _settings(config, tokenizer), _JSONL) as journal:
        _append_chunks(config, tokenizer, journal)
        with atomic_path(rejected_path) as rejected:
            summary = _summarize(journal.records(), config, rejected)
        os.replace(journal.data_path, output)
        journal.remove()
    return {"output": str(output), "rejected_file": str(rejected_path), **summary}


def _settings(config: BuildConfig, tokenizer: TextTokenizer) -> dict:
    return {
        "input_sha256": hash_file(config.input),
        "tokenizer_sha256": tokenizer.sha256(),
        "codes_sha256": codes_fingerprint(config.codes) if config.codes else "",
    }


def _hidden(output: Path) -> Path:
    return output.with_name(f".{output.name}.partial")


@contextlib.contextmanager
def _open_journal(config: BuildConfig, output: Path, settings: dict, data: str) -> Iterator[Journal]:
    """The journal beside the output; an InputError is a thing to mend in the input, and leaves nothing."""
    codes = [(p.name, p.stat().st_mtime_ns) for p in code_files(config.codes)] if config.codes else []
    settings = {
        **settings,
        "input": Path(config.input).name,
        "codes": codes,
        "format": config.format,
        "malformed_ends_run": config.max_rejected is None,
        "versions": versions(),
    }
    with Journal(_hidden(output), settings, data) as journal:
        if journal.last:
            info(f"{output}: going on with row {journal.last['row']}, where an earlier run was interrupted")
        try:
            with kept(lambda: f"{journal.last.get('row', 0)} rows are kept in {journal.folder}"):
                yield journal
        except InputError:
            journal.remove()
            raise


def _append_chunks(config: BuildConfig, tokenizer: TextTokenizer, journal: Journal) -> None:
    """Turn what the journal does not have yet into ids, in order."""
    path = Path(config.input)
    before = _state(path)
    table = CodeTable(config.codes, tokenizer.layout.num_codes, journal.folder) if config.codes else None
    assembler = Assembler(config, tokenizer, table)
    row, byte = journal.last.get("row", 0), journal.last.get("byte", 0)
    chunks = read_chunks(path, assembler.columns, row, byte)
    total = parquet_rows(path) if table_kind(path) == "parquet" else None
    workers = config.workers or len(os.sched_getaffinity(0))
    rejected = sum(len(record["rejected"]) for record in journal.records())
    with Progress("build (rows)", total, row, rejected) as bar:
        for data, record in in_order(assembler, chunks, workers):
            journal.append(data, record)
            bar.rejected = (bar.rejected or 0) + len(record["rejected"])
            if total is None:
                # Of JSONL estimated from the bytes that are read; exact at the end.
                bar.total = record["row"] * before[0] // record["byte"]
            bar.update(record["row"])
    if _state(path) != before:
        raise InputError(f"{path}: changed while it was read; build it again")


def _state(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _summarize(
    records: Iterable[dict], config: BuildConfig, rejected_path: Path, writer: RowsWriter | None = None
) -> dict:
    """Write rejected.jsonl, and rows to a store's writer, out of the journal; returns the command's counts."""
    made: Counter[tuple[str, str]] = Counter()
    bad: Counter[str] = Counter()
    without_codes: Counter[str] = Counter()
    ids, name = 0, Path(config.input).name
    with open(rejected_path, "w", encoding="utf-8") as file:
        for record in records:
            (tasks, task_of), (sources, source_of) = record["tasks"], record["sources"]
            ids += sum(record["lengths"])
            columns = (record["rows"], record["lengths"], task_of, source_of)
            for row, length, task, source in zip(*columns, strict=True):
                made[tasks[task], sources[source]] += 1
                if writer:
                    writer.add(length, f"{name}:{row}", tasks[task], sources[source])
            for row, reason, source, no_codes in record["rejected"]:
                file.write(json.dumps({"row": row, "reason": reason, "source": source}) + "\n")
                bad[source] += 1
                without_codes[source] += no_codes
    if not made and not bad:
        raise InputError(f"{config.input}: no rows")
    tasks, sources = Counter(), Counter()
    for (task, source), n in made.items():
        tasks[task] += n
        sources[source] += n
    by_source = {
        s: {"rows": sources[s], "rejected": bad[s], "without_codes": without_codes[s]}
        for s in sources.keys() | bad.keys()
    }
    return {
        "rows": made.total(),
        "ids": ids,
        "rejected": bad.total(),
        "rejected_without_codes": without_codes.total(),
        "tasks": _table("task", {task: {"rows": n} for task, n in tasks.items()}),
        "sources": _table("source", by_source),
    }


def _table(name: str, rows: dict[str, dict]) -> list[dict]:
    return [{name: key, **rows[key]} for key in sorted(rows)]
