"""Messages that the other tests do not produce, each with what brings it about."""

import errno
import re
import shutil
import subprocess
import sys
import tarfile
from subprocess import PIPE
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pyarrow
import pytest
import torch
import torchmetrics.image.fid
from error_sites import ROOT
from pyarrow import parquet
from safetensors.torch import save_file

from medmax_fast.config import BuildConfig, ReportConfig, ScoreConfig, TokenizeConfig, TrainConfig
from medmax_fast.data import images
from medmax_fast.data.archive import Archive, find_parts
from medmax_fast.data.build import build
from medmax_fast.data.collate import collate_ref
from medmax_fast.data.image_list import read_image_list
from medmax_fast.data.journal import Journal
from medmax_fast.data.loader import PackedLoader
from medmax_fast.data.parts import Parts
from medmax_fast.data.rows import column_names, read_rows
from medmax_fast.data.sequences import open_tokenizer
from medmax_fast.data.store import TokenStore, write_store
from medmax_fast.data.summary import store_summary
from medmax_fast.eval.backends.hf_loading import _loading, check_processor
from medmax_fast.eval.distances import open_features
from medmax_fast.eval.questions import _hash_images
from medmax_fast.eval.servers.chat import ChatClient
from medmax_fast.eval.similarity import Encoder, open_encoder
from medmax_fast.model.checkpoint import open_checkpoint
from medmax_fast.model.files import SafetensorsFile, TorchFile
from medmax_fast.model.load import hf_config
from medmax_fast.model.merge import open_trained
from medmax_fast.report import report
from medmax_fast.runtime import InputError
from medmax_fast.score import score
from medmax_fast.tokenization import pick_decoders
from medmax_fast.train import _check_store
from medmax_fast.training.engine import load_engine
from medmax_fast.training.folder import RunFolder
from medmax_fast.vocab import IdLayout


def rows_of(path, content: bytes) -> list[dict]:
    path.write_bytes(content)
    return [row for _, row in read_rows(path)]


def a_cell_that_holds_numbers(folder):
    (folder / "list.jsonl").write_text('{"img_path": [1]}\n')
    return read_image_list(folder / "list.jsonl")


def an_archive_without_images(folder):
    with tarfile.open(folder / "notes.tar", "w") as archive:
        archive.add(__file__, "notes.txt")
    return read_image_list(folder / "notes.tar")


