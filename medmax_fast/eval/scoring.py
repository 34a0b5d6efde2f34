"""Scoring of yes/no and letter answers under two protocols, and the statistics of a task.

`medmax-v1` is the published scoring with its quirks: "yes" and "no" are looked for anywhere in the lower-cased
output, so "normal" and "unknown" count as "no" and "eyes" as "yes"; a letter must be the whole stripped, upper-cased
output, so "B." is wrong; a gold answer is compared as it is written, so a gold "Yes" is never matched. `strict` looks
for whole words, takes a letter only where it stands as an answer, and accepts the gold answer in any case. Neither
drops anything: an output from which strict parsing gets no answer is wrong and is counted as unparsed.

All accuracies are fractions 0..1, here and in results.json; tables for people show percent.
"""

import math
import re

from medmax_fast.runtime import InputError

PROTOCOLS = ("medmax-v1", "strict")

# 97.5 % quantile of the normal distribution.
Z95 = 1.959963984540054

_WORDS = re.compile(r"\b(yes|no)\b")
# A, (A), A. A) A: and any of these followed by the text of the choice; "A patient" is not an answer.
_LETTER = re.compile(r"(?:\(([A-D])\)|([A-D])[.):]|([A-D])$)(?:\s|$)")


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
    """The capital letter A to D with which the output answers, else None."""
    match = _LETTER.match(output.strip())
    return next(group for group in match.groups() if group) if match else None


def standard_error(correct: int, n: int) -> float | None:
    """Standard deviation (ddof 1) of n scores of 0 or 1, of which `correct` are 1, over sqrt(n); None below n = 2."""
    if n < 2:
        return None
    return math.sqrt(correct * (n - correct) / (n * (n - 1)) / n)


def wilson(correct: int, n: int) -> list[float]:
    """Wilson 95 % interval [low, high] of a share, as fractions; it stays inside 0..1 and is not empty at 0 or n."""
    assert 0 <= correct <= n and n > 0
    share, z2 = correct / n, Z95 * Z95
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # At the ends the formula gives exactly 0 or 1; rounding must not.
    return [0.0 if correct == 0 else middle - half, 1.0 if correct == n else middle + half]


def task_result(samples: list[dict], protocol: str) -> dict:
    """Figures of one task from its samples (as written to samples.jsonl).

    accuracy, stderr and ci95 are of `protocol`; both protocols' accuracies stand under `by_protocol`. unparsed:
    outputs without a strict answer; failed: questions that the model could not be asked (they count as wrong).
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"--protocol {protocol}: expected {' or '.join(PROTOCOLS)}")
    n = len(samples)
    assert n > 0
    right = {name: sum(sample["correct"][name] for sample in samples) for name in PROTOCOLS}
    failed = sum(sample["error"] is not None for sample in samples)
    return {
        "accuracy": right[protocol] / n,
        "stderr": standard_error(right[protocol], n),
        "n": n,
        "ci95": wilson(right[protocol], n),
        "correct": right[protocol],
        "unparsed": sum(sample["parsed"] is None for sample in samples) - failed,
        "failed": failed,
        "by_protocol": {name: right[name] / n for name in PROTOCOLS},
    }


def plain_mean(values: list[float]) -> float:
    """The published Average: every task counts the same, whatever its number of questions."""
    assert values
    return math.fsum(values) / len(values)
