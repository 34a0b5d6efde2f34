"""What the options of a whole run do: the weights they leave alone, what must not change, what is refused.

Also what a step costs that does not log: nothing of ours waits for the device.
"""

import json
import math
import sys
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from medmax_fast.config import MergeConfig, TrainConfig
from medmax_fast.data.collate import collate
from medmax_fast.data.store import write_store
from medmax_fast.files import write_json
from medmax_fast.model import attention, trainable
from medmax_fast.model.checkpoint import open_checkpoint
from medmax_fast.model.load import load_model
from medmax_fast.model.loss import packed_hidden
from medmax_fast.model.merge import merge
from medmax_fast.runtime import InputError
from medmax_fast.train import LIMITS, _newest_checkpoint, train
from medmax_fast.training import engine as ds
from medmax_fast.training.folder import RunFolder
from medmax_fast.training.run import Run
from medmax_fast.vocab import TextTokenizer

# Clock and speed are the only fields of a record that may differ between two runs.
CLOCK = ("seconds", "tokens_per_second", "target_tokens_per_second", "memory_gib")


@pytest.fixture(scope="module")
def tokenizer(golden):
    return TextTokenizer(golden / "checkpoint" / "tokenizer" / "text_tokenizer_modified.json")


@pytest.fixture(scope="module")
def store(tmp_path_factory, tokenizer):
    """Rows of text, eot, an image and text again."""
    layout, rng = tokenizer.layout, np.random.default_rng(4)
    rows = []
    for i, length in enumerate([33, 60, 41, 22, 57, 38, 64, 35, 50]):
        ids = rng.integers(layout.text_start, layout.vocab_size, length)
        ids[0], ids[length // 4], ids[-1] = layout.bos, layout.eot, layout.eos
        span = slice(length // 4 + 1, length * 3 // 4)
        ids[span] = rng.integers(layout.image_start, layout.image_end, span.stop - span.start)
        ids[span.start], ids[span.stop - 1] = layout.boi, layout.eoi
        rows.append((ids, f"row {i}", "", ""))
    folder = tmp_path_factory.mktemp("data") / "store"
    return write_store(folder, layout, rows, tokenizer_sha256=tokenizer.sha256())


@pytest.fixture()
def config(store, golden, tmp_path, monkeypatch):
    monkeypatch.setattr("medmax_fast.figures.loss_curve", lambda *_: None)
    return TrainConfig(
        data=str(store.path),
        ckpt=str(golden / "checkpoint"),
        output=str(tmp_path / "run"),
        epochs=1,
        pack_length=130,
        packs_per_step=2,
        lr=1e-2,
        warmup_ratio=0.0,
        save_every=0,
        device="cpu",
    )


def records(config):
    lines = [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def result_bytes(config):
    name = "model/models/7b/consolidated.pth" if config.full else "adapter/adapter_model.safetensors"
    return (Path(config.output) / name).read_bytes()


def logits_of(model, store):
    batch = collate(store.ids, store.offsets, np.arange(4), store.layout.eot).to_torch()
    with torch.no_grad():
        return model.lm_head(packed_hidden(model, batch))


# ---- what is trained ----


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_head_rows_alone_make_a_model_that_differs_in_them_only(config, store, zero):
    summary = train(replace(config, lora_rank=0, head="image", zero=zero, epochs=2))
    base, tuned = open_checkpoint(config.ckpt), open_checkpoint(summary["model"])
    layout = store.layout
    for name in base.names():
        before, after = base.tensor(name), tuned.tensor(name)
        assert name == "lm_head.weight" or (before.dtype == after.dtype and torch.equal(before, after)), name
    # Image codes, eoi and boi.
    assert (
        changed_rows(base, tuned, "lm_head.weight")
        == set(range(4, 8198))
        == {*range(layout.image_start, layout.boi + 1)}
    )
    assert summary["trained_parameters"] == 8194 * tuned.shape.dim
    assert records(config)[-1]["image_loss"] < records(config)[0]["image_loss"] - 0.5
    assert logits_of(load_model(summary["model"]), store).isfinite().all()


@pytest.mark.parametrize(
    ("head", "embeddings", "zero"),
    [("image", "none", 2), ("none", "image", 2), ("all", "image", 3), ("image", "all", 3)],
)
def test_rows_beside_lora_load_in_peft_and_merge(config, store, golden_checkpoint, tmp_path, head, embeddings, zero):
    from peft import PeftModel

    in_fp32(golden_checkpoint)
    options = dict(head=head, embeddings=embeddings, zero=zero, max_steps=2)
    config = replace(config, ckpt=str(golden_checkpoint), **options)
    summary = train(config)
    tuned = PeftModel.from_pretrained(load_model(config.ckpt), summary["adapter"]).base_model.model
    merge(MergeConfig(ckpt=config.ckpt, adapter=config.output, output=str(tmp_path / "merged")))
    base, merged = open_checkpoint(config.ckpt), open_checkpoint(tmp_path / "merged")
    image, every = set(range(4, 8198)), set(range(store.layout.vocab_size))
    trained = {"none": set(), "image": image, "all": every}
    # Every row of the head has a gradient; of the embeddings those of the ids that were read.
    assert changed_rows(base, merged, "lm_head.weight") == trained[head]
    used = changed_rows(base, merged, "model.embed_tokens.weight")
    assert used <= trained[embeddings] & set(store.ids.tolist()) and (len(used) > 50) == (embeddings != "none")
    from_peft, from_merged = logits_of(tuned, store), logits_of(load_model(tmp_path / "merged"), store)
    assert (from_peft - logits_of(load_model(config.ckpt), store)).abs().max() > 0.1
    torch.testing.assert_close(from_peft, from_merged, rtol=0, atol=1e-4)


def changed_rows(base, tuned, name):
    return set((base.tensor(name).float() != tuned.tensor(name).float()).any(1).nonzero()[:, 0].tolist())


def in_fp32(folder):
    """Rewrite a checkpoint in fp32, in which a merged adapter is not rounded."""
    (file,) = folder.rglob("consolidated*.pth")
    state = torch.load(file, weights_only=True)
    torch.save({name: tensor.float() if torch.is_tensor(tensor) else tensor for name, tensor in state.items()}, file)
    # It has the sums of the files as they were.
    (file.parent / "checklist.chk").unlink()


def test_frozen_weights_are_those_of_the_base(config):
    summary = train(replace(config, full=True, freeze="*norm*, lm_head.*,model.layers.0.*", max_steps=1))
    base, tuned = open_checkpoint(config.ckpt), open_checkpoint(summary["model"])
    same = {name for name in base.names() if torch.equal(base.tensor(name), tuned.tensor(name))}
    assert same == {n for n in base.names() if "norm" in n or n.startswith(("lm_head.", "model.layers.0."))}
    assert 5 < len(same) < len(list(base.names())) - 5


# ---- the optimizer and where its state is ----


def interrupted(config, monkeypatch, after):
    """A run that ends by itself once a step is logged, before its checkpoint."""
    log = Run._log

    def logged(self, record, *rest):
        log(self, record, *rest)
        if record["step"] == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "_log", logged)
        train(config)


@pytest.mark.parametrize(("zero", "full"), [(2, False), (3, True)])
def test_8_bit_adam_learns_and_resumes_bit_for_bit(config, monkeypatch, tmp_path, zero, full):
    options = dict(optimizer="adamw8bit", zero=zero, full=full, epochs=3, max_steps=5, save_every=2)
    config = replace(config, **options)
    whole = replace(config, output=str(tmp_path / "whole"))
    states = []
    step = ds.optimizer_step

    def watched(engine):
        result = step(engine)
        inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
        states.append(
            {value.dtype for state in inner.state.values() for value in state.values() if torch.is_tensor(value)}
        )
        return result

    with monkeypatch.context() as patch:
        patch.setattr(ds, "optimizer_step", watched)
        train(whole)
    assert all(torch.uint8 in dtypes for dtypes in states)
    losses = [record["loss"] for record in records(whole)]
    assert losses[-1] < losses[0] - 0.5
    interrupted(config, monkeypatch, after=3)
    assert train(config)["resumed_from"] == 2
    assert records(config) == records(whole) and result_bytes(config) == result_bytes(whole)
    # Close to, and not, the optimizer with its state in 32 bits.
    plain = replace(config, optimizer="adamw", output=str(tmp_path / "plain"))
    train(plain)
    exact = [record["loss"] for record in records(plain)]
    assert losses == pytest.approx(exact, abs=0.3) and losses[1:] != exact[1:] and losses[0] == exact[0]


@pytest.mark.parametrize(
    ("zero", "offload", "full"),
    [(1, "optimizer", True), (2, "optimizer", False), (3, "optimizer", True), (3, "all", False)],
)
def test_offloading_changes_nothing(config, monkeypatch, tmp_path, zero, offload, full):
    # The norm is added up in another order on the CPU, so only a run that does not clip is the same bit for bit.
    config = replace(config, zero=zero, full=full, epochs=2, max_steps=4, save_every=2, clip=0.0)
    train(config)
    moved = replace(config, offload=offload, output=str(tmp_path / "moved"))
    interrupted(moved, monkeypatch, after=3)
    assert train(moved)["resumed_from"] == 2
    losses, norms = parted(config)
    moved_losses, moved_norms = parted(moved)
    assert moved_losses == losses and moved_norms == pytest.approx(norms, rel=1e-6)
    assert result_bytes(moved) == result_bytes(config)


def parted(config):
    """The records of a run without gradient norms, and those."""
    found = records(config)
    return found, [record.pop("grad_norm") for record in found]


# ---- what must not change, and what must ----


def test_z_loss_is_minimised_but_not_logged(config, store, tmp_path):
    config = replace(config, max_steps=2, validation=config.data, validate_every=1)
    with_z = replace(config, z_loss=0.05, output=str(tmp_path / "z"))
    train(config)
    train(with_z)
    plain, z = records(config), records(with_z)
    for name in ("loss", "text_loss", "image_loss"):
        assert z[0][name] == plain[0][name] and z[1][name] != plain[1][name]
    assert abs(z[0]["grad_norm"] / plain[0]["grad_norm"] - 1) > 0.01
    # Validation measures the same with and without: the plain loss of the model as it is.
    first = [json.loads(line) for line in (tmp_path / "z" / "validation.jsonl").read_text().splitlines()]
    tuned = merged(with_z, tmp_path)
    assert first[-1]["loss"] == pytest.approx(mean_loss(load_model(tuned), store), rel=1e-3)


def merged(config, tmp_path):
    merge(MergeConfig(ckpt=config.ckpt, adapter=config.output, output=str(tmp_path / "merged")))
    return tmp_path / "merged"


def mean_loss(model, store):
    batch = collate(store.ids, store.offsets, np.arange(len(store)), store.layout.eot).to_torch()
    with torch.no_grad():
        logits = model.lm_head(packed_hidden(model, batch))
    return F.cross_entropy(logits[:-1], batch["labels"][0, 1:], ignore_index=-100).item()


@pytest.mark.parametrize(("zero", "full"), [(2, False), (3, True), (3, False)])
def test_recomputing_changes_no_bit_of_a_run(config, monkeypatch, tmp_path, zero, full):
    # The small model is 64 wide.
    monkeypatch.setattr(trainable, "KEPT_WIDTH", 32)
    config = replace(config, zero=zero, full=full, lora_dropout=0.3)
    train(config)
    assert len(records(config)) > 1
    for recompute in ("selective", "layers"):
        other = replace(config, recompute=recompute, output=str(tmp_path / recompute))
        train(other)
        assert records(other) == records(config) and result_bytes(other) == result_bytes(config)


@pytest.mark.parametrize(("zero", "full"), [(1, False), (2, True), (3, True)])
def test_bucket_size_changes_no_bit(config, tmp_path, zero, full):
    config = replace(config, zero=zero, full=full)
    train(config)
    small = replace(config, bucket_size=1000, output=str(tmp_path / "small"))
    train(small)
    assert records(small) == records(config) and result_bytes(small) == result_bytes(config)


# ---- what is refused ----


def refused(config, message, **change):
    with pytest.raises(InputError) as error:
        train(replace(config, **change))
    assert message in str(error.value) and "\n" not in str(error.value) and not Path(config.output).exists()


@pytest.mark.parametrize("name", LIMITS)
def test_every_limit(config, name):
    least, most = LIMITS[name]
    whole = {field.name: field.type for field in fields(TrainConfig)}[name] is int
    flag = "--" + name.replace("_", "-")
    expected = f"expected {least}..{most}" if most < math.inf else f"expected {least} or more"
    values = [least - 1] if whole else [least - 0.01, math.nan]
    values += [most + (1 if whole else 0.01)] * (most < math.inf)
    for value in values:
        refused(config, f"{flag} {value}: {expected}", **{name: value})


REFUSED = [
    (dict(offload="optimizer", zero=0), "--offload optimizer: needs --zero 1 or more, not 0"),
    (dict(offload="all", zero=2), "--offload all: needs --zero 3, not 2"),
    (
        dict(optimizer="adamw8bit", offload="optimizer"),
        "--optimizer adamw8bit: --offload optimizer keeps the state in 32",
    ),
    (dict(full=True, head="image"), "--head image: --full trains all of it; use --freeze to keep weights"),
    (dict(full=True, embeddings="all"), "--embeddings all: --full trains all of it"),
    (dict(freeze="*norm*"), "--freeze *norm*: only with --full"),
    (dict(lora_rank=0), "--lora-rank 0: nothing to train; expected a rank, or --head or --embeddings"),
    (dict(track="tensorboard,mlflow"), "--track mlflow: expected some of tensorboard,wandb"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_flags_that_do_not_go_together(config, change, message):
    refused(config, message, **change)


def test_8_bit_adam_names_the_extra(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    refused(config, "pip install 'medmax_fast[8bit]'", optimizer="adamw8bit")


def test_offload_and_buckets_do_not_count_as_other_settings(config, monkeypatch):
    config = replace(config, zero=2, epochs=2, save_every=2)
    interrupted(config, monkeypatch, after=3)
    resumed = train(replace(config, offload="optimizer", bucket_size=1000, recompute="layers", log_every=2))
    assert resumed["resumed_from"] == 2


# ---- waiting for the device ----

# What a GPU would have to be waited for, as torch functions and as operations.
ASKING = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__contains__")
READING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_consecutive")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")


class Asked(TorchFunctionMode):
    def __init__(self, waits):
        super().__init__()
        self._waits = waits

    def __torch_function__(self, function, types, arguments=(), options=None):
        if getattr(function, "__name__", "") in ASKING:
            self._waits.add(function.__name__)
        return function(*arguments, **(options or {}))


class Read(TorchDispatchMode):
    def __init__(self, waits):
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        masks = [i for i in arguments[1] if i is not None and i.dtype == torch.bool] if name in INDEXING else []
        if masks or name in READING:
            self._waits.add("aten." + name)
        return function(*arguments, **(options or {}))


class Waits:
    """Counts, per step, what would wait for the device: in Run.step, and apart in DeepSpeed's own optimizer step."""

    def __init__(self, monkeypatch):
        self.ours, self.deepspeed, self._now = {}, {}, None
        step, finish = Run.step, ds.optimizer_step

        def watched(run, number, *rest):
            self._now = self.ours.setdefault(number, Counter())
            with Asked(self), Read(self):
                return step(run, number, *rest)

        def apart(engine):
            number = max(self.ours)
            self._now = self.deepspeed.setdefault(number, Counter())
            result = finish(engine)
            self._now = self.ours[number]
            return result

        monkeypatch.setattr(Run, "step", watched)
        monkeypatch.setattr(ds, "optimizer_step", apart)

    def add(self, name):
        self._now[name] += 1


def attend_on_device(q_THD, k_THD, v_THD, cu_seqlens, max_seqlen, scale=None, impl="auto"):
    """Stands in for the variable-length kernels of a GPU: SDPA reads the boundaries on the host, they do not."""
    places = torch.arange(len(q_THD), device=q_THD.device)
    row = torch.bucketize(places, cu_seqlens[1:], right=True)
    mask = (row[:, None] == row) & (places[:, None] >= places)
    q, k, v = (x.transpose(0, 1)[None] for x in (q_THD, k_THD, v_THD))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)[0].transpose(0, 1)


# What DeepSpeed reads itself per optimizer step: were all gradients finite, and has the norm a limit to keep.
READ_BY_DEEPSPEED = {(2, "fp32"): 2, (2, "bf16"): 3, (3, "fp32"): 1, (3, "bf16"): 1}


@pytest.mark.parametrize(
    ("zero", "precision", "full"), [(2, "fp32", False), (2, "bf16", True), (3, "fp32", True), (3, "bf16", False)]
)
def test_a_step_that_does_not_log_waits_for_nothing(config, monkeypatch, zero, precision, full):
    monkeypatch.setattr(attention, "varlen_attention", attend_on_device)
    waits = Waits(monkeypatch)
    options = dict(zero=zero, precision=precision, full=full, epochs=3, max_steps=5, log_every=5, lora_dropout=0.1)
    train(replace(config, **options))
    # In its first two steps ZeRO-3 finds out, and agrees on, the order in which weights are gathered.
    steady = (3, 4) if zero == 3 else (1, 2, 3, 4)
    for number in steady:
        assert waits.ours[number] == {}
        assert waits.deepspeed[number]["aten._local_scalar_dense"] <= READ_BY_DEEPSPEED[zero, precision]
    # The losses, and the norm; so the counting works.
    assert waits.ours[5] == {"tolist": 1, "__float__": 1, "aten._local_scalar_dense": 1}
    assert all(waits.deepspeed[number]["__bool__"] > 0 for number in steady)


def test_8_bit_state_is_not_shared_out_anew(config):
    """Refused before a model is loaded; with the ordinary optimizer the checkpoint is rewritten (test_restart.py)."""
    folder = RunFolder(config.output)
    checkpoint = folder.checkpoints / "step-000003"
    write_json(checkpoint / "state.json", {"step": 3, "world": 2, "data": {}, "files": {}})
    with pytest.raises(InputError, match="step-000003: made by 2 ranks, now 1; use the same number, since the 8-bit"):
        _newest_checkpoint(replace(config, optimizer="adamw8bit"), folder, 1)
    assert _newest_checkpoint(replace(config, optimizer="adamw8bit"), folder, 2)[0] == checkpoint
