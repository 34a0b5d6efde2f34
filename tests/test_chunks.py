"""Chunks of a file hold every row once, wherever they are cut, and plain lists of ids are what Python would read."""

import json
import threading
import time

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from medmax_fast import _csrc
from medmax_fast.data import chunks
from medmax_fast.data.chunks import Chunk, in_order, parse_chunk, read_chunks
from medmax_fast.data.rows import read_rows
from medmax_fast.runtime import InputError
from medmax_fast.vocab import IMAGE_CODES

LIMIT = 9000


def by_hand(rows):
    """(row number, values with plain tokens put back) of parsed rows, as read_rows gives them."""
    for i, (number, values) in enumerate(zip(rows.rows, rows.values, strict=True)):
        ids = rows.ids[rows.ids_offsets[i] : rows.ids_offsets[i + 1]].tolist()
        yield number, {**values, "tokens": ids} if ids else values


def scan(line: str | bytes, limit: int = LIMIT):
    """Ids that the scanner takes from one line, or None."""
    line = line if isinstance(line, bytes) else line.encode()
    ids, offsets, spans = _csrc.json_ids_16(line, "tokens", limit)
    assert len(offsets) == 2 and (spans[0] < 0) == (len(ids) == 0)
    return ids.tolist() or None


TAKEN = {
    '{"tokens": [1, 2, 8999]}': [1, 2, 8999],
    '{"tokens":[0]}': [0],
    ' {\t"tokens" :[ 1 ,2 ] , "text": "a" } \r': [1, 2],
    '{"text": "\\"tokens\\": [3]", "tokens": [4]}': [4],
    '{"a": {"tokens": [1]}, "b": [[{"tokens": 2}], "]}"], "tokens": [5]}': [5],
    '{"a": "x\\\\", "tokens": [6], "b": null, "c": -1.5e3}': [6],
    '{"text": "\\u00fc", "tokens": [7]}': [7],
}
REFUSED = [
    '{"tokens": [1, 9000]}',
    '{"tokens": [-1]}',
    '{"tokens": []}',
    '{"tokens": [1.0]}',
    '{"tokens": [1e2]}',
    '{"tokens": [01]}',
    '{"tokens": [1,]}',
    '{"tokens": [1 2]}',
    '{"tokens": [[1]]}',
    '{"tokens": [99999999999999999999999]}',
    '{"tokens": "1"}',
    '{"tokens": null}',
    '{"tokens": [1], "tokens": [2]}',
    '{"\\u0074okens": [1], "tokens": [2]}',
    '{"tokens": [1]',
    '{"tokens": [1]} x',
    '{"tokens": [1',
    '{"tokens"',
    '{"tokens": [1], "a": "\\',
    '{"a": 1}',
    '[{"tokens": [1]}]',
    "\ufeff" + '{"tokens": [1]}',
    "",
    "{",
]


def test_what_the_scanner_takes_and_refuses():
    for line, ids in TAKEN.items():
        assert scan(line) == ids == json.loads(line)["tokens"], line
    for line in filter(None, REFUSED):
        assert scan(line) is None, line
    text = "\n".join([*TAKEN, *REFUSED]).encode()
    ids, offsets, spans = _csrc.json_ids_16(text, "tokens", LIMIT)
    assert ids.tolist() == [i for ids in TAKEN.values() for i in ids]
    assert offsets[len(TAKEN) :].tolist() == [len(ids)] * (len(REFUSED) + 1)
    assert _csrc.json_ids_32(b'{"tokens": [99999]}', "tokens", 100_000)[0].tolist() == [99_999]
    with pytest.raises(ValueError, match="limit"):
        _csrc.json_ids_16(b"", "tokens", 65_537)


