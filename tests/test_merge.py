"""Merging adapters: adapter_config.json's rules as peft applies them, one rounding, wrong bases and files refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from medmax_fast.cli import main
from medmax_fast.config import MergeConfig
from medmax_fast.model.checkpoint import open_checkpoint
from medmax_fast.model.load import load_model
from medmax_fast.model.merge import merge, open_trained
from medmax_fast.runtime import InputError


def logits(model, ids):
    with torch.no_grad():
        return model.lm_head(model.model(input_ids=ids, use_cache=False).last_hidden_state)


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
    # The merged weights are rounded to the base's bf16: 2^-8 of a weight, a hundredth of what the adapter does.
    change = (expected - base_logits).abs().mean()
    assert change > 0.1
    assert (found - expected).abs().mean() < 0.05 * change


def run_merge(golden, folder):
    command = ["merge", "--ckpt", str(golden / "checkpoint"), "--adapter", str(folder)]
    return main([*command, "--output", str(folder / "m")])


def test_adapter_of_another_base_is_refused(golden, adapter, tmp_path):
    (tmp_path / "adapter" / "base.json").write_text(json.dumps({"sha256": "0" * 64}))
    assert run_merge(golden, tmp_path) == 2
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
    assert run_merge(golden, tmp_path) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.layers.0.self_attn.q_proj.lora_A.more.weight", torch.ones(4, 64), "several adapters on model"),
        ("model.layers.9.mlp.up_proj.lora_A.weight", torch.ones(4, 64), "adapts model.layers.9.mlp.up_proj.weight"),
        ("lm_head.weight", torch.ones(5, 64), "lm_head.weight has shape (5, 64), the base (10212, 64)"),
    ],
)
def test_adapters_with_a_tensor_that_does_not_fit(golden, adapter, tmp_path, capsys, name, tensor, message):
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(load_file(path) | {f"base_model.model.{name}": tensor}, path)
    assert run_merge(golden, tmp_path) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "m").exists()


def test_missing_adapter(golden, tmp_path):
    with pytest.raises(InputError, match="neither adapter_config.json .* nor DeepSpeed"):
        open_trained(tmp_path)


def exact(base, adapter):
    """Merged weights in fp64, from the adapter's files by the rule in the fixture's configuration."""
    pairs, merged = load_file(adapter / "adapter_model.safetensors"), {}
    for name in base.names():
        merged[name] = base.tensor(name).double()
        prefix = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{prefix}A.weight" in pairs:
            scale = 10 / 2 if name == "model.layers.1.mlp.down_proj.weight" else 6 / 4
            merged[name] += scale * pairs[f"{prefix}B.weight"].double() @ pairs[f"{prefix}A.weight"].double()
    return merged


@pytest.mark.parametrize(("dtype", "unit"), [("base", 2**-7), ("bf16", 2**-7), ("fp16", 2**-10), ("fp32", 2**-23)])
@pytest.mark.parametrize("to", ["chameleon", "hf"])
def test_merged_weights_are_rounded_once(golden, adapter, tmp_path, dtype, unit, to):
    """Each is off by half a unit in the last place, which is at most 2^-8 of it in bf16, and by fp32's own error."""
    base = open_checkpoint(golden / "checkpoint")
    merge(MergeConfig(base.path, str(tmp_path), str(tmp_path / "m"), to=to, dtype=dtype))
    merged = open_checkpoint(tmp_path / "m")
    assert merged.layout == to
    changed = 0
    for name, expected in exact(base, tmp_path / "adapter").items():
        found, before = merged.tensor(name), base.tensor(name).double()
        error = (found.double() - expected).abs()
        # fp16 has less range below: its smallest step is 2^-24.
        bound = unit / 2 * expected.abs() + 2**-22 * (before.abs() + (expected - before).abs()) + 2**-25
        assert bool((error <= bound).all()), (name, (error / bound).max())
        if dtype != "fp16" and name.endswith("norm.weight"):
            assert torch.equal(found.double(), before)
        changed += not torch.equal(expected, before)
    assert changed == 4


def test_merged_in_fp32_has_the_logits_of_the_unmerged(golden, adapter, tmp_path):
    merge(MergeConfig(str(golden / "checkpoint"), str(tmp_path), str(tmp_path / "m"), dtype="fp32"))
    ids = torch.randint(0, 10212, (1, 50))
    expected, found = logits(adapter.base_model.model, ids), logits(load_model(tmp_path / "m"), ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


def test_pickled_adapters_of_older_peft(golden, adapter, tmp_path):
    merge(MergeConfig(str(golden / "checkpoint"), str(tmp_path), str(tmp_path / "a")))
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(weights), weights.with_name("adapter_model.bin"))
    weights.unlink()
    merge(MergeConfig(str(golden / "checkpoint"), str(tmp_path), str(tmp_path / "b")))
    assert open_checkpoint(tmp_path / "a").sha256() == open_checkpoint(tmp_path / "b").sha256()


PAIR = "base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight"
DAMAGE = {
    "NaN": (lambda t: t[PAIR.format("A")][0].fill_(float("nan")), "holds NaN or infinity"),
    "half a pair": (lambda t: t.pop(PAIR.format("B")), "down_proj lacks one of lora_A and lora_B"),
    "no such module": (lambda t: t.update({"base_model.model.model.layers.9.x.weight": torch.ones(1)}), "layers.9.x"),
    "a target left out": (lambda t: [t.pop(n) for n in list(t) if "q_proj" in n], "targets .*q_proj, and no tensor"),
    "no target": (
        lambda t: t.update({n.replace("q_proj", "k_proj"): t[n].clone() for n in list(t) if "q_proj" in n}),
        "holds a pair for .*k_proj, which adapter_config.json does not target",
    ),
    "wrong size": (lambda t: t.update({PAIR.format("A"): torch.ones(2, 5)}), r"a matrix \(64, 5\), the base has"),
    "other LoRA": (lambda t: t.update({PAIR.format("C"): torch.ones(1)}), "of a kind of LoRA that cannot be merged"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_adapters_are_named(golden, adapter, tmp_path, kind):
    change, message = DAMAGE[kind]
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}
    change(tensors)
    save_file(tensors, weights)
    with pytest.raises(InputError, match=message):
        merge(MergeConfig(str(golden / "checkpoint"), str(tmp_path), str(tmp_path / "m")))
    assert not (tmp_path / "m").exists() and not list(tmp_path.glob(".m*"))


def test_saved_modules_that_are_missing_are_named(golden, adapter, tmp_path):
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"modules_to_save": ["lm_head"]}))
    with pytest.raises(InputError, match="saves lm_head, and no tensor is for that"):
        merge(MergeConfig(str(golden / "checkpoint"), str(tmp_path), str(tmp_path / "m")))


def test_an_adapter_of_nothing_is_refused(golden, adapter, tmp_path):
    save_file({}, tmp_path / "adapter" / "adapter_model.safetensors")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": []}))
    with pytest.raises(InputError, match="no weight in it was trained"):
        merge(MergeConfig(str(golden / "checkpoint"), str(tmp_path), str(tmp_path / "m")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--to", "hf", "--shards", "4"], "--shards 4: only with --to chameleon"),
        (["--shards", "-1"], "--shards -1: expected 0 or more"),
    ],
)
def test_shards_that_cannot_be_are_refused(golden, adapter, tmp_path, capsys, change, message):
    command = ["merge", "--ckpt", str(golden / "checkpoint"), "--adapter", str(tmp_path)]
    assert main([*command, "--output", str(tmp_path / "m"), *change]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "m").exists()
