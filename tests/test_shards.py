"""Checkpoints of several files: four Chameleon shards as Chameleon-30B ships, safetensors files with an index."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from medmax_fast.cli import main
from medmax_fast.files import hash_file
from medmax_fast.model import convert
from medmax_fast.model.checkpoint import open_checkpoint
from medmax_fast.model.convert import write_checkpoint
from medmax_fast.model.init import RandomCheckpoint
from medmax_fast.model.layout import ModelShape
from medmax_fast.model.load import load_model

SHAPE = ModelShape(dim=128, layers=2, heads=8, kv_heads=4, hidden=352, vocab_size=0, swin_norm=True)
SHARDS = [f"consolidated.{i:02d}.pth" for i in range(4)]
INDEX = "model.safetensors.index.json"
# One vector in every shard: the norms of the residual stream. Those of queries and keys are each shard's own.
COPIED = re.compile(r"norm\.weight|layers\.\d+\.(attention|ffn)_norm\.weight")


def rewrite(folder, shard, change):
    """Change one shard's tensors, and drop the checksums that would notice first."""
    path = folder / "models" / "30b" / SHARDS[shard]
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    (path.parent / "checklist.chk").unlink(missing_ok=True)


def random_values(shard):
    """Every tensor anew, of a size at which each of them tells in the logits."""
    own, shared = torch.Generator().manual_seed(shard), torch.Generator().manual_seed(99)

    def change(state):
        for name, tensor in state.items():
            if tensor is not None:
                vector, generator = tensor.dim() == 1, shared if COPIED.fullmatch(name) else own
                tensor.normal_(1.0 if name.endswith("weight") and vector else 0.0, 0.2, generator=generator)

    return change


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """A random checkpoint in four shards, each with query and key norms of its own."""
    folder = tmp_path_factory.mktemp("four")
    source = RandomCheckpoint(folder, SHAPE, torch.Generator().manual_seed(0), torch.bfloat16)
    write_checkpoint(source, folder / "four", "chameleon", shards=4)
    for i in range(4):
        rewrite(folder / "four", i, random_values(i))
    return folder / "four"


@pytest.fixture(scope="module")
def hf(four):
    assert run(four, four.with_name("hf"), "hf") == 0
    return four.with_name("hf")


@pytest.fixture()
def copy(tmp_path):
    """Of a folder, to be damaged."""
    return lambda folder: shutil.copytree(folder, tmp_path / "copy")


def run(source, output, to, *more):
    return main(["convert", "--input", str(source), "--output", str(output), "--to", to, *more])


def error_of(capsys, status):
    """The one line of a command that was refused."""
    assert status == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def logits(model, ids):
    with torch.no_grad():
        return model.lm_head(model.model(input_ids=ids, use_cache=False).last_hidden_state)


def test_four_shards_come_back_by_themselves(four, hf, tmp_path):
    assert run(hf, tmp_path / "back", "chameleon") == 0
    folder = tmp_path / "back" / "models" / "30b"
    assert sorted(p.name for p in folder.glob("*.pth")) == SHARDS
    for name in SHARDS:
        assert hash_file(folder / name) == hash_file(four / "models" / "30b" / name), name
    for name in ("params.json", "consolidate_params.json"):
        assert json.loads((folder / name).read_text())["model_parallel_size"] == 4
    listed = (folder / "checklist.chk").read_text()
    assert all(f"{hash_file(folder / name, 'md5')}  {name}\n" in listed for name in SHARDS)


@pytest.mark.parametrize("said", [{}, {"model_parallel_size": 1}])
def test_the_files_count_and_not_what_params_say(copy, four, tmp_path, said):
    folder = copy(four)
    path = folder / "models" / "30b" / "params.json"
    path.write_text(json.dumps({"model": json.loads(path.read_text())["model"]} | said))
    assert run(folder, tmp_path / "again", "chameleon") == 0
    again = tmp_path / "again" / "models" / "30b"
    assert [hash_file(again / n) for n in SHARDS] == [hash_file(path.with_name(n)) for n in SHARDS]
    assert json.loads((again / "params.json").read_text())["model_parallel_size"] == 4


