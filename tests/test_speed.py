"""MFU: its FLOP are those that torch counts, its peaks those of the card in the machine and of no other."""

import resource
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import ChameleonConfig, ChameleonForConditionalGeneration, ChameleonVQVAEConfig

from medmax_fast.model.layout import ModelShape
from medmax_fast.training.speed import (
    flops_per_token,
    linear_parameters,
    mfu,
    peak_flops,
    peak_memory_gib,
    peak_of_name,
)

SEVEN_B = ModelShape(dim=4096, layers=32, heads=32, kv_heads=32, hidden=11008, vocab_size=65536)
SHAPES = [
    SEVEN_B,
    ModelShape(dim=48, layers=3, heads=6, kv_heads=6, hidden=80, vocab_size=300),
    ModelShape(dim=64, layers=2, heads=8, kv_heads=2, hidden=96, vocab_size=101),
]
TF = 1e12


def build(shape: ModelShape, device: str):
    """transformers' own model of a shape."""
    config = ChameleonConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.dim,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        bos_token_id=0,
        vocabulary_map={"<image>": 5, "IMGIMGBS": 6},
        vq_config=ChameleonVQVAEConfig(base_channels=32, channel_multiplier=[1], num_res_blocks=1).to_dict(),
        attn_implementation="eager",
    )
    with torch.device(device):
        model = ChameleonForConditionalGeneration(config)
    model.model.vqmodel = None
    return model


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"dim{shape.dim}")
def test_parameters_are_those_of_the_linear_layers(shape):
    model = build(shape, "meta")
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    linear = sum(m.weight.numel() for m in model.model.modules() if isinstance(m, nn.Linear))
    assert linear_parameters(shape) == (linear, model.lm_head.weight.numel())
    # Nothing but the embedding and vectors is left over.
    others = [p for p in model.parameters() if p.ndim == 1 or p.shape == (shape.heads, shape.head_dim)]
    others += [
        p for p in model.parameters() if shape.kv_heads < shape.heads and p.shape == (shape.kv_heads, shape.head_dim)
    ]
    total = sum(p.numel() for p in model.parameters())
    assert sum(linear_parameters(shape)) == total - shape.vocab_size * shape.dim - sum(p.numel() for p in others)


def test_seven_billion():
    blocks, head = linear_parameters(SEVEN_B)
    norms = 65 * 4096 + 32 * 4 * 4096
    assert blocks + head == 6_744_440_832 == 7_013_666_816 - 65536 * 4096 - norms
    assert flops_per_token(SEVEN_B, full=False) == 4 * 6_744_440_832
    assert flops_per_token(SEVEN_B, full=True) == 6 * 6_744_440_832
    assert flops_per_token(SEVEN_B, False, head_share=0.25) == 4 * (6_476_005_376 + 65536 * 4096 / 4)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("shape", SHAPES[1:], ids=lambda shape: f"dim{shape.dim}")
def test_flop_are_what_torch_counts(shape, full):
    """One step of a real model; attention's own products are batched ones, the linear layers' are not."""
    model, length = build(shape, "cpu"), 24
    ids = torch.randint(10, shape.vocab_size, (1, length))
    embedded = model.model.embed_tokens(ids).detach().requires_grad_()
    model.requires_grad_(full)
    with FlopCounterMode(display=False) as counter:
        hidden = model.model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        model.lm_head(hidden).float().logsumexp(-1).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    linear = sum(flop for operation, flop in counts.items() if "bmm" not in str(operation))
    assert linear < sum(counts.values())
    assert linear == length * flops_per_token(shape, full)


@pytest.mark.parametrize(
    ("name", "half", "single"),
    [
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA A100-SXM4-40GB", 312, 19.5),
        ("NVIDIA A100 80GB PCIe", 312, 19.5),
        ("A100-PCIE-40GB", 312, 19.5),
        ("NVIDIA H100 80GB HBM3", 989, 67),
        ("NVIDIA H100 PCIe", 756, 51),
        ("NVIDIA H100 NVL", 835, 60),
        ("NVIDIA H200", 989, 67),
        ("NVIDIA H200 NVL", 835, 60),
        ("NVIDIA GH200 480GB", 989, 67),
        ("NVIDIA B200", 2250, None),
        ("NVIDIA GB200", 2500, None),
        ("NVIDIA L40S", 362, 91.6),
        ("NVIDIA L40", 181, 90.5),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA A10", 125, 31.2),
        ("NVIDIA A10G", 70, None),
        ("NVIDIA A40", 149.7, 37.4),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
    ],
)
def test_peaks_by_name(name, half, single):
    assert peak_of_name(name, torch.bfloat16) == peak_of_name(name, torch.float16) == pytest.approx(half * TF)
    found = peak_of_name(name, torch.float32)
    assert found == (None if single is None else pytest.approx(single * TF))
    assert peak_of_name(name, torch.float64) is None


@pytest.mark.parametrize(
    "name",
    [
        "",
        "NVIDIA",
        "NVIDIA A100X",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "NVIDIA H1000",
        "NVIDIA H20",
        "NVIDIA A10M",
        "NVIDIA L400",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
        "Tesla V100-SXM2-16GB",
        "AMD Instinct MI300X",
    ],
)
def test_no_peak_for_other_cards(name):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert peak_of_name(name, dtype) is None


def test_no_peak_on_a_cpu():
    assert peak_flops(torch.device("cpu"), torch.float32) is None


def test_peak_asks_the_device(monkeypatch):
    names = {0: "NVIDIA L4", 1: "NVIDIA H200"}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[device.index])
    assert peak_flops(torch.device("cuda", 1), torch.bfloat16) == 989 * TF
    assert peak_flops(torch.device("cuda", 0), torch.bfloat16) == 121 * TF


def test_utilization():
    assert mfu(10_000, 4 * 7e9, 560 * TF, 1) == pytest.approx(0.5)
    assert mfu(10_000, 4 * 7e9, 560 * TF, 8) == pytest.approx(0.0625)
    assert mfu(10_000, 4 * 7e9, None, 8) is None


def test_memory_of_a_process():
    values = torch.ones(2**24)
    before = peak_memory_gib(torch.device("cpu"))
    kept = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    assert values.nbytes / 2**30 < before <= kept + 0.01
    del values
    # The kernel counts pages per core and adds them up now and then.
    assert peak_memory_gib(torch.device("cpu")) > before - 0.01


def test_memory_of_the_parent_is_not_counted():
    held = torch.ones(2**28)
    code = "import torch; from medmax_fast.training.speed import peak_memory_gib as f; print(f(torch.device('cpu')))"
    child = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60)
    assert 0.05 < float(child.stdout) < held.nbytes / 2**30


@pytest.mark.gpu
def test_memory_of_a_gpu():
    device = torch.device("cuda", 0)
    torch.cuda.reset_peak_memory_stats(device)
    values = torch.ones(2**26, device=device)
    before = peak_memory_gib(device)
    del values
    assert 0.25 <= before == peak_memory_gib(device)
