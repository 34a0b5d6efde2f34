"""Scoring of yes/no and letter answers under two protocols.

`medmax-v1` is the published scoring with its quirks: "yes" and "no" are looked for anywhere in the lower-cased
output, so "normal" and "unknown" count as "no" and "eyes" as "yes"; a letter must be the whole stripped, upper-cased
output, so "B." is wrong; a gold answer is compared as it is written, so a gold "Yes" is never matched. `strict` looks
for whole words, takes a letter where it stands as an answer ("B.", "**B**", "B, because", "The answer is (B)", but not
"A patient" nor "A or B"), and accepts the gold answer in any case. Neither drops anything: an output from which strict
parsing gets no answer is wrong and is counted as unparsed.
"""

import re

_WORDS = re.compile(r"\b(yes|no)\b")
# Marks of emphasis around words, as in **B** and _No_; what stands between letters, as in no_1, is part of a word.
_EMPHASIS = re.compile(r"(?<![^\W_])_+|_+(?![^\W_])|[*`]+|\\boxed")
_OPEN = r"[\s\"'(\[{-]*"
_LEAD = (
    r"(?i:(?:the )?(?:(?:final|correct|right|best|most likely) )*(?:answer|ans|option|choice)(?: choice| option)?"
    r"\s*(?:is|would be|:|=)?:?\s*(?:(?:option|choice|letter) )?)"
)
# What ends an answer of one letter: a mark, a dash, a new line; "A patient", "A.5", "C-reactive" and "C.T." go on.
_END = r"(?=\s*$|\s*[.,;:!?)\]}\"'\n<]|\s+[-\u2013\u2014]|[\u2013\u2014])(?!\s*[.:]\d|\.[A-Z]\.)"
_REASON = r"|(?=\s+(?:because|since|as|which|for|due)\b)"
_ANSWERS = [
    re.compile(pattern)
    for pattern in (
        rf"{_OPEN}([A-D]){_END}",
        rf"{_OPEN}([a-d])\)",
        rf"{_OPEN}([A-D]) is (?:the )?(?:correct|right|best)\b",
        rf"{_OPEN}{_LEAD}{_OPEN}([A-Da-d])(?:{_END}{_REASON})",
        rf"{_OPEN}([a-d])[\s.)\]}}\"'!]*$",
    )
]
# Another choice behind the first one: "A, B", "A or B", "A) x B) y".
_HEDGE = re.compile(r"^[\s.)\]}]*(?:[,/&;]|and|or)\s*\(?[A-D]\b|(?:^|[\s(\[])[A-D][.):\]]")


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
    found = set(_WORDS.findall(_EMPHASIS.sub("", output.lower())))
    return found.pop() if len(found) == 1 else None


def parse_letter(output: str) -> str | None:
    """The letter A to D with which the output answers, if it is one, else None."""
    text = _EMPHASIS.sub("", output).strip()
    match = next(filter(None, (pattern.match(text) for pattern in _ANSWERS)), None)
    return match[1].upper() if match and not _HEDGE.search(text[match.end() :]) else None
