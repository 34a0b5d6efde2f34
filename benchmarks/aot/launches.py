"""Of each variant of variants.py: the kernel, the types of its run-time arguments, its constants and launch options.

The numbers of a capability come from the table of kernels/blocks.py, the rest from the plans that the launchers use.
"""

import triton
import triton.language as tl

from benchmarks.aot.variants import (
    FROZEN,
    GROUP_SIZES,
    GROUP_SUM,
    IMAGE_SIZES,
    LORA_POINTERS,
    LORA_SIZES,
    PAGED_SIZES,
    RMS_SIZES,
    ROPE_SIZES,
    SHIFT_SIZES,
    SPAN_SIZES,
    STORE_AFFINE,
    STORE_SIZES,
    SWIGLU_ALIGNED,
    SWIGLU_SIZES,
    TEXT_SIZES,
    VQ_STATS,
    VQ_STRIDES,
    XENT_SIZES,
)
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
    sampling,
    swiglu,
    vq,
)
from medmax_fast.kernels.blocks import entry

# (kernel, types of run-time arguments by name, constants and launch options by name)
Plan = tuple[triton.JITFunction, dict[str, str], dict]


@triton.jit
def tf32_product(a_ptr, b_ptr, out_ptr, SIDE: tl.constexpr):
    """What the exact kernel must not become: shows that a tensor-core instruction would be seen."""
    at = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), input_precision="tf32"))


def kernel_and_types(op: str, types, capability: int) -> Plan:
    """What the launcher of `op` gives its kernel on a capability; types: those of a case of variants.py.

    More types and constants than the kernel has arguments may come back: those of all kernels of one file.
    """
    types = (types,) if isinstance(types, str) else types
    return PLANS[op](op, lambda name: entry(name, capability).numbers, *types)


def vq_plan(op, numbers, element) -> Plan:
    pointers = dict.fromkeys(("x_ptr", "z_ptr", "e_ptr"), f"*{element}") | dict.fromkeys(VQ_STATS, "*fp32")
    pointers |= {"rows_ptr": "*i32", "count_ptr": "*i32", "out_ptr": "*i64"}
    types = pointers | dict.fromkeys(("N", "id_offset", *VQ_STRIDES, "stride_n", "stride_d"), "i32")
    kernel, name = {
        "vqmeasure": (vq._measure_rows_kernel, "vq_measure"),
        "vqscreen": (vq._screen_kernel, "vq_screen"),
        "vq": (vq._nearest_code_kernel, "vq_search"),
    }[op]
    return kernel, types, numbers(name) | vq.OPTIONS


def remap_plan(op, numbers, *elements) -> Plan:
    settings = numbers(op) | remap.OPTIONS
    if op == "shift":
        pointers = {"in_ptr": f"*{elements[0]}", "out_ptr": f"*{elements[1]}", "bad_ptr": "*i64"}
        return remap._shift_kernel, pointers | dict.fromkeys(SHIFT_SIZES, "i32"), settings
    pointers = {"out_ptr": f"*{elements[0]}", "starts_ptr": "*i64", "codes_ptr": "*i64", "bad_ptr": "*i64"}
    return remap._span_kernel, pointers | dict.fromkeys(SPAN_SIZES, "i32"), settings


def resample_plan(op, numbers, element) -> Plan:
    types = {"pixels_ptr": "*u8", "table_ptr": "*i64", "taps_ptr": "*i32", "mid_ptr": "*u8", "S": "i32"}
    types |= {"values_ptr": f"*{element}", "out_ptr": f"*{element}"}
    kernel = resample._columns_kernel if op == "columns" else resample._rows_kernel
    assert [p.name for p in resample._columns_kernel.params if p.do_not_specialize] == ["S"]
    return kernel, types, {"FIELDS": resample.FIELDS, **numbers("resample"), **resample.OPTIONS}


