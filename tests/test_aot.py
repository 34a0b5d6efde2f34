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
VQ_ALIGNED = ("z_ptr", "e_ptr", "norm_ptr", "out_ptr", "N", "stride_zn", "stride_ek")
SPAN_ALIGNED = ("out_ptr", "starts_ptr", "codes_ptr", "bad_ptr", "P", "stride_n")
SHIFT_SIZES = ("size", "low", "high", "shift")
SPAN_SIZES = ("T", "P", "boi", "eoi", "image_start", "num_codes", "stride_t", "stride_n", "stride_p")
CASES = {
    "vq_aligned_d256": ("vq", "fp32", {"stride_zd": 1, "stride_ed": 1, "K": 8192, "D": 256}, VQ_ALIGNED),
    "vq_aligned_d32": ("vq", "fp32", {"stride_zd": 1, "stride_ed": 1, "K": 8192, "D": 32}, VQ_ALIGNED),
    "vq_general_d250": ("vq", "fp32", {"K": 1000, "D": 250}, ()),
    "vq_half_d256": ("vq", "bf16", {"stride_zd": 1, "stride_ed": 1, "K": 8192, "D": 256}, VQ_ALIGNED),
    "vq_ones": ("vq", "fp32", dict.fromkeys(("N", "K", "id_offset", *VQ_STRIDES, "D"), 1), ()),
    "shift_i64_u16": ("shift", ("i64", "u16"), {}, ("in_ptr", "out_ptr", "bad_ptr", "size")),
    "shift_u16_i64": ("shift", ("u16", "i64"), {}, ("in_ptr", "out_ptr", "bad_ptr")),
    "shift_i32_i32": ("shift", ("i32", "i32"), {}, ()),
    "shift_ones": ("shift", ("i64", "i64"), dict.fromkeys(SHIFT_SIZES, 1), ()),
    "span_i64": ("span", "i64", {"stride_t": 1, "stride_p": 1}, SPAN_ALIGNED),
    "span_u16": ("span", "u16", {"stride_t": 1, "stride_p": 1}, SPAN_ALIGNED),
    "span_general": ("span", "i32", {}, ()),
    "span_ones": ("span", "i64", dict.fromkeys(SPAN_SIZES, 1), ()),
}


@triton.jit
def tf32_product(a_ptr, b_ptr, out_ptr, SIDE: tl.constexpr):
    """What the exact kernel must not become: shows that a tensor-core instruction would be seen."""
    at = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), input_precision="tf32"))


def kernel_and_types(op, types):
    """The kernel, the types of its run-time arguments and its launch options, as its launcher sets them."""
    from medmax_fast.kernels import remap, vq

    if op == "vq":
        pointers = {"z_ptr": f"*{types}", "e_ptr": f"*{types}", "norm_ptr": "*fp32", "out_ptr": "*i64"}
        integers = dict.fromkeys(("N", "id_offset", *VQ_STRIDES), "i32")
        blocks = {"BLOCK_N": vq.BLOCK_N, "BLOCK_K": vq.BLOCK_K, "BLOCK_D": vq.BLOCK_D}
        options = {"num_warps": vq.NUM_WARPS, "num_stages": vq.NUM_STAGES, "enable_fp_fusion": True}
        return vq._nearest_code_kernel, pointers | integers, blocks, options
    if op == "shift":
        pointers = {"in_ptr": f"*{types[0]}", "out_ptr": f"*{types[1]}", "bad_ptr": "*i64"}
        integers = dict.fromkeys(SHIFT_SIZES, "i32")
        return remap._shift_kernel, pointers | integers, {"BLOCK": remap.SHIFT_BLOCK}, remap.OPTIONS
    pointers = {"out_ptr": f"*{types}", "starts_ptr": "*i64", "codes_ptr": "*i64", "bad_ptr": "*i64"}
    integers = dict.fromkeys(SPAN_SIZES, "i32")
    return remap._span_kernel, pointers | integers, {"BLOCK": remap.SPAN_BLOCK}, remap.OPTIONS


def compile_case(case, capability):
    """Compile one variant of CASES as a launch would."""
    op, types, constants, aligned = CASES[case]
    kernel, signature, blocks, options = kernel_and_types(op, types)
    return inspect_kernel(kernel, signature, constants | blocks, aligned, options, capability)


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
    # Within the 48 KB that every GPU grants without an opt-in.
    assert found["shared"] <= 48 * 1024


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("vq")])
def test_vq_product_is_fp32(compiled, case, capability):
    # Exact fp32: fused multiply-adds, and no tensor-core instruction (they would round the inputs to TF32).
    opcodes = compiled[f"{case}/{capability}"]["opcodes"]
    assert opcodes["fma"] >= (16 * 32 if case != "vq_ones" else 32)
    assert opcodes["mma"] == opcodes["wgmma"] == 0


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_counts_see_what_they_should(compiled, capability):
    # Guards the two tests above against a pattern that matches nothing.
    for case in CASES:
        opcodes = compiled[f"{case}/{capability}"]["opcodes"]
        assert opcodes["ld"] > 0 and opcodes["st"] > 0
        if not case.startswith("vq"):
            assert opcodes["atom"] + opcodes["red"] > 0
            assert compiled[f"{case}/{capability}"]["registers"] <= 64
    tensor_core = compiled[f"tf32_product/{capability}"]["opcodes"]
    assert tensor_core["mma"] + tensor_core["wgmma"] > 0


def test_every_kernel_is_compiled():
    sources = Path(__file__).resolve().parents[1] / "kernels"
    kernels = {name for file in sources.glob("*.py") for name in re.findall(r"def (_\w+_kernel)\(", file.read_text())}
    assert kernels == {"_nearest_code_kernel", "_shift_kernel", "_span_kernel"}


if __name__ == "__main__":
    target = int(sys.argv[1])
    report = {f"{case}/{target}": compile_case(case, target) for case in CASES}
    pointers = dict.fromkeys(("a_ptr", "b_ptr", "out_ptr"), "*fp32")
    report[f"tf32_product/{target}"] = inspect_kernel(tf32_product, pointers, {"SIDE": 64}, (), {}, target)
    print(json.dumps(report))
