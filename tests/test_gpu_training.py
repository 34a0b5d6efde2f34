"""Training on a GPU: the loss curves of a CPU in fp32, 16 bits with each attention, packs on their way, the command.

Without DeepSpeed a plain loop over the same model, loader and loss takes the steps, so that a GPU needs none of it.
"""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from attentions import ON_A_GPU, need

from medmax_fast.config import TrainConfig
from medmax_fast.data.loader import PackedLoader
from medmax_fast.data.store import write_store
from medmax_fast.model import attention
from medmax_fast.model.load import load_model
from medmax_fast.model.trainable import prepare
from medmax_fast.training.upload import Uploader
from medmax_fast.vocab import TextTokenizer

ROOT = Path(__file__).resolve().parents[1]
STEPS = 6
pytestmark = pytest.mark.gpu
# What is trained. An adapter needs peft; dropout leaves out the same values on a CPU and a GPU.
TRAINED = {
    "full": {"full": True},
    "image rows": {"lora_rank": 0, "head": "image", "embeddings": "image"},
    "adapter": {"lora_rank": 8, "lora_dropout": 0.0},
    "adapter with dropout": {"lora_rank": 8, "lora_dropout": 0.3},
}


@pytest.fixture(scope="module")
def store(golden, tmp_path_factory):
    """Rows of text, eot, a span of image ids and eos, of odd lengths; five packs of 145 ids an epoch."""
    tokenizer = TextTokenizer(golden / "checkpoint" / "tokenizer" / "text_tokenizer_modified.json")
    layout, rng = tokenizer.layout, np.random.default_rng(0)

    def rows():
        for i, length in enumerate((33, 60, 41, 57, 38, 64, 35, 50, 37, 49, 62, 34)):
            ids = rng.integers(layout.text_start, layout.vocab_size, length)
            ids[[0, length // 4, -1]] = layout.bos, layout.eot, layout.eos
            span = slice(length // 4 + 1, length * 3 // 4)
            ids[span] = rng.integers(layout.image_start, layout.image_end, span.stop - span.start)
            ids[[span.start, span.stop - 1]] = layout.boi, layout.eoi
            yield ids, f"row {i}", "caption", "synthetic"

    folder = tmp_path_factory.mktemp("data") / "store"
    return write_store(folder, layout, rows(), tokenizer_sha256=tokenizer.sha256())


def config_of(store, golden, **options) -> TrainConfig:
    return TrainConfig(data=str(store.path), ckpt=str(golden / "checkpoint"), output="", **options)


def loss_curve(store, golden, device, dtype=torch.float32, **options) -> list[float]:
    """Mean loss per supervised id of each step; the model is made on the CPU, so that an adapter starts the same."""
    config, device = config_of(store, golden, **options), torch.device(device)
    model = prepare(load_model(config.ckpt, "cpu", dtype), config, store.layout).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    loader = PackedLoader(store, 145, 2, seed=0, ahead=2, pinned=device.type == "cuda")
    upload, losses = Uploader(device), []
    steps = itertools.chain.from_iterable(loader.epoch_steps(epoch) for epoch in itertools.count())
    for step in itertools.islice(steps, STEPS):
        total = 0.0
        for batch in upload(step):
            loss, *_ = model(batch)
            (loss / step.target_tokens).backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total / step.target_tokens)
    return losses


@pytest.mark.parametrize("trained", TRAINED)
def test_steps_have_the_losses_of_a_cpu(store, golden, trained):
    if trained.startswith("adapter"):
        pytest.importorskip("peft", reason="peft is not installed: pip install 'medmax_fast[train]'")
    cpu, gpu = (loss_curve(store, golden, device, **TRAINED[trained]) for device in ("cpu", "cuda"))
    assert gpu[-1] < gpu[0] - 0.1, gpu
    # AdamW divides a gradient by its own size: where that is all rounding the step's sign is luck. Noise of 1e-6 in the
    # gradients moves these losses by up to 2e-4 of them.
    assert gpu[0] == pytest.approx(cpu[0], rel=4e-6) and gpu == pytest.approx(cpu, rel=1e-3), (gpu, cpu)


@pytest.mark.parametrize("name", ON_A_GPU)
def test_steps_in_bf16_with_each_attention(store, golden, monkeypatch, name):
    need(name)
    exact, used = loss_curve(store, golden, "cuda", full=True), []
    real = attention.varlen_attention
    monkeypatch.setattr(attention, "varlen_attention", lambda *tensors: used.append(name) or real(*tensors, impl=name))
    found = loss_curve(store, golden, "cuda", torch.bfloat16, full=True)
    assert len(used) == 2 * 2 * STEPS
    assert found[-1] < found[0] - 0.1 and found == pytest.approx(exact, rel=0.02), (found, exact)


@pytest.mark.parametrize("recompute", ["layers", "selective"])
def test_recomputed_activations_change_no_loss(store, golden, recompute):
    options = {"dtype": torch.bfloat16, "full": True}
    kept = loss_curve(store, golden, "cuda", **options)
    found = loss_curve(store, golden, "cuda", **options, recompute=recompute)
    assert found == pytest.approx(kept, rel=5e-3) and len({*found}) == STEPS


def test_the_example_loop_has_the_losses_of_a_cpu(store, golden, monkeypatch):
    spec = importlib.util.spec_from_file_location("train_loop", ROOT / "examples" / "train_loop.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    losses = {}
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(example, "pick_device", lambda _, device=device: torch.device(device))
        losses[device] = example.train(str(store.path), str(golden / "checkpoint"), steps=4, packs_per_step=1)
    assert losses["cuda"][-1] < losses["cuda"][0] - 0.1
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3), losses


def test_packs_reach_the_gpu_as_they_are(store):
    """From page-locked memory that a thread fills again, two steps behind."""
    plain, pinned = PackedLoader(store, 145, 2, seed=1), PackedLoader(store, 145, 2, seed=1, ahead=2, pinned=True)
    cpu, gpu = Uploader(torch.device("cpu")), Uploader(torch.device("cuda", 0))
    uploaded = [batch for step in pinned.epoch_steps(0) for batch in gpu(step)]
    expected = [batch for step in plain.epoch_steps(0) for batch in cpu(step)]
    assert len(uploaded) == len(expected) == 6
    for found, right in zip(uploaded, expected, strict=True):
        assert found.keys() == right.keys()
        for name, value in right.items():
            if torch.is_tensor(value):
                assert found[name].is_cuda and torch.equal(found[name].cpu(), value), name
            else:
                assert found[name] == value, name


@pytest.mark.parametrize("options", [["--full", "--zero", "3"], ["--zero", "2", "--lora-dropout", "0.3"]], ids=" ".join)
def test_the_command_has_the_losses_of_a_cpu(store, golden, tmp_path, options):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'medmax_fast[train]'")
    losses = {}
    # Without what a run of DeepSpeed in this process has set.
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR")
    alone = {name: value for name, value in os.environ.items() if name not in ranks}
    for device in ("cpu", "cuda"):
        files = ["--data", str(store.path), "--ckpt", str(golden / "checkpoint"), "--output", str(tmp_path / device)]
        words = [*files, "--device", device, "--precision", "fp32", "--max-steps", "4", "--pack-length", "145"]
        words += ["--packs-per-step", "2", "--lr", "1e-3", *options]
        run = subprocess.run(
            [sys.executable, "-m", "medmax_fast", "train", *words],
            capture_output=True,
            text=True,
            timeout=240,
            env=alone,
        )
        assert run.returncode == 0, run.stderr[-3000:]
        lines = (tmp_path / device / "metrics.jsonl").read_text().splitlines()
        losses[device] = [json.loads(line)["loss"] for line in lines]
    assert len(losses["cuda"]) == 4 and losses["cuda"][-1] < losses["cuda"][0]
    # An adapter starts from other random numbers on a GPU.
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3 if "--full" in options else 0.02), losses
