"""The token store gives back what was written, streams, and never opens damaged."""

import json
import os
import random
import shutil
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from medmax_fast.data.store import RowsWriter, StoreWriter, TokenStore, id_dtype, write_store
from medmax_fast.data.summary import store_summary
from medmax_fast.runtime import InputError
from medmax_fast.vocab import IdLayout

LAYOUT = IdLayout(0, 1, 2, 3, 4, 8192, 8196, 8197, 8710, 8711, 8712, 9000)
IMAGE = [8197, *range(4, 1028), 8196]


def small_store(folder):
    rows = [
        ([0, 8800, 8710, *IMAGE, 2], "t:0", "generation", "b"),
        ([0, *IMAGE, 8801, 8710, 8802, 2], "t:1", "vqa", "a"),
        ([0, 8801, 2], "t:2", "vqa", "b"),
        ([0, 8197, 5, 8196, 8710, 2], "t:3", "", ""),
    ]
    return write_store(folder, LAYOUT, [(np.array(ids), *rest) for ids, *rest in rows], note="x"), rows


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, 8999), min_size=1, max_size=30), max_size=10))
def test_round_trip(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("store") / "s"
    store = write_store(folder, LAYOUT, [(np.array(ids), f"k{i}", "t", "s") for i, ids in enumerate(rows)])
    assert len(store) == len(rows) and [store.row(i).tolist() for i in range(len(store))] == rows
    assert store.keys == [f"k{i}" for i in range(len(rows))] and set(store.tasks) <= {"t"}
    assert store.lengths.tolist() == list(map(len, rows)) and store.ids.dtype == np.uint16
    assert store.layout == LAYOUT and store.offsets.dtype == np.int64


def test_many_rows_and_large_vocabularies(tmp_path):
    layout = replace(LAYOUT, vocab_size=70_000)
    assert id_dtype(65_536) == np.uint16 and id_dtype(65_537) == np.uint32
    rows = [(np.array([69_999, i]), str(i), f"t{i % 3}", "") for i in range(70_000)]
    store = write_store(tmp_path / "s", layout, rows)
    assert store.ids.dtype == np.uint32 and store.row(69_999).tolist() == [69_999, 69_999]
    assert store.keys[-1] == "69999" and store.tasks[:4] == ["t0", "t1", "t2", "t0"]
    for i in (-1, 70_000):
        with pytest.raises(IndexError):
            store.row(i)


def test_ids_are_mapped_and_not_read(tmp_path):
    store, _ = small_store(tmp_path / "s")
    assert isinstance(store.ids, np.memmap) and np.shares_memory(store.row(1), store.ids)


def test_writing_is_streamed(tmp_path):
    tmp_path.joinpath("s").mkdir()
    row = np.arange(2000) % 9000
    with StoreWriter(tmp_path / "s", LAYOUT) as writer:
        writer.append(row, "k")
        tracemalloc.start()
        for _ in range(2000):
            writer.append(row, "k")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        writer.close()
    assert (tmp_path / "s" / "ids.bin").stat().st_size == 2001 * 2000 * 2
    assert peak < 2_000_000


@pytest.mark.parametrize("name", ["ids.bin", "offsets.npy", "rows.parquet"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "longer"])
def test_damage_is_found(tmp_path, name, damage):
    small_store(tmp_path / "s")
    path = tmp_path / "s" / name
    content = path.read_bytes()
    flipped = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
    changed = {"truncated": content[:-2], "flipped": flipped, "longer": content + b"\0\0"}
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(changed[damage])
    with pytest.raises(InputError, match=str(path)) as caught:
        TokenStore(tmp_path / "s")
    assert len(str(caught.value).splitlines()) == 1


def test_any_flipped_or_cut_byte_is_an_error_or_changes_nothing(tmp_path):
    store, _ = small_store(tmp_path / "s")
    read = lambda s: (s.layout, s.ids.tolist(), s.offsets.tolist(), s.keys, s.tasks, s.sources, s.manifest["tasks"])  # noqa: E731
    expected, draw, errors = read(store), random.Random(2), 0
    for name in ("manifest.json", "ids.bin", "offsets.npy", "rows.parquet"):
        path = tmp_path / "s" / name
        whole = path.read_bytes()
        for trial in range(250 if name == "manifest.json" else 25):
            at = draw.randrange(len(whole))
            flipped = whole[:at] + bytes([whole[at] ^ (1 << draw.randrange(8))]) + whole[at + 1 :]
            path.write_bytes(flipped if trial % 5 else whole[:at])
            try:
                assert read(TokenStore(tmp_path / "s")) == expected
            except InputError as error:
                errors += 1
                assert len(str(error).splitlines()) == 1 and str(tmp_path / "s") in str(error)
        path.write_bytes(whole)
    assert errors > 270


def test_rows_in_portions_give_the_same_files(tmp_path):
    """What `build` writes out of its journal is what StoreWriter writes row by row."""
    store, rows = small_store(tmp_path / "s")
    (tmp_path / "t").mkdir()
    shutil.copy(tmp_path / "s" / "ids.bin", tmp_path / "t")
    with RowsWriter(tmp_path / "t", LAYOUT) as writer:
        for ids, *rest in rows:
            writer.add(len(ids), *rest)
        writer.finish(store.manifest["sha256"]["ids.bin"], note="x")
    for name in ("offsets.npy", "rows.parquet", "manifest.json"):
        assert (tmp_path / "s" / name).read_bytes() == (tmp_path / "t" / name).read_bytes()


@pytest.mark.parametrize("offsets", [[0, 5, 3, 9], [1, 3, 6, 9], [0, 3, 6, 8], [0, 3, 3, 9], [0, 3, 9], [0.0, 3, 6, 9]])
def test_wrong_offsets_are_found_even_unverified(tmp_path, offsets):
    write_store(tmp_path / "s", LAYOUT, [(np.array([0, 1, 2]), "k", "", "")] * 3)
    assert len(TokenStore(tmp_path / "s", verify=False)) == 3
    np.save(tmp_path / "s" / "offsets.npy", np.array(offsets))
    with pytest.raises(InputError, match="offsets"):
        TokenStore(tmp_path / "s", verify=False)


def test_wrong_sizes_are_found_even_unverified(tmp_path):
    small_store(tmp_path / "s")
    rows, ids = tmp_path / "s" / "rows.parquet", tmp_path / "s" / "ids.bin"
    table = parquet.read_table(rows)
    parquet.write_table(table.slice(1), rows)
    with pytest.raises(
        InputError, match=f"rows.parquet: {len(table) - 1} rows, expected {len(table)}; build the store"
    ):
        _ = TokenStore(tmp_path / "s", verify=False).keys
    rows.write_text("rows")
    with pytest.raises(InputError, match=r"rows.parquet: corrupt Parquet \(.*\); build the store again"):
        _ = TokenStore(tmp_path / "s", verify=False).keys
    size = ids.stat().st_size
    os.truncate(ids, size - 2)
    with pytest.raises(InputError, match=f"ids.bin: {size - 2} bytes, expected {size}; build the store again"):
        TokenStore(tmp_path / "s", verify=False)


def test_pickled_offsets_are_not_run(tmp_path):
    small_store(tmp_path / "s")
    np.save(tmp_path / "s" / "offsets.npy", np.array([{}, []], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="offsets"):
        TokenStore(tmp_path / "s", verify=False)


def test_not_a_store(tmp_path):
    with pytest.raises(InputError, match=r"no manifest\.json, expected a token store"):
        TokenStore(tmp_path)
    small_store(tmp_path / "s")
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    for change, message in ({"format": 9}, "format 9"), ({"layout": {"bos": 0}}, "not a store"), ({"dtype": "i8"}, "i"):
        shutil.copytree(tmp_path / "s", tmp_path / "t", dirs_exist_ok=True)
        (tmp_path / "t" / "manifest.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises(InputError, match=message):
            TokenStore(tmp_path / "t")
    (tmp_path / "t" / "manifest.json").write_text('{"rows": ')
    with pytest.raises(InputError, match="not valid JSON"):
        TokenStore(tmp_path / "t")


def test_summary(tmp_path):
    store, rows = small_store(tmp_path / "s")
    assert store.manifest["tasks"] == {"": 1, "generation": 1, "vqa": 2} and store.manifest["note"] == "x"
    summary = json.loads(json.dumps(store_summary(store)))
    # Supervised: what follows the first eot; without one, all but the first id.
    assert summary["rows"] == 4 and summary["ids"] == sum(len(r[0]) for r in rows)
    assert summary["supervised"] == 1027 + 2 + 2 + 1 and summary["images"] == 3
    assert summary["rows_without_eot"] == 1 and summary["rows_with_odd_images"] == 1 and summary["longest"] == 1031
    tasks = {row["task"]: (row["rows"], row["supervised"]) for row in summary["tasks"]}
    assert tasks == {"": (1, 1), "generation": (1, 1027), "vqa": (2, 4)}
    assert {row["source"]: row["rows"] for row in summary["sources"]} == {"": 1, "a": 1, "b": 2}
    assert sum(summary["lengths"]["rows"]) == 4 and len(summary["lengths"]["edges"]) == 41
    packing = {row["capacity"]: row for row in summary["packing"]}
    assert list(packing) == [2048, 4096, 8192, 16384, 32768] and packing[2048]["packs"] == 2
    assert packing[4096]["fill"] == pytest.approx(summary["ids"] / 4096) and packing[2048]["too_long"] == 0
    tight = store_summary(store, capacities=[100])["packing"][0]
    assert tight == {"capacity": 100, "packs": 1, "fill": pytest.approx(9 / 100), "too_long": 2}


def test_summary_of_an_empty_store(tmp_path):
    summary = store_summary(write_store(tmp_path / "s", LAYOUT, []))
    assert summary["rows"] == summary["images"] == 0 and summary["tasks"] == []
