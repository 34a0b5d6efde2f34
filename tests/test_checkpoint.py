"""Opening checkpoints: both layouts, damage named in one line, nothing unpickled that could run code."""

import json
import pickle

import pytest
import torch

from medmax_fast.cli import main
from medmax_fast.model.checkpoint import open_checkpoint
from medmax_fast.model.convert import write_checkpoint
from medmax_fast.model.layout import ModelShape, half_split, interleave, keys
from medmax_fast.model.load import load_model
from medmax_fast.runtime import InputError


def rewrite(folder, change):
    """Change the language model's tensors and drop the checksum that would notice first."""
    path = folder / "models" / "7b" / "consolidated.pth"
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    (path.parent / "checklist.chk").unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layers.1.feed_forward.w2.weight"), "tensor layers.1.feed_forward.w2.weight is missing"),
        (lambda s: s.update({"norm.weight": torch.ones(3)}), r"tensor norm.weight has shape \(3,\), expected \(64,\)"),
        (
            lambda s: s.update({"layers.0.attention.wq.weight": torch.ones(60, 64)}),
            r"\(60, 64\), expected \(64, 64\)",
        ),
        (
            lambda s: s.update({"layers.0.attention.q_normalization.bias": torch.ones(5)}),
            "q_normalization.bias has shape",
        ),
    ],
)
def test_damaged_tensor_is_named(golden_checkpoint, change, message):
    rewrite(golden_checkpoint, change)
    with pytest.raises(InputError, match=message):
        load_model(golden_checkpoint)


def test_missing_tensor_through_the_command(golden_checkpoint, tmp_path, capsys):
    rewrite(golden_checkpoint, lambda s: s.pop("output.weight"))
    (tmp_path / "rows.jsonl").write_text('{"tokens": [0, 8710, 9000, 2]}\n')
    command = ["score", "--ckpt", str(golden_checkpoint), "--input", str(tmp_path / "rows.jsonl")]
    assert main([*command, "--output", str(tmp_path / "o.jsonl")]) == 2
    error = capsys.readouterr().err
    assert "tensor output.weight is missing" in error and error.count("\n") == 1
    assert not (tmp_path / "o.jsonl").exists()


def test_wrong_checksum(golden_checkpoint, capsys):
    path = golden_checkpoint / "tokenizer" / "vqgan.yaml"
    path.write_text(path.read_text() + "\n")
    assert (
        main(["convert", "--input", str(golden_checkpoint), "--output", str(golden_checkpoint / "x"), "--to", "hf"])
        == 2
    )
    error = capsys.readouterr().err
    assert "vqgan.yaml: md5" in error and error.count("\n") == 1
    assert not (golden_checkpoint / "x").exists()


class Malicious:
    def __reduce__(self):
        return (print, ("code ran while loading",))


def test_pickled_code_is_refused(golden_checkpoint, capsys):
    rewrite(golden_checkpoint, lambda s: s.clear())
    torch.save({"tok_embeddings.weight": Malicious()}, golden_checkpoint / "models" / "7b" / "consolidated.pth")
    with pytest.raises(InputError, match="cannot be read as plain tensors"):
        load_model(golden_checkpoint)
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"not a zip", pickle.dumps({"a": 1})])
def test_files_that_are_no_checkpoints(golden_checkpoint, content):
    rewrite(golden_checkpoint, lambda s: None)
    (golden_checkpoint / "models" / "7b" / "consolidated.pth").write_bytes(content)
    with pytest.raises(InputError, match="consolidated.pth: "):
        load_model(golden_checkpoint)


def test_truncated_safetensors(golden, tmp_path):
    write_checkpoint(open_checkpoint(golden / "checkpoint"), tmp_path / "hf", "hf")
    path = tmp_path / "hf" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="not a safetensors file"):
        open_checkpoint(tmp_path / "hf")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "no such folder"),
        (lambda p: p.mkdir(), "neither a Hugging Face"),
        (lambda p: (p.mkdir(), (p / "config.json").write_text('{"model_type": "llama"}')), "model_type 'llama'"),
        (lambda p: (p.mkdir(), (p / "config.json").write_text("{")), "not valid JSON"),
        (
            lambda p: (p.mkdir(), (p / "config.json").write_text('{"model_type": "chameleon"}')),
            "no entry 'hidden_size'",
        ),
    ],
)
def test_folders_that_are_no_checkpoints(tmp_path, make, message):
    make(tmp_path / "c")
    with pytest.raises(InputError, match=message):
        open_checkpoint(tmp_path / "c")


def test_shards_join_to_the_whole(golden_checkpoint, golden):
    """Four shards cut along the table's axes, as Chameleon-30B ships, read as the one file they came from."""
    whole = open_checkpoint(golden / "checkpoint")
    path = golden_checkpoint / "models" / "7b" / "consolidated.pth"
    state = torch.load(path, weights_only=True)
    axes = {k.chameleon: k.axis for k in keys(whole.shape.layers)}
    for i in range(4):
        shard = {
            name: tensor if tensor is None or axes[name] is None else tensor.chunk(4, axes[name])[i].clone()
            for name, tensor in state.items()
        }
        torch.save(shard, path.with_name(f"consolidated.{i:02d}.pth"))
    path.unlink()
    (path.parent / "checklist.chk").unlink()
    joined = open_checkpoint(golden_checkpoint)
    for name in whole.names():
        assert torch.equal(joined.tensor(name), whole.tensor(name)), name


@pytest.mark.parametrize("heads", [1, 3, 8])
@pytest.mark.parametrize("width", [2, 6, 16])
def test_rotary_orders_are_inverse(heads, width):
    rows = torch.randn(heads * width, 5)
    assert torch.equal(interleave(half_split(rows, width), width), rows)
    # The first half of each head holds the even rows.
    assert torch.equal(
        half_split(rows, width).view(heads, width, 5)[:, : width // 2], rows.view(heads, width, 5)[:, ::2]
    )


@pytest.mark.parametrize("dim,hidden", [(4096, 11008), (128, 352), (64, 192), (96, 1000), (8192, 22016)])
def test_shape_round_trips_through_params(dim, hidden):
    shape = ModelShape(dim, 2, 4, 4, hidden, 9000)
    assert ModelShape.from_params(json.loads(json.dumps(shape.to_params()))) == shape


def test_a_name_that_no_tensor_has(hf):
    with pytest.raises(InputError, match="hf: tensor model.nothing.weight is missing"):
        open_checkpoint(hf).meta("model.nothing.weight")
