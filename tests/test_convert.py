"""Conversion in both directions, and merging, on the golden checkpoint."""

import json
import signal
import subprocess
import sys
import time
import types

import torch
from safetensors.torch import load_file, save_file

from medmax_fast.cli import main
from medmax_fast.files import hash_file
from medmax_fast.model.checkpoint import open_checkpoint
from medmax_fast.model.load import load_model


def logits(model, ids):
    with torch.no_grad():
        return model.lm_head(model.model(input_ids=ids, use_cache=False).last_hidden_state)


def test_there_and_back_is_bitwise(golden, hf, tmp_path):
    assert main(["convert", "--input", str(hf), "--output", str(tmp_path / "back"), "--to", "chameleon"]) == 0
    for name in ("models/7b/consolidated.pth", "models/7b/params.json"):
        assert hash_file(tmp_path / "back" / name) == hash_file(golden / "checkpoint" / name), name
    before = torch.load(golden / "checkpoint" / "tokenizer" / "vqgan.ckpt", weights_only=True)["state_dict"]
    after = torch.load(tmp_path / "back" / "tokenizer" / "vqgan.ckpt", weights_only=True)["state_dict"]
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name in ("text_tokenizer.json", "text_tokenizer_modified.json"):
        a, b = (json.loads((c / "tokenizer" / name).read_text()) for c in (golden / "checkpoint", tmp_path / "back"))
        assert a == b


def test_stock_transformers_loads_it_with_equal_text_logits(golden, hf):
    from transformers import AutoProcessor, ChameleonForConditionalGeneration

    stock = ChameleonForConditionalGeneration.from_pretrained(hf, dtype=torch.float32).eval()
    ours = load_model(golden / "checkpoint")
    ids = torch.randint(8712, 10212, (1, 40))
    with torch.no_grad():
        expected = stock(input_ids=ids).logits
    # transformers masks the image ids; the rest must agree.
    torch.testing.assert_close(expected[..., 8196:], logits(ours, ids)[..., 8196:], rtol=0, atol=1e-5)
    assert (stock.generation_config.bos_token_id, stock.generation_config.eos_token_id) == (0, 2)
    processor = AutoProcessor.from_pretrained(hf)
    assert processor.tokenizer("x", add_special_tokens=False).input_ids[-1] >= 8712


def test_heads_that_differ_are_refused(hf, tmp_path, monkeypatch, capsys):
    changed = tmp_path / "hf"
    changed.mkdir()
    for file in hf.iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    weights = load_file(changed / "model.safetensors")
    weights["model.layers.1.self_attn.k_norm.bias"][2] += 0.5
    save_file(weights, changed / "model.safetensors")
    command = ["convert", "--input", str(changed), "--output", str(tmp_path / "out"), "--to", "chameleon"]
    assert main(command) == 2
    assert "agree in 4 groups" in capsys.readouterr().err
    # As of heads that no number of shards divides.
    with monkeypatch.context() as patch:
        patch.setattr("medmax_fast.model.convert.can_split", lambda _, shards: shards == 1)
        assert main(command) == 2
    assert "the Chameleon layout holds one vector for them, --average-qk-norm averages" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*command, "--average-qk-norm"]) == 0
    averaged = open_checkpoint(tmp_path / "out").tensor("model.layers.1.self_attn.k_norm.bias")
    expected = weights["model.layers.1.self_attn.k_norm.bias"].float().mean(0)
    torch.testing.assert_close(averaged[0].float(), expected, rtol=0, atol=0.01)


def test_output_in_use_is_refused(golden, tmp_path, capsys):
    (tmp_path / "keep.txt").write_text("mine")
    assert main(["convert", "--input", str(golden / "checkpoint"), "--output", str(tmp_path), "--to", "hf"]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["keep.txt"]


def test_a_disk_that_is_too_small_is_noticed_first(golden, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shutil.disk_usage", lambda _: types.SimpleNamespace(free=10**6))
    out = tmp_path / "new" / "out"
    assert main(["convert", "--input", str(golden / "checkpoint"), "--output", str(out), "--to", "hf"]) == 2
    assert "out: needs 0.1 GB, 0.0 GB are free there" in capsys.readouterr().err
    assert not out.exists()


def test_killed_at_any_moment_it_leaves_no_half_written_folder(golden, hf, tmp_path):
    """kill -9 once the hidden folder exists; the same command then writes what it would have written."""
    out = tmp_path / "out"
    command = ["convert", "--input", str(hf), "--output", str(out), "--to", "chameleon"]
    process = subprocess.Popen([sys.executable, "-m", "medmax_fast", *command], stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob(".out.*.tmp")):
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not out.exists()
    assert main(command) == 0
    assert hash_file(out / "models/7b/consolidated.pth") == hash_file(golden / "checkpoint/models/7b/consolidated.pth")
