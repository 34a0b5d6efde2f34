"""Every kernel compiled ahead of time for sm_80 and sm_90, no GPU needed: registers, spills, instructions.

The compilation runs in processes of their own (this file as a script, one for each target), because the interpreter
that the other tests use replaces the compiler when triton is imported.
"""

import fcntl
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
ROPE_STRIDES = ("stride_xt", "stride_xh", "stride_dt", "stride_dh", "stride_ct", "stride_st")
ROPE_SIZES = ("T", "H", *ROPE_STRIDES, "stride_cf", "stride_sf")
ROPE_INPUTS = ("x_ptr", "weight_ptr", "bias_ptr", "cos_ptr", "sin_ptr")
ROPE_OUTPUTS = ("out_ptr", "dout_ptr", "dx_ptr", "dweight_ptr", "dbias_ptr")
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

# LayerNorm and RoPE of each head: types of input, affine part and cosines, then D, whether each head has an affine part
# of its own, gradients that are not wanted; "general" has odd strides, of the cosines too. Each is two kernels.
FROZEN = ("dweight_ptr", "dbias_ptr")
ROPE_CASES = {
    "bf16_d128": ("bf16", "bf16", "bf16", 128, False, ()),
    "fp16_d128": ("fp16", "fp16", "fp16", 128, False, ()),
    "fp32_d128": ("fp32", "fp32", "fp32", 128, False, ()),
    "bf16_d128_heads": ("bf16", "fp32", "fp32", 128, True, ()),
    "fp32_d128_heads": ("fp32", "fp32", "fp32", 128, True, ()),
    "bf16_d128_frozen": ("bf16", "bf16", "bf16", 128, True, FROZEN),
    "fp32_d128_affine": ("fp32", "fp32", "fp32", 128, False, ("dx_ptr",)),
    "bf16_d128_general": ("bf16", "fp32", "fp32", 128, False, ()),
    "fp16_d128_general": ("fp16", "fp16", "fp32", 128, True, ()),
    "fp32_d128_general": ("fp32", "fp32", "fp64", 128, False, ()),
    "fp32_d128_general_heads": ("fp32", "fp32", "fp32", 128, True, ()),
    "bf16_d64": ("bf16", "bf16", "bf16", 64, False, ()),
    "fp32_d10_general": ("fp32", "fp32", "fp32", 10, False, ()),
    "fp32_d2048": ("fp32", "fp32", "fp32", 2048, False, ()),
    "fp32_ones": ("fp32", "fp32", "fp32", 2, True, ()),
}
for _name, _types in ROPE_CASES.items():
    _aligned = (*ROPE_INPUTS, *ROPE_OUTPUTS, "T", "H", *ROPE_STRIDES)
    _ones = dict.fromkeys(("stride_cf", "stride_sf"), 1)
    if "general" in _name or "ones" in _name:
        _aligned, _ones = (), dict.fromkeys(ROPE_SIZES if "ones" in _name else (), 1)
    CASES[f"rope_{_name}"] = ("rope", _types, _ones, _aligned)
    CASES[f"ropeback_{_name}"] = ("ropeback", _types, _ones, _aligned)

# Cross-entropy: type of the logits, vocabulary, whether the gradient is written; without weights they are None.
XENT_SIZES = ("V", "stride_s")
XENT_ALIGNED = ("logits_ptr", "targets_ptr", "weights_ptr", "losses_ptr", *XENT_SIZES)
CASES |= {
    "xent_bf16": ("xent", ("bf16", 65536, True), {}, XENT_ALIGNED),
    "xent_fp16": ("xent", ("fp16", 65536, True), {}, XENT_ALIGNED),
    "xent_fp32": ("xent", ("fp32", 65536, True), {"weights_ptr": None}, XENT_ALIGNED),
    "xent_bf16_losses": ("xent", ("bf16", 65536, False), {"weights_ptr": None}, XENT_ALIGNED),
    "xent_fp32_general": ("xent", ("fp32", 9001, True), {}, ()),
    "xent_bf16_general": ("xent", ("bf16", 9001, True), {}, ()),
    "xent_fp32_small": ("xent", ("fp32", 50, True), {}, ()),
    "xent_fp32_ones": ("xent", ("fp32", 1, True), dict.fromkeys(XENT_SIZES, 1), ()),
}

