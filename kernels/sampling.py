"""Logits to the next ids of many samples, each with settings of its own, in one launch: no sort, no host sync.

The textbook form makes a masked, a penalised and a divided copy of [R, V] logits, sorts them, adds up the sorted
probabilities, scatters them back and asks the host which rows are greedy. Here one program takes a row. Whatever the
settings it is the same launch, so a CUDA graph can hold it.
- `_pick_text_kernel` reads the logits and their masks once (2 to 4 bytes and 2 bytes a value, 1 without a penalty); a
  greedy row ends there. Other rows leave x, 4 V bytes, in the L2 cache and pass over it again: for the sum, for the
  threshold of top-p, for the draw.
- `_pick_image_kernel` reads three streams once and keeps the row in registers.

Top-p without a sort: with F(t) the probability of all x above t, the least likely value that is kept is the smallest x
with F(x) < top_p. F falls, so bisection over floats in their order as integers finds it, in registers in at most 32
steps. From L2 a pass tries three thresholds and shrinks the bracket to the values that occur in it. The first eight
passes quarter the bracket's values, in case it holds zero and with it half of all floats; the others, at most 16, its
integers. Of 65,536 random fp32 values about 9 passes find it, of bf16 about 6; one more is for the sum, one for the
draw, which adds up in the order of ids.

Precision: x is rounded as the reference rounds it (divisions to nearest, no fused multiply-add), so greedy rows are
equal to the bit. Probabilities are fp32, sums in a fixed order that knows nothing of other rows: a cumulative
probability is off by less than TOLERANCE (at most 2e-6 in an emulation), the reference's is in float64. So ids differ
only where the uniform number is that close to the border of two ids, or top_p to the probability before an id.

Semantics on every path: x at temperature t weighs exp((x - max) / t), which is softmax(x / t) without its overflow.
Equal x count in the order of their ids. At +inf all weight is on the +inf. An id of weight 0 is never drawn. A row with
a NaN among its allowed logits, or with nothing above -inf, gives -1.

Shapes: R rows, V logits a row, A masks of allowed ids, S sequences with a mask of ids seen, G = 3 guidance streams.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

from medmax_fast.kernels.launch import use_triton

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = 1e-5
# A row has a multiprocessor to itself, so a program is all the warps that can wait for the L2 cache: 32 of 4 values a
# thread. The longest row that a program holds in registers has 16 values a thread. Not in the table of blocks.py: the
# order of the sums, and so what is drawn at a border of two ids, follows from these numbers and must not from the card.
BLOCK, WARPS = 4096, 32
MAX_IMAGE_V, IMAGE_WARPS = 8192, 16
# How many of the likeliest the reference sorts on a CPU before it sorts a row whole.
# Values that the reference draws from in one piece on a CPU.
REF_VALUES = 1 << 17
REF_LIKELIEST = 1024


if triton is not None:

    @triton.jit
    def _key(x):
        # Integers in the order of floats; its own inverse. -0 comes before 0, but every comparison is one of floats.
        bits = x.to(tl.int32, bitcast=True)
        return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)

    @triton.jit
    def _value(key):
        return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)

    @triton.jit
    def _middle(low, high):
        # Rounded down; the sum of two keys may not fit.
        return (low >> 1) + (high >> 1) + (low & high & 1)

    @triton.jit
    def _thresholds(low, high, evenly):
        # The quarters of the bracket, of its values or of its keys, as keys of low..high - 1.
        bottom, top = _value(low), _value(high)
        half = _middle(low, high)
        p1 = tl.where(evenly, _key(bottom * 0.75 + top * 0.25), _middle(low, half))
        p2 = tl.where(evenly, _key(bottom * 0.5 + top * 0.5), half)
        p3 = tl.where(evenly, _key(bottom * 0.25 + top * 0.75), _middle(half, high))
        p1, p2, p3 = tl.maximum(p1, low), tl.maximum(p2, low), tl.maximum(p3, low)
        p1, p2, p3 = tl.minimum(p1, high - 1), tl.minimum(p2, high - 1), tl.minimum(p3, high - 1)
        return p1, p2, p3, _value(p1), _value(p2), _value(p3), bottom, top

    @triton.jit
    def _scale(temperature):
        # log2(e) / temperature within bounds that keep infinity times zero away.
        return tl.minimum(tl.maximum(1.4426950408889634 / temperature, 2.0**-100), 2.0**100)

    @triton.jit
    def _weights(x, highest, scale):
        # Of +inf the difference to itself would be NaN.
        return tl.where(x == highest, 1.0, tl.exp2((x - highest) * scale))

    @triton.jit
    def _room(target, above, weight, most):
        # How many of the equal values at the threshold are kept: while the sum before one is less than the target.
        return tl.minimum(tl.ceil(tl.div_rn(target - above, weight)), most).to(tl.int32)

    @triton.jit
    def _drawn(ids, weight, before, threshold, size):
        # The first id whose cumulative weight exceeds the threshold, else the last that can be drawn.
        cumulative = before + tl.cumsum(weight, 0)
        first = tl.min(tl.where((weight > 0.0) & (cumulative > threshold), ids, size), 0)
        return tl.where(first < size, first, tl.max(tl.where(weight > 0.0, ids, -1), 0))

    @triton.jit
    def _threshold_in_memory(x_ptr, highest, lowest, scale, target, W, BLOCK: tl.constexpr):
        # The least x with a weight above it of less than the target, and that weight. It lies in (low, high].
        v = tl.arange(0, BLOCK)
        low, high = _key(lowest) - 1, _key(highest)
        above = tl.full((), 0.0, tl.float32)
        passes = 0
        while low + 1 < high:
            p1, p2, p3, t1, t2, t3, bottom, top = _thresholds(low, high, passes < 8)
            passes += 1
            sums1 = tl.full((BLOCK,), 0.0, tl.float32)
            sums2 = tl.full((BLOCK,), 0.0, tl.float32)
            sums3 = tl.full((BLOCK,), 0.0, tl.float32)
            least = tl.full((BLOCK,), float("inf"), tl.float32)
            most = tl.full((BLOCK,), float("-inf"), tl.float32)
            for start in range(0, W, BLOCK):
                x = tl.load(x_ptr + start + v)
                weight = _weights(x, highest, scale)
                sums1 += tl.where(x > t1, weight, 0.0)
                sums2 += tl.where(x > t2, weight, 0.0)
                sums3 += tl.where(x > t3, weight, 0.0)
                least = tl.minimum(least, tl.where(x > bottom, x, float("inf")))
                most = tl.maximum(most, tl.where(x <= top, x, float("-inf")))
            above1, above2, above3 = tl.sum(sums1, 0), tl.sum(sums2, 0), tl.sum(sums3, 0)
            # First to the values that occur in the bracket, then to the thresholds on both sides of the target.
            low = tl.maximum(low, _key(tl.min(least, 0)) - 1)
            high = tl.minimum(high, _key(tl.max(most, 0)))
            low = tl.maximum(low, tl.where(above1 < target, low, p1))
            low = tl.maximum(low, tl.where(above2 < target, low, p2))
            low = tl.maximum(low, tl.where(above3 < target, low, p3))
            high = tl.minimum(high, tl.where(above1 < target, p1, high))
            high = tl.minimum(high, tl.where(above2 < target, p2, high))
            high = tl.minimum(high, tl.where(above3 < target, p3, high))
            # What is above the new end, the largest of the sums that fall short.
            above = tl.maximum(above, tl.where(above1 < target, above1, 0.0))
            above = tl.maximum(above, tl.where(above2 < target, above2, 0.0))
            above = tl.maximum(above, tl.where(above3 < target, above3, 0.0))
        return _value(high), above

    @triton.jit
    def _draw_in_memory(x_ptr, highest, temperature, top_p, uniform, W, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
        v = tl.arange(0, BLOCK)
        scale = _scale(temperature)
        kept_least = tl.full((), float("-inf"), tl.float32)
        room = W
        if top_p < 1.0:
            sums = tl.zeros((BLOCK,), tl.float32)
            lows = tl.full((BLOCK,), float("inf"), tl.float32)
            for start in range(0, W, BLOCK):
                x = tl.load(x_ptr + start + v)
                weight = _weights(x, highest, scale)
                sums += weight
                lows = tl.minimum(lows, tl.where(weight > 0.0, x, float("inf")))
            least = tl.min(lows, 0)
            # Above zero, so that one id is always kept.
            target = tl.maximum(top_p * tl.sum(sums, 0), 1e-30)
            kept_least, above = _threshold_in_memory(x_ptr, highest, least, scale, target, W, BLOCK)
            room = _room(target, above, _weights(kept_least, highest, scale), W)

        # In the order of ids: the kept weight of each block, and the id where the equal values have no more room.
        block = tl.arange(0, BLOCKS)
        weights = tl.zeros((BLOCKS,), tl.float32)
        last = W
        seen = 0
        for start in range(0, W, BLOCK):
            x = tl.load(x_ptr + start + v)
            equal = (x == kept_least).to(tl.int32)
            count = tl.sum(equal, 0)
            if (seen <= room) & (seen + count > room):
                rank = seen + tl.cumsum(equal, 0)
                last = tl.max(tl.where((equal != 0) & (rank <= room), start + v, start - 1), 0)
            seen += count
            kept = (x > kept_least) | ((equal != 0) & (start + v <= last))
            weight = tl.sum(tl.where(kept, _weights(x, highest, scale), 0.0), 0)
            weights = tl.where(block == start // BLOCK, weight, weights)

        cumulative = tl.cumsum(weights, 0)
        threshold = uniform * tl.max(cumulative, 0)
        index = _drawn(block, weights, 0.0, threshold, BLOCKS)
        before = tl.max(tl.where(block < index, cumulative, 0.0), 0)
        x = tl.load(x_ptr + index * BLOCK + v)
        kept = (x > kept_least) | ((x == kept_least) & (index * BLOCK + v <= last))
        weight = tl.where(kept, _weights(x, highest, scale), 0.0)
        return _drawn(index * BLOCK + v, weight, before, threshold, W)

    @triton.jit
    def _pick_text_kernel(
        logits_ptr,
        allowed_ptr,
        rules_ptr,
        seen_ptr,
        slots_ptr,
        settings_ptr,
        uniforms_ptr,
        x_ptr,
        ids_ptr,
        V,
        stride_r,
        stride_a,
        stride_s,
        BLOCK: tl.constexpr,
        BLOCKS: tl.constexpr,
    ):
        r = tl.program_id(0).to(tl.int64)
        W = tl.cdiv(V, BLOCK) * BLOCK
        logits_ptr += r * stride_r
        allowed_ptr += tl.load(rules_ptr + r) * stride_a
        seen_ptr += tl.load(slots_ptr + r) * stride_s
        x_ptr += r * W
        penalty = tl.load(settings_ptr + r * 3)
        temperature = tl.load(settings_ptr + r * 3 + 1)
        top_p = tl.load(settings_ptr + r * 3 + 2)

        v = tl.arange(0, BLOCK)
        best = tl.full((BLOCK,), float("-inf"), tl.float32)
        best_at = tl.zeros((BLOCK,), tl.int32)
        wrong = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, W, BLOCK):
            inside = start + v < V
            x = tl.load(logits_ptr + start + v, mask=inside, other=0.0).to(tl.float32)
            allowed = tl.load(allowed_ptr + start + v, mask=inside, other=0) != 0
            if penalty != 1.0:
                seen = tl.load(seen_ptr + start + v, mask=inside, other=0) != 0
                x = tl.where(seen, tl.where(x > 0.0, tl.div_rn(x, penalty), x * penalty), x)
            x = tl.where(allowed, x, float("-inf"))
            wrong |= (x != x).to(tl.int32)
            # Strictly more: an equal logit in a later block leaves the lower id in place.
            best_at = tl.where(x > best, start + v, best_at)
            best = tl.where(x > best, x, best)
            if temperature > 0.0:
                tl.store(x_ptr + start + v, x)
        highest = tl.max(best, 0)
        picked = tl.min(tl.where(best == highest, best_at, W), 0)
        picked = tl.where((tl.max(wrong, 0) != 0) | (highest == float("-inf")), -1, picked)
        if (temperature > 0.0) & (picked >= 0):
            # What one thread has stored another loads.
            tl.debug_barrier()
            uniform = tl.load(uniforms_ptr + r)
            picked = _draw_in_memory(x_ptr, highest, temperature, top_p, uniform, W, BLOCK, BLOCKS)
        tl.store(ids_ptr + r, picked.to(tl.int64))

    @triton.jit
    def _pick_image_kernel(
        logits_ptr,
        settings_ptr,
        uniforms_ptr,
        columns_ptr,
        V,
        stride_g,
        stride_r,
        BLOCK: tl.constexpr,
    ):
        r = tl.program_id(0).to(tl.int64)
        full_ptr = logits_ptr + r * stride_r
        image_ptr = full_ptr + stride_g
        none_ptr = image_ptr + stride_g
        text = tl.load(settings_ptr + r * 4)
        image = tl.load(settings_ptr + r * 4 + 1)
        temperature = tl.load(settings_ptr + r * 4 + 2)
        top_p = tl.load(settings_ptr + r * 4 + 3)

        v = tl.arange(0, BLOCK)
        full_x = tl.load(full_ptr + v, mask=v < V, other=0.0).to(tl.float32)
        image_x = tl.load(image_ptr + v, mask=v < V, other=0.0).to(tl.float32)
        none_x = tl.load(none_ptr + v, mask=v < V, other=0.0).to(tl.float32)
        x = (none_x + image * (image_x - none_x)) + text * (full_x - image_x)
        x = tl.where(v < V, x, float("-inf"))
        wrong = tl.max((x != x).to(tl.int32), 0)
        highest = tl.max(tl.where(x == x, x, float("-inf")), 0)
        picked = tl.min(tl.where(x == highest, v, BLOCK), 0)
        picked = tl.where((wrong != 0) | (highest == float("-inf")), -1, picked)

        if (temperature > 0.0) & (picked >= 0):
            scale = _scale(temperature)
            weight = _weights(x, highest, scale)
            if top_p < 1.0:
                target = tl.maximum(top_p * tl.sum(weight, 0), 1e-30)
                low = _key(tl.min(tl.where(weight > 0.0, x, float("inf")), 0)) - 1
                high = _key(highest)
                above = tl.zeros((), tl.float32)
                while low + 1 < high:
                    middle = _middle(low, high)
                    found = tl.sum(tl.where(x > _value(middle), weight, 0.0), 0)
                    above = tl.where(found < target, found, above)
                    high = tl.where(found < target, middle, high)
                    low = tl.where(found < target, low, middle)
                least = _value(high)
                room = _room(target, above, _weights(least, highest, scale), BLOCK)
                rank = tl.cumsum((x == least).to(tl.int32), 0)
                weight = tl.where((x > least) | ((x == least) & (rank <= room)), weight, 0.0)
            threshold = tl.load(uniforms_ptr + r) * tl.sum(weight, 0)
            picked = _drawn(v, weight, 0.0, threshold, BLOCK)
        tl.store(columns_ptr + r, picked.to(tl.int64))


def pick_text_ref(logits_RV, allowed_AV, rules_R, seen_SV, slots_R, settings_R3, uniforms_R) -> torch.Tensor:
    """The definition in plain torch; arguments as `pick_text`."""
    penalty_R1, temperature_R1, top_p_R1 = settings_R3.split(1, 1)
    x_RV = logits_RV.float()
    lowered_RV = torch.where(x_RV > 0, x_RV / penalty_R1, x_RV * penalty_R1)
    x_RV = torch.where(seen_SV[slots_R], lowered_RV, x_RV).masked_fill_(~allowed_AV[rules_R], -torch.inf)
    return _pick_ref(x_RV, temperature_R1, top_p_R1, uniforms_R)


def pick_image_ref(logits_GRV, settings_R4, uniforms_R) -> torch.Tensor:
    """The definition in plain torch; arguments as `pick_image`."""
    full_RV, image_RV, none_RV = logits_GRV.float()
    text_R1, image_R1, temperature_R1, top_p_R1 = settings_R4.split(1, 1)
    x_RV = none_RV + image_R1 * (image_RV - none_RV) + text_R1 * (full_RV - image_RV)
    return _pick_ref(x_RV, temperature_R1, top_p_R1, uniforms_R)


def _pick_ref(x_RV, temperature_R1, top_p_R1, uniforms_R) -> torch.Tensor:
    picked_R = x_RV.argmax(1)
    highest_R1 = x_RV.gather(1, picked_R[:, None])
    sampled_R = temperature_R1[:, 0] > 0
    # To look at the settings a host would wait for its GPU, which draws for all rows instead.
    # A CPU takes as many rows as its passes then find in the cache.
    on_cpu = x_RV.device.type == "cpu"
    for rows in sampled_R.nonzero()[:, 0].split(max(1, REF_VALUES // x_RV.shape[1])) if on_cpu else [slice(None)]:
        parts = (part[rows] for part in (x_RV, highest_R1, temperature_R1, top_p_R1, uniforms_R))
        picked_R[rows] = torch.where(sampled_R[rows], _draw_ref(*parts), picked_R[rows])
    # False for a NaN, which argmax takes for the largest, too.
    return picked_R.where(highest_R1[:, 0] > -torch.inf, -1)


def _draw_ref(x_RV, highest_R1, temperature_R1, top_p_R1, uniforms_R) -> torch.Tensor:
    """Ids of rows that sample, by inverting the float64 cumulative distribution in the order of ids."""
    highest_R1, temperature_R1 = highest_R1.double(), temperature_R1.double()

    def weigh(values):
        away = (values - highest_R1).masked_fill_(values == highest_R1, 0)
        return away.div_(temperature_R1).exp_()

    weights_RV = weigh(x_RV)
    target_R1 = top_p_R1.double() * weights_RV.sum(1, keepdim=True)
    V = x_RV.shape[1]
    likeliest = min(V, REF_LIKELIEST) if x_RV.device.type == "cpu" else V
    ordered = x_RV.topk(likeliest, 1).values
    cumulative = weigh(ordered).cumsum_(1)
    if likeliest < V and bool(((top_p_R1 < 1) & (cumulative[:, -1:] < target_R1)).any()):
        ordered = x_RV.sort(1, descending=True).values
        cumulative = weigh(ordered).cumsum_(1)

    # An id is kept while the weight before it is less than the target. Of the values equal to the last one as many
    # are kept as the count says, the lowest ids.
    count_R1 = 1 + (cumulative[:, :-1] < target_R1).sum(1, keepdim=True)
    least_R1 = ordered.gather(1, count_R1 - 1)
    room_R1 = count_R1 - (ordered > least_R1).sum(1, keepdim=True)
    equal_RV = x_RV == least_R1
    kept_RV = (x_RV > least_R1) | (equal_RV & (equal_RV.cumsum(1) <= room_R1)) | (top_p_R1 >= 1)
    cumulative_RV = weights_RV.mul_(kept_RV).cumsum_(1)
    total_R1 = cumulative_RV[:, -1:].contiguous()
    drawn_R1 = torch.searchsorted(cumulative_RV, uniforms_R[:, None] * total_R1, right=True)
    # The last id of a weight, where the uniform number was rounded to 1.
    return torch.minimum(drawn_R1, torch.searchsorted(cumulative_RV, total_R1))[:, 0]


def _pick_text_triton(logits_RV, allowed_AV, rules_R, seen_SV, slots_R, settings_R3, uniforms_R) -> torch.Tensor:
    R, V = logits_RV.shape
    plan, options = _plan(V, BLOCK, WARPS)
    blocks = triton.cdiv(V, plan["BLOCK"])
    x_RW = torch.empty(R, blocks * plan["BLOCK"], dtype=torch.float32, device=logits_RV.device)
    ids_R = torch.empty(R, dtype=torch.int64, device=logits_RV.device)
    with torch.cuda.device_of(logits_RV):
        _pick_text_kernel[(R,)](
            logits_RV,
            allowed_AV.view(torch.uint8),
            rules_R,
            seen_SV.view(torch.uint8),
            slots_R,
            settings_R3,
            uniforms_R,
            x_RW,
            ids_R,
            V,
            logits_RV.stride(0),
            allowed_AV.stride(0),
            seen_SV.stride(0),
            BLOCKS=triton.next_power_of_2(blocks),
            **plan,
            **options,
        )
    return ids_R


def _pick_image_triton(logits_GRV, settings_R4, uniforms_R) -> torch.Tensor:
    _, R, V = logits_GRV.shape
    plan, options = _plan(V, MAX_IMAGE_V, IMAGE_WARPS)
    columns_R = torch.empty(R, dtype=torch.int64, device=logits_GRV.device)
    with torch.cuda.device_of(logits_GRV):
        strides = logits_GRV.stride()[:2]
        _pick_image_kernel[(R,)](logits_GRV, settings_R4, uniforms_R, columns_R, V, *strides, **plan, **options)
    return columns_R


def _plan(V: int, most: int, warps: int) -> tuple[dict, dict]:
    """Constants and launch options of a kernel for rows of V: a block of at most `most`, and at most so many warps."""
    block = min(max(triton.next_power_of_2(V), 128), most)
    return {"BLOCK": block}, {"num_warps": min(block // 128, warps), "num_stages": 1, "enable_fp_fusion": False}


def pick_text(
    logits_RV: torch.Tensor,
    allowed_AV: torch.Tensor,
    rules_R: torch.Tensor,
    seen_SV: torch.Tensor,
    slots_R: torch.Tensor,
    settings_R3: torch.Tensor,
    uniforms_R: torch.Tensor,
    impl: str = "auto",
) -> torch.Tensor:
    """The next id of each row, int64 [R]; -1 for a row with a NaN or with nothing to choose from.

    logits_RV: [R, V], float32, float16 or bfloat16, a row's logits contiguous; not written. allowed_AV: bool [A, V],
    row r may take the ids of mask rules_R[r]. seen_SV: bool [S, V], the ids already in sequence slots_R[r]: their
    logits are divided by the penalty where positive, else multiplied. rules_R, slots_R: int64 [R], not checked against
    A and S. settings_R3: float32 [R, 3], repetition penalty (1: none), temperature (0: the likeliest id, the lowest of
    several), top_p: the likeliest ids are kept until their probability reaches it, at least one; all of them from 1 on.
    uniforms_R: float32 [R] in [0, 1): the id drawn is the first whose cumulative probability exceeds it, in the order
    of ids. impl: "auto" (triton on a GPU, else torch), "triton" (a GPU, or TRITON_INTERPRET=1), "torch".

    Raises ValueError for shapes, dtypes, devices or layouts that do not fit, RuntimeError where impl="triton" cannot
    run.
    """
    if logits_RV.ndim != 2 or logits_RV.shape[1] == 0:
        raise ValueError(f"logits {list(logits_RV.shape)}: expected [R, V] with V of at least 1")
    R, V = logits_RV.shape
    _check_logits(logits_RV)
    for name, mask in (("allowed", allowed_AV), ("seen", seen_SV)):
        if mask.ndim != 2 or mask.shape[1] != V or mask.dtype != torch.bool or (V > 1 and mask.stride(1) != 1):
            found = f"{list(mask.shape)}, {mask.dtype}, strides {mask.stride()}"
            raise ValueError(f"{name} {found}: expected [any, {V}], torch.bool, contiguous rows")
    _check_rows("rules", rules_R, (R,), torch.int64)
    _check_rows("slots", slots_R, (R,), torch.int64)
    _check_rows("settings", settings_R3, (R, 3), torch.float32)
    _check_rows("uniforms", uniforms_R, (R,), torch.float32)
    tensors = {"allowed": allowed_AV, "rules": rules_R, "seen": seen_SV, "slots": slots_R}
    _check_devices(logits_RV, tensors | {"settings": settings_R3, "uniforms": uniforms_R})
    fused = use_triton(impl, logits_RV)
    if R == 0:
        return torch.empty(0, dtype=torch.int64, device=logits_RV.device)
    run = _pick_text_triton if fused else pick_text_ref
    return run(logits_RV, allowed_AV, rules_R, seen_SV, slots_R, settings_R3, uniforms_R)


def pick_image(
    logits_GRV: torch.Tensor, settings_R4: torch.Tensor, uniforms_R: torch.Tensor, impl: str = "auto"
) -> torch.Tensor:
    """The next column of each row after guidance, int64 [R]; -1 for a row with a NaN or with nothing above -inf.

    logits_GRV: [3, R, V], V of at most MAX_IMAGE_V, types and layout as for `pick_text`; the streams are full,
    image-conditioned and unconditioned, and x = none + s_image (image - none) + s_text (full - image).
    settings_R4: float32 [R, 4], s_text, s_image, temperature, top_p. uniforms_R, the draw, impl and what is raised: as
    for `pick_text`; every column is allowed.
    """
    if logits_GRV.ndim != 3 or logits_GRV.shape[0] != 3 or not 1 <= logits_GRV.shape[2] <= MAX_IMAGE_V:
        raise ValueError(f"logits {list(logits_GRV.shape)}: expected [3, R, V] with V of 1 to {MAX_IMAGE_V}")
    R = logits_GRV.shape[1]
    _check_logits(logits_GRV)
    _check_rows("settings", settings_R4, (R, 4), torch.float32)
    _check_rows("uniforms", uniforms_R, (R,), torch.float32)
    _check_devices(logits_GRV, {"settings": settings_R4, "uniforms": uniforms_R})
    fused = use_triton(impl, logits_GRV)
    if R == 0:
        return torch.empty(0, dtype=torch.int64, device=logits_GRV.device)
    return (_pick_image_triton if fused else pick_image_ref)(logits_GRV, settings_R4, uniforms_R)


def _check_logits(logits: torch.Tensor) -> None:
    if logits.dtype not in FLOAT_DTYPES:
        raise ValueError(f"logits {logits.dtype}: expected float32, float16 or bfloat16")
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        raise ValueError(f"logits of strides {logits.stride()}: expected contiguous rows")


def _check_rows(name: str, tensor: torch.Tensor, shape: tuple, dtype: torch.dtype) -> None:
    if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
        found = f"{list(tensor.shape)}, {tensor.dtype}, strides {tensor.stride()}"
        raise ValueError(f"{name} {found}: expected {list(shape)}, {dtype}, contiguous")


def _check_devices(logits: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.device != logits.device:
            raise ValueError(f"logits on {logits.device}, {name} on {tensor.device}")
