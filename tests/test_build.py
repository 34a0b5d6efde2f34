"""`medmax build` from the command line: golden sequences, joins, both policies on bad rows, nothing half-written; the
same bytes whatever the number of workers, and after kills.

The killed builds are forks of this file run as a script, which has no threads:

    python tests/test_build.py random_kills FOLDER CKPT
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from medmax_fast.cli import main
from medmax_fast.config import BuildConfig
from medmax_fast.data import chunks
from medmax_fast.data.build import build
from medmax_fast.data.shards import Shard, Shards
from medmax_fast.data.store import TokenStore
from medmax_fast.files import remove
from medmax_fast.runtime import TooManyRejected
from medmax_fast.vocab import IMAGE_CODES

CODES = np.random.default_rng(3).integers(0, 8192, (4, IMAGE_CODES)).astype(np.uint16)
QUESTION = "<image>What is it?<reserved08706>A cell."


@pytest.fixture()
def rows(golden) -> list[dict]:
    """The golden rows with as many images as placeholders (the published tool did not ask for that)."""
    rows = [json.loads(line) for line in (golden / "sequences.jsonl").read_text().splitlines()]
    rows[3] = {**rows[3], "image_path": [rows[3]["image_path"]] * 2, "image_tokens": [rows[3]["image_tokens"]] * 2}
    rows[4] = {**rows[4], "image_path": None, "image_tokens": None}
    return rows


@pytest.fixture()
def run(golden, tmp_path, capsys):
    """Run the command on rows or on the text of a JSONL file: (exit status, summary or error line)."""

    def call(rows, *flags: str, name="rows.jsonl", output="out"):
        path = tmp_path / name
        if isinstance(rows, str):
            path.write_text(rows)
        elif rows is not None:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        arguments = ["--input", str(path), "--ckpt", str(golden / "checkpoint"), "--output", str(tmp_path / output)]
        status = main(["build", *arguments, *flags])
        out, err = capsys.readouterr()
        if status == 2:
            assert out == "" and len(err.splitlines()) == 1 and "Traceback" not in err
            return status, err
        return status, json.loads(out.splitlines()[-1])

    return call


def untokenized(rows):
    return [{k: v for k, v in row.items() if k != "tokens"} for row in rows]


def code_folder(folder, paths, base, rejected=()):
    shards = Shards(folder, len(paths) + len(rejected), 100)
    entries = [{"img_path": p, "reason": "empty file", "row": i} for i, p in enumerate(rejected)]
    codes = CODES[: len(paths)]
    shards.publish(0, Shard(list(paths), codes, [bytes(16)] * len(paths), len(paths), entries, {}, {}))
    shards.merge(str(base), {}, {})
    return str(folder)


def test_golden_sequences_to_a_store(run, rows, tmp_path):
    status, summary = run(untokenized(rows))
    assert status == 0 and summary["rows"] == 5 and summary["rejected"] == 0
    store = TokenStore(tmp_path / "out")
    assert [store.row(i).tolist() for i in range(5)] == [row["tokens"] for row in rows]
    assert store.tasks == ["vqa"] * 5 and store.sources == ["golden"] * 5
    assert store.keys == [f"rows.jsonl:{i}" for i in range(5)]
    assert summary["ids"] == store.lengths.sum() and len(store.manifest["tokenizer_sha256"]) == 64
    assert (tmp_path / "out" / "rejected.jsonl").read_text() == ""


def test_golden_sequences_to_jsonl(run, rows, tmp_path):
    given = untokenized(rows)
    status, _ = run(given, "--format", "jsonl", output="out.jsonl")
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert status == 0 and [row["tokens"] for row in written] == [row["tokens"] for row in rows]
    assert untokenized(written) == given
    assert sorted(os.listdir(tmp_path)) == ["out.jsonl", "out.rejected.jsonl", "rows.jsonl"]


def test_parquet_input(run, rows, tmp_path):
    given = [{**row, "image_tokens": row["image_tokens"]} for row in untokenized(rows[:3])]
    parquet.write_table(pyarrow.Table.from_pylist(given), tmp_path / "rows.parquet")
    status, _ = run(None, name="rows.parquet")
    store = TokenStore(tmp_path / "out")
    assert status == 0 and [store.row(i).tolist() for i in range(3)] == [row["tokens"] for row in rows[:3]]


def test_ready_tokens_are_taken_as_they_are(run, tmp_path):
    status, _ = run([{"tokens": [0, 8711, 5, 10211], "text": 3, "image_path": "x.png"}, {"tokens": [2]}])
    store = TokenStore(tmp_path / "out")
    assert status == 0 and [store.row(i).tolist() for i in range(2)] == [[0, 8711, 5, 10211], [2]]
    assert store.tasks == ["", ""]


def test_codes_are_joined_by_path(run, tmp_path):
    folder = code_folder(tmp_path / "codes", ["images/a.png", str(tmp_path / "images" / "b.png")], tmp_path)
    both = {"text": "<image> and <image>", "image_path": ["images/b.png", "./images/a.png"]}
    status, _ = run([{"text": QUESTION, "image_path": "images/a.png"}, both], "--codes", folder)
    store = TokenStore(tmp_path / "out")
    is_code = lambda ids: ids[(ids >= 4) & (ids < 8196)]  # noqa: E731
    assert status == 0
    np.testing.assert_array_equal(is_code(store.row(0)), CODES[0] + 4)
    np.testing.assert_array_equal(is_code(store.row(1)), np.concatenate([CODES[1], CODES[0]]) + 4)


def test_rows_without_codes_are_rejected_and_counted_per_source(run, tmp_path):
    folder = code_folder(tmp_path / "codes", ["a.png"], tmp_path, rejected=["broken.png"])
    rows = [
        {"text": QUESTION, "image_path": "a.png", "source": "open"},
        {"text": QUESTION, "image_path": "broken.png", "source": "open"},
        {"text": QUESTION, "image_path": "gone.png", "source": "mimic", "credential": "Yes"},
        {"text": QUESTION, "source": "mimic", "credential": "YES"},
        {"text": "no picture", "source": "mimic", "credential": "yes"},
        {"text": QUESTION, "image_tokens": CODES[1].tolist(), "image_path": "gone.png", "credential": "NO"},
    ]
    status, summary = run(rows, "--codes", folder)
    assert status == 3 and summary["rows"] == 3 and summary["rejected"] == summary["rejected_without_codes"] == 3
    counts = {row["source"]: (row["rows"], row["rejected"], row["without_codes"]) for row in summary["sources"]}
    assert counts == {"": (1, 0, 0), "mimic": (1, 2, 2), "open": (1, 1, 1)}
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert [(r["row"], r["reason"]) for r in rejected] == [
        (1, "broken.png: rejected by tokenize: empty file"),
        (2, "gone.png: not in the codes table"),
        (3, "credential is yes, but there is neither image_path nor image_tokens"),
    ]
    # The good rows are there, and running again gives the same answer without doing the work again.
    assert TokenStore(tmp_path / "out").keys == ["rows.jsonl:0", "rows.jsonl:4", "rows.jsonl:5"]
    assert run(rows, "--codes", folder)[0] == 3
    status, again = run(rows, "--codes", folder, "--max-rejected", "3")
    assert status == 0 and again["rows"] == 3 and again["sources"] == summary["sources"]


MALFORMED = {
    "broken JSON": ('{"text": "a"}\n{"text": \n', "line 2: not valid JSON"),
    "not an object": ('{"text": "a"}\n7\n', "line 2: int 7, expected a JSON object"),
    "no text": ([{"text": "a"}, {"txt": "b"}], "line 2: neither text nor tokens"),
    "text of another type": ([{"text": ["a"]}], "line 1: text is list ['a'], expected str"),
    "a lone surrogate": ('{"text": "\\ud800"}\n', "line 1: text holds a lone surrogate"),
    "task of another type": ([{"text": "a", "task": 1}], "line 1: task is int 1"),
    "too few images": (
        [{"text": "<image><image>", "image_path": "a.png", "image_tokens": CODES[0].tolist()}],
        "line 1: 2 <image> in the text but 1 images, expected equal numbers",
    ),
    "too many images": ([{"text": "a", "image_tokens": [CODES[0].tolist()]}], "0 <image> in the text but 1 images"),
    "an image without a place": ([{"text": "a", "image_path": "x.png"}], "0 <image> in the text but 1 images"),
    "no image": ([{"text": QUESTION, "credential": "no"}], "1 <image> in the text but 0 images"),
    "1023 codes": (
        [{"text": QUESTION, "image_tokens": CODES[0][1:].tolist()}],
        "an image of 1023 codes, expected 1024",
    ),
    "a code too large": ([{"text": QUESTION, "image_tokens": [8192] * 1024}], "image code 8192 is outside 0..8191"),
    "codes as text": ([{"text": QUESTION, "image_tokens": "1 2 3"}], "image_tokens is str '1 2 3', expected list"),
    "codes of mixed depth": ([{"text": QUESTION, "image_tokens": [[1], 2]}], "image_tokens is int, expected a list"),
    "a path of another type": ([{"text": QUESTION, "image_path": [3]}], "image_path holds something other"),
    "an id too large": ([{"tokens": [0, 5, 10212]}], "line 1: id 10212 in tokens, expected 0..10211"),
    "a negative id": ([{"text": "a"}, {"tokens": [-1]}], "line 2: id -1 in tokens"),
    "ids as text": ([{"tokens": "0 1"}], "tokens is str, expected a list of integers"),
    "another credential": ([{"text": "a", "credential": "maybe"}], "credential is 'maybe', expected yes or no"),
    "an image id spelled": ([{"text": "<racm3:break>"}], "the text spells id 8197"),
}


@pytest.mark.parametrize("name", MALFORMED)
@pytest.mark.parametrize("format", ["store", "jsonl"])
def test_a_malformed_row_ends_the_run(run, tmp_path, name, format):
    rows, message = MALFORMED[name]
    status, error = run(rows, "--format", format)
    assert status == 2 and message in error and str(tmp_path / "rows.jsonl") in error
    assert os.listdir(tmp_path) == ["rows.jsonl"]


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_row_is_rejected_where_that_is_asked_for(run, tmp_path, name):
    rows, message = MALFORMED[name]
    lines = rows.splitlines() if isinstance(rows, str) else [json.dumps(row) for row in rows]
    status, summary = run("\n".join(['{"text": "good"}', *lines]), "--max-rejected", "0")
    assert status == 3 and summary["rejected"] == 1 and summary["rows"] == len(lines)
    (rejected,) = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(rejected)["row"] == len(lines) and message.split(": ")[-1] in json.loads(rejected)["reason"]
    assert run(None, "--max-rejected", "1", output="other")[0] == 0


def test_the_first_bad_row_is_named_across_batches(run, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 64)
    rows = [{"text": f"row {i}"} for i in range(11)]
    rows[9] = {"text": "<image>"}
    rows[10] = {"tokens": [-1]}
    assert "line 10: 1 <image>" in run(rows)[1]
    rows[9] = {"text": "fine"}
    assert "line 11: id -1" in run(rows)[1]


def test_bad_inputs(run, golden, tmp_path):
    (tmp_path / "table.csv").write_text("text\nhello\n")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1, then nothing of use")
    parquet.write_table(pyarrow.table({"prompt": ["a"]}), tmp_path / "other.parquet")
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "none.parquet")
    (tmp_path / "empty.jsonl").write_text("")
    before = sorted(os.listdir(tmp_path))
    for name, message in {
        "gone.jsonl": "no such file",
        "table.csv": "a CSV table, expected rows as JSONL or Parquet",
        "bad.parquet": "not a Parquet file",
        "other.parquet": "no column 'text' or 'tokens', found prompt",
        "none.parquet": "no rows",
        "empty.jsonl": "no rows",
    }.items():
        status, error = run(None, name=name)
        assert status == 2 and message in error and name in error, name
    flags = {"--codes": str(tmp_path / "gone"), "--ckpt": str(tmp_path), "--max-rejected": "-1"}
    for flag, value in flags.items():
        assert run([{"text": "a"}], flag, value)[0] == 2
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "rows.jsonl"])


def test_bad_codes_leave_nothing(run, tmp_path):
    folder = tmp_path / "codes"
    code_folder(folder, ["a.png"], tmp_path)
    table = pyarrow.table({"img_path": ["b.png"], "img_tokens": [[1, 2, 3]]})
    parquet.write_table(table, folder / "more.parquet")
    status, error = run([{"text": QUESTION, "image_path": "a.png"}], "--codes", str(folder))
    assert status == 2 and "more.parquet: row 0: an image of 3 codes, expected 1024" in error
    assert sorted(os.listdir(tmp_path)) == ["codes", "rows.jsonl"]


def test_output_made_with_other_settings(run, tmp_path):
    assert run([{"text": "a"}])[0] == 0
    before = (tmp_path / "out" / "ids.bin").read_bytes()
    status, error = run([{"text": "b"}])
    assert status == 2 and "made with input_sha256" in error
    assert (tmp_path / "out" / "ids.bin").read_bytes() == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    assert "not empty and not made by this command" in run([{"text": "b"}], output="full")[1]
    assert "a folder, expected the JSONL file" in run([{"text": "b"}], "--format", "jsonl", output="full")[1]
    assert "--output is the --input file" in run([{"text": "b"}], "--format", "jsonl", output="rows.jsonl")[1]
    assert (tmp_path / "rows.jsonl").read_text() == '{"text": "b"}\n'


def test_the_same_rows_give_the_same_bytes(run, tmp_path):
    rows = [{"text": f"row {i}", "task": "t"} for i in range(20)]
    for output in ("one", "two"):
        assert run(rows, output=output)[0] == 0
    for name in ("ids.bin", "offsets.npy", "rows.parquet", "manifest.json", "settings.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_python_api(golden, tmp_path):
    (tmp_path / "r.jsonl").write_text('{"text": "a"}\n{"text": "<image>", "credential": "yes"}\n')
    config = BuildConfig(str(tmp_path / "r.jsonl"), str(golden / "checkpoint"), str(tmp_path / "s"))
    with pytest.raises(TooManyRejected) as caught:
        build(config)
    assert caught.value.result["rows"] == 1 and len(TokenStore(tmp_path / "s")) == 1


def assorted_rows(count: int) -> list[dict]:
    """Text, images joined, listed and several, ready tokens plain and not, and rows that are rejected."""
    draw, rows = random.Random(7), []
    kinds = [
        lambda i: {"text": QUESTION, "image_path": f"{i % 3}.png"},
        lambda i: {"text": f"row {i} \u00fc"},
        lambda i: {"tokens": [0, i, 8711, 2]},
        lambda i: {"tokens": [], "text": f"<image> and <image> {i}", "image_tokens": CODES[:2].tolist()},
        lambda i: {"text": QUESTION, "image_tokens": CODES[i % 4].tolist()},
        lambda i: {"text": QUESTION, "image_path": "gone.png", "credential": "yes"},
        lambda i: {"text": QUESTION},
        lambda i: {"tokens": [10_212]},
        lambda i: {"text": "none", "image_tokens": []},
    ]
    for i in range(count):
        row = draw.choice(kinds)(i)
        rows.append({**row, "task": draw.choice(["vqa", "chat", ""]), "source": draw.choice(["a", "mimic", "b"])})
    return rows


def table_of(rows: list[dict]) -> pyarrow.Table:
    """All columns of the rows, null where a row has none."""
    names = dict.fromkeys(name for row in rows for name in row)
    return pyarrow.table({name: [row.get(name) for row in rows] for name in names})


def files_of(path: Path) -> dict[str, bytes]:
    """Content of an output by file name, hidden ones too; a JSONL output with the rejections beside it."""
    files = path.iterdir() if path.is_dir() else [path, path.with_name(f"{path.stem}.rejected.jsonl")]
    return {file.name.replace(path.stem, ""): file.read_bytes() for file in files}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("format", ["store", "jsonl"])
def test_the_bytes_depend_neither_on_workers_nor_on_chunks(run, tmp_path, monkeypatch, kind, format):
    folder = code_folder(tmp_path / "codes", ["0.png", "1.png", "2.png"], tmp_path)
    rows = assorted_rows(120)
    name = f"rows.{kind}"
    if kind == "parquet":
        # A column has one type there: a list of lists of codes.
        nested = lambda codes: codes if not codes or isinstance(codes[0], list) else [codes]  # noqa: E731
        columns = [{**row, "image_tokens": nested(row.get("image_tokens"))} for row in rows]
        parquet.write_table(table_of(columns), tmp_path / name, row_group_size=50)
    outputs = []
    for workers, size in ((1, None), (2, 700), (5, 40)):
        if size:
            monkeypatch.setattr(chunks, "CHUNK_BYTES", size)
            monkeypatch.setattr(chunks, "CHUNK_ROWS", 1 + size // 40)
        flags = ["--codes", folder, "--format", format, "--workers", str(workers), "--max-rejected", "1000"]
        status, summary = run(rows if kind == "jsonl" else None, *flags, name=name, output=f"o{workers}.out")
        assert status == 0 and summary["rows"] + summary["rejected"] == 120 and summary["rejected_without_codes"] > 5
        outputs.append(files_of(tmp_path / f"o{workers}.out"))
    assert outputs[0] == outputs[1] == outputs[2] and len(outputs[0]) == (6 if format == "store" else 2)
    assert not [entry for entry in os.listdir(tmp_path) if entry.startswith(".")]
    if format == "jsonl":
        with open(tmp_path / "o1.out") as file:
            assert [json.loads(line)["tokens"][0] for line in file] == [0] * summary["rows"]


def test_both_kinds_of_input_give_the_same_ids(run, tmp_path):
    rows = [{"text": QUESTION, "image_tokens": c.tolist()} for c in CODES] + [{"tokens": [0, 5, 2]}, {"text": "x"}]
    parquet.write_table(table_of(rows), tmp_path / "rows.parquet")
    assert run(rows, output="one")[0] == run(None, name="rows.parquet", output="two")[0] == 0
    assert (tmp_path / "one" / "ids.bin").read_bytes() == (tmp_path / "two" / "ids.bin").read_bytes()


PARQUET_MALFORMED = {
    "an id too large": ({"tokens": [[1], [10_212]]}, "row 1: id 10212 in tokens, expected 0..10211"),
    "a negative id": ({"tokens": [[-1], [1]]}, "row 0: id -1 in tokens"),
    "a null among ids": ({"tokens": [[1], [None]]}, "row 1: tokens holds object"),
    "numbers": ({"tokens": [[1.5], [2.0]]}, "row 0: tokens holds float64"),
    "a code too large": ({"text": [QUESTION], "image_tokens": [[8192] * 1024]}, "image code 8192 is outside 0..8191"),
    "a code far too large": ({"text": [QUESTION], "image_tokens": [[70_000] * 1024]}, "image code 70000 is outside"),
    "1023 codes": ({"text": [QUESTION], "image_tokens": [[1] * 1023]}, "an image of 1023 codes"),
    "too many images": ({"text": ["a"], "image_tokens": [[1] * 1024]}, "0 <image> in the text but 1 images"),
    "a NUL in a path": ({"text": [QUESTION], "image_path": ["a\0b.png"]}, "image_path holds something other"),
}


@pytest.mark.parametrize("name", PARQUET_MALFORMED)
def test_malformed_rows_of_parquet(run, tmp_path, name):
    columns, message = PARQUET_MALFORMED[name]
    parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    codes = code_folder(tmp_path / "codes", ["x.png"], tmp_path)
    status, error = run(None, "--codes", codes, name="rows.parquet")
    assert status == 2 and message in error and sorted(os.listdir(tmp_path)) == ["codes", "rows.parquet"]


def test_surrogates_in_names_and_columns_given_twice(run, tmp_path):
    assert "line 1: task holds a lone surrogate" in run('{"text": "a", "task": "\\ud800"}\n')[1]
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    parquet.write_table(table, tmp_path / "twice.parquet")
    assert "column 'text' appears 2 times" in run(None, name="twice.parquet")[1]


def flip(content: bytes, at: int, bit: int) -> bytes:
    return content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :]


def test_damaged_parquet_is_an_error_and_never_a_wrong_token(run, tmp_path):
    """Cut off or flipped anywhere, with page checksums, which cover the pages' content and not the headers between."""
    rows = [{"tokens": list(range(4, 30 + i)), "task": "t"} for i in range(40)]
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, write_page_checksum=True)
    assert run(None, name="rows.parquet", output="good")[0] == 0
    good, whole = (tmp_path / "good" / "ids.bin").read_bytes(), path.read_bytes()
    column = parquet.ParquetFile(path).metadata.row_group(0).column(0)
    pages = range(column.data_page_offset + 64, column.dictionary_page_offset + column.total_compressed_size)
    assert len(pages) > 100
    draw, errors = random.Random(5), 0
    for trial in range(90):
        at = draw.choice(pages) if trial % 3 else draw.randrange(len(whole))
        cut = trial % 6 == 0
        (tmp_path / "bad.parquet").write_bytes(whole[:at] if cut else flip(whole, at, draw.randrange(8)))
        status, error = run(None, name="bad.parquet", output=f"out{trial}")
        errors += status == 2
        assert "bad.parquet" in error if status == 2 else not cut
        assert status == 2 or at not in pages or (tmp_path / f"out{trial}" / "ids.bin").read_bytes() == good
    assert errors > 60


