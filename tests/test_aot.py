"""Every kernel compiled ahead of time for sm_80 and sm_90, no GPU needed: registers, spills, instructions.

The compilation runs in processes of their own (this file as a script, one for each target), because the interpreter
that the other tests use replaces the compiler when triton is imported.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language")

CAPABILITIES = (80, 90)
# Kernel variants as a launch makes them. "aligned": contiguous tensors with sizes divisible by 16, which triton
# specialises; "general": odd sizes and strides; "ones": triton makes a constant of every argument that equals 1.
# A case is the operation, its element type(s), the arguments that are constants, and those divisible by 16.
VQ_STRIDES = ("stride_zn", "stride_zd", "stride_ek", "stride_ed")
VQ_STATS = ("stats_ptr", "z_stats_ptr", "e_stats_ptr", "longest_ptr", "z_norm_ptr", "e_norm_ptr")
VQ_ALIGNED = ("x_ptr", "z_ptr", "e_ptr", *VQ_STATS, "rows_ptr", "count_ptr", "out_ptr", "N", "stride_zn", "stride_ek")
SPAN_ALIGNED = ("out_ptr", "starts_ptr", "codes_ptr", "bad_ptr", "P", "stride_n")
SHIFT_SIZES = ("size", "low", "high", "shift")
SPAN_SIZES = ("T", "P", "boi", "eoi", "image_start", "num_codes", "stride_t", "stride_n", "stride_p")
GROUP_SIZES = ("HW", "chunks", "chunk_rows", "program_rows", "stride_xb", "stride_xr")
GROUP_ALIGNED = ("x_ptr", "weight_ptr", "bias_ptr", "mean_ptr", "m2_ptr", "out_ptr", *GROUP_SIZES[2:], "HW")
RESAMPLE_ALIGNED = ("pixels_ptr", "table_ptr", "taps_ptr", "mid_ptr", "values_ptr", "out_ptr")
CASES = {
    "shift_i64_u16": ("shift", ("i64", "u16"), {}, ("in_ptr", "out_ptr", "bad_ptr", "size")),
    "shift_u16_i64": ("shift", ("u16", "i64"), {}, ("in_ptr", "out_ptr", "bad_ptr")),
    "shift_i32_i32": ("shift", ("i32", "i32"), {}, ()),
    "shift_ones": ("shift", ("i64", "i64"), dict.fromkeys(SHIFT_SIZES, 1), ()),
    "span_i64": ("span", "i64", {"stride_t": 1, "stride_p": 1}, SPAN_ALIGNED),
    "span_u16": ("span", "u16", {"stride_t": 1, "stride_p": 1}, SPAN_ALIGNED),
    "span_general": ("span", "i32", {}, ()),
    "span_ones": ("span", "i64", dict.fromkeys(SPAN_SIZES, 1), ()),
    # S of the columns kernel is never specialised.
    "columns_aligned": ("columns", "u8", {}, RESAMPLE_ALIGNED),
    "columns_general": ("columns", "u8", {}, ()),
    "rows_fp32": ("rows", "fp32", {}, (*RESAMPLE_ALIGNED, "S")),
    "rows_bf16": ("rows", "bf16", {}, (*RESAMPLE_ALIGNED, "S")),
    "rows_u8": ("rows", "u8", {}, (*RESAMPLE_ALIGNED, "S")),
    "rows_general": ("rows", "fp16", {}, ()),
    "rows_ones": ("rows", "fp16", {"S": 1}, RESAMPLE_ALIGNED),
}


# Nearest code: element type, constants, aligned or not. Each is three kernels: rounding losses, screen, search.
VQ_ONES = {"stride_d": 1, "stride_zd": 1, "stride_ed": 1}
VQ_CASES = {
    "aligned_d256": ("fp32", VQ_ONES | {"K": 8192, "D": 256}, (*VQ_ALIGNED, "stride_n")),
    "aligned_d32": ("fp32", VQ_ONES | {"K": 8192, "D": 32}, (*VQ_ALIGNED, "stride_n")),
    "unaligned_d250": ("fp32", VQ_ONES | {"K": 1000, "D": 250}, ()),
    "general_d250": ("fp32", {"K": 1000, "D": 250}, ()),
    "half_d256": ("bf16", VQ_ONES | {"K": 8192, "D": 256}, (*VQ_ALIGNED, "stride_n")),
    "ones": ("fp32", VQ_ONES | dict.fromkeys(("N", "K", "id_offset", *VQ_STRIDES, "stride_n", "D"), 1), ()),
}
CASES |= {f"{op}_{name}": (op, *case) for op in ("vqmeasure", "vqscreen", "vq") for name, case in VQ_CASES.items()}

# GroupNorm: types of input and affine part, then channels, groups and pixels. The widths of the real encoder, of the
# small one, odd ones, one group, ones. Each is two kernels.
GROUP_CASES = {
    "fp16_c128": ("fp16", "fp32", 128, 32, 1 << 18),
    "fp16_c512": ("fp16", "fp32", 512, 32, 1 << 10),
    "fp32_c256": ("fp32", "fp32", 256, 32, 1 << 14),
    "bf16_c32": ("bf16", "bf16", 32, 32, 1 << 18),
    "fp32_c96": ("fp32", "fp32", 96, 32, 1000),
    "fp32_c4096": ("fp32", "fp32", 4096, 1, 1 << 18),
    "fp32_ones": ("fp32", "fp32", 1, 1, 1),
}
for _name, _types in GROUP_CASES.items():
    _ones = dict.fromkeys(GROUP_SIZES, 1) if _name == "fp32_ones" else {}
    _aligned = () if _name in ("fp32_c96", "fp32_ones") else GROUP_ALIGNED
    CASES[f"group_{_name}"] = ("group", _types, _ones | {"SILU": _name != "fp16_c512"}, _aligned)
    CASES[f"groupstats_{_name}"] = ("groupstats", _types, _ones, _aligned)


@triton.jit
def tf32_product(a_ptr, b_ptr, out_ptr, SIDE: tl.constexpr):
    """What the exact kernel must not become: shows that a tensor-core instruction would be seen."""
    at = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), input_precision="tf32"))


def kernel_and_types(op, types):
    """The kernel, the types of its run-time arguments and its launch options, as its launcher sets them."""
    from medmax_fast.kernels import remap

    if op.startswith("vq"):
        return vq_kernel_and_types(op, types)
    if op == "shift":
        pointers = {"in_ptr": f"*{types[0]}", "out_ptr": f"*{types[1]}", "bad_ptr": "*i64"}
        integers = dict.fromkeys(SHIFT_SIZES, "i32")
        return remap._shift_kernel, pointers | integers, {"BLOCK": remap.SHIFT_BLOCK}, remap.OPTIONS
    if op in ("group", "groupstats"):
        return group_norm_kernel_and_types(op, *types)
    if op in ("columns", "rows"):
        return resample_kernel_and_types(op, types)
    pointers = {"out_ptr": f"*{types}", "starts_ptr": "*i64", "codes_ptr": "*i64", "bad_ptr": "*i64"}
    integers = dict.fromkeys(SPAN_SIZES, "i32")
    return remap._span_kernel, pointers | integers, {"BLOCK": remap.SPAN_BLOCK}, remap.OPTIONS


def vq_kernel_and_types(op, element):
    from medmax_fast.kernels import vq

    pointers = dict.fromkeys(("x_ptr", "z_ptr", "e_ptr"), f"*{element}") | dict.fromkeys(VQ_STATS, "*fp32")
    pointers |= {"rows_ptr": "*i32", "count_ptr": "*i32", "out_ptr": "*i64"}
    types = pointers | dict.fromkeys(("N", "id_offset", *VQ_STRIDES, "stride_n", "stride_d"), "i32")
    return {
        "vqmeasure": (vq._measure_rows_kernel, types, vq.MEASURE, vq.MEASURE_OPTIONS),
        "vqscreen": (vq._screen_kernel, types, vq.SCREEN, vq.SCREEN_OPTIONS),
        "vq": (vq._nearest_code_kernel, types, vq.SEARCH, vq.SEARCH_OPTIONS),
    }[op]


def group_norm_kernel_and_types(op, element, affine, channels, groups, pixels):
    from medmax_fast.kernels import group_norm

    constants, _, chunks = group_norm._plan(channels, groups, pixels)
    pointers = {"x_ptr": f"*{element}", "out_ptr": f"*{element}", "mean_ptr": "*fp32", "m2_ptr": "*fp32"}
    pointers |= {"weight_ptr": f"*{affine}", "bias_ptr": f"*{affine}", "eps": "fp32"}
    if op == "groupstats":
        kernel = group_norm._group_statistics_kernel
    else:
        kernel, constants = group_norm._group_norm_kernel, constants | {"CHUNKS_P": triton.next_power_of_2(chunks)}
    return kernel, pointers | dict.fromkeys(GROUP_SIZES, "i32"), constants, group_norm.OPTIONS


def resample_kernel_and_types(op, element):
    from medmax_fast.kernels import resample

    pointers = {"pixels_ptr": "*u8", "table_ptr": "*i64", "taps_ptr": "*i32", "mid_ptr": "*u8", "S": "i32"}
    pointers |= {"values_ptr": f"*{element}", "out_ptr": f"*{element}"}
    blocks = {"FIELDS": resample.FIELDS, "BLOCK_ROWS": resample.BLOCK_ROWS, "BLOCK_J": resample.BLOCK_J}
    kernel = resample._columns_kernel if op == "columns" else resample._rows_kernel
    assert [p.name for p in resample._columns_kernel.params if p.do_not_specialize] == ["S"]
    return kernel, pointers, blocks, resample.OPTIONS


def compile_case(case, capability):
    """Compile one variant of CASES as a launch would."""
    op, types, constants, aligned = CASES[case]
    kernel, signature, blocks, options = kernel_and_types(op, types)
    constants = {name: value for name, value in (constants | blocks).items() if name in kernel.arg_names}
    aligned = [name for name in aligned if name in kernel.arg_names]
    return inspect_kernel(kernel, signature, constants, aligned, options, capability)


def inspect_kernel(kernel, signature, constants, aligned, options, capability):
    """Compile; registers, bytes of stack (spills, as no kernel has arrays), shared memory, counts of instructions."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {n: "constexpr" if n in constants else signature[n] for n in kernel.arg_names}
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [cuobjdump, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    # The PTX opcode is what follows the indentation and an optional predicate.
    opcodes = re.findall(r"^\s+(?:@!?%p\d+ )?([a-z]\w*)\.", compiled.asm["ptx"], re.M)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "stack": int(re.search(r"STACK:(\d+)", usage).group(1)) + int(re.search(r"LOCAL:(\d+)", usage).group(1)),
        "shared": compiled.metadata.shared,
        "opcodes": {name: opcodes.count(name) for name in ("fma", "mma", "wgmma", "atom", "red", "ld", "st")},
    }