# RMSNorm: types of input and weight, width, outputs that are not wanted. Each is three kernels.
RMS_ALIGNED = ("x_ptr", "weight_ptr", "out_ptr", "rstd_ptr", "dy_ptr", "dx_ptr", "partial_ptr", "delta_ptr")
RMS_SIZES = ("R", "stride_xr", "stride_dyr", "stride_dr")
RMS_CASES = {
    "bf16_c4096": ("bf16", "bf16", 4096, ()),
    "bf16_c4096_frozen": ("bf16", "bf16", 4096, ("partial_ptr",)),
    "bf16_c4096_weight": ("bf16", "bf16", 4096, ("dx_ptr", "rstd_ptr")),
    "fp32_c4096": ("fp32", "fp32", 4096, ()),
    "bf16_c8192": ("bf16", "fp32", 8192, ()),
    "fp16_c8192_frozen": ("fp16", "fp16", 8192, ("partial_ptr",)),
    "fp32_c8192": ("fp32", "fp32", 8192, ()),
    "fp32_c8191_general": ("fp32", "fp32", 8191, ()),
    "bf16_c64": ("bf16", "bf16", 64, ()),
    "fp32_c64": ("fp32", "fp32", 64, ()),
    "bf16_c128": ("bf16", "bf16", 128, ()),
    "bf16_c1000_general": ("bf16", "bf16", 1000, ()),
    "fp32_c1000_general": ("fp32", "fp32", 1000, ()),
    "fp32_c1000_general_frozen": ("fp32", "fp32", 1000, ("partial_ptr",)),
    "fp32_ones": ("fp32", "fp32", 1, ()),
}
# SwiGLU: type, width, outputs that are not wanted. Each is two kernels.
SWIGLU_ALIGNED = ("gate_ptr", "up_ptr", "out_ptr", "dy_ptr", "dgate_ptr", "dup_ptr")
SWIGLU_SIZES = ("R", "stride_gr", "stride_ur", "stride_dyr")
SWIGLU_CASES = {
    "bf16_c11008": ("bf16", 11008, ()),
    "fp16_c11008": ("fp16", 11008, ()),
    "fp32_c11008": ("fp32", 11008, ()),
    "bf16_c11008_gate": ("bf16", 11008, ("dup_ptr",)),
    "bf16_c11008_up": ("bf16", 11008, ("dgate_ptr",)),
    "bf16_c172_general": ("bf16", 172, ()),
    "fp16_c1001_general": ("fp16", 1001, ()),
    "fp32_c11009_general": ("fp32", 11009, ()),
    "fp32_ones": ("fp32", 1, ()),
}
for _ops, _cases, _pointers, _sizes in (
    (("rms", "rmsback", "addrms"), RMS_CASES, RMS_ALIGNED, RMS_SIZES),
    (("swiglu", "swigluback"), SWIGLU_CASES, SWIGLU_ALIGNED, SWIGLU_SIZES),
):
    for _name, _types in _cases.items():
        _ones = dict.fromkeys(_sizes, 1) if "ones" in _name else {}
        _aligned = () if "general" in _name or "ones" in _name else (*_pointers, *_sizes)
        CASES |= {f"{_op}_{_name}": (_op, _types, _ones, _aligned) for _op in _ops}