leaves = (
    st.none()
    | st.booleans()
    | st.integers(-3, 9001)
    | st.floats(allow_nan=False)
    | st.text('tokens"\\[]{},:', max_size=8)
)
values = st.recursive(leaves, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=2), v, max_size=2))
plain_lists = st.lists(st.integers(0, 8999), min_size=1, max_size=6)
token_lists = st.one_of(plain_lists, plain_lists, plain_lists, values)
json_rows = st.dictionaries(st.sampled_from(["a", "text", "b c", "d", 'to"kens']), values, max_size=3)


def test_scanned_lines_equal_parsed_ones(tmp_path_factory):
    taken = 0
    path = tmp_path_factory.mktemp("scan") / "t.jsonl"

    @settings(max_examples=150, deadline=None)
    @given(
        st.lists(
            st.tuples(json_rows, token_lists, json_rows, st.integers(0, 60), st.booleans()), min_size=1, max_size=5
        )
    )
    def compare(specs):
        nonlocal taken
        lines = []
        for before, tokens, after, place, flip in specs:
            line = json.dumps({**before, "tokens": tokens, **after}, separators=(",", ":") if flip else None).encode()
            # Damage must end in an error or in the same values, never in other ones.
            lines.append(line[:place] + b"7" + line[place + 1 :] if flip else line)
        path.write_bytes(b"\n".join(lines))
        expected, bad = [], []
        expected = dict(read_rows(path, on_bad=lambda row, reason: bad.append((row, reason))))
        found = {}
        for chunk in read_chunks(path, None):
            parsed = parse_chunk(chunk, None, LIMIT, False)
            taken += int((np.diff(parsed.ids_offsets) > 0).sum())
            errors = [(n, str(v)) for n, v in zip(parsed.rows, parsed.values, strict=True) if isinstance(v, InputError)]
            assert errors == bad
            good = [i for i, v in enumerate(parsed.values) if not isinstance(v, InputError)]
            for i in good:
                ids = parsed.ids[parsed.ids_offsets[i] : parsed.ids_offsets[i + 1]].tolist()
                found[parsed.rows[i]] = {**parsed.values[i], "tokens": ids} if ids else parsed.values[i]
        assert repr(found) == repr(expected)

    compare()
    assert taken > 20


@pytest.mark.parametrize("size", [1, 7, 40, 1 << 20])
def test_every_line_is_read_once_wherever_chunks_are_cut(tmp_path, monkeypatch, size):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", size)
    rows = [{"text": "x" * (i % 9), "tokens": list(range(i % 4))} for i in range(50)]
    lines = [json.dumps(row) for row in rows]
    lines.insert(3, "")
    for end in ("", "\n", "\n\n"):
        path = tmp_path / "t.jsonl"
        path.write_text("\n".join(lines) + end)
        expected = list(read_rows(path))
        found = list(read_chunks(path, None))
        assert [row for c in found for row in by_hand(parse_chunk(c, None, LIMIT, False))] == expected
        # Reading goes on from the end of any chunk.
        for chunk in found[:: max(1, len(found) // 5)]:
            rest = read_chunks(path, None, chunk.stop, chunk.byte)
            again = [row for c in rest for row in by_hand(parse_chunk(c, None, LIMIT, False))]
            assert again == [row for row in expected if row[0] >= chunk.stop]


@pytest.mark.parametrize("group", [3, 10, 100])
def test_parquet_is_read_on_from_any_row(tmp_path, monkeypatch, group):
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 7)
    rows = [{"text": f"{i}", "tokens": list(range(1, i % 4)) or None} for i in range(40)]
    path = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)
    for first in range(41):
        found = [row for c in read_chunks(path, None, first) for row in by_hand(parse_chunk(c, None, LIMIT, False))]
        assert found == list(enumerate(rows))[first:]


def batch_of(**columns) -> Chunk:
    batch = pyarrow.record_batch(columns)
    return Chunk(5, 5 + batch.num_rows, 0, batch)


PLAIN = [pyarrow.list_(t()) for t in (pyarrow.uint16, pyarrow.int32, pyarrow.uint32, pyarrow.int64, pyarrow.int16)]
PLAIN += [pyarrow.large_list(pyarrow.uint16()), pyarrow.list_(pyarrow.uint8())]