def an_index_that_promises_too_much(folder):
    with tarfile.open(folder / "notes.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("notes.txt"))
    opened = Archive.open(folder / "notes.tar")
    opened.sizes[0] = 1 << 20
    return opened.read(0)


def a_part_without_the_first(folder):
    (folder / "images.tar.md").touch()
    return find_parts(folder / "images.tar.md")


def a_parquet_file_with_fewer_rows_than_it_says(folder):
    parquet.write_table(pyarrow.table({"text": ["a", "b"]}), folder / "rows.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet.ParquetFile, "iter_batches", lambda *_, **__: iter(()))
        return list(read_rows(folder / "rows.parquet"))


def a_picture_that_may_not_be_read(folder):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    (folder / "a.png").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "open", refuse, raising=False)
        return images.load_image(folder / "a.png")


def a_picture_of_two_gibibytes(folder):
    (folder / "a.png").write_bytes(bytes(100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "MAX_BYTES", 100)
        return images.load_image(folder / "a.png")


def a_checkpoint_that_is_a_file(folder):
    (folder / "ckpt").touch()
    return open_tokenizer(folder / "ckpt")


def a_journal_of_another_process(folder):
    (folder / "output").mkdir()
    code = f"""import sys; from medmax_fast.data.journal import Journal
with Journal({str(folder / "output")!r}, {{}}, "data"):
    print("mine", flush=True)
    sys.stdin.read()"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=PIPE, stdout=PIPE, text=True) as other:
        assert other.stdout.readline() == "mine\n"
        return Journal(folder / "output", {}, "data")


def nvjpeg_and_pillow(_):
    config = TokenizeConfig(input="a.csv", ckpt="ckpt", output="codes", fast=True, decoder="pillow")
    return pick_decoders(config, torch.device("cuda", 0))


def a_model_that_is_too_large(_):
    with _loading("llava"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 14.00 GiB.")


def an_inception_network_without_a_network(_):
    def fetch(**_):
        raise URLError("Name or service not known")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchmetrics.image.fid, "FrechetInceptionDistance", fetch)
        return open_features("inception", None, torch.device("cpu"))


def a_processor_of_texts_alone(_):
    return check_processor(SimpleNamespace(tokenizer=None), "llava")


def a_benchmark_of_something_else(folder):
    (folder / "benchmark.json").write_text("[]")
    return report(ReportConfig((str(folder),), str(folder / "report")))


def a_configuration_that_is_a_list(folder):
    (folder / "config.json").write_text("[]")
    return open_checkpoint(folder)


def pictures_and_texts_in_two_spaces(_):
    class Odd(Encoder):
        def _encode_images(self, batch):
            return torch.zeros(len(batch), 3)

        def _encode_texts(self, batch):
            return torch.zeros(len(batch), 2)

    return Odd(torch.nn.Identity(), torch.device("cpu"), {}).probe("odd")


def a_file_for_an_encoder(folder):
    (folder / "clip.bin").touch()
    return open_encoder(str(folder / "clip.bin"), torch.device("cpu"))


def a_record_that_is_damaged(folder):
    (folder / "metrics.jsonl").write_text('{"step": 1\n')
    return RunFolder(folder).records()


def a_summary_of_damaged_rows(folder):
    layout = IdLayout.from_file(ROOT / "tests" / "golden" / "checkpoint" / "tokenizer" / "text_tokenizer.json")
    store = write_store(folder / "store", layout, [(np.array([0, 9000, 2]), "a", "", "")])
    (folder / "store" / "rows.parquet").write_text("rows")
    return store_summary(store)


def a_picture_that_went_away(folder):
    return _hash_images([SimpleNamespace(path=folder / "gone.png")])


def a_rank_without_a_state(folder):
    # As DeepSpeed answers where the file of this rank is missing.
    engine = SimpleNamespace(load_checkpoint=lambda *_, **__: (None, {}))
    return load_engine(engine, folder / "step-2", adapter_only=True)


def a_proxy_that_needs_a_library(_):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALL_PROXY", "ftp://proxy.example")
        return ChatClient("https://api.example/v1", "model", cache=None)


def a_tensor_that_went_away(folder):
    save_file({"a": torch.ones(2)}, folder / "x.safetensors")
    file = SafetensorsFile(folder / "x.safetensors")
    file.release()
    save_file({"b": torch.ones(2)}, folder / "x.safetensors")
    return file.tensor("a")


def a_tensor_of_another_name(folder):
    save_file({"a": torch.ones(2)}, folder / "x.safetensors")
    return SafetensorsFile(folder / "x.safetensors").tensor("b")


def a_pickled_tensor_of_another_name(folder):
    torch.save({"a": torch.ones(2)}, folder / "x.pth")
    return TorchFile(folder / "x.pth").tensor("b")


def a_dict_without_the_state(folder):
    torch.save({"epoch": torch.ones(1)}, folder / "x.ckpt")
    return TorchFile(folder / "x.ckpt", "state_dict").tensor("a")


def a_run_instead_of_one_of_its_checkpoints(folder):
    (folder / "checkpoints" / "step-20").mkdir(parents=True)
    return open_trained(folder)


def a_run_of_a_whole_model(folder):
    (folder / "model").mkdir()
    return open_trained(folder)


def labels_without_a_policy(_):
    return collate_ref(np.ones(3, np.uint16), np.array([0, 3]), [0], 8710, labels="some")


def a_store_without_rows(_):
    ids, offsets = np.zeros(0, np.uint16), np.zeros(1, np.int64)
    store = SimpleNamespace(ids=ids, offsets=offsets, lengths=np.diff(offsets))
    return PackedLoader(store, pack_length=64, packs_per_step=1, seed=0, too_long="cut")


CONDITIONS = [
    (a_tensor_that_went_away, "x.safetensors: tensor a cannot be read ("),
    (a_tensor_of_another_name, "x.safetensors: tensor b is missing"),
    (a_pickled_tensor_of_another_name, "x.pth: tensor b is missing"),
    (lambda d: Parts([d / "x.tar.aa"]), "x.tar.aa: No such file or directory"),
    (a_dict_without_the_state, "x.ckpt: no state_dict, expected a dict of tensors under it"),
    (a_run_instead_of_one_of_its_checkpoints, "; one of its checkpoints will do, such as {}/checkpoints/step-20"),
    (a_run_of_a_whole_model, "{0}: a run that has trained a whole model, {0}/model; nothing is to be merged"),
    (labels_without_a_policy, "labels 'some': expected one of first-eot, per-turn, all"),
    (
        a_store_without_rows,
        "token store: no rows; expected at least one row of 1..64 ids or one that keeps part of its",
    ),
    (lambda d: rows_of(d / "a.jsonl", b"") or column_names(d / "a.jsonl"), "a.jsonl: empty file, expected one JSON"),
    (lambda d: rows_of(d / "a.csv", b"a" * 200_000 + b"\n"), "a.csv: line 1: not valid CSV (field larger than"),
    (lambda d: rows_of(d / "a.csv", b"text\n" + b"a\n" * 20_000 + b"\xff\n"), "not UTF-8 text ('utf-8' codec"),
    (
        a_parquet_file_with_fewer_rows_than_it_says,
        "rows.parquet: corrupt Parquet (2 rows fewer than its footer counts)",
    ),
    (lambda d: read_image_list(d / "a.tar", "path"), "--image-key path: {}/a.tar is an archive, expected a table"),
    (
        lambda d: read_image_list(d / "a.tar", archive="b.tar"),
        "--archive b.tar: {}/a.tar is an archive, expected a table",
    ),
    (lambda d: read_image_list(d, "path"), "--image-key path: {} is a folder, expected a table"),
    (lambda d: read_image_list(d, archive="b.tar"), "--archive b.tar: {} is a folder, expected a table"),
    (a_cell_that_holds_numbers, "list.jsonl: line 1: img_path is a list that holds something other than paths"),
    (an_archive_without_images, "notes.tar: no image files in this archive"),
    (an_index_that_promises_too_much, "notes.tar: 'notes.txt': 9728 bytes left, expected 1048576"),
    (a_part_without_the_first, "parts are missing before 'md'"),
    (a_picture_that_may_not_be_read, "a.png: not allowed to read it"),
    (a_picture_of_two_gibibytes, "a.png: 100 bytes or more, expected an image file"),
    (a_checkpoint_that_is_a_file, "ckpt: a file, expected the folder of a checkpoint"),
    (a_journal_of_another_process, "output: another process is writing this output; wait for it to end"),
    (nvjpeg_and_pillow, "--fast decodes with DALI: leave out --decoder pillow"),
    (a_model_that_is_too_large, "--model llava: does not fit the GPU's memory (CUDA out of memory."),
    (
        an_inception_network_without_a_network,
        "its weights cannot be fetched (<urlopen error Name or service not known>)",
    ),
    (a_processor_of_texts_alone, "--model llava: has a SimpleNamespace, expected a processor of images and text"),
    (a_benchmark_of_something_else, "benchmark.json: no JSON object; expected what `medmax bench` writes"),
    (a_configuration_that_is_a_list, "config.json: list, expected a JSON object"),
    (
        pictures_and_texts_in_two_spaces,
        "--clip odd: pictures become 3 numbers and texts 2, expected a dual encoder with one",
    ),
    (a_file_for_an_encoder, "clip.bin: a file, expected a folder or a name on the hub"),
    (a_record_that_is_damaged, "metrics.jsonl: a line is not valid JSON ("),
    (a_summary_of_damaged_rows, "rows.parquet: corrupt Parquet ("),
    (a_picture_that_went_away, "gone.png: cannot be read (No such file or directory)"),
    (a_rank_without_a_state, "step-2: no DeepSpeed state of this rank; delete the folder to use the one before"),
    (a_proxy_that_needs_a_library, "the proxy that the environment names cannot be used ("),
]


@pytest.mark.parametrize(("cause", "message"), CONDITIONS, ids=[message for _, message in CONDITIONS])
def test_conditions(cause, message, tmp_path):
    with pytest.raises(InputError, match=re.escape(message.format(tmp_path))):
        cause(tmp_path)


# Module that is missing, what needs it, the extra that brings it.
MISSING = [
    ("httpx", lambda: ChatClient("https://api.example/v1", "model", cache=None), "eval"),
    ("torchmetrics.image.fid", lambda: open_features("inception", None, torch.device("cpu")), "eval"),
]


@pytest.mark.parametrize(("module", "use", "extra"), MISSING, ids=[module for module, _, _ in MISSING])
def test_a_missing_library_names_its_extra(module, use, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"{module}.*: pip install 'medmax_fast\[{extra}\]'$"):
        use()


# ---- checkpoints ----


def two_models(folder):
    shutil.copytree(folder / "models" / "7b", folder / "models" / "30b")
    return open_checkpoint(folder)


def described_by(folder, name: str, content: str | bytes):
    path = next(folder.rglob(name))
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return open_checkpoint(folder)


def more_words_than_embeddings(folder):
    path = folder / "models" / "7b" / "params.json"
    path.write_text(path.read_text().replace('"vocab_size": 10212', '"vocab_size": 9000'))
    (path.parent / "checklist.chk").unlink()
    return hf_config(open_checkpoint(folder))


DAMAGED = [
    (two_models, "2 folders models/*/ with a params.json, expected one"),
    (lambda d: described_by(d, "vqgan.yaml", "model: [1"), "vqgan.yaml: not valid YAML ("),
    (lambda d: described_by(d, "vqgan.yaml", "text"), "vqgan.yaml: not a model description ("),
    (lambda d: described_by(d, "checklist.chk", b"\xff"), "checklist.chk: not UTF-8 text ("),
    (lambda d: described_by(d, "params.json", "[1]"), "params.json: not a model description ("),
    (more_words_than_embeddings, "the tokenizer has 10212 ids, the model 9000 embeddings"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGED, ids=[message for _, message in DAMAGED])
def test_damaged_checkpoints(damage, message, golden_checkpoint):
    with pytest.raises(InputError, match=re.escape(message)):
        damage(golden_checkpoint)


def test_a_store_with_more_ids_than_the_checkpoint(golden, golden_checkpoint, tmp_path):
    (golden_checkpoint / "tokenizer" / "checklist.chk").unlink()
    for path in (golden_checkpoint / "tokenizer").glob("*.json"):
        path.write_text(path.read_text().replace('"<s>": 0,', '"<s>": 0, "more": 10212,', 1))
    (tmp_path / "rows.jsonl").write_text('{"text": "Is it?<reserved08706>It is."}\n')
    build(BuildConfig(str(tmp_path / "rows.jsonl"), str(golden_checkpoint), str(tmp_path / "store")))
    with pytest.raises(InputError, match="store: its vocabulary has 10213 ids, the checkpoint's 10212"):
        score(ScoreConfig(str(golden / "checkpoint"), str(tmp_path / "store"), str(tmp_path / "scores.jsonl")))
    config = TrainConfig(str(tmp_path / "store"), str(golden_checkpoint), str(tmp_path / "run"))
    with pytest.raises(InputError, match="store: a vocabulary of 10213 ids, but .* has 10212 embeddings"):
        _check_store(TokenStore(config.data), config, open_checkpoint(config.ckpt))
