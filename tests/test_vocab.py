"""The id layout is read from the tokenizer and asserted."""

import json

import numpy as np
import pytest

from medmax_fast.vocab import IMAGE_CODES, IdLayout, TextTokenizer, VocabError, code_name


@pytest.fixture(scope="module")
def paths(golden):
    folder = golden / "checkpoint" / "tokenizer"
    return folder / "text_tokenizer.json", folder / "text_tokenizer_modified.json"


def test_layout_of_the_published_vocabulary(paths):
    plain, modified = (IdLayout.from_file(path) for path in paths)
    assert plain == modified
    assert (plain.bos, plain.pad, plain.eos, plain.unk) == (0, 1, 2, 3)
    assert (plain.image_start, plain.image_end, plain.num_codes) == (4, 8196, 8192)
    assert (plain.eoi, plain.boi, plain.eot, plain.placeholder, plain.text_start) == (8196, 8197, 8710, 8711, 8712)


def test_code_names_spell_digits_as_letters():
    assert code_name(5678) == "IMGIMGFGHIZ"
    assert code_name(0) == "IMGIMGAZ"


def vocabulary(paths):
    return dict(json.loads(paths[1].read_text())["model"]["vocab"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda v: v.update({"IMGIMGFGHIZ": v["IMGIMGFGHJZ"], "IMGIMGFGHJZ": v["IMGIMGFGHIZ"]}), "image code 5678"),
        (lambda v: v.pop("<eoss>"), "<eoss>"),
        (lambda v: [v.pop(n) for n in list(v) if n.startswith("IMGIMG")], "no image tokens"),
        (lambda v: v.update({"<s>": v["</s>"], "</s>": v["<s>"]}), "order"),
        (lambda v: v.pop("<image>"), "<reserved08707> or <image>"),
        (lambda v: v.update(far=70_000), "ids for a vocabulary of 70001"),
    ],
)
def test_another_layout_is_refused(paths, damage, message):
    vocab = vocabulary(paths)
    damage(vocab)
    with pytest.raises(VocabError, match=message):
        IdLayout.from_vocab(vocab)


def test_codes_and_ids(paths):
    layout = IdLayout.from_file(paths[0])
    codes = np.random.default_rng().integers(0, 8192, IMAGE_CODES)
    np.testing.assert_array_equal(layout.codes_from_ids(layout.ids_from_codes(codes)), codes)
    span = layout.image_span(codes)
    assert (span[0], span[-1], len(span)) == (layout.boi, layout.eoi, 1026)
    for bad in (-1, 8192):
        with pytest.raises(ValueError, match=f"image code {bad} "):
            layout.ids_from_codes(np.array([0, bad]))
    for bad in (3, 8196):
        with pytest.raises(ValueError, match=f"id {bad} "):
            layout.codes_from_ids(np.array([4, bad]))
    with pytest.raises(ValueError, match="1023 codes, expected 1024"):
        layout.image_span(codes[1:])


@pytest.mark.parametrize("index", [0, 1])
def test_text_round_trip_in_both_spellings(paths, index):
    tokenizer = TextTokenizer(paths[index])
    text = "Naïve café: µ-opioid, 5 µm² — ±3 %, β-catenin."
    ids = tokenizer.encode(text)
    assert min(ids) >= tokenizer.layout.text_start
    assert tokenizer.decode([0, *ids, 8710, 2]) == text
    for spelling in ("<image>", "<reserved08707>"):
        assert tokenizer.encode(f"a{spelling}b").count(8711) == 1
    assert tokenizer.sha256() == TextTokenizer(paths[1 - index]).sha256()


def test_not_a_tokenizer_file(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{")
    with pytest.raises(VocabError, match="not a tokenizers JSON file"):
        IdLayout.from_file(path)
