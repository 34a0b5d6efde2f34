"""DeepSpeed folders merged into their base: equal to what the run itself wrote, from any stage, in either layout."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from medmax_fast.cli import main
from medmax_fast.config import MergeConfig, TrainConfig
from medmax_fast.data.store import write_store
from medmax_fast.model.checkpoint import open_checkpoint
from medmax_fast.model.load import load_model
from medmax_fast.model.merge import merge
from medmax_fast.runtime import InputError
from medmax_fast.train import train
from medmax_fast.training import engine as ds
from medmax_fast.vocab import TextTokenizer


@pytest.fixture(scope="module")
def config(golden, tmp_path_factory):
    """Two steps on rows of text and image ids."""
    folder = tmp_path_factory.mktemp("merge")
    tokenizer = TextTokenizer(golden / "checkpoint" / "tokenizer" / "text_tokenizer_modified.json")
    layout, rng = tokenizer.layout, np.random.default_rng(4)
    rows = []
    for i in range(6):
        ids = rng.integers(layout.image_start, layout.vocab_size, 40)
        ids[0], ids[5], ids[-1] = layout.bos, layout.eot, layout.eos
        ids[1:5] = rng.integers(layout.text_start, layout.vocab_size, 4)
        rows.append((ids, f"row {i}", "", ""))
    store = write_store(folder / "store", layout, rows, tokenizer_sha256=tokenizer.sha256())
    common = dict(pack_length=130, packs_per_step=1, max_steps=2, lr=1e-2, warmup_ratio=0.0, device="cpu")
    return TrainConfig(data=str(store.path), ckpt=str(golden / "checkpoint"), output="", **common)


def tensors(path):
    checkpoint = open_checkpoint(path)
    return {name: checkpoint.tensor(name) for name in checkpoint.names()}


CASES = [
    dict(full=True, zero=0),
    dict(full=True, zero=2),
    dict(full=True, zero=3, freeze="*.layers.0.*"),
    dict(zero=2, head="image", embeddings="all"),
    dict(zero=3, lora_alpha=7.0, lora_targets="q_proj,down_proj"),
    dict(zero=2, lora_rank=0, head="image"),
]


@pytest.mark.parametrize("options", CASES, ids=[json.dumps(c) for c in CASES])
def test_a_training_checkpoint_gives_what_the_run_gave(config, tmp_path, options, monkeypatch):
    monkeypatch.setattr("medmax_fast.figures.loss_curve", lambda *_: None)
    run = tmp_path / "run"
    summary = train(replace(config, output=str(run), **options))
    # The runs are in fp32, on a base in bf16: nothing may be rounded on the way.
    if "adapter" in summary:
        merge(MergeConfig(ckpt=config.ckpt, adapter=str(run), output=str(tmp_path / "own"), dtype="fp32"))
        expected = tensors(tmp_path / "own")
    else:
        expected = {name: tensor.float() for name, tensor in tensors(summary["model"]).items()}
    before = tensors(config.ckpt)
    changed = {name for name in before if not torch.equal(before[name].float(), expected[name])}
    assert changed and (len(changed) < len(before)) == (options.get("full", False) is False or "freeze" in options)
    saved = run / "checkpoints" / "step-000002"
    if options["zero"]:
        ds.to_universal(saved, run / "universal")
    for source, layout in ((saved, "base"), (saved / "engine", "hf"), (run / "universal", "hf")):
        if source.exists():
            output = tmp_path / f"{source.name}-{layout}"
            command = ["merge", "--ckpt", config.ckpt, "--adapter", str(source), "--output", str(output)]
            assert main([*command, "--dtype", "fp32", "--to", layout]) == 0
            assert open_checkpoint(output).layout == ("chameleon" if layout == "base" else "hf")
            found = tensors(output)
            assert all(torch.equal(found[name], expected[name]) for name in expected), source
    # In the dtype of the base, rounded once.
    merge(MergeConfig(ckpt=config.ckpt, adapter=str(saved), output=str(tmp_path / "rounded")))
    rounded = tensors(tmp_path / "rounded")
    assert all(torch.equal(rounded[name], expected[name].to(before[name].dtype)) for name in expected)


def test_the_base_of_a_training_checkpoint_is_recognised(config, golden_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("medmax_fast.figures.loss_curve", lambda *_: None)
    run = tmp_path / "run"
    train(replace(config, output=str(run), full=True))
    path = golden_checkpoint / "models" / "7b" / "consolidated.pth"
    state = torch.load(path, weights_only=True)
    state["norm.weight"][3] += 1
    torch.save(state, path)
    (path.parent / "checklist.chk").unlink()
    command = ["merge", "--ckpt", str(golden_checkpoint), "--output", str(tmp_path / "out"), "--adapter"]
    capsys.readouterr()
    assert main([*command, str(run / "checkpoints" / "step-000002")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "trained on another base checkpoint" in error and not (tmp_path / "out").exists()
    # A run that has a whole model needs no merging, and says so.
    assert main([*command, str(run)]) == 2
    assert "trained a whole model" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("zero", [2, 3])
def test_folder_of_transformers_trainer_with_peft(config, tmp_path, zero):
    """global_stepN beside adapter_config.json, peft's own names, a saved module; against peft's own merge."""
    from peft import LoraConfig, get_peft_model

    device, dtype = torch.device("cpu"), torch.float32
    ds.start_processes(device, dtype)
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=6, target_modules=["v_proj", "up_proj"], modules_to_save=["lm_head"])
    lora.use_rslora = True
    model = get_peft_model(load_model(config.ckpt), lora)
    for name, weight in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    engine = ds.build_engine(model, replace(config, zero=zero), device, dtype, 1)
    ids = torch.randint(8712, 10212, (1, 30))
    hidden = engine.module.base_model.model.model(input_ids=ids, use_cache=False).last_hidden_state
    engine.backward(engine.module.base_model.model.lm_head(hidden).square().mean())
    engine.step()
    folder = tmp_path / "checkpoint-1"
    engine.save_checkpoint(str(folder), tag="global_step1")
    state = {name: tensor.clone() for name, tensor in ds.trained_state(engine).items()}
    lora.save_pretrained(str(folder))
    fresh = get_peft_model(load_model(config.ckpt), lora)
    fresh.load_state_dict(state, strict=False)
    expected = fresh.merge_and_unload().state_dict()
    output = tmp_path / "merged"
    command = ["merge", "--ckpt", config.ckpt, "--adapter", str(folder), "--output", str(output)]
    assert main([*command, "--dtype", "fp32"]) == 0
    found, before = tensors(output), tensors(config.ckpt)
    changed = {name for name in before if not torch.equal(found[name], before[name].float())}
    assert changed == {"lm_head.weight"} | {n for n in before if "v_proj" in n or "up_proj" in n}
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)
    # Without the adapter's configuration its alpha is not known.
    Path(folder / "adapter_config.json").unlink()
    with pytest.raises(InputError, match=r"no adapter_config.json or settings.json says their alpha"):
        merge(MergeConfig(ckpt=config.ckpt, adapter=str(folder), output=str(tmp_path / "no")))
