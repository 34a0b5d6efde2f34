"""Turns of a conversation as the content of a request: what the user says, eot, what the assistant said, eot, ..

The tuned model has seen [bos, image, question, eot, answer]: a conversation repeats it, with an eot after every turn.
The pieces of a turn keep their order, so whoever wants the order of the training puts images first. What a system says
goes before the next turn of the user, which has no other place in this form. Consecutive turns of one side are one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from medmax_fast.runtime import InputError
from medmax_fast.vocab import IMAGE_IDS, PLACEHOLDER_NAMES, TextTokenizer, read_vocab

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Turn:
    """What one side said. content: {"type": "text", "text": str} and {"type": "image", "path": str}, in order."""

    role: str
    content: list[dict]


def content_of(turns: Sequence[Turn], tokenizer: TextTokenizer) -> list[dict]:
    """The content of a Request that asks for the assistant's next turn; the last eot is the Request's own.

    InputError for turns that are no conversation, and for text with a special token, which would forge a turn.
    """
    turns = _merged(turns)
    for turn in turns:
        for text in _texts(turn):
            _refuse_special(text, tokenizer)
    content: list[dict] = []
    for turn in turns:
        content += [{"type": "eot"}, *turn.content] if content else turn.content
    return content


def count_ids(turns: Sequence[Turn], tokenizer: TextTokenizer) -> int:
    """Ids of the prompt that the turns make: bos, text, 1,026 for an image, an eot after each turn."""
    turns = _merged(turns)
    texts = [text for turn in turns for text in _texts(turn)]
    images = sum(piece["type"] == "image" for turn in turns for piece in turn.content)
    return 1 + len(turns) + IMAGE_IDS * images + sum(map(len, tokenizer.encode_batch(texts)))


def fit(turns: Sequence[Turn], tokenizer: TextTokenizer, most: int) -> list[Turn]:
    """The turns without the oldest questions and their answers, as many as it takes for a prompt of `most` ids.

    What a system says stays. InputError if the last question alone is longer.
    """
    turns = list(turns)
    while (length := count_ids(turns, tokenizer)) > most:
        answer = next((i for i, turn in enumerate(turns) if turn.role == "assistant"), None)
        if answer is None:
            raise InputError(f"the question takes {length} ids, expected at most {most} (an image takes {IMAGE_IDS})")
        while answer < len(turns) and turns[answer].role == "assistant":
            answer += 1
        turns = [turn for turn in turns[:answer] if turn.role == "system"] + turns[answer:]
    return turns


def _merged(turns: Sequence[Turn]) -> list[Turn]:
    """The conversation as user, assistant, user, .., user; InputError if it is none."""
    for number, turn in enumerate(turns, 1):
        if turn.role not in ROLES:
            raise InputError(f"turn {number}: role {turn.role!r}, expected one of {', '.join(ROLES)}")
        if turn.role == "system" and any(piece["type"] == "image" for piece in turn.content):
            raise InputError(f"turn {number}: an image in a system turn, expected text")
    if not turns or turns[-1].role != "user":
        found = f"the last turn is that of the {turns[-1].role}" if turns else "no turns"
        raise InputError(f"{found}, expected a conversation that ends with a turn of the user")
    merged: list[Turn] = []
    for assistant, group in groupby(turns, key=lambda turn: turn.role == "assistant"):
        pieces = _pieces(list(group))
        if not assistant and not pieces:
            raise InputError("a turn of the user is empty")
        if not merged and assistant:
            raise InputError("the first turn is that of the assistant, expected a question of the user")
        merged.append(Turn("assistant" if assistant else "user", pieces))
    return merged


def _pieces(turns: list[Turn]) -> list[dict]:
    """Pieces of consecutive turns; a text that follows another turn's text begins on a line of its own."""
    pieces: list[dict] = []
    for turn in turns:
        new = [piece for piece in turn.content if piece["type"] != "text" or piece["text"]]
        if pieces and new and pieces[-1]["type"] == new[0]["type"] == "text":
            pieces.append({"type": "text", "text": "\n"})
        pieces += new
    return pieces


def _texts(turn: Turn) -> list[str]:
    return [piece["text"] for piece in turn.content if piece["type"] == "text"]


def _refuse_special(text: str, tokenizer: TextTokenizer) -> None:
    """InputError for a text in which the tokenizer finds a token that is not text."""
    start = tokenizer.layout.text_start
    if all(i >= start for i in tokenizer.encode(text)):
        return
    names = [*PLACEHOLDER_NAMES, *(name for name, i in read_vocab(tokenizer.path).items() if i < start)]
    # Names of image codes are no tokens when they stand in text.
    special = [name for name in names if name in text and min(tokenizer.encode(name)) < start]
    # The earliest, and of those that begin there the longest.
    found = min(special, key=lambda name: (text.index(name), -len(name)))
    raise InputError(f"the text holds the special token {found}, which only the model's own form of prompts may use")