# Paged attention: type, query heads of a key/value head, D, whether several programs share a stream. The pool of pages
# is an allocation of its own, aligned also where nothing else is.
PAGED_POINTERS = ("q_ptr", "k_ptr", "v_ptr", "table_ptr", "lengths_ptr", "out_ptr", "lse_ptr")
PAGED_SIZES = ("stride_qs", "stride_qh", "stride_ts")
PAGED_CASES = {
    "bf16_d128": ("bf16", 1, 128, True),
    "bf16_d128_whole": ("bf16", 1, 128, False),
    "fp16_d128": ("fp16", 1, 128, True),
    "fp32_d128": ("fp32", 1, 128, True),
    "bf16_d64": ("bf16", 1, 64, True),
    "bf16_d80": ("bf16", 1, 80, True),
    "bf16_d256": ("bf16", 1, 256, True),
    "fp32_d256": ("fp32", 1, 256, False),
    "bf16_d128_group2": ("bf16", 2, 128, True),
    "bf16_d128_group8": ("bf16", 8, 128, True),
    "fp32_d128_group8": ("fp32", 8, 128, True),
    "bf16_d128_group11": ("bf16", 11, 128, False),
    "bf16_d128_general": ("bf16", 1, 128, True),
    "fp16_d128_general_group8": ("fp16", 8, 128, True),
    "fp32_d128_general": ("fp32", 1, 128, False),
    "bf16_d10_general": ("bf16", 3, 10, True),
    "fp32_d10_general": ("fp32", 1, 10, False),
    "bf16_d250_general": ("bf16", 1, 250, True),
    "fp32_d2_ones": ("fp32", 1, 2, False),
}
for _name, _types in PAGED_CASES.items():
    _ones = dict.fromkeys(PAGED_SIZES, 1) if "ones" in _name else {}
    _aligned = (*PAGED_POINTERS, *PAGED_SIZES)
    if "general" in _name or "ones" in _name:
        _aligned = ("k_ptr", "v_ptr", "out_ptr", "lse_ptr")
    CASES[f"paged_{_name}"] = ("paged", _types, _ones if _types[3] else _ones | {"lse_ptr": None}, _aligned)
# Type, D, splits; what is read and written are the launcher's own allocations.
COMBINE_ALIGNED = ("part_ptr", "lse_ptr", "out_ptr")
CASES |= {
    "combine_bf16_d128": ("combine", ("bf16", 128, 17), {}, COMBINE_ALIGNED),
    "combine_fp16_d64": ("combine", ("fp16", 64, 2), {}, COMBINE_ALIGNED),
    "combine_fp32_d256": ("combine", ("fp32", 256, 64), {}, COMBINE_ALIGNED),
    "combine_fp32_d10": ("combine", ("fp32", 10, 5), {}, COMBINE_ALIGNED),
}

# Norm, RoPE and the store in pages: types of input, affine part and indices, H, G and D.
STORE_SIZES = ("stride_t", "stride_c", "stride_s")
STORE_AFFINE = ("q_weight_ptr", "q_bias_ptr", "k_weight_ptr", "k_bias_ptr")
STORE_TENSORS = ("qkv_ptr", *STORE_AFFINE, "cos_ptr", "sin_ptr", "positions_ptr", "places_ptr")
STORE_CASES = {
    "bf16_d128": ("bf16", "bf16", "i64", 32, 32, 128),
    "fp16_d128": ("fp16", "fp16", "i64", 32, 32, 128),
    "fp32_d128": ("fp32", "fp32", "i64", 32, 32, 128),
    "bf16_d128_group8": ("bf16", "fp32", "i32", 64, 8, 128),
    "bf16_d64": ("bf16", "bf16", "i64", 16, 16, 64),
    "bf16_d128_general": ("bf16", "bf16", "i32", 33, 3, 128),
    "fp16_d128_general": ("fp16", "fp32", "i64", 33, 3, 128),
    "fp32_d128_general": ("fp32", "fp32", "i64", 33, 3, 128),
    "fp32_d10_general": ("fp32", "fp32", "i64", 4, 2, 10),
    "bf16_d1024": ("bf16", "bf16", "i64", 4, 4, 1024),
    "fp32_ones": ("fp32", "fp32", "i64", 1, 1, 2),
}
for _name, _types in STORE_CASES.items():
    _ones = dict.fromkeys(STORE_SIZES, 1) if "ones" in _name else {}
    _aligned = () if "general" in _name or "ones" in _name else (*STORE_TENSORS, *STORE_SIZES)
    CASES[f"store_{_name}"] = ("store", _types, _ones, (*_aligned, "k_ptr", "v_ptr", "q_ptr"))