def test_all_ways_give_the_same_logits(four, hf):
    from transformers import ChameleonForConditionalGeneration

    ids = torch.randint(8712, 9312, (2, 30), generator=torch.Generator().manual_seed(0))
    expected = logits(load_model(four), ids)
    assert expected.std() > 0.1 and expected.shape[-1] == 9312
    assert torch.equal(logits(load_model(hf), ids), expected)
    stock = ChameleonForConditionalGeneration.from_pretrained(hf, dtype=torch.float32).eval()
    with torch.no_grad():
        found = stock(input_ids=ids).logits
    # transformers masks the image ids.
    torch.testing.assert_close(found[..., 8196:], expected[..., 8196:], rtol=0, atol=2e-5 * expected.abs().max())


def test_fewer_shards_need_heads_that_agree(four, tmp_path, capsys):
    heads = {
        name: torch.stack([torch.load(four / "models" / "30b" / s, weights_only=True)[name].float() for s in SHARDS])
        for name in torch.load(four / "models" / "30b" / SHARDS[0], weights_only=True)
        if "normalization" in name
    }
    # Two shards hold two of the four groups each.
    apart = max((h[0::2] - h[1::2]).abs().max().item() for h in heads.values())
    error = error_of(capsys, run(four, tmp_path / "two", "chameleon", "--shards", "2"))
    assert f"heads of {len(heads)} query/key norms differ, by up to {apart:.3g} in model.layers." in error
    assert "agree in 4 groups" in error and "--shards 4" in error
    apart = max((h.amax(0) - h.amin(0)).max().item() for h in heads.values())
    error = error_of(capsys, run(four, tmp_path / "one", "chameleon", "--shards", "1"))
    assert f"by up to {apart:.3g} in" in error and "agree in 4 groups" in error and "--shards 4" in error
    error = error_of(capsys, run(four, tmp_path / "three", "chameleon", "--shards", "3"))
    assert "8 heads and 4 key/value heads cannot be cut into 3 equal shards" in error
    assert "--shards 4: only with --to chameleon" in error_of(capsys, run(four, tmp_path / "x", "hf", "--shards", "4"))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("shards", [1, 2])
