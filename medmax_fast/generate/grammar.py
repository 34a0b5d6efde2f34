"""What may come next in a mixed-modal sequence: the rules of generation as pure functions of ids and positions.

Text ids, eos and (in `any` mode) boi may follow text; after boi come exactly 1,024 image ids and eoi. boi is
forbidden once fewer than 1,026 positions are left, so a picture that was begun always fits. Special ids are never
produced otherwise.
"""

import numpy as np

from medmax_fast.vocab import IMAGE_CODES, IMAGE_IDS, IdLayout

MODES = ("text", "image", "any")


def text_mask(layout: IdLayout, unwritable: list[int], boi: bool) -> np.ndarray:
    """bool [vocab]: the ids that text may continue with: eos, text but the `unwritable`, boi or not."""
    mask = np.zeros(layout.vocab_size, dtype=bool)
    mask[layout.text_start :] = True
    mask[unwritable] = False
    mask[layout.eos] = True
    mask[layout.boi] = boi
    return mask


def image_mask(layout: IdLayout) -> np.ndarray:
    """bool [vocab]: the ids of codes."""
    mask = np.zeros(layout.vocab_size, dtype=bool)
    mask[layout.image_start : layout.image_end] = True
    return mask


def may_begin_image(mode: str, position: int, max_length: int) -> bool:
    """Whether boi is allowed as the id at `position` (0-based) of a sequence of at most `max_length` ids."""
    return mode == "any" and position < max_length - IMAGE_IDS


def room_for_image(prompt_length: int, max_length: int) -> bool:
    """Whether a prompt that ends in boi leaves room for the 1,024 image ids."""
    return prompt_length + IMAGE_CODES <= max_length


def images_only(ids: list[int], layout: IdLayout) -> list[int]:
    """The prompt of the image-conditioned stream: bos, boi, eoi and image ids of `ids`, in order."""
    kept = {layout.bos, layout.boi, layout.eoi}
    return [i for i in ids if i in kept or layout.image_start <= i < layout.image_end]


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
