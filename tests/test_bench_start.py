"""The benchmark of a start: the program in a process of its own, the disk's rate, and kernels from Triton's cache."""

import json
import os
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch


@pytest.fixture()
def bench():
    from benchmarks import bench_start

    return bench_start


def test_reading_reads_everything(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "BLOCK", 1000)
    files = [tmp_path / "a", tmp_path / "b"]
    for path, size in zip(files, (2500, 1000), strict=True):
        path.write_bytes(os.urandom(size))
    read, asked = os.pread, []
    monkeypatch.setattr(os, "pread", lambda file, size, start: asked.append((size, start)) or read(file, size, start))
    bench.drop_from_cache(files)
    assert bench.read_seconds(files) > 0
    assert sorted(asked) == [(1000, 0), (1000, 0), (1000, 1000), (1000, 2000)]
    # Less than there is must not pass for a fast disk.
    monkeypatch.setattr(os, "pread", lambda file, size, start: read(file, size // 2, start))
    with pytest.raises(AssertionError):
        bench.read_seconds(files)


@pytest.fixture()
def answered(bench, monkeypatch):
    """A start whose id is `id`, made without its process; gives a setter of the id, and the calls before it."""
    calls = []
    drop, seconds = bench.drop_from_cache, bench.read_seconds
    monkeypatch.setattr(bench, "drop_from_cache", lambda files: calls.append("drop") or drop(files))
    monkeypatch.setattr(bench, "read_seconds", lambda files: calls.append("read") or seconds(files))

    def answer(found: int | None):
        def first_id(checkpoint: Path) -> tuple[float, int]:
            calls.append("start")
            from medmax_fast.generate.engine import Engine
            from medmax_fast.generate.requests import Request

            assert list(checkpoint.glob("*.safetensors"))
            engine = Engine.from_checkpoint(checkpoint, "cpu", cache_gb=0.1)
            request = Request("one", content=[{"type": "text", "text": bench.PROMPT}], greedy=True, max_new_tokens=1)
            (right,) = engine.generate([request])[0].token_ids
            return 7.0, right if found is None else found

        monkeypatch.setattr(bench, "first_id", first_id)

    return answer, calls


def test_a_start_is_held_to_transformers_and_to_the_disk(bench, answered):
    answer, calls = answered
    answer(None)
    roofline = bench.Roofline(1e9, 1e9)
    (_, (read,)), ((shown,), (ours,)) = bench.start("tiny", torch.device("cpu"), roofline)
    assert calls == ["drop", "read", "drop", "start"]
    assert ours["quality"] == {"ids": 1, "differing": 0, "logit_gap": 0.0} and ours["form"] == bench.STARTED
    assert ours["p50_s"] == 7.0 and ours["over_disk_s"] == pytest.approx(7.0 - read["p50_s"])
    assert ours["share"] == pytest.approx(read["p50_s"] / 7.0) and ours["bound"] == read["bound"] == "disk"
    assert read["share"] == pytest.approx(1) and ours["times"] == pytest.approx(read["p50_s"] / 7.0)
    assert shown["entries_made"] == ours["entries_made"] == 0
    answer(0)
    with pytest.raises(AssertionError, match="id 0 is .* below the best"):
        list(bench.start("tiny", torch.device("cpu"), roofline))


def test_the_first_id_comes_from_the_program_itself(bench, golden):
    seconds, found = bench.first_id(golden / "checkpoint")
    assert 0.1 < seconds < 300 and isinstance(found, int)
    with pytest.raises(subprocess.SubprocessError, match="status 2"):
        bench.first_id(golden / "nowhere")


def test_floors(bench):
    start, compiled = bench.floors()
    # The parameters of Chameleon-7B without its VQGAN.
    assert start["moved_bytes"] == 2 * 7_013_666_816 and "7,013,666,816 weights" in start["shape"]
    assert compiled == {"stage": "compile", "shape": bench.compile_shape(), "moved_bytes": 0, "flop": 0}


def fake_child(bench, monkeypatch, rows: list[dict], cached: bool = True, failure: str = "") -> list[str]:
    """Self-tests that give `rows` and leave two entries in Triton's cache, once if they are cached."""
    folders = []

    class Child:
        def __init__(self, module: str, environment: dict[str, str]):
            assert module == "medmax_fast.doctor.selftest"
            self.failure = failure
            self.cache = Path(environment["TRITON_CACHE_DIR"])
            folders.append(str(self.cache))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def lines(self, seconds: float):
            for i in range(2):
                (self.cache / (f"kernel{i}" if cached else f"kernel{len(folders)}{i}")).mkdir(exist_ok=True)
            yield {"tests": len(rows) + 1}
            yield {"test": "resize", "runs": "C++", "passed": True, "seconds": 100.0, "error": ""}
            yield from rows

    monkeypatch.setattr(bench, "Child", Child)
    return folders


def all_tests(bench, **changes) -> list[dict]:
    row = {"runs": "Triton", "passed": True, "seconds": 0.5, "error": "", "difference": 0.0}
    return [{"test": name} | row | changes for name in bench.KERNELS]


def test_kernels_are_compiled_once(bench, monkeypatch):
    folders = fake_child(bench, monkeypatch, all_tests(bench))
    found = [row for _, rows in bench.compile_kernels(bench.Roofline(1e9, 1e9)) for row in rows]
    assert len(set(folders)) == 1 and not Path(folders[0]).exists()
    # Without the tests of C++.
    assert [row["p50_s"] for row in found] == [0.5 * len(bench.KERNELS)] * 2
    assert [(row["form"], row["entries_made"]) for row in found] == [(bench.COLD, 2), (bench.CACHED, 0)]
    assert all(row["quality"] == {"tests_failed": 0} and row["share"] is None for row in found)
    fake_child(bench, monkeypatch, all_tests(bench), cached=False)
    again = [row for _, rows in bench.compile_kernels(bench.Roofline(1e9, 1e9)) for row in rows]
    assert [row["entries_made"] for row in again] == [2, 2]


def test_kernels_that_are_wrong_have_no_time(bench, monkeypatch, tmp_path):
    red = all_tests(bench)
    red[0] |= {"passed": False, "difference": 3.0}
    for rows, failure, words in (
        (red, "", f"{red[0]['test']}: 3.0"),
        (all_tests(bench)[1:], "", "kernels were tested"),
        (all_tests(bench), "its process ended with status 9", "status 9"),
    ):
        fake_child(bench, monkeypatch, rows, failure=failure)
        with pytest.raises(AssertionError, match=words):
            bench.self_tests(tmp_path)


def test_an_empty_cache_must_not_stay_empty_on_a_gpu(bench, monkeypatch):
    @contextmanager
    def child(*_, **__):
        class Silent:
            failure = ""

            def lines(self, seconds):
                return iter(all_tests(bench))

        yield Silent()

    monkeypatch.setattr(bench, "Child", child)
    with pytest.raises(AssertionError, match="left nothing in its cache"):
        list(bench.compile_kernels(bench.Roofline(1e9, 1e9)))


def test_the_cache_is_where_triton_looks(bench, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "mine"))
    assert bench.triton_cache() == tmp_path / "mine" and bench.entries(bench.triton_cache()) == set()
    (tmp_path / "mine" / "kernel").mkdir(parents=True)
    assert bench.entries(bench.triton_cache()) == {"kernel"}
    monkeypatch.delenv("TRITON_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert bench.triton_cache() == tmp_path / ".triton" / "cache"
    assert json.dumps(bench.once(2.0)) == '{"p20_s": 2.0, "p50_s": 2.0, "p80_s": 2.0}'
