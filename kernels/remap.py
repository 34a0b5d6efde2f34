"""Codes to vocabulary ids and back, and whole images written into a sequence buffer.

`codes` are codebook entries 0..num_codes-1, `ids` vocabulary ids; code c has the id image_start + c. Both are given
in, because only the vocabulary module knows them. Every value is range-checked in the pass that converts it: eager
torch would read the data twice more for the check, and fill a sequence buffer in three passes.

Cost: bound by memory; each element is read once and written once, and an image costs two more writes (boi and eoi).
The check ends in one transfer of a few bytes to the host, so on a GPU each call waits for the device.

Shapes: N images of P codes (1024 in the real model), a flat buffer of T ids.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

from medmax_fast.kernels.blocks import blocks
from medmax_fast.kernels.launch import use_triton

DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint16, torch.uint8)
BUFFER_DTYPES = (torch.int64, torch.int32, torch.uint16)
# There is no floating point here; the option is set because triton warns where it is not.
OPTIONS = {"enable_fp_fusion": True}
# What the kernels leave in a cell of `bad` when they found nothing wrong.
NOTHING = torch.iinfo(torch.int64).max


if triton is not None:

    @triton.jit
    def _shift_kernel(in_ptr, out_ptr, bad_ptr, size, low, high, shift, BLOCK: tl.constexpr):
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(in_ptr + i, mask=i < size, other=0).to(tl.int64)
        wrong = (i < size) & ((value < low) | (value >= high))
        tl.store(out_ptr + i, (value + shift).to(out_ptr.dtype.element_ty), mask=i < size)
        first = tl.min(tl.where(wrong, i, size), axis=0)
        tl.atomic_min(bad_ptr, first.to(tl.int64), mask=first < size)

    @triton.jit
    def _span_kernel(
        out_ptr,
        starts_ptr,
        codes_ptr,
        bad_ptr,
        T,
        P,
        boi,
        eoi,
        image_start,
        num_codes,
        stride_t,
        stride_n,
        stride_p,
        BLOCK: tl.constexpr,
    ):
        n = tl.program_id(0).to(tl.int64)
        # Position in the span: 0 is boi, 1..P the image, P + 1 eoi.
        i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        start = tl.load(starts_ptr + n)
        # Written so that a start near the end of the int64 range cannot overflow.
        fits = (start >= 0) & (start <= T - P - 2)
        tl.atomic_min(bad_ptr, n, mask=~fits)

        inside = (i >= 1) & (i <= P)
        code = tl.load(codes_ptr + n * stride_n + (i - 1).to(tl.int64) * stride_p, mask=inside, other=0).to(tl.int64)
        position = n * P + i - 1
        wrong = inside & ((code < 0) | (code >= num_codes))
        first = tl.min(tl.where(wrong, position, n * P + P), axis=0)
        tl.atomic_min(bad_ptr + 1, first, mask=first < n * P + P)

        value = tl.where(i == 0, boi, tl.where(i == P + 1, eoi, code + image_start))
        if fits:
            tl.store(out_ptr + (start + i) * stride_t, value.to(out_ptr.dtype.element_ty), mask=i <= P + 1)


def _shift_ref(values: torch.Tensor, low: int, high: int, shift: int, dtype: torch.dtype):
    """values + shift as `dtype`, and the flat position of the first value outside low..high-1 (or NOTHING)."""
    wide = values.to(torch.int64)
    wrong = (wide < low) | (wide >= high)
    first = int(wrong.flatten().int().argmax()) if wrong.any() else NOTHING
    return (wide + shift).to(dtype), first


def codes_to_ids_ref(codes: torch.Tensor, image_start: int, num_codes: int, *, dtype=torch.int64) -> torch.Tensor:
    """`codes_to_ids` in plain torch."""
    ids, bad = _shift_ref(codes, 0, num_codes, image_start, dtype)
    _raise_bad_code(codes, bad, num_codes)
    return ids


def ids_to_codes_ref(ids: torch.Tensor, image_start: int, num_codes: int, *, dtype=torch.int64) -> torch.Tensor:
    """`ids_to_codes` in plain torch."""
    codes, bad = _shift_ref(ids, image_start, image_start + num_codes, -image_start, dtype)
    _raise_bad_id(ids, bad, image_start, num_codes)
    return codes


def write_image_spans_ref(
    out_ids: torch.Tensor,
    starts: torch.Tensor,
    codes_NP: torch.Tensor,
    boi: int,
    eoi: int,
    image_start: int,
    num_codes: int = 8192,
) -> torch.Tensor:
    """`write_image_spans` in plain torch: checks everything, then writes image by image."""
    P = codes_NP.shape[1]
    wrong = (starts < 0) | (starts > len(out_ids) - P - 2)
    _raise_bad_start(out_ids, starts, int(wrong.int().argmax()) if wrong.any() else NOTHING, P)
    ids_NP = codes_to_ids_ref(codes_NP, image_start, num_codes, dtype=out_ids.dtype)
    for start, ids_P in zip(starts.tolist(), ids_NP, strict=True):
        out_ids[start] = boi
        out_ids[start + 1 : start + 1 + P] = ids_P
        out_ids[start + 1 + P] = eoi
    return out_ids


def _shift_triton(values: torch.Tensor, low: int, high: int, shift: int, dtype: torch.dtype):
    values = values.contiguous()
    out = torch.empty(values.shape, dtype=dtype, device=values.device)
    if values.numel() == 0:
        return out, NOTHING
    bad = torch.full((1,), NOTHING, dtype=torch.int64, device=values.device)
    numbers = blocks("shift", values.device)
    grid = (triton.cdiv(values.numel(), numbers["BLOCK"]),)
    with torch.cuda.device_of(values):
        _shift_kernel[grid](values, out, bad, values.numel(), low, high, shift, **numbers, **OPTIONS)
    return out, bad.item()


def _write_image_spans_triton(out_ids, starts, codes_NP, boi, eoi, image_start, num_codes) -> torch.Tensor:
    N, P = codes_NP.shape
    starts = starts.contiguous()
    bad = torch.full((2,), NOTHING, dtype=torch.int64, device=out_ids.device)
    numbers = blocks("span", out_ids.device)
    with torch.cuda.device_of(out_ids):
        _span_kernel[(N, triton.cdiv(P + 2, numbers["BLOCK"]))](
            out_ids,
            starts,
            codes_NP,
            bad,
            len(out_ids),
            P,
            boi,
            eoi,
            image_start,
            num_codes,
            out_ids.stride(0),
            *codes_NP.stride(),
            **numbers,
            **OPTIONS,
        )
    bad_start, bad_code = bad.tolist()
    _raise_bad_start(out_ids, starts, bad_start, P)
    _raise_bad_code(codes_NP, bad_code, num_codes)
    return out_ids


def codes_to_ids(
    codes: torch.Tensor, image_start: int, num_codes: int = 8192, *, dtype: torch.dtype = torch.int64, impl="auto"
) -> torch.Tensor:
    """Vocabulary ids of an array of codes: code + image_start, same shape, as `dtype` (int64, int32 or uint16).

    codes: integers of any shape and strides. impl: "auto" (triton on a GPU, else torch), "triton" or "torch".
    Raises ValueError naming the first code outside 0..num_codes-1 and its position, or ids that `dtype` cannot hold.
    """
    _check_dtypes(codes.dtype, DTYPES, dtype)
    _check_fits(image_start + num_codes - 1, dtype)
    if not use_triton(impl, codes):
        return codes_to_ids_ref(codes, image_start, num_codes, dtype=dtype)
    ids, bad = _shift_triton(codes, 0, num_codes, image_start, dtype)
    _raise_bad_code(codes, bad, num_codes)
    return ids


def ids_to_codes(
    ids: torch.Tensor, image_start: int, num_codes: int = 8192, *, dtype: torch.dtype = torch.int64, impl="auto"
) -> torch.Tensor:
    """Codes of an array of image ids: id - image_start, same shape, as `dtype`.

    ids: integers of any shape and strides. num_codes, dtype and impl as for `codes_to_ids`.
    Raises ValueError naming the first id that is not an image id and its position.
    """
    _check_dtypes(ids.dtype, DTYPES, dtype)
    _check_fits(num_codes - 1, dtype)
    if not use_triton(impl, ids):
        return ids_to_codes_ref(ids, image_start, num_codes, dtype=dtype)
    codes, bad = _shift_triton(ids, image_start, image_start + num_codes, -image_start, dtype)
    _raise_bad_id(ids, bad, image_start, num_codes)
    return codes


def write_image_spans(
    out_ids: torch.Tensor,
    starts: torch.Tensor,
    codes_NP: torch.Tensor,
    boi: int,
    eoi: int,
    image_start: int,
    num_codes: int = 8192,
    *,
    impl: str = "auto",
) -> torch.Tensor:
    """Write [boi] + P image ids + [eoi] of image n at out_ids[starts[n]], in place; returns out_ids.

    out_ids: buffer [T], int64, int32 or uint16, any stride. starts: int64 [N]; the spans must not overlap (not
    checked). codes_NP: integers [N, P], any strides. All on one device; nothing outside the spans is touched.
    boi, eoi: ids before and behind an image. image_start: the id of code 0. impl as for `codes_to_ids`.

    Raises ValueError naming the first start whose span leaves the buffer (that span is not written) or the first
    code outside 0..num_codes-1; after either the contents of the other spans are undefined.
    """
    _check_dtypes(codes_NP.dtype, DTYPES, out_ids.dtype)
    _check_fits(max(boi, eoi, image_start + num_codes - 1), out_ids.dtype)
    if out_ids.ndim != 1 or codes_NP.ndim != 2 or starts.shape != codes_NP.shape[:1] or starts.dtype != torch.int64:
        raise ValueError(
            f"buffer {list(out_ids.shape)}, starts {starts.dtype} {list(starts.shape)}, codes {list(codes_NP.shape)}: "
            "expected [T], int64 [N] and [N, P]"
        )
    if not out_ids.device == starts.device == codes_NP.device:
        raise ValueError(f"buffer on {out_ids.device}, starts on {starts.device}, codes on {codes_NP.device}")
    fused = use_triton(impl, out_ids)
    if len(codes_NP) == 0:
        return out_ids
    write = _write_image_spans_triton if fused else write_image_spans_ref
    return write(out_ids, starts, codes_NP, boi, eoi, image_start, num_codes)


def _position(values: torch.Tensor, flat: int) -> tuple[int, ...]:
    position = []
    for size in reversed(values.shape):
        flat, index = divmod(flat, size)
        position.insert(0, index)
    return tuple(position)


def _raise_bad_code(codes: torch.Tensor, flat: int, num_codes: int) -> None:
    if flat != NOTHING:
        at = _position(codes, flat)
        raise ValueError(f"image code {codes[at].item()} at position {at} is outside 0..{num_codes - 1}")


def _raise_bad_id(ids: torch.Tensor, flat: int, image_start: int, num_codes: int) -> None:
    if flat != NOTHING:
        at = _position(ids, flat)
        image_ids = f"{image_start}..{image_start + num_codes - 1}"
        raise ValueError(f"id {ids[at].item()} at position {at} is not an image id ({image_ids})")


def _raise_bad_start(out_ids: torch.Tensor, starts: torch.Tensor, n: int, P: int) -> None:
    if n != NOTHING:
        raise ValueError(
            f"image {n} starts at {starts[n].item()}: its {P + 2} ids do not fit a buffer of {len(out_ids)} ids"
        )


def _check_dtypes(given: torch.dtype, allowed: tuple, out: torch.dtype) -> None:
    if given not in allowed:
        raise ValueError(f"values of {given}: expected {', '.join(str(t) for t in allowed)}")
    if out not in BUFFER_DTYPES:
        raise ValueError(f"output of {out}: expected {', '.join(str(t) for t in BUFFER_DTYPES)}")


def _check_fits(largest: int, dtype: torch.dtype) -> None:
    if largest > torch.iinfo(dtype).max:
        raise ValueError(f"id {largest} does not fit {dtype}")
