"""Scoring of yes/no and letter answers under two protocols.

`medmax-v1` is the published scoring with its quirks: "yes" and "no" are looked for anywhere in the lower-cased
output, so "normal" and "unknown" count as "no" and "eyes" as "yes"; a letter must be the whole stripped, upper-cased
output, so "B." is wrong; a gold answer is compared as it is written, so a gold "Yes" is never matched. `strict` looks
for whole words, takes a letter where it stands as an answer ("B.", "**B**", "B, because", "The answer is (B)", but not
"A patient"), and accepts the gold answer in any case. Neither drops anything: an output from which strict parsing gets
no answer is wrong and is counted as unparsed.
"""

import re

_WORDS = re.compile(r"\b(yes|no)\b")
# Marks of emphasis and quotation around an answer.
_MARKS = r"[\s*_`'\"]*"
_LEAD = r"(?:the )?(?:(?:correct|right|best) )?(?:answer|option|choice)(?: is|:)?:?"
# A letter in brackets, or with a mark, a comma, a dash or a new line behind it, or alone. "A patient" is not an answer.
_LETTER = re.compile(rf"{_MARKS}(?:\(([A-Da-d])\)|([A-D])(?=[.):,;*_`'\"\n]|\s+[-\u2013\u2014]\s|\s*$))(?!\.?\d)")
# Behind "The answer is" any words may follow, and alone a small letter serves; "a" might be the beginning of a word.
_AFTER_LEAD = re.compile(rf"{_MARKS}(?i:{_LEAD}){_MARKS}\(?([A-D])\b(?!\.?\d)")
_ALONE = re.compile(rf"{_MARKS}([b-d])[.)]?{_MARKS}")


def score(kind: str, answer: str, output: str) -> dict:
    """Score one output against its gold answer.

    kind: `yes_no` or `letter`. Returns {"medmax-v1": bool, "strict": bool, "parsed": str or None}, where parsed is
    the answer that strict parsing finds.
    """
    assert kind in ("yes_no", "letter"), kind
    parsed = parse_yes_no(output) if kind == "yes_no" else parse_letter(output)
    gold = answer.strip()
    gold = gold.lower() if kind == "yes_no" else gold.upper()
    published = published_yes_no if kind == "yes_no" else published_letter
    return {"medmax-v1": published(answer, output), "strict": parsed == gold, "parsed": parsed}


def published_yes_no(answer: str, output: str) -> bool:
    """Right if the lower-cased output holds the gold word anywhere and the other word nowhere."""
    output = output.lower()
    other = {"yes": "no", "no": "yes"}.get(answer)
    return other is not None and answer in output and other not in output


def published_letter(answer: str, output: str) -> bool:
    """Right if the stripped, upper-cased output is the gold letter."""
    return answer == output.upper().strip()


def parse_yes_no(output: str) -> str | None:
    """`yes` or `no` if exactly one of them stands in the output as a word, else None."""
    found = set(_WORDS.findall(output.lower()))
    return found.pop() if len(found) == 1 else None


def parse_letter(output: str) -> str | None:
    """The letter A to D with which the output answers, else None."""
    output = output.strip()
    match = _LETTER.match(output) or _AFTER_LEAD.match(output) or _ALONE.fullmatch(output)
    return next(group for group in match.groups() if group).upper() if match else None
