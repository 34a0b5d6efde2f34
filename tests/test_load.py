"""Loading and describing a checkpoint: damage is named in one line, files stay as they are, memory stays mapped."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import textwrap
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file

from medmax_fast.cli import main
from medmax_fast.files import hash_file
from medmax_fast.model.checkpoint import DECODER_FILE, VQ_PREFIX, open_checkpoint
from medmax_fast.model.load import load_model

LAYOUTS = ["chameleon", "hf"]
# Of one tensor in both layouts: in the order of the other, and copied as it is.
NAMES = {
    "chameleon": ("layers.1.attention.wk.weight", "layers.0.feed_forward.w1.weight"),
    "hf": ("model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.gate_proj.weight"),
}


@pytest.fixture(scope="module")
def folders(golden, tmp_path_factory):
    """The golden checkpoint in both layouts."""
    folder = tmp_path_factory.mktemp("load")
    assert main(["convert", "--input", str(golden / "checkpoint"), "--output", str(folder / "hf"), "--to", "hf"]) == 0
    return {"chameleon": golden / "checkpoint", "hf": folder / "hf"}


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return request.param


@pytest.fixture()
def copy(folders, layout, tmp_path):
    """A copy to be changed."""
    folder = shutil.copytree(folders[layout], tmp_path / "checkpoint", copy_function=shutil.copyfile)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


@pytest.fixture()
def checkpoint(copy):
    """A copy whose checksums do not notice the change first."""
    for path in list(copy.rglob("checklist.chk")):
        path.unlink()
    return copy


def weights_file(folder):
    single = folder / "model.safetensors"
    return single if single.exists() else folder / "models" / "7b" / "consolidated.pth"


def rewrite(folder, change):
    path = weights_file(folder)
    safe = path.suffix == ".safetensors"
    state = load_file(path) if safe else torch.load(path, weights_only=True)
    change(state)
    save_file(state, path, metadata={"format": "pt"}) if safe else torch.save(state, path)


def error_of(capsys, command):
    """The one line of a command that was refused."""
    assert main([str(part) for part in command]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def inspected(capsys, folder):
    assert main(["inspect", str(folder)]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def fill_last(value):
    def change(state, name):
        state[name].view(-1)[-1] = value

    return change


DAMAGE = {
    "nan": (fill_last(float("nan")), "holds NaN or infinity in torch.float32"),
    "inf": (fill_last(float("inf")), "holds NaN or infinity in torch.float32"),
    "minus inf": (fill_last(float("-inf")), "holds NaN or infinity in torch.float32"),
    "missing": (lambda state, name: state.pop(name), "is missing"),
    "shape": (lambda state, name: state.update({name: state[name][:-1].clone()}), "has shape"),
    "unexpected": (lambda state, name: state.update({f"{name}.more": torch.ones(2)}), "is unexpected"),
}


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_by_score(checkpoint, layout, tmp_path, capsys, kind, which):
    change, message = DAMAGE[kind]
    name = NAMES[layout][which]
    rewrite(checkpoint, lambda state: change(state, name))
    (tmp_path / "rows.jsonl").write_text('{"tokens": [0, 8710, 9000, 2]}\n')
    command = ["score", "--ckpt", checkpoint, "--input", tmp_path / "rows.jsonl", "--output", tmp_path / "o.jsonl"]
    error = error_of(capsys, command)
    # What is not finite shows when the tensor has its name in the model.
    shown = NAMES["hf"][which] if "NaN" in message else name
    assert re.search(rf"{re.escape(str(checkpoint))}.*: tensor {re.escape(shown)}(.more)? {message}", error), error
    assert not (tmp_path / "o.jsonl").exists()


def test_value_that_only_fp16_cannot_hold(checkpoint, layout):
    rewrite(checkpoint, lambda state: fill_last(1e6)(state, NAMES[layout][1]))
    assert load_model(checkpoint, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=f"{NAMES['hf'][1]} holds NaN or infinity in torch.float16"):
        load_model(checkpoint, dtype=torch.float16)


def test_frequencies_in_the_file_are_no_surprise(checkpoint):
    rewrite(checkpoint, lambda state: state.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    load_model(checkpoint)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_are_those_of_the_file(folders, layout, dtype):
    expected = {n: t for n, t in load_file(folders["hf"] / "model.safetensors").items() if not n.startswith(VQ_PREFIX)}
    # The golden file itself, whose rows of wk are interleaved: 0 2 4 .. 1 3 5 .. of each head.
    raw = torch.load(folders["chameleon"] / "models" / "7b" / "consolidated.pth", weights_only=True)
    order = [head * 16 + row for head in range(4) for row in [*range(0, 16, 2), *range(1, 16, 2)]]
    assert torch.equal(expected[NAMES["hf"][0]], raw[NAMES["chameleon"][0]][order])
    assert torch.equal(expected[NAMES["hf"][1]], raw[NAMES["chameleon"][1]])
    found = load_model(folders[layout], dtype=dtype).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == dtype and torch.equal(found[name], tensor.to(dtype)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_training_in_place_leaves_the_file(checkpoint, layout, dtype):
    if dtype == torch.float32:
        rewrite(checkpoint, lambda state: state.update({n: t.float() for n, t in state.items() if t is not None}))
    before = hash_file(weights_file(checkpoint))
    model = load_model(checkpoint, dtype=dtype).train()
    old = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    hidden = model.model(input_ids=torch.randint(8712, 10212, (1, 20)), use_cache=False).last_hidden_state
    torch.nn.functional.cross_entropy(model.lm_head(hidden)[0].float(), torch.randint(8712, 10212, (20,))).backward()
    # As an optimizer does, and every value of every tensor.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(parameter.grad.sign() + 0.5)
    assert all(not torch.equal(parameter, old[name]) for name, parameter in model.named_parameters())
    assert hash_file(weights_file(checkpoint)) == before
    again = load_model(checkpoint, dtype=dtype)
    assert all(torch.equal(parameter, old[name]) for name, parameter in again.named_parameters())


MEASURE = r"""
    import re, sys, torch
    from pathlib import Path
    from medmax_fast.model.convert import write_checkpoint
    from medmax_fast.model.init import RandomCheckpoint
    from medmax_fast.model.layout import ModelShape
    from medmax_fast.model.load import empty_model, load_model

    folder = Path(sys.argv[1])
    shape = ModelShape(dim=512, layers=6, heads=8, kv_heads=8, hidden=1408, vocab_size=0)
    source = RandomCheckpoint(folder, shape, torch.Generator().manual_seed(0), torch.float32)
    write_checkpoint(source, folder / "hf", "hf")
    # Imports and caches before the measurement.
    empty_model(source)

    def resident(kind):
        return 1024 * int(re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    before = resident("RssAnon")
    model = load_model(folder / "hf")
    mapped = resident("RssAnon")
    copies = [parameter.detach().clone() for parameter in model.parameters()]
    print(sum(p.nbytes for p in copies), mapped - before, resident("RssAnon") - mapped)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux says what is resident")
def test_same_dtype_stays_in_the_file(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEASURE), str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    size, loaded, copied = map(int, done.stdout.split())
    assert size > 90 << 20
    assert loaded < 0.1 * size
    # The measure sees copies, apart from what goes where something was before.
    assert copied > 0.6 * size


PARTS = {
    "embeddings": r"^model\.embed_tokens\.weight$",
    "attention": r"\.[qkvo]_proj\.weight$",
    "qk norms": r"\.[qk]_norm\.(weight|bias)$",
    "mlp": r"\.(gate|up|down)_proj\.weight$",
    "norms": r"layernorm\.weight$|^model\.norm\.weight$",
    "head": r"^lm_head\.weight$",
}


def test_inspect_says_the_same_of_both_layouts(folders, capsys):
    found = {name: inspected(capsys, folders[name]) for name in LAYOUTS}
    model = load_model(folders["hf"])
    assert found["hf"]["parameters"] == sum(p.numel() for p in model.parameters())
    counts = Counter()
    for name, parameter in model.named_parameters():
        counts[next(part for part, pattern in PARTS.items() if re.search(pattern, name))] += parameter.numel()
    vqgan = torch.load(folders["chameleon"] / "tokenizer" / "vqgan.ckpt", weights_only=True)["state_dict"]
    for layout, said in found.items():
        assert said["layout"] == layout and said["not_finite"] == "none" and said["dtype"] == "bfloat16"
        parts = {row["part"]: row for row in said["parts"]}
        assert {n: r["parameters"] for n, r in parts.items() if not n.startswith("vqgan")} == counts
        picture = [row["parameters"] for name, row in parts.items() if name.startswith("vqgan")]
        assert sum(picture) == sum(t.numel() for t in vqgan.values())
        assert said["sha256"] == open_checkpoint(folders[layout]).sha256()
        assert said["bytes"] == sum(p.stat().st_size for p in folders[layout].rglob("*") if p.is_file())
        for row in said["files"]:
            content = (folders[layout] / row["file"]).read_bytes()
            if row["file"].endswith(".safetensors"):
                content = content[8 + int.from_bytes(content[:8], "little") :]
            assert row["md5"] in ("not recorded", hashlib.md5(content).hexdigest()), row
        recorded = {row["file"] for row in said["files"] if row["md5"] != "not recorded"}
        assert {"model.safetensors", DECODER_FILE} == recorded or "models/7b/consolidated.pth" in recorded
    for said in found.values():
        said["parts"].sort(key=lambda row: row["part"])
    different = {name for name in found["hf"] if found["hf"][name] != found["chameleon"][name]}
    assert different == {"checkpoint", "layout", "bytes", "checked_files", "files"}
    assert re.fullmatch("[0-9a-f]{64}", found["hf"]["sha256"])


def test_inspect_names_what_is_not_finite(folders, checkpoint, layout, capsys):
    rewrite(checkpoint, lambda state: [fill_last(float("nan"))(state, name) for name in NAMES[layout]])
    found = inspected(capsys, checkpoint)
    assert sorted(found["not_finite"].split(", ")) == sorted(NAMES["hf"])
    assert found["sha256"] != inspected(capsys, folders[layout])["sha256"]


@pytest.mark.parametrize("change", [lambda s: s["encoder.conv_in.weight"].fill_(float("nan")), lambda s: s.popitem()])
def test_inspect_of_a_broken_vqgan(golden_checkpoint, capsys, change):
    path = golden_checkpoint / "tokenizer" / "vqgan.ckpt"
    saved = torch.load(path, weights_only=True)
    change(saved["state_dict"])
    torch.save(saved, path)
    (path.parent / "checklist.chk").unlink()
    status = main(["inspect", str(golden_checkpoint)])
    assert status == 2 or json.loads(capsys.readouterr().out.splitlines()[-1])["not_finite"] != "none"


def test_inspect_refuses_what_is_damaged(copy, layout, capsys):
    path = weights_file(copy)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert f"{path}: md5 " in error_of(capsys, ["inspect", copy])
    path.unlink()
    assert str(path.parent if layout == "chameleon" else path) in error_of(capsys, ["inspect", copy])


def test_inspect_names_a_tensor_too_many(checkpoint, capsys):
    rewrite(checkpoint, lambda state: state.update(extra=torch.ones(2)))
    assert "tensor extra is unexpected" in error_of(capsys, ["inspect", checkpoint])


def test_inspect_refuses_what_is_no_checkpoint(tmp_path, folders, capsys):
    assert "neither a token store" in error_of(capsys, ["inspect", tmp_path])
    assert "none: no such folder, expected" in error_of(capsys, ["inspect", tmp_path / "none"])
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "'llama', expected 'chameleon'" in error_of(capsys, ["inspect", tmp_path])
    error = error_of(capsys, ["inspect", folders["hf"], "--output", tmp_path / "out"])
    assert "--output" in error and "only for a token store" in error


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_to_a_gpu_it_is_what_it_is_on_a_cpu(folders, dtype):
    expected = load_model(folders["chameleon"], "cpu", dtype).state_dict()
    for layout in LAYOUTS:
        found = load_model(folders[layout], "cuda", dtype).state_dict()
        assert found.keys() == expected.keys()
        assert all(t.is_cuda and t.dtype == dtype and torch.equal(t.cpu(), expected[n]) for n, t in found.items())