def group_norm_plan(op, numbers, element, affine, channels, groups, pixels) -> Plan:
    settings, _, chunks = group_norm._plan(channels, groups, pixels, **numbers("group_norm"))
    types = dict.fromkeys(("x_ptr", *GROUP_SUM, "out_ptr"), f"*{element}") | {"mean_ptr": "*fp32", "m2_ptr": "*fp32"}
    types |= {"weight_ptr": f"*{affine}", "bias_ptr": f"*{affine}", "eps": "fp32"}
    types |= dict.fromkeys(GROUP_SIZES, "i32")
    kernel = group_norm._group_statistics_kernel if op == "groupstats" else group_norm._group_norm_kernel
    return kernel, types, settings | {"CHUNKS_P": triton.next_power_of_2(chunks)}


def norm_rope_plan(op, numbers, element, affine, table, width, per_head, unwanted) -> Plan:
    settings, _ = qk_norm_rope._plan(1, 1, width, **numbers("norm_rope"))
    types = dict.fromkeys(("x_ptr", "out_ptr", "dout_ptr", "dx_ptr"), f"*{element}") | {"eps": "fp32"}
    types |= dict.fromkeys(("weight_ptr", "bias_ptr"), f"*{affine}") | dict.fromkeys(FROZEN, "*fp32")
    types |= dict.fromkeys(("cos_ptr", "sin_ptr"), f"*{table}") | dict.fromkeys(ROPE_SIZES, "i32")
    kernel = qk_norm_rope._norm_rope_kernel if op == "rope" else qk_norm_rope._norm_rope_backward_kernel
    return kernel, types, settings | {"PER_HEAD": per_head} | dict.fromkeys(unwanted)


def cross_entropy_plan(_op, numbers, element, vocabulary, gradient) -> Plan:
    types = {"logits_ptr": f"*{element}", "targets_ptr": "*i64", "weights_ptr": "*fp32", "losses_ptr": "*fp32"}
    types |= dict.fromkeys(XENT_SIZES, "i32") | {"lse_ptr": "*fp32", "z_loss": "fp32"}
    settings = cross_entropy._plan(vocabulary, **numbers("cross_entropy"))
    return cross_entropy._cross_entropy_kernel, types, settings | {"GRADIENT": gradient}


def rms_norm_plan(op, numbers, element, weight, width, unwanted) -> Plan:
    kernel = {
        "rms": rms_norm._rms_norm_kernel,
        "rmsback": rms_norm._rms_norm_backward_kernel,
        "addrms": rms_norm._add_rms_norm_kernel,
    }[op]
    types = dict.fromkeys(("x_ptr", "out_ptr", "dy_ptr", "dx_ptr", "delta_ptr"), f"*{element}")
    types |= {"weight_ptr": f"*{weight}"}
    types |= dict.fromkeys(("rstd_ptr", "partial_ptr"), "*fp32") | dict.fromkeys(RMS_SIZES, "i32") | {"eps": "fp32"}
    # The backward always reads what the forward may leave out.
    unwanted = [name for name in unwanted if op == "rms" or name != "rstd_ptr"]
    return kernel, types, rms_norm._plan(width, **numbers("rms_norm")) | dict.fromkeys(unwanted)


def swiglu_plan(op, numbers, element, width, unwanted) -> Plan:
    kernel = swiglu._swiglu_kernel if op == "swiglu" else swiglu._swiglu_backward_kernel
    types = dict.fromkeys(SWIGLU_ALIGNED, f"*{element}") | dict.fromkeys(SWIGLU_SIZES, "i32")
    settings = swiglu._plan(1, width, **numbers("swiglu"))[1] | dict.fromkeys(unwanted)
    if op == "swigluback" and "dgate_ptr" in unwanted:
        settings["up_ptr"] = None
    return kernel, types, settings


