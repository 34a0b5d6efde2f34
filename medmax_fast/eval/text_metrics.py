"""Text metrics of an open answer against its reference: cheap, offline figures beside a judge's verdict.

exact_match, token_f1 and token_recall need nothing but Python and follow SQuAD's evaluation (Rajpurkar et al. 2016):
lower case, no punctuation, no articles, tokens between white space, repeated tokens counted as often as they occur.
Recall of an answer's tokens alone is what LLaVA-Med reports for open questions; it rewards long answers. BLEU is
sacrebleu's (case kept, 13a tokens, exponential smoothing, orders as far as the answers are long, since most answers are
shorter than four words), ROUGE-L is rouge-score's F-measure without stemming, which sees ASCII letters and digits only.
Where one of these two libraries is missing its metric is left out, and `missing` says so. None of the metrics knows
synonyms or negation: "no fracture" shares most tokens with "fracture". All values are fractions 0..1.
"""

import functools
import math
import re
import string
from collections import Counter

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize(text: str) -> str:
    """Lower case without ASCII punctuation and articles, single spaces between words."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(answer: str, reference: str) -> int:
    """1 if both are the same after normalize, else 0."""
    return int(normalize(answer) == normalize(reference))


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of the shares of either side's tokens that the other has too."""
    shared, answered, wanted = _token_counts(answer, reference)
    if not answered or not wanted:
        return float(answered == wanted)
    return 2 * shared / (answered + wanted)


def token_recall(answer: str, reference: str) -> float:
    """Share of the reference's tokens that the answer has."""
    shared, answered, wanted = _token_counts(answer, reference)
    return shared / wanted if wanted else float(not answered)


def text_metrics(answer: str, reference: str) -> dict:
    """All metrics that can be computed here: exact_match (0 or 1), token_f1, token_recall, bleu, rouge_l.

    An empty reference is met by an empty answer only.
    """
    metrics = {
        "exact_match": exact_match(answer, reference),
        "token_f1": token_f1(answer, reference),
        "token_recall": token_recall(answer, reference),
    }
    empty = None if reference.strip() else float(not answer.strip())
    if _bleu():
        metrics["bleu"] = _fraction(_bleu().sentence_score(answer, [reference]).score) if empty is None else empty
    if _rouge():
        metrics["rouge_l"] = float(_rouge().score(reference, answer)["rougeL"].fmeasure) if empty is None else empty
    return metrics


def mean_metrics(samples: list[dict], answers: list[str], references: list[str]) -> dict:
    """Metrics of a task: means of what every sample has, and under `bleu` the BLEU of all answers as one corpus.

    samples: what text_metrics gave for each pair of `answers` and `references`. Empty for no samples. Corpus BLEU is
    0 for answers that are all empty, and is not the mean of the sentences' BLEU.
    """
    assert len(samples) == len(answers) == len(references)
    if not samples:
        return {}
    names = [name for name in samples[0] if name != "bleu" and all(name in sample for sample in samples)]
    means = {name: math.fsum(sample[name] for sample in samples) / len(samples) for name in names}
    if _bleu():
        means["bleu"] = _fraction(_bleu().corpus_score(answers, [references]).score)
    return means


def missing() -> list[str]:
    """One line for each metric that cannot be computed here, with what to install."""
    wanted = (("bleu", "sacrebleu", _bleu()), ("rouge_l", "rouge-score", _rouge()))
    install = "pip install 'medmax_fast[eval]'"
    return [f"{metric} is left out: it needs {name} ({install})" for metric, name, found in wanted if not found]


def _token_counts(answer: str, reference: str) -> tuple[int, int, int]:
    """Tokens that both have, of the answer, of the reference."""
    answered, wanted = Counter(normalize(answer).split()), Counter(normalize(reference).split())
    return (answered & wanted).total(), answered.total(), wanted.total()


def _fraction(percent: float) -> float:
    # sacrebleu's percentages come out of an exp(log) and may exceed 100 by an ulp.
    return min(percent / 100, 1.0)


@functools.cache
def _bleu():
    try:
        from sacrebleu.metrics import BLEU
    except ImportError:
        return None
    # force silences a warning about answers that end in " ."; it changes no score.
    return BLEU(effective_order=True, force=True)


@functools.cache
def _rouge():
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        return None
    return RougeScorer(["rougeL"])
