"""The table of block sizes: which entry a device takes, that it costs nothing, that launches use it, its evidence."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medmax_fast.kernels import (
    cross_entropy,
    group_norm,
    lora,
    norm_rope_store,
    paged_attention,
    qk_norm_rope,
    remap,
    resample,
    rms_norm,
    swiglu,
    vq,
)
from medmax_fast.kernels.blocks import OPTIONS, TABLE, Entry, blocks, entry, override

ROOT = Path(__file__).resolve().parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu(required=False)
GPU = (torch.device("cuda", 0), torch.device("cuda", 1))


@pytest.fixture()
def table(monkeypatch):
    """A table with different numbers on every card, and no entry found before."""
    numbers = {80: Entry("a", BLOCK=1, num_warps=8), 90: Entry("b", BLOCK=2, num_warps=8), 100: Entry("c", BLOCK=3)}
    monkeypatch.setattr("medmax_fast.kernels.blocks.TABLE", {"op": numbers})
    monkeypatch.setattr("medmax_fast.kernels.blocks._found", {})
    return numbers


@pytest.mark.parametrize(
    ("capability", "taken"),
    [(80, 80), (86, 80), (89, 80), (90, 90), (100, 100), (103, 100), (120, 100), (75, 80)],
)
def test_a_capability_takes_the_nearest_lower_entry_else_the_lowest(table, capability, taken):
    assert entry("op", capability) is table[taken]


def test_each_gpu_has_its_own_numbers_and_is_asked_once(table, monkeypatch):
    asked = []

    def capability(device):
        asked.append(device)
        return {0: (8, 0), 1: (10, 3)}[device.index]

    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    for _ in range(3):
        assert blocks("op", GPU[0]) == {"BLOCK": 1, "num_warps": 8}
        assert blocks("op", GPU[1]) == {"BLOCK": 3}
    assert asked == list(GPU)


def test_the_interpreter_takes_the_entry_of_hopper(table):
    assert blocks("op", torch.device("cpu")) == table[90].numbers


def test_what_a_launch_does_with_its_numbers_does_not_reach_the_table(table):
    numbers = blocks("op", torch.device("cpu"))
    numbers["BLOCK"] = 17
    del numbers["num_warps"]
    assert blocks("op", torch.device("cpu")) == {"BLOCK": 2, "num_warps": 8} == table[90].numbers


def test_override_nests_and_ends(table):
    cpu = torch.device("cpu")
    with override("op", BLOCK=5):
        assert blocks("op", cpu) == {"BLOCK": 5, "num_warps": 8}
        with override("op", num_warps=1, maxnreg=64):
            assert blocks("op", cpu) == {"BLOCK": 5, "num_warps": 1, "maxnreg": 64}
        assert blocks("op", cpu) == {"BLOCK": 5, "num_warps": 8}
    assert blocks("op", cpu) == {"BLOCK": 2, "num_warps": 8}
    with pytest.raises(RuntimeError, match="inside"), override("op", BLOCK=5):
        raise RuntimeError("inside")
    assert blocks("op", cpu) == {"BLOCK": 2, "num_warps": 8}
    with pytest.raises(ValueError, match="op: BLOK, expected some of BLOCK, num_warps"):
        override("op", BLOK=5)
    with pytest.raises(KeyError):
        override("other", BLOCK=5)


def test_importing_the_kernels_asks_no_gpu_and_compiles_nothing():
    code = """
import torch

def no(*_):
    raise AssertionError("asked at import")