@pytest.fixture(scope="module")
def compiled(tmp_path_factory, request):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(request.config.rootpath)
    # An empty cache, so that the compiler really runs.
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    runs = [
        subprocess.Popen(
            [sys.executable, __file__, str(capability)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for capability in CAPABILITIES
    ]
    results = {}
    for run in runs:
        output, errors = run.communicate()
        assert run.returncode == 0, errors[-4000:]
        results |= json.loads(output.splitlines()[-1])
    return results


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("case", CASES)
def test_compiles_without_spills(compiled, case, capability):
    found = compiled[f"{case}/{capability}"]
    assert 0 < found["registers"] <= 255
    assert found["stack"] == 0, f"{case} for sm_{capability} spills: {found}"
    # Within the 48 KB that every GPU grants without an opt-in; the screen within the 99 KB that every one since Ampere
    # grants with it, on Hopper within half of the 227 KB.
    limit = {80: 99, 90: 113}[capability] if case.startswith("vqscreen") else 48
    assert found["shared"] <= limit * 1024


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("case", VQ_CASES)
def test_vq_products(compiled, case, capability):
    # The search is exact fp32: fused multiply-adds, and no tensor-core instruction (they would round the inputs). The
    # screen is on tensor cores: mma on Ampere, wgmma on Hopper, and no fp32 product beside it.
    search, screen = (compiled[f"{op}_{case}/{capability}"]["opcodes"] for op in ("vq", "vqscreen"))
    assert search["fma"] >= (16 * 16 if case != "ones" else 16)
    assert search["mma"] == search["wgmma"] == 0
    assert screen["wgmma" if capability == 90 else "mma"] > 0 and screen["fma"] < 16 * 16


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("case", [case for case in CASES if case.startswith(("columns", "rows"))])
def test_resample_leaves_room_for_many_programs(compiled, case, capability):
    found = compiled[f"{case}/{capability}"]
    assert found["registers"] <= 64
    # The gather must not exchange its weights at each tap, nor the bytes be laid out for the store of the result.
    assert found["shared"] == 0 or case.startswith("rows")


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_counts_see_what_they_should(compiled, capability):
    # Guards the two tests above against a pattern that matches nothing.
    for case in CASES:
        opcodes = compiled[f"{case}/{capability}"]["opcodes"]
        assert opcodes["ld"] > 0 and opcodes["st"] > 0
        if case.startswith(("shift", "span")):
            assert opcodes["atom"] + opcodes["red"] > 0
            assert compiled[f"{case}/{capability}"]["registers"] <= 64
    tensor_core = compiled[f"tf32_product/{capability}"]["opcodes"]
    assert tensor_core["mma"] + tensor_core["wgmma"] > 0


def test_every_kernel_is_compiled():
    sources = Path(__file__).resolve().parents[1] / "kernels"
    kernels = {name for file in sources.glob("*.py") for name in re.findall(r"def (_\w+_kernel)\(", file.read_text())}
    assert kernels == {
        "_measure_rows_kernel",
        "_screen_kernel",
        "_nearest_code_kernel",
        "_shift_kernel",
        "_span_kernel",
        "_group_statistics_kernel",
        "_group_norm_kernel",
        "_columns_kernel",
        "_rows_kernel",
    }


if __name__ == "__main__":
    target = int(sys.argv[1])
    report = {f"{case}/{target}": compile_case(case, target) for case in CASES}
    pointers = dict.fromkeys(("a_ptr", "b_ptr", "out_ptr"), "*fp32")
    report[f"tf32_product/{target}"] = inspect_kernel(tf32_product, pointers, {"SIDE": 64}, (), {}, target)
    print(json.dumps(report))