def test_fewer_shards_of_heads_that_agree(four, copy, tmp_path, shards):
    """Groups that agree are joined, and cut into four again the files are the first ones."""
    folder = copy(four)
    states = [torch.load(four / "models" / "30b" / s, weights_only=True) for s in SHARDS]
    for i in range(4):
        first = states[i - i % (4 // shards)]
        rewrite(folder, i, lambda s, first=first: s.update({n: first[n] for n in first if "normalization" in n}))
    assert run(folder, tmp_path / "fewer", "chameleon", "--shards", str(shards)) == 0
    files = sorted(p.name for p in (tmp_path / "fewer" / "models").glob("*/*.pth"))
    assert files == (["consolidated.pth"] if shards == 1 else SHARDS[:2])
    assert open_checkpoint(tmp_path / "fewer").sha256() == open_checkpoint(folder).sha256()
    assert run(tmp_path / "fewer", tmp_path / "again", "chameleon", "--shards", "4") == 0
    for name in SHARDS:
        again = torch.load(tmp_path / "again" / "models" / "30b" / name, weights_only=True)
        before = torch.load(folder / "models" / "30b" / name, weights_only=True)
        assert list(again) == list(before)
        assert all(again[n] is before[n] is None or torch.equal(again[n], before[n]) for n in before)


def test_folder_of_others_says_how_many_shards(four, hf, copy, tmp_path, capsys):
    folder = copy(hf)
    (folder / "params.json").unlink()
    error = error_of(capsys, run(folder, tmp_path / "back", "chameleon"))
    assert "agree in 4 groups" in error and "--shards 4" in error
    assert run(folder, tmp_path / "back", "chameleon", "--shards", "4") == 0
    for name in SHARDS:
        assert hash_file(tmp_path / "back" / "models" / "30b" / name) == hash_file(four / "models" / "30b" / name)


def test_norms_of_shards_may_differ_by_rounding(four, copy, tmp_path, capsys):
    folder, name = copy(four), "layers.1.ffn_norm.weight"
    before = torch.load(folder / "models" / "30b" / SHARDS[0], weights_only=True)[name]
    rewrite(folder, 2, lambda s: s[name].view(torch.int16)[5:6].add_(1))
    loaded = open_checkpoint(folder).tensor("model.layers.1.post_attention_layernorm.weight")
    # Of three and one, the mean rounds to the three.
    assert torch.equal(loaded, before)
    rewrite(folder, 2, lambda s: s[name][7:8].add_(0.25))
    apart = (torch.load(folder / "models" / "30b" / SHARDS[2], weights_only=True)[name].float() - before.float()).max()
    assert 0.2 < apart < 0.3
    error = error_of(capsys, run(folder, tmp_path / "out", "hf"))
    assert name in error and f"differ by up to {apart:.3g}" in error and "models/30b" in error


DAMAGE = {
    "missing": (lambda s: s.pop("layers.1.attention.wo.weight"), "layers.1.attention.wo.weight is missing"),
    "unexpected": (lambda s: s.update(extra=torch.ones(1)), "extra is unexpected"),
    "shape": (
        lambda s: s.update({"output.weight": torch.ones(2, 3)}),
        r"output.weight has shape \(2, 3\), .*\(2328, 128",
    ),
    "dtype": (lambda s: s.update({"norm.weight": s["norm.weight"].float()}), "norm.weight has dtype torch.float32"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_shard_is_named(four, copy, tmp_path, capsys, kind):
    change, message = DAMAGE[kind]
    folder = copy(four)
    rewrite(folder, 2, change)
    error = error_of(capsys, run(folder, tmp_path / "out", "hf"))
    assert re.search(rf"{SHARDS[2]}: tensor {message}", error), error
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def indexed(four, hf):
    """The Hugging Face folder in many files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "SHARD_BYTES", 1_000_000)
        assert run(four, four.with_name("indexed"), "hf") == 0
    return four.with_name("indexed")


def test_index_of_several_files(hf, indexed, tmp_path):
    from transformers import ChameleonForConditionalGeneration

    files = sorted(p.name for p in indexed.glob("model-*.safetensors"))
    assert len(files) > 4 and files[-1] == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    assert not (indexed / "model.safetensors").exists()
    whole, parts = load_file(hf / "model.safetensors"), {name: load_file(indexed / name) for name in files}
    index = json.loads((indexed / INDEX).read_text())
    assert index["weight_map"] == {name: file for file, part in parts.items() for name in part}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    for name, file in index["weight_map"].items():
        assert torch.equal(parts[file][name], whole.pop(name)), name
    assert not whole
    # Only a tensor larger than that has a file beyond the limit.
    assert all(len(p) == 1 or sum(t.nbytes for t in p.values()) <= 1_000_000 for p in parts.values())
    assert open_checkpoint(indexed).sha256() == open_checkpoint(hf).sha256()
    many, one = (ChameleonForConditionalGeneration.from_pretrained(f).state_dict() for f in (indexed, hf))
    assert many.keys() == one.keys() and all(torch.equal(many[name], one[name]) for name in one)
    assert run(indexed, tmp_path / "back", "chameleon") == 0


def file_of(folder, number):
    return sorted(folder.glob("model-*"))[number - 1]


def misplace(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = file_of(folder, 1).name
    (folder / INDEX).write_text(json.dumps(index))


def add_unlisted(folder):
    save_file(load_file(file_of(folder, 3)) | {"extra": torch.ones(2)}, file_of(folder, 3))


INDEX_DAMAGE = {
    "wrong file": (misplace, r"model-00001-of-\d+.safetensors: tensor lm_head.weight is missing, .*index.json says"),
    "file gone": (lambda f: file_of(f, 2).unlink(), r"model-00002-of-\d+.safetensors: no such file"),
    "unlisted": (add_unlisted, r"model-00003-of-\d+.safetensors: tensor extra, which .*index.json does not list there"),
    "empty": (lambda f: (f / INDEX).write_text('{"weight_map": {}}'), "tensor model.embed_tokens.weight is missing"),
    "no map": (lambda f: (f / INDEX).write_text("{}"), f"{INDEX}: no entry 'weight_map'"),
}


@pytest.mark.parametrize("kind", INDEX_DAMAGE)
def test_damaged_index_is_named(indexed, copy, capsys, kind):
    damage, message = INDEX_DAMAGE[kind]
    folder = copy(indexed)
    damage(folder)
    assert re.search(message, error_of(capsys, main(["inspect", str(folder)])))


def test_checksums_cover_the_files_of_an_index(indexed, copy, capsys):
    folder = copy(indexed)
    file = file_of(folder, 4)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert f"{file}: md5" in error_of(capsys, main(["inspect", str(folder)]))
    file.unlink()
    assert f"{file}: " in error_of(capsys, main(["inspect", str(folder)]))
