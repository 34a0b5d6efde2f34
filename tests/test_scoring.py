"""Hand-computed scoring cases for every quirk of medmax-v1, and what strict makes of the same outputs."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medmax_fast.eval import published
from medmax_fast.eval.scoring import parse_letter, parse_yes_no, score
from medmax_fast.eval.statistics import plain_mean

# gold, output, right under medmax-v1, right under strict, strictly parsed answer
YES_NO = [
    ("yes", "yes", True, True, "yes"),
    ("no", "no", True, True, "no"),
    ("yes", " Yes", True, True, "yes"),
    ("no", "No.", True, True, "no"),
    ("yes", "no", False, False, "no"),
    # A word that holds the other word: "no" in normal, unknown, not, nodule.
    ("no", "normal", True, False, None),
    ("no", "unknown", True, False, None),
    ("no", "cannot tell", True, False, None),
    ("yes", "yes, a nodule", False, True, "yes"),
    ("yes", "yes, it is not normal", False, True, "yes"),
    # "yes" inside "eyes".
    ("yes", "the eyes", True, False, None),
    ("no", "no eyes", False, True, "no"),
    # Both words, neither word, nothing.
    ("yes", "yes or no", False, False, None),
    ("no", "yes or no", False, False, None),
    ("yes", "maybe", False, False, None),
    ("yes", "", False, False, None),
    # A gold answer in another case is never matched by the published comparison.
    ("Yes", "yes", False, True, "yes"),
    ("no ", "no", False, True, "no"),
    # Underscores and digits continue a word; punctuation does not.
    ("no", "no-one", True, True, "no"),
    ("no", "no_1", True, False, None),
    ("yes", "**Yes**", True, True, "yes"),
    ("yes", "_Yes_", True, True, "yes"),
    ("no", "__No__, it is not", True, True, "no"),
]

LETTER = [
    ("A", "A", True, True, "A"),
    ("B", " B\n", True, True, "B"),
    ("C", "A", False, False, "A"),
    ("A", "a", True, True, "A"),
    ("A", "a mass", False, False, None),
    ("B", "b) a mass", False, True, "B"),
    ("B", "b", True, True, "B"),
    ("A", "(a)", False, True, "A"),
    # Anything around the letter makes it wrong as published.
    ("B", "B.", False, True, "B"),
    ("B", "(B)", False, True, "B"),
    ("B", "B) pneumonia", False, True, "B"),
    ("B", "B: pneumonia", False, True, "B"),
    # Ways in which assistants answer.
    ("B", "The answer is B", False, True, "B"),
    ("B", "The correct answer is: (B) a rib", False, True, "B"),
    ("B", "Answer: B", False, True, "B"),
    ("B", "option B because it is", False, True, "B"),
    ("B", "**B**", False, True, "B"),
    ("B", "**Answer:** B", False, True, "B"),
    ("B", '"B"', False, True, "B"),
    ("B", "B, because", False, True, "B"),
    ("B", "B\nPneumonia", False, True, "B"),
    ("B", "B - pneumonia", False, True, "B"),
    ("B", "B.Pneumonia", False, True, "B"),
    ("B", "The answer is a B cell", False, False, None),
    ("A", "A-level", False, False, None),
    ("A", "The answer is A.5", False, False, None),
    ("C", "Both B and C", False, False, None),
    *(
        ("B", output, False, True, "B")
        for output in (
            "The answer is b",
            "Answer: b.",
            "The answer is (b)",
            "B is correct",
            "B is the best choice",
            "Final answer: B",
            "The correct answer is option B",
            "The answer choice is B",
            "The most likely answer is B",
            "[B]",
            "B!",
            "Ans: B",
            "The correct answer would be B.",
            "\\boxed{B}",
            "B</s>",
            "B\u2014pneumonia",
            "- B",
            "The answer is __B__",
            "_B_",
            "The answer is B because A is a tumour",
            "B. The mass",
            "'B'",
            "B;",
            "`B`",
        )
    ),
    # Several answers are none, and a letter may begin a word.
    *(
        ("A", output, False, False, None)
        for output in (
            "A, B",
            "A, C and D",
            "Answer: A, B, C",
            "Answer: A or B",
            "The answer is A and B",
            "A: no. B: yes",
            "A) x B) y C) z D) w",
            "(A) Pneumonia (B) Effusion",
            "The answer is A CT scan",
            "A CT scan",
            "A/B",
            "A & B",
            "An A",
            "",
            "?",
            "Aorta",
            "A-a gradient",
        )
    ),
    *(("C", output, False, False, None) for output in ("The answer is C-reactive protein", "C-reactive", "C.T. scan")),
    ("A", "A patient", False, False, None),
    ("A", "AB", False, False, None),
    ("A", "A.5", False, False, None),
    ("D", "E", False, False, None),
    ("D", "", False, False, None),
    ("b", "B", False, True, "B"),
    (" B", "B", False, True, "B"),
]


@pytest.mark.parametrize("kind, cases", [("yes_no", YES_NO), ("letter", LETTER)])
def test_hand_computed_cases(kind, cases):
    for gold, output, v1, strict, parsed in cases:
        assert score(kind, gold, output) == {"medmax-v1": v1, "strict": strict, "parsed": parsed}, (gold, output)


@given(st.text(), st.sampled_from(["yes", "no"]))
def test_strict_yes_no_is_exactly_one_whole_word(output, gold):
    words = set(re.findall(r"\w+", output.lower())) & {"yes", "no"}
    assert parse_yes_no(output) == (words.pop() if len(words) == 1 else None)
    # Never right both ways.
    other = "no" if gold == "yes" else "yes"
    assert not (score("yes_no", gold, output)["medmax-v1"] and score("yes_no", other, output)["medmax-v1"])


@given(st.text(alphabet="ABCDEabcd().: \n", max_size=6))
def test_a_strict_letter_is_a_published_one_after_removing_marks(output):
    letter = parse_letter(output)
    if letter:
        assert re.search("[A-Ea-d]", output)[0].upper() == letter
    if output.strip() in ("A", "B", "C", "D"):
        assert letter == output.strip()


def test_published_rows_average_to_the_printed_average():
    assert len(published.PUBLISHED) == 6
    for model, row in published.PUBLISHED.items():
        assert tuple(row["tasks"]) == published.TASK_IDS
        mean = plain_mean(list(row["tasks"].values()))
        if model == "LLaVA-Med-v1.5-7B":
            assert round(mean, 1) == 36.9 and row["average"] == 36.6
        else:
            assert abs(mean - row["average"]) < 0.06, model
