"""The benchmark of the collator: it runs, on the way to the device too, and one that gives other ids has no speed."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from quick_run import quick_run

ROOT = Path(__file__).resolve().parents[1]
FORMS = ["published", "ours", "ours, prefetched: the wait"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What a quick run of all sections wrote."""
    return quick_run("collate", tmp_path_factory.mktemp("bench"))


@pytest.fixture()
def bench():
    from benchmarks import bench_collate

    return bench_collate


def test_every_pack_reaches_the_device_in_three_ways(found):
    rows = found["evidence"]
    assert [row["form"] for row in rows] == 2 * FORMS and not found["failed"]
    for i, row in enumerate(rows):
        published = rows[i - i % 3]
        ids = float(row["shape"].split()[0].replace(",", ""))
        assert row["stage"] == "collate" and row["quality"] == {"ids_differing": 0}
        assert 0 < row["p20_s"] <= row["p50_s"] <= row["p80_s"]
        assert (row["beside"], row["times"]) == ("published", pytest.approx(published["p50_s"] / row["p50_s"]))
        if row["form"] == FORMS[2]:
            # Threads have done the work meanwhile: a wait has no rate.
            assert row["moved_bytes"] is row["items_per_s"] is row["share"] is None
            continue
        # 2 bytes read and 24 written per id.
        assert row["moved_bytes"] == pytest.approx(26 * ids, rel=1e-3) and row["flop"] is None
        assert row["gb_per_s"] == pytest.approx(row["moved_bytes"] / row["p50_s"] / 1e9)
        assert row["share"] == pytest.approx(row["moved_bytes"] / found["copy_bytes_per_s"] / row["p50_s"])
        assert row["items_per_s"] == pytest.approx(ids / row["p50_s"], rel=1e-3) and row["unit"] == "ids"


def test_forms_on_the_host(found):
    rows = found["sections"]["forms"]
    names = [row["form"] for row in rows]
    assert len(names) == 22 and names[:11] == names[11:] and names[-1] == "published"
    for part in (rows[:11], rows[11:]):
        published = part[-1]["mega_ids_per_s"]
        assert all(row["times_published"] == pytest.approx(row["mega_ids_per_s"] / published) for row in part)
        assert [row["form"] for row in part if row["wait_us"] is not None] == ["prefetched, 1 core"]


def data(bench, rows: int = 40):
    ids, offsets = bench.token_buffer(rows)
    return ids, offsets, bench.Roofline(1e9, 1e9)


def test_floors_are_those_of_the_evidence(bench):
    ids, offsets, roofline = data(bench, bench.STORED)
    floors = bench.floors()
    assert len(floors) == len(bench.PACK_ROWS)
    ((_, evidence),) = bench.to_device(ids, offsets, bench.PACK_ROWS[:1], torch.device("cpu"), roofline, 1)
    assert {(row["stage"], row["shape"]) for row in evidence} == {(floors[0]["stage"], floors[0]["shape"])}
    # On a GPU the 2 bytes read on the host do not count.
    assert evidence[0]["moved_bytes"] * 24 / 26 == pytest.approx(floors[0]["moved_bytes"])


@pytest.mark.parametrize("array", ["labels", "position_ids", "cu_seqlens"])
def test_a_wrong_collator_is_not_timed(bench, monkeypatch, array):
    right = bench.collate

    def wrong(*args, **kwargs):
        batch = right(*args, **kwargs)
        return replace(batch, **{array: np.roll(getattr(batch, array), 1)})

    ids, offsets, roofline = data(bench)
    arguments = ids, offsets, (4,), torch.device("cpu"), roofline, 1
    ((rows, evidence),) = bench.to_device(*arguments)
    assert len(rows) == len(evidence) == 3
    # The form alone that is timed as `ours`; the check of all forms has a collator of its own.
    monkeypatch.setattr(bench, "collate", wrong)
    with pytest.raises(AssertionError, match="values differ"):
        list(bench.to_device(*arguments))


def test_differing_counts_what_is_no_padding(bench):
    ids, offsets, _ = data(bench)
    pack = np.array([3, 5])
    expected = bench.collate_ref(ids, offsets, pack, bench.EOT)
    lengths = np.diff(offsets)[pack]
    padded = bench.published_collate(bench.as_lists(ids, offsets, pack))
    assert bench.differing(padded, expected) == 0
    shorter = int(lengths.argmin())
    padded["input_ids"][shorter, lengths.max() - 1] += 1
    assert bench.differing(padded, expected) == 0
    padded["input_ids"][shorter, lengths.min() - 1] += 1
    padded["labels"][0, 0] += 1
    assert bench.differing(padded, expected) == 2
    # One id is missing: all of the ids count.
    padded["attention_mask"][shorter, lengths.min() - 1] = 0
    assert bench.differing(padded, expected) == 2 * lengths.sum()
