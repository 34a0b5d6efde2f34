"""The variants of every kernel that are compiled ahead of time: a table without imports, which tests read too.

A variant is what a launch makes of a kernel. "aligned": contiguous tensors with sizes divisible by 16, which triton
specialises; "general": odd sizes and strides; "ones": triton makes a constant of every argument that equals 1.
CASES: name -> (operation, its element type(s), the arguments that are constants, those divisible by 16). What the types
of an operation stand for, kernel_and_types of launches.py says.
"""

VQ_STRIDES = ("stride_zn", "stride_zd", "stride_ek", "stride_ed")
VQ_STATS = ("stats_ptr", "z_stats_ptr", "e_stats_ptr", "longest_ptr", "z_norm_ptr", "e_norm_ptr")
VQ_ALIGNED = ("x_ptr", "z_ptr", "e_ptr", *VQ_STATS, "rows_ptr", "count_ptr", "out_ptr", "N", "stride_zn", "stride_ek")
SPAN_ALIGNED = ("out_ptr", "starts_ptr", "codes_ptr", "bad_ptr", "P", "stride_n")
SHIFT_SIZES = ("size", "low", "high", "shift")
SPAN_SIZES = ("T", "P", "boi", "eoi", "image_start", "num_codes", "stride_t", "stride_n", "stride_p")
GROUP_SIZES = ("HW", "W", "chunks", "chunk_rows", "program_rows", "stride_xb", "stride_xh", "stride_xw")
GROUP_SUM = ("shift_ptr", "residual_ptr", "residual_shift_ptr", "total_ptr")
GROUP_POINTERS = ("x_ptr", *GROUP_SUM, "weight_ptr", "bias_ptr", "mean_ptr", "m2_ptr", "out_ptr")
GROUP_ALIGNED = (*GROUP_POINTERS, "HW", *GROUP_SIZES[3:])
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
GROUP_EVEN = dict.fromkeys((*GROUP_SUM, "stride_xh"))
for _name, _types in GROUP_CASES.items():
    _ones = dict.fromkeys(GROUP_SIZES, 1) if _name == "fp32_ones" else {}
    _aligned = () if _name in ("fp32_c96", "fp32_ones") else GROUP_ALIGNED
    CASES[f"group_{_name}"] = ("group", _types, _ones | GROUP_EVEN | {"SILU": _name != "fp16_c512"}, _aligned)
    CASES[f"groupstats_{_name}"] = ("groupstats", _types, _ones | GROUP_EVEN, _aligned)
# Sums: the case above, and what is not part of it. A bias that both kernels add; what is written after conv_in, after a
# block, one with a shortcut, a strided convolution; without statistics, before a convolution; everything, odd or 1.
_ONE, _EVEN = ("residual_ptr", "residual_shift_ptr"), ("stride_xh",)
_ALONE = ("mean_ptr", "m2_ptr")
GROUP_CASES |= {"alone": ("fp16", "fp32", 128, 128, 1 << 18)}
GROUP_SUMS = {
    "bias_fp16": ("fp16_c128", (*_ONE, *_EVEN, "total_ptr")),
    "first_fp16": ("fp16_c128", (*_ONE, *_EVEN)),
    "block_fp16": ("fp16_c128", ("residual_shift_ptr", *_EVEN)),
    "block_fp32": ("fp32_c256", ("residual_shift_ptr", *_EVEN)),
    "shortcut_fp16": ("fp16_c128", _EVEN),
    "shortcut_fp32": ("fp32_c256", _EVEN),
    "strided_fp16": ("fp16_c128", _ONE),
    "strided_fp32": ("fp32_c256", _ONE),
    "alone_fp16": ("alone", ("residual_shift_ptr", *_EVEN, *_ALONE)),
    "alone_strided_fp16": ("alone", (*_ONE, *_ALONE)),
    "all_bf16": ("bf16_c32", ()),
    "all_fp32_c96": ("fp32_c96", ()),
    "all_fp32_c4096": ("fp32_c4096", ()),
    "all_fp32_ones": ("fp32_ones", ()),
}
for _name, (_case, _missing) in GROUP_SUMS.items():
    _ones = dict.fromkeys(GROUP_SIZES, 1) if "ones" in _case else {}
    _aligned = () if _case in ("fp32_c96", "fp32_ones") else GROUP_ALIGNED
    CASES[f"groupsum_{_name}"] = ("groupstats", GROUP_CASES[_case], _ones | dict.fromkeys(_missing), _aligned)
CASES["groupbias_fp16"] = ("group", GROUP_CASES["fp16_c128"], {"SILU": True}, GROUP_ALIGNED)

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

# LoRA: type, rank, width. Each is three kernels.
LORA_POINTERS = ("x_ptr", "a_ptr", "g_ptr", "h_ptr", "dx_ptr", "partial_ptr")
LORA_SIZES = ("T", "stride_xt")
LORA_CASES = {
    "bf16_r16_k4096": ("bf16", 16, 4096),
    "bf16_r64_k4096": ("bf16", 64, 4096),
    "bf16_r16_k11008": ("bf16", 16, 11008),
    "bf16_r64_k11008": ("bf16", 64, 11008),
    "fp16_r16_k4096": ("fp16", 16, 4096),
    "fp16_r64_k11008": ("fp16", 64, 11008),
    "fp32_r16_k4096": ("fp32", 16, 4096),
    "fp32_r64_k11008": ("fp32", 64, 11008),
    "bf16_r128_k4096": ("bf16", 128, 4096),
    "fp32_r128_k4096": ("fp32", 128, 4096),
    "bf16_r5_k1001_general": ("bf16", 5, 1001),
    "fp16_r64_k4096_general": ("fp16", 64, 4096),
    "fp32_r33_k1001_general": ("fp32", 33, 1001),
    "fp32_ones": ("fp32", 1, 1),
}
for _name, _types in LORA_CASES.items():
    _ones = dict.fromkeys(LORA_SIZES, 1) if "ones" in _name else {}
    _aligned = () if "general" in _name or "ones" in _name else (*LORA_POINTERS, *LORA_SIZES)
    CASES |= {f"{_op}_{_name}": (_op, _types, _ones, _aligned) for _op in ("loradown", "loraweight", "lorainput")}

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

# What a 7B model launches in 16 bits, and its image encoder: the variants that a report shows one by one.
MODEL_CASES = (
    *(f"{op}_aligned_d256" for op in ("vqmeasure", "vqscreen", "vq")),
    "shift_i64_u16",
    "span_i64",
    "columns_aligned",
    "rows_bf16",
    "groupsum_bias_fp16",
    "groupsum_block_fp16",
    "group_fp16_c128",
    "rope_bf16_d128_heads",
    "ropeback_bf16_d128_heads",
    "ropeback_bf16_d128_frozen",
    "xent_bf16",
    "rms_bf16_c4096",
    "rmsback_bf16_c4096",
    "rmsback_bf16_c4096_frozen",
    "addrms_bf16_c4096",
    "swiglu_bf16_c11008",
    "swigluback_bf16_c11008",
    "loradown_bf16_r16_k4096",
    "loraweight_bf16_r16_k4096",
    "lorainput_bf16_r16_k4096",
    "store_bf16_d128",
    "paged_bf16_d128",
    "combine_bf16_d128",
    "picktext_bf16",
    "pickimage_bf16",
)