# Sampling: type of the logits, length of a row. The scratch and the result are the launcher's own allocations.
TEXT_SIZES, IMAGE_SIZES = ("V", "stride_r", "stride_a", "stride_s"), ("V", "stride_g", "stride_r")
TEXT_ALIGNED = ("logits_ptr", "allowed_ptr", "rules_ptr", "seen_ptr", "slots_ptr", "settings_ptr", "uniforms_ptr")
TEXT_ALIGNED = (*TEXT_ALIGNED, "x_ptr", "ids_ptr", *TEXT_SIZES)
IMAGE_ALIGNED = ("logits_ptr", "settings_ptr", "uniforms_ptr", "columns_ptr", *IMAGE_SIZES)
OWN = ("x_ptr", "ids_ptr", "columns_ptr")
for _op, _length, _aligned, _sizes in (
    ("picktext", 65536, TEXT_ALIGNED, TEXT_SIZES),
    ("pickimage", 8192, IMAGE_ALIGNED, IMAGE_SIZES),
):
    CASES |= {
        f"{_op}_bf16": (_op, ("bf16", _length), {}, _aligned),
        f"{_op}_fp16": (_op, ("fp16", _length), {}, _aligned),
        f"{_op}_fp32": (_op, ("fp32", _length), {}, _aligned),
        f"{_op}_bf16_general": (_op, ("bf16", min(_length, 10212)), {}, OWN),
        f"{_op}_fp32_general": (_op, ("fp32", min(_length, 10212)), {}, OWN),
        f"{_op}_fp32_small": (_op, ("fp32", 50), {}, ()),
        f"{_op}_fp32_ones": (_op, ("fp32", 1), dict.fromkeys(_sizes, 1), ()),
    }


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
    if op in ("rope", "ropeback"):
        return norm_rope_kernel_and_types(op, *types)
    if op == "xent":
        return cross_entropy_kernel_and_types(*types)
    if op in ("rms", "rmsback", "addrms"):
        return rms_norm_kernel_and_types(op, *types)
    if op in ("swiglu", "swigluback"):
        return swiglu_kernel_and_types(op, *types)
    if op in ("columns", "rows"):
        return resample_kernel_and_types(op, types)
    if op in ("paged", "combine"):
        return paged_attention_kernel_and_types(op, *types)
    if op == "store":
        return norm_rope_store_kernel_and_types(*types)
    if op in ("picktext", "pickimage"):
        return sampling_kernel_and_types(op, *types)
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


def norm_rope_kernel_and_types(op, element, affine, table, width, per_head, unwanted):
    from medmax_fast.kernels import qk_norm_rope

    constants, _ = qk_norm_rope._plan(1, 1, width)
    constants |= {"PER_HEAD": per_head} | dict.fromkeys(unwanted)
    types = dict.fromkeys(("x_ptr", "out_ptr", "dout_ptr", "dx_ptr"), f"*{element}") | {"eps": "fp32"}
    types |= dict.fromkeys(("weight_ptr", "bias_ptr"), f"*{affine}") | dict.fromkeys(FROZEN, "*fp32")
    types |= dict.fromkeys(("cos_ptr", "sin_ptr"), f"*{table}") | dict.fromkeys(ROPE_SIZES, "i32")
    kernel = qk_norm_rope._norm_rope_kernel if op == "rope" else qk_norm_rope._norm_rope_backward_kernel
    return kernel, types, constants, qk_norm_rope.OPTIONS


def cross_entropy_kernel_and_types(element, vocabulary, gradient):
    from medmax_fast.kernels import cross_entropy

    types = {"logits_ptr": f"*{element}", "targets_ptr": "*i64", "weights_ptr": "*fp32", "losses_ptr": "*fp32"}
    types |= dict.fromkeys(XENT_SIZES, "i32") | {"lse_ptr": "*fp32", "z_loss": "fp32"}
    block = min(cross_entropy.BLOCK, triton.next_power_of_2(vocabulary))
    constants = {"GRADIENT": gradient, "BLOCK": block}
    return cross_entropy._cross_entropy_kernel, types, constants, cross_entropy.OPTIONS


