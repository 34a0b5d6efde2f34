"""Conversion in both directions, and merging, on the golden checkpoint."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from medmax_fast.cli import main
from medmax_fast.model.checkpoint import open_checkpoint
from medmax_fast.model.load import load_model
from medmax_fast.model.merge import open_trained
from medmax_fast.runtime import InputError, hash_file


@pytest.fixture(scope="module")
def hf(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("convert") / "hf"
    assert main(["convert", "--input", str(golden / "checkpoint"), "--output", str(folder), "--to", "hf"]) == 0
    return folder


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


def test_heads_that_differ_are_refused(hf, tmp_path):
    changed = tmp_path / "hf"
    changed.mkdir()
    for file in hf.iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    weights = load_file(changed / "model.safetensors")
    weights["model.layers.1.self_attn.k_norm.bias"][2] += 0.5
    save_file(weights, changed / "model.safetensors")
    command = ["convert", "--input", str(changed), "--output", str(tmp_path / "out"), "--to", "chameleon"]
    assert main(command) == 2
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


@pytest.fixture()
def adapter(golden, tmp_path):
    """A peft adapter with random A and B, a pattern of its own for one module, and the model it belongs to."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"layers.1.mlp.down_proj": 2},
        alpha_pattern={"layers.1.mlp.down_proj": 10},
    )
    model = get_peft_model(load_model(golden / "checkpoint"), config)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    return model.eval()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("layout", ["chameleon", "hf"])
def test_merged_equals_unmerged(golden, hf, adapter, tmp_path, layout, rslora):
    if rslora:
        path = tmp_path / "adapter" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"use_rslora": True}))
        from peft import PeftModel

        adapter = PeftModel.from_pretrained(load_model(golden / "checkpoint"), tmp_path / "adapter").eval()
    base = golden / "checkpoint" if layout == "chameleon" else hf
    command = ["merge", "--ckpt", str(base), "--adapter", str(tmp_path), "--output", str(tmp_path / "merged")]
    assert main(command) == 0
    assert open_checkpoint(tmp_path / "merged").layout == layout
    ids = torch.randint(0, 10212, (1, 50))
    expected = logits(adapter.base_model.model, ids)
    base_logits = logits(load_model(base), ids)
    found = logits(load_model(tmp_path / "merged"), ids)
    # The merged weights are rounded to the base's bf16: 2^-9 of a weight, a hundredth of what the adapter does.
    change = (expected - base_logits).abs().mean()
    assert change > 0.1
    assert (found - expected).abs().mean() < 0.05 * change


def test_adapter_of_another_base_is_refused(golden, adapter, tmp_path):
    (tmp_path / "adapter" / "base.json").write_text(json.dumps({"sha256": "0" * 64}))
    command = [
        "merge",
        "--ckpt",
        str(golden / "checkpoint"),
        "--adapter",
        str(tmp_path),
        "--output",
        str(tmp_path / "m"),
    ]
    assert main(command) == 2
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "expected LORA"),
        ({"use_dora": True}, "use_dora"),
        ({"r": 8}, "rank 4"),
    ],
)
def test_adapters_that_cannot_be_merged(golden, adapter, tmp_path, capsys, change, message):
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    command = [
        "merge",
        "--ckpt",
        str(golden / "checkpoint"),
        "--adapter",
        str(tmp_path),
        "--output",
        str(tmp_path / "m"),
    ]
    assert main(command) == 2
    assert message in capsys.readouterr().err


def test_missing_adapter(golden, tmp_path):
    with pytest.raises(InputError, match="neither adapter_config.json .* nor DeepSpeed"):
        open_trained(tmp_path)