def test_damaged_jsonl_is_an_error(run, tmp_path):
    lines = "".join(json.dumps({"tokens": list(range(4, 30 + i)), "task": "t"}) + "\n" for i in range(40))
    assert run(lines, output="good")[0] == 0
    good, draw = (tmp_path / "good" / "ids.bin").read_bytes(), random.Random(6)
    for trial in range(20):
        at = draw.randrange(1, len(lines))
        status, error = run(lines[:at], name="cut.jsonl", output=f"cut{trial}")
        assert status == 0 or "cut.jsonl" in error
        # A file that ends with a whole row is one that has fewer rows.
        assert (status == 0) == (lines[at - 1 : at] in "\n}" or lines[at - 1 : at + 1] == "}\n")
        assert status or good.startswith((tmp_path / f"cut{trial}" / "ids.bin").read_bytes())


def test_damaged_codes_are_an_error(run, tmp_path):
    folder = tmp_path / "codes"
    code_folder(folder, ["a.png"], tmp_path)
    path, draw = folder / "codes-00000.parquet", random.Random(8)
    whole = path.read_bytes()
    for _ in range(10):
        path.write_bytes(flip(whole, draw.randrange(len(whole)), draw.randrange(8)))
        status, error = run([{"text": QUESTION, "image_path": "a.png"}], "--codes", str(folder))
        assert status == 2 and str(path) in error


