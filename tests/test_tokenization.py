"""`medmax tokenize` and `medmax decode` from the command line.

The golden codes go through the real encoder. Sharding, resuming and rejection are tested with an encoder that is
a function of the pixels alone and takes no time.
"""

import csv
import hashlib
import json
import os
import shutil
import tarfile
import time

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from medmax_fast import files, tokenization
from medmax_fast.cli import main
from medmax_fast.data.feed import load_ahead
from medmax_fast.data.images import load_image
from medmax_fast.decode import picture_names
from medmax_fast.runtime import InputError
from medmax_fast.vocab import IMAGE_CODES


class FakeTokenizer:
    """Codes drawn from a hash of the pixels; raises after `budget` images, as a killed process would stop."""

    sha256 = "fake"
    num_codes = 8192
    budget = None
    sizes: list[int] = []

    @classmethod
    def from_checkpoint(cls, *_):
        return cls()

    def encode(self, pixels):
        self.sizes.append(len(pixels))
        if FakeTokenizer.budget is not None:
            FakeTokenizer.budget -= len(pixels)
            if FakeTokenizer.budget < 0:
                raise KeyboardInterrupt
        return np.stack([fake_codes(image) for image in pixels])


def fake_codes(pixels: np.ndarray) -> np.ndarray:
    seed = int.from_bytes(hashlib.sha256(pixels.tobytes()).digest()[:8], "little")
    return np.random.default_rng(seed).integers(0, 8192, IMAGE_CODES)


@pytest.fixture()
def fake(monkeypatch):
    monkeypatch.setattr(tokenization, "ImageTokenizer", FakeTokenizer)
    monkeypatch.setattr(FakeTokenizer, "budget", None)
    monkeypatch.setattr(FakeTokenizer, "sizes", [])
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return FakeTokenizer


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with images/ (23 small pictures, three broken) and table.csv, which names them and a missing one."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "images").mkdir()
    draw = np.random.default_rng(1)
    for i in range(23):
        Image.fromarray(draw.integers(0, 256, (8, 9, 3), dtype=np.uint8)).save(folder / "images" / f"{i:02d}.png")
    (folder / "images" / "04.png").write_bytes(b"<html>gone</html>")
    (folder / "images" / "11.png").write_bytes((folder / "images" / "12.png").read_bytes()[:100])
    (folder / "images" / "19.png").write_bytes(b"")
    paths = [f"images/{i:02d}.png" for i in range(23)]
    paths[6] = str(folder / paths[6])
    with open(folder / "table.csv", "w", newline="") as file:
        csv.writer(file).writerows([["id", "img_path"], *([i, p] for i, p in enumerate([*paths, "images/99.png"]))])
    return folder


def tokenize(source, output, *flags, ckpt="no-checkpoint"):
    flags = ("--rows-per-shard", "5", "--batch-size", "2", *flags)
    return main(["tokenize", "--input", str(source), "--ckpt", str(ckpt), "--output", str(output), *flags])


def read_table(folder) -> list[tuple[str, list[int]]]:
    tables = [parquet.read_table(path) for path in sorted(folder.glob("*.parquet"))]
    for table in tables:
        assert table.schema.field("img_tokens").type == pyarrow.list_(pyarrow.uint16())
    return [(row["img_path"], row["img_tokens"]) for table in tables for row in table.to_pylist()]


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def hashes(folder) -> dict[str, str]:
    files = [*folder.glob("*.parquet"), folder / "rejected.jsonl"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("decoder", ["pillow", "dali"])
def test_golden_codes(golden, tmp_path, capsys, decoder, device):
    if decoder == "dali":
        pytest.importorskip("nvidia.nvimgcodec", reason="needs the extra [dali]")
    expected = json.loads((golden / "image_codes.json").read_text())
    with open(tmp_path / "table.csv", "w") as file:
        file.write("image_path\n" + "".join(f"{golden}/images/{name}\n" for name in expected))
    flags = ("--decoder", decoder, "--device", device, "--precision", "fp32")
    assert tokenize(tmp_path / "table.csv", tmp_path / "codes", *flags, ckpt=golden / "checkpoint") == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["images"], summary["encoded"], summary["rejected"], summary["shards"]) == (21, 21, 0, 5)
    rows = read_table(tmp_path / "codes")
    assert [path for path, _ in rows] == [f"{golden}/images/{name}" for name in expected]
    for (path, codes), answer in zip(rows, expected.values(), strict=True):
        # A GPU's order of summation has near ties of its own; that they are no more than that is in test_vqgan.py.
        allowed = answer["near_ties"] + (device == "cuda")
        assert np.count_nonzero(np.array(codes) != answer["codes"]) <= allowed, path


