"""Code tables: every row is checked, and images are found by path as given or by the file it means."""

import json

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from medmax_fast.data.codes import CodeTable, code_files, codes_fingerprint, read_codes
from medmax_fast.data.shards import Shard, Shards
from medmax_fast.runtime import InputError
from medmax_fast.vocab import IMAGE_CODES

RANDOM = np.random.default_rng(5)
CODES = RANDOM.integers(0, 8192, (6, IMAGE_CODES)).astype(np.uint16)


def write_table(path, paths, codes, kind=None):
    kind = kind or pyarrow.list_(pyarrow.uint16())
    lists = pyarrow.array([None if c is None else list(map(int, c)) for c in codes], kind)
    parquet.write_table(pyarrow.table({"img_path": paths, "img_tokens": lists}), path)
    return path


def publish(folder, paths, base, rows_per_shard=4):
    shards = Shards(folder, len(paths), rows_per_shard)
    for shard in range(shards.count):
        rows = shards.rows(shard)
        digests = [bytes(16)] * len(rows)
        codes = CODES[rows.start : rows.stop]
        shards.publish(shard, Shard([paths[i] for i in rows], codes, digests, len(rows), [], {}, {"encode": 1.0}))
    shards.merge(str(base), {}, {})
    return shards


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.list_(pyarrow.uint16()),
        pyarrow.list_(pyarrow.int64()),
        pyarrow.large_list(pyarrow.int32()),
        pyarrow.list_(pyarrow.int64(), IMAGE_CODES),
    ],
)
def test_every_list_type_is_read(tmp_path, kind):
    path = write_table(tmp_path / "c.parquet", list("abcdef"), CODES, kind)
    batches = list(read_codes(path, 8192))
    assert [name for names, _ in batches for name in names] == list("abcdef")
    found = np.concatenate([codes for _, codes in batches])
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, CODES)


def changed(row: int, column: int, value: int) -> list:
    codes = CODES.astype(np.int64)
    codes[row, column] = value
    return list(codes)


INT = pyarrow.list_(pyarrow.int64())
BAD = {
    "short": ([*CODES[:2], CODES[2][:1023]], INT, "row 2: an image of 1023 codes, expected 1024"),
    "long": ([*CODES[:1], np.zeros(1025)], INT, "row 1: an image of 1025 codes"),
    "none": ([CODES[0], None], INT, "row 1: no codes, expected 1024"),
    "large": (changed(3, 7, 8192), INT, r"row 3: image code 8192, expected 0\.\.8191"),
    "negative": (changed(0, 0, -1), INT, "row 0: image code -1"),
    "float": (list(CODES), pyarrow.list_(pyarrow.float32()), "img_tokens is a list of float"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_codes(tmp_path, name):
    codes, kind, message = BAD[name]
    path = write_table(tmp_path / "c.parquet", [f"{i}.png" for i in range(len(codes))], codes, kind)
    with pytest.raises(InputError, match=message) as caught:
        CodeTable(path, 8192)
    assert str(path) in str(caught.value)


def test_bad_tables(tmp_path):
    parquet.write_table(pyarrow.table({"img_path": ["a"], "tokens": [[1]]}), tmp_path / "c.parquet")
    with pytest.raises(InputError, match="no column 'img_tokens'"):
        CodeTable(tmp_path / "c.parquet", 8192)
    write_table(tmp_path / "c.parquet", ["a", None], CODES[:2])
    with pytest.raises(InputError, match="row 1: img_path is None"):
        CodeTable(tmp_path / "c.parquet", 8192)
    write_table(tmp_path / "c.parquet", ["a", "a"], CODES[:2])
    with pytest.raises(InputError, match="a appears twice with different codes"):
        CodeTable(tmp_path / "c.parquet", 8192)
    (tmp_path / "c.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(InputError, match="not a Parquet file"):
        CodeTable(tmp_path / "c.parquet", 8192)
    (tmp_path / "c.parquet").unlink()
    with pytest.raises(InputError, match=r"no \*\.parquet"):
        code_files(tmp_path)
    with pytest.raises(InputError, match="no such file or folder"):
        code_files(tmp_path / "gone")


def test_found_by_path_as_given_or_by_the_file_it_means(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    (tmp_path / "link").symlink_to(images)
    paths = ["a.png", "./b.png", str(images / "c.png"), "../images/d.png", "https://x/e.png", "f.png"]
    publish(tmp_path / "codes", paths, images)
    table = CodeTable(tmp_path / "codes", 8192, tmp_path)
    assert len(table) == 6
    for asked, base, row in [
        ("a.png", "/elsewhere", 0),
        ("images/a.png", tmp_path, 0),
        (str(images / "b.png"), "/elsewhere", 1),
        ("link/c.png", tmp_path, 2),
        ("images/../images/d.png", tmp_path, 3),
        ("https://x/e.png", tmp_path, 4),
        ("f.png", images, 5),
    ]:
        np.testing.assert_array_equal(table.find(asked, base), CODES[row], err_msg=asked)
    assert table.find("images/z.png", tmp_path) is None
    assert table.find("b.png", tmp_path) is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["codes", "images", "link"]


def test_the_same_image_twice_is_one_entry(tmp_path):
    path = write_table(tmp_path / "c.parquet", ["a", "b", "a"], CODES[[0, 1, 0]])
    table = CodeTable(path, 8192)
    assert len(table) == 2
    np.testing.assert_array_equal(table.find("b", "."), CODES[1])


def test_shards(tmp_path):
    shards = publish(tmp_path / "codes", [f"{i}.png" for i in range(6)], tmp_path)
    assert shards.count == 2 and [list(shards.rows(s)) for s in range(2)] == [[0, 1, 2, 3], [4, 5]]
    assert [p.name for p in code_files(tmp_path / "codes")] == ["codes-00000.parquet", "codes-00001.parquet"]
    manifest = json.loads((tmp_path / "codes" / "manifest.json").read_text())
    assert manifest["images"] == 6 and manifest["seconds"]["encode"] == 2.0 and manifest["base"] == str(tmp_path)
    shards.record_path(1).unlink()
    assert shards.done() == [0] and shards.left() == [1]
    before = codes_fingerprint(tmp_path / "codes")
    write_table(tmp_path / "codes" / "codes-00002.parquet", ["z"], CODES[:1])
    assert codes_fingerprint(tmp_path / "codes") != before