torch.cuda._lazy_init = torch.cuda.get_device_capability = torch.cuda.get_device_properties = no
import triton
triton.compile = no
from medmax_fast.kernels import {names}
from medmax_fast.kernels.blocks import _found
assert not torch.cuda.is_initialized() and not _found
"""
    names = sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))
    assert "blocks" in names and "vq" in names
    subprocess.run([sys.executable, "-c", code.format(names=", ".join(names))], check=True, cwd=ROOT, timeout=120)


def test_every_entry_is_read_by_a_launch():
    sources = [path.read_text() for path in (ROOT / "kernels").glob("*.py")]
    assert {op for source in sources for op in re.findall(r'\bblocks\("(\w+)"', source)} == set(TABLE)


def test_evidence_is_a_results_file_of_that_card():
    for op, entries in TABLE.items():
        assert min(entries) == 80 and list(entries) == sorted(entries)
        for capability, found in entries.items():
            (name,) = re.findall(r"[\w.-]+\.json", found.evidence)
            results = json.loads((ROOT / "benchmarks" / "results" / name).read_text())
            if found.evidence.startswith("not measured"):
                assert results["benchmark"] == "aot" and results["spills"] == []
                assert capability in {row["sm"] for row in results["rows"]}, (op, capability)
            else:
                card = results["environment"]["gpu"]["capability"]
                assert card == f"{capability // 10}.{capability % 10}" and op in {row["op"] for row in results["rows"]}


def random(*shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def call_paged():
    q, pages = random(1, 2, 16), [random(4, 2, 16, 16) for _ in range(2)]
    table = torch.arange(4, device=DEVICE, dtype=torch.int32).view(1, 4)
    lengths = torch.tensor([50], device=DEVICE, dtype=torch.int32)
    paged_attention.paged_attention(q, *pages, table, lengths, impl="triton")


def call_store():
    affine = [random(2, 16) for _ in range(4)]
    places = torch.arange(3, device=DEVICE)
    pages = random(1, 2, 4, 16), random(1, 2, 4, 16)
    tables = random(3, 8), random(3, 8)
    norm_rope_store.norm_rope_store(random(3, 96), *affine, *tables, places, places, *pages, impl="triton")


def call_resample():
    taps = torch.zeros(4, device="cpu", dtype=torch.int32), torch.full((4, 1), 1 << 22, dtype=torch.int32)
    plan = resample.plan_resample([(4, 4)], [taps], [taps])
    pixels = torch.zeros(48, dtype=torch.uint8, device=DEVICE)
    resample.resample(pixels, plan, torch.arange(256, dtype=torch.float32, device=DEVICE), impl="triton")


def call_spans():
    out, codes = torch.zeros(20, dtype=torch.int64, device=DEVICE), torch.zeros(1, 9, dtype=torch.int64, device=DEVICE)
    remap.write_image_spans(out, torch.zeros(1, dtype=torch.int64, device=DEVICE), codes, 1, 2, 3, impl="triton")


def call_vq():
    vq.nearest_code(random(9, 8), random(5, 8), impl="triton")


def call_shift():
    remap.codes_to_ids(torch.zeros(9, dtype=torch.int64, device=DEVICE), 4, impl="triton")


def call_group_norm():
    x = random(1, 32, 4, 4).to(memory_format=torch.channels_last)
    group_norm.group_norm_silu(x, random(32), random(32), 4, 1e-6, impl="triton")


def call_norm_rope():
    qk_norm_rope.norm_rope(random(3, 5, 16), random(16), random(16), random(3, 8), random(3, 8), impl="triton")


def call_cross_entropy():
    cross_entropy.cross_entropy_(random(3, 100), torch.zeros(3, dtype=torch.int64, device=DEVICE), impl="triton")


def call_rms_norm():
    rms_norm.rms_norm(random(5, 64), random(64), 1e-5, impl="triton")


def call_swiglu():
    swiglu.swiglu(random(5, 64), random(5, 64), impl="triton")


def call_lora():
    x, a = random(5, 64).requires_grad_(), random(4, 64).requires_grad_()
    lora.lora_linear(x, random(8, 64), a, random(8, 4), 1.0, 0.5, seed=1, impl="triton").sum().backward()


# Kernel of the table, file, function, a call; numbers, and what the launch then has.
LAUNCHES = [
    ("vq_measure", vq, "_measure_rows_kernel", call_vq, {"BLOCK_N": 16}, {"BLOCK_N": 16, "BLOCK_D": 64}),
    ("vq_screen", vq, "_screen_kernel", call_vq, {"BLOCK_N": 64, "maxnreg": 128}, {"BLOCK_N": 64, "maxnreg": 128}),
    ("vq_search", vq, "_nearest_code_kernel", call_vq, {"BLOCK_K": 32}, {"BLOCK_K": 32, "BLOCK_N": 32}),
    ("shift", remap, "_shift_kernel", call_shift, {"BLOCK": 512}, {"BLOCK": 512}),
    ("span", remap, "_span_kernel", call_spans, {"BLOCK": 512}, {"BLOCK": 512}),
    ("resample", resample, "_rows_kernel", call_resample, {"BLOCK_J": 128}, {"BLOCK_J": 128}),
    ("group_norm", group_norm, "_group_norm_kernel", call_group_norm, {"TILE": 2048}, {"BLOCK_R": 64}),
    ("norm_rope", qk_norm_rope, "_norm_rope_kernel", call_norm_rope, {"TILE": 64}, {"BLOCK_T": 4, "HEADS": 8}),
    ("cross_entropy", cross_entropy, "_cross_entropy_kernel", call_cross_entropy, {"BLOCK": 64}, {"BLOCK": 64}),
    ("rms_norm", rms_norm, "_rms_norm_kernel", call_rms_norm, {"WARP": 512}, {"BLOCK_R": 16, "num_warps": 2}),
    ("swiglu", swiglu, "_swiglu_kernel", call_swiglu, {"TILE": 2048}, {"BLOCK_R": 32}),
    ("lora_down", lora, "_lora_down_kernel", call_lora, {"BLOCK_T": 64}, {"BLOCK_T": 32, "BLOCK_R": 16}),
    ("lora_weight", lora, "_lora_weight_kernel", call_lora, {"BLOCK_K": 64}, {"BLOCK_K": 32, "PARTS": 16}),
    ("lora_input", lora, "_lora_input_kernel", call_lora, {"BLOCK_K": 64}, {"BLOCK_K": 32, "BLOCK_T": 16}),
    ("norm_rope_store", norm_rope_store, "_norm_rope_store_kernel", call_store, {"TILE": 64}, {"BLOCK_H": 4}),
    ("paged_attention", paged_attention, "_paged_attention_kernel", call_paged, {"TILE": 256}, {"BLOCK_P": 4}),
    ("paged_combine", paged_attention, "_combine_splits_kernel", call_paged, {"num_warps": 1}, {"num_warps": 1}),
    ("paged_splits", paged_attention, "_combine_splits_kernel", call_paged, {"MAX_SPLITS": 2}, {"BLOCK_S": 2}),
]


@pytest.mark.parametrize(
    ("op", "file", "name", "call", "numbers", "expected"), LAUNCHES, ids=[launch[0] for launch in LAUNCHES]
)
def test_a_launch_has_the_numbers_of_the_table_or_the_override(op, file, name, call, numbers, expected, monkeypatch):
    kernel, launches = getattr(file, name), []

    class Recorded:
        def __getitem__(self, grid):
            def launch(*arguments, **settings):
                launches.append(settings)
                return kernel[grid](*arguments, **settings)

            return launch

    monkeypatch.setattr(file, name, Recorded())
    call()
    with override(op, **numbers):
        call()
    plain, other = launches[0], launches[-1]
    assert {key: other[key] for key in expected} == expected
    assert any(plain.get(key) != value for key, value in expected.items())
    current = blocks(op, torch.device(DEVICE, 0))
    assert all(plain[key] == current[key] for key in OPTIONS if key in current)
    assert plain["enable_fp_fusion"] is other["enable_fp_fusion"] is True


def test_every_kernel_of_the_table_is_launched_above():
    assert {launch[0] for launch in LAUNCHES} == set(TABLE)
