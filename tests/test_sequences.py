"""A row of text and images becomes the published sequence of ids; every mismatch is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from medmax_fast.data.sequences import count_images, expand, expand_rows, integer_array, open_tokenizer, ready_ids
from medmax_fast.runtime import InputError
from medmax_fast.vocab import IMAGE_CODES, IMAGE_IDS, IdLayout


@pytest.fixture(scope="module")
def tokenizer(golden):
    return open_tokenizer(golden / "checkpoint")


def test_golden_sequences(golden, tokenizer):
    for line in (golden / "sequences.jsonl").read_text().splitlines():
        row = json.loads(line)
        ids = tokenizer.encode(row["text"])
        images = [np.array(row["image_tokens"])] * count_images(ids, tokenizer.layout)
        found = expand(ids, images, tokenizer.layout)
        assert found.dtype == np.int64 and found.tolist() == row["tokens"]


LAYOUT = IdLayout(0, 1, 2, 3, 4, 8192, 8196, 8197, 8710, 8711, 8712, 9000)
text_ids = st.lists(st.sampled_from([8711, 8711, 8710, 3, *range(8712, 8720)]), max_size=12)


@given(text_ids, st.integers(0, 2**32 - 1))
def test_expansion_equals_splicing(text, seed):
    images = np.random.default_rng(seed).integers(0, 8192, (text.count(8711), IMAGE_CODES))
    expected, remaining = [0], iter(images)
    for i in text:
        expected += [8197, *(next(remaining) + 4).tolist(), 8196] if i == 8711 else [i]
    found = expand(text, list(images), LAYOUT)
    assert found.tolist() == [*expected, 2]
    assert len(found) == 2 + len(text) + len(images) * (IMAGE_IDS - 1)


def test_each_image_gets_its_own_codes():
    images = [np.full(IMAGE_CODES, c, np.uint16) for c in (0, 8191)]
    found = expand([8711, 8710, 8711], images, LAYOUT)
    assert set(found[2:1026]) == {4} and set(found[1029:2053]) == {8195}


BAD = {
    "too few images": ([8711, 8711], 1, IMAGE_CODES, "2 <image> in the text but 1 images"),
    "too many images": ([8710], 1, IMAGE_CODES, "0 <image> in the text but 1 images"),
    "1023 codes": ([8711], 1, 1023, "an image of 1023 codes, expected 1024"),
    "no codes": ([8711], 1, 0, "an image of 0 codes, expected 1024"),
    "an image id in text": ([4711], 0, 0, "the text spells id 4711"),
    "boi in text": ([8197], 0, 0, "the text spells id 8197"),
}


@pytest.mark.parametrize("name", BAD)
def test_mismatches(name):
    text, images, codes, message = BAD[name]
    with pytest.raises(InputError, match=message):
        expand(text, [np.zeros(codes, np.int64)] * images, LAYOUT)


@pytest.mark.parametrize("code", [-1, 8192, 65535])
def test_a_code_outside_the_codebook(code):
    codes = np.zeros(IMAGE_CODES, np.int64)
    codes[77] = code
    with pytest.raises(InputError, match=rf"image code {code} is outside 0\.\.8191"):
        expand([8711], [codes], LAYOUT)


# What the native expansion must agree with: rows good and bad, of both kinds.
row_texts = st.lists(st.sampled_from([8711, 8711, 8710, 3, 8999, *range(8712, 8720), 5, 8197, 9000, -1]), max_size=9)
row_specs = st.tuples(
    st.one_of(text_ids, text_ids, text_ids, row_texts), st.integers(-1, 8) | st.just(0), st.integers(0, 9)
)


def native(rows, table, layout=LAYOUT, text_type=np.int64, blocks=3, threads=0):
    """expand_rows of (text, images, ready) rows, whose images are rows of `table`, handed over in several blocks."""
    offsets = np.cumsum([0, *(len(text) for text, _, _ in rows)])
    image_offsets = np.cumsum([0, *(len(images) for _, images, _ in rows)])
    text = np.array([i for row in rows for i in row[0]], dtype=text_type)
    images = np.array([i for row in rows for i in row[1]], dtype=np.int64)
    ready = np.array([row[2] for row in rows], dtype=bool)
    parts = np.array_split(table, blocks)
    return expand_rows(text, offsets, parts, images, image_offsets, layout, ready=ready, threads=threads)


def reference(text, images, ready, table, layout=LAYOUT):
    """(ids, "") or ([], message) of one row by the NumPy forms."""
    try:
        return (ready_ids(text, layout) if ready else expand(text, table[images], layout)).tolist(), ""
    except InputError as error:
        return [], str(error)


def test_native_rows_equal_the_reference():
    seen: set[str] = set()

    @settings(max_examples=80, deadline=None)
    @given(st.lists(row_specs, max_size=7), st.integers(0, 2**32 - 1), st.integers(0, 3), st.sampled_from(["i4", "i8"]))
    # Rare among the random ones: ready rows, one with an id that does not exist; a code beyond the codebook.
    @example([([8712, 8713], 0, 0), ([8712, -1], 0, 0)], 0, 0, "i8")
    @example([([8711] * 3, 0, 5)] * 4, 2, 0, "i8")
    # And the others: rows without, with one and with two images; one image too few, an image's id, one that is none.
    @example([([8712], 0, 5), ([8711], 0, 5), ([8711] * 2, 0, 5)], 0, 0, "i8")
    @example([([8711] * 2, -1, 5), ([5], 0, 5), ([-1], 0, 5)], 0, 0, "i8")
    def compare(specs, seed, threads, text_type):
        draw = np.random.default_rng(seed)
        table = draw.integers(0, 8192, (5, IMAGE_CODES)).astype(np.uint16)
        # One image has a code beyond the codebook, and is drawn now and then.
        table[4, draw.integers(0, IMAGE_CODES)] = 8192
        rows = []
        for text, more, ready in specs:
            ready = bool(text) and ready == 0
            count = 0 if ready else max(0, text.count(8711) + (more if more > 6 or more < 0 else 0))
            rows.append((text, draw.choice(5, count, p=[0.24] * 4 + [0.04]).tolist(), ready))
        made = native(rows, table, text_type=text_type, threads=threads)
        assert made.ids.dtype == np.uint16 and made.offsets[0] == 0 and made.offsets[-1] == len(made.ids)
        for i, (text, images, ready) in enumerate(rows):
            ids, message = reference(text, images, ready, table)
            error = made.error(i, len(images), LAYOUT, ready)
            assert made.ids[made.offsets[i] : made.offsets[i + 1]].tolist() == ids
            assert (str(error) if error else "") == message
            seen.add(f"ready {made.kinds[i]}" if ready else f"{made.kinds[i]} with {min(len(images), 2)}")

    compare()
    # It has met good rows of both kinds and every kind of error.
    assert seen >= {"0 with 0", "0 with 1", "0 with 2", "ready 0", "ready 4"}, seen
    assert {name[0] for name in seen} >= set("01234"), seen


def test_native_expansion_of_many_rows_on_several_threads(golden, tokenizer):
    given_rows = [json.loads(line) for line in (golden / "sequences.jsonl").read_text().splitlines()]
    table = np.array([row["image_tokens"] for row in given_rows], np.uint16)
    rows, expected = [], []
    for k in range(300):
        row = given_rows[k % len(given_rows)]
        ids = tokenizer.encode(row["text"])
        rows.append((ids, [k % len(given_rows)] * count_images(ids, tokenizer.layout), False))
        expected += row["tokens"]
    for threads in (1, 2, 7, 1000):
        made = native(rows, table, tokenizer.layout, threads=threads)
        assert not made.kinds.any()
        np.testing.assert_array_equal(made.ids, expected)


@pytest.mark.parametrize("text_type", ["u2", "u4", "i4", "i8"])
@pytest.mark.parametrize("vocab_size", [9000, 65_536, 65_537, 100_000])
def test_widths(text_type, vocab_size):
    layout = replace(LAYOUT, vocab_size=vocab_size)
    table = np.full((1, IMAGE_CODES), 8191, np.uint16)
    top = min(vocab_size, np.iinfo(text_type).max + 1) - 1
    rows = [([8711, top], [0], False), ([top, 0], [], True), ([], [], False)]
    made = native(rows, table, layout, text_type, blocks=1)
    assert made.ids.dtype == (np.uint16 if vocab_size <= 65_536 else np.uint32)
    assert made.ids.tolist() == [0, 8197, *[8195] * 1024, 8196, top, 2, top, 0, 0, 2]
    if top < np.iinfo(text_type).max:
        made = native([([top + 1], [], True), ([top + 1], [], False)], table, layout, text_type)
        assert made.values.tolist() == [vocab_size] * 2 and "in tokens" in str(made.error(0, 0, layout, True))


def test_no_rows():
    made = native([], np.zeros((0, IMAGE_CODES), np.uint16))
    assert made.ids.tolist() == [] and made.offsets.tolist() == [0]


def test_buffers_are_checked_and_never_copied():
    text, codes = np.array([8711, 8800]), np.zeros((2, IMAGE_CODES), np.uint16)

    def call(text=text, offsets=(0, 2), codes=codes, images=(1,), image_offsets=(0, 1), ready=(0,)):
        arrays = [np.array(a, np.int64) for a in (offsets, images, image_offsets)]
        return expand_rows(text, arrays[0], [codes], *arrays[1:], LAYOUT, ready=np.array(ready))

    assert len(call().ids) == 3 + 1026
    for offsets in ((0, 3), (1, 0), (-1, 2)):
        with pytest.raises(IndexError, match="text offset"):
            call(offsets=offsets)
    for image_offsets in ((0, 2), (-1, 1)):
        with pytest.raises(IndexError, match="image offset"):
            call(image_offsets=image_offsets)
    for image in (2, -1):
        with pytest.raises(IndexError, match=f"image {image}, expected 0..2"):
            call(images=(image,))
    with pytest.raises(ValueError, match="one entry more than ready"):
        call(offsets=(0, 1, 2))
    for wrong in (codes.astype(np.int64), np.zeros((4, IMAGE_CODES), np.uint16)[::2], codes.tolist()):
        with pytest.raises(TypeError):
            call(codes=wrong)
    with pytest.raises(ValueError, match="1024"):
        call(codes=np.zeros((2, 1023), np.uint16))
    for wrong in (text.astype(np.float64), np.zeros(4, np.int64)[::2]):
        with pytest.raises(TypeError):
            call(text=wrong)
    # Arrow hands out buffers that cannot be written.
    text.flags.writeable = codes.flags.writeable = False
    assert len(call().ids) == 3 + 1026


def test_ready_ids():
    assert ready_ids([0, 8999, 2], LAYOUT).tolist() == [0, 8999, 2]
    for tokens, message in {
        (0, 9000): "id 9000 in tokens, expected 0..8999",
        (-1,): "id -1 in tokens",
        (): "empty list",
        (1.5,): "tokens holds float64",
        ("1",): "tokens holds",
        (1, None): "tokens holds object",
        ((1, 2), (3, 4)): "in 2 dimensions",
        ((1, 2), (3,)): "different lengths",
        (2**64,): "tokens holds",
        (2**63,): "tokens holds",
    }.items():
        with pytest.raises(InputError, match=message):
            ready_ids(list(tokens), LAYOUT)
    with pytest.raises(InputError, match="tokens is str, expected a list"):
        integer_array("123", "tokens")


def test_open_tokenizer(golden_checkpoint, tmp_path):
    path = golden_checkpoint / "tokenizer" / "text_tokenizer_modified.json"
    layout = open_tokenizer(golden_checkpoint).layout
    assert (layout.placeholder, layout.image_start, layout.eot) == (8711, 4, 8710)
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(InputError, match="md5 .*, expected .*checklist.chk"):
        open_tokenizer(golden_checkpoint)
    path.unlink()
    assert open_tokenizer(golden_checkpoint).layout == layout
    (tmp_path / "nothing").mkdir()
    for folder, message in {"gone": "no such folder", "nothing": "no tokenizer file"}.items():
        with pytest.raises(InputError, match=message):
            open_tokenizer(tmp_path / folder)
