"""Tables stream row by row; every malformed one is a one-line error with the file and the place."""

import json
import tracemalloc

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from medmax_fast.data.rows import column_names, parquet_batches, place, read_rows, typed
from medmax_fast.runtime import InputError

ROWS = [
    {"img_path": "a.png", "text": 'Where?\n"Here", left'},
    {"img_path": "b/\u00fc.png", "text": "\u00b5m\u00b2, \u00b13 %"},
]


def write(folder, name: str, content: str | bytes):
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def csv_of(rows) -> str:
    quote = lambda cell: '"' + cell.replace('"', '""') + '"'  # noqa: E731
    lines = [list(rows[0]), *[row.values() for row in rows]]
    return "\ufeff" + "\r\n".join(",".join(map(quote, line)) for line in lines) + "\r\n"


@pytest.fixture(params=["csv", "parquet", "jsonl"])
def table(request, tmp_path):
    path = tmp_path / f"table.{request.param}"
    if request.param == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        path.write_text(csv_of(ROWS) if request.param == "csv" else "\n".join(map(json.dumps, ROWS)), newline="")
    return path


def test_the_same_rows_from_every_format(table):
    assert list(read_rows(table)) == list(enumerate(ROWS))
    assert list(read_rows(table, ["text", "absent"])) == [(i, {"text": r["text"]}) for i, r in enumerate(ROWS)]
    assert column_names(table) == ["img_path", "text"]


@given(st.lists(st.dictionaries(st.text(max_size=5), st.integers() | st.text() | st.none(), max_size=4), max_size=8))
def test_jsonl_round_trip(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("jsonl") / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [values for _, values in read_rows(path)] == rows


def test_blank_lines_do_not_shift_line_numbers(tmp_path):
    path = write(tmp_path, "t.jsonl", '\n{"a": 1}\n\n{"a": 2}\n\n')
    assert list(read_rows(path)) == [(1, {"a": 1}), (3, {"a": 2})]
    assert place(path, 3) == "line 4" and place("t.csv", 3) == place("t.parquet", 3) == "row 3"


BROKEN = {
    "gone.csv": (None, "gone.csv: no such file"),
    "table.xlsx": (b"x", "unknown kind of table"),
    "empty.csv": ("", "empty file, expected a header line"),
    "blank.csv": ("\n", "empty file, expected a header line"),
    "twice.csv": ("a,a\n1,2\n", "line 1: column 'a' appears 2 times"),
    "short.csv": ("a,b\n1,2\n3\n", "short.csv: line 3: 1 cells, expected 2"),
    "quote.csv": ('a,b\n1,2\n"3,4\n', "line [34]: not valid CSV"),
    "latin.csv": (b"a,b\n\xe9,2\n", "not UTF-8 text"),
    "broken.jsonl": ('{"a": 1}\n{"a": \n', "broken.jsonl: line 2: not valid JSON"),
    "list.jsonl": ('{"a": 1}\n[1]\n', r"line 2: list \[1\], expected a JSON object"),
    "bytes.jsonl": (b'{"a": 1}\n{"a": "\xff"}\n', "line 2: not valid JSON"),
    "nested.jsonl": ("[" * 100_000, "line 1: not valid JSON"),
    "words.parquet": (b"not a parquet file", "not a Parquet file"),
    "empty.parquet": (b"", "not a Parquet file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(tmp_path, name):
    content, message = BROKEN[name]
    path = tmp_path / name if content is None else write(tmp_path, name, content)
    with pytest.raises(InputError, match=message) as caught:
        list(read_rows(path))
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_bad_lines_can_be_collected(tmp_path):
    bad = []
    path = write(tmp_path, "t.jsonl", '{"a": 1}\n{"a"\n3\n{"a": 4}\n')
    rows = list(read_rows(path, on_bad=lambda row, reason: bad.append((row, reason))))
    assert rows == [(0, {"a": 1}), (3, {"a": 4})]
    assert [row for row, _ in bad] == [1, 2] and "not valid JSON" in bad[0][1]
    bad.clear()
    path = write(tmp_path, "t.csv", "a,b\n1,2\n3\n4,5\n")
    rows = list(read_rows(path, on_bad=lambda row, reason: bad.append((row, reason))))
    assert [row for row, _ in rows] == [0, 2] and bad == [(1, "line 3: 1 cells, expected 2 as in the header")]


def test_damaged_parquet_is_an_input_error_wherever_it_is_cut_or_flipped(tmp_path):
    path = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS * 50), path)
    whole = path.read_bytes()
    errors = 0
    for keep in range(0, len(whole), 37):
        path.write_bytes(whole[:keep])
        with pytest.raises(InputError):
            list(read_rows(path))
    for at in range(4, len(whole), 11):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            list(read_rows(path))
        except InputError as error:
            errors += 1
            assert str(path) in str(error) and len(str(error).splitlines()) == 1
    assert errors > 5


def test_typed():
    assert typed({"a": "x"}, "a", str, list) == "x" and typed({"a": None}, "a", str) is None
    assert typed({}, "a", str) is None
    with pytest.raises(InputError, match="a is int 3, expected str or list"):
        typed({"a": 3}, "a", str, list)


def test_memory_stays_flat(tmp_path):
    path = tmp_path / "t.jsonl"
    with open(path, "w") as file:
        for i in range(20_000):
            file.write(json.dumps({"img_path": f"{i}.png", "text": "x" * 500}) + "\n")
    parquet.write_table(pyarrow.table({"text": ["x" * 500] * 20_000}), tmp_path / "t.parquet", row_group_size=1000)
    for reader in (read_rows(path), parquet_batches(tmp_path / "t.parquet")):
        next(reader)
        tracemalloc.start()
        seen = sum(1 for _ in reader)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert seen > 18 and peak < 1_000_000
