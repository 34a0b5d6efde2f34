"""Members read out of tar files equal what went in, and an archive that is not whole is refused."""

import gzip
import io
import os
import random
import tarfile
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from medmax_fast.data import archive as archive_module
from medmax_fast.data import parts as parts_module
from medmax_fast.data.archive import Archive, find_parts, is_archive
from medmax_fast.data.parts import _successors
from medmax_fast.runtime import InputError

SIZES = (0, 1, 511, 512, 513, 70_000, 3, 4096)


def contents(seed: int = 0, sizes=SIZES) -> dict[str, bytes]:
    draw = random.Random(seed)
    return {f"images/{i:03}.jpg": draw.randbytes(size) for i, size in enumerate(sizes)}


def tar(files: dict[str, bytes] | list[tuple], format: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar archive of (name, bytes) or (name, TarInfo type) pairs."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as out:
        for name, data in files.items() if isinstance(files, dict) else files:
            member = tarfile.TarInfo(name)
            if isinstance(data, int):
                member.type = bytes([data])
                member.linkname = "elsewhere"
                out.addfile(member)
            else:
                member.size = len(data)
                out.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def write_parts(folder: Path, data: bytes, labels: list[str], name: str = "images.tar.gz") -> Path:
    """Cut `data` into equal parts called name + label; the path of the first."""
    step = -(-len(data) // len(labels))
    for i, label in enumerate(labels):
        (folder / f"{name}{label}").write_bytes(data[i * step : (i + 1) * step])
    return folder / f"{name}{labels[0]}"


def everything(path: Path, **options) -> dict[str, bytes]:
    opened = Archive.open(path, **options)
    return {name: opened.read(i) for i, name in enumerate(opened.names)}


PACK = {"images.tar": lambda data: data, "images.tar.gz": gzip.compress, "images.tgz": gzip.compress}


@pytest.mark.parametrize("name", PACK)
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_what_went_in(tmp_path, name, format):
    files = contents()
    (tmp_path / name).write_bytes(PACK[name](tar(files, format)))
    opened = Archive.open(tmp_path / name)
    assert opened.names == list(files) and len(opened) == len(files)
    assert [opened.read(i) for i in range(len(opened))] == list(files.values())
    assert opened.sequential == (name != "images.tar") and opened.restarts <= 1
    assert opened.offsets.dtype == opened.sizes.dtype == np.int64
    np.testing.assert_array_equal(opened.sizes, [len(data) for data in files.values()])
    for i in (-1, len(files)):
        with pytest.raises(IndexError):
            opened.read(i)


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_every_kind(tmp_path, format):
    names = ["./a.jpg", "b" * 300 + ".jpg", "deep/" * 60 + "c.jpg", "schaedel-\u00e4.png", "bytes-\udcff.png"]
    names += ["../outside.png", "/absolute.png", "with space\nand line.png"]
    (tmp_path / "x.tar").write_bytes(tar({name: name.encode("utf-8", "surrogateescape") for name in names}, format))
    expected = ["a.jpg", *names[1:]]
    # Names are names: nothing appears on the disk, and the index keeps even those that are not UTF-8.
    for _ in range(2):
        opened = Archive.open(tmp_path / "x.tar", tmp_path / "index" / "x.parquet")
        assert opened.names == expected
        assert opened.read(4) == b"bytes-\xff.png"
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["index", "x.parquet", "x.tar"]


def test_last_of_one_name_wins_and_what_is_no_file_is_left_out(tmp_path, capsys):
    files = [("a.jpg", b"first"), ("b.jpg", b"b"), ("d", tarfile.DIRTYPE[0]), ("l.jpg", tarfile.SYMTYPE[0])]
    files += [("h.jpg", tarfile.LNKTYPE[0]), ("fifo.jpg", tarfile.FIFOTYPE[0]), ("./a.jpg", b"second"), ("c.jpg", b"c")]
    (tmp_path / "x.tar").write_bytes(tar(files))
    opened = Archive.open(tmp_path / "x.tar")
    assert opened.names == ["b.jpg", "a.jpg", "c.jpg"] and opened.read(1) == b"second"
    assert (np.diff(opened.offsets) > 0).all()
    assert "2 links left out" in capsys.readouterr().err


def test_an_archive_of_nothing(tmp_path):
    (tmp_path / "x.tar").write_bytes(tar({}))
    opened = Archive.open(tmp_path / "x.tar", tmp_path / "index")
    assert opened.names == [] and opened.offsets.shape == (0,)
    assert Archive.open(tmp_path / "x.tar", tmp_path / "index").sha256 == opened.sha256


def test_contents_and_not_the_name_say_what_is_gzip(tmp_path):
    files = contents()
    (tmp_path / "plain.tar.gz").write_bytes(tar(files))
    (tmp_path / "packed.tar").write_bytes(gzip.compress(tar(files)))
    assert everything(tmp_path / "plain.tar.gz") == everything(tmp_path / "packed.tar") == files
    assert not Archive.open(tmp_path / "plain.tar.gz").sequential and Archive.open(tmp_path / "packed.tar").sequential


def test_gzip_of_several_members_and_padding(tmp_path):
    files = contents()
    data = tar(files)
    packed = b"".join(gzip.compress(data[i : i + 30_000]) for i in range(0, len(data), 30_000))
    for name, padding in (("a.tar.gz", b""), ("b.tar.gz", bytes(700_000))):
        (tmp_path / name).write_bytes(packed + padding)
        assert everything(tmp_path / name) == files
    (tmp_path / "c.tar.gz").write_bytes(packed + b"and more")
    with pytest.raises(InputError, match="corrupt gzip data"):
        Archive.open(tmp_path / "c.tar.gz")


# ---- parts ----

SUFFIXES = [
    [".aa", ".ab", ".ac"],
    ["aa", "ab", "ac"],
    [".00", ".01", ".02"],
    ["-000", "-001"],
    [".1", ".2", ".3"],
    [f".part{i}" for i in range(12)],
    [f".part_{i:02}" for i in range(1, 4)],
    ["_part_aa", "_part_ab"],
    [".partaa", ".partab"],
    [".aaa", ".aab", ".aac"],
    [f".{i:02}" for i in range(90)] + [".9000", ".9001"],
    [f".{a}{b}" for a in "abcdefghijklmnopqrstuvwxy" for b in "abcdefghijklmnopqrstuvwxyz"] + [".zaaa", ".zaab"],
]


@pytest.mark.parametrize("suffixes", SUFFIXES, ids=lambda s: s[-1])
@pytest.mark.parametrize("name", ["images.tar.gz", "images.tar"])
def test_parts_are_found_in_order(tmp_path, suffixes, name):
    files = contents()
    write_parts(tmp_path, PACK[name](tar(files)), suffixes, name)
    # Neighbours that are no parts of this archive.
    for other in (f"{name}.md5", f"{name}.xz", "images.tar.bz2", "other.tar.gz.aa", f"{name}.index", "imagesxtar.aa"):
        (tmp_path / other).touch()
    for given in (name, name + suffixes[0], name + suffixes[-1]):
        assert [p.name for p in find_parts(tmp_path / given)] == [name + suffix for suffix in suffixes]
        assert is_archive(given)
    assert everything(tmp_path / name) == files


@pytest.mark.parametrize(
    "name", ["a.tar", "b.TAR.GZ", "c.tgz", "d.v2.tar.gz.aa", "e.tar.07", "f.tgz.part3", "g.tar_ab"]
)
def test_names_of_archives(name):
    assert is_archive(name) and is_archive(Path("folder") / name)


@pytest.mark.parametrize(
    "name", ["a.jpg", "tar", ".tar", "b.tar.xz", "c.tar.gz.md5", "d.tar.bz2", "e.tarball", "f.gz.aa"]
)
def test_names_of_other_things(name):
    assert not is_archive(name)
    if name != ".tar":
        with pytest.raises(InputError, match="not the name of an archive|no such file"):
            find_parts(name)


def test_successors_are_those_of_split():
    assert _successors("az") == ["ba"] and _successors("zz") == [] and _successors("zaaz") == ["zaba"]
    assert _successors("yz") == ["za", "zaaa"] and _successors("zyzz") == ["zzaa", "zzaaaa"]
    assert _successors("9") == ["10"] and _successors("89") == ["90", "9000"] and _successors("999") == ["1000"]


def test_missing_parts(tmp_path):
    data = gzip.compress(tar(contents()))
    first = write_parts(tmp_path, data, [".aa", ".ab", ".ac", ".ad"])
    last = tmp_path / "images.tar.gz.ad"
    last.rename(tmp_path / "kept")
    with pytest.raises(InputError, match=r"images\.tar\.gz\.aa \.\. images\.tar\.gz\.ac: gzip data is cut off"):
        Archive.open(first)
    (tmp_path / "kept").rename(last)
    (tmp_path / "images.tar.gz.ab").unlink()
    with pytest.raises(InputError, match="parts are missing between 'aa' and 'ac'"):
        Archive.open(first)
    first.unlink()
    for name in ("images.tar.gz", "images.tar.gz.ac"):
        with pytest.raises(InputError, match="parts are missing before 'ac'"):
            Archive.open(tmp_path / name)
    with pytest.raises(InputError, match="no such file"):
        Archive.open(first)
    (tmp_path / "images.tar.gz.00").touch()
    with pytest.raises(InputError, match=r"several sequences of parts \(images.tar.gz.00 and images.tar.gz.a"):
        Archive.open(tmp_path / "images.tar.gz")
    for path in (tmp_path / "none.tar", tmp_path / "no folder" / "x.tar.gz"):
        with pytest.raises(InputError, match="no such file, nor parts of it"):
            Archive.open(path)


# ---- damage ----


@pytest.mark.parametrize("pack", PACK.values(), ids=PACK)
def test_every_truncation_is_found(tmp_path, pack):
    data = tar(contents(sizes=(600, 0, 512, 2000)))
    whole = data.rstrip(b"\0")
    # Without gzip zeros at the end may be lost as long as one block of the end mark is left.
    keep = len(pack(data)) if pack is gzip.compress else -(-len(whole) // 512) * 512 + 512
    packed, path = pack(data), tmp_path / "x.tar"
    for size in [*range(0, keep, 97), *range(512, keep, 512), keep - 1]:
        path.write_bytes(packed[:size])
        with pytest.raises(InputError, match=r"x\.tar: ") as caught:
            Archive.open(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(packed[:keep])
    assert len(Archive.open(path)) == 4


def test_a_damaged_header_in_the_middle_is_not_the_end(tmp_path):
    data = bytearray(tar(contents()))
    place = data.index(b"images/005")
    data[place] ^= 1
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(InputError, match=f"neither a header nor the end at byte {place}"):
        Archive.open(tmp_path / "x.tar")
    (tmp_path / "y.tar").write_bytes(tar(contents()) + tar(contents()))
    with pytest.raises(InputError, match="two archives joined"):
        Archive.open(tmp_path / "y.tar")


def test_sparse_members_and_sizes_below_zero_are_refused(tmp_path):
    member = tarfile.TarInfo("x.jpg")
    for headers, reason in (({"GNU.sparse.map": "0,512"}, "sparse"), ({"size": "-512"}, "-512 bytes")):
        member.pax_headers = headers
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as out:
            out.addfile(member)
        (tmp_path / "x.tar").write_bytes(stream.getvalue())
        with pytest.raises(InputError, match=reason):
            Archive.open(tmp_path / "x.tar")


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
def test_damaged_bytes_never_raise_anything_else(tmp_path, name):
    draw = random.Random(0)
    good = [PACK[name.replace("x", "images")](tar(contents(), format)) for format in range(3)]
    long = {"n" * 200: b"1", "\u00e4" * 120: b"2"}
    good += [
        PACK[name.replace("x", "images")](tar(long, format)) for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    ]
    refused = 0
    for _ in range(400):
        data = bytearray(draw.choice(good))
        for _ in range(draw.choice((1, 3, 30))):
            data[draw.randrange(min(len(data), 3000))] = draw.choice((0, 45, 48, 55, 0x80, 0xFF, draw.randrange(256)))
        (tmp_path / name).write_bytes(data)
        try:
            everything(tmp_path / name)
        except InputError as error:
            refused += 1
            assert str(error).count("\n") == 0
    assert refused > 200


def test_gzip_checksums_are_verified(tmp_path):
    packed = bytearray(gzip.compress(tar({"a.jpg": bytes(1000)})))
    packed[-6] ^= 1
    (tmp_path / "x.tgz").write_bytes(packed)
    with pytest.raises(InputError, match="corrupt gzip data before byte .* incorrect data check"):
        Archive.open(tmp_path / "x.tgz")


def test_files_that_change_after_listing(tmp_path):
    for name in PACK:
        path = tmp_path / name
        path.write_bytes(PACK[name](tar(contents())))
        Archive.open(path, tmp_path / "index")
        opened, gone = Archive.open(path, tmp_path / "index"), Archive.open(path, tmp_path / "index")
        os.truncate(path, 1000)
        with pytest.raises(InputError, match="longer when it was opened"):
            opened.read(5)
        path.unlink()
        with pytest.raises(InputError, match="No such file"):
            gone.read(5)


# ---- the index ----


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
def test_progress_counts_the_files_bytes(tmp_path, monkeypatch, name):
    (tmp_path / name).write_bytes(PACK[name.replace("x", "images")](tar(contents(sizes=[5000] * 200))))
    seen = {}

    def count(items, label, total):
        for seen[label, total], item in enumerate(items, 1):
            yield item

    monkeypatch.setattr(archive_module, "progress", count)
    monkeypatch.setattr(archive_module, "MIB", 10_000)
    Archive.open(tmp_path / name)
    ((label, total),) = seen
    assert label == f"list {name} (MiB)" and total == (tmp_path / name).stat().st_size // 10_000
    assert total - 1 <= seen[label, total] <= total


@pytest.mark.parametrize("name", ["images.tar", "images.tar.gz"])
def test_the_index_saves_the_listing(tmp_path, monkeypatch, name):
    files = contents()
    first = write_parts(tmp_path, PACK[name](tar(files)), [".aa", ".ab"], name)
    index = tmp_path / "index.parquet"
    fresh = Archive.open(first, index)

    def refuse(*_):
        raise AssertionError("listed again")

    with monkeypatch.context() as patch:
        patch.setattr(archive_module, "_list", refuse)
        again = Archive.open(first, index)
        assert again.names == fresh.names and again.sha256 == fresh.sha256
        np.testing.assert_array_equal(again.offsets, fresh.offsets)
        assert [again.read(i) for i in range(len(again))] == list(files.values()) and again.restarts == 0
        # Another folder does not matter, other files, times and sizes do.
        (tmp_path / "moved").mkdir()
        for part in (".aa", ".ab"):
            os.rename(f"{tmp_path / name}{part}", f"{tmp_path / 'moved' / name}{part}")
        first = tmp_path / "moved" / first.name
        Archive.open(first, index)
        os.utime(first, ns=(0, 0))
        with pytest.raises(AssertionError, match="listed again"):
            Archive.open(first, index)
    assert Archive.open(first, index).sha256 == fresh.sha256
    other = dict(files, more=b"!")
    write_parts(tmp_path / "moved", PACK[name](tar(other)), [".aa", ".ab"], name)
    os.utime(first, ns=(0, 0))
    changed = Archive.open(first, index)
    assert changed.names == list(other) and changed.sha256 != fresh.sha256


def test_a_broken_index_is_written_anew(tmp_path):
    (tmp_path / "x.tar").write_bytes(tar(contents()))
    index = tmp_path / "index.parquet"
    fresh = Archive.open(tmp_path / "x.tar", index)
    good = index.read_bytes()
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"name": ["a"]}), tmp_path / "other.parquet")
    for broken in (b"", b"PAR1", good[:-50], b"\0" * len(good), (tmp_path / "other.parquet").read_bytes()):
        index.write_bytes(broken)
        assert Archive.open(tmp_path / "x.tar", index).sha256 == fresh.sha256
        assert index.read_bytes() == good
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index.parquet", "other.parquet", "x.tar"]


def test_the_fingerprint_is_that_of_the_listing(tmp_path):
    files = contents()
    (tmp_path / "a.tar").write_bytes(tar(files))
    (tmp_path / "b.tar.gz").write_bytes(gzip.compress(tar(files, tarfile.PAX_FORMAT)))
    same = Archive.open(tmp_path / "a.tar").sha256
    assert Archive.open(tmp_path / "b.tar.gz").sha256 == same
    for i, other in enumerate((dict(reversed(files.items())), {**files, "images/000.jpg": b"x"}, {"a": b"", **files})):
        (tmp_path / f"{i}.tar").write_bytes(tar(other))
        assert Archive.open(tmp_path / f"{i}.tar").sha256 != same


# ---- reading ----


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
def test_threads_read_in_any_order(tmp_path, name):
    files = contents(1, sizes=[(i * 7919) % 20_000 for i in range(200)])
    data = tar(files)
    first = write_parts(
        tmp_path, gzip.compress(data) if name == "x.tar.gz" else data, [".a" + c for c in "abcde"], name
    )
    opened = Archive.open(first)
    order = list(range(len(files))) * 2
    random.Random(0).shuffle(order)
    expected = list(files.values())
    with ThreadPoolExecutor(4) as pool:
        assert all(data == expected[i] for i, data in zip(order, pool.map(opened.read, order), strict=True))


def test_gzip_starts_again_only_beyond_the_window(tmp_path, monkeypatch):
    monkeypatch.setattr(parts_module, "_WINDOW", 100_000)
    files = contents(sizes=[40_000] * 50)
    (tmp_path / "x.tgz").write_bytes(zlib.compress(tar(files), 1, 31))
    monkeypatch.setattr(parts_module, "_OUTPUT", 10_000)
    Archive.open(tmp_path / "x.tgz", tmp_path / "index")
    opened = Archive.open(tmp_path / "x.tgz", tmp_path / "index")
    expected = list(files.values())
    for i in (1, 0, 3, 2, 10, 9, 30, 49, 48):
        assert opened.read(i) == expected[i]
    assert opened.restarts == 0
    assert opened.read(5) == expected[5] and opened.restarts == 1
    assert opened.read(6) == expected[6] and opened.restarts == 1


def test_memory_does_not_grow_with_the_archive(tmp_path):
    # 200 MB of zeros are 200 kB of gzip, of which a window may stay in memory.
    stream = io.BytesIO()
    with gzip.open(stream, "wb", 1) as packed, tarfile.open(fileobj=packed, mode="w|") as out:
        for i in range(100):
            member = tarfile.TarInfo(f"{i}.bmp")
            member.size = 2_000_000
            out.addfile(member, io.BytesIO(bytes(member.size)))
    (tmp_path / "x.tar.gz").write_bytes(stream.getvalue())
    tracemalloc.start()
    opened = Archive.open(tmp_path / "x.tar.gz")
    assert all(len(opened.read(i)) == 2_000_000 for i in range(len(opened)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6
