"""Text metrics: cases computed by hand, properties on random text, and the way out where a library is missing."""

import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmax_fast.eval import text_metrics as tm
from medmax_fast.eval.text_metrics import exact_match, mean_metrics, normalize, text_metrics, token_f1, token_recall

words = st.lists(st.sampled_from(["left", "lung", "no", "opacity", "the", "X-ray", "5", "mm."]), max_size=8).map(
    " ".join
)


@pytest.fixture()
def without_libraries(monkeypatch):
    """As if neither sacrebleu nor rouge-score were installed."""
    for name in ("sacrebleu", "sacrebleu.metrics", "rouge_score", "rouge_score.rouge_scorer"):
        monkeypatch.setitem(sys.modules, name, None)
    tm._bleu.cache_clear()
    tm._rouge.cache_clear()
    yield
    tm._bleu.cache_clear()
    tm._rouge.cache_clear()


def test_normalize():
    assert normalize("  The X-ray\tshows an  opacity, (a small one). ") == "xray shows opacity small one"
    assert normalize("Theatre Anna 5.5%") == "theatre anna 55"
    assert normalize("A") == normalize("...") == normalize("") == ""


# (answer, reference, exact match, f1, recall)
CASES = [
    ("pneumonia", "Pneumonia.", 1, 1, 1),
    ("the left lung", "Left lung", 1, 1, 1),
    ("left lung", "right lung", 0, 1 / 2, 1 / 2),
    # Precision 1/3, recall 1.
    ("in left lung", "lung", 0, 2 * (1 / 3) / (4 / 3), 1),
    # A token counts as often as it is in both.
    ("lung lung lung", "lung lung opacity", 0, 2 / 3, 2 / 3),
    ("lung", "lung lung", 0, 2 / 3, 1 / 2),
    ("liver", "lung", 0, 0, 0),
    ("", "lung", 0, 0, 0),
    ("lung", "", 0, 0, 0),
    ("", "", 1, 1, 1),
    ("The.", "", 1, 1, 1),
]


@pytest.mark.parametrize("answer, reference, exact, f1, recall", CASES)
def test_hand_computed_tokens(answer, reference, exact, f1, recall):
    assert exact_match(answer, reference) == exact
    assert token_f1(answer, reference) == pytest.approx(f1)
    assert token_recall(answer, reference) == pytest.approx(recall)


def test_hand_computed_bleu_and_rouge():
    metrics = text_metrics("the cat sat on", "the cat sat on the mat")
    # All n-grams are right, and the brevity penalty is e^(1 - 6/4).
    assert metrics["bleu"] == pytest.approx(math.exp(-0.5))
    # Precision 1, recall 4/6.
    assert metrics["rouge_l"] == pytest.approx(0.8)
    # 1 of 2 words and no pair of them: 1/2 smoothed for pairs (1 of 2 * 1), two orders.
    assert text_metrics("left kidney", "left lung")["bleu"] == pytest.approx(math.sqrt(1 / 2 * 1 / 2))
    # One-word answers get a BLEU, other than by the standard four orders, and never more than 1.
    assert text_metrics("pneumonia", "pneumonia")["bleu"] == 1
    # A longest common subsequence of 2 out of 3 words.
    assert text_metrics("cat the sat", "the cat sat")["rouge_l"] == pytest.approx(2 / 3)
    assert text_metrics("opacities", "opacity")["rouge_l"] == 0


@pytest.mark.parametrize("answer, value", [("", 1), (" \n", 1), ("lung", 0), (".", 0)])
def test_empty_reference(answer, value):
    metrics = text_metrics(answer, "  ")
    assert (metrics["bleu"], metrics["rouge_l"]) == (value, value)


def test_corpus_bleu_is_not_the_mean_of_sentences():
    answers, references = ["a b c d", "x"], ["a b c d", "y z"]
    samples = [text_metrics(*pair) for pair in zip(answers, references, strict=True)]
    means = mean_metrics(samples, answers, references)
    # 4 of 5 words, 3 of 3 pairs, 2 of 2, 1 of 1, and 5 words for 6.
    assert means["bleu"] == pytest.approx(math.exp(1 - 6 / 5) * 0.8**0.25)
    assert {name: means[name] for name in means if name != "bleu"} == {
        "exact_match": 0.5,
        "token_f1": 0.5,
        "token_recall": 0.5,
        "rouge_l": 0.5,
    }
    assert mean_metrics([], [], []) == {}
    assert mean_metrics([text_metrics("", "")] * 2, ["", ""], ["", ""])["bleu"] == 0


def test_a_metric_some_samples_lack_has_no_mean():
    whole = text_metrics("lung", "lung")
    means = mean_metrics(
        [whole, {name: whole[name] for name in whole if name != "rouge_l"}], ["lung"] * 2, ["lung"] * 2
    )
    assert sorted(means) == ["bleu", "exact_match", "token_f1", "token_recall"]


@given(answer=st.one_of(st.text(), words), reference=st.one_of(st.text(), words))
def test_values_are_fractions(answer, reference):
    metrics = text_metrics(answer, reference)
    assert list(metrics) == ["exact_match", "token_f1", "token_recall", "bleu", "rouge_l"]
    assert all(0 <= value <= 1 for value in metrics.values())
    assert metrics["exact_match"] <= metrics["token_f1"] <= 1
    assert token_f1(answer, reference) == token_f1(reference, answer)
    assert text_metrics(reference, reference)["exact_match"] == 1
    for value in mean_metrics([metrics], [answer], [reference]).values():
        assert 0 <= value <= 1


@given(reference=words, extra=words)
def test_recall_never_falls_with_a_longer_answer(reference, extra):
    assert token_recall(f"{reference} {extra}", reference) == 1 or not normalize(reference)


def test_missing_libraries_are_named_and_left_out(without_libraries):
    assert sorted(text_metrics("lung", "lung")) == ["exact_match", "token_f1", "token_recall"]
    samples = [{"exact_match": 1, "token_f1": 1.0, "token_recall": 1.0, "bleu": 1.0, "rouge_l": 0.5}]
    # What an earlier run with the libraries found stays, but no corpus can be scored.
    assert "bleu" not in mean_metrics(samples, ["lung"], ["lung"])
    bleu, rouge = tm.missing()
    assert bleu.startswith("bleu") and "sacrebleu" in bleu and "medmax_fast[eval]" in bleu
    assert rouge.startswith("rouge_l") and "rouge-score" in rouge


def test_nothing_is_missing_here():
    assert tm.missing() == []


def test_no_network_and_no_import_before_use():
    """rouge-score brings NLTK, which can fetch data; here nothing of it may."""
    code = """if True:
        import socket, sys
        def refuse(*args, **kwargs):
            raise SystemExit("a socket was opened")
        socket.socket.connect = socket.getaddrinfo = refuse
        from medmax_fast.eval.text_metrics import text_metrics
        assert not {"sacrebleu", "rouge_score", "nltk"} & set(sys.modules)
        assert len(text_metrics("left lung", "the left lung")) == 5
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