def rms_norm_kernel_and_types(op, element, weight, width, unwanted):
    from medmax_fast.kernels import rms_norm

    kernel = {
        "rms": rms_norm._rms_norm_kernel,
        "rmsback": rms_norm._rms_norm_backward_kernel,
        "addrms": rms_norm._add_rms_norm_kernel,
    }[op]
    types = dict.fromkeys(("x_ptr", "out_ptr", "dy_ptr", "dx_ptr", "delta_ptr"), f"*{element}")
    types |= {"weight_ptr": f"*{weight}"}
    types |= dict.fromkeys(("rstd_ptr", "partial_ptr"), "*fp32") | dict.fromkeys(RMS_SIZES, "i32") | {"eps": "fp32"}
    plan = rms_norm._plan(width)
    options = {name: value for name, value in plan.items() if name not in kernel.arg_names}
    # The backward always reads what the forward may leave out.
    unwanted = [name for name in unwanted if op == "rms" or name != "rstd_ptr"]
    return kernel, types, plan | dict.fromkeys(unwanted), options


def swiglu_kernel_and_types(op, element, width, unwanted):
    from medmax_fast.kernels import swiglu

    kernel = swiglu._swiglu_kernel if op == "swiglu" else swiglu._swiglu_backward_kernel
    types = dict.fromkeys(SWIGLU_ALIGNED, f"*{element}") | dict.fromkeys(SWIGLU_SIZES, "i32")
    constants = swiglu._plan(1, width)[1] | dict.fromkeys(unwanted)
    if op == "swigluback" and "dgate_ptr" in unwanted:
        constants["up_ptr"] = None
    return kernel, types, constants, swiglu.OPTIONS


def paged_attention_kernel_and_types(op, element, *shape):
    from medmax_fast.kernels import paged_attention

    if op == "combine":
        width, splits = shape
        types = {"part_ptr": "*fp32", "lse_ptr": "*fp32", "out_ptr": f"*{element}", "SPLITS": "i32"}
        constants = {name: triton.next_power_of_2(n) for name, n in (("BLOCK_S", splits), ("BLOCK_D", width))}
        return paged_attention._combine_splits_kernel, types, constants | {"D": width}, paged_attention.OPTIONS
    group, width, several = shape
    kernel = paged_attention._paged_attention_kernel
    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{element}") | dict.fromkeys(PAGED_SIZES, "i32")
    types |= {"table_ptr": "*i32", "lengths_ptr": "*i32", "lse_ptr": "*fp32", "scale": "fp32"}
    types |= {"out_ptr": "*fp32" if several else f"*{element}"}
    plan = paged_attention._plan(group, width, 64, 4 if element == "fp32" else 2)
    options = {name: value for name, value in plan.items() if name not in kernel.arg_names}
    return kernel, types, plan, paged_attention.OPTIONS | options


def norm_rope_store_kernel_and_types(element, affine, index, heads, groups, width):
    from medmax_fast.kernels import norm_rope_store

    types = dict.fromkeys(("qkv_ptr", "k_ptr", "v_ptr", "q_ptr"), f"*{element}") | {"eps": "fp32"}
    types |= dict.fromkeys(STORE_AFFINE, f"*{affine}") | dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32")
    types |= dict.fromkeys(("positions_ptr", "places_ptr"), f"*{index}") | dict.fromkeys(STORE_SIZES, "i32")
    constants, _ = norm_rope_store._plan(heads, groups, width, 64)
    return norm_rope_store._norm_rope_store_kernel, types, constants, norm_rope_store.OPTIONS


def sampling_kernel_and_types(op, element, length):
    from medmax_fast.kernels import sampling

    types = {"logits_ptr": f"*{element}"} | dict.fromkeys(("settings_ptr", "uniforms_ptr", "x_ptr"), "*fp32")
    types |= dict.fromkeys(("allowed_ptr", "seen_ptr"), "*u8") | dict.fromkeys((*TEXT_SIZES, *IMAGE_SIZES), "i32")
    types |= dict.fromkeys(("rules_ptr", "slots_ptr", "ids_ptr", "columns_ptr"), "*i64")
    if op == "pickimage":
        return sampling._pick_image_kernel, types, *sampling._plan(length, sampling.MAX_IMAGE_V, sampling.IMAGE_WARPS)
    constants, options = sampling._plan(length, sampling.BLOCK, sampling.WARPS)
    constants |= {"BLOCKS": triton.next_power_of_2(triton.cdiv(length, constants["BLOCK"]))}
    return sampling._pick_text_kernel, types, constants, options


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