def test_a_changed_input_is_noticed(run, tmp_path, monkeypatch):
    from medmax_fast.data import build as module

    def read_and_touch(path, *more):
        yield from chunks.read_chunks(path, *more)
        os.utime(path, ns=(1, 1))

    monkeypatch.setattr(module, "read_chunks", read_and_touch)
    assert "changed while it was read" in run([{"text": "a"}])[1]


# ---- kills; these run in a process of their own ----


def fork(arguments: list[str]) -> int:
    child = os.fork()
    if child == 0:
        status = 70
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            # Small chunks, so that a build has many steps and a kill hits any of them.
            chunks.CHUNK_BYTES, chunks.CHUNK_ROWS = 3000, 8
            status = main(["build", *arguments])
        finally:
            os._exit(status)
    return child


def random_kills(folder: Path, ckpt: str) -> None:
    """Builds killed at random points and begun again end in the bytes of an uninterrupted one."""
    draw = random.Random(11)
    codes = code_folder(folder / "codes", ["0.png", "1.png", "2.png"], folder)
    rows = assorted_rows(300)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = [{**row, "image_tokens": None} for row in rows]
    parquet.write_table(table_of(plain), folder / "rows.parquet", row_group_size=100)
    kills = resumed = 0
    for name, format in (("rows.jsonl", "store"), ("rows.parquet", "store"), ("rows.jsonl", "jsonl")):
        flags = ["--input", str(folder / name), "--ckpt", ckpt, "--codes", codes, "--format", format]
        flags += ["--max-rejected", "1000", "--output"]
        start = time.monotonic()
        output = folder / f"{name}.{format}"
        _, status = os.waitpid(fork([*flags, str(folder / "whole" / output.name)]), 0)
        seconds = time.monotonic() - start
        assert status == 0
        hits = taken_over = 0
        for _ in range(60):
            child = fork([*flags, str(output)])
            time.sleep(draw.uniform(0.3, 1.0) * seconds)
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            journal = folder / f".{output.name}.partial" / "journal.jsonl"
            if status == 0:
                remove(output)
            else:
                hits += 1
                taken_over += journal.exists() and journal.stat().st_size > 0
            if hits >= 6 and taken_over >= 2:
                break
        kills, resumed = kills + hits, resumed + taken_over
        _, status = os.waitpid(fork([*flags, str(output)]), 0)
        assert status == 0 and files_of(output) == files_of(folder / "whole" / output.name), (name, format)
        assert not (folder / f".{output.name}.partial").exists()
    assert kills >= 18 and resumed >= 6, (kills, resumed)
    print("kills", kills, "resumed", resumed)


def test_killed_builds_continue_to_the_same_bytes(golden, tmp_path):
    command = [sys.executable, __file__, "random_kills", str(tmp_path), str(golden / "checkpoint")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "kills" in result.stdout


class Killed(BaseException):
    """Ends a build as a kill would, past every handler."""


@pytest.mark.parametrize("step", range(4))
def test_every_step_of_the_end_can_be_the_last(run, tmp_path, monkeypatch, step):
    """The end of a build, broken off before its n-th change of a name, is done again from the journal alone."""
    rows = assorted_rows(30)
    assert run(rows, "--max-rejected", "100", output="whole")[0] == 0
    calls, replace = iter(range(100)), os.replace

    def broken(*arguments):
        if next(calls) == step:
            raise Killed
        return replace(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", broken)
        with pytest.raises(Killed):
            run(rows, "--max-rejected", "100")
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.partial").exists()
    assert run(rows, "--max-rejected", "100")[0] == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["out", "rows.jsonl", "whole"]


if __name__ == "__main__":
    assert sys.argv[1] == "random_kills"
    random_kills(Path(sys.argv[2]), sys.argv[3])
