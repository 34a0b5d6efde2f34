"""What may come next in a mixed-modal sequence: the rules of generation as pure functions of ids and positions.

Text ids, eos and (in `any` mode) boi may follow text; after boi come exactly 1,024 image ids and eoi. boi is
forbidden once fewer than 1,026 positions are left, so a picture that was begun always fits. Special ids are never
produced otherwise. A sequence's `State` changes by one id at a time (`advance`), and `due` says what the next id is
picked from. The engine picks ahead of what it has read; `due` answers for that too, as long as the answer does not
depend on the ids that are not known yet.
"""

from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from medmax_fast.vocab import IMAGE_CODES, IMAGE_IDS, IdLayout

MODES = ("text", "image", "any")


class Due(Enum):
    """What a sequence's next id is: picked from text ids and eos (and boi), from image ids, given, or none."""

    TEXT = "text"
    IMAGE = "image"
    EOI = "eoi"
    NOTHING = "nothing"


@dataclass(frozen=True)
class Rules:
    """What one request allows: its mode, text ids per stretch of text, ids of prompt and output together."""

    mode: str
    max_new_tokens: int
    max_length: int


@dataclass(frozen=True)
class State:
    """Where a sequence stands: its ids so far, text ids left in this stretch, image ids and eoi still to come."""

    length: int
    text_left: int
    to_draw: int = 0
    eoi_due: bool = False
    done: bool = False


def begin(rules: Rules, prompt_length: int) -> State:
    """The state after a prompt, which in `image` mode ends in boi."""
    drawing = IMAGE_CODES if rules.mode == "image" else 0
    return State(prompt_length, rules.max_new_tokens, to_draw=drawing)


def due(state: State, rules: Rules, ahead: int = 0) -> Due:
    """What the next id is picked from after `ahead` more ids of the present kind, none of them eos or boi."""
    if state.done:
        return Due.NOTHING
    if state.to_draw:
        return Due.IMAGE if ahead < state.to_draw else Due.NOTHING
    if state.eoi_due:
        return Due.EOI if ahead == 0 else Due.NOTHING
    within = ahead < state.text_left and state.length + ahead < rules.max_length
    return Due.TEXT if within else Due.NOTHING


def advance(state: State, rules: Rules, new: int, layout: IdLayout) -> State:
    """The state after one more id, which must be one that `due` allows."""
    length = state.length + 1
    if state.to_draw:
        assert layout.image_start <= new < layout.image_end, new
        left = state.to_draw - 1
        whole = replace(state, length=length, to_draw=left)
        if left:
            return whole
        return replace(whole, done=True) if rules.mode == "image" else replace(whole, eoi_due=True)
    if state.eoi_due:
        assert new == layout.eoi, new
        return State(length, rules.max_new_tokens, done=length >= rules.max_length)
    left = state.text_left - 1
    if new == layout.boi:
        assert may_begin_image(rules, state.length), state
        return State(length, left, to_draw=IMAGE_CODES)
    assert new == layout.eos or new >= layout.text_start, new
    return State(length, left, done=new == layout.eos or not left or length >= rules.max_length)


def text_mask(layout: IdLayout, unwritable: list[int], boi: bool) -> np.ndarray:
    """bool [vocab]: the ids that text may continue with: eos, text but the `unwritable`, boi or not."""
    mask = np.zeros(layout.vocab_size, dtype=bool)
    mask[layout.text_start :] = True
    mask[unwritable] = False
    mask[layout.eos] = True
    mask[layout.boi] = boi
    return mask


def image_limit(rules: Rules) -> int:
    """boi is allowed as the id at 0-based positions below this."""
    return rules.max_length - IMAGE_IDS if rules.mode == "any" else 0


def may_begin_image(rules: Rules, position: int) -> bool:
    """Whether boi is allowed as the id at `position` (0-based)."""
    return position < image_limit(rules)


def room_for_image(prompt_length: int, max_length: int) -> bool:
    """Whether a prompt that ends in boi leaves room for the 1,024 image ids."""
    return prompt_length + IMAGE_CODES <= max_length


def images_only(ids: list[int], layout: IdLayout) -> list[int]:
    """The prompt of the image-conditioned stream: bos, boi, eoi and image ids of `ids`, in order."""
    kept = {layout.bos, layout.boi, layout.eoi}
    return [i for i in ids if i in kept or layout.image_start <= i < layout.image_end]


def guides(ids: list[int], text_scale: float, image_scale: float, layout: IdLayout) -> list[list[int]]:
    """Prompts of the streams, beside the full one, that guidance of these scales needs: [image-conditioned, none].

    none + s_image (image - none) + s_text (full - image) weighs them s_image - s_text and 1 - s_image. A stream of
    weight 0 is not needed, nor is the first where the prompt holds no image and both are the same. What is not needed
    is stood in for by the next one, in the last place by the full stream, which then is the only one: an empty list.
    """
    image, none = images_only(ids, layout), [layout.bos, layout.boi]
    if image_scale == 1:
        return [] if text_scale == 1 else [image]
    return [none] if text_scale == image_scale or image == none else [image, none]


def split_pieces(ids: list[int], layout: IdLayout) -> list[tuple[str, list[int]]]:
    """Generated ids as runs: ("text", text ids) and ("image", 1,024 image ids), in order; empty text is left out."""
    pieces: list[tuple[str, list[int]]] = []
    for i in ids:
        if layout.image_start <= i < layout.image_end:
            kind = "image"
        elif i >= layout.text_start:
            kind = "text"
        else:
            # eos ends, boi and eoi part: what follows is a new piece.
            pieces.append(("end", []))
            continue
        if not pieces or pieces[-1][0] != kind:
            pieces.append((kind, []))
        pieces[-1][1].append(i)
    return [piece for piece in pieces if piece[0] != "end"]