@pytest.fixture(scope="session")
def compiled(tmp_path_factory, request):
    """What compiling every case gave, by target; the first worker to ask compiles for all."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    results = folder / "aot.json"
    with open(folder / "aot.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not results.exists():
            results.write_text(json.dumps(compile_all(tmp_path_factory.mktemp("triton"), request.config.rootpath)))
    return json.loads(results.read_text())


def compile_all(cache, root):
    """Every case for every target, a process for each target."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # An empty cache, so that the compiler really runs.
    environment |= {"PYTHONPATH": str(root), "TRITON_CACHE_DIR": str(cache)}
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
@pytest.mark.parametrize("case", ROPE_CASES)
def test_norm_rope_stores(compiled, case, capability):
    forward, backward = (compiled[f"{op}_{case}/{capability}"] for op in ("rope", "ropeback"))
    # Gradients must be the same on every run.
    assert backward["opcodes"]["atom"] == backward["opcodes"]["red"] == 0
    if case in ("bf16_d128", "fp16_d128", "fp32_d128", "bf16_d128_frozen"):
        # A thread's eight values of each half leave in vectors of 16 bytes, and a head's sum needs no shared memory.
        assert forward["opcodes"]["st"] == (4 if case.startswith("fp32") else 2) and forward["shared"] == 0
    if case == "bf16_d128_frozen":
        assert backward["opcodes"]["st"] == 2 and backward["shared"] == 0


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("op", "case"), [("rms", n) for n in RMS_CASES] + [("swiglu", n) for n in SWIGLU_CASES])
def test_rms_norm_and_swiglu_stores(compiled, op, case, capability):
    forward, backward = (compiled[f"{name}_{case}/{capability}"] for name in (op, f"{op}back"))
    # Gradients must be the same on every run.
    assert backward["opcodes"]["atom"] == backward["opcodes"]["red"] == 0
    # A thread's eight values leave in vectors of 16 bytes, the two gradients of SwiGLU in one pass; a frozen weight
    # leaves nothing to exchange but the sums of the row.
    if case in ("bf16_c11008", "fp16_c11008", "fp32_c11008"):
        vectors = 2 if case.startswith("fp32") else 1
        assert (forward["opcodes"]["st"], backward["opcodes"]["st"]) == (vectors, 2 * vectors)
    if op == "rms" and case.endswith("frozen"):
        assert backward["shared"] <= 128


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    "case", [*(f"paged_{name}" for name in PAGED_CASES), *(f"store_{name}" for name in STORE_CASES)]
)
def test_decoding_leaves_room_for_several_programs(compiled, case, capability):
    found = compiled[f"{case}/{capability}"]
    if case.startswith("store"):
        assert found["registers"] <= 64
        # A head's sums and its halves stay within a warp.
        assert found["shared"] == 0 or "d128" not in case
    elif "group" not in case and not case.startswith(("paged_bf16_d10", "paged_bf16_d250")):
        # Four of them on an SM, and nothing exchanged between warps but the query and the result.
        assert found["registers"] <= 128 and found["shared"] <= 4096


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("pick")])
def test_sampling_rounds_as_its_reference(compiled, case, capability):
    opcodes = compiled[f"{case}/{capability}"]["opcodes"]
    assert opcodes["fma"] == opcodes["atom"] == opcodes["red"] == 0


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
        "_norm_rope_kernel",
        "_norm_rope_backward_kernel",
        "_cross_entropy_kernel",
        "_rms_norm_kernel",
        "_rms_norm_backward_kernel",
        "_swiglu_kernel",
        "_swiglu_backward_kernel",
        "_add_rms_norm_kernel",
        "_paged_attention_kernel",
        "_combine_splits_kernel",
        "_norm_rope_store_kernel",
        "_columns_kernel",
        "_rows_kernel",
        "_pick_text_kernel",
        "_pick_image_kernel",
    }


if __name__ == "__main__":
    target = int(sys.argv[1])
    report = {f"{case}/{target}": compile_case(case, target) for case in CASES}
    pointers = dict.fromkeys(("a_ptr", "b_ptr", "out_ptr"), "*fp32")
    report[f"tf32_product/{target}"] = inspect_kernel(tf32_product, pointers, {"SIDE": 64}, (), {}, target)
    print(json.dumps(report))
