"""The start-up probe: passes for every attention there is here, fails for one that leaks, and then nothing trains."""

from pathlib import Path

import numpy as np
import pytest
import torch
from attentions import DTYPES_16, ON_A_GPU, need
from torch.nn import functional as F

from medmax_fast import cli, train
from medmax_fast.data.store import write_store
from medmax_fast.model import attention, probe
from medmax_fast.model.load import load_model
from medmax_fast.model.probe import LENGTHS, probe_isolation
from medmax_fast.model.trainable import PackedModel, recompute_activations, share_norms
from medmax_fast.runtime import InputError
from medmax_fast.vocab import TextTokenizer

CASES = [("sdpa", "cpu", dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
CASES += [pytest.param("sdpa", "cuda", torch.float32, marks=pytest.mark.gpu)]
CASES += [pytest.param(name, "cuda", dtype, marks=pytest.mark.gpu) for name in ON_A_GPU for dtype in DTYPES_16]


@pytest.fixture(scope="module")
def tokenizer(golden):
    return TextTokenizer(golden / "checkpoint" / "tokenizer" / "text_tokenizer.json")


@pytest.mark.parametrize(("name", "device", "dtype"), CASES, ids=str)
def test_passes_for_what_training_uses(golden, tokenizer, monkeypatch, name, device, dtype):
    need(name)
    for module in (attention, probe):
        monkeypatch.setattr(module, "available", lambda *_: name)
    model = load_model(golden / "checkpoint", device, dtype)
    probe_isolation(model, device)
    share_norms(model)
    recompute_activations(model)
    probe_isolation(PackedModel(model, tokenizer.layout).train(), device)


def one_row(module, query, key, value, attention_mask, scaling=None, **_):
    """Attention that takes a pack for one sequence, and is right in all else."""
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling).transpose(1, 2), None


def shifted(amount):
    """Attention whose boundary between two sequences lies `amount` ids too late."""

    def attend(*tensors, cu_seq_lens_q=None, **options):
        if len(cu_seq_lens_q) == 3:
            cu_seq_lens_q = cu_seq_lens_q + torch.tensor([0, amount, 0], dtype=torch.int32)
        return attention.packed_attention(*tensors, cu_seq_lens_q=cu_seq_lens_q, **options)

    return attend


def past(*tensors, cu_seq_lens_q=None, **options):
    """Attention whose first sequence sees the first id of the second."""
    out, _ = attention.packed_attention(*tensors, cu_seq_lens_q=cu_seq_lens_q, **options)
    if len(cu_seq_lens_q) == 3:
        edge = int(cu_seq_lens_q[1])
        # tensors: module, query, key, value [B, H, T, D], mask; out [B, T, H, D].
        out[:, :edge] += tensors[3][:, None, :, edge]
    return out, None


def counting(*tensors, cu_seq_lens_q=None, **options):
    """Attention that depends on how many sequences there are, but not on what is in them."""
    out, _ = attention.packed_attention(*tensors, cu_seq_lens_q=cu_seq_lens_q, **options)
    return out * (len(cu_seq_lens_q) - 1), None


def use(monkeypatch, name, function):
    """Have models load with `function` as their attention."""
    monkeypatch.setattr(attention, "NAME", name)
    registered = attention.register

    def register():
        from transformers import AttentionInterface

        registered()
        AttentionInterface.register(name, function)

    monkeypatch.setattr(attention, "register", register)


# The second sequence sees the first one; boundaries are wrong by one id, either way; the first sees the second.
LEAKS = [
    ("leaking", one_row, r"ids of sequence 1 .* sequence 2 moved at 35 of its 35 positions, from number 1 on"),
    ("late", shifted(1), r"ids of sequence 1 .* sequence 2 moved at 1 of its 35 positions, from number 1 on"),
    ("early", shifted(-1), r"ids of sequence 1 .* sequence 2 moved at 35 of its 35 positions, from number 1 on"),
    ("past", past, r"ids of sequence 2 .* sequence 1 moved at 29 of its 29 positions, from number 1 on"),
    ("counting", counting, r"sequence 1 of a pack has logits that differ by .* expected at most 0\.03 in float32"),
]


@pytest.mark.parametrize(("name", "function", "message"), LEAKS, ids=[name for name, *_ in LEAKS])
def test_fails_for_an_attention_that_leaks(golden, tokenizer, monkeypatch, name, function, message):
    use(monkeypatch, name, function)
    model = load_model(golden / "checkpoint")
    for wrap in (lambda model: model, lambda model: PackedModel(model, tokenizer.layout).train()):
        with pytest.raises(InputError, match=rf"^attention {name} in float32 on cpu: .*{message}.*; load the") as error:
            probe_isolation(wrap(model), "cpu")
        assert "\n" not in str(error.value)


@pytest.mark.gpu
def test_a_leak_is_seen_on_a_gpu(golden, monkeypatch):
    use(monkeypatch, "leaking", one_row)
    model = load_model(golden / "checkpoint", "cuda", torch.bfloat16)
    message = r"^attention leaking in bfloat16 on cuda: .*ids of sequence 1 .* sequence 2 moved at [0-9]+ of its 35 "
    with pytest.raises(InputError, match=message):
        probe_isolation(model, "cuda")


def test_a_model_that_says_nothing_proves_nothing(golden):
    model = load_model(golden / "checkpoint")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    with pytest.raises(InputError, match="no logit of it moved"):
        probe_isolation(model, "cpu")


def test_leaves_everything_as_it_was_and_costs_five_short_passes(golden, tokenizer):
    model = PackedModel(load_model(golden / "checkpoint"), tokenizer.layout).train()
    model.model.model.norm.eval()
    modes = [module.training for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state, lengths = torch.get_rng_state(), []
    layer = model.model.model.layers[0]
    hook = layer.register_forward_hook(lambda _, given, __: lengths.append(given[0].shape[1]))
    probe_isolation(model, "cpu")
    hook.remove()
    assert lengths == [64, 64, 64, *LENGTHS] and all(n % 2 for n in LENGTHS)
    assert torch.equal(torch.get_rng_state(), state) and [m.training for m in model.modules()] == modes
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and not model.model.lm_head._forward_hooks


def train_arguments(golden, tokenizer, folder, *more):
    layout = tokenizer.layout
    rows = [(np.full(20, layout.text_start + i), f"{i}", "", "") for i in range(2)]
    store = write_store(folder / "store", layout, rows, tokenizer_sha256=tokenizer.sha256())
    flags = ["--data", str(store.path), "--ckpt", str(golden / "checkpoint"), "--output", str(folder / "run")]
    return ["train", *flags, "--device", "cpu", "--max-steps", "1", *more]


@pytest.mark.parametrize("zero", ["2", "3"])
def test_training_does_not_start_with_a_leaking_attention(golden, tokenizer, tmp_path, monkeypatch, capfd, zero):
    use(monkeypatch, "leaking", one_row)
    assert cli.main(train_arguments(golden, tokenizer, tmp_path, "--zero", zero)) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if "medmax" in line]
    assert len(lines) == 1 and lines[0].startswith("medmax train: attention leaking in float32 on cpu: with the ids of")
    assert "sequence 2 moved at 35 of its 35 positions" in lines[0]
    assert not (Path(tmp_path) / "run" / "metrics.jsonl").exists()


def test_training_probes_the_engine_at_every_start(golden, tokenizer, tmp_path, monkeypatch):
    probed = []
    monkeypatch.setattr(train, "probe_isolation", lambda *given: probed.append(given) or probe_isolation(*given))
    assert cli.main(train_arguments(golden, tokenizer, tmp_path, "--precision", "bf16")) == 0
    ((engine, device),) = probed
    assert engine.bfloat16_enabled() and device == torch.device("cpu")