def test_golden_codes_with_alpha_dropped(golden, tmp_path):
    expected = json.loads((golden / "image_codes.json").read_text())
    rows = [{"pic": f"{golden}/images/{name}"} for name in ("alpha.png", "gray_alpha.png")]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    flags = ("--alpha", "drop", "--image-key", "pic")
    assert tokenize(tmp_path / "t.parquet", tmp_path / "codes", *flags, ckpt=golden / "checkpoint") == 0
    for path, codes in read_table(tmp_path / "codes"):
        answer = expected[os.path.basename(path)]
        assert np.count_nonzero(np.array(codes) != answer["codes_alpha_dropped"]) <= answer["near_ties"]
        assert np.count_nonzero(np.array(codes) != answer["codes"]) > 100


def check_pictures_table(pictures, codes):
    """The table of `pictures` as it must come out of table.csv."""
    paths = [row[1] for row in csv.reader((pictures / "table.csv").read_text().splitlines())][1:]
    bad = {4: "an HTML or XML page", 11: "broken image", 19: "empty file", 23: "no such file"}
    rows = read_table(codes)
    assert [path for path, _ in rows] == [path for i, path in enumerate(paths) if i not in bad]
    for path, found in rows:
        assert found == fake_codes(load_image(pictures / path)).tolist()
    rejected = read_lines(codes / "rejected.jsonl")
    assert [(entry["row"], entry["img_path"]) for entry in rejected] == [(i, paths[i]) for i in bad]
    for entry in rejected:
        assert entry["reason"].startswith(bad[entry["row"]])
        file = pictures / entry["img_path"]
        digest = hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
        assert entry["sha256"] == digest
    manifest = json.loads((codes / "manifest.json").read_text())
    assert manifest["images"] == 20 and manifest["rejected"] == 4 and len(manifest["shards"]) == 5
    for shard in manifest["shards"]:
        assert hashlib.sha256((codes / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]


def test_bad_images_are_rejected_by_name_and_good_ones_kept(fake, pictures, tmp_path, capsys):
    assert tokenize(pictures / "table.csv", tmp_path / "codes") == 3
    out, err = capsys.readouterr()
    assert "4 inputs rejected" in err
    assert json.loads(out.splitlines()[-1])["rejected"] == 4
    check_pictures_table(pictures, tmp_path / "codes")
    # Running again with a higher limit finds everything done.
    before = hashes(tmp_path / "codes")
    fake.sizes.clear()
    assert tokenize(pictures / "table.csv", tmp_path / "codes", "--max-rejected", "4") == 0
    assert fake.sizes == [] and hashes(tmp_path / "codes") == before


def test_stopping_anywhere_and_going_on_with_other_processes(fake, pictures, tmp_path, monkeypatch):
    assert tokenize(pictures / "table.csv", tmp_path / "whole") == 3
    for stop in range(0, 21, 2):
        folder = tmp_path / f"stopped-{stop}"
        fake.budget = stop
        assert tokenize(pictures / "table.csv", folder) == (130 if stop < 20 else 3)
        done = len(list(folder.glob("codes-*.parquet")))
        assert (folder / "manifest.json").exists() == (done == 5)
        assert not [p for p in folder.rglob("*") if p.name.endswith(".tmp")]
        fake.budget = None
        for rank in (2, 0, 1):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", "3")
            assert tokenize(pictures / "table.csv", folder) in (0, 3)
        assert hashes(folder) == hashes(tmp_path / "whole")
        monkeypatch.delenv("RANK")
        monkeypatch.delenv("WORLD_SIZE")
    check_pictures_table(pictures, folder)


def test_a_codes_file_without_its_record_is_made_again(fake, pictures, tmp_path):
    assert tokenize(pictures / "table.csv", tmp_path / "codes") == 3
    before = hashes(tmp_path / "codes")
    (tmp_path / "codes" / "shards" / "00002.json").unlink()
    (tmp_path / "codes" / "codes-00002.parquet").write_bytes(b"half")
    fake.sizes.clear()
    assert tokenize(pictures / "table.csv", tmp_path / "codes") == 3
    assert sum(fake.sizes) == 4 and hashes(tmp_path / "codes") == before


def test_any_process_can_do_all_of_it(fake, pictures, tmp_path, monkeypatch, capsys):
    # A rank whose companions never came does their shards too, and leaves the judgement to rank 0 under torchrun.
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert tokenize(pictures / "table.csv", tmp_path / "codes") == 0
    assert capsys.readouterr().out == ""
    check_pictures_table(pictures, tmp_path / "codes")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert tokenize(pictures / "table.csv", tmp_path / "codes") == 3


def test_two_ranks_making_the_folder_at_once(tmp_path, monkeypatch):
    def other_rank_was_faster(folder):
        monkeypatch.undo()
        open_output(folder, "tokenize", {"alpha": "drop"})
        require_new(folder)

    require_new, open_output = files.require_new, files.open_output
    for settings, message in ({"alpha": "drop"}, None), ({"alpha": "whiten"}, "made with alpha = 'drop'"):
        folder = tmp_path / settings["alpha"]
        monkeypatch.setattr(files, "require_new", other_rank_was_faster)
        if message:
            with pytest.raises(InputError, match=message):
                open_output(folder, "tokenize", settings)
        else:
            assert open_output(folder, "tokenize", settings) == folder


def test_a_folder_of_images(fake, pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(pictures)
    assert tokenize("images", tmp_path / "codes", "--max-rejected", "3") == 0
    rows = read_table(tmp_path / "codes")
    assert len(rows) == 20 and rows[0][0] == "images/00.png"
    assert rows[0][1] == fake_codes(load_image("images/00.png")).tolist()
    assert json.loads((tmp_path / "codes" / "manifest.json").read_text())["base"] == str(pictures)


def test_lists_of_paths_in_rows(fake, pictures, tmp_path):
    rows = [{"image_path": [str(pictures / "images/00.png"), str(pictures / "images/01.png")]}, {"image_path": None}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert tokenize(tmp_path / "rows.jsonl", tmp_path / "codes", "--max-rejected", "1") == 0
    assert [path for path, _ in read_table(tmp_path / "codes")] == rows[0]["image_path"]
    entry = {"img_path": "", "reason": "empty path", "row": 2, "sha256": None}
    assert read_lines(tmp_path / "codes" / "rejected.jsonl") == [entry]


def test_batches_never_cross_a_shard(fake, pictures, tmp_path):
    assert tokenize(pictures / "table.csv", tmp_path / "codes", "--rows-per-shard", "7", "--batch-size", "4") == 3
    assert fake.sizes == [4, 2, 4, 2, 4, 2, 2]


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "tar.gz.aa"])
@pytest.mark.parametrize("table", [True, False], ids=["table", "alone"])
def test_images_in_an_archive(fake, pictures, tmp_path, kind, table):
    archive = tmp_path / f"images.{kind.removesuffix('.aa')}"
    with tarfile.open(archive, "w:gz" if "gz" in kind else "w") as tar:
        tar.add(pictures / "images", "./images")
    if kind.endswith(".aa"):
        whole = archive.read_bytes()
        archive.unlink()
        for name, part in (("aa", whole[:1000]), ("ab", whole[1000:3000]), ("ac", whole[3000:])):
            (tmp_path / f"images.tar.gz.{name}").write_bytes(part)
        archive = tmp_path / "images.tar.gz.aa"
    source, flags = (pictures / "table.csv", ("--archive", str(archive))) if table else (archive, ())
    assert tokenize(source, tmp_path / "codes", "--max-rejected", "5", *flags) == 0
    rows = dict(read_table(tmp_path / "codes"))
    # One row of the table has an absolute path, which names no member.
    assert len(rows) == (19 if table else 20)
    for path, codes in rows.items():
        assert codes == fake_codes(load_image(pictures / path)).tolist()
    reasons = {entry["img_path"]: entry["reason"] for entry in read_lines(tmp_path / "codes" / "rejected.jsonl")}
    assert reasons.get("images/99.png") == ("not in the archive" if table else None)
    assert len(reasons) == (5 if table else 3)
    # The listing is kept, hidden, and is no table of codes.
    assert (tmp_path / "codes" / ".archive-index").is_file()
    assert tokenize(source, tmp_path / "codes", "--max-rejected", "5", *flags) == 0


@pytest.mark.parametrize("limit, status", [("3", 3), ("4", 0), ("16%", 3), ("17%", 0), ("16.7 %", 0)])
def test_a_limit_is_a_count_or_a_share(fake, pictures, tmp_path, limit, status):
    # 4 of 24 images, 16.67 %.
    assert tokenize(pictures / "table.csv", tmp_path / "codes", "--max-rejected", limit) == status


def test_odd_pixels_are_counted(fake, tmp_path, capsys):
    Image.fromarray(np.full((9, 9), 4000, np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGBA", (9, 9), (1, 2, 3, 4)).save(tmp_path / "alpha.png")
    for policy, level in ("pillow", 255), ("scale", 16), ("window", 0):
        assert tokenize(tmp_path, tmp_path / policy, "--depth16", policy) == 0
        summary = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert summary["depth16_images"] == summary["alpha_images"] == 1
        pixels = np.full((512, 512, 3), level, np.uint8)
        assert read_table(tmp_path / policy)[1][1] == fake_codes(pixels).tolist()
        for name in ("deep.png", "alpha.png"):
            assert (tmp_path / name).exists()


def test_shares_of_time(fake, pictures, tmp_path, capsys):
    assert tokenize(pictures / "table.csv", tmp_path / "codes", "--max-rejected", "4") == 0
    out = capsys.readouterr().out
    summary = json.loads(out.splitlines()[-1])
    manifest = json.loads((tmp_path / "codes" / "manifest.json").read_text())
    assert summary["stages"] == manifest["stages"]
    assert [row["stage"] for row in summary["stages"]] == ["read", "decode", "preprocess", "encode", "write"]
    assert sum(row["share"] for row in summary["stages"]) == pytest.approx(1, abs=1e-3)
    assert summary["images_here"] == 24 and summary["images_per_second"] > 0
    speed = manifest["images_per_process_second"]
    assert speed == summary["images_per_process_second"] == pytest.approx(24 / manifest["seconds"]["total"], rel=0.1)
    assert all(manifest["seconds"][stage] > 0 for stage in ("read", "decode", "encode", "write", "total"))


def test_what_is_not_exact_is_compared_with_what_is(golden, tmp_path, capsys):
    path = golden / "images" / "tiny.png"
    (tmp_path / "table.csv").write_text(f"img_path\n{path}\n")
    flags = ("--precision", "bf16")
    assert tokenize(tmp_path / "table.csv", tmp_path / "codes", *flags, ckpt=golden / "checkpoint") == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["compared_images"], summary["pixels_differing"]) == (1, 0)
    expected = json.loads((golden / "image_codes.json").read_text())["tiny.png"]["codes"]
    found = np.array(read_table(tmp_path / "codes")[0][1])
    assert summary["codes_differing"] == np.mean(found != expected) > 0
    manifest = json.loads((tmp_path / "codes" / "manifest.json").read_text())
    assert manifest["codes_differing"] == summary["codes_differing"]


def test_nvjpeg_needs_a_gpu(fake, pictures, tmp_path, capsys):
    assert tokenize(pictures / "table.csv", tmp_path / "codes", "--fast") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--fast: nvJPEG decodes on a GPU" in line and not (tmp_path / "codes").exists()
    assert tokenize(pictures / "table.csv", tmp_path / "codes", "--exact") == 3


def bad_table(folder, name):
    path = folder / name
    content = {
        "empty.csv": "",
        "header.csv": "img_path\n",
        "column.csv": "file,label\na.png,1\n",
        "broken.jsonl": '{"img_path": "a.png"}\n{"img_path": \n',
        "number.jsonl": '{"img_path": "a.png"}\n{"img_path": 3}\n',
        "corrupt.parquet": "PAR1 and then nothing",
        "table.xlsx": "?",
    }.get(name)
    if content is not None:
        path.write_text(content)
    elif name == "folder":
        path.mkdir()
    elif name == "integers.parquet":
        parquet.write_table(pyarrow.table({"img_path": [1, 2]}), path)
    return path


BAD_INPUTS = {
    "gone.csv": "no such file",
    "empty.csv": "empty file, expected a header line",
    "header.csv": "no rows",
    "column.csv": "no column 'img_path' or 'image_path', found file, label",
    "broken.jsonl": "line 2: not valid JSON",
    "number.jsonl": "line 2: img_path is int 3",
    "corrupt.parquet": "not a Parquet file",
    "integers.parquet": "row 0: img_path is int 1",
    "table.xlsx": "unknown kind of table",
    "folder": "no image files in this folder",
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_inputs(fake, tmp_path, capsys, name):
    path = bad_table(tmp_path, name)
    assert tokenize(path, tmp_path / "codes") == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and str(path) in err and BAD_INPUTS[name] in err
    assert not (tmp_path / "codes").exists()


@pytest.mark.parametrize("flag", ["--batch-size", "--rows-per-shard", "--workers", "--max-rejected", "--image-key"])
def test_bad_flags(fake, pictures, tmp_path, capsys, flag):
    assert tokenize(pictures / "table.csv", tmp_path / "codes", flag, "-1") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert flag in line and not (tmp_path / "codes").exists()


def test_bad_checkpoints(golden, golden_checkpoint, pictures, tmp_path, capsys):
    vqgan = golden_checkpoint / "tokenizer" / "vqgan.ckpt"
    vqgan.write_bytes(vqgan.read_bytes()[:-100])
    for ckpt, message in {tmp_path / "gone": "no such folder", golden_checkpoint: "md5"}.items():
        assert tokenize(pictures / "table.csv", tmp_path / "codes", ckpt=ckpt) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line and not (tmp_path / "codes").exists()


def test_a_folder_made_with_other_settings_is_refused(fake, pictures, tmp_path, capsys):
    assert tokenize(pictures / "table.csv", tmp_path / "codes") == 3
    before = hashes(tmp_path / "codes")
    (tmp_path / "other.csv").write_text("image_path\na.png\n")
    capsys.readouterr()
    for source, flags, name in [
        (pictures / "table.csv", ("--alpha", "drop"), "alpha"),
        (pictures / "table.csv", ("--rows-per-shard", "6"), "rows_per_shard"),
        (pictures / "table.csv", ("--precision", "tf32"), "precision"),
        (pictures / "table.csv", ("--depth16", "scale"), "depth16"),
        (tmp_path / "other.csv", (), "image_key"),
        (pictures / "images", (), "image_key"),
    ]:
        assert tokenize(source, tmp_path / "codes", *flags) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"made with {name} = " in line
    assert hashes(tmp_path / "codes") == before


def test_load_ahead_keeps_order_and_a_bounded_number_under_way():
    started, finished, most = 0, 0, 0

    def load(task):
        time.sleep(0.002 * (task % 3))
        return task * 10

    def tasks():
        nonlocal started
        for task in range(60):
            started += 1
            yield task

    results = load_ahead(tasks(), load, workers=4, ahead=7)
    assert started == 0
    for expected, (task, value, _) in enumerate(results):
        most = max(most, started - finished)
        finished += 1
        assert (task, value) == (expected, expected * 10)
    assert finished == 60 and most == 7


def test_picture_names():
    paths = ["a/x.png", "b/x.jpg", "x-1.bmp", "X.gif", "\u00e9" * 150 + ".png", "dir/.png", ""]
    names = picture_names(paths)
    assert names[:4] == ["x.png", "x-1.png", "x-1-1.png", "X-2.png"]
    assert len({name.lower() for name in names}) == len(names) and all(len(n.encode()) < 220 for n in names)
    assert all("/" not in name and name.endswith(".png") for name in names)


def one_code_table(golden, folder):
    answer = json.loads((golden / "image_codes.json").read_text())["ihc.png"]
    folder.mkdir()
    rows = [{"img_path": "some/where/ihc.png", "img_tokens": answer["codes"]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "codes.parquet")
    return folder


def test_golden_reconstruction(golden, tmp_path, capsys):
    source = one_code_table(golden, tmp_path / "codes")
    command = ["decode", "--input", str(source), "--ckpt", str(golden / "checkpoint"), "--output"]
    assert main([*command, str(tmp_path / "out")]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["pictures"] == 1 and summary["reconstructions"] is None
    found = np.asarray(Image.open(tmp_path / "out" / "ihc.png")).astype(int)
    expected = np.asarray(Image.open(golden / "reconstruction.png").convert("RGB")).astype(int)
    assert found.shape == (512, 512, 3) and abs(found - expected).max() <= 1
    index = [{"img_path": "some/where/ihc.png", "file": "ihc.png", "row": 0}]
    assert read_lines(tmp_path / "out" / "index.jsonl") == index
    assert sorted(os.listdir(tmp_path / "out")) == ["ihc.png", "index.jsonl", "settings.json"]
    # What is there is not drawn again.
    assert main([*command, str(tmp_path / "out")]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["drawn_now"] == 0


def test_bad_codes_draw_nothing(golden, tmp_path, capsys):
    source = one_code_table(golden, tmp_path / "codes")
    ckpt = str(golden / "checkpoint")
    for content, message in {
        "short": "row 0: an image of 5 codes, expected 1024",
        "large": "row 0: image code 9000, expected 0..8191",
        "broken": "not a Parquet file",
        "gone": "no such file or folder",
    }.items():
        codes = [1] * 5 if content == "short" else [9000] * 1024
        parquet.write_table(pyarrow.table({"img_path": ["a"], "img_tokens": [codes]}), source / "more.parquet")
        if content == "broken":
            (source / "more.parquet").write_text("no Parquet")
        if content == "gone":
            shutil.rmtree(source)
        assert main(["decode", "--input", str(source), "--ckpt", ckpt, "--output", str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line and not (tmp_path / "out").exists()
