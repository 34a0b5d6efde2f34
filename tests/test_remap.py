"""Codes, ids and image spans: both paths against plain Python, poisoned buffers, every range error."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medmax_fast.kernels import remap

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu(required=False)
BOTH = pytest.mark.parametrize("impl", ["torch", "triton"])
BOI, EOI, IMAGE_START = 8197, 8196, 4
POISON = 54321


def integers(values, dtype=torch.int64):
    return torch.tensor(values, dtype=torch.int64).to(dtype).to(DEVICE)


def spans_by_hand(buffer, starts, codes):
    buffer = list(buffer)
    for start, row in zip(starts, codes, strict=True):
        buffer[start : start + len(row) + 2] = [BOI, *(code + IMAGE_START for code in row), EOI]
    return buffer


@BOTH
@pytest.mark.parametrize("out", remap.BUFFER_DTYPES)
@pytest.mark.parametrize("dtype", remap.DTYPES)
def test_round_trip(dtype, out, impl, poisoned):
    limit = min(8192, torch.iinfo(dtype).max + 1)
    codes = (torch.arange(3 * 1367) * 31 % limit).reshape(3, 1367)
    ids = remap.codes_to_ids(codes.to(dtype).to(DEVICE), IMAGE_START, dtype=out, impl=impl)
    assert ids.dtype == out and ids.shape == codes.shape
    assert ids.tolist() == (codes + 4).tolist()
    back = remap.ids_to_codes(ids, IMAGE_START, dtype=out, impl=impl)
    assert back.dtype == out and back.tolist() == codes.tolist()
    assert bool(poisoned) == (impl == "triton")


@BOTH
def test_fresh_values(impl, fresh_seed, poisoned):
    """Other codes, sizes and places on every run."""
    draw = random.Random(fresh_seed)
    N, P, start, gap = draw.randint(2, 9), draw.randint(300, 3000), draw.randint(1, 50000), draw.randint(0, 5)
    codes = torch.tensor([[draw.randrange(8192) for _ in range(P)] for _ in range(N)], device=DEVICE)
    ids = remap.codes_to_ids(codes, start, dtype=torch.uint16, impl=impl)
    assert ids.tolist() == (codes + start).tolist()
    assert remap.ids_to_codes(ids, start, dtype=torch.int32, impl=impl).tolist() == codes.tolist()
    starts = draw.sample(range(gap, gap + N * (P + 3), P + 3), N)
    buffer = integers([POISON] * (gap + N * (P + 3)), torch.uint16)
    remap.write_image_spans(buffer, integers(starts), codes, BOI, EOI, IMAGE_START, impl=impl)
    assert buffer.tolist() == spans_by_hand([POISON] * len(buffer), starts, codes.tolist())


@BOTH
def test_shapes_and_strides(impl):
    codes = torch.arange(24, device=DEVICE).reshape(4, 6)
    for view in (codes.t(), codes[::2, 1::2], codes[1, 2], codes[:0], codes[None]):
        ids = remap.codes_to_ids(view, 10, 24, impl=impl)
        assert ids.shape == view.shape and ids.tolist() == (view + 10).tolist()
        assert remap.ids_to_codes(ids, 10, 24, impl=impl).tolist() == view.tolist()


@BOTH
@pytest.mark.parametrize("bad", [-1, 8192, 2**40, -(2**62)])
@pytest.mark.parametrize("at", [0, 1023, 1024, 2998])
def test_first_bad_code_is_named(at, bad, impl):
    codes = torch.full((3000,), 8191, device=DEVICE)
    codes[at] = bad
    codes[at + 1 :: 700] = -77
    with pytest.raises(ValueError, match=rf"^image code {bad} at position \({at},\) is outside 0\.\.8191$"):
        remap.codes_to_ids(codes, IMAGE_START, impl=impl)


@BOTH
@pytest.mark.parametrize("bad", [3, 8196, -5, 65535])
def test_first_bad_id_is_named(bad, impl):
    ids = torch.full((5, 4), 4, device=DEVICE)
    ids[2, 3], ids[3, 0] = bad, 0
    with pytest.raises(ValueError, match=rf"^id {bad} at position \(2, 3\) is not an image id \(4\.\.8195\)$"):
        remap.ids_to_codes(ids, IMAGE_START, impl=impl)
    # The position is that of the view given, not of its memory.
    with pytest.raises(ValueError, match=r"^id 0 at position \(0, 3\)"):
        remap.ids_to_codes(ids.t(), IMAGE_START, impl=impl)


@BOTH
@pytest.mark.parametrize("dtype", remap.BUFFER_DTYPES)
@pytest.mark.parametrize("P", [1, 254, 255, 1024])
def test_spans_touch_nothing_else(P, dtype, impl):
    span = P + 2
    starts = [span * 2 + 5, 0, span + 1, 4 * span + 9 - span]
    T = 4 * span + 9
    codes = (torch.arange(4 * P) * 37 % 8192).reshape(4, P)
    buffer = integers([POISON] * T, dtype)
    result = remap.write_image_spans(buffer, integers(starts), codes.to(DEVICE), BOI, EOI, IMAGE_START, impl=impl)
    assert result is buffer
    expected = spans_by_hand([POISON] * T, starts, codes.tolist())
    assert expected.count(POISON) == T - 4 * span > 0
    assert buffer.tolist() == expected


@BOTH
def test_spans_with_strides(impl):
    codes = torch.arange(40).reshape(8, 5)
    memory = integers([POISON] * 60)
    buffer, starts = memory[::2], torch.tensor([[1, 0], [16, 0], [9, 0]])[:, 0].to(DEVICE)
    view = codes.t()[::2].to(DEVICE)[:, 1:6]
    remap.write_image_spans(buffer, starts, view, BOI, EOI, IMAGE_START, impl=impl)
    assert buffer.tolist() == spans_by_hand([POISON] * 30, starts.tolist(), view.tolist())
    assert (memory[1::2] == POISON).all()


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_spans_at_any_free_place(data):
    P = data.draw(st.integers(1, 9))
    gaps = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=6))
    starts = [sum(gaps[: i + 1]) + i * (P + 2) for i in range(len(gaps))]
    T = starts[-1] + P + 2 + data.draw(st.integers(0, 3))
    codes = data.draw(st.lists(st.lists(st.integers(0, 8191), min_size=P, max_size=P), min_size=len(gaps),
                               max_size=len(gaps)))  # fmt: skip
    expected = spans_by_hand([POISON] * T, starts, codes)
    for impl in ("torch", "triton"):
        buffer = integers([POISON] * T, torch.uint16)
        remap.write_image_spans(buffer, integers(starts), integers(codes), BOI, EOI, IMAGE_START, impl=impl)
        assert buffer.tolist() == expected


@BOTH
@pytest.mark.parametrize("start", [-1, 15, 2**62, -(2**63), 2**63 - 1])
def test_a_span_outside_the_buffer_is_refused(start, impl):
    # A window in a larger allocation: what lies around the buffer must survive.
    memory = integers([POISON] * 60)
    buffer = memory[20:40]
    with pytest.raises(ValueError, match=f"^image 1 starts at {start}: its 6 ids do not fit a buffer of 20 ids$"):
        remap.write_image_spans(
            buffer, integers([0, start, -9]), integers([[1] * 4] * 3), BOI, EOI, IMAGE_START, impl=impl
        )
    assert (memory[:20] == POISON).all() and (memory[40:] == POISON).all()
    assert (buffer[6:] == POISON).all()


@BOTH
def test_a_buffer_shorter_than_a_span(impl):
    with pytest.raises(ValueError, match="image 0 starts at 0: its 6 ids do not fit a buffer of 3 ids"):
        remap.write_image_spans(integers([0] * 3), integers([0]), integers([[1] * 4]), BOI, EOI, IMAGE_START, impl=impl)


@BOTH
@pytest.mark.parametrize("bad", [-1, 8192])
def test_a_bad_code_in_a_span_is_named(bad, impl):
    codes = torch.ones(3, 1024, dtype=torch.int64, device=DEVICE)
    codes[1, 700], codes[1, 800], codes[2, 0] = bad, -7, -7
    buffer = integers([POISON] * 4000)
    with pytest.raises(ValueError, match=rf"^image code {bad} at position \(1, 700\) is outside 0\.\.8191$"):
        remap.write_image_spans(buffer, integers([0, 1100, 2200]), codes, BOI, EOI, IMAGE_START, impl=impl)
    assert (buffer[1026:1100] == POISON).all() and (buffer[2200 + 1026 :] == POISON).all()


@BOTH
def test_no_images(impl):
    buffer = integers([POISON] * 5)
    empty = torch.empty(0, 1024, dtype=torch.int64, device=DEVICE)
    remap.write_image_spans(buffer, empty[:, 0], empty, BOI, EOI, IMAGE_START, impl=impl)
    assert buffer.tolist() == [POISON] * 5


def test_bad_arguments():
    ok = dict(out_ids=integers([0] * 9), starts=integers([0]), codes_NP=integers([[1, 2]]), boi=BOI, eoi=EOI)
    ok["image_start"] = IMAGE_START
    remap.write_image_spans(**ok)
    for change, message in [
        ({"out_ids": integers([[0] * 9])}, "buffer"),
        ({"starts": integers([0], torch.int32)}, "starts torch.int32"),
        ({"starts": integers([0, 4])}, r"starts torch.int64 \[2\]"),
        ({"codes_NP": integers([1, 2])}, "codes"),
        ({"codes_NP": torch.ones(1, 2)}, "float32"),
        ({"out_ids": torch.zeros(9)}, "output of torch.float32"),
        ({"out_ids": integers([0] * 9, torch.uint16), "boi": 70000}, "id 70000 does not fit torch.uint16"),
        ({"starts": torch.zeros(1, dtype=torch.int64, device="meta")}, "starts on meta"),
        ({"impl": "gpu"}, "impl 'gpu'"),
    ]:
        with pytest.raises(ValueError, match=message):
            remap.write_image_spans(**{**ok, **change})
    with pytest.raises(ValueError, match="id 66999 does not fit"):
        remap.codes_to_ids(integers([1]), 65000, 2000, dtype=torch.uint16)
    with pytest.raises(ValueError, match="float32"):
        remap.ids_to_codes(torch.ones(3), IMAGE_START)