@pytest.mark.parametrize("kind", PLAIN, ids=str)
def test_arrow_lists_become_arrays(kind):
    lists = [[1, 2, 200], None, [], [7]]
    chunk = batch_of(tokens=pyarrow.array([[9], *lists], kind).slice(1), task=["a", None, "b", "c"])
    parsed = parse_chunk(chunk, None, LIMIT, False)
    assert parsed.ids.tolist() == [1, 2, 200, 7] and parsed.ids_offsets.tolist() == [0, 3, 3, 3, 4]
    assert list(parsed.rows) == [5, 6, 7, 8] and [v["task"] for v in parsed.values] == ["a", None, "b", "c"]
    assert [v["tokens"] for v in parsed.values] == [None] * 4
    if kind.value_type.byte_width > 1 and not pyarrow.types.is_int16(kind.value_type):
        flat = chunk.content.column(0).flatten().to_numpy()
        assert np.shares_memory(parsed.ids, flat)


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array([[1, None], [2]]),
        pyarrow.array([[[1]], [[2]]]),
        pyarrow.array([[1.0], [2.0]]),
        pyarrow.array(["1", "2"]),
        pyarrow.array([[2**63], [1]], pyarrow.list_(pyarrow.uint64())),
    ],
    ids=str,
)
def test_other_columns_stay_python(column):
    parsed = parse_chunk(batch_of(tokens=column), None, LIMIT, False)
    assert len(parsed.ids) == 0 and [v["tokens"] for v in parsed.values] == column.to_pylist()


def test_arrow_codes():
    codes = np.random.default_rng(0).integers(0, 8192, (3, IMAGE_CODES))
    one, two, three = codes.tolist()
    flat = parse_chunk(batch_of(image_tokens=[one, None, [], three]), None, LIMIT, False)
    assert flat.codes_offsets.tolist() == [0, 1, 1, 1, 2] and flat.codes.tolist() == [one, three]
    assert [v["image_tokens"] for v in flat.values] == [None, None, [], None]
    nested = parse_chunk(batch_of(image_tokens=[[one, two], None, [], [three]]), None, LIMIT, False)
    assert nested.codes_offsets.tolist() == [0, 2, 2, 2, 3] and nested.codes.tolist() == codes.tolist()
    for other in ([one[1:]], [[one, two[1:]]], [[-1] * IMAGE_CODES], [[65_536] * IMAGE_CODES], [[None] * IMAGE_CODES]):
        parsed = parse_chunk(batch_of(image_tokens=other), None, LIMIT, False)
        assert len(parsed.codes) == 0 and parsed.values[0]["image_tokens"] == other[0]
    kept = parse_chunk(batch_of(image_tokens=[one]), None, LIMIT, True)
    assert len(kept.codes) == 0 and kept.values[0]["image_tokens"] == one


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order_and_few_are_under_way(workers):
    under_way = most = 0
    lock = threading.Lock()

    def items():
        nonlocal under_way, most
        for i in range(40):
            with lock:
                under_way += 1
                most = max(most, under_way)
            yield i

    def work(i):
        time.sleep(0.002 * (i % 3))
        return i

    found = []
    for result in in_order(work, items(), workers):
        found.append(result)
        with lock:
            under_way -= 1
    assert found == list(range(40)) and most <= workers + 2


def test_an_error_comes_after_the_results_before_it():
    def items():
        yield from range(5)
        raise InputError("the file ends here")

    def work(i):
        time.sleep(0.01 if i == 2 else 0)
        if i == 3:
            raise InputError("row 3")
        return i

    found = []
    with pytest.raises(InputError, match="row 3"):
        for result in in_order(work, items(), 4):
            found.append(result)
    assert found == [0, 1, 2]
    with pytest.raises(InputError, match="the file ends here"):
        for result in in_order(str, items(), 4):
            found.append(result)
    assert found == [0, 1, 2, *"01234"]