def lora_plan(op, numbers, element, rank, width) -> Plan:
    name = f"lora_{op.removeprefix('lora')}"
    types = dict.fromkeys(LORA_POINTERS, f"*{element}") | dict.fromkeys(LORA_SIZES, "i32")
    types |= {"partial_ptr": "*fp32", "seed": "i64", "limit": "i32", "scale": "fp32"}
    kernel = getattr(lora, f"_{name}_kernel")
    assert [p.name for p in kernel.params if p.do_not_specialize] == ["seed", "limit"]
    settings = lora._plan(rank, width, 4 if element == "fp32" else 2, **numbers(name))
    return kernel, types, settings | {"PARTS": lora.PARTS}


def paged_attention_plan(_op, numbers, element, group, width, several) -> Plan:
    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{element}") | dict.fromkeys(PAGED_SIZES, "i32")
    types |= {"table_ptr": "*i32", "lengths_ptr": "*i32", "lse_ptr": "*fp32", "scale": "fp32"}
    types |= {"out_ptr": "*fp32" if several else f"*{element}"}
    itemsize = 4 if element == "fp32" else 2
    settings = paged_attention._plan(group, width, 64, itemsize, **numbers("paged_attention"))
    return paged_attention._paged_attention_kernel, types, settings


def combine_plan(_op, numbers, element, width, splits) -> Plan:
    types = {"part_ptr": "*fp32", "lse_ptr": "*fp32", "out_ptr": f"*{element}", "SPLITS": "i32"}
    settings = paged_attention._combine_plan(splits, width, **numbers("paged_combine"))
    return paged_attention._combine_splits_kernel, types, settings


def norm_rope_store_plan(_op, numbers, element, affine, index, heads, groups, width) -> Plan:
    types = dict.fromkeys(("qkv_ptr", "k_ptr", "v_ptr", "q_ptr"), f"*{element}") | {"eps": "fp32"}
    types |= dict.fromkeys(STORE_AFFINE, f"*{affine}") | dict.fromkeys(("cos_ptr", "sin_ptr"), "*fp32")
    types |= dict.fromkeys(("positions_ptr", "places_ptr"), f"*{index}") | dict.fromkeys(STORE_SIZES, "i32")
    settings, _ = norm_rope_store._plan(heads, groups, width, 64, **numbers("norm_rope_store"))
    return norm_rope_store._norm_rope_store_kernel, types, settings


def sampling_plan(op, _numbers, element, length) -> Plan:
    types = {"logits_ptr": f"*{element}"} | dict.fromkeys(("settings_ptr", "uniforms_ptr", "x_ptr"), "*fp32")
    types |= dict.fromkeys(("allowed_ptr", "seen_ptr"), "*u8") | dict.fromkeys((*TEXT_SIZES, *IMAGE_SIZES), "i32")
    types |= dict.fromkeys(("rules_ptr", "slots_ptr", "ids_ptr", "columns_ptr"), "*i64")
    if op == "pickimage":
        constants, options = sampling._plan(length, sampling.MAX_IMAGE_V, sampling.IMAGE_WARPS)
        return sampling._pick_image_kernel, types, constants | options
    constants, options = sampling._plan(length, sampling.BLOCK, sampling.WARPS)
    constants |= {"BLOCKS": triton.next_power_of_2(triton.cdiv(length, constants["BLOCK"]))}
    return sampling._pick_text_kernel, types, constants | options


PLANS = {
    **dict.fromkeys(("vqmeasure", "vqscreen", "vq"), vq_plan),
    **dict.fromkeys(("shift", "span"), remap_plan),
    **dict.fromkeys(("columns", "rows"), resample_plan),
    **dict.fromkeys(("group", "groupstats"), group_norm_plan),
    **dict.fromkeys(("rope", "ropeback"), norm_rope_plan),
    "xent": cross_entropy_plan,
    **dict.fromkeys(("rms", "rmsback", "addrms"), rms_norm_plan),
    **dict.fromkeys(("swiglu", "swigluback"), swiglu_plan),
    **dict.fromkeys(("loradown", "loraweight", "lorainput"), lora_plan),
    "paged": paged_attention_plan,
    "combine": combine_plan,
    "store": norm_rope_store_plan,
    **dict.fromkeys(("picktext", "pickimage"), sampling_plan),
}
